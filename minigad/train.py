"""The loop: warm-up, the adversarial game, and the baselines it must beat, as generators that yield metrics.

    for metrics in gad(student, discriminator, dataset, config): ...

The caller may plot, inspect or stop between any two steps. Every batch and every sample depends on (seed, phase, step)
alone, never on what ran before. `state` (minigad.checkpoint) counts the steps, so that a run can be stopped and go on.
Where we depart from the paper (arXiv 2511.10643):

1. Warm-up trains the student first and the discriminator then, on samples of the warmed-up student, not both at once:
   early samples of an untrained student teach the discriminator what it will never meet again.
2. Rewards are the scores of the discriminator's own training forward pass, before its update: the paper's order
   (old D scores, then D learns), at the price of one pass instead of two.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minigad import parallel
from minigad.chat import Prompt, encode_all
from minigad.checkpoint import State
from minigad.config import GADConfig
from minigad.data import batch_indices
from minigad.discriminator import Discriminator
from minigad.evaluate import heldout_nll
from minigad.losses import token_advantages
from minigad.metrics import Metrics, completion_metrics, cost, first_group
from minigad.model import LanguageModel, completion_mask
from minigad.optim import make_optimizer
from minigad.rollout import Rollouts
from minigad.step import apply_gradients, discriminator_step, dpo_backward, sft_step, student_step
from minigad.student import Student

__all__ = ["Metrics", "fit_teacher_text", "gad", "num_steps", "phase_seed", "seqkd", "soda", "warmup"]


def warmup(
    student: Student, discriminator: Discriminator, dataset: Any, config: GADConfig, state: State | None = None
) -> Iterator[Metrics]:
    """Prepare both players: SFT of the student on the teacher's text, then Bradley-Terry on its fresh samples.

    Phases: "warmup" (student), "discriminator_sft" (its language model, if asked for), "discriminator_warmup".
    At the end the student's frozen copy becomes `student.reference` (the KL's, and the implicit score's if asked for).
    """
    state = state or State()
    yield from fit_teacher_text(
        student, dataset, config, "warmup", config.warmup_epochs, config.warmup_learning_rate, state
    )
    student.freeze_reference()
    if not config.discriminator_model:
        discriminator.start_from_student()
    yield from fit_teacher_text(
        discriminator.language_model,
        dataset,
        config,
        "discriminator_sft",
        config.discriminator_sft_epochs,
        config.discriminator_sft_learning_rate,
        state,
    )
    optimizer = make_optimizer(discriminator.parameters(), config.discriminator_learning_rate, config)
    for step in state.steps("discriminator_warmup", config.discriminator_warmup_steps, optimizer):
        started = time.perf_counter()
        prompts, completions = _batch(dataset, step, config.per_device_train_batch_size, phase_seed(config, "warmup-d"))
        rollouts = state.batch = _rollouts(student, prompts, config, "discriminator_warmup", step)
        _, metrics = discriminator_step(discriminator, optimizer, rollouts, completions)
        metrics |= cost(rollouts.rows, started)
        yield parallel.combine({"phase": "discriminator_warmup", "step": step + 1, **metrics})


def gad(
    student: Student,
    discriminator: Discriminator,
    dataset: Any,
    config: GADConfig,
    eval_dataset: Any = None,
    state: State | None = None,
) -> Iterator[Metrics]:
    """Play the game: each step one update of the discriminator and one of the student (arXiv 2511.10643, Eq 1).

    Call `warmup` first. `config.freeze_discriminator` keeps the discriminator as warm-up left it. With `config.eval_steps` and
    `eval_dataset`, every so often the discriminator is also measured on held-out prompts. Yields one dict a step.
    """
    state = state or State()
    if student.reference is None:
        student.freeze_reference()
    player = make_optimizer(list(student.parameters().values()), config.learning_rate, config)
    judge = make_optimizer(discriminator.parameters(), config.discriminator_learning_rate, config)
    average = _Average(student, config.ema_decay)
    for step in state.steps("gad", config.max_steps, player, judge, average=average.weights):
        started = time.perf_counter()
        _set_rate(player, config.learning_rate, step, config.max_steps, config.lr_final_fraction)
        prompts, completions = _batch(dataset, step, config.per_device_train_batch_size, phase_seed(config, "gad"))
        rollouts = state.batch = _rollouts(student, prompts, config, "gad", step)
        optimizer = None if config.freeze_discriminator else judge
        rewards, metrics = discriminator_step(discriminator, optimizer, rollouts, completions)
        advantages = _advantages(rewards, rollouts, config)
        teacher = encode_all(student.tokenizer, prompts, completions, config) if config.sft_weight else []
        exact = config.rollout_weights == "adapter" and student.sampler is None
        sampled = None if exact else rollouts.logprobs
        metrics |= student_step(student, player, rollouts.rows, advantages, config, teacher, sampled)
        average.update(student)
        metrics |= completion_metrics(rollouts) | cost(rollouts.rows, started)
        metrics["samples"] = first_group(rollouts, completions, rewards.sum(1))
        if eval_dataset is not None and config.eval_steps and (step + 1) % config.eval_steps == 0:
            metrics |= _held_out(student, discriminator, eval_dataset, config, step)
        yield parallel.combine({"phase": "gad", "step": step + 1, **metrics})
    average.install(student)


def seqkd(student: Student, dataset: Any, config: GADConfig, state: State | None = None) -> Iterator[Metrics]:
    """Train the student by cross-entropy on the teacher's text alone (sequence-level distillation, arXiv 1606.07947)."""
    yield from fit_teacher_text(
        student, dataset, config, "seqkd", config.seqkd_epochs, config.seqkd_learning_rate, state
    )


def soda(student: Student, dataset: Any, config: GADConfig, state: State | None = None) -> Iterator[Metrics]:
    """Train by SFT, then by DPO with the teacher's text chosen and one static sample of the student rejected.

    arXiv 2604.03873. The samples are drawn once, after SFT, at the config's temperature; the reference is the SFT student.
    """
    state = state or State()
    yield from fit_teacher_text(
        student, dataset, config, "warmup", config.warmup_epochs, config.warmup_learning_rate, state
    )
    reference = student.freeze_reference()
    prompts, completions = list(dataset["prompt"]), list(dataset["completion"])
    chosen = encode_all(student.tokenizer, prompts, completions, config)
    parameters = list(student.parameters().values())
    optimizer = make_optimizer(parameters, config.dpo_learning_rate, config)
    batch_size = config.warmup_batch_size * parallel.world().size
    steps = num_steps(config.dpo_epochs, len(chosen), batch_size)
    left = state.steps("dpo", steps, optimizer)
    sft_student = Student(reference.model, reference.tokenizer, reference.adapter)  # also where a run goes on
    seed = phase_seed(config, "soda/0")
    rejected = sft_student.generate(prompts, config, seed=seed).rows
    for step in left:
        started = time.perf_counter()
        _set_rate(optimizer, config.dpo_learning_rate, step, steps, config.lr_final_fraction)
        indices = parallel.my_part(batch_indices(step, len(chosen), batch_size, phase_seed(config, "dpo")))
        pairs = state.batch = [chosen[i] for i in indices], [rejected[i] for i in indices]
        metrics = dpo_backward(student, reference, *pairs, config)
        metrics |= apply_gradients(student, optimizer, parameters, config) | cost([*pairs[0], *pairs[1]], started)
        yield parallel.combine({"phase": "dpo", "step": step + 1, **metrics})


def fit_teacher_text(
    model: LanguageModel,
    dataset: Any,
    config: GADConfig,
    phase: str,
    epochs: float,
    learning_rate: float,
    state: State | None = None,
) -> Iterator[Metrics]:
    """Train any language model by cross-entropy on the teacher's text: the student, or the one inside a discriminator."""
    state = state or State()
    rows = encode_all(model.tokenizer, list(dataset["prompt"]), list(dataset["completion"]), config)
    optimizer = make_optimizer(list(model.parameters().values()), learning_rate, config)
    batch_size = config.warmup_batch_size * parallel.world().size
    steps = num_steps(epochs, len(rows), batch_size)
    for step in state.steps(phase, steps, optimizer):
        started = time.perf_counter()
        _set_rate(optimizer, learning_rate, step, steps, config.lr_final_fraction)
        indices = parallel.my_part(batch_indices(step, len(rows), batch_size, phase_seed(config, phase)))
        batch = state.batch = [rows[i] for i in indices]
        metrics = sft_step(model, optimizer, batch, config) | cost(batch, started)
        yield parallel.combine({"phase": phase, "step": step + 1, **metrics})


def _rollouts(
    student: Student,
    prompts: Sequence[Prompt],
    config: GADConfig,
    phase: str,
    step: int,
) -> Rollouts:
    """Sample for this process's prompts as one process would sample them among all of the step's."""
    seed, first = phase_seed(config, f"{phase}/{step}"), parallel.world().rank * len(prompts)
    return student.generate(prompts, config, seed=seed, num_generations=config.num_generations, first_prompt=first)


def _advantages(rewards: Tensor, rollouts: Rollouts, config: GADConfig) -> Tensor:
    """Return (R, T) advantages within each prompt's group, of (R, T) rewards."""
    shape = (-1, rollouts.num_generations, rewards.shape[1])
    mask = completion_mask(rollouts.rows).to(rewards.device)
    return token_advantages(rewards.view(shape), mask.view(shape), config.scale_rewards).view(rewards.shape)


def _held_out(student: Student, discriminator: Discriminator, dataset: Any, config: GADConfig, step: int) -> Metrics:
    """Measure both players on prompts that neither trains on: D's accuracy, and the student's NLL of the teacher's text."""
    size = min(len(dataset), config.per_device_train_batch_size * 2)
    part = dataset.select(batch_indices(step, len(dataset), size, phase_seed(config, "held-out")))
    rollouts = _rollouts(student, list(part["prompt"]), config, "held-out", step)
    _, metrics = discriminator_step(discriminator, None, rollouts, list(part["completion"]))
    return {
        "discriminator/accuracy_eval": metrics["discriminator/accuracy"],
        "nll_eval": heldout_nll(student, part, config),
    }


def _batch(dataset: Any, step: int, size: int, seed: int) -> tuple[list[Prompt], list[str]]:
    rows = dataset[parallel.my_part(batch_indices(step, len(dataset), size * parallel.world().size, seed))]
    return rows["prompt"], rows["completion"]


def phase_seed(config: GADConfig, purpose: str) -> int:
    """Return the seed of one stream of randomness a purpose: a change in one phase leaves the others' draws alone."""
    return zlib.crc32(f"{config.seed}/{purpose}".encode())


def num_steps(epochs: float, num_rows: int, batch_size: int) -> int:
    """Return how many batches make so many epochs, rounded."""
    return round(epochs * num_rows / batch_size)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int, final_fraction: float) -> None:
    optimizer.param_groups[0]["lr"] = rate * (1 - (1 - final_fraction) * step / max(steps - 1, 1))


class _Average:
    """An exponential moving average of the student's weights, off at decay 0."""

    def __init__(self, student: Student, decay: float) -> None:
        self.decay = decay
        self.weights = [p.detach().clone() for p in student.parameters().values()] if decay else []

    def update(self, student: Student) -> None:
        for average, weight in zip(self.weights, student.parameters().values(), strict=False):
            average.lerp_(weight.detach(), 1 - self.decay)

    def install(self, student: Student) -> None:
        for average, weight in zip(self.weights, student.parameters().values(), strict=False):
            weight.data.copy_(average)
