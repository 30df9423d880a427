"""What a step says about itself: numbers for metrics.jsonl, and a group of texts for the reader's eye."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minigad.chat import Row
from minigad.rollout import Rollouts

__all__ = ["Metrics", "completion_metrics", "cost", "discriminator_metrics", "first_group", "mean"]

Metrics = dict[str, Any]


def discriminator_metrics(
    teacher_scores: Tensor, student_scores: Tensor, teacher_rows: Sequence[Row], student_rows: Sequence[Row]
) -> Metrics:
    """Describe the scores of B teacher completions (B,) and of N students' each (B, N), and the rows that they belong to."""
    margin = teacher_scores.unsqueeze(1) - student_scores
    num = student_scores.shape[1]
    same = torch.tensor([row == teacher_rows[i // num] for i, row in enumerate(student_rows)]).view(margin.shape)
    spread = student_scores.std(1)
    return {
        "reward": student_scores.mean().item(),
        "reward_std": spread.mean().item(),
        "frac_reward_zero_std": (spread < 1e-6).float().mean().item(),
        # ties count half: an accuracy of 0.5 is chance whatever the number of ties
        "discriminator/accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item(),
        "discriminator/margin": margin.mean().item(),
        "discriminator/length_corr": _correlation(
            [len(row.completion_ids) for row in student_rows], student_scores.flatten()
        ),
        "discriminator/identical_pairs": same.float().mean().item(),
        "discriminator/identical_text_gap": margin[same.to(margin.device)].abs().max().item() if same.any() else 0.0,
    }


def _correlation(lengths: Sequence[int], scores: Tensor) -> float:
    """Pearson's correlation of completion length and score; 0 where either does not vary."""
    pair = torch.stack([torch.tensor(lengths, dtype=torch.float64), scores.double().cpu()])
    centred = pair - pair.mean(1, keepdim=True)
    norm = centred.norm(dim=1).prod()
    return (centred[0] @ centred[1] / norm).item() if norm > 0 else 0.0


def completion_metrics(rollouts: Rollouts) -> Metrics:
    """Return lengths in tokens, the end token included, and the share that was cut off."""
    lengths = [len(row.completion_ids) for row in rollouts.rows]
    return {
        "completions/mean_length": mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - mean(rollouts.finished),
    }


def first_group(rollouts: Rollouts, completions: Sequence[str], scores: Tensor) -> list[dict[str, Any]]:
    """Return the step's first prompt with the teacher's completion and the student's N, for samples.jsonl."""
    num = rollouts.num_generations
    return [
        {"prompt": rollouts.prompts[0], "teacher": completions[0], "student": text, "score": score}
        for text, score in zip(rollouts.texts[:num], scores[:num].tolist(), strict=True)
    ]


def cost(rows: Sequence[Row], started: float) -> Metrics:
    """Return the step's completion tokens, its seconds since `started` (time.perf_counter), and tokens a second."""
    tokens, seconds = sum(len(row.completion_ids) for row in rows), time.perf_counter() - started
    return {"num_tokens": tokens, "step_time": seconds, "tokens_per_second": tokens / seconds}


def mean(values: Sequence[float]) -> float:
    """Return the plain mean."""
    return sum(values) / len(values)
