"""The one-dimensional world: does the game find what exact reverse-KL descent finds, and what breaks it?

    python benchmarks/toy_1d.py

Twenty seeds, a row a method and seed, about six minutes on one thread. Targets: gad-sequence within 0.02 nats of the
oracle's KL(G || T) for every seed, and frozen-sequence collapsed to a point. Nothing was tuned on these seeds: the
settings are the defaults of minigad.toy.one_dimension, tried on seeds 100 to 102. cpu_seconds includes the SeqKD start.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from results import Row, row, select, table, write_results
from torch import Tensor

from minigad.toy.one_dimension import oracle, play, seqkd, student_metrics

STEPS = 2500
METRICS = ["kl_student_teacher", "kl_teacher_student", "sigma", "mu", "mass_on_modes"]
TARGET = 0.02  # nats between the game and the oracle
COLLAPSED = 1.0  # a student narrower than this holds one or two categories; the narrower mode's deviation is 2

# method -> what it changes of the game's defaults (student rate .01 falling to 10%, discriminator rate .1)
GAMES: dict[str, dict[str, Any]] = {
    "gad-sequence": {},
    "frozen-sequence": {"frozen": True},
    "gad-sequence-scaled": {"scale_rewards": "group"},
    "gad-sequence-no-warmup": {"warmup_steps": 0},
    "gad-sequence-constant-rate": {"final_fraction": 1.0},
    "gad-sequence-slow-discriminator": {"final_fraction": 1.0, "discriminator_rate": 0.02},
    "gad-sequence-slow-discriminator-scaled": {
        "final_fraction": 1.0,
        "discriminator_rate": 0.02,
        "scale_rewards": "group",
    },
    "gad-sequence-fast-student": {"final_fraction": 1.0, "discriminator_rate": 0.02, "student_rate": 0.03},
}


def run_seed(seed: int) -> list[Row]:
    """Run every method with one seed, all from the same SeqKD student."""
    start, start_seconds = _timed(lambda: seqkd(seed, STEPS))
    rows = [_row("seqkd", seed, student_metrics(start), start_seconds)]
    best, seconds = _timed(lambda: oracle(start, STEPS))
    rows.append(_row("oracle", seed, student_metrics(best), start_seconds + seconds))
    for method, changes in GAMES.items():
        metrics, seconds = _timed(lambda changes=changes: _last(seed, start, changes))
        rows.append(_row(method, seed, metrics, start_seconds + seconds))
    return rows


def _last(seed: int, start: Tensor, changes: dict[str, Any]) -> dict[str, Any]:
    """Play to the end and return the metrics of the last step."""
    for metrics in play(STEPS, seed, start=start, **changes):
        last = metrics
    return last


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def _row(method: str, seed: int, metrics: dict[str, Any], seconds: float) -> Row:
    return row("toy-1d", method, seed, {name: metrics[name] for name in METRICS}, seconds)


def verdict(rows: list[Row]) -> str:
    """Say, a line a method, the largest distance to the oracle of the same seed and how many seeds collapsed."""
    exact = {r["seed"]: r["metrics"]["kl_student_teacher"] for r in select(rows, "oracle")}
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        chosen = select(rows, method)
        gap = max(abs(r["metrics"]["kl_student_teacher"] - exact[r["seed"]]) for r in chosen)
        collapsed = sum(r["metrics"]["sigma"] < COLLAPSED for r in chosen)
        reached = "within" if gap <= TARGET else "not within"
        distance = f"at most {gap:.4f} nats from the oracle ({reached} {TARGET})"
        lines.append(f"{method}: {distance}; {collapsed} of {len(chosen)} collapsed")
    return "\n".join(lines)


def main() -> None:
    """Run the seeds that were asked for, write benchmarks/results/toy_1d.json, and print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20)))
    parser.add_argument("--name", default="toy_1d", help="of the results file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for seed in args.seeds:
        rows += run_seed(seed)
        print(f"seed {seed} done", flush=True)
    command = f"python benchmarks/toy_1d.py --seeds {' '.join(map(str, args.seeds))}"
    write_results(args.name, command, rows, {"steps": STEPS, "games": GAMES})
    print(table(rows, [*METRICS, "cpu_seconds"]))
    print(verdict(rows))


if __name__ == "__main__":
    main()
