"""A world of one dimension in which every quantity of the game is known exactly, and a run takes two seconds.

There is one prompt and a completion is one of 60 categories, so B = 1 prompt, N = `samples` completions, T = 1 token.
The teacher has two modes; the student is a single bell curve and cannot have both. Imitation (SeqKD) spreads it over
both and the gap between; the game moves it onto one. After Figure 5 of arXiv 2511.10643, whose constants are
unpublished: unequal weights and a narrower second mode are ours. With equal modes the blend in the middle is itself a
local optimum of reverse KL, and the game rightly stays there.

A student is `params` = (mu, log sigma), in categories. Divergences are in nats. G is the student, T the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from minigad.losses import bradley_terry_loss, group_advantages, grpo_loss, sft_loss

__all__ = ["kl", "oracle", "play", "seqkd", "student_metrics", "student_probs", "teacher_probs"]

CATEGORIES = torch.arange(60, dtype=torch.float64)
MODES = ((0.7, 18.0, 4.0), (0.3, 40.0, 2.0))  # (weight, mean, standard deviation)
FLOOR = 0.01  # this share of the teacher is uniform, so that no KL is infinite
START = (29.5, math.log(15.0))  # an untrained student: centred, and wide enough to see everything


def bell_logprobs(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Return the log-probabilities (60,) of a discretised Gaussian: log p(x) = -(x - mu)^2 / (2 sigma^2) - log Z."""
    return torch.log_softmax(-0.5 * ((CATEGORIES - mu) / log_sigma.exp()) ** 2, dim=0)


def teacher_probs() -> Tensor:
    """Return p_T (60,) = 0.99 (0.7 N(18, 4) + 0.3 N(40, 2)) + 0.01 / 60, each N(mean, deviation) discretised."""
    bells = [w * bell_logprobs(torch.tensor(mu), torch.tensor(sigma).log()).exp() for w, mu, sigma in MODES]
    return (1 - FLOOR) * torch.stack(bells).sum(0) + FLOOR / len(CATEGORIES)


def student_probs(params: Tensor) -> Tensor:
    """Return p_G (60,), the discretised Gaussian of `params` = (mu, log sigma), shape (2,). Differentiable."""
    return bell_logprobs(*params).exp()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) = sum p (log p - log q), in nats, exactly. p and q (60,) -> scalar; only p may have zeros."""
    return (torch.xlogy(p, p) - p * q.log()).sum()


def student_metrics(params: Tensor) -> dict[str, float]:
    """Measure a student against the teacher, exactly: no sample is drawn.

    `kl_student_teacher` = KL(G || T) is what the game lowers, `kl_teacher_student` = KL(T || G) what imitation lowers.
    `mass_on_modes` is p_G within two deviations of either mode. A student collapsed to a point has all of it, so never
    show it without `sigma`. params (2,).
    """
    mu, log_sigma = params.detach()
    teacher, logprobs = teacher_probs(), bell_logprobs(mu, log_sigma)
    student = logprobs.exp()
    on_modes = torch.stack([(CATEGORIES - mean).abs() <= 2 * deviation for _, mean, deviation in MODES]).any(0)
    return {
        "mu": mu.item(),
        "sigma": log_sigma.exp().item(),
        "kl_student_teacher": kl(student, teacher).item(),
        "kl_teacher_student": (teacher * (teacher.log() - logprobs)).sum().item(),  # from logs: p_G may underflow
        "mass_on_modes": student[on_modes].sum().item(),
    }


def seqkd(seed: int, steps: int = 2500, *, student_rate: float = 0.01, samples: int = 64) -> Tensor:
    """Imitate: maximise the likelihood of the teacher's samples, which lowers KL(T || G). Returns params (2,).

    L = -mean log p_G(y_t), y_t ~ p_T      (sequence-level distillation, arXiv 2511.10643, A.2)

    Here: each step sees fresh teacher samples, as if the data set never ran out.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = teacher_probs()
    params = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = Adam([params], lr=student_rate)
    for step in range(steps):
        _decay(optimizer, student_rate, step / steps)
        logprobs = bell_logprobs(*params)[_sample(teacher, samples, generator)]
        _update(optimizer, sft_loss(logprobs, torch.ones_like(logprobs)))
    return params.detach()


def oracle(start: Tensor, steps: int = 2500, *, student_rate: float = 0.01) -> Tensor:
    """Descend the exact KL(G || T) from `start`: the game with a perfect discriminator and endless samples.

    Deterministic; the same optimizer and rates as `play`. Finds a local optimum, like the game. params (2,) -> (2,).
    """
    teacher = teacher_probs()
    params = start.clone().requires_grad_()
    optimizer = Adam([params], lr=student_rate)
    for step in range(steps):
        _decay(optimizer, student_rate, step / steps)
        _update(optimizer, kl(student_probs(params), teacher))
    return params.detach()


def play(
    steps: int,
    seed: int,
    *,
    start: Tensor | None = None,
    student_rate: float = 0.01,
    discriminator_rate: float = 0.1,
    frozen: bool = False,
    warmup_steps: int = 500,
    final_fraction: float = 0.1,
    scale_rewards: str = "none",
    samples: int = 64,
) -> Iterator[dict[str, Any]]:
    """Play the game, student against discriminator, and yield a dict of metrics after each step.

    max_G min_D E -log σ(D(y_t) - D(y_s))      (arXiv 2511.10643, Eq 1); D is a table of 60 scores

    The student starts from `start`, by default `seqkd(seed)`; D first trains on it alone for `warmup_steps`. With
    `frozen` D never moves again. The student's rate falls linearly to `final_fraction` of itself; D's stays.
    Yields student_metrics and step, reward (mean score), reward_std, discriminator/accuracy (share of pairs that the D
    of before the update ranks right, a tie as half), student_probs (60,), scores (60,). All draws come from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = teacher_probs()
    params = (seqkd(seed) if start is None else start).clone().requires_grad_()
    scores = torch.zeros(len(CATEGORIES), dtype=torch.float64, requires_grad=True)
    student, discriminator = Adam([params], lr=student_rate), Adam([scores], lr=discriminator_rate)

    for step in range(-warmup_steps, steps):
        y_t = _sample(teacher, samples, generator)
        y_s = _sample(student_probs(params.detach()), samples, generator)
        rewards = scores.detach()[y_s]  # the scores of before this step's update
        accuracy = ((scores.detach()[y_t].unsqueeze(1) - rewards).sign().mean() + 1) / 2  # ties count half
        if step < 0 or not frozen:
            # One prompt, so every teacher completion may meet every student completion: (B,) against (B, N).
            _update(discriminator, bradley_terry_loss(scores[y_t], scores[y_s].expand(samples, samples)))
        if step < 0:
            continue
        _decay(student, student_rate, step / steps, final_fraction)
        advantages = group_advantages(rewards.unsqueeze(0), scale_rewards).squeeze(0)
        logprobs = bell_logprobs(*params)[y_s].unsqueeze(1)
        _update(student, grpo_loss(logprobs, advantages, torch.ones_like(logprobs)))
        yield {
            "step": step + 1,
            **student_metrics(params),
            "reward": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "discriminator/accuracy": accuracy.item(),
            "student_probs": student_probs(params.detach()),
            "scores": scores.detach().clone(),
        }


def _sample(probs: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(probs, samples, replacement=True, generator=generator)


def _decay(optimizer: Optimizer, rate: float, progress: float, final_fraction: float = 0.1) -> None:
    """Set the rate on the straight line from `rate` (progress 0) to `final_fraction * rate` (progress 1)."""
    optimizer.param_groups[0]["lr"] = rate * (1 - progress * (1 - final_fraction))


def _update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
