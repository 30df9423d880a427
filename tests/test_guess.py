"""The game: the same for the same seed, fair, escaped, and its interval exact."""

import html
import io
import json
import math
import random
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigad import guess
from minigad.attribution import Attribution
from minigad.cli import main
from minigad.config import GADConfig, UserError
from minigad.guess import Question, Result, framed, game_page, interval, play, questions, which_is_the_teacher
from minigad.run_directory import RunDirectory

HOSTILE = (
    "<script>alert(1)</script></article></script> \"quoted\" 'it' \u202eevil \x1b[31m <img src=http://x.example/a.png>"
)


def seen_of(text):
    return Attribution([text], [0.5], 0.5, "prefix")._asdict()


def run_of(folder, samples, method="gad"):
    run = RunDirectory(folder, GADConfig(), {"method": method})
    run.write_evaluation({"nll": 1.0}, samples)
    return folder


def sample(i, **more):
    return {"prompt": f"p{i}", "teacher": f"teacher {i}", "student": f"student {i}", "finished": True, **more}


def judged_sample(i):
    return sample(i, teacher_score=float(i % 3), student_score=1.0)


def test_order_and_sides_depend_on_the_seed_alone(tmp_path):
    run = run_of(tmp_path / "run", [judged_sample(i) for i in range(60)])
    random.seed(1)
    first = questions(run, 20, seed=3)
    random.seed(2)
    assert questions(run, 20, seed=3) == first
    assert questions(run, 20, seed=4) != first
    asked, notes = first
    assert len({question.prompt for question in asked}) == 20
    assert 3 < sum(question.teacher for question in asked) < 17
    assert notes == ["20 of 60 held-out prompts, drawn with seed 3."]


def test_a_question_shows_each_text_with_its_own_score(tmp_path):
    """Whichever side the teacher is on; its text is the one that the discriminator read."""
    long = sample(0, teacher_read="teach", teacher_score=2.0, student_score=-1.0, seen={"teacher": seen_of("T"), "student": seen_of("S")})  # fmt: skip
    run = run_of(tmp_path / "run", [long])
    sides = set()
    for seed in range(8):
        (question,), _ = questions(run, seed=seed)
        mine = question.teacher
        sides.add(mine)
        assert (question.texts[mine], question.texts[1 - mine]) == ("teach", "student 0")
        assert (question.scores[mine], question.scores[1 - mine]) == (2.0, -1.0)
        assert (question.seen[mine].pieces, question.seen[1 - mine].pieces) == (["T"], ["S"])
        assert question.pick == mine
    assert sides == {0, 1}


def test_pairs_that_nobody_can_tell_are_left_out_and_counted(tmp_path):
    same = [{**sample(i), "student": f"teacher {i}"} for i in range(3)]
    cut = {**sample(3), "teacher": "ab", "teacher_read": "a", "student": "a"}
    asked, notes = questions(run_of(tmp_path / "run", [*same, cut, sample(4), sample(5)]))
    assert {question.prompt for question in asked} == {"p4", "p5"}
    assert "Left out, since both sides say the same: 4." in notes
    assert "The run has no scores of a discriminator for these samples." in notes
    with pytest.raises(UserError, match="all 3 of the student's completions"):
        questions(run_of(tmp_path / "same", same))


def test_runs_that_cannot_be_played_are_one_sentence(tmp_path):
    RunDirectory(tmp_path / "new", GADConfig(), {"method": "gad"})
    with pytest.raises(UserError, match="has no evaluated samples"):
        questions(tmp_path / "new")
    with pytest.raises(UserError, match="num_questions is 0"):
        questions(tmp_path / "new", 0)
    with pytest.raises(UserError, match="holds no run"):
        questions(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"teacher_score": "<b>"}, "field 'teacher_score'"),
        ({"teacher_score": 1.0}, "a score of one side only"),
        ({"teacher_read": 3}, "field 'teacher_read'"),
        ({"seen": {"teacher": seen_of("a")}}, "field 'student'"),
        ({"seen": {"teacher": {**seen_of("a"), "kind": "<b>"}, "student": seen_of("b")}}, "teacher's text is damaged"),
        (
            {"seen": {"teacher": seen_of("a"), "student": {**seen_of("b"), "contributions": []}}},
            "student's text is dam",
        ),
        ({"seen": {"teacher": seen_of("a"), "student": {**seen_of("b"), "pieces": [1]}}}, "student's text is damaged"),
        ({"seen": {"teacher": seen_of("a"), "student": {**seen_of("b"), "more": 1}}}, "student's text is damaged"),
    ],
)
def test_a_damaged_opinion_is_refused(damage, words, tmp_path):
    with pytest.raises(UserError, match=words):
        questions(run_of(tmp_path / "run", [sample(0, **damage)]))


# --- the interval ---


def at_least(right: int, total: int, share: float) -> float:
    return sum(math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(right, total + 1))


@settings(deadline=None)
@given(st.integers(1, 40).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_interval_is_clopper_and_pearsons(counts):
    """Their definition: at each end the outcome, or one further out, has probability 2.5%; summed here term by term."""
    right, total = counts
    low, high = interval(right, total)
    assert 0 <= low <= right / total <= high <= 1
    if right:
        assert at_least(right, total, low) == pytest.approx(0.025, rel=1e-6)
    if right < total:
        assert 1 - at_least(right + 1, total, high) == pytest.approx(0.025, rel=1e-6)


def test_interval_at_the_ends_has_a_closed_form():
    assert interval(0, 0) == (0.0, 1.0)
    assert interval(10, 10) == pytest.approx((0.025**0.1, 1.0))
    assert interval(0, 7, 0.9) == pytest.approx((0.0, 1 - 0.05 ** (1 / 7)))


# --- in a terminal ---

ASKED = [
    Question("p", ("t", "s"), 0, (2.0, 0.0), None),
    Question("q", ("s\x1b[31m", "t"), 1, (1.0, -1.0), None),
    Question("r", ("s", "t"), 1, (0.5, 0.5), None),
    Question("u", ("s", "t"), 1, None, None),
]


def played(*words):
    said, answers = [], iter(words)

    def read(prompt):
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    return play(ASKED, ["note"], read, said.append), said


def test_terminal_counts_both_players_and_says_why():
    result, said = played("A", "what?", " a ", "b", "b")
    assert result == Result(right=3, answered=4, judge_right=1, judged=2)
    text = "\n".join(said)
    assert f"Right: the teacher is A. The discriminator takes A for the teacher, rightly, and is {1 / (1 + math.exp(-2)):.1%} sure (A +2.00, B +0.00)." in text  # fmt: skip
    assert "Wrong: the teacher is B. The discriminator takes A for the teacher, wrongly" in text
    assert "The discriminator cannot tell: A +0.50, B +0.50." in text
    assert said.count("Please answer a, b or q.") == 1
    assert "\x1b" not in text
    assert said[-2:] == [
        "You: 3 of 4 right (95%: 19% to 99%; chance is 50%).",
        "The discriminator: 1 of 2 right (95%: 1% to 99%; chance is 50%).",
    ]


@pytest.mark.parametrize("words", [("a", "q"), ("a",)])
def test_terminal_stops_when_asked_or_when_the_input_ends(words):
    result, said = played(*words)
    assert (result.right, result.answered) == (1, 1)
    assert said[-2].startswith("You: 1 of 1 right")


def test_command_asks_on_stdin_or_writes_the_page(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path / "run", [judged_sample(i) for i in range(5)])
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n" * 4))
    assert main(["guess", str(run), "--num-questions", "4"]) == 0
    assert "of 4 right (95%" in capsys.readouterr().out
    assert main(["guess", str(run), "--html", str(tmp_path / "game.html")]) == 0
    assert (tmp_path / "game.html").read_text() == game_page(*questions(run))
    assert main(["guess", str(run), "--html", str(tmp_path / "game.txt")]) == 2
    assert "name a .html file" in capsys.readouterr().err


# --- as a page ---


def hostile_run(folder):
    seen = {"teacher": seen_of(HOSTILE), "student": seen_of(HOSTILE + "!")}
    texts = {"prompt": HOSTILE, "teacher": HOSTILE, "student": HOSTILE + "!"}
    return run_of(folder, [{**texts, "finished": True, "teacher_score": 1.0, "student_score": 0.0, "seen": seen}])


def test_page_shows_texts_as_text_and_refers_to_nothing_outside(tmp_path):
    page = game_page(*questions(hostile_run(tmp_path / "run")))
    assert page.count("<script") == page.count("</script>") == 2  # the data and the game
    assert page.count("<article") == page.count("</article>") == 1
    assert "&lt;img src=http://x.example/a.png&gt;" in page
    assert not set(page) & set("\u202e\x1b")
    tags = " ".join(re.findall(r"<[^>]*>", page))
    assert not re.search(r"\bsrc=|\bhref=|https?:|url\(|@import", tags)
    assert "default-src 'none'" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert set(data) == {"questions", "intervals"}
    assert [len(row) for row in data["intervals"]] == [1, 2]


def test_a_notebook_gets_the_page_in_a_frame_of_its_own(tmp_path, monkeypatch):
    """One cell's output, no widgets; the frame may run scripts and has neither the notebook's origin nor its storage."""
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    run = hostile_run(tmp_path / "run")
    assert which_is_the_teacher(run, notebook=True) is None
    frame = shown[0]._repr_html_()
    page = game_page(*questions(run))
    assert frame == framed(page)
    assert 'sandbox="allow-scripts"' in frame
    assert re.findall(r"<[a-z/]+", frame) == ["<div", "<iframe", "</iframe", "</div"]
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == page


@pytest.mark.parametrize(("shell", "found"), [(None, False), (object(), False), (SimpleNamespace(kernel=1), True)])
def test_a_notebook_is_known_by_its_kernel(shell, found, monkeypatch):
    """Not by ipykernel, which other libraries import: in a terminal's IPython, or in none, the game asks line by line."""
    import ipykernel  # noqa: F401
    import IPython

    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    assert guess._in_notebook() == found


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_page_counts_as_the_terminal_does(tmp_path):
    """Played in a browser: a, a, b, b, as above."""
    clicks = "".join(
        f'document.querySelectorAll("article")[{i}].querySelectorAll("button.guess")[{guess}].click();'
        f'document.querySelectorAll("article")[{i}].querySelector("button.next").click();'
        for i, guess in enumerate([0, 0, 1, 1])
    )
    path = tmp_path / "game.html"
    path.write_text(game_page(ASKED, []).replace("</body>", f"<script>{clicks}</script></body>"), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "You: 3 of 4 right (95%: 19% to 99%; chance is 50%). The discriminator: 1 of 2 right" in done.stdout
    assert 'id="done">That was the last one.' in done.stdout
