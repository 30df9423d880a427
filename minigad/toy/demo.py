"""The demo: the letters language, played by SeqKD, by GAD as published, and by GAD with the log-ratio discriminator."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from minigad.attribution import judged
from minigad.config import PRESETS, GADConfig
from minigad.data import group_by_prompt
from minigad.discriminator import Discriminator
from minigad.evaluate import evaluate
from minigad.model import LanguageModel
from minigad.players import save_discriminator, save_student
from minigad.progress import progress
from minigad.report import write_report
from minigad.run import phase_steps
from minigad.run_directory import RunDirectory
from minigad.student import Student
from minigad.toy.letters import (
    MAX_COMPLETION_LENGTH,
    LettersTeacher,
    letters_dataset,
    letters_metrics,
    letters_tokenizer,
    teacher_metrics,
)
from minigad.train import Metrics, gad, warmup

__all__ = ["demo"]

# GAD as published: a head on the last token. It learns more slowly than a log-ratio, so the student must be slower too.
PUBLISHED: dict[str, Any] = {
    "discriminator": "sequence",
    "learning_rate": 1e-4,
    "discriminator_learning_rate": 1e-3,
    "discriminator_warmup_steps": 100,
}


def demo(output_dir: Path, seed: int = 0, *, quick: bool = False) -> list[tuple[str, dict[str, float]]]:
    """Play the three methods from one warmed-up student, print a table, and write a run directory with its report.

    Returns (method, exact metrics on held-out prompts at temperature 1). `quick` takes a tenth of the steps.
    """
    started = time.monotonic()
    torch.set_num_threads(1)  # the models are so small that a second thread only gets in the way
    config = _config(output_dir, seed, quick)
    data = letters_dataset(8000, seed)
    student = Student.load(config, tokenizer=letters_tokenizer())
    run = RunDirectory(output_dir, config, {"method": "gad", "train_rows": len(data), "world": "toy-letters"})
    run.write_trained_on(data["prompt"])
    discriminator = Discriminator.load(config, student)
    _finish(run.record(warmup(student, discriminator, data, config)), config, len(data))
    results = [("SeqKD (the warm-up)", letters_metrics(student, config, "heldout", 1.0))]
    results.append(("GAD, as published", _published(student, discriminator.language_model, data, config)))
    _finish(run.record(gad(student, discriminator, data, config)), config, len(data))
    results.append(("GAD, log-ratio", letters_metrics(student, config, "heldout", 1.0)))
    save_student(student, run.folder / "student", config, "gad")
    save_discriminator(discriminator, run.folder / "discriminator")
    heldout = letters_dataset(256, seed, "heldout")
    metrics, samples = evaluate(student, heldout, config, teacher_logprob=_teacher_logprob)
    samples = judged(discriminator, [prompt for prompt, _ in group_by_prompt(heldout)], samples)
    run.write_evaluation(metrics | {f"exact/{name}": value for name, value in results[-1][1].items()}, samples)
    write_report(run.folder)
    _print_table(results)
    print(f"wrote {run.folder}/report.html in {time.monotonic() - started:.0f} s")
    return results


def _config(output_dir: Path, seed: int, quick: bool) -> GADConfig:
    config = PRESETS["toy"].replace(seed=seed, output_dir=str(output_dir), max_completion_length=MAX_COMPLETION_LENGTH)
    if not quick:
        return config
    return config.replace(
        warmup_epochs=config.warmup_epochs / 10,
        discriminator_sft_epochs=config.discriminator_sft_epochs / 10,
        max_steps=config.max_steps // 10,
    )


def _published(start: Student, language_model: LanguageModel, data: Any, config: GADConfig) -> dict[str, float]:
    """Play the published game on copies: a head on the last token, over the same language model."""
    config = config.replace(warmup_epochs=0.0, discriminator_sft_epochs=0.0, **PUBLISHED)
    student = Student(copy.deepcopy(start.model), start.tokenizer)
    own = LanguageModel(copy.deepcopy(language_model.model), start.tokenizer)
    discriminator = Discriminator(own, student, config)
    _finish(warmup(student, discriminator, data, config), config, len(data))
    _finish(gad(student, discriminator, data, config), config, len(data))
    return letters_metrics(student, config, "heldout", 1.0)


def _finish(stream: Iterable[Metrics], config: GADConfig, num_rows: int) -> None:
    for _ in progress(stream, phase_steps(config, num_rows)):
        pass


def _teacher_logprob(prompts: Sequence[Any], texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
    teacher = LettersTeacher()
    return [teacher.logprob(*one) for one in zip(prompts, texts, finished, strict=True)]


def _print_table(results: list[tuple[str, dict[str, float]]]) -> None:
    print(
        f"{'held-out prompts, temperature 1':34s}{'validity':>9s}{'KL(G||T)':>9s}{'KL(T||G)':>9s}{'modes':>7s}{'entropy':>9s}"
    )
    for method, m in results:
        numbers = f"{m['validity']:9.3f}{m['kl_student_teacher']:9.2f}{m['kl_teacher_student']:9.2f}{m['modes']:7.1f}{m['entropy']:9.2f}"
        print(f"{method:34s}{numbers}")
    print(
        "Validity can be bought by dropping modes: read it beside the modes in use "
        f"(the teacher has {teacher_metrics('heldout')['modes']:.1f}) and the entropy."
    )
