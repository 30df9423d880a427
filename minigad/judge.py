"""A language model as the judge of completions: the paper's rating and a pairwise preference, each in both orders.

The judge reads untrusted text, and may be talked to by what it judges, swayed by the order, or impressed by length: so both
orders are always asked, what cannot be read is asked again, then counted and never guessed, and length is reported or
controlled for. Its calls go through `collect` into the store: nothing is paid for twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from minigad.chat import Prompt, prompt_text
from minigad.collect import Again, CollectSettings, Progress, Summary, collect, drawn, estimate_tokens
from minigad.config import UserError
from minigad.data import as_messages
from minigad.stats import Interval, agreement, holm, length_controlled, mean_interval, paired_p_value
from minigad.store import Store
from minigad.teacher import Answer, Teacher

__all__ = [
    "PROTOCOLS",
    "Own",
    "Protocol",
    "Verdicts",
    "compare",
    "judge",
    "judging_tokens",
    "numbers_of",
    "own_completions",
    "read_preference",
    "read_rating",
]

# The paper's four criteria and scale (arXiv 2511.10643, section 3.1); the wording is ours, since it prints none. What is to
# be done comes after the texts too: they are untrusted, and the last word is not theirs.
RATING_FORM = """Rate two completions of a prompt for helpfulness, relevance, accuracy and level of detail. Do not let the \
order in which they are shown influence you.

[Prompt]
{prompt}

[Completion 1]
{first}

[Completion 2]
{second}

[End of the completions]

Give each completion one whole number from 1 to 10; a higher number is better. Begin with a line that holds nothing but the \
two numbers, the one of completion 1 first, with a space between them. Explain them on the lines that follow."""

# After the pairwise judge of MT-bench (arXiv 2306.05685, figure 5): its verdicts [[A]], [[B]] and [[C]] for a tie.
PAIRWISE_FORM = """Decide which of two completions answers a prompt better: follows its instructions, is helpful, relevant \
and accurate. Let neither the order in which they are shown nor their length influence you.

[Prompt]
{prompt}

[Completion A]
{first}

[Completion B]
{second}

[End of the completions]

First explain in a few sentences, then end with your verdict: [[A]] if completion A is better, [[B]] if completion B is \
better, [[C]] if they are equally good."""

Points = tuple[float, float]  # what the first and the second completion got
Bar = Callable[[int], AbstractContextManager[tuple[Callable[[str], None], Callable[[Progress], None]]]]

_RATING = re.compile(r"(\d{1,2}(?:\.\d+)?)(?:\s*[,;]\s*|\s+)(\d{1,2}(?:\.\d+)?)")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


class Protocol(NamedTuple):
    """How a judge is asked, how its reply is read, and what the mean share of points is called."""

    name: str
    form: str
    read: Callable[[str], Points | None]
    measure: str


class Own(NamedTuple):
    """The judge's own completion of each prompt, None where none was had; how many were cut off at its token limit."""

    texts: list[str | None]
    cut_off: int
    summary: Summary


@dataclass(frozen=True)
class Verdicts:
    """What the judge said about P prompts in R runs.

    shares (P, R, 2): the student's share of the points of both, in [0, 1], shown first and shown second; NaN where there
    is no reply that could be read. replies, asked_again, malformed: counts of replies, of those asked for in place of one
    that could not be read, and of places where the last could not be read either.
    """

    shares: np.ndarray
    replies: int
    asked_again: int
    malformed: int
    summary: Summary

    @property
    def runs(self) -> np.ndarray:
        """The share of each prompt and run, (P, R): the mean of both orders, NaN unless both could be read."""
        return self.shares.mean(2)

    @property
    def values(self) -> np.ndarray:
        """The share of each prompt, (P,): the mean over its runs, NaN if none could be read."""
        return _mean_of_known(self.runs)


def read_rating(reply: str) -> Points | None:
    """Return the two numbers of the first line, each from 1 to 10; None unless it holds exactly that."""
    found = _RATING.fullmatch(next((line.strip() for line in reply.splitlines() if line.strip()), ""))
    points = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    return points if all(1 <= one <= 10 for one in points) else None


def read_preference(reply: str) -> Points | None:
    """Return (1, 0), (0, 1) or (0.5, 0.5) for a reply with one verdict, given once or more often; else None."""
    verdicts = set(_VERDICT.findall(reply))
    return {"A": (1.0, 0.0), "B": (0.0, 1.0), "C": (0.5, 0.5)}[verdicts.pop()] if len(verdicts) == 1 else None


RATING = Protocol("rating", RATING_FORM, read_rating, "score")
PAIRWISE = Protocol("pairwise", PAIRWISE_FORM, read_preference, "win_rate")
PROTOCOLS = {protocol.name: protocol for protocol in (RATING, PAIRWISE)}


def own_completions(
    judge_model: Teacher, prompts: Sequence[Prompt], store: Store, settings: CollectSettings, bar: Bar
) -> Own:
    """Return the judge's own completion of each prompt, which the rating compares with."""
    once = replace(settings, samples=1)
    places = [(f"prompt {i + 1}", prompt) for i, prompt in enumerate(prompts)]
    with bar(len(places)) as (say, tick):
        summary = collect(judge_model, places, store, once, wanted=len(places), again=_is_empty, say=say, tick=tick)
    found = [next(drawn(store, judge_model.name, prompt, once, _is_empty)) for _, prompt in places]
    texts = [(answers[-1].text.strip() or None) if answers else None for answers in found]
    return Own(texts, sum(bool(answers) and answers[-1].finish_reason == "length" for answers in found), summary)


def judge(
    judge_model: Teacher,
    protocol: Protocol,
    prompts: Sequence[Prompt],
    ours: Sequence[str],
    theirs: Sequence[str | None],
    store: Store,
    settings: CollectSettings,
    bar: Bar,
) -> Verdicts:
    """Ask for every prompt, in both orders and settings.samples runs, what the student's completion is worth beside another.

    A reply that the protocol cannot read is asked for again, at most settings.redraws times. Prompts whose other
    completion is None are not asked. Stopped early (see `collect`), the summary says so and shares are missing.
    """
    assert len(prompts) == len(ours) == len(theirs) > 0, (len(prompts), len(ours), len(theirs))
    questions = list(_questions(protocol, prompts, ours, theirs))
    wanted = len(questions) * settings.samples
    again = _unreadable(protocol)
    with bar(wanted) as (say, tick):
        asked = ((where, text) for where, _, _, text in questions)
        summary = collect(judge_model, asked, store, settings, wanted=wanted, again=again, say=say, tick=tick)
    shares = np.full((len(prompts), settings.samples, 2), math.nan)
    replies = asked_again = malformed = 0
    for _, i, order, text in questions:
        for run, answers in enumerate(drawn(store, judge_model.name, text, settings, again)):
            points = protocol.read(answers[-1].text) if answers else None
            if points is not None:
                shares[i, run, order] = points[order] / sum(points)
            replies += len(answers)
            asked_again += max(0, len(answers) - 1)
            malformed += bool(answers) and points is None
    return Verdicts(shares, replies, asked_again, malformed, summary)


def judging_tokens(
    protocol: Protocol, prompts: Sequence[Prompt], ours: Sequence[str | int], theirs: Sequence[str | int]
) -> int:
    """Estimate the prompt tokens of one run of all questions, both orders; a number is a completion of so many tokens that is not written yet."""
    sides = [["" if isinstance(one, int) else one for one in side] for side in (ours, theirs)]
    unwritten = sum(one for one in (*ours, *theirs) if isinstance(one, int))
    texts = [text for *_, text in _questions(protocol, prompts, *sides)]
    return 2 * unwritten + sum(estimate_tokens(as_messages(text)) for text in texts)


def _questions(
    protocol: Protocol, prompts: Sequence[Prompt], ours: Sequence[str], theirs: Sequence[str | None]
) -> Iterator[tuple[str, int, int, str]]:
    """Yield (place, prompt's index, order, text); order 0 shows the student first."""
    for i, (prompt, mine, other) in enumerate(zip(prompts, ours, theirs, strict=True)):
        for order, (first, second) in enumerate(((mine, other), (other, mine))):
            if other is not None:
                text = protocol.form.format(prompt=prompt_text(prompt), first=first, second=second)
                yield f"prompt {i + 1}, order {order + 1}", i, order, text


def _unreadable(protocol: Protocol) -> Again:
    return lambda prompt, answer: protocol.read(answer.text) is None


def _is_empty(prompt: Prompt, answer: Answer) -> bool:
    return not answer.text.strip()


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Return the mean of each row's numbers, NaN where a row has none."""
    known = np.isfinite(values)
    return np.where(known.any(1), np.where(known, values, 0.0).sum(1) / np.maximum(known.sum(1), 1), math.nan)


# --- from verdicts to numbers ---


def numbers_of(
    protocol: Protocol, verdicts: Verdicts, ours: Sequence[str], theirs: Sequence[str | None], seed: int = 0
) -> dict[str, float]:
    """Return the measures of a judged student, each with _low and _high (95%, bootstrap over prompts; see stats.is_point).

    score (rating) is 100 · student / (student + judge's own), 50 is parity (arXiv 2511.10643, section 3.1), *here* in both
    orders; win_rate (pairwise) counts a tie half, in percent, and comes with its length-controlled twin, wins, ties and
    losses. first_share: percent of the points that go to what is shown first, 50 is no position bias. same_in_both_orders:
    percent of judged pairs. agreement: Krippendorff's alpha of the runs, of two or more. Raises UserError if nothing could be read.
    """
    values = verdicts.values
    kept = np.isfinite(values)
    if not kept.any():
        raise UserError(
            f"no reply of the judge could be read ({verdicts.malformed} malformed); ask a stronger judge, or allow it "
            "more tokens with --judge-max-tokens"
        )
    numbers = _named(protocol.measure, mean_interval(100 * values[kept], seed=seed))
    numbers |= _named("first_share", mean_interval(100 * _first_shares(verdicts.shares)[kept], seed=seed))
    lengths = np.array([[len(mine), len(other or "")] for mine, other in zip(ours, theirs, strict=True)])[kept]
    numbers |= {"mean_characters": float(lengths[:, 0].mean()), "other_mean_characters": float(lengths[:, 1].mean())}
    if protocol is PAIRWISE:
        controlled = length_controlled(values[kept], lengths[:, 0] - lengths[:, 1], seed=seed)
        rate = controlled.win_rate
        numbers |= _named("length_controlled_win_rate", Interval(100 * rate.value, 100 * rate.low, 100 * rate.high))
        numbers |= _named("length_effect", controlled.length_effect)
        numbers |= _outcomes(verdicts.shares)
    if verdicts.shares.shape[1] > 1:
        alpha = agreement(verdicts.runs, nominal=protocol is PAIRWISE)
        numbers |= {"agreement": alpha} if math.isfinite(alpha) else {}
    return numbers


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _first_shares(shares: np.ndarray) -> np.ndarray:
    """Return, of each prompt (P,), the share of the points that went to the first place, over runs with both orders."""
    return _mean_of_known((shares[:, :, 0] + 1 - shares[:, :, 1]) / 2)


def _outcomes(shares: np.ndarray) -> dict[str, float]:
    """Return wins, ties and losses in percent of pairs judged in both orders; a win in one order and a loss in the other is a tie."""
    both = shares.reshape(-1, 2)
    both = both[np.isfinite(both).all(1)]
    mean = both.mean(1)
    shown = {
        "wins": mean > 0.5,
        "ties": mean == 0.5,
        "losses": mean < 0.5,
        "same_in_both_orders": both[:, 0] == both[:, 1],
    }
    return {name: 100 * float(value.mean()) for name, value in shown.items()}


def compare(values: np.ndarray, others: Sequence[np.ndarray], seed: int = 0) -> list[dict[str, float]]:
    """Compare a student's value of each prompt (P,) with those of others: paired over the prompts that both have.

    Returns for each other the difference in points of 100 with its interval, p_value (random signs, two-sided), p_holm
    (corrected for the number of others), and prompts. Raises UserError for one without a prompt in common.
    """
    rows = []
    for other in others:
        both = np.isfinite(values) & np.isfinite(other)
        if not both.any():
            raise UserError("two students have no judged prompt in common; ask a stronger judge, or give more prompts")
        difference = 100 * (values - other)[both]
        named = _named("difference", mean_interval(difference, seed=seed))
        rows.append({**named, "p_value": paired_p_value(difference, seed=seed), "prompts": int(both.sum())})
    corrected: Any = holm([row["p_value"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]
