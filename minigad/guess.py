"""Which one is the teacher? A game for the reader: two completions, a guess, and then what the discriminator thought.

In a notebook (Jupyter, Colab, no ipywidgets) it is one page of HTML in a frame of its own, which can reach nothing outside
itself; in a terminal it asks line by line. Chance is a half: who stays near it cannot tell the student from its teacher.
"""

from __future__ import annotations

import html
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from minigad.attribution import Attribution, colour_limit
from minigad.config import UserError, visible
from minigad.markup import LEGEND, coloured, escape
from minigad.reading import read_run

__all__ = ["Question", "Result", "game_page", "interval", "play", "questions", "which_is_the_teacher"]

NUM_QUESTIONS = 10


class Question(NamedTuple):
    """A prompt, two completions in the order in which they are shown, which of them is the teacher's (0 or 1), and the
    discriminator's scores of both, or None; `seen` has what it sees in both, where the run knows.
    """

    prompt: str
    texts: tuple[str, str]
    teacher: int
    scores: tuple[float, float] | None
    seen: tuple[Attribution, Attribution] | None

    @property
    def pick(self) -> int | None:
        """Which of the two the discriminator takes for the teacher's; None without scores, or for equal ones."""
        if self.scores is None or self.scores[0] == self.scores[1]:
            return None
        return int(self.scores[1] > self.scores[0])


class Result(NamedTuple):
    """Right guesses of the reader and of the discriminator, of `answered` questions (`judged`: of those with a verdict)."""

    right: int
    answered: int
    judge_right: int
    judged: int

    def lines(self) -> list[str]:
        """Return the scores as sentences, with their intervals."""
        lines = [_sentence("You", self.right, self.answered)]
        return lines + ([_sentence("The discriminator", self.judge_right, self.judged)] if self.judged else [])


def which_is_the_teacher(
    run: str | Path, *, num_questions: int = NUM_QUESTIONS, seed: int = 0, notebook: bool | None = None
) -> Result | None:
    """Play the game on a finished run's held-out prompts: shown in a notebook (returns None), asked in a terminal.

    Questions and sides depend on `seed` alone. `notebook` None: found out. Raises UserError for a run without evaluation.
    """
    asked, notes = questions(run, num_questions, seed)
    if notebook is None:
        notebook = _in_notebook()
    if not notebook:
        return play(asked, notes)
    from IPython.display import HTML, display

    display(HTML(framed(game_page(asked, notes))))
    return None


def _in_notebook() -> bool:
    """Say whether this process is a notebook's kernel; that a library has imported ipykernel is no sign of it."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def questions(run: str | Path, num_questions: int = NUM_QUESTIONS, seed: int = 0) -> tuple[list[Question], list[str]]:
    """Draw questions from a run's evaluation; return them and sentences on what was left out.

    Texts are as the discriminator read them: the teacher's is cut where the student must stop, else length would tell.
    Pairs of equal texts are left out, and counted. Raises UserError if nothing is left.
    """
    if num_questions < 1:
        raise UserError(f"num_questions is {num_questions}; give at least 1")
    evaluation = read_run(run)["evaluation"]
    if evaluation is None or not evaluation["samples"]:
        raise UserError(
            f"run {str(run)!r} has no evaluated samples; finish it, or give `minigad evaluate {run} --data FILE`"
        )
    samples = [_as_read(sample) for sample in evaluation["samples"]]
    different = [sample for sample in samples if sample["teacher"] != sample["student"]]
    if not different:
        raise UserError(
            f"run {str(run)!r}: all {len(samples)} of the student's completions are the teacher's; nobody can tell"
        )
    rng = random.Random(seed)
    shuffled = rng.sample(different, len(different))
    drawn = sorted(shuffled, key=lambda sample: "seen" not in sample)[
        :num_questions
    ]  # those with most to show come first
    notes = [f"{len(drawn)} of {len(samples)} held-out prompts, drawn with seed {seed}."]
    if len(different) < len(samples):
        notes.append(f"Left out, since both sides say the same: {len(samples) - len(different)}.")
    asked = [_question(sample, rng.randrange(2)) for sample in drawn]
    if any(question.scores is None for question in asked):
        notes.append("The run has no scores of a discriminator for these samples.")
    return asked, notes


def _as_read(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "teacher": sample.get("teacher_read", sample["teacher"])}


def _question(sample: dict[str, Any], teacher: int) -> Question:
    def ordered(of_teacher: Any, of_student: Any) -> Any:
        return (of_student, of_teacher) if teacher else (of_teacher, of_student)

    scores = seen = None
    if "teacher_score" in sample:
        scores = ordered(sample["teacher_score"], sample["student_score"])
    if "seen" in sample:
        seen = ordered(*(Attribution(**sample["seen"][who]) for who in ("teacher", "student")))
    return Question(sample["prompt"], ordered(sample["teacher"], sample["student"]), teacher, scores, seen)


def interval(right: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) interval for the share of right guesses; (0, 1) before the first."""
    from scipy.stats import binomtest  # scikit-learn brings scipy

    if not total:
        return 0.0, 1.0
    found = binomtest(right, total).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)


def _sentence(who: str, right: int, total: int) -> str:
    low, high = interval(right, total)
    return f"{who}: {right} of {total} right (95%: {low:.0%} to {high:.0%}; chance is 50%)."


# --- in a terminal ---


def play(
    asked: list[Question],
    notes: list[str],
    read: Callable[[str], str] = input,
    say: Callable[[str], None] = print,
) -> Result:
    """Ask on the terminal: a or b, q stops, anything else is asked again; the end of the input stops too."""
    say("Which one is the teacher? " + " ".join(notes))
    result = Result(0, 0, 0, 0)
    for number, question in enumerate(asked, start=1):
        say(
            visible(
                f"\n[{number}/{len(asked)}] {question.prompt}\n\n A: {question.texts[0]}\n\n B: {question.texts[1]}\n"
            )
        )
        guess = _guess(read, say)
        if guess is None:
            break
        result = _counted(result, question, guess)
        say(_verdict(question, guess))
    for line in result.lines():
        say(line)
    return result


def _guess(read: Callable[[str], str], say: Callable[[str], None]) -> int | None:
    while True:
        try:
            word = read("The teacher is (a, b, q to stop): ").strip().lower()
        except EOFError:
            return None
        if word in ("a", "b"):
            return int(word == "b")
        if word == "q":
            return None
        say("Please answer a, b or q.")


def _counted(result: Result, question: Question, guess: int) -> Result:
    return Result(
        result.right + (guess == question.teacher),
        result.answered + 1,
        result.judge_right + (question.pick == question.teacher),
        result.judged + (question.pick is not None),
    )


def _verdict(question: Question, guess: int) -> str:
    own = "Right" if guess == question.teacher else "Wrong"
    return f"{own}: the teacher is {'AB'[question.teacher]}. {_thought(question)}"


def _thought(question: Question) -> str:
    """What the discriminator thought, with the probability that Bradley-Terry gives its choice."""
    if question.scores is None:
        return ""
    numbers = f"A {question.scores[0]:+.2f}, B {question.scores[1]:+.2f}"
    if question.pick is None:
        return f"The discriminator cannot tell: {numbers}."
    sure = 1 / (1 + math.exp(-min(abs(question.scores[0] - question.scores[1]), 50.0)))
    right = "rightly" if question.pick == question.teacher else "wrongly"
    return (
        f"The discriminator takes {'AB'[question.pick]} for the teacher, {right}, and is {sure:.1%} sure ({numbers})."
    )


# --- as a page ---

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #111; --line: #bbb; --quiet: #595959; --teacher: #009E73 }
@media (prefers-color-scheme: dark) { :root { --page: #111; --text: #eee; --line: #555; --quiet: #b5b5b5; --teacher: #2fc79b } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 0 auto; padding: .6rem; background: var(--page); color: var(--text) }
.pair { display: grid; gap: .8rem } @media (min-width: 640px) { .pair { grid-template-columns: 1fr 1fr } }
pre { font: inherit; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
section { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem } h3 { margin: 0 0 .3rem; font-size: 1rem }
button { font: inherit; padding: .3rem 1rem; margin: .6rem .6rem 0 0 } .quiet { color: var(--quiet) } [hidden] { display: none }
.teacher { outline: 3px solid var(--teacher) } #score { font-weight: 600 }
"""
# Texts are in the page as escaped HTML; the script only shows and hides, and counts.
SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const cards = [...document.querySelectorAll("article")];
let right = 0, answered = 0, judgeRight = 0, judged = 0, at = 0;
const share = (who, k, n) => `${who}: ${k} of ${n} right (95%: ${data.intervals[n][k]}; chance is 50%).`;
function show() {
  cards.forEach((card, i) => { card.hidden = i !== at; });
  document.getElementById("done").hidden = at < cards.length;
}
function answer(card, guess) {
  const q = data.questions[at];
  answered += 1; right += guess === q.teacher ? 1 : 0;
  if (q.pick !== null) { judged += 1; judgeRight += q.pick === q.teacher ? 1 : 0; }
  card.querySelector(".own").textContent = guess === q.teacher ? "Right." : "Wrong.";
  card.querySelectorAll("button.guess").forEach((button) => { button.disabled = true; });
  card.querySelectorAll("section")[q.teacher].classList.add("teacher");
  card.querySelector(".after").hidden = false;
  document.getElementById("score").textContent = share("You", right, answered)
    + (judged ? " " + share("The discriminator", judgeRight, judged) : "");
}
cards.forEach((card) => {
  card.querySelectorAll("button.guess").forEach((button, i) => { button.onclick = () => answer(card, i); });
  card.querySelector("button.next").onclick = () => { at += 1; show(); };
});
show();
"""


def game_page(asked: list[Question], notes: list[str]) -> str:
    """Return the game as a whole HTML document: no address outside itself, every text escaped; needs scripts to run."""
    table = [[_percent(right, total) for right in range(total + 1)] for total in range(len(asked) + 1)]
    answers = [{"teacher": question.teacher, "pick": question.pick} for question in asked]
    data = json.dumps(
        {"questions": answers, "intervals": table}
    )  # numbers and percentages alone: nothing a model wrote
    cards = "".join(_card(i, question, len(asked)) for i, question in enumerate(asked, start=1))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>Which one is the teacher?</title><style>{STYLE}</style></head>
<body><h2>Which one is the teacher?</h2><p class="quiet">{escape(" ".join(notes))}</p>
<noscript>The game needs scripts; in a notebook, run the cell again.</noscript>
{cards}<p id="done" hidden>That was the last one.</p><p id="score" aria-live="polite"></p>
<script type="application/json" id="data">{data}</script><script>{SCRIPT}</script></body></html>
"""


def framed(page: str, height: int = 640) -> str:
    """Put a page into a frame that may run its own script and nothing else: it cannot reach the notebook or the network."""
    source = html.escape(page, quote=True)
    style = f"width:100%;height:{height}px;border:1px solid #888"
    return f'<div><iframe title="Which one is the teacher?" sandbox="allow-scripts" srcdoc="{source}" style="{style}"></iframe></div>'


def _percent(right: int, total: int) -> str:
    low, high = interval(right, total)
    return f"{low:.0%} to {high:.0%}"


def _card(number: int, question: Question, total: int) -> str:
    """One question; the part that gives the answer away is hidden until a button was pressed."""
    sides = "".join(
        f'<section><h3>{name}</h3><pre dir="auto">{escape(text)}</pre><button class="guess">{name} is the teacher</button></section>'
        for name, text in zip("AB", question.texts, strict=True)
    )
    after = f'<p><b class="own"></b> The teacher is {"AB"[question.teacher]}. {escape(_thought(question))}</p>{_seen(question)}'
    return (
        f'<article hidden><p class="quiet">{number} of {total}</p><pre dir="auto"><b>{escape(question.prompt)}</b></pre><br>'
        f'<div class="pair">{sides}</div><div class="after" hidden>{after}<button class="next">Next</button></div></article>'
    )


def _seen(question: Question) -> str:
    if question.seen is None:
        return ""
    limit = colour_limit(question.seen)
    boxes = "".join(
        f"<section><h3>{name}, as the discriminator sees it</h3>{coloured(one, limit)}</section>"
        for name, one in zip("AB", question.seen, strict=True)
    )
    return f'<div class="pair">{boxes}</div><p class="quiet">{LEGEND}.</p>'
