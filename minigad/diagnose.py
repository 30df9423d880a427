"""What a run's numbers mean: values that are not finite, alarms in words, and what the curves say.

The bands are those of measured games of the letters language, healthy and sick (benchmarks/health.py prints them
beside what every alarm said of every game). Another task has other bands: an alarm is a reason to look, not a verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigad.chat import Row
from minigad.checkpoint import State, to_json, write_synced
from minigad.metrics import Metrics

__all__ = ["ALARMS", "Alarm", "alarms", "diagnose", "dump_batch", "not_finite"]

WINDOW = 50  # logged steps of the game that an alarm looks at: one step's numbers are noise
# Limits. Beside each: the most extreme window of 50 steps of the healthy games, those that raise validity, and what the sick
# ones reached, those that lose it or leak; idle are games that do neither.
SATURATED = 0.95  # mean accuracy of D; healthy 0.86, sick 0.97 and 1.00
OUTSCORED = (
    0.4  # mean accuracy of D below which the student's text beats the teacher's own; healthy 0.79, idle 0.49, sick 0.19
)
HACKED_NLL = 0.5  # rise of the NLL of held-out teacher text, nats a token; healthy 0.13, sick 0.87 and 4.1
KL_LIMIT = 0.6  # nats a token; healthy 0.10, sick 1.07 and 6.0
LENGTH_DRIFT = 1.3  # ratio of mean lengths, either way; healthy 1.10, sick 1.6
LENGTH_CORRELATION = (
    0.5  # absolute; healthy 0.11, sick 0.60, idle 0.86: a head that learns nothing else scores by length
)
ENTROPY_LEFT = 0.4  # share of the first entropy; healthy 0.73; the lowest sick one, 0.44, is not spoken of
TIED = 0.3  # mean share of groups without any difference; healthy 0.00, sick 0.30
OVERFITTED = 0.15  # accuracy of D, training minus held-out; healthy 0.05; no game was sick in this way
IDENTICAL_GAP = 1e-3  # scores of one text on either side; all games below 1e-4, which is rounding


class Alarm(NamedTuple):
    """Something that games which went wrong do; `words` say what was seen, what it means and what to try."""

    name: str
    step: int
    words: str


# --- not finite ---


def not_finite(state: State, metrics: Metrics) -> str:
    """Name the first measure, weight or gradient that is infinite or not a number; "" if all are finite."""
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} is {value}"
    for name, weight in state.weights().items():
        for what, tensor in (("weight", weight), ("gradient", weight.grad)):
            if tensor is not None and not tensor.isfinite().all():
                return f"{what} {name} has {int((~tensor.isfinite()).sum())} of {tensor.numel()} values not finite"
    return ""


def dump_batch(folder: Path, state: State, problem: str) -> Path:
    """Write not-finite-PHASE-STEP.json, with the ids and the text of every row of the step at hand; return its path."""
    assert state.student is not None
    tokenizer = state.student.tokenizer
    rows = [{**row._asdict(), "text": tokenizer.decode(row.completion_ids)} for row in _rows(state.batch)]
    path = folder / f"not-finite-{state.phase}-{state.step}.json"
    write_synced(path, to_json({"phase": state.phase, "step": state.step, "problem": problem, "rows": rows}))
    return path


def _rows(batch: Any) -> Iterator[Row]:
    """Yield the rows of whatever a step works on: rollouts, rows, or lists of rows."""
    if isinstance(batch, Row):
        yield batch
    else:
        for part in getattr(batch, "rows", batch) or ():
            yield from _rows(part)


# --- alarms ---


def _mean(steps: Sequence[Metrics], key: str) -> float:
    """Mean of a measure over the steps that have it; nan, which no comparison fires on, if none has."""
    values = [step[key] for step in steps if key in step]
    return statistics.fmean(values) if values else math.nan


def _saturated(first: Sequence[Metrics], last: Sequence[Metrics]) -> str:
    if (accuracy := _mean(last, "discriminator/accuracy")) > SATURATED:
        return (
            f"the discriminator ranks {accuracy:.0%} of pairs right (above {SATURATED:.0%}): the student is told "
            "that everything is wrong and not what is better; look at the audit for a shortcut (end token, length, "
            "format), then lower discriminator_learning_rate or warm the student up for longer"
        )
    return ""


def _overfitted(first: Sequence[Metrics], last: Sequence[Metrics]) -> str:
    seen, held = _mean(last, "discriminator/accuracy"), _mean(last, "discriminator/accuracy_eval")
    if seen - held > OVERFITTED:
        return (
            f"the discriminator is right on {seen:.0%} of training pairs and {held:.0%} of held-out ones: it knows the "
            "teacher's texts by heart; give it more data, fewer warm-up steps or a lower rate"
        )
    return ""


def _identical(first: Sequence[Metrics], last: Sequence[Metrics]) -> str:
    if (gap := max((step.get("discriminator/identical_text_gap", 0.0) for step in last), default=0.0)) > IDENTICAL_GAP:
        return (
            f"a text that teacher and student both wrote has scores {gap:.2g} apart: the two sides do not reach the "
            "discriminator in one form, and it will win by that alone; this is a bug in encode(), not a setting"
        )
    return ""


def _hacked(first: Sequence[Metrics], last: Sequence[Metrics]) -> str:
    accuracy = _mean(last, "discriminator/accuracy")
    rise, worse = _mean(last, "reward") - _mean(first, "reward"), _mean(last, "nll_eval") - _mean(first, "nll_eval")
    if accuracy < OUTSCORED or (rise > 0 and worse > HACKED_NLL):
        return (
            f"reward moved by {rise:+.2f} while the teacher's held-out text became {worse:+.2f} nats a token less likely, "
            f"and the teacher's text wins only {accuracy:.0%} of pairs: the student writes what the discriminator likes, not "
            "what the teacher writes; unfreeze the discriminator or raise its rate, lower the student's, or stop earlier"
        )
    return ""


def _longer(first: Sequence[Metrics], last: Sequence[Metrics]) -> str:
    before, now = (_mean(steps, "completions/mean_length") for steps in (first, last))
    if now > before * LENGTH_DRIFT or now < before / LENGTH_DRIFT:
        return (
            f"completions went from {before:.1f} to {now:.1f} tokens, {_mean(last, 'completions/clipped_ratio'):.0%} of them "
            "cut off: length is being rewarded, or the end token forgotten; compare with the teacher's length, look at "
            "the audit's length rows, lower learning_rate"
        )
    return ""


def _length_decides(first: Sequence[Metrics], last: Sequence[Metrics]) -> str:
    if abs(correlation := _mean(last, "discriminator/length_corr")) > LENGTH_CORRELATION:
        return (
            f"score and length are correlated by {correlation:+.2f}: the discriminator judges length; give it completions of "
            "one length range, or a student that was warmed up until its lengths are the teacher's"
        )
    return ""


def _collapsed(first: Sequence[Metrics], last: Sequence[Metrics]) -> str:
    before, now = (_mean(steps, "entropy") for steps in (first, last))
    if now < before * ENTROPY_LEFT:
        return (
            f"the student's entropy fell from {before:.2f} to {now:.3f} nats a token: it says nearly the same whatever is "
            "sampled; lower learning_rate, raise beta or sft_weight, or stop earlier"
        )
    return ""


def _tied(first: Sequence[Metrics], last: Sequence[Metrics]) -> str:
    if (share := _mean(last, "frac_reward_zero_std")) > TIED:
        return (
            f"in {share:.0%} of groups all completions have one score: these teach the student nothing; its samples are all "
            "alike (entropy), or the discriminator has not learnt anything yet (more discriminator_warmup_steps)"
        )
    return ""


def _far(first: Sequence[Metrics], last: Sequence[Metrics]) -> str:
    if (kl := _mean(last, "kl")) > KL_LIMIT:
        return (
            f"the student is {kl:.2f} nats a token away from its start: it is leaving the language it was warmed up in; raise "
            "beta or lower learning_rate"
        )
    return ""


ALARMS: dict[str, Callable[[Sequence[Metrics], Sequence[Metrics]], str]] = {
    "discriminator saturated": _saturated,
    "discriminator overfitted": _overfitted,
    "identical text": _identical,
    "reward hacking": _hacked,
    "length drift": _longer,
    "length decides": _length_decides,
    "entropy collapse": _collapsed,
    "groups tied": _tied,
    "far from the start": _far,
}


def alarms(first: Sequence[Metrics], last: Sequence[Metrics]) -> list[Alarm]:
    """Return what is alarming in the last WINDOW steps of the game beside its first WINDOW; nothing before there are so many."""
    if len(first) < WINDOW:
        return []
    return [Alarm(name, last[-1]["step"], words) for name, rule in ALARMS.items() if (words := rule(first, last))]


# --- the curve reader ---

# phase, measure, what it is, what it means
CURVES = [
    (
        "warmup",
        "loss",
        "student's cross-entropy in warm-up",
        "should end flat: the game refines a student that can speak",
    ),
    ("seqkd", "loss", "student's cross-entropy", "training text only: read nll of the evaluation beside it"),
    ("discriminator_sft", "loss", "cross-entropy of the discriminator's language model", "should end flat"),
    ("dpo", "rewards/accuracies", "share of pairs DPO ranks right", "near 1 at once means that the pairs were easy"),
    ("gad", "reward", "reward", "the score of a moving judge: its level means nothing, only its spread does"),
    ("gad", "discriminator/accuracy", "accuracy of D", "0.5 is chance: no difference is left that it can see"),
    ("gad", "discriminator/accuracy_eval", "accuracy of D on held-out prompts", "should lie by the training one"),
    (
        "gad",
        "nll_eval",
        "NLL of held-out teacher text",
        "rises a little when the student drops modes, a lot when it is lost",
    ),
    ("gad", "completions/mean_length", "completion length", "should approach the teacher's and stay"),
    ("gad", "entropy", "entropy of the student", "falls while it sharpens; a fall to nothing is collapse"),
    ("gad", "kl", "KL to the warmed-up student", "how far the game has led it"),
]
FLAT = 0.02  # share by which a loss may still fall over its last fifth and count as flat


def diagnose(metrics: Sequence[Metrics], evaluation: dict[str, Any] | None = None) -> list[str]:
    """Say in sentences what a run's curves mean, what was alarming and when, and what to try.

    `metrics` are the rows of metrics.jsonl, `evaluation` is evaluation.json. Reads only; an empty run gives one sentence.
    """
    lines = (
        [line for curve in CURVES if (line := _curve(metrics, *curve))] + _unfinished(metrics) + _first_alarms(metrics)
    )
    return [*lines, *_verdict(evaluation)] or ["No metrics: nothing was trained, or metrics.jsonl is missing."]


def _curve(metrics: Sequence[Metrics], phase: str, key: str, name: str, meaning: str) -> str:
    values = [step[key] for step in metrics if step["phase"] == phase and key in step]
    if not values:
        return ""
    part = max(len(values) // 5, 1)
    before, now = statistics.fmean(values[:part]), statistics.fmean(values[-part:])
    return f"{name}: {before:.3g} to {now:.3g} over {len(values)} steps ({meaning})."


def _unfinished(metrics: Sequence[Metrics]) -> list[str]:
    """Name the losses that were still falling when their phase ended."""
    lines = []
    for phase in ("warmup", "seqkd", "discriminator_sft"):
        losses = [step["loss"] for step in metrics if step["phase"] == phase]
        part = len(losses) // 5
        if part and statistics.fmean(losses[-part:]) < (1 - FLAT) * statistics.fmean(losses[-2 * part : -part]):
            lines.append(f"The loss of {phase} was still falling at its end: try {phase}_epochs twice as large.")
    return lines


def _first_alarms(metrics: Sequence[Metrics]) -> list[str]:
    game = [step for step in metrics if step["phase"] == "gad"]
    if not game:
        return []
    if len(game) < WINDOW:
        return [f"{len(game)} logged steps of the game are too few to say more: alarms look at {WINDOW} at a time."]
    found: dict[str, Alarm] = {}
    for end in range(WINDOW, len(game) + 1, WINDOW // 5):
        for alarm in alarms(game[:WINDOW], game[end - WINDOW : end]):
            found.setdefault(alarm.name, alarm)
    healthy = f"No alarm in {len(game)} steps: within the bands of the healthy games of benchmarks/health.py."
    return [f"ALARM, {a.name}, from step {a.step}: {a.words}." for a in found.values()] or [healthy]


def _verdict(evaluation: dict[str, Any] | None) -> list[str]:
    measured = (evaluation or {}).get("metrics", {})
    if not {"honest_auc", "honest_auc_low"} <= measured.keys():
        return []
    auc, low = measured["honest_auc"], measured["honest_auc_low"]
    seen = "a fresh classifier tells it from the teacher" if low > 0.5 else "a fresh classifier sees no difference"
    return [
        f"On held-out prompts {seen} (honest AUC {auc:.2f}, lower end {low:.2f}); whether it is better is another question."
    ]
