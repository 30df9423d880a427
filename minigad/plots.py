"""One figure an idea: a run's curves, its lengths, the frontier of quality and diversity, the one-dimensional world.

Every function returns a matplotlib Figure made without pyplot: no global state, no display, nothing to close.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minigad.attribution import PIECE_MEANINGS, Attribution, colour_limit
from minigad.checks import MEANINGS, CheckReport, Finding
from minigad.config import visible
from minigad.evaluate import words_of

__all__ = [
    "COLOURS",
    "panels_of",
    "plot_1d",
    "plot_attribution",
    "plot_checks",
    "plot_frontier",
    "plot_group",
    "plot_histogram",
    "plot_intervals",
    "plot_lengths",
    "plot_panels",
    "plot_run",
    "plot_stacked",
    "show",
]

# Okabe and Ito's palette, told apart with any colour vision, and two of Tol's. The four players keep their colours in every
# figure; methods and parts have those that no player has.
COLOURS = {"teacher": "#009E73", "student": "#0072B2", "discriminator": "#D55E00", "reference": "#7F7F7F"}
METHOD_COLOURS = ["#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933"]
MARKERS = "osD^vP"
STYLES = ["-", "--", "-.", ":"]

Line = tuple[Sequence[float], Sequence[float]]  # x, y
Curve = tuple[str, str, str, str]  # phase, metric, label, whose colour
SFT: list[Curve] = [
    ("warmup", "loss", "student, warm-up", "student"),
    ("seqkd", "loss", "student, SeqKD", "student"),
    ("discriminator_sft", "loss", "discriminator", "discriminator"),
    ("gad", "sft_loss", "student, in the game", "reference"),
]
REWARD: Curve = ("gad", "reward", "reward of the student", "student")
MARGIN: Curve = ("gad", "discriminator/margin", "margin, teacher − student", "discriminator")
ACCURACY: list[Curve] = [("gad", "discriminator/accuracy", "training prompts", "discriminator")]
PANELS: list[tuple[str, str, list[Curve]]] = [
    ("Cross-entropy on teacher text", "loss (nats/token)", SFT),
    ("DPO", "loss (nats/pair)", [("dpo", "loss", "student", "student")]),
    ("Scores", "score", [REWARD, MARGIN]),
    ("Discriminator accuracy", "share of pairs ranked right", ACCURACY),
    ("Completion length", "tokens", [("gad", "completions/mean_length", "student", "student")]),
    ("Entropy of the student", "nats/token", [("gad", "entropy", "student", "student")]),
    ("Held-out teacher text", "NLL (nats/token)", [("gad", "nll_eval", "student", "student")]),
    ("KL to the reference", "nats/token", [("gad", "kl", "student", "reference")]),
]


def panels_of(metrics: list[dict[str, Any]]) -> list[Any]:
    """Return the panels that these metrics have data for; none of them means that there is nothing to draw."""
    present = _present(metrics)
    return [panel for panel in PANELS if any(curve[:2] in present for curve in panel[2])]


def _present(metrics: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(m["phase"].replace("discriminator_warmup", "gad"), key) for m in metrics for key in m}


def plot_run(metrics: list[dict[str, Any]]) -> Figure:
    """Draw a run's metrics, one panel a subject and only panels that have data.

    Faint is each step, bold a running mean. The discriminator's warm-up lies at the steps up to 0.
    """
    panels, present = panels_of(metrics), _present(metrics)
    assert panels, f"no metrics of training among {len(metrics)} steps"
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(9, 2.8 * rows), layout="constrained")
    for i, (title, unit, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, i + 1)
        _labels(axes, title, "step of the phase" if "loss" in unit else "step of the game", unit)
        for phase, key, label, who in curves:
            if (phase, key) in present:
                _curve(axes, *_points(metrics, phase, key), label, COLOURS[who])
        if curves is ACCURACY:
            _chance(axes, metrics)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            _legend(axes)
    return figure


def _points(metrics: list[dict[str, Any]], phase: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(m["step"], m[key]) for m in metrics if m["phase"] == phase and key in m]
    if phase == "gad":  # what the discriminator's warm-up measured too comes before the game
        early = [(m["step"], m[key]) for m in metrics if m["phase"] == "discriminator_warmup" and key in m]
        found = [(step - early[-1][0], value) for step, value in early] + found
    points = np.array(found, dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    width = len(steps) // 40
    if width > 1:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        steps, values = steps[width - 1 :], np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps, values, color=colour, label=label, marker="." if len(steps) < 20 else None)


def _chance(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    steps, values = _points(metrics, "gad", "discriminator/accuracy_eval")
    if len(steps):
        axes.plot(steps, values, "D", color="black", markersize=4, label="held-out prompts")
    axes.axhline(0.5, color=COLOURS["reference"], linestyle="--", linewidth=1, label="chance")
    axes.set_ylim(-0.02, 1.02)


def plot_lengths(samples: Sequence[dict[str, Any]]) -> Figure:
    """Draw how long the texts of evaluation samples are, teacher against student, in words; dashed are the means."""
    assert samples, "no samples"
    counts = {who: [len(words_of(sample[who])) for sample in samples] for who in ("teacher", "student")}
    longest = max(max(values) for values in counts.values())
    width = longest // 30 + 1
    bins = np.arange(0, longest + 2 * width, width) - 0.5  # whole numbers in the middle of their bar
    figure, axes = _single(3)
    for who, values in counts.items():
        axes.hist(values, bins.tolist(), color=COLOURS[who], alpha=0.5, label=who)
        axes.axvline(float(np.mean(values)), color=COLOURS[who], linestyle="--")
    _labels(axes, "Length of completions on held-out prompts", "words", "completions")
    _legend(axes)
    return figure


def plot_frontier(
    curves: dict[str, list[tuple[float, float, float]]], x_label: str, y_label: str, title: str = ""
) -> Figure:
    """Draw a line a method through its (x, y, temperature) points, each point marked with its temperature."""
    figure, axes = _single(5)
    for i, ((method, points), colour) in enumerate(zip(curves.items(), _colours(list(curves)), strict=True)):
        axes.plot(*list(zip(*points, strict=True))[:2], color=colour, marker=MARKERS[i % len(MARKERS)], label=method)
        for x, y, temperature in points:
            axes.annotate(f"{temperature:g}", (x, y), (4, 5), textcoords="offset points", fontsize="small")
    _labels(axes, title or "Small numbers are temperatures", x_label, y_label)
    _legend(axes)
    return figure


def plot_panels(panels: dict[str, dict[str, Line]], x_label: str) -> Figure:
    """Draw panels side by side, {title: {label: (xs, ys)}}; a label that begins with a player's name has its colour.

    The title names the quantity and its unit. A line of two points is a level: dashed, in the reference's grey.
    """
    figure, titles = Figure(figsize=(9, 3.2), layout="constrained"), list(panels)
    for i, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        colours = _colours(list(lines))
        for k, (label, (xs, ys)) in enumerate(lines.items()):
            if len(xs) == 2:
                axes.plot(xs, ys, "--", color=COLOURS["reference"], linewidth=1, label=label)
            else:
                axes.plot(xs, ys, STYLES[k % 4], color=colours[k], label=label, marker="." if len(xs) < 20 else None)
        _labels(axes, title, x_label, "")
        if i == 0 or list(lines) != list(panels[titles[i - 1]]):  # one legend for panels of the same lines
            _legend(axes)
    return figure


def plot_histogram(values: dict[str, Sequence[float]], x_label: str, title: str = "") -> Figure:
    """Draw histograms over each other, one a label, each of area 1; dashed are the means."""
    every = [value for some in values.values() for value in some]
    bins = np.linspace(min(every), max(every) + 1e-6, 31).tolist()
    figure, axes = _single(3.2)
    for (label, some), colour in zip(values.items(), _colours(list(values)), strict=True):
        axes.hist(some, bins, density=True, color=colour, alpha=0.5, label=label)
        axes.axvline(float(np.mean(some)), color=colour, linestyle="--")
    _labels(axes, title, x_label, "density")
    _legend(axes)
    return figure


def plot_group(completions: Sequence[str], rewards: Sequence[float], advantages: Sequence[float]) -> Figure:
    """Draw one group from rewards, with their mean, to advantages: a bar a completion."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for i, (title, values) in enumerate((("Rewards; dashed: their mean", rewards), ("Advantages", advantages))):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.barh(range(len(values)), values, color=COLOURS["student"], alpha=0.7)
        axes.axvline(float(np.mean(values)), color=COLOURS["reference"], linestyle="--")
        _labels(axes, title, "", "")
        axes.set_yticks(range(len(values)), completions, family="monospace")
        axes.invert_yaxis()
    return figure


def plot_attribution(seen: dict[str, Attribution]) -> Figure:
    """Draw what the discriminator sees in completions of one prompt, a panel each by label: a bar a piece, in score units.

    Bars that lower the score are hatched. One scale for all; a first piece beyond it (it carries the prompt's zero) has an arrow.
    """
    limit = 1.15 * colour_limit(list(seen.values()))
    figure = Figure(figsize=(9, 2.4 * len(seen)), layout="constrained")
    for i, (label, one) in enumerate(seen.items()):
        axes, values = figure.add_subplot(len(seen), 1, i + 1), np.array(one.contributions)
        colours = np.where(values > 0, COLOURS["discriminator"], COLOURS["student"])
        bars = axes.bar(range(len(values)), values, color=colours.tolist(), edgecolor="white")
        for bar, value in zip(bars, values, strict=True):
            bar.set_hatch("" if value > 0 else "///")
        for k in np.flatnonzero(np.abs(values) > limit):
            arrow = "↑" if values[k] > 0 else "↓"
            axes.text(
                float(k),
                float(np.sign(values[k])) * 0.85 * limit,
                f"{arrow}{values[k]:+.2f}",
                ha="center",
                fontsize="small",
                backgroundcolor="white",
            )
        _labels(axes, "", "", "score")
        axes.set_title(f"{label}: score {one.score:+.2f}", loc="left", parse_math=False)
        axes.set_ylim(-limit, limit)
        _pieces(axes, one.pieces)
    figure.supxlabel(next(iter(PIECE_MEANINGS[one.kind] for one in seen.values())), fontsize="small")
    return figure


def _pieces(axes: Axes, pieces: list[str]) -> None:
    """Write the pieces under their bars, where there is room for them."""
    if len(pieces) > 80:
        axes.set_xlabel(f"piece of the completion, of {len(pieces)}")
        return
    words = [visible(piece).replace("\n", "↵").replace(" ", "␣")[:16] for piece in pieces]
    axes.set_xticks(range(len(words)), words, fontsize="small")
    for word, label in zip(words, axes.get_xticklabels(), strict=True):
        label.set(parse_math=False, rotation=0 if len(word) <= 2 else 90)


def plot_stacked(bars: dict[str, dict[str, float]], x_label: str, limits: dict[str, float] | None = None) -> Figure:
    """Draw a horizontal bar a label, {label: {part: size}}, its parts end to end, its sum at its end; dashed are `limits`.

    A part has one colour in all bars. The seventh part and those after it are hatched.
    """
    parts = list(dict.fromkeys(part for sizes in bars.values() for part in sizes))
    figure, axes = _single(1.6 + 0.5 * len(bars))
    left = np.zeros(len(bars))
    for i, part in enumerate(parts):
        sizes = np.array([sizes.get(part, 0.0) for sizes in bars.values()])
        hatch, colour = ("", "//")[i // len(METHOD_COLOURS) % 2], METHOD_COLOURS[i % len(METHOD_COLOURS)]
        axes.barh(list(bars), sizes, left=left, color=colour, hatch=hatch, edgecolor="white", label=part)
        left += sizes
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:,.0f}" if total >= 100 else f" {total:.3g}", va="center", fontsize="small")
    for label, limit in (limits or {}).items():
        axes.axvline(limit, color=COLOURS["reference"], linestyle="--", linewidth=1)
        axes.annotate(f" {label}", (limit, 1), xycoords=("data", "axes fraction"), va="top", fontsize="small")
    _labels(axes, "", x_label, "")
    axes.set_xlim(0, 1.1 * max([*left, *(limits or {}).values()]))
    axes.set_ylim(len(bars) - 0.5, -1.0)  # downwards, with room for the limits' names
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    return figure


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook; `alt` says in words what it shows, for readers who cannot see it."""
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt}})


def _colours(labels: Sequence[str]) -> list[str]:
    """Give a label that begins with a player's name that player's colour, and each other label one that no player has."""
    free = itertools.cycle(METHOD_COLOURS)
    return [COLOURS.get(re.split(r"\W", label)[0]) or next(free) for label in labels]


def plot_1d(teacher: Tensor, students: dict[str, Tensor]) -> Figure:
    """Draw the one-dimensional world: bars for the teacher's probabilities, a line a student; all (categories,)."""
    figure, axes = _single(4)
    axes.bar(range(len(teacher)), teacher.tolist(), width=0.9, color=COLOURS["teacher"], alpha=0.4, label="teacher")
    for i, (method, probabilities) in enumerate(students.items()):
        axes.plot(probabilities.tolist(), STYLES[i % 4], color=_colours(list(students))[i], label=method)
    _labels(axes, "", "category", "probability")
    _legend(axes)
    return figure


def plot_checks(report: CheckReport) -> Figure:
    """Draw what the checks of a collection found, a bar a class: how many were kept, dropped, or asked again."""
    figure, axes = _single(4.5)
    names = list(MEANINGS)[::-1]
    found = [report.findings.get(name, Finding()) for name in names]
    asked, dropped = np.array([f.asked_again for f in found]), np.array([f.dropped for f in found])
    kept = np.array([f.count for f in found]) - asked - dropped
    left = np.zeros(len(names))
    for label, values, colour in (("kept", kept, 2), ("dropped", dropped, 4), ("asked again", asked, 1)):
        axes.barh(names, values, left=left, color=METHOD_COLOURS[colour], label=label)
        left += values
    for i, f in enumerate(found):
        axes.text(f.count, i, f" {f.count}", va="center", fontsize="small")
    title = f"{report.prompts} prompts read, {report.answers} answers looked at, {report.kept} rows kept"
    _labels(axes, title, "findings", "")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlim(0, max([1, *left]) * 1.1)
    _legend(axes)
    return figure


def plot_intervals(rows: Sequence[tuple[str, float, float, float]], x_label: str, parity: float) -> Figure:
    """Draw (label, value, low, high) rows as points with their intervals; dashed is parity."""
    figure, axes = _single(1.2 + 0.45 * len(rows))
    for i, (_, value, low, high) in enumerate(rows):
        axes.plot([low, high], [i, i], color=COLOURS["student"], linewidth=2)
        axes.plot([value], [i], "o", color=COLOURS["student"])
        axes.text(value, i - 0.12, f"{value:.1f}", ha="center", va="bottom", fontsize="small")
    axes.axvline(parity, color=COLOURS["reference"], linestyle="--", linewidth=1)
    _labels(axes, "", x_label, "")
    names = [label if len(label) <= 60 else f"{label[:59]}…" for label, *_ in rows]
    axes.set_yticks(range(len(rows)), names, parse_math=False, fontsize="small")
    axes.set_ylim(len(rows) - 0.5, -0.6)
    return figure


def _single(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.add_subplot()


def _labels(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    # "best" is the default, but said aloud it does not warn where a busy machine takes a second to find it.
    for text in axes.legend(loc="best", frameon=False, fontsize="small").get_texts():
        text.set_parse_math(False)  # a method's name may hold a dollar sign
