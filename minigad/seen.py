"""The prompts that a run has seen: trained_on.txt and tested_on.txt, so that nobody measures or chooses on them unawares.

A line a prompt: the first 12 hexadecimal digits of the SHA-256 of its text, white space evened out. The prompts themselves
may be private and stay where they are. What a student knew before its run began is in neither file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from minigad.chat import Prompt, prompt_text
from minigad.checkpoint import write_whole
from minigad.config import UserError

__all__ = ["TESTED_ON", "TRAINED_ON", "add_seen", "seen_among", "text_key"]

TRAINED_ON, TESTED_ON = "trained_on.txt", "tested_on.txt"


def text_key(prompt: Prompt) -> str:
    """Return a string that is equal for prompts that read the same, white space aside, however they were written down."""
    return " ".join(prompt_text(prompt).removeprefix("user: ").split())  # so do the samples of older evaluations


def add_seen(path: Path, prompts: Iterable[Prompt]) -> None:
    """Add prompts to a list, which is sorted and has each once, whole or not at all; UserError for a damaged one."""
    lines = sorted((_read(path) or set()) | {_digits(prompt) for prompt in prompts})
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def seen_among(path: Path, prompts: Sequence[Prompt]) -> list[Prompt] | None:
    """Return those of the prompts that are in a list; None if there is none (an older minigad's run). UserError if damaged."""
    known = _read(path)
    return None if known is None else [prompt for prompt in prompts if _digits(prompt) in known]


def _read(path: Path) -> set[str] | None:
    if not path.is_file():
        return None
    content = path.read_bytes()
    if not re.fullmatch(rb"(?:[0-9a-f]{12}\n)*", content):
        raise UserError(
            f"{path} is damaged: its lines are not 12 hexadecimal digits each; restore the file from a copy, or delete it and "
            "nobody knows any more what it listed"
        )
    return set(content.decode().split())


def _digits(prompt: Prompt) -> str:
    return hashlib.sha256(text_key(prompt).encode("utf-8", "surrogatepass")).hexdigest()[:12]
