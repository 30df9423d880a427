"""Quality against coverage: how far one method's curve over sampling temperature lies above another's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from results import Row, select

FRONTIER_BASE = "seqkd-equal-cpu"


def frontier_table(rows: Sequence[Row]) -> str:
    """Return validity of a method less that of seqkd-equal-cpu where their curves over temperature have one entropy, or one number of modes."""
    lines = ["| method | gained at equal entropy | gained at equal modes | ahead up to |", "|---|---|---|---|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        if method not in (FRONTIER_BASE, "teacher", "base"):
            gains = " | ".join(frontier_gain(rows, method, axis) for axis in ("entropy", "modes"))
            lines.append(f"| {method} | {gains} | {_lead(rows, method)} |")
    return "\n".join(lines)


def frontier_gains(
    rows: Sequence[Row], method: str, axis: str, base: str = FRONTIER_BASE, quality: str = "validity"
) -> list[float]:
    """Validity, or another quality, of a method less that of `base`, mean over the overlap of their two curves: a value a seed, where there is one."""
    gains = []
    for seed in sorted({r["seed"] for r in select(rows, method)}):
        ours, theirs = (_curve(rows, name, seed, axis, quality) for name in (method, base))
        low, high = max(ours[0][0], theirs[0][0]), min(ours[0][-1], theirs[0][-1])
        if low < high:
            grid = np.linspace(low, high, 21)
            gains.append(float(np.mean(np.interp(grid, *ours) - np.interp(grid, *theirs))))
    return gains


def frontier_gain(rows: Sequence[Row], method: str, axis: str) -> str:
    """Mean and deviation of `frontier_gains`; '-' where no seed's curves overlap on that axis."""
    gains = frontier_gains(rows, method, axis)
    if not gains:
        return "- (no overlap)"
    deviation = statistics.stdev(gains) if len(gains) > 1 else 0.0
    return f"{statistics.fmean(gains):+.3f} ± {deviation:.3f} ({len(gains)} seeds)"


def _lead(rows: Sequence[Row], method: str) -> str:
    """The number of modes up to which a method's curve stays above seqkd-equal-cpu's, a value a seed; '-' if never in any."""
    ends = []
    for seed in sorted({r["seed"] for r in select(rows, method)}):
        ours, base = (_curve(rows, name, seed, "modes") for name in (method, FRONTIER_BASE))
        grid = np.linspace(max(ours[0][0], base[0][0]), min(ours[0][-1], base[0][-1]), 201)
        ahead = np.interp(grid, *ours) > np.interp(grid, *base)
        if ahead[0]:
            ends.append(float(grid[-1] if ahead.all() else grid[int(np.argmin(ahead))]))
    if not ends:
        return "-"
    deviation = statistics.stdev(ends) if len(ends) > 1 else 0.0
    return f"{statistics.fmean(ends):.1f} ± {deviation:.1f} modes ({len(ends)} seeds)"


def _curve(
    rows: Sequence[Row], method: str, seed: int, axis: str, quality: str = "validity"
) -> tuple[np.ndarray, np.ndarray]:
    points = sorted(
        (r["metrics"][axis], r["metrics"][quality]) for r in rows if (r["method"], r["seed"]) == (method, seed)
    )
    return np.array([x for x, _ in points]), np.array([y for _, y in points])
