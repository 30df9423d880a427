"""The folders that a run leaves of its two players, student/ and discriminator/: written whole or not at all, and loaded again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from minigad.checkpoint import Damaged, verify, whole_folder, write_synced
from minigad.config import GADConfig, UserError, visible
from minigad.discriminator import Discriminator
from minigad.reading import read_run
from minigad.student import Student

__all__ = [
    "Players",
    "load_discriminator",
    "load_players",
    "load_student",
    "loading",
    "save_discriminator",
    "save_student",
]


class Players(NamedTuple):
    """A run's configuration, its student, and its discriminator as the game left it."""

    config: GADConfig
    student: Student
    discriminator: Discriminator


def save_student(student: Student, folder: Path, config: GADConfig, method: str) -> None:
    """Write a student's folder, whole or not at all, with a model card that says what it is and what it is not."""
    peft, name = student.adapter is not None, " ".join(visible(config.student).replace("`", "'").split())
    card = f"""---
library_name: {"peft" if peft else "transformers"}
tags: [distillation, generative-adversarial-distillation, minigad]
---
# A student distilled with minigad

{"A LoRA adapter" if peft else "All weights"} of `{name}`, trained by `{method}` on a teacher's text alone
(discriminator: `{config.discriminator}`, {config.max_steps} steps, seed {config.seed}). Generative Adversarial Distillation: arXiv 2511.10643.

It imitates its teacher's manner on prompts like those it was trained on. Its answers are not checked for truth or safety.
The numbers that were measured are in `evaluation.json` of the run that made it.
"""
    with whole_folder(folder) as work:
        student.save_pretrained(work)
        write_synced(work / "README.md", card.encode("utf-8", "backslashreplace"))


def save_discriminator(discriminator: Discriminator, folder: Path) -> None:
    """Write a discriminator's folder, whole or not at all; `load_players` reads it."""
    with whole_folder(folder) as work:
        discriminator.save_pretrained(work)


def load_players(folder: str | Path) -> Players:
    """Load both players of a finished run. Base models are found by their names, as when the run was made.

    Raises UserError if the folder holds no run, or a run without a discriminator (seqkd, soda, or one that has not ended).
    """
    folder = Path(folder)
    record = read_run(folder)["config"]
    if not (folder / "discriminator").is_dir():
        raise UserError(
            f"run {str(folder)!r} has no discriminator/ (its method is {record.get('method')!r}); methods without a game leave "
            "none, and a run that was stopped, or made by an older minigad, writes it when distill is given again with --resume"
        )
    config = GADConfig().replace(**record["config"])
    student = load_student(folder, config)
    return Players(config, student, load_discriminator(folder, config, student))


def load_student(folder: str | Path, config: GADConfig) -> Student:
    """Load a run's student; UserError if its folder is damaged."""
    _check_weights(Path(folder) / "student")
    with loading(config.student):
        return Student.from_pretrained(Path(folder) / "student", config)


def load_discriminator(folder: str | Path, config: GADConfig, student: Student) -> Discriminator:
    """Load a run's discriminator beside its student; UserError if its folder is damaged."""
    _check_weights(Path(folder) / "discriminator")
    with loading(config.discriminator_model or config.student):
        return Discriminator.from_pretrained(Path(folder) / "discriminator", student)


def _check_weights(folder: Path) -> None:
    try:
        verify(folder)
    except Damaged as error:
        raise UserError(
            f"{folder} is damaged: {error}; give distill again with --resume, which writes it anew from the checkpoint"
        ) from error


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Name the model in what the libraries raise for a broken folder, of whatever kind it is."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory while model {name!r} was loaded: its weights alone are too much; --quantization nf4 with "
            "--lora-r 16, --dtype bfloat16 or a smaller --student helps, and minigad fit shows the whole bill"
        ) from error
    except Exception as error:  # tokenizers raises just that
        why = " ".join(str(error).split())[:300]
        raise UserError(f"model {name!r} could not be loaded ({why}); copy or download its folder again") from error
