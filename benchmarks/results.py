"""Results files: every published number is a row of benchmarks/results/NAME.json, and tables are made from those."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from minigad.checkpoint import write_json

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]


def _commit() -> str:
    """Read it from git, or from MINIGAD_COMMIT on a machine that has the files but not the history."""
    if os.environ.get("MINIGAD_COMMIT"):
        return os.environ["MINIGAD_COMMIT"]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=FOLDER.parent
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "../minigad") else "")


COMMIT = _commit()  # read at the start: a long run must not be stamped with what was committed while it ran


def row(world: str, method: str, seed: int, metrics: dict[str, Any], cpu_seconds: float) -> Row:
    """Make one row: what a method reached with a seed, and the processor time of everything it needed."""
    return {"world": world, "method": method, "seed": seed, "metrics": metrics, "cpu_seconds": round(cpu_seconds, 2)}


def write_results(
    name: str, command: str, rows: Sequence[Row], settings: dict[str, Any], folder: Path | None = None
) -> None:
    """Write benchmarks/results/NAME.json: command, commit, machine, settings, and the rows they made, by seed."""
    folder = folder or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda r: r["seed"])  # stable: methods stay in the order they ran in
    record = {"command": command, "commit": COMMIT, "machine": machine(), "settings": settings, "rows": ordered}
    write_json(folder / f"{name}.json", record)


def read_results(name: str) -> dict[str, Any]:
    """Read a results file."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def run_timed(steps: Iterable[Any]) -> float:
    """Run a generator to its end and return its processor time, seconds."""
    started = time.process_time()
    for _ in steps:
        pass
    return time.process_time() - started


def machine() -> str:
    """Describe what the numbers were made on."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{names[0]}, {len(names)} cores, Python {platform.python_version()}, torch {torch.__version__}"


def mean_std(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """Return mean and standard deviation over seeds of a metric or of cpu_seconds (deviation 0 for one seed)."""
    values = [r["cpu_seconds"] if metric == "cpu_seconds" else r["metrics"][metric] for r in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def select(rows: Sequence[Row], method: str, temperature: float | None = None) -> list[Row]:
    """Return the rows of a method, at a sampling temperature if one is named."""
    return [r for r in rows if r["method"] == method and temperature in (None, r["metrics"].get("temperature"))]


def table(rows: Sequence[Row], metrics: Sequence[str], temperature: float | None = None) -> str:
    """Return a Markdown table, a line a method in order of appearance: mean ± standard deviation over seeds."""
    lines = ["| method | seeds | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 2) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        if chosen := select(rows, method, temperature):
            cells = " | ".join(_cell(chosen, metric) for metric in metrics)
            lines.append(f"| {method} | {len(chosen)} | {cells} |")
    return "\n".join(lines)


def counts_table(record: dict[str, Any]) -> str:
    """Return a Markdown table of the counts in a record's only row."""
    (only,) = record["rows"]
    return "\n".join(
        ["| what | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in only["counts"].items())]
    )


def _cell(rows: Sequence[Row], metric: str) -> str:
    if any(metric != "cpu_seconds" and metric not in r["metrics"] for r in rows):
        return "-"
    mean, deviation = mean_std(rows, metric)
    digits = 0 if metric == "cpu_seconds" else 3 if abs(mean) < 1 else 2
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if len(rows) > 1 else f"{mean:.{digits}f}"


def gather(name: str, parts: Sequence[str]) -> None:
    """Join the parts of a run that went to several processes into one file, and delete them."""
    records = [read_results(part) for part in parts]
    machines, commits = ({record[key] for record in records} for key in ("machine", "commit"))
    assert len(machines) == 1, machines
    rows = sorted((r for record in records for r in record["rows"]), key=lambda r: r["seed"])
    heads = list(dict.fromkeys(record["command"].partition(" --seeds")[0] for record in records))
    seeds = " ".join(str(seed) for seed in sorted({r["seed"] for r in rows}))
    command = " && ".join(f"{head} --seeds {seeds}" for head in heads)
    joined = {"command": command, "commit": " and ".join(sorted(commits)), "rows": rows}
    write_json(FOLDER / f"{name}.json", records[0] | joined)
    for part in parts:
        (FOLDER / f"{part}.json").unlink()


if __name__ == "__main__":  # python benchmarks/results.py toy_letters toy_letters_part0 toy_letters_part1
    gather(sys.argv[1], sys.argv[2:])
