"""Writing pairs: JSONL, Parquet or a folder of `datasets`, by the ending of the name, all or nothing, piece by piece."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minigad.config import UserError
from minigad.data import as_messages, write_jsonl
from minigad.locking import can_lock
from minigad.sources import jsonl_rows

__all__ = ["check_out", "write_pairs"]


def write_pairs(out: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSONL, Parquet or a folder of `datasets`, by the ending of `out`, all or nothing; return how many.

    In Parquet and in a folder a column has one type: strings and conversations together become conversations.
    """
    path, count = Path(out), _Counted(rows)
    if path.suffix == ".jsonl":
        write_jsonl(path, count)
        return count.number
    spool = path.with_name(f".{path.name}.{os.getpid()}.jsonl")
    try:
        write_jsonl(spool, count)
        _convert(spool, path)
    finally:
        spool.unlink(missing_ok=True)
    return count.number


class _Counted:
    """An iterable that knows how many it gave."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows, self.number = rows, 0

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            self.number += 1
            yield row


def check_out(out: str | os.PathLike[str]) -> None:
    """Raise UserError if `out` cannot be written: found before anything is paid, not after."""
    path = Path(out)
    if path.suffix not in (".jsonl", ".parquet", ""):
        raise UserError(f"--out {path}: cannot write the file ending {path.suffix!r}; use .jsonl, .parquet or a folder")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {str(path.parent)!r}; make it first")
    if path.suffix and path.is_dir():
        raise UserError(f"--out {path}: this is a folder; name a file, or a folder without an ending")
    if not path.suffix and path.exists() and not (path / "dataset_info.json").is_file():
        raise UserError(f"--out {path}: this exists and is no folder of datasets; name another")


def _convert(spool: Path, out: Path) -> None:
    """Turn a JSONL file of pairs into Parquet or a folder, in pieces."""
    import pyarrow
    import pyarrow.parquet

    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    conversations = any(isinstance(row["prompt"], list) for _, row in jsonl_rows(spool))
    prompt = pyarrow.list_(message) if conversations else pyarrow.string()
    schema = pyarrow.schema([("prompt", prompt), ("completion", pyarrow.string())])
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder) / "pairs.parquet"
        rows = (row for _, row in jsonl_rows(spool))
        with pyarrow.parquet.ParquetWriter(made, schema) as writer:
            while piece := list(itertools.islice(rows, 10_000)):
                plain = [row | {"prompt": as_messages(row["prompt"])} for row in piece] if conversations else piece
                writer.write_table(pyarrow.Table.from_pylist(plain, schema=schema))
        if out.suffix == ".parquet":
            os.replace(made, out)
        else:
            _save_folder(made, out, Path(folder))


def _save_folder(parquet: Path, out: Path, work: Path) -> None:
    import pyarrow.parquet
    from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not pyarrow.parquet.read_metadata(parquet).num_rows:
        raise UserError(f"{out}: no row is left to write, and a folder of datasets cannot be empty; name a .jsonl file")
    were_shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        # datasets locks its cache, which a network drive may not be able to
        with tempfile.TemporaryDirectory(dir=work if can_lock(work) else None) as cache:
            Dataset.from_parquet(str(parquet), cache_dir=cache).save_to_disk(str(work / "new"))
    finally:
        if were_shown:
            enable_progress_bars()
    if out.exists():
        os.replace(out, work / "old")
    os.replace(work / "new", out)
