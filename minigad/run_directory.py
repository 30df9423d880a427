"""A run directory that can be read without this library: config.json, metrics.jsonl, samples.jsonl, student/, discriminator/, report.html.

Here it is written, kept from a second process, and held against the settings that it was begun with. `minigad.reading` reads it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import minigad
from minigad.audit import Finding
from minigad.chat import prompt_text
from minigad.checkpoint import State, newest, prune, save, set_aside, to_json, write_json
from minigad.config import GADConfig, UserError, say
from minigad.discriminator import Discriminator
from minigad.locking import held
from minigad.metrics import Metrics
from minigad.reading import check_links, read_json
from minigad.seen import TESTED_ON, TRAINED_ON, add_seen
from minigad.student import Student

__all__ = ["RunDirectory", "check_output_dir", "lock"]

LOGS = ("metrics.jsonl", "samples.jsonl")
PARTS = (*LOGS, TRAINED_ON, TESTED_ON, "student", "discriminator", "evaluation.json", "audit.json", "report.html")


class RunDirectory:
    """Where a run writes. Metrics and samples are appended line by line, everything else is written whole or not at all.

    Every failure to write is a UserError that says what is safe and what to do.
    """

    def __init__(self, folder: str | Path, config: GADConfig, details: dict[str, Any], *, resume: bool = False) -> None:
        """Make the folder; UserError if it cannot be written, or holds a run that is not to be resumed, or anything of a run's names."""
        self.folder = Path(folder)
        self.about = {"minigad": minigad.__version__, **details, "config": dataclasses.asdict(config)}
        self.saved: Path | None = None  # the newest good checkpoint
        before = check_output_dir(folder, resume=resume)
        if before is not None:
            _check_same_run(before, self.about, self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir {str(folder)!r} cannot be made ({error.strerror}); give another --output-dir"
            ) from error
        with self.writing("config.json"):
            write_json(self.folder / "config.json", self.about)

    def record(self, stream: Iterable[Metrics], logging_steps: int = 1) -> Iterator[Metrics]:
        """Pass metrics through, appending every `logging_steps`-th to metrics.jsonl and its samples to samples.jsonl."""
        for metrics in stream:
            if metrics["step"] % logging_steps == 0 or metrics["step"] == 1:
                about = {key: metrics[key] for key in ("phase", "step")}
                samples = [
                    {**about, **sample, "prompt": prompt_text(sample["prompt"])}
                    for sample in metrics.get("samples", ())
                ]
                self._append("metrics.jsonl", [{key: value for key, value in metrics.items() if key != "samples"}])
                self._append("samples.jsonl", samples)
            yield metrics

    def resume(self, student: Student | None, discriminator: Discriminator | None) -> State:
        """Return the state to go on from: that of the newest checkpoint that verifies, or of a run that begins.

        Damaged checkpoints are named, with the reason, and set aside. metrics.jsonl and samples.jsonl are cut back to
        what they held at that checkpoint: the steps that come after it are done, and written, again.
        """
        with self.writing("checkpoints"):
            checkpoint, skipped = newest(self.folder)
            for path, why in skipped:
                say(f"{path} is damaged and was skipped: {why}; it is kept as {set_aside(path).name}")
            for name in LOGS:
                _cut(self.folder / name, checkpoint.record["logs"][name] if checkpoint else 0)
        if checkpoint is not None:
            self.saved = checkpoint.path
            say(f"going on from {checkpoint.path}, step {checkpoint.record['step']} of {checkpoint.record['phase']}")
            _compare_versions(checkpoint.record["versions"])
        return State(student, discriminator, checkpoint)

    def save(self, state: State, keep: int) -> None:
        """Write a checkpoint, then delete all but the `keep` newest."""
        with self.writing("checkpoint"):
            logs = {name: _synced_size(self.folder / name) for name in LOGS}
            self.saved = save(self.folder, state, {"logs": logs, "versions": versions(), **self.about})
            prune(self.folder, keep)

    def write_trained_on(self, prompts: Iterable[Any]) -> None:
        """Write trained_on.txt: short hashes of the training prompts, by which `evaluate` and `choose` know them again."""
        with self.writing(TRAINED_ON):
            add_seen(self.folder / TRAINED_ON, prompts)

    def write_evaluation(self, numbers: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Write evaluation.json: what was measured on held-out prompts, and the texts it was measured on."""
        with self.writing("evaluation.json"):
            write_json(self.folder / "evaluation.json", {"metrics": numbers, "samples": samples})

    def write_audit(self, findings: list[Finding]) -> None:
        """Write audit.json: what the discriminator of the last step judges by."""
        rows = [{**finding._asdict(), "ok": finding.ok} for finding in findings]
        with self.writing("audit.json"):
            write_json(self.folder / "audit.json", {"findings": rows})

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with self.writing(name), (self.folder / name).open("ab") as file:
            file.write(b"".join(to_json(row, indent=None) + b"\n" for row in rows))

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn a failure to write into a UserError that says what is safe and what to do."""
        try:
            yield
        except OSError as error:
            safe = "no checkpoint was written yet"
            if self.saved:
                safe = f"{self.saved.name} is {'safe' if self.saved.is_dir() else 'gone'}"
            raise UserError(
                f"{what} could not be written in {str(self.folder)!r} ({error.strerror or error}); {safe}: make room "
                "or mend the permissions, then run the same command with --resume"
            ) from error


def check_output_dir(folder: str | Path, *, resume: bool) -> dict[str, Any] | None:
    """Return what the folder says of the run that was begun in it, None if none was.

    Raises UserError if there is one and it is not to be resumed, or anything of a run's names. Cheap: to be asked before models load.
    """
    before = _begun(Path(folder))
    if before is None:
        _check_nothing_is_lost(Path(folder))
    elif not resume:
        raise UserError(
            f"output_dir {str(folder)!r} already holds a run; go on with it by --resume, "
            "give another --output-dir, or move that one away"
        )
    return before


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keep a second process out of a run's folder. Where the file system has no locks, say so and go on."""
    from filelock import Timeout

    if not str(folder):
        raise UserError("output_dir is '', which would be the folder you are in; give a name, or '.' if that is meant")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        check_links(Path(folder))
        lock = held(Path(folder) / ".lock")
    except Timeout as error:
        raise UserError(
            f"output_dir {str(folder)!r} is in use by another process; wait for it or give another --output-dir"
        ) from error
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a ValueError for NUL in the name
        raise UserError(
            f"output_dir {str(folder)!r} cannot be written ({getattr(error, 'strerror', error)}); give another --output-dir"
        ) from error
    with lock:
        yield


# What may differ when a run goes on: where and how often it writes, and how it splits its work.
FREE = {
    "output_dir",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "on_alarm",
    "token_budget",
    "gradient_checkpointing",
    "vllm_gpu_memory_utilization",
}


def _check_same_run(before: Any, now: dict[str, Any], folder: Path) -> None:
    """Name the settings that changed since a run began; UserError for those that its past depends on."""
    if not isinstance(before, dict) or not isinstance(before.get("config"), dict):
        raise UserError(f"{folder / 'config.json'} holds no configuration of a run; give another --output-dir")
    defaults, config = dataclasses.asdict(GADConfig()), json.loads(to_json(now["config"]))
    if unknown := sorted(before["config"].keys() - config.keys()):
        raise UserError(
            f"the run in {str(folder)!r} was begun by minigad {before.get('minigad')}, whose settings {', '.join(unknown)} this one "
            f"({minigad.__version__}) does not have; resume it with that version, or give another --output-dir"
        )
    old = {name: before["config"].get(name, default) for name, default in json.loads(to_json(defaults)).items()}
    changed = {name: (old[name], config[name]) for name in config if old[name] != config[name]}
    changed |= {
        name: (before.get(name), now.get(name))
        for name in ("method", "models", "data", "heldout_data", "processes")
        if name in before and before[name] != now.get(name)
    }
    # More steps at a constant rate leave the past as it was.
    free = FREE | (
        {"max_steps"} if config["lr_final_fraction"] == 1 and config["max_steps"] > old["max_steps"] else set()
    )
    words = {name: f"{name} ({a!r} then, {b!r} now)" for name, (a, b) in changed.items()}
    if refused := [words[name] for name in changed if name not in free]:
        raise UserError(
            f"the run in {str(folder)!r} was made with other settings: {', '.join(refused)}; "
            "put them back to resume it, or give another --output-dir"
        )
    if changed:
        say(f"changed since the run began: {', '.join(words.values())}")


def _begun(folder: Path) -> Any:
    """Return what a folder's run was begun with: config.json or, if that is lost, the newest checkpoint's copy; None without a run."""
    if (folder / "config.json").exists():
        return read_json(folder / "config.json")
    checkpoint = newest(folder)[0] if folder.is_dir() else None
    return checkpoint.record if checkpoint else None


def _check_nothing_is_lost(folder: Path) -> None:
    """Without a run in it, what a folder has of a run's names is somebody else's, or all that is left of one."""
    if there := [name for name in PARTS if (folder / name).exists()]:
        raise UserError(
            f"output_dir {str(folder)!r} holds no run but {', '.join(there)}, which a run would write over; give another "
            "--output-dir, or move them away"
        )


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    packages = ("torch", "transformers", "peft", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _compare_versions(before: dict[str, str]) -> None:
    changed = [
        f"{name} {old} then, {versions().get(name)} now" for name, old in before.items() if versions().get(name) != old
    ]
    if changed:
        say(f"the run goes on, but maybe not to the last bit: {'; '.join(changed)}")


def _cut(path: Path, size: int) -> None:
    """Cut a log back to `size` bytes; if it is shorter already, to its last whole line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        kept = file.read(size)
        if len(kept) < size:
            say(f"{path} has lost {size - len(kept)} bytes that it had at the checkpoint; the rest is kept")
        file.truncate(kept.rfind(b"\n") + 1)


def _synced_size(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size
