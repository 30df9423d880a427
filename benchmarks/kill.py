"""Kill a run at random moments, resume it, and compare what it leaves with a run that was never stopped.

    python benchmarks/kill.py --kills 50                        # toy, about 5 minutes on a CPU
    python benchmarks/kill.py --kills 10 --student smollm2-135m

A run is a forked process that is sent SIGKILL; it is resumed and killed again until it reaches its end, then the next run
begins. "lost": a checkpoint that had been there and was not replaced by a newer one. "unreadable": a run that read_run
refuses, or a checkpoint that does not verify. Exit status 1 if anything was lost, unreadable or different.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from results import Row, counts_table, machine, read_results, write_results

from minigad.checkpoint import newest
from minigad.config import PRESETS, GADConfig
from minigad.reading import read_metrics, read_run
from minigad.run import distill
from minigad.toy.letters import letters_dataset, letters_tokenizer

TIMES = {"step_time", "tokens_per_second"}
COMMON: dict[str, Any] = {"save_steps": 3, "eval_steps": 4, "ema_decay": 0.9, "warmup_batch_size": 8, "beta": 0.01}
SMALL: dict[str, dict[str, Any]] = {
    "toy": {
        "warmup_epochs": 1.0,
        "discriminator_sft_epochs": 0.5,
        "discriminator_warmup_steps": 5,
        "max_steps": 30,
        "per_device_train_batch_size": 4,
        "max_completion_length": 12,
    },
    "smollm2-135m": {
        "warmup_epochs": 0.5,
        "discriminator_warmup_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 6,
        "lora_r": 4,
        "save_steps": 2,
    },
}


def play(config: GADConfig, rows: list[dict[str, str]]) -> None:
    tokenizer = letters_tokenizer() if config.student == "toy" else None
    distill(config, rows[:-16], rows[-16:], "gad", tokenizer, resume=True)


def start(config: GADConfig, rows: list[dict[str, str]], log: Path) -> int:
    """Fork a process that plays; return its id. Forking spares it the imports: a kill rarely hits those."""
    if child := os.fork():
        return child
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        play(config, rows)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def outcome(folder: Path) -> list[Any]:
    """All that a run leaves, times aside."""
    run = read_run(folder)
    metrics = [{key: value for key, value in row.items() if key not in TIMES} for row in run["metrics"]]
    weights = [path.read_bytes() for path in sorted((folder / "student").glob("*.safetensors"))]
    return [weights, json.dumps(metrics), json.dumps(run["samples"]), json.dumps(run["evaluation"])]


def killed(process: int, delay: float) -> bool:
    """Send SIGKILL after a delay; False if the process had ended by itself."""
    end = time.monotonic() + delay
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert status == 0, f"the run failed with status {status}: see its log"
            return False
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def check(folder: Path, before: int, count: Counter[str]) -> int:
    """Look at what a kill left; return the steps that the newest checkpoint holds."""
    metrics = folder / "metrics.jsonl"
    last = b"" if not metrics.exists() else metrics.read_bytes()[-1:]
    count["torn last line"] += last not in (b"", b"\n")
    count["half-made checkpoint"] += bool(list(folder.glob(".checkpoint-*")))
    try:
        if (folder / "config.json").exists():
            read_run(folder)
        checkpoint, skipped = newest(folder) if folder.exists() else (None, [])
    except Exception as error:
        print(f"unreadable: {error!r}")
        count["unreadable"] += 1
        return before
    count["unreadable"] += len(skipped)
    now = checkpoint.record["total"] if checkpoint else 0
    count["lost checkpoints"] += now < before
    steps = read_metrics(folder) if metrics.exists() else []
    count[f"killed in {steps[-1]['phase'] if steps else 'the beginning'}"] += 1
    return now


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--student", choices=list(SMALL), default="toy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, count = random.Random(args.seed), Counter[str]()
    config = PRESETS[args.student].replace(**(COMMON | SMALL[args.student]))
    data = letters_dataset(80, 0)
    rows = [{"prompt": p, "completion": c} for p, c in zip(data["prompt"], data["completion"], strict=True)]
    with tempfile.TemporaryDirectory() as work:
        started = time.monotonic()
        whole = Path(work) / "whole"
        assert not killed(start(config.replace(output_dir=str(whole)), rows, Path(work) / "log"), 1e9)
        duration, expected = time.monotonic() - started, outcome(whole)
        print(f"the whole run: {duration:.1f} s, {len(read_metrics(whole))} steps", flush=True)
        while count["kills"] < args.kills:
            folder, steps = Path(work) / f"run-{count['runs']}", 0
            while killed(
                start(config.replace(output_dir=str(folder)), rows, Path(work) / "log"), rng.uniform(0, 0.7 * duration)
            ):
                count["kills"] += 1
                steps = check(folder, steps, count)
            count["runs"] += 1
            count["identical runs"] += outcome(folder) == expected
            print(dict(count), flush=True)
    report(args, count)


def report(args: argparse.Namespace, count: Counter[str]) -> None:
    for name in ("lost checkpoints", "unreadable", "torn last line", "half-made checkpoint"):
        count[name] += 0
    name = "kill" if args.student == "toy" else f"kill-{args.student}"
    command = f"python benchmarks/kill.py --kills {args.kills} --student {args.student} --seed {args.seed}"
    row: Row = {"world": args.student, "seed": args.seed, "counts": dict(sorted(count.items()))}
    write_results(name, command, [row], {})
    print(f"\n{machine()}\n{counts_table(read_results(name))}")
    if count["lost checkpoints"] or count["unreadable"] or count["identical runs"] < count["runs"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
