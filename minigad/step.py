"""One update of each player, split by the token budget: the discriminator's, the student's, and those of SFT and DPO.

A step's loss is divided by all that the step holds, over every pass and every process; how it is split changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from minigad import parallel
from minigad.chat import Row
from minigad.config import GADConfig
from minigad.discriminator import Discriminator, Scores, last_token
from minigad.losses import dpo_loss, grpo_loss, kl_k3, sft_loss
from minigad.memory import explained, with_room
from minigad.metrics import Metrics, discriminator_metrics, mean
from minigad.model import LanguageModel, completion_mask, split_rows
from minigad.rollout import Rollouts
from minigad.student import Student

__all__ = ["apply_gradients", "discriminator_step", "dpo_backward", "sft_step", "student_step"]


def discriminator_step(
    discriminator: Discriminator,
    optimizer: torch.optim.Optimizer | None,
    rollouts: Rollouts,
    completions: Sequence[str],
) -> tuple[Tensor, Metrics]:
    """Score the rollouts and, with an optimizer, take one Bradley-Terry step on the same forward pass.

    Returns rewards (R, T) for the tokens *as sampled*, detached, from before the update, and metrics. Whole groups go through
    together (teacher and its N rivals), split by the token budget; the loss is the mean over the step's pairs.
    """
    config, num = discriminator.config, rollouts.num_generations
    teacher_rows = discriminator.encode_teacher(rollouts.prompts, completions)
    prompts = [prompt for prompt in rollouts.prompts for _ in range(num)]
    student_rows = discriminator.encode(prompts, rollouts.texts, rollouts.finished)
    groups = [[row, *student_rows[i * num : (i + 1) * num]] for i, row in enumerate(teacher_rows)]
    scored, loss_sum = with_room(
        "discriminator update",
        discriminator.language_model,
        config,
        lambda: _score_groups(discriminator, groups, train=optimizer is not None),
        discriminator.parameters(),
    )
    teacher_scores = torch.cat([scored[i][0].scores for i in range(len(groups))])
    student_scores = torch.stack([scored[i][1].scores for i in range(len(groups))])
    rewards = _align([scored[i][1] for i in range(len(groups))], student_rows, rollouts.rows)
    metrics = discriminator_metrics(teacher_scores, student_scores, teacher_rows, student_rows) | {
        "discriminator/loss": loss_sum,
        "frac_retokenized": mean(
            [a.completion_ids != b.completion_ids for a, b in zip(student_rows, rollouts.rows, strict=True)]
        ),
    }
    if optimizer is not None:
        done = apply_gradients(discriminator.language_model, optimizer, discriminator.parameters(), config)
        metrics |= {f"discriminator/{name}": value for name, value in done.items()}
    return rewards, metrics


def _score_groups(
    discriminator: Discriminator, groups: Sequence[Sequence[Row]], *, train: bool
) -> tuple[dict[int, tuple[Scores, Scores]], float]:
    """Score groups (the teacher's row, then its N rivals), add the loss's gradients if asked; return (teacher, rivals) by group."""
    model, num_groups = discriminator.language_model, len(groups) * parallel.world().size
    sizes = [len(group) * max(row.length for row in group) for group in groups]
    scored: dict[int, tuple[Scores, Scores]] = {}
    loss_sum = 0.0
    with torch.set_grad_enabled(train), model.active(train=train):
        for chunk, once in parallel.in_step(split_rows(sizes, model.within(discriminator.config.token_budget))):
            rows = [groups[i][0] for i in chunk] + [row for i in chunk for row in groups[i][1:]]
            scores, num = discriminator.score(rows), len(groups[0]) - 1
            teacher, student = scores.take(slice(0, len(chunk))), scores.take(slice(len(chunk), None))
            loss = once * discriminator.loss(teacher, student) * len(chunk) / num_groups
            if train:
                model.loss_scale.backward(loss)
            loss_sum += loss.item()
            for k, i in enumerate(chunk):
                group = slice(k * num, (k + 1) * num)
                scored[i] = teacher.take(slice(k, k + 1)).detach(), student.take(group).detach()
    return scored, loss_sum


def _align(groups: Sequence[Scores], scored_rows: Sequence[Row], sampled_rows: Sequence[Row]) -> Tensor:
    """Give the discriminator's rewards to the tokens that the student sampled: (R, T).

    The discriminator reads text. Where its tokens are not those that were sampled (another tokenizer, an odd spelling),
    the completion's whole score goes to the last token: less dense, but never given to the wrong token.
    """
    mask = completion_mask(sampled_rows).to(groups[0].scores.device)
    rewards = torch.zeros(mask.shape, device=mask.device)
    num = len(groups[0].scores)
    for g, group in enumerate(groups):
        dense, whole = group.token_rewards(), last_token(group.scores, mask[g * num : (g + 1) * num])
        for n in range(num):
            i = g * num + n
            length = len(sampled_rows[i].completion_ids)
            same = scored_rows[i].completion_ids == sampled_rows[i].completion_ids
            rewards[i, :length] = dense[n, :length] if same else whole[n, :length]
    return rewards


def student_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    advantages: Tensor,
    config: GADConfig,
    teacher_rows: Sequence[Row] = (),
    sampled_logprobs: Tensor | None = None,
) -> Metrics:
    """Take one policy-gradient step on sampled rows with per-token advantages (R, T); split by the token budget.

    `teacher_rows` adds config.sft_weight times their cross-entropy. With beta = 0 the reference is not run at all.
    `sampled_logprobs` (R, T), of a sampler whose arithmetic is not the trainer's, weight each token's advantage by
    min(exp(log p - sampled log p), importance_sampling_cap): truncated importance sampling.
    """
    num_tokens, sft_tokens = _step_tokens(rows), _step_tokens(teacher_rows) if teacher_rows else 0
    parameters, reference = list(student.parameters().values()), student.reference
    ref_logprobs = None
    if config.beta > 0:
        assert reference is not None
        ref_logprobs = with_room(
            "reference",
            reference,
            config,
            lambda: reference.logprobs_of(rows, config.temperature, config.token_budget),
        )

    def backward() -> Metrics:
        metrics = _policy_backward(student, rows, advantages, config, ref_logprobs, sampled_logprobs, num_tokens)
        if teacher_rows:
            metrics["sft_loss"] = _sft_backward(student, teacher_rows, config, sft_tokens, config.sft_weight)
            metrics["loss"] += config.sft_weight * metrics["sft_loss"]
        return metrics

    metrics = with_room("student update", student, config, backward, parameters)
    metrics |= apply_gradients(student, optimizer, parameters, config)
    metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
    return metrics


def _policy_backward(
    student: Student,
    rows: Sequence[Row],
    advantages: Tensor,
    config: GADConfig,
    ref_logprobs: Tensor | None,
    sampled_logprobs: Tensor | None,
    num_tokens: int,
) -> Metrics:
    """Add the gradients of the policy loss over `num_tokens`, those of all processes; return its metrics, means over these rows."""
    sums = defaultdict(float, loss=0.0, entropy=0.0)
    with student.active(train=True):
        for chunk, once in _passes(rows, student, config):
            logprobs, mask = student.logprobs([rows[i] for i in chunk], config.temperature)
            width, own = mask.shape[1], logprobs.detach()
            ref = None if ref_logprobs is None else ref_logprobs[chunk, :width]
            weighted = advantages[chunk, :width]
            if sampled_logprobs is not None:
                gap = (own - sampled_logprobs[chunk, :width].to(own.device)) * mask
                weights = gap.exp().clamp(max=config.importance_sampling_cap)
                weighted = weighted * weights
                sums["sampling/logp_difference"] += once * gap.abs().sum().item()
                sums["sampling/importance_weight"] += once * weights[mask].sum().item()
            loss = once * grpo_loss(
                logprobs,
                weighted,
                mask,
                ref_logprobs=ref,
                beta=config.beta,
                epsilon=config.epsilon,
                num_tokens=num_tokens,
            )
            student.loss_scale.backward(loss)
            sums["loss"] += loss.item()
            sums["entropy"] -= once * own[mask].sum().item()
            if ref is not None:
                sums["kl"] += once * kl_k3(own, ref)[mask].sum().item()
    tokens = sum(len(row.completion_ids) for row in rows)
    return {name: value if name == "loss" else value / tokens for name, value in sums.items()}


def sft_step(model: LanguageModel, optimizer: torch.optim.Optimizer, rows: Sequence[Row], config: GADConfig) -> Metrics:
    """Take one cross-entropy step on teacher rows, any language model's; `loss` is these rows' share, nats a token of the step."""
    num_tokens, parameters = _step_tokens(rows), list(model.parameters().values())
    loss = with_room(
        "student update", model, config, lambda: _sft_backward(model, rows, config, num_tokens), parameters
    )
    metrics = {"loss": loss, "learning_rate": optimizer.param_groups[0]["lr"]}
    return metrics | apply_gradients(model, optimizer, parameters, config)


def _sft_backward(
    model: LanguageModel, rows: Sequence[Row], config: GADConfig, num_tokens: int, weight: float = 1.0
) -> float:
    """Add the gradient of weight · cross-entropy over `num_tokens`, those of all processes; return these rows' share of it, nats."""
    total = 0.0
    with model.active(train=True):
        for chunk, once in _passes(rows, model, config):
            loss = once * sft_loss(*model.logprobs([rows[i] for i in chunk]), num_tokens=num_tokens)
            model.loss_scale.backward(weight * loss)
            total += loss.item()
    return total


def dpo_backward(
    student: Student, reference: LanguageModel, chosen: Sequence[Row], rejected: Sequence[Row], config: GADConfig
) -> Metrics:
    """Add the gradient of the DPO loss, the mean over the step's pairs; return these pairs' share of it and how many are right."""
    lengths = [2 * max(a.length, b.length) for a, b in zip(chosen, rejected, strict=True)]
    num_pairs = len(chosen) * parallel.world().size

    def backward() -> tuple[float, float]:
        loss_sum, correct, budget = 0.0, 0.0, student.within(config.token_budget)
        for chunk, once in parallel.in_step(split_rows(lengths, budget)):
            rows = [chosen[i] for i in chunk] + [rejected[i] for i in chunk]
            ref = reference.logprobs_of(rows, token_budget=budget).sum(1).chunk(2)
            with student.active(train=True):
                new = student.logprobs(rows)[0].sum(1).chunk(2)
                loss = once * dpo_loss(new[0], new[1], ref[0], ref[1], config.dpo_beta) * len(chunk) / num_pairs
                student.loss_scale.backward(loss)
            loss_sum += loss.item()
            correct += once * (new[0] - ref[0] > new[1] - ref[1]).float().sum().item()
        return loss_sum, correct

    loss, correct = with_room("student update", student, config, backward, list(student.parameters().values()))
    return {"loss": loss, "rewards/accuracies": correct / len(chosen)}


def apply_gradients(
    model: LanguageModel, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], config: GADConfig
) -> Metrics:
    """Add up the processes' gradients, clip, step, clear; return grad_norm, from before clipping. One not finite stops the run."""
    with explained("optimizer step", config):  # never done twice: it may be half done
        parallel.add_gradients(parameters)
        metrics = model.loss_scale.step(optimizer, parameters, config.max_grad_norm)
    optimizer.zero_grad(set_to_none=True)
    return metrics


def _passes(rows: Sequence[Row], model: LanguageModel, config: GADConfig) -> Iterator[tuple[list[int], float]]:
    """Yield indices of the rows that go through together, longest first, and the weight of that pass: see parallel.in_step."""
    lengths = [row.length for row in rows]
    return parallel.in_step(split_rows(lengths, model.within(config.token_budget)))


def _step_tokens(rows: Sequence[Row]) -> int:
    """Count the completion tokens of rows, over all processes."""
    return int(parallel.total(sum(len(row.completion_ids) for row in rows)))
