"""A 4-bit base in plain weights, for an engine that reads no 4 bits: written once for a run, and gone when that ends.

It holds the values that the 4 bits stand for, not the weights that were rounded to them: engine and trainer have one base.
"""

from __future__ import annotations

import copy
import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minigad import parallel
from minigad.checkpoint import only_os_errors
from minigad.config import UserError, say
from minigad.locking import held
from minigad.model import LanguageModel, plain_weight

__all__ = ["plain_base"]

NAME = ".vllm-base"
SHARD = 1 << 30  # bytes of plain weights that exist at one time, beyond one matrix


@contextmanager
def plain_base(student: LanguageModel, output_dir: str | Path) -> Iterator[Path]:
    """Give a folder in `output_dir` with the student's base in its compute dtype, without adapters; delete it at the end.

    At the end: also of an exception and Ctrl-C. What a killed process left there is deleted first. Process 0 writes, the
    others wait for it. Raises UserError if the disk is too small, or another process holds a copy there.
    """
    folder = Path(output_dir) / NAME
    if parallel.world().rank > 0:
        parallel.wait()
        yield folder
        return
    with _alone(folder):
        try:
            _write_or_say(student, folder)
            del student  # or this frame, which waits for the end, would keep the model of a sampler that nobody closes
            parallel.wait()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second process from deleting what this one's engine may read again; UserError if it is that second one."""
    from filelock import Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = held(folder.with_name(f"{NAME}.lock"))
    except Timeout as error:
        raise UserError(
            f"output_dir {str(folder.parent)!r} is in use by another process; wait for it or give another --output-dir"
        ) from error
    except OSError as error:
        raise UserError(
            f"output_dir {str(folder.parent)!r} cannot be written ({error.strerror}); give another --output-dir"
        ) from error
    with lock:
        yield


def _write_or_say(student: LanguageModel, folder: Path) -> None:
    size = sum(_size(parameter) for _, parameter in _own(_base(student)))
    say(f"this vLLM reads no 4 bits: its base is written to {folder}, dequantised, {size / 1e9:.2f} GB until the end")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        free = shutil.disk_usage(folder).free
        if free < size:
            raise OSError(errno.ENOSPC, f"only {free / 1e9:.2f} GB are free")
        with only_os_errors():
            _write(student, folder)
    except OSError as error:
        raise UserError(
            f"the dequantised base for the vLLM engine, {size / 1e9:.2f} GB, could not be written to {str(folder)!r} "
            f"({error.strerror or error}); make room, give an --output-dir on a larger disk, or sample with --sampler transformers"
        ) from error


def _write(student: LanguageModel, folder: Path) -> None:
    """Write a transformers folder: shards and their index, a configuration that calls nothing quantised, the tokenizer."""
    from safetensors.torch import save_file

    files: dict[str, str] = {}
    for i, shard in enumerate(_shards(_base(student))):
        name = f"model-{i + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = copy.deepcopy(student.config)
    del config.quantization_config
    config.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)


def _shards(base: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield the plain weights by the names that they have without peft, at most SHARD bytes at a time (or one matrix)."""
    shard: dict[str, Tensor] = {}
    held_bytes = 0
    for name, parameter in _own(base):
        if shard and held_bytes + _size(parameter) > SHARD:
            yield shard
            shard, held_bytes = {}, 0
        shard[name.replace(".base_layer.", ".")] = _plain(base, name, parameter).cpu().contiguous()
        held_bytes += _size(parameter)
    yield shard


def _plain(base: nn.Module, name: str, parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "quant_state"):
        return parameter.detach()
    return plain_weight(base.get_submodule(name.rpartition(".")[0]))


def _own(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's parameters by name; tied ones once, those of adapters not."""
    return ((name, parameter) for name, parameter in base.named_parameters() if ".lora_" not in name)


def _size(parameter: Any) -> int:
    """Return the bytes of a parameter in plain weights."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.nbytes if state is None else state.shape.numel() * state.dtype.itemsize)


def _base(student: LanguageModel) -> Any:
    return student.model.get_base_model() if student.adapter else student.model
