"""Two more ways to learn from a teacher's text, for comparison: ORPO-Distill and DIAL.

Both prefer the teacher's or the better text by pairs where the game takes a policy gradient. Generators of metrics like those of
train.py; they begin from a student that is warmed up already, keep no checkpoint, and run in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minigad.chat import Row, encode_all
from minigad.config import GADConfig
from minigad.data import batch_indices
from minigad.discriminator import Discriminator
from minigad.losses import odds_ratio_loss, sft_loss
from minigad.metrics import Metrics
from minigad.model import split_rows
from minigad.optim import make_optimizer
from minigad.rollout import Rollouts
from minigad.step import apply_gradients, discriminator_step, dpo_backward
from minigad.student import Student
from minigad.train import num_steps, phase_seed

__all__ = ["dial", "orpo"]


def orpo(
    student: Student,
    dataset: Any,
    config: GADConfig,
    *,
    epochs: float,
    learning_rate: float,
    weight: float = 0.1,
    fresh: float = 0.5,
) -> Iterator[Metrics]:
    """Train by ORPO with the teacher's text chosen and a sample of the student rejected (ORPO-Distill, arXiv 2509.25100).

    L = sft_loss(chosen) + weight · odds_ratio_loss      (ORPO, arXiv 2403.07691, Eq 6)

    Before each epoch a share `fresh` of the rejected texts is sampled anew from the student as it is; the rest stays from the
    student that came in (the paper's mixed policy, 0.5 there). One sample a row; there is no reference.
    """
    rows = encode_all(student.tokenizer, list(dataset["prompt"]), list(dataset["completion"]), config)
    rejected = _samples(student, dataset, range(len(rows)), config, "orpo/first")
    kept, size = list(rejected), config.warmup_batch_size
    parameters = list(student.parameters().values())
    optimizer = make_optimizer(parameters, learning_rate, config)
    each = max(1, round(len(rows) / size))
    for step in range(num_steps(epochs, len(rows), size)):
        if step % each == 0 and step:
            rejected = _mixed(student, dataset, kept, fresh, config, step // each)
        indices = batch_indices(step, len(rows), size, phase_seed(config, "orpo"))
        pairs = [rows[i] for i in indices], [rejected[i] for i in indices]
        metrics = _orpo_backward(student, *pairs, weight, config)
        yield {"phase": "orpo", "step": step + 1, **metrics, **apply_gradients(student, optimizer, parameters, config)}


def _mixed(
    student: Student, dataset: Any, kept: Sequence[Row], fresh: float, config: GADConfig, epoch: int
) -> list[Row]:
    """Replace a share of the first student's samples by the present student's, other rows each epoch."""
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(phase_seed(config, f"orpo/mix/{epoch}")))
    chosen = sorted(order[: round(fresh * len(kept))].tolist())
    rows = list(kept)
    for i, row in zip(chosen, _samples(student, dataset, chosen, config, f"orpo/{epoch}"), strict=True):
        rows[i] = row
    return rows


def _samples(student: Student, dataset: Any, indices: Sequence[int], config: GADConfig, purpose: str) -> list[Row]:
    prompts = dataset.select(indices)["prompt"]
    return student.generate(list(prompts), config, seed=phase_seed(config, purpose)).rows if len(indices) else []


def _orpo_backward(
    student: Student, chosen: Sequence[Row], rejected: Sequence[Row], weight: float, config: GADConfig
) -> Metrics:
    """Add the gradient of the ORPO loss over pairs, split by the token budget."""
    num_tokens = sum(len(row.completion_ids) for row in chosen)
    lengths = [2 * max(a.length, b.length) for a, b in zip(chosen, rejected, strict=True)]
    sft, odds = 0.0, 0.0
    with student.active(train=True):
        for chunk in split_rows(lengths, student.within(config.token_budget)):
            logprobs, mask = student.logprobs([chosen[i] for i in chunk] + [rejected[i] for i in chunk])
            likelihood = sft_loss(logprobs[: len(chunk)], mask[: len(chunk)], num_tokens=num_tokens)
            ratio = odds_ratio_loss(*_token_means(logprobs, mask).chunk(2)) * len(chunk) / len(chosen)
            student.loss_scale.backward(likelihood + weight * ratio)
            sft, odds = sft + likelihood.item(), odds + ratio.item()
    return {"loss": sft + weight * odds, "sft_loss": sft, "odds_ratio_loss": odds}


def _token_means(logprobs: Tensor, mask: Tensor) -> Tensor:
    return (logprobs * mask).sum(1) / mask.sum(1)


def dial(
    student: Student,
    discriminator: Discriminator,
    dataset: Any,
    config: GADConfig,
    *,
    rounds: int,
    prompts_a_round: int,
    dpo_epochs: float = 1.0,
) -> Iterator[Metrics]:
    """Play in rounds (DIAL, arXiv 2512.20773): a fresh discriminator, then DPO on pairs of samples that it ranks.

    Each round: sample N completions for some prompts; put the discriminator back to what it came as and train it on those by
    Bradley-Terry, one pass; then DPO of the best against the worst sample of each prompt, the student of the round's start as
    reference. The discriminator ranks the texts that it was trained on, as the paper's does.
    """
    start = [parameter.detach().clone() for parameter in discriminator.parameters()]
    parameters = list(student.parameters().values())
    optimizer = make_optimizer(parameters, config.dpo_learning_rate, config)
    for turn in range(rounds):
        part = batch_indices(turn, len(dataset), prompts_a_round, phase_seed(config, "dial"))
        prompts, completions = dataset.select(part)["prompt"], dataset.select(part)["completion"]
        reference = student.freeze_reference()
        batches = list(_rollout_batches(student, list(prompts), config, turn))
        for parameter, weights in zip(discriminator.parameters(), start, strict=True):
            parameter.data.copy_(weights)
        judge = make_optimizer(discriminator.parameters(), config.discriminator_learning_rate, config)
        for first, rollouts in batches:
            _, metrics = discriminator_step(
                discriminator, judge, rollouts, completions[first : first + len(rollouts.prompts)]
            )
            yield {"phase": "dial_discriminator", "step": turn + 1, **metrics}
        pairs = [pair for _, rollouts in batches for pair in _ranked(discriminator, rollouts)]
        for step in range(num_steps(dpo_epochs, len(pairs), config.warmup_batch_size)):
            own = phase_seed(config, f"dial/dpo/{turn}")
            picked = [pairs[i] for i in batch_indices(step, len(pairs), config.warmup_batch_size, own)]
            metrics = dpo_backward(
                student, reference, [best for best, _ in picked], [worst for _, worst in picked], config
            )
            yield {
                "phase": "dial",
                "step": turn + 1,
                **metrics,
                **apply_gradients(student, optimizer, parameters, config),
            }


def _rollout_batches(
    student: Student, prompts: list[Any], config: GADConfig, turn: int
) -> Iterator[tuple[int, Rollouts]]:
    size, num = config.per_device_train_batch_size, config.num_generations
    for first in range(0, len(prompts), size):
        seed = phase_seed(config, f"dial/{turn}/{first}")
        yield first, student.generate(prompts[first : first + size], config, seed=seed, num_generations=num)


def _ranked(discriminator: Discriminator, rollouts: Rollouts) -> list[tuple[Row, Row]]:
    """Return (best, worst) rows of each prompt; a prompt whose samples all score the same gives no pair."""
    num = rollouts.num_generations
    prompts = [prompt for prompt in rollouts.prompts for _ in range(num)]
    rows = discriminator.encode(prompts, rollouts.texts, rollouts.finished)
    scores = discriminator.scores_of(rows).scores.view(-1, num)
    best, worst = scores.argmax(1).tolist(), scores.argmin(1).tolist()
    return [
        (rollouts.rows[g * num + top], rollouts.rows[g * num + bottom])
        for g, (top, bottom) in enumerate(zip(best, worst, strict=True))
        if scores[g, top] > scores[g, bottom]
    ]
