"""A run as one HTML file: nothing is fetched, nothing is executed, and every text of a model is shown as text."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import io
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigad.attribution import PIECE_MEANINGS, Attribution, colour_limit
from minigad.checkpoint import write_whole
from minigad.config import GADConfig
from minigad.diagnose import diagnose
from minigad.markup import LEGEND, coloured
from minigad.markup import escape as _text
from minigad.reading import read_run
from minigad.stats import is_point

__all__ = ["write_report"]

NUM_SAMPLES = 20
PACKAGES = ["torch", "transformers", "peft", "datasets", "scikit-learn"]

# What comes first in the table, and how to read it; all else follows as it was written.
MEANINGS = {
    "honest_auc": "a fresh classifier tells teacher from student on unseen prompts: 0.5 is chance, lower is better",
    "bayes_auc": "the best that any classifier can do: 0.5 is chance, lower is better",
    "kl_student_teacher": "KL(student || teacher), nats a completion: what the student says that the teacher would not",
    "kl_teacher_student": "KL(teacher || student), nats a completion: what the teacher says that the student would not",
    "nll": "negative log-likelihood of held-out teacher text at temperature 1, nats a token",
    "entropy": "entropy of the student's completions, nats a token: falls when it drops modes",
    "f1_2": "overlap of word pairs with the teacher's nearest answer, 0 to 1",
    "distinct_2": "share of different word pairs among the student's texts; falls with the number of texts",
    "mean_words": "words a completion of the student",
    "clipped_ratio": "share of completions cut off at the length limit",
}
BESIDE = {"{}_se": "(s.e. {})", "{}_low": "(95%: {}", "{}_high": "to {})", "{}_ceiling": "; teacher against itself: {}"}
BESIDE["teacher_{}"] = "; teacher: {}"

STYLE = """
:root { color-scheme: light dark; --line: #ccc; --quiet: #595959 }
@media (prefers-color-scheme: dark) { :root { --line: #555; --quiet: #b5b5b5 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } h3, .note, td + td + td { color: var(--quiet) }
td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; vertical-align: top; overflow-wrap: anywhere }
td:first-child { overflow-wrap: normal } td + td { min-width: 9rem } h3 { font-size: .85rem; margin: .4rem 0 .1rem } .pair { display: grid; gap: 0 1.5rem }
figure, article { border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0; padding: .6rem }
figure { background: #fff } img { width: 100% } pre { font: inherit; margin: 0; white-space: pre-wrap }
pre { overflow-wrap: anywhere } @media (min-width: 640px) { .pair { grid-template-columns: 1fr 1fr } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run's folder and return its path; UserError if the folder holds no run.

    One file with its figures inside, no script, no link. Shows what is there and names what is missing.
    """
    path = Path(folder) / "report.html"
    write_whole(path, _page(read_run(folder)).encode("utf-8"))
    return path


def _page(run: dict[str, Any]) -> str:
    record, evaluation = run["config"], run["evaluation"]
    title = f"minigad: {record.get('method', 'run')} of {record['config'].get('student', '?')}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{_text(title)}</title><style>{STYLE}</style></head>
<body><h1>{_text(title)}</h1>
<h2>Held-out prompts</h2>{_evaluation(evaluation)}
{_judged((evaluation or {}).get("judge", []))}
<h2>Training</h2>{_training(run["metrics"])}{_words(diagnose(run["metrics"], evaluation))}
{_audit(run["audit"])}
<h2>Samples</h2>{_samples(evaluation, run["samples"])}
<h2>Settings</h2>{_settings(record)}
<h2>Versions</h2>{_versions()}
</body></html>
"""


def _table(rows: Sequence[tuple[Any, ...]]) -> str:
    return "<table>" + "".join(f"<tr>{''.join(f'<td>{_text(v)}</td>' for v in row)}</tr>" for row in rows) + "</table>"


def _note(sentence: str) -> str:
    return f'<p class="note">{sentence}</p>'


def _evaluation(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return _note("Not evaluated: the run has no evaluation.json.")
    metrics = evaluation["metrics"]
    main = [(name, _beside(name, metrics), meaning) for name, meaning in MEANINGS.items() if name in metrics]
    shown = {key.format(name) for name in MEANINGS for key in ("{}", *BESIDE)}
    rest = [(name, _number(value)) for name, value in metrics.items() if name not in shown]
    return (
        _trained_on(evaluation)
        + _table(main)
        + (f"<details><summary>All other measures</summary>{_table(rest)}</details>" if rest else "")
    )


def _trained_on(record: dict[str, Any]) -> str:
    """A warning where a student was measured on what it was trained on; older records do not say."""
    number = record.get("trained_on")
    return _note(f"The student was trained on {_text(number)} of these prompts.") if number else ""


JUDGED = {
    "score": "100 · student / (student + judge's own completion): 50 is parity; both orders; rewards detail, and so length",
    "win_rate": "percent of prompts, a tie half: 50 is parity; both orders",
    "length_controlled_win_rate": "the same at equal length, by AlpacaEval 2's model (arXiv 2404.04475)",
    "length_effect": "log-odds that far more text earns, three quarters of it for one standard deviation more; 0: length does not matter",
    "first_share": "percent of the points that go to what is shown first: 50 is no position bias",
    "wins": "percent of pairs that the student wins; won in one order and lost in the other is a tie",
    "ties": "percent of pairs",
    "losses": "percent of pairs",
    "same_in_both_orders": "percent of pairs with one verdict, whichever was shown first",
    "mean_characters": "characters a completion of the student",
    "other_mean_characters": "characters a completion of the other side",
    "agreement": "Krippendorff's alpha between runs of the judge: 1 is agreement, 0 is chance",
}


def _judged(records: Sequence[dict[str, Any]]) -> str:
    """What judges said: a figure of all intervals, and a table a judge, protocol and set."""
    from minigad.plots import plot_intervals

    if not records:
        return ""
    several = len({record["judge"] for record in records}) > 1
    shown = [
        (
            f"{words}, {record['title'].partition(' on ')[2]}" + (f", by {record['judge']}" if several else ""),
            *(record["numbers"].get(f"{name}{end}") for end in ENDS),
        )
        for record in records
        for name, words in SHORT.items()
    ]
    whole: list[Any] = [row for row in shown if all(isinstance(value, (int, float)) for value in row[1:])]
    figure = _figure(plot_intervals(whole, "points of 100; dashed: parity", 50.0), "Judged scores with 95% intervals")
    return f"<h2>Judge</h2>{figure if whole else ''}" + "".join(map(_judge_record, records))


ENDS = ("", "_low", "_high")
SHORT = {"score": "score", "win_rate": "win rate", "length_controlled_win_rate": "at equal length"}  # in the figure


def _judge_record(record: dict[str, Any]) -> str:
    numbers, counts = record["numbers"], record["counts"]
    rows = [(name, _beside(name, numbers), meaning) for name, meaning in JUDGED.items() if name in numbers]
    rest = [(name, _number(v)) for name, v in numbers.items() if not name.endswith(ENDS[1:]) and name not in JUDGED]
    for row in record["comparisons"]:
        words = {"p_value": "p {}", "p_holm": "{} after Holm's correction"}
        p = ", ".join(form.format(_number(row[name])) for name, form in words.items() if name in row)
        rows.append((f"difference from {row['with']}", _beside("difference", row), p))
    said = ", ".join(f"{_number(value)} {name.replace('_', ' ')}" for name, value in counts.items())
    return f"<h3>{_text(record['title'])}, by {_text(record['judge'])}</h3>{_note(_text(said))}{_trained_on(record)}{_table([*rows, *rest])}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _beside(name: str, metrics: dict[str, Any]) -> str:
    """A number with what it must be read beside: its interval, its standard error, its ceiling."""
    ends = [metrics[f"{name}{end}"] for end in ENDS[1:] if f"{name}{end}" in metrics]
    if len(ends) == 2 and is_point(*ends):
        return f"{_number(metrics[name])} (no interval: all prompts alike)"
    found = [(metrics[key.format(name)], words) for key, words in BESIDE.items() if key.format(name) in metrics]
    parts = [_number(metrics[name]), *(words.format(_number(value)) for value, words in found)]
    return " ".join(parts).replace(" ;", ";")


def _training(metrics: list[dict[str, Any]]) -> str:
    from minigad.plots import panels_of, plot_run

    if not panels_of(metrics):
        return _note("No training metrics: metrics.jsonl is missing, empty, or holds nothing that could be drawn.")
    return _figure(plot_run(metrics), "Training curves: losses, scores, discriminator accuracy, length, entropy, KL")


def _words(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _audit(findings: Sequence[dict[str, Any]]) -> str:
    """The shortcut audit: a cross where a number is beyond its limit."""
    if not findings:
        return ""
    rows = [
        (f"{'✓' if one['ok'] else '✗'} {one['check']}", f"{one['value']:.3g} (limit {one['limit']:g})", one["words"])
        for one in findings
    ]
    return "<h2>What the discriminator judges by</h2>" + _table(rows)


def _figure(figure: Any, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{_text(alt)}" src="data:image/png;base64,{data}"></figure>'


def _samples(evaluation: dict[str, Any] | None, training: list[dict[str, Any]]) -> str:
    from minigad.plots import plot_lengths

    if evaluation is None or not evaluation["samples"]:
        note = _note("The last samples of training." if training else "No samples.")
        return note + "".join(map(_sample, training[-NUM_SAMPLES:]))
    samples = evaluation["samples"]
    lengths = _figure(plot_lengths(samples), "Words of held-out completions, teacher and student")
    note = _note(f"The first {min(NUM_SAMPLES, len(samples))} of {len(samples)} held-out prompts, not chosen.")
    return lengths + note + _legend(samples) + "".join(map(_sample, samples[:NUM_SAMPLES]))


def _legend(samples: Sequence[dict[str, Any]]) -> str:
    """What the colours of the samples that have some mean."""
    kinds = {sample["seen"]["teacher"]["kind"] for sample in samples if "seen" in sample}
    words = "".join(f" The number of a piece (point at it) says {PIECE_MEANINGS[kind]}." for kind in kinds)
    return _note(f"Coloured is what the discriminator sees: {LEGEND}.{words}") if kinds else ""


def _sample(sample: dict[str, Any]) -> str:
    cut = "" if sample.get("finished", True) else " (cut off)"
    read = " (as far as it was read)" if {"seen", "teacher_read"} <= sample.keys() else ""
    parts = [("Prompt", "prompt"), (f"Teacher{read}", "teacher"), (f"Student{cut}", "student")]
    cells = [f"<div><h3>{title}{_score(sample, key)}</h3>{_completion(sample, key)}</div>" for title, key in parts]
    return f'<article>{cells[0]}<div class="pair">{cells[1]}{cells[2]}</div></article>'


def _score(sample: dict[str, Any], who: str) -> str:
    return f", score {sample[f'{who}_score']:+.2f}" if f"{who}_score" in sample else ""


def _completion(sample: dict[str, Any], who: str) -> str:
    """A text, coloured by what the discriminator sees where the run knows it; both sides of a prompt share one scale."""
    if who not in sample.get("seen", ()):
        return f'<pre dir="auto">{_text(sample[who])}</pre>'
    seen = {side: Attribution(**sample["seen"][side]) for side in ("teacher", "student")}
    return coloured(seen[who], colour_limit(list(seen.values())))


def _settings(record: dict[str, Any]) -> str:
    defaults = json.loads(json.dumps(dataclasses.asdict(GADConfig())))  # as config.json holds them: no tuples
    about = [(name, value) for name, value in record.items() if name != "config"]
    chosen = [row for row in record["config"].items() if row[1] != defaults.get(row[0])]
    kept = [row for row in record["config"].items() if row not in chosen]
    changed = [(name, value, f"default {defaults.get(name)}") for name, value in chosen]
    return _table(about + changed) + f"<details><summary>Settings at their default</summary>{_table(kept)}</details>"


def _versions() -> str:
    rows = [("python", platform.python_version())] + [(name, importlib.metadata.version(name)) for name in PACKAGES]
    return _note("Of the machine that wrote this page.") + _table(rows)
