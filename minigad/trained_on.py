"""The prompts that a run's student was trained on: trained_on.txt, so that nobody measures or chooses on them unawares.

A line a prompt: the first 12 hexadecimal digits of the SHA-256 of its text, white space evened out. The prompts themselves
may be private and stay where they are. What a student knew before its run began is not in the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from minigad.chat import Prompt, prompt_text
from minigad.checkpoint import write_whole
from minigad.config import UserError

__all__ = ["TRAINED_ON", "text_key", "trained_among", "write_trained_on"]

TRAINED_ON = "trained_on.txt"


def text_key(prompt: Prompt) -> str:
    """Return a string that is equal for prompts that read the same, white space aside, however they were written down."""
    return " ".join(prompt_text(prompt).removeprefix("user: ").split())  # so do the samples of older evaluations


def write_trained_on(folder: Path, prompts: Iterable[Prompt]) -> None:
    """Write the list of a run's training prompts, sorted, each once, whole or not at all."""
    lines = sorted({_digits(prompt) for prompt in prompts})
    write_whole(folder / TRAINED_ON, "".join(f"{line}\n" for line in lines).encode())


def trained_among(folder: str | Path, prompts: Sequence[Prompt]) -> list[Prompt] | None:
    """Return those of the prompts that a run's student was trained on; None if the run has no list (an older minigad's).

    Raises UserError for a damaged list.
    """
    path = Path(folder) / TRAINED_ON
    if not path.is_file():
        return None
    content = path.read_bytes()
    if not re.fullmatch(rb"(?:[0-9a-f]{12}\n)*", content):
        raise UserError(
            f"{path} is damaged: its lines are not 12 hexadecimal digits each; restore the file from a copy, or delete it and "
            "the run counts as one without a list"
        )
    known = set(content.decode().split())
    return [prompt for prompt in prompts if _digits(prompt) in known]


def _digits(prompt: Prompt) -> str:
    return hashlib.sha256(text_key(prompt).encode("utf-8", "surrogatepass")).hexdigest()[:12]
