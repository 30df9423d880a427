"""Checkpoints: all that a run needs to go on as if it had never been stopped, in safetensors and JSON, never a pickle.

checkpoint-N/ (N: the steps done, over all phases) holds the weights of every player, the optimizers, the average, the
states of the random generators, state.json, and, written last, manifest.json with every file's size and SHA-256. It is
made under another name and renamed. A folder whose files do not fit its manifest is not a checkpoint, whatever its name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from minigad.config import UserError
from minigad.discriminator import Discriminator
from minigad.precision import LossScale
from minigad.student import Student

__all__ = [
    "Checkpoint",
    "Damaged",
    "State",
    "checkpoints",
    "load",
    "newest",
    "only_os_errors",
    "prune",
    "save",
    "seal",
    "set_aside",
    "to_json",
    "verify",
    "whole_folder",
    "write_json",
    "write_synced",
    "write_whole",
]

MANIFEST, RECORD = "manifest.json", "state.json"
FIELDS = {"phase": str, "step": int, "total": int, "optimizers": list, "random": dict}  # of state.json
NAME = re.compile(r"checkpoint-(\d{1,18})")


class Damaged(Exception):
    """A checkpoint that does not verify; the message says which file and why."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read and verified: its tensors by "file/name", and state.json."""

    path: Path
    tensors: dict[str, Tensor]
    record: dict[str, Any]


class State:
    """Where a run stands. train.py's generators count their steps with it; with a checkpoint they go on from there.

    `batch` is the text or the rows of the step at hand, for whoever must find out what went wrong in it.
    """

    def __init__(
        self,
        student: Student | None = None,
        discriminator: Discriminator | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.student = student
        self.discriminator = discriminator
        self.checkpoint = checkpoint
        self.phase, self.step, self.total = "", 0, 0  # of the last step begun; total counts over all phases
        self.optimizers: tuple[torch.optim.Optimizer, ...] = ()
        self.average: Sequence[Tensor] = ()
        self.batch: Any = None

    def steps(
        self, phase: str, num_steps: int, *optimizers: torch.optim.Optimizer, average: Sequence[Tensor] = ()
    ) -> Iterator[int]:
        """Return the steps of a phase that are still to be done, counted from 0.

        Until the phase of the checkpoint there are none; on reaching it everything is put back: the weights of all
        players, the optimizers, the average and the random generators. What ran between the phases before does not matter.
        Raises UserError if the checkpoint does not fit the models.
        """
        self.optimizers, self.average, start = optimizers, average, 0
        if self.checkpoint is not None:
            if self.checkpoint.record["phase"] != phase:
                return iter(())
            _restore(self, self.checkpoint)
            self.checkpoint, start = None, self.step
        return self._count(phase, start, num_steps)

    def _count(self, phase: str, start: int, num_steps: int) -> Iterator[int]:
        for step in range(start, num_steps):
            self.phase, self.step, self.total = phase, step + 1, self.total + 1
            yield step

    def weights(self) -> dict[str, Tensor]:
        """Return what is trained, of every player, by "player/name"; the live tensors, not copies."""
        judge = self.discriminator
        players = {
            "student": self.student,
            "reference": self.student.reference if self.student else None,
            "discriminator": judge.language_model if judge else None,
        }
        named: dict[str, Tensor] = {
            f"{who}/{name}": weight
            for who, player in players.items()
            if player is not None
            for name, weight in player.parameters().items()
        }
        if judge is not None and judge.head is not None:
            named["discriminator/head"] = judge.head.weight
        return named | {f"average/{i}": tensor for i, tensor in enumerate(self.average)}

    def loss_scales(self) -> dict[str, LossScale]:
        """Return the loss scale of each player that is trained; the live objects."""
        scales = {} if self.student is None else {"student": self.student.loss_scale}
        return scales | ({"discriminator": self.discriminator.language_model.loss_scale} if self.discriminator else {})


# --- what is in a checkpoint ---


def _capture(state: State, about: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a checkpoint: one of tensors for each player, the optimizers and the generators, and state.json."""
    tensors = dict(state.weights())
    record = {
        "phase": state.phase,
        "step": state.step,
        "total": state.total,
        "optimizers": [_pack(opt.state_dict(), f"optimizer/{i}", tensors) for i, opt in enumerate(state.optimizers)],
        "loss_scales": {who: scale.state_dict() for who, scale in state.loss_scales().items()},
        "random": _pack(_random_states(), "random", tensors),
        **about,
    }
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        file, _, inside = name.partition("/")
        # A clone: safetensors refuses tensors that share memory, as the tables of 8-bit optimizers do.
        files.setdefault(file, {})[inside] = tensor.detach().cpu().clone().contiguous()
    written = {f"{file}.safetensors": safetensors.torch.save(inside) for file, inside in files.items()}
    return written | {RECORD: to_json(record)}


def _restore(state: State, checkpoint: Checkpoint) -> None:
    mine, theirs, record = state.weights(), checkpoint.tensors, checkpoint.record
    saved = {name for name in theirs if not name.startswith(("optimizer/", "random/"))}
    wrong = saved ^ mine.keys() or {name for name in saved if theirs[name].shape != mine[name].shape}
    if wrong or len(record["optimizers"]) != len(state.optimizers):
        raise UserError(
            f"{checkpoint.path} was not made by these models ({len(wrong)} tensors differ, such as "
            f"{min(wrong, default='an optimizer')!r}); resume with the model and minigad that began the run, or start anew"
        )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
    try:
        for optimizer, packed in zip(state.optimizers, record["optimizers"], strict=True):
            optimizer.load_state_dict(_unpack(packed, theirs))
        _set_random_states(_unpack(record["random"], theirs))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:  # whole, but of another library's making
        raise UserError(
            f"{checkpoint.path} holds an optimizer or a random generator that these libraries do not read ({error!r}); resume "
            "with the versions that its state.json names, or start anew"
        ) from error
    for who, scale in state.loss_scales().items():
        scale.load_state_dict(record.get("loss_scales", {}).get(who, {}))
    state.phase, state.step, state.total = record["phase"], record["step"], record["total"]


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn nested state into JSON, moving its tensors into `tensors`. A dictionary becomes pairs: its keys may be numbers."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"pairs": [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    assert value is None or isinstance(value, (bool, int, float, str)), (name, type(value))
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _unpack(item, tensors) for key, item in value["pairs"]}
    return [_unpack(item, tensors) for item in value] if isinstance(value, list) else value


def _random_states() -> dict[str, Any]:
    """The loop's own draws depend on (seed, phase, step) alone; dropout inside a model does not."""
    name, keys, *rest = cast(Any, np.random.get_state())  # noqa: NPY002  libraries draw from the global one
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy_state = [name, keys.tolist(), *rest]
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_states(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


# --- on the disk ---


def save(folder: Path, state: State, about: dict[str, Any]) -> Path:
    """Write checkpoint-N into `folder` and return its path. Raises OSError; what was there before is then as it was."""
    target = folder / f"checkpoint-{state.total}"
    work = folder / f".{target.name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        files = _capture(state, about)
        for name, data in files.items():
            write_synced(work / name, data)
        write_synced(work / MANIFEST, to_json({name: _entry(data) for name, data in files.items()}))
        _sync_folder(work)
        work.rename(target)
    except OSError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _sync_folder(folder)
    return target


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and what a killed process left half-made."""
    for path in [*folder.glob(".checkpoint-*.tmp"), *checkpoints(folder)[keep:]]:
        # Out of sight first: a deletion that is cut short must not look like a damaged checkpoint.
        hidden = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.tmp"))
        shutil.rmtree(hidden, ignore_errors=True)


def newest(folder: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """Return the newest checkpoint that verifies, and those that were passed over on the way, with the reason."""
    skipped: list[tuple[Path, str]] = []
    for path in checkpoints(folder):
        try:
            return load(path), skipped
        except Damaged as error:
            skipped.append((path, str(error)))
    return None, skipped


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. Raises Damaged. Every byte that is used has been hashed: nothing is read twice."""
    tensors: dict[str, Tensor] = {}
    record: dict[str, Any] = {}
    for name, entry in _manifest(path).items():
        data = _read(path / name)
        if entry != _entry(data):
            raise Damaged(f"{name} is not what was written: it has {len(data)} bytes or another SHA-256")
        try:
            if name.endswith(".safetensors"):
                tensors |= {f"{name[:-12]}/{inside}": tensor for inside, tensor in safetensors.torch.load(data).items()}
            elif name == RECORD:
                record = json.loads(data)
        except (safetensors.SafetensorError, ValueError, RecursionError) as error:  # though the hash is right
            raise Damaged(f"{name} cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise Damaged(f"{RECORD} is no object")
    if lacking := [key for key in FIELDS if not isinstance(record.get(key), FIELDS[key])]:
        raise Damaged(f"{RECORD} is not there or lacks {', '.join(lacking)}")
    return Checkpoint(path, tensors, record)


def seal(folder: Path) -> None:
    """Write the manifest of a folder's weights, so that `verify` knows them. The other files may be edited."""
    entries = {path.name: _entry(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))}
    write_synced(folder / MANIFEST, to_json(entries))


def verify(folder: Path) -> None:
    """Raise Damaged if weights are not those that were sealed. A folder without a seal, of another's making, passes."""
    for name, entry in _manifest(folder).items() if (folder / MANIFEST).exists() else ():
        if _entry(_read(folder / name)) != entry:
            raise Damaged(f"{name} is not what was written")


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is neither loaded nor counted; return its new path."""
    aside = path.with_name(f"damaged-{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return path.rename(aside)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name and rename it: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON, the whole file or nothing."""
    write_whole(path, to_json(value))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that takes the place of `folder` at the end, and of nothing if an error comes first."""
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with only_os_errors():
            yield work
            seal(work)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def only_os_errors() -> Iterator[None]:
    """Raise as an OSError what libraries raise where a write fails: safetensors its own error, tokenizers a bare Exception."""
    try:
        yield
    except Exception as error:
        if type(error) is Exception or isinstance(error, safetensors.SafetensorError):
            raise OSError(str(error)) from error
        raise


def to_json(value: Any, indent: int | None = 1) -> bytes:
    r"""Return JSON as UTF-8. Half of a surrogate pair, which UTF-8 cannot hold, becomes the escape \ud800 that JSON has."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, newest first; none of them is verified."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read(path / MANIFEST))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is not JSON ({error})") from error
    if not isinstance(manifest, dict) or not manifest:
        raise Damaged(f"{MANIFEST} is not a list of files")
    for name in manifest:  # never a path that leads out of the folder
        if name != Path(name).name:
            raise Damaged(f"{MANIFEST} names {name!r}, which is not the name of a file")
    return manifest


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            raise Damaged(f"{path.name} is not a file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise Damaged(f"{path.name} cannot be read ({getattr(error, 'strerror', error)})") from error


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sync_folder(folder: Path) -> None:
    """Let the disk have the names too. Where folders cannot be opened or synced (Windows, Drive) there is no such promise."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
