"""`minigad evaluate` with a judge and `minigad choose`, as a user runs them, on a toy run."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from fault_server import FaultServer
from safetensors.torch import load_file
from test_judge import SECTIONS, scripted

from minigad import judging, plots
from minigad.choose import MEASURES
from minigad.cli import main
from minigad.collect import estimate_tokens
from minigad.config import GADConfig
from minigad.data import write_jsonl
from minigad.evaluate import evaluate, words_of
from minigad.judge import RATING
from minigad.plots import plot_intervals
from minigad.reading import read_run
from minigad.run import distill
from minigad.stats import agreement
from minigad.teacher import TeacherError

KEY = "sk-test-5f2a9c7e1b8d4036"
TRAIN = [{"prompt": f"say {i}", "completion": f"you said {i} and more"} for i in range(24)]
HELDOUT = [{"prompt": f"say {i}", "completion": f"you said {i}"} for i in range(100, 112)]
VALIDATION = [{"prompt": f"say {i}", "completion": f"you said {i}"} for i in range(200, 212)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a trained toy run, and the files of its prompts."""
    folder = tmp_path_factory.mktemp("judging")
    for name, rows in (("train", TRAIN), ("heldout", HELDOUT), ("validation", VALIDATION)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    config = GADConfig(
        student="toy",
        lora_r=0,
        seqkd_epochs=2.0,
        warmup_batch_size=8,
        max_completion_length=16,
        save_steps=2,
        save_total_limit=3,
        output_dir=str(folder / "run"),
    )
    distill(config, folder / "train.jsonl", folder / "heldout.jsonl", "seqkd")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to write in."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def judge(monkeypatch):
    """A judge that rates by length and prefers the longer text, in place of a model; it keeps what it was asked."""

    def reply(prompt, first, second, sample):
        return f"{len(first) % 10 + 1} {len(second) % 10 + 1}"

    def preference(prompt, first, second, sample):
        return "[[A]]" if len(first) > len(second) else "[[B]]" if len(second) > len(first) else "[[C]]"

    def answer(messages, sample):
        text = messages[-1]["content"]
        if not (found := SECTIONS.search(text)):
            return "the judge's own words"
        return (preference if "[[A]]" in text.split("[End of the completions]")[-1] else reply)(*found.groups(), sample)

    teacher = scripted(lambda *_: "")
    calls = []
    teacher.function = lambda messages, sample: calls.append(messages) or answer(messages, sample)
    teacher.asked = calls
    monkeypatch.setattr(judging, "make_teacher", lambda args: teacher)
    return teacher


def run(folder, *flags, data="heldout"):
    where = ["--data", str(folder / f"{data}.jsonl")] if data else []
    return main(["evaluate", str(folder / "run"), *where, "--judge", "m", "--price", "0", "0", *map(str, flags)])


def records(folder):
    return read_run(folder / "run")["evaluation"]["judge"]


# --- evaluate --judge ---


def test_a_rating_goes_into_the_evaluation_and_the_report(folder, judge, capsys):
    assert run(folder, "--greedy") == 0
    evaluation = read_run(folder / "run")["evaluation"]
    assert evaluation["metrics"]["temperature"] == 0
    record = evaluation["judge"][0]
    own = "the judge's own words"
    expected = []
    for sample in evaluation["samples"]:
        mine, other = len(sample["student"]) % 10 + 1, len(own) % 10 + 1
        expected.append(mine / (mine + other))
    assert record["values"] == pytest.approx(expected)
    assert record["numbers"]["score"] == pytest.approx(100 * sum(expected) / 12)
    assert record["counts"] == {"prompts": 12, "judged": 12, "withheld": 0, "replies": 24, "asked_again": 0, "malformed": 0, "without_reply": 0, "own_cut_off": 0}  # fmt: skip
    out = capsys.readouterr().out
    assert re.search(r"rating on heldout.jsonl, by scripted: 12 prompts, 12 judged", out)
    assert re.search(r"score +\d+\.\d\d \(no interval: all prompts alike\)", out), "all texts are of one length here"
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Judge</h2><figure>" in page
    assert "rating on heldout.jsonl, by scripted" in page


def test_a_record_in_words():
    numbers = {"score": 41.0, "score_low": 35.126, "score_high": 47.0, "mean_characters": 80.0}
    record = {"title": "rating on a", "judge": "j", "counts": {"prompts": 3, "asked_again": 1}, "numbers": numbers}
    row = {
        "with": "b",
        "difference": -1.5,
        "difference_low": -3.0,
        "difference_high": 0.0,
        "p_value": 0.06,
        "p_holm": 0.12,
    }
    assert judging.verdict_lines(record | {"comparisons": [row]}) == [
        "rating on a, by j: 3 prompts, 1 asked again",
        "  score                        41.00 (95%: 35.13 to 47.00)",
        "  mean characters              80.00",
        "  difference from b: -1.50 (95%: -3.00 to +0.00), p 0.0600, 0.1200 after Holm",
    ]


def test_the_figure_tells_two_judges_apart(folder, judge, monkeypatch):
    """By name where there are two, within what a label has room for."""
    labels = []

    def spy(rows, *about):
        labels.append([label for label, *_ in rows])
        return plot_intervals(rows, *about)

    monkeypatch.setattr(plots, "plot_intervals", spy)
    assert run(folder, "--greedy", "--protocol", "pairwise") == 0
    judge.name = "another"
    assert run(folder, "--greedy", "--protocol", "pairwise") == 0
    where = "heldout.jsonl, against teacher"
    assert labels[0] == [f"win rate, {where}", f"at equal length, {where}"]
    assert labels[1] == [
        f"{words}, {where}, by {name}" for name in ("scripted", "another") for words in ("win rate", "at equal length")
    ]
    assert max(map(len, labels[1])) <= 60


def test_a_second_command_asks_nobody_and_says_the_same(folder, judge):
    assert run(folder, "--greedy") == 0
    first, asked = records(folder), len(judge.asked)
    assert asked >= 12
    assert run(folder, "--greedy") == 0
    assert len(judge.asked) == asked
    assert records(folder) == first
    assert run(folder, "--greedy", "--protocol", "pairwise") == 0
    assert len(judge.asked) > asked
    assert [one["protocol"] for one in records(folder)] == ["rating", "pairwise"]


def test_the_pairwise_opponent_is_the_teacher_unless_named(folder, judge):
    assert run(folder, "--greedy", "--protocol", "pairwise") == 0
    record, samples = records(folder)[0], read_run(folder / "run")["evaluation"]["samples"]
    expected = [0.5 + 0.5 * ((len(s["student"]) > len(s["teacher"])) - (len(s["student"]) < len(s["teacher"]))) for s in samples]  # fmt: skip
    assert record["values"] == expected
    assert record["title"] == "pairwise on heldout.jsonl, against teacher"
    numbers = record["numbers"]
    assert numbers["length_controlled_win_rate_low"] <= numbers["length_controlled_win_rate_high"]
    assert record["comparisons"][0]["p_holm"] == record["comparisons"][0]["p_value"]


def test_the_agreement_of_two_runs_of_the_judge_is_in_the_record_the_lines_and_the_report(folder, judge, capsys):
    """A judge that changes its mind from run to run for every second prompt; alpha is that of the readings it gave."""
    steady = judge.function

    def moody(messages, sample):
        found = SECTIONS.search(messages[-1]["content"])
        if found and int(found[1].split()[-1]) % 2 and sample == 1:
            return "5 5"
        return steady(messages, sample)

    judge.function = moody
    assert run(folder, "--greedy", "--judge-runs", "2", "--judge-temperature", "1") == 0
    record = records(folder)[0]
    assert record["runs"] == 2 and record["counts"]["replies"] == 48
    samples = read_run(folder / "run")["evaluation"]["samples"]
    own, points = len("the judge's own words") % 10 + 1, [len(s["student"]) % 10 + 1 for s in samples]
    first = [mine / (mine + own) for mine in points]
    second = [0.5 if int(s["prompt"].split()[-1]) % 2 else one for s, one in zip(samples, first, strict=True)]
    expected = agreement(np.array([first, second]).T, nominal=False)
    assert record["numbers"]["agreement"] == pytest.approx(expected)
    assert -1 < expected < 1
    assert re.search(rf"agreement +{expected:.2f}", capsys.readouterr().out)
    assert "alpha between runs of the judge" in (folder / "run" / "report.html").read_text(encoding="utf-8")


def test_opponents_are_runs_and_files_of_outputs(folder, judge, capsys):
    """The student against itself ties everywhere; against its own words and more it loses; Holm over both."""
    assert run(folder, "--greedy", "--alpaca-eval", folder / "ours.json") == 0
    rows = json.loads((folder / "ours.json").read_text(encoding="utf-8"))
    assert [row["instruction"] for row in rows] == [row["prompt"] for row in HELDOUT]
    assert rows[0]["dataset"] == "heldout.jsonl"
    longer = [row | {"output": row["output"] + " and more", "generator": "wordy"} for row in rows]
    (folder / "longer.json").write_text(json.dumps(longer), encoding="utf-8")
    shutil.copytree(folder / "run", folder / "twin")
    flags = ["--greedy", "--protocol", "pairwise", "--against", folder / "twin", "--against", folder / "longer.json"]
    assert run(folder, *flags) == 0
    tie, loss = records(folder)[1:]
    assert tie["numbers"]["win_rate"] == 50
    assert loss["numbers"]["win_rate"] == 0
    assert loss["title"].endswith("against wordy")
    p = loss["comparisons"][0]["p_value"]
    assert p == pytest.approx(2 / 2**12)
    assert loss["comparisons"][0]["p_holm"] == pytest.approx(2 * p)
    said = capsys.readouterr().out
    assert "win rate                     0.00 (no interval: all prompts alike)" in said
    assert re.search(r"difference from parity \(50\): -50.00 \(no interval: all prompts alike\), p 0.0005", said)
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "<td>0 (no interval: all prompts alike)</td>" in page
    assert run(folder, "--greedy", "--against", folder / "twin") == 0
    assert records(folder)[-1]["comparisons"][0]["difference"] == 0


def test_a_fixed_set_needs_no_teacher_and_leaves_the_metrics_alone(folder, judge):
    before = read_run(folder / "run")["evaluation"]
    write_jsonl(folder / "set.jsonl", [{"turns": ["say 7", "say 8"]}, {"turns": ["say 9"]}])
    assert run(folder, "--set", folder / "set.jsonl", "--greedy", "--paper-prompt", data=None) == 0
    after = read_run(folder / "run")["evaluation"]
    assert after["metrics"] == before["metrics"]
    assert after["judge"][0]["paper_prompt"] is True
    assert after["judge"][0]["data"] == "set.jsonl"
    judged = {SECTIONS.search(m[-1]["content"])[1] for m in judge.asked if SECTIONS.search(m[-1]["content"])}
    assert judged == {"say 7", "say 9"}, "the judge sees the prompt without the wrapper"


def test_the_students_prompt_is_wrapped_and_the_samples_are_not(folder, judge, monkeypatch):
    shown = []

    def spy(student, dataset, *args, **settings):
        shown.extend(dataset["prompt"])
        return evaluate(student, dataset, *args, **settings)

    monkeypatch.setattr(judging, "evaluate", spy)
    assert run(folder, "--greedy", "--paper-prompt") == 0
    assert all(prompt.startswith("Below is an instruction") for prompt in shown)
    assert read_run(folder / "run")["evaluation"]["samples"][0]["prompt"] == HELDOUT[0]["prompt"]


def test_keys_and_personal_data_are_not_sent(folder, judge, capsys):
    rows = [*HELDOUT, {"prompt": "write to jo@example.com", "completion": "ok"}]
    write_jsonl(folder / "heldout.jsonl", rows)
    assert run(folder, "--greedy", "--protocol", "pairwise") == 0
    assert records(folder)[0]["counts"]["withheld"] == 1
    assert not any("example.com" in message[-1]["content"] for message in judge.asked)
    assert run(folder, "--greedy", "--protocol", "pairwise", "--on", "personal_data=keep") == 0
    assert records(folder)[0]["counts"] | {"prompts": 13, "judged": 13, "withheld": 0} == records(folder)[0]["counts"]


def test_a_budget_stops_before_anything_is_written_and_the_next_command_goes_on(folder, judge, capsys):
    flags = [
        "--greedy",
        "--protocol",
        "pairwise",
        "--concurrency",
        "1",
        "--price",
        "1",
        "1",
        "--judge-max-tokens",
        "10",
    ]
    assert run(folder, *flags, "--budget", "0.005") == 1
    out = capsys.readouterr().out
    assert "budget of $0.005" in out
    assert "verdicts are not written" in out
    assert "judge" not in read_run(folder / "run")["evaluation"]
    stopped_at = len(judge.asked)
    assert stopped_at > 0
    assert run(folder, *flags) == 0
    assert len(judge.asked) == 24


def test_a_dry_run_prices_the_judge_by_hand_and_does_nothing(folder, monkeypatch, capsys):
    """12 prompts, 2 runs: 12 own completions and 2 orders x 2 runs x 12; a token is four bytes; no key, no model, no file."""
    monkeypatch.setattr(judging, "load_student", None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    flags = ["--judge-runs", "2", "--judge-max-tokens", "50", "--price", "2", "8", "--dry-run"]
    assert run(folder, *flags) == 0
    asked = [RATING.form.format(prompt=row["prompt"], first="", second="") for row in HELDOUT]
    own = sum(len(row["prompt"]) // 4 + 4 for row in HELDOUT)
    tokens = own + 4 * sum(
        len(text) // 4 + 4 + 16 + 50 for text in asked
    )  # the student stops at 16 tokens, the judge at 50
    out = capsys.readouterr().out
    assert "12 of 12 prompts of heldout.jsonl would be sent to m: 60 calls" in out
    assert f"about {tokens} prompt tokens" in out and "and 3000 completion tokens" in out
    dear, cheap = (tokens * 2 + part * 8 for part in (3000, 750))
    assert (
        f"At $2 and $8 a million: ${dear / 1e6:.4f} if every answer has its full length, ${cheap / 1e6:.4f} at" in out
    )
    assert not (folder / "run" / "judge.db").exists()
    assert "judge" not in read_run(folder / "run")["evaluation"]


def test_a_dry_run_is_an_upper_bound_of_what_is_then_sent(folder, judge, capsys):
    """Pairwise, against the teacher and a run: the calls are those that follow, their tokens at most those named."""
    shutil.copytree(folder / "run", folder / "twin")
    flags = ["--greedy", "--protocol", "pairwise", "--against", folder / "twin"]
    assert run(folder, *flags, "--dry-run") == 0
    calls, tokens = map(
        int, re.search(r": (\d+) calls.*about (\d+) prompt tokens", capsys.readouterr().out, re.S).groups()
    )
    assert not judge.asked
    assert run(folder, *flags) == 0
    assert 12 <= len(judge.asked) <= calls == 24  # where both say the same, both orders are one question
    assert sum(estimate_tokens(messages) for messages in judge.asked) <= tokens
    rows = [*HELDOUT, {"prompt": "write to jo@example.com", "completion": "ok"}]
    write_jsonl(folder / "heldout.jsonl", rows)
    assert run(folder, "--protocol", "pairwise", "--dry-run") == 0
    assert "12 of 13 prompts" in capsys.readouterr().out


def test_a_dry_run_of_a_choice_counts_every_candidate(folder, judge, capsys):
    flags = ["--measure", "win_rate", "--judge", "m", "--judge-max-tokens", "10", "--length-band", "0", "100"]
    assert choose(folder, *flags, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "12 of 12 prompts of validation.jsonl would be sent to m: 72 calls" in out
    assert "The price of this model is not known" in out
    assert not (folder / "chosen").exists()
    assert not judge.asked
    assert choose(folder, "--measure", "nll", "--dry-run") == 2
    assert "--dry-run prices a judge's calls" in capsys.readouterr().err


def test_an_endpoints_key_reaches_no_file_and_no_line(folder, monkeypatch, capsys):
    """Over HTTP, with a judge that repeats the key it was given in its replies' place: the whole path of a user."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def answer(text):
        found = SECTIONS.search(text)
        return "8 8" if found else f"my own, {KEY}"

    with FaultServer(answer=answer) as server:
        assert run(folder, "--greedy", "--judge-base-url", server.url) == 0
        calls = len(server.requests)
        assert run(folder, "--greedy", "--judge-base-url", server.url) == 0
        assert len(server.requests) == calls
    assert records(folder)[0]["numbers"]["score"] == 50
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert (folder / "run" / "judge.db") in files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--protocol", "vote"], "invalid choice: 'vote'"),
        (["--greedy", "--temperature", "0.5"], "exclude each other"),
        (["--temperature", "0"], "--temperature is 0.0; it must be above 0"),
        (["--judge-runs", "0"], "samples is 0; it must be at least 1"),
        (["--judge-redraws", "-1"], "redraws is -1; it must be at least 0"),
        (["--judge-max-tokens", "0"], "max_tokens is 0"),
        (["--budget", "-1"], "budget is -1.0; it must not be negative"),
        (["--on", "secrets=perhaps"], "the policy of 'secrets' must be one of"),
        (["--judge-base-url", "localhost:8000"], "give a whole URL"),
        (["--judge-base-url", "http://me:pw@localhost/v1"], "holds a user name, a password"),
        (["--judge-local", "--judge-base-url", "http://localhost/v1"], "exclude each other"),
        (["--against", "/no/such/run"], "/no/such/run"),
        (["--timeout", "0"], "timeout is 0.0; it must be above 0"),
        (["--timeout", "nan"], "timeout is nan"),
        (["--price", "-1", "2"], "the price is -1 and 2; give dollars"),
        (["--price", "1", "nan"], "the price is 1 and nan"),
        (["--seed", "-1"], "it is '-1'; give a whole number from 0 to 4294967295"),
        (["--seed", "1" * 30], "give a whole number from 0 to 4294967295"),
        (["--alpaca-eval", "out.txt"], "cannot write 'out.txt' for AlpacaEval"),
        (["--alpaca-eval", "."], "cannot write '.' for AlpacaEval"),
        (["--lm-eval", ""], "this cannot be the folder of a task"),
    ],
)
def test_bad_flags_are_one_sentence_before_anything_is_judged(flags, words, made, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    try:
        status = run(made, *flags)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message
    assert KEY not in message
    assert "judge" not in read_run(made / "run")["evaluation"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "heldout.jsonl", "--against", "twin"], "name its model with --judge"),
        (["--data", "heldout.jsonl", "--dry-run"], "name its model with --judge"),
        (["--data", "heldout.jsonl", "--protocol", "pairwise"], "name its model with --judge"),
        (["--data", "heldout.jsonl", "--judge", ""], "name its model with --judge"),
        (["--data", "heldout.jsonl", "--judge-runs", "2"], "name its model with --judge"),
        (["--data", "heldout.jsonl", "--judge-redraws", "2"], "name its model with --judge"),
        (["--set", "", "--lm-eval", "task"], "no evaluation set or file ''"),
        (["--set", "short-answers"], "a set has no teacher completions to measure by"),
        (["--set", "short-answers", "--judge", "m", "--protocol", "pairwise"], "give --against, or --protocol rating"),
        (["--set", "vicunna", "--judge", "m", "--price", "0", "0"], "no evaluation set or file 'vicunna'"),
        (["--set", "empty.jsonl", "--judge", "m", "--price", "0", "0"], "has no prompts in it"),
        (["--data", "empty.jsonl"], "there are no rows in it"),
        (
            ["--data", "heldout.jsonl", "--judge", "m", "--judge-base-url", "http://far.example/v1"],
            "no key for the endpoint",
        ),
    ],
)
def test_bad_input_is_one_sentence(flags, words, folder, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(folder)
    (folder / "empty.jsonl").write_text("")
    if "short-answers" not in flags and "far" not in str(flags):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert main(["evaluate", "run", *flags]) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert words in message[-1]


@pytest.mark.parametrize("protocol", ["rating", "pairwise"])
def test_a_judge_that_cannot_be_reached_is_said_so(protocol, folder, judge, capsys):
    """Not that its replies could not be read: there were none."""

    def function(messages, sample):
        raise TeacherError("no route to host", retry=False)

    judge.function = function
    flags = ["--greedy", "--protocol", protocol, "--max-failures", "99"]
    assert run(folder, *flags) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the judge 'scripted' gave no answer to anything (prompt " in message and "no route to host" in message
    assert "judge" not in read_run(folder / "run")["evaluation"]


def test_files_for_other_harnesses_are_named(folder, capsys):
    where = ["--set", str(folder / "heldout.jsonl"), "--greedy", "--lm-eval", str(folder / "task")]
    assert main(["evaluate", str(folder / "run"), *where, "--alpaca-eval", str(folder / "o.json")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"wrote {folder}/o.json: 12 completions for AlpacaEval",
        f"wrote {folder}/task: the task minigad_task for lm-evaluation-harness",
    ]


def test_a_run_without_a_student_is_one_sentence(folder, judge, capsys):
    shutil.rmtree(folder / "run" / "student")
    assert run(folder) == 2
    assert "holds no student; let distill finish it" in capsys.readouterr().err
    assert not judge.asked


def test_outputs_that_lack_a_prompt_name_it(folder, judge, capsys):
    (folder / "some.json").write_text(json.dumps([{"instruction": "say 100", "output": "a"}]))
    assert run(folder, "--protocol", "pairwise", "--against", folder / "some.json") == 2
    assert "it has no output for 11 of 12 prompts, such as 'say 101'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("judged", "words"),
    [
        (3, "field 'judge' is '3'"),
        ([3], "judge record 1: this is '3'"),
        ([{"title": "t"}], "judge record 1: field 'judge' is 'None'"),
        ([{"title": "t", "judge": "j", "protocol": "p", "counts": {}, "numbers": {"score": "<b>"}, "comparisons": []}], "not a number"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_one_sentence(judged, words, folder, capsys):
    path = folder / "run" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"judge": judged}))
    assert main(["report", str(folder / "run")]) == 2
    assert words in capsys.readouterr().err


def test_hostile_names_are_shown_as_text(folder, judge):
    judge.name = "<script>$a_b$"
    assert run(folder, "--greedy") == 0
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;$a_b$" in page


# --- choose ---


def choose(folder, *flags, runs=("run",), data="validation"):
    names = [str(folder / name) for name in runs]
    where = ["--data", str(folder / f"{data}.jsonl"), "--out", str(folder / "chosen")]
    return main(["choose", *names, *where, *map(str, flags)])


def chosen(folder):
    return json.loads((folder / "chosen" / "choice.json").read_text())


def test_the_best_checkpoint_in_the_band_is_written_as_a_run(folder, capsys):
    assert choose(folder, "--measure", "nll", "--length-band", "0", "100") == 0
    choice = chosen(folder)
    nll = {one["candidate"]: one["nll"] for one in choice["candidates"]}
    assert [path.rsplit("-")[-1] for path in nll] == ["2", "4", "6"]
    best = min(nll, key=nll.get)
    assert choice["chosen"] == best
    weights = load_file(folder / "chosen" / "student" / "model.safetensors")
    saved = load_file(f"{best}/student.safetensors")
    assert saved
    assert all(torch.equal(weights[name], saved[name]) for name in saved if name in weights)
    assert set(saved) & set(weights)
    assert main(["evaluate", str(folder / "chosen"), "--data", str(folder / "heldout.jsonl")]) == 0
    measured = read_run(folder / "chosen")["evaluation"]["metrics"]["nll"]
    last = read_run(folder / "run")["evaluation"]["metrics"]["nll"]
    assert (measured == pytest.approx(last)) == best.endswith("-6")


def test_the_measure_is_of_that_checkpoint(folder):
    """The numbers of the last checkpoint are those of the run's student, measured by itself."""
    assert choose(folder, "--measure", "f1_2", "--length-band", "0", "100", "--greedy") == 0
    flags = ["--data", str(folder / "validation.jsonl"), "--greedy"]
    assert main(["evaluate", str(folder / "run"), *flags]) == 0
    evaluation = read_run(folder / "run")["evaluation"]
    last = chosen(folder)["candidates"][-1]
    assert last["f1_2"] == pytest.approx(evaluation["metrics"]["f1_2"])
    words = [sum(len(words_of(s[who])) for s in evaluation["samples"]) for who in ("student", "teacher")]
    assert last["length_ratio"] == pytest.approx(words[0] / words[1])


def test_a_candidate_outside_the_band_is_not_chosen(folder, capsys):
    """The band is set around all candidates but the one that would win."""
    assert choose(folder, "--measure", "f1_2", "--length-band", "0", "100") == 0
    candidates = chosen(folder)["candidates"]
    ratio = chosen_ratio = next(
        one["length_ratio"] for one in candidates if one["candidate"] == chosen(folder)["chosen"]
    )
    others = [one["length_ratio"] for one in candidates if one["length_ratio"] != ratio]
    assert others, "the toy's checkpoints must differ in length for this test"
    low, high = (0, ratio - 1e-9) if min(others) < ratio else (ratio + 1e-9, 100)
    shutil.rmtree(folder / "chosen")
    assert choose(folder, "--measure", "f1_2", "--length-band", low, high) == 0
    assert "outside the band" in capsys.readouterr().out
    now = next(one for one in chosen(folder)["candidates"] if one["candidate"] == chosen(folder)["chosen"])
    assert now["length_ratio"] != chosen_ratio
    shutil.rmtree(folder / "chosen")
    assert choose(folder, "--measure", "nll", "--length-band", "90", "100") == 2
    assert "none of 3 candidates is in the band 90 to 100" in capsys.readouterr().err
    assert not (folder / "chosen").exists()


def test_nobody_chooses_on_the_test_or_tests_on_the_choice(folder, capsys):
    """The run's own held-out prompts, and any of --test, are refused; later the validation prompts are."""
    assert choose(folder, "--measure", "nll", data="heldout") == 2
    assert "12 prompts of" in (message := capsys.readouterr().err)
    assert "flattered by the test" in message
    (folder / "run" / "evaluation.json").unlink()
    assert choose(folder, "--measure", "nll", "--test", folder / "heldout.jsonl", data="heldout") == 2
    assert "are test prompts" in capsys.readouterr().err
    assert choose(folder, "--measure", "nll", "--length-band", "0", "100") == 0
    assert main(["evaluate", str(folder / "chosen"), "--data", str(folder / "validation.jsonl")]) == 2
    assert "12 of the 12 prompts were used to choose this student" in capsys.readouterr().err


def test_students_of_several_runs_stand_side_by_side(folder, judge):
    """A run without checkpoints stands with its student; the judge's score may be the measure, and is asked once a text."""
    shutil.copytree(folder / "run", folder / "plain")
    for path in (folder / "plain").glob("checkpoint-*"):
        shutil.rmtree(path)
    flags = ["--measure", "score", "--judge", "m", "--price", "0", "0", "--greedy", "--length-band", "0", "100"]
    assert choose(folder, *flags, runs=("run", "plain")) == 0
    candidates = chosen(folder)["candidates"]
    assert len(candidates) == 4
    assert candidates[2]["score"] == candidates[3]["score"], "the last checkpoint is the student"
    assert candidates[2]["score_low"] == pytest.approx(candidates[2]["score_high"]), (
        "every text has the same score here"
    )
    best = max(candidates, key=lambda one: one["score"])
    assert chosen(folder)["chosen"] == best["candidate"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--measure", "rouge"], "--measure is 'rouge'; it must be one of honest_auc, nll"),
        (["--measure", "score"], "score and win_rate need a judge"),
        (["--measure", "nll", "--judge", "m"], "score and win_rate need a judge"),
        (["--measure", "nll", "--judge-runs", "2"], "--judge- is for a judge, and --measure nll needs none"),
        (["--length-band", "2", "1"], "--length-band is 2 1; give two finite numbers, the lower one first"),
        (["--length-band", "nan", "1"], "--length-band is nan 1"),
        (["--length-band", "0", "inf"], "--length-band is 0 inf"),
    ],
)
def test_a_bad_choice_is_one_sentence(flags, words, folder, capsys):
    assert choose(folder, *flags) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "chosen").exists()


def test_a_folder_in_use_and_a_damaged_checkpoint_are_refused(folder, capsys):
    (folder / "chosen").mkdir()
    (folder / "chosen" / "notes.txt").write_text("mine")
    assert choose(folder, "--measure", "nll") == 2
    assert "this exists and is not empty" in capsys.readouterr().err
    (folder / "chosen" / "notes.txt").unlink()
    path = folder / "run" / "checkpoint-4" / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert choose(folder, "--measure", "nll", "--length-band", "0", "100") == 2
    assert "checkpoint-4 is damaged" in capsys.readouterr().err


def test_an_earlier_checkpoint_is_written_with_its_own_weights(folder, monkeypatch):
    """The model has gone on to the later ones by then."""
    monkeypatch.setitem(MEASURES, "nll", (max, None))
    assert choose(folder, "--measure", "nll", "--length-band", "0", "100") == 0
    assert chosen(folder)["chosen"].endswith("checkpoint-2")
    weights = load_file(folder / "chosen" / "student" / "model.safetensors")
    saved, last = (load_file(folder / "run" / f"checkpoint-{n}" / "student.safetensors") for n in (2, 6))
    names = weights.keys() & saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in names)
    assert not all(torch.equal(weights[name], last[name]) for name in names)


def test_a_judge_that_is_stopped_between_candidates_leaves_nothing_and_the_next_command_goes_on(folder, judge, capsys):
    flags = ["--measure", "win_rate", "--judge", "m", "--length-band", "0", "100", "--concurrency", "1"]
    flags += ["--price", "1", "1", "--judge-max-tokens", "10"]
    assert choose(folder, *flags, "--budget", "0.018") == 1
    assert "give the same command again" in capsys.readouterr().out
    asked = len(judge.asked)
    assert 24 < asked < 72  # the first candidate's pairs in both orders, and some of the second's
    assert not (folder / "chosen").exists()
    assert choose(folder, *flags) == 0
    assert chosen(folder)["candidates"]
    assert len(judge.asked) <= 72


def test_a_damaged_student_is_one_sentence(folder, judge, capsys):
    (folder / "run" / "student" / "model.safetensors").write_bytes(b"x" * 20)
    for command in (lambda: run(folder), lambda: choose(folder, "--measure", "nll")):
        assert command() == 2
        assert (
            "student is damaged: model.safetensors is not what was written"
            in capsys.readouterr().err.strip().splitlines()[-1]
        )


def test_outputs_and_opponents_are_looked_at_before_the_work(folder, judge, monkeypatch, capsys):
    monkeypatch.setattr(judging, "evaluate", None)
    for flags in (["--alpaca-eval", "/no/such/a.json"], ["--lm-eval", "/no/such/task"], ["--against", "no.json"]):
        assert run(folder, *flags) == 2
        assert flags[1] in capsys.readouterr().err


def test_the_command_loads_nothing_it_does_not_need():
    """The judge's prompts and statistics come without torch's models or the openai client."""
    code = "import minigad.stats, minigad.judge, sys; assert not {'openai', 'transformers', 'peft'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
