"""Pairs of a prompt and a teacher completion: reading and checking them, splitting by prompt, and the order of batches.

Everything wrong with the data is said here, before a model is loaded, with the file, line, field and value.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigad.chat import Prompt
from minigad.config import UserError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "DataReport",
    "batch_indices",
    "check_disjoint",
    "group_by_prompt",
    "limit_prompts",
    "load_pairs",
    "prompt_key",
    "read_jsonl",
    "split_by_prompt",
    "write_jsonl",
]

ROLES = ("system", "user", "assistant")
# The fields of a row, tried in this order. The last form is that of the paper's authors.
FORMS = (("prompt", "completion"), ("messages",), ("content", "teacher_response"))
FORMS_IN_WORDS = "'prompt' and 'completion', or 'messages', or 'content' and 'teacher_response'"

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlist = _REPR.maxdict = 3


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of one source; `lines()` says it in sentences."""

    source: str
    rows_read: int
    rows_kept: int
    duplicates_dropped: int
    prompts: int  # distinct ones
    prompts_with_several: int  # prompts that have more than one teacher completion
    extra_columns: dict[str, int]  # ignored column -> rows that had a value in it
    overlong_dropped: int = 0  # rows; the caller fills these two in from `limit_prompts`
    overlong_truncated: int = 0

    def lines(self) -> list[str]:
        """Return the report as sentences; what did not happen is left out."""
        extra = ", ".join(f"{name!r} ({count} rows)" for name, count in sorted(self.extra_columns.items()))
        sentences = [
            (True, f"Read {self.rows_read} rows from {self.source}."),
            (True, f"Kept {self.rows_kept} rows with {self.prompts} different prompts."),
            (self.prompts_with_several, f"{self.prompts_with_several} prompts have several teacher completions."),
            (self.duplicates_dropped, f"Dropped {self.duplicates_dropped} rows that repeat an earlier row exactly."),
            (extra, f"Ignored {len(self.extra_columns)} columns: {extra}."),
            (self.overlong_dropped, f"Dropped {self.overlong_dropped} rows whose prompt is too long."),
            (self.overlong_truncated, f"Will cut the start of {self.overlong_truncated} prompts that are too long."),
        ]
        return [text for happened, text in sentences if happened]


def load_pairs(source: str | os.PathLike[str] | Dataset | list[dict[str, Any]]) -> tuple[Dataset, DataReport]:
    """Read prompts and teacher completions, check every row, and return them as a Dataset with a report.

    The columns are `prompt` and `completion`. Completions are strings. Prompts are strings too, unless one of them is a
    conversation; then all become conversations, a string being one user message. Text is kept to the byte. Several
    completions of one prompt are several rows; a row that repeats an earlier one exactly is dropped and counted.

    Reads .jsonl, .json (one list), a Dataset or a list. Raises UserError for the first row that is not usable.
    """
    from datasets import Dataset

    pairs: dict[tuple[str, str], tuple[Prompt, str]] = {}
    extra: Counter[str] = Counter()
    rows_read = 0
    conversations = False
    for where, row in _rows(source):
        form = _form(where, row)
        prompt, completion = _pair(where, row, form)
        pairs.setdefault((prompt_key(prompt), completion), (prompt, completion))
        extra.update(_extra_columns(row, form))
        conversations |= isinstance(prompt, list)
        rows_read += 1
    if not pairs:
        raise UserError(f"{_name(source)}: there are no rows in it; give at least one row with {FORMS_IN_WORDS}")
    per_prompt = Counter(key for key, _ in pairs)
    report = DataReport(
        source=_name(source),
        rows_read=rows_read,
        rows_kept=len(pairs),
        duplicates_dropped=rows_read - len(pairs),
        prompts=len(per_prompt),
        prompts_with_several=sum(count > 1 for count in per_prompt.values()),
        extra_columns=dict(extra),
    )
    rows = [
        {"prompt": _as_messages(prompt) if conversations else prompt, "completion": completion}
        for prompt, completion in pairs.values()
    ]
    return Dataset.from_list(rows), report


def prompt_key(prompt: Prompt) -> str:
    """Return a string that is equal for equal prompts: a string prompt equals the conversation of one user message."""
    return json.dumps([[message["role"], message["content"]] for message in _as_messages(prompt)])


def split_by_prompt(dataset: Dataset, eval_fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split rows into (train, held out), with all completions of a prompt on one side.

    A prompt is held out if SHA-256(seed, prompt), read as a number in [0, 1), lies below `eval_fraction`: rows added
    later move no prompt to the other side, and the held-out share is only close to the fraction.
    Raises UserError if a side would be empty.
    """
    held = [_hash_fraction(f"{seed} {prompt_key(prompt)}") < eval_fraction for prompt in dataset["prompt"]]
    for side, empty in (("held-out", not any(held)), ("training", all(held))):
        if empty:
            raise UserError(
                f"eval_fraction {eval_fraction!r} with seed {seed} leaves no prompt on the {side} side of "
                f"{len(held)} rows; add prompts, change eval_fraction or the seed, or give an evaluation file"
            )
    train = dataset.select([i for i, out in enumerate(held) if not out])
    return train, dataset.select([i for i, out in enumerate(held) if out])


def check_disjoint(train: Dataset, heldout: Dataset) -> None:
    """Raise UserError if a prompt is in both: a discriminator or judge checked on it would be flattered."""
    seen = {prompt_key(prompt) for prompt in train["prompt"]}
    both = {prompt_key(prompt): prompt for prompt in heldout["prompt"] if prompt_key(prompt) in seen}
    if both:
        raise UserError(
            f"{len(both)} of the evaluation prompts are in the training data too, for example "
            f"{_short(next(iter(both.values())))}; remove them from one of the two"
        )


def limit_prompts(
    dataset: Dataset, encode_prompt: Callable[[Prompt], list[int]], max_prompt_length: int, policy: str
) -> tuple[Dataset, int]:
    """Find the rows whose prompt has more than `max_prompt_length` tokens; return (dataset, their number).

    "drop" removes them. "truncate_left" only counts them: `chat.encode` cuts a prompt when it is used.
    Raises UserError for another policy, or if no row would be left.
    """
    if policy not in ("drop", "truncate_left"):
        raise UserError(f"overlong_prompts is {policy!r}; it must be one of drop, truncate_left")
    lengths = [len(encode_prompt(prompt)) for prompt in dataset["prompt"]]
    fitting = [i for i, length in enumerate(lengths) if length <= max_prompt_length]
    if policy == "drop" and not fitting:
        raise UserError(
            f"all {len(lengths)} prompts have more tokens than max_prompt_length {max_prompt_length} "
            f"(shortest {min(lengths)}, longest {max(lengths)}); raise it or set overlong_prompts to 'truncate_left'"
        )
    overlong = len(lengths) - len(fitting)
    return (dataset.select(fitting) if policy == "drop" and overlong else dataset), overlong


def group_by_prompt(dataset: Dataset) -> list[tuple[Prompt, list[str]]]:
    """Return each different prompt with its teacher completions, both in the order in which they first appear."""
    groups: dict[str, tuple[Prompt, list[str]]] = {}
    for prompt, completion in zip(dataset["prompt"], dataset["completion"], strict=True):
        groups.setdefault(prompt_key(prompt), (prompt, []))[1].append(completion)
    return list(groups.values())


def batch_indices(step: int, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Return the row indices of batch number `step` (from 0), a pure function: to resume, only the step is needed.

    Batches are cut from an endless sequence, a fresh permutation of all rows for each epoch: every row comes exactly
    once an epoch. Every batch is full, so one may straddle two epochs, and may then hold a row twice.
    Raises UserError if `batch_size` is above `num_rows`.
    """
    assert step >= 0, step
    assert batch_size >= 1, batch_size
    if batch_size > num_rows:
        raise UserError(
            f"a batch of {batch_size} rows is more than the {num_rows} rows there are; "
            "lower the batch size (per_device_train_batch_size) or add data"
        )
    epoch, start = divmod(step * batch_size, num_rows)
    indices = _permutation(epoch, num_rows, seed)[start : start + batch_size]
    if len(indices) < batch_size:
        indices += _permutation(epoch + 1, num_rows, seed)[: batch_size - len(indices)]
    return indices


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, all or nothing: a reader sees the old file or the whole new one.

    Raises ValueError for NaN or infinity, which JSON does not have; the old file is then untouched.
    """
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, blank lines skipped.

    Raises UserError, with file and line, if the file is missing or a line is not UTF-8, not JSON or not an object.
    """
    _check_file(Path(path))
    return [row for _, row in _jsonl_rows(Path(path))]


# --- from a source to checked rows: each row comes with `where`, the words that begin an error about it ---


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return "rows" if isinstance(source, list) else "dataset"


def _rows(source: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import Dataset

    if isinstance(source, (str, os.PathLike)):
        yield from _file_rows(Path(source))
    elif isinstance(source, (list, Dataset)):
        plain = source.with_format(None) if isinstance(source, Dataset) else source
        for index, row in enumerate(plain):
            where = f"{_name(source)}[{index}]"
            yield where, _object(where, row)
    else:
        raise UserError(
            f"cannot read pairs from a {type(source).__name__}; "
            "give a .jsonl or .json file, one split as a datasets.Dataset, or a list of dicts"
        )


def _file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    _check_file(path)
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: cannot read a file with the ending {path.suffix!r}; convert it to .jsonl or .json")
    return readers[path.suffix.lower()](path)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: this is a directory; give the .jsonl or .json file in it")
    if not path.exists():
        raise UserError(f"{path}: there is no such file (looked for it from {Path.cwd()}); check the path")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # In binary: text mode would also break lines at a lone carriage return, and could not name the byte of an error.
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            text = _decode(path, number, raw).rstrip()  # a line break left on would count as a line in errors
            if not text:
                continue
            remedy = "each line must be one whole JSON object (name a file that is one JSON list .json)"
            if not raw.endswith(b"\n"):
                remedy = "the last line may be cut off by a writer that was stopped: delete it or write the file again"
            yield f"{path}:{number}", _object(f"{path}:{number}", _parse_json(path, number, text, remedy))


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = _decode(path, 1, path.read_bytes())
    if not text.strip():
        return
    remedy = "the file must be one whole JSON list of objects (name a file with one object a line .jsonl)"
    rows = _parse_json(path, 1, text, remedy)
    if not isinstance(rows, list):
        raise UserError(f"{path}:1: the file holds {_short(rows)}; {remedy}")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number} of the list"
        yield where, _object(where, row)


def _decode(path: Path, first_line: int, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        byte = error.start - raw.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{path}:{line}: byte {byte} of the line is 0x{raw[error.start]:02x}, which is not UTF-8; save it as UTF-8"
        ) from None
    return text.removeprefix("\ufeff") if first_line == 1 else text


def _parse_json(path: Path, first_line: int, text: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}:{line}: invalid JSON at column {error.colno} ({error.msg}); {remedy}") from None
    except (ValueError, RecursionError) as error:  # an integer of more than 4300 digits, or very deep nesting
        raise UserError(
            f"{path}:{first_line}: Python cannot read this JSON ({error}); remove the number or the nesting"
        ) from None


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: the row is {_short(row)}; make it an object with fields, {{...}}")
    return row


# --- from a row to a pair ---


def _form(where: str, row: dict[str, Any]) -> tuple[str, ...]:
    """Return the first form of which the row has all fields. A Dataset fills fields that a row lacks with None."""
    for form in FORMS:
        if all(row.get(field) is not None for field in form):
            return form
    begun = next((form for form in FORMS if any(field in row for field in form)), None)
    if begun is None:
        raise UserError(f"{where}: the row has the fields {_short(list(row))}; give it {FORMS_IN_WORDS}")
    field = next(field for field in begun if row.get(field) is None)
    state = "null" if field in row else "missing"
    raise UserError(f"{where}: field {field!r} is {state}; give the row {FORMS_IN_WORDS}")


def _pair(where: str, row: dict[str, Any], form: tuple[str, ...]) -> tuple[Prompt, str]:
    if form == ("messages",):
        messages = _messages(where, "messages", row["messages"])
        if messages[-1]["role"] != "assistant":
            raise UserError(
                f"{where}: the last role of field 'messages' is {messages[-1]['role']!r}; "
                "it must be 'assistant', with the teacher's completion"
            )
        return _conversation(where, "messages", messages[:-1]), messages[-1]["content"]
    prompt, completion = (row[field] for field in form)
    if isinstance(prompt, list):
        return _conversation(where, form[0], _messages(where, form[0], prompt)), _completion(where, form[1], completion)
    return _text(where, form[0], prompt), _completion(where, form[1], completion)


def _conversation(where: str, field: str, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    last = messages[-1]["role"] if messages else None
    if last != "user":
        raise UserError(f"{where}: the prompt in field {field!r} ends with role {last!r}; end it with a 'user' message")
    return messages


def _completion(where: str, field: str, value: Any) -> str:
    if not isinstance(value, list):
        return _text(where, field, value)
    messages = _messages(where, field, value)
    if [message["role"] for message in messages] != ["assistant"]:
        raise UserError(f"{where}: field {field!r} is {_short(value)}; as a list it must be one 'assistant' message")
    return messages[0]["content"]


def _messages(where: str, field: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: field {field!r} is {_short(value)}; give a list of {{role, content}} messages")
    return [_message(where, f"{field}[{i}]", message) for i, message in enumerate(value)]


def _message(where: str, field: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(f"{where}: field {field!r} is {_short(message)}; a message needs 'role' and 'content'")
    role = message["role"]
    if role not in ROLES:
        raise UserError(f"{where}: field '{field}.role' is {_short(role)}; it must be one of {', '.join(ROLES)}")
    # An empty system message is a way to switch a template's own one off.
    return {"role": role, "content": _text(where, f"{field}.content", message["content"], empty=role == "system")}


def _text(where: str, field: str, value: Any, empty: bool = False) -> str:
    if not isinstance(value, str):
        shown = "null" if value is None else f"{_short(value)}, a {type(value).__name__}"
        raise UserError(f"{where}: field {field!r} is {shown}; give it as text, in quotes")
    if not empty and not value.strip():
        raise UserError(f"{where}: field {field!r} is {_short(value)}, without any text; fill it or remove the row")
    position = _bad_character(value)
    if position is not None:
        kind = "NUL" if value[position] == "\0" else "half of a surrogate pair"
        raise UserError(
            f"{where}: field {field!r} has {value[position]!r} ({kind}) at character {position + 1}, in "
            f"{_short(value[max(0, position - 20) : position + 20])}; remove that character"
        )
    return value


def _bad_character(text: str) -> int | None:
    """Return the position of the first lone surrogate (UTF-8 cannot hold it) or NUL (C code ends a text there)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return text.index("\0") if "\0" in text else None


def _extra_columns(row: dict[str, Any], form: tuple[str, ...]) -> set[str]:
    columns = {str(name) for name, value in row.items() if name not in form and value is not None}
    messages = [(field, message) for field in form if isinstance(row[field], list) for message in row[field]]
    return columns | {
        f"{field}[].{name}"
        for field, message in messages
        for name, value in message.items()
        if name not in ("role", "content") and value is not None
    }


def _as_messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _short(value: Any) -> str:
    """Return a value's repr, shortened, on one line."""
    try:
        return _REPR.repr(value).replace("\n", " ")
    except ValueError:  # an integer of more than 4300 digits
        return f"a {type(value).__name__} too long to print"


# --- hashes and permutations ---


def _hash_bits(text: str) -> int:
    """Return 53 bits of SHA-256: as many as a float holds exactly."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 11


def _hash_fraction(text: str) -> float:
    return _hash_bits(text) / 2**53


def _permutation(epoch: int, num_rows: int, seed: int) -> list[int]:
    import torch

    # Hashed together, so that (seed 0, epoch 1) and (seed 1, epoch 0) are not one permutation.
    generator = torch.Generator().manual_seed(_hash_bits(f"{seed} {epoch}"))
    return torch.randperm(num_rows, generator=generator).tolist()
