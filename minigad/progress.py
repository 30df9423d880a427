"""Where a run stands, while it runs: a bar or a line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from minigad.metrics import Metrics

__all__ = ["progress"]


def progress(stream: Iterable[Metrics], totals: dict[str, int]) -> Iterator[Metrics]:
    """Show where a run stands: a bar a phase on a terminal, a plain line every few seconds elsewhere.

    `totals` is the number of steps of each phase. Shows loss or reward, D accuracy, tokens/s and the time left.
    """
    from tqdm import tqdm

    terminal, bar, phase, said = sys.stderr.isatty(), None, "", 0.0
    try:
        for metrics in stream:
            if metrics["phase"] != phase:
                phase, started, first = metrics["phase"], time.monotonic(), metrics["step"]
                if bar is not None:
                    bar.close()
                bar = tqdm(
                    total=totals.get(phase),
                    desc=phase,
                    unit="step",
                    file=sys.stderr,
                    disable=not terminal,
                    initial=first - 1,
                )
            assert bar is not None
            bar.set_postfix_str(_headline(metrics), refresh=False)
            bar.update()
            last = metrics["step"] == totals.get(phase)
            if not terminal and (last or time.monotonic() - said > 10):
                said = time.monotonic()
                left = (totals.get(phase, 0) - metrics["step"]) * (said - started) / max(metrics["step"] - first + 1, 1)
                print(
                    f"{phase} {metrics['step']}/{totals.get(phase, '?')}  {_headline(metrics)}  {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )
            yield metrics
    finally:
        if bar is not None:
            bar.close()


def _headline(metrics: Metrics) -> str:
    shown = [
        ("reward", "reward", ".2f"),
        ("discriminator/accuracy", "D acc", ".2f"),
        ("tokens_per_second", "tok/s", ".0f"),
    ]
    if "reward" not in metrics:
        shown[0] = ("loss", "loss", ".3f")
    return "  ".join(f"{label} {metrics[key]:{form}}" for key, label, form in shown if key in metrics)
