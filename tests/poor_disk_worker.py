"""Runs on a poor disk, for test_poor_disk.py: a process of its own, below which poor_disk.c answers. Prints one line of JSON.

LD_PRELOAD=poor_disk.so python poor_disk_worker.py drive|writes FOLDER [STRIDE]
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from minigad import run as run_module
from minigad.checkpoint import newest, write_json
from minigad.collect import CollectSettings
from minigad.config import PRESETS, UserError
from minigad.players import load_players
from minigad.reading import read_run
from minigad.report import write_report
from minigad.run import distill
from minigad.store import Store
from minigad.teach import teach
from minigad.teacher import ScriptedTeacher
from minigad.toy.letters import letters_dataset, letters_tokenizer

torch.set_num_threads(1)
C = ctypes.CDLL(None)
TIMES = {"step_time", "tokens_per_second"}
CONFIG = PRESETS["toy"].replace(
    max_completion_length=8,
    warmup_epochs=0.25,
    warmup_batch_size=16,
    discriminator_sft_epochs=0.25,
    discriminator_warmup_steps=1,
    max_steps=2,
    per_device_train_batch_size=2,
    num_generations=2,
    ema_decay=0.5,
    save_steps=1,
    save_total_limit=1,
)
DATA = letters_dataset(80, 0)
ROWS = [{"prompt": p, "completion": c} for p, c in zip(DATA["prompt"], DATA["completion"], strict=True)]


def poor(folder: Path | str, *, drive: bool = False, at: int = -1, error: int = 0) -> None:
    C.poor_disk(str(folder).encode(), int(drive), at, error)


def play(folder: Path) -> Path:
    return distill(
        CONFIG.replace(output_dir=str(folder)), ROWS[:64], ROWS[64:], "gad", letters_tokenizer(), resume=True
    )


def outcome(folder: Path) -> list[Any]:
    run = read_run(folder)
    metrics = [{key: value for key, value in row.items() if key not in TIMES} for row in run["metrics"]]
    players = [path.read_bytes() for path in sorted(folder.glob("*/*.safetensors")) if "checkpoint" not in str(path)]
    assert len(players) == 2, players
    return [*players, json.dumps(metrics), json.dumps(run["samples"]), json.dumps(run["evaluation"])]


def killed(action: Any) -> bool:
    """Do it in a process that kills itself with SIGKILL somewhere inside; True if it did."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    try:
        action()
    finally:
        os._exit(1)


def killed_at(folder: Path, steps: int) -> bool:
    def progress(stream: Any, totals: Any) -> Any:
        for number, metrics in enumerate(stream):
            if number == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            yield metrics

    def action() -> None:
        run_module.progress = progress
        play(folder)

    return killed(action)


def collected(folder: Path, out: str, asked: list[str], kill_at: int = -1) -> int:
    """Collect the answers to ten prompts; return the number of rows that were written."""

    def answer(messages: Any, sample: int) -> str:
        if len(asked) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        asked.append(messages[-1]["content"])
        return f"you said {asked[-1]}"

    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(10)))
    with Store(folder / "store.db") as store:
        settings = CollectSettings(concurrency=1)
        return teach(ScriptedTeacher("script", answer), prompts, folder / out, store, settings, show=False).report.kept


def drive(folder: Path) -> dict[str, Any]:
    """A run and a collection on the mount, each killed and begun again, beside a run on a plain disk."""
    mount = folder / "drive"
    mount.mkdir()
    whole = outcome(play(folder / "whole"))
    poor(mount, drive=True)
    run = mount / "run"
    kills = [killed_at(run, steps) for steps in (1, 2)]
    write, run_module.write_report = run_module.write_report, write_report
    same = [outcome(play(run)) == whole]
    run_module.write_report = write
    same.append(outcome(play(run)) == whole)  # over a student/ and a discriminator/ that are there
    kills.append(killed(lambda: collected(mount, "pairs.jsonl", [], kill_at=6)))
    asked: list[str] = []
    kept = [collected(mount, name, asked) for name in ("pairs.jsonl", "pairs.parquet", "pairs", "pairs")]
    with Store(mount / "store.db") as store:
        mode, held = store.journal_mode(), store.count()
    return {
        "same": same,
        "kills": kills,
        "asked": len(asked),
        "kept": kept,
        "mode": mode,
        "held": held,
        "loaded": type(load_players(run)).__name__,
        "report": (run / "report.html").is_file(),
        "refused": {name: C.poor_disk_refused(i) for i, name in enumerate(("locks", "folder syncs", "others"))},
    }


def writes(folder: Path, stride: int) -> dict[str, Any]:
    """Let every stride-th call of a run's last step, its end and its report fail, each in a copy of the run before it."""
    begun = folder / "begun"
    assert killed_at(begun, 4)  # its last step is done, and not yet written
    whole = outcome(play(shutil.copytree(begun, folder / "whole")))
    counted = shutil.copytree(begun, folder / "counted")
    poor(counted)
    play(counted)
    calls = C.poor_disk_calls()
    wrong, said, spared = [], [], []
    for at in range(0, calls, stride):
        run = shutil.copytree(begun, folder / f"run-{at}")
        error = (28, 13, 5)[at // stride % 3]  # no space, no permission, input/output error
        poor(run, at=at, error=error)
        try:
            play(run)
            spared.append(
                at
            )  # a call that a run can do without, such as the trial of a lock, or a folder that is there
        except UserError as failure:
            said.append(str(failure))
        except BaseException as failure:
            wrong.append(f"{at}: {failure!r}")
        poor("")
        found, skipped = newest(run)
        if found is None or skipped:
            wrong.append(f"{at}: {skipped}")
        ended = at in spared
        if (ended or at % (4 * stride) == 0) and outcome(run if ended else play(run)) != whole:
            wrong.append(f"{at}: another outcome")
        shutil.rmtree(run)
    return {"calls": calls, "wrong": wrong, "said": said, "spared": spared}


if __name__ == "__main__":
    run_module.write_report = lambda folder: write_json(Path(folder) / "report.html", "page")
    mode, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(drive(folder) if mode == "drive" else writes(folder, int(sys.argv[3]))))
