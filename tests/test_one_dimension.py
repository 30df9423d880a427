"""The one-dimensional world: its numbers are exact, so theory is tested as equality and the game against an oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minigad.losses import grpo_loss
from minigad.toy.one_dimension import kl, oracle, play, seqkd, student_metrics, student_probs, teacher_probs

STEPS = 1200  # of a game: fewer than the benchmark's 2,500, and enough
CATEGORIES = torch.arange(60, dtype=torch.float64)


@pytest.fixture(scope="module")
def start() -> Tensor:
    return seqkd(0)


@pytest.fixture(scope="module")
def optimum(start: Tensor) -> Tensor:
    return oracle(start)


@pytest.fixture(scope="module")
def best(optimum: Tensor) -> dict[str, float]:
    return student_metrics(optimum)


@pytest.fixture(scope="module")
def game(start: Tensor) -> list[dict[str, Any]]:
    return list(play(STEPS, 0, start=start))


@pytest.fixture(scope="module")
def frozen_game(start: Tensor) -> list[dict[str, Any]]:
    return list(play(STEPS, 0, start=start, frozen=True))


def _moments(probs: Tensor) -> tuple[float, float]:
    mean = (probs * CATEGORIES).sum()
    return mean.item(), (probs * (CATEGORIES - mean) ** 2).sum().sqrt().item()


def _optimal_scores(student: Tensor) -> Tensor:
    """Minimise the exact expectation of Bradley-Terry, sum_ij p_T(i) p_G(j) (-log σ(D_i - D_j)), over the table D."""
    pairs = torch.outer(teacher_probs(), student)
    scores = torch.zeros(60, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -(pairs * logsigmoid(scores.unsqueeze(1) - scores)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return scores.detach()


def _policy_gradient(params: Tensor, scores: Tensor) -> Tensor:
    """Return the exact gradient of E_{y ~ p_G} D(y): grpo_loss over all categories, weighted by p_G."""
    params = params.clone().requires_grad_()
    logprobs = student_probs(params).log()
    probs = logprobs.detach().exp()
    weighted = probs * (scores - (probs * scores).sum())
    ones = torch.ones(60, 1, dtype=torch.bool)
    return -torch.autograd.grad(grpo_loss(logprobs.unsqueeze(1), weighted, ones, num_tokens=1), params)[0]


def _reverse_kl_gradient(params: Tensor) -> Tensor:
    params = params.clone().requires_grad_()
    return torch.autograd.grad(kl(student_probs(params), teacher_probs()), params)[0]


def test_teacher_is_the_stated_mixture() -> None:
    """The teacher sums to 1 and has the probabilities of the formula, computed here with plain floats."""

    def bell(x: int, mean: float, deviation: float) -> float:
        weights = [math.exp(-((i - mean) ** 2) / (2 * deviation**2)) for i in range(60)]
        return weights[x] / sum(weights)

    teacher = teacher_probs()
    assert teacher.sum().item() == pytest.approx(1.0, abs=1e-12)
    for x in (0, 18, 30, 40, 59):
        expected = 0.99 * (0.7 * bell(x, 18, 4) + 0.3 * bell(x, 40, 2)) + 0.01 / 60
        assert teacher[x].item() == pytest.approx(expected, rel=1e-10), x


def test_kl_by_hand() -> None:
    """KL((1/2, 1/2, 0) || (1/4, 1/4, 1/2)) = log 2, a zero of p adds nothing, and KL(p || p) = 0."""
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert kl(p, q).item() == pytest.approx(math.log(2), rel=1e-6)
    assert kl(q, q).item() == 0.0


def test_metrics_of_a_student_collapsed_to_a_point() -> None:
    """A point on the first mode has all its mass on modes and KL(G || T) = -log p_T(18); KL(T || G) stays finite."""
    metrics = student_metrics(torch.tensor([18.0, math.log(0.1)], dtype=torch.float64))
    assert metrics["mass_on_modes"] == pytest.approx(1.0)
    assert metrics["kl_student_teacher"] == pytest.approx(-math.log(teacher_probs()[18].item()))
    assert 1000 < metrics["kl_teacher_student"] < math.inf


def test_optimal_scores_are_the_log_ratio(start: Tensor) -> None:
    """With the student fixed, the Bradley-Terry table converges to log p_T - log p_G + c."""
    student = student_probs(start)
    offset = _optimal_scores(student) - (teacher_probs().log() - student.log())
    assert (offset - offset.mean()).abs().max().item() < 1e-4


def test_policy_gradient_of_optimal_scores_is_minus_that_of_reverse_kl(start: Tensor) -> None:
    """Exact scores make the policy gradient that of -KL(G || T), at the student D was trained on and only there."""
    scores = _optimal_scores(student_probs(start))
    torch.testing.assert_close(_policy_gradient(start, scores), -_reverse_kl_gradient(start), rtol=1e-4, atol=1e-7)
    moved = start + torch.tensor([-4.0, -0.7], dtype=torch.float64)
    difference = _policy_gradient(moved, scores) + _reverse_kl_gradient(moved)
    assert difference.abs().max().item() > 0.1


def test_sampled_scores_come_near_the_log_ratio(start: Tensor) -> None:
    """The table that `play` trains from samples approaches the same log-ratio, where teacher and student have mass."""
    scores = next(play(1, 0, start=start, discriminator_rate=0.01, warmup_steps=2000))["scores"]
    student = student_probs(start)
    error = scores - (teacher_probs().log() - student.log())
    weight = (teacher_probs() + student) / 2
    error = error - (weight * error).sum()
    assert (weight * error**2).sum().sqrt().item() < 0.2


def test_seqkd_matches_the_moments_of_the_teacher(start: Tensor) -> None:
    """Maximum likelihood in an exponential family gives the teacher's mean and deviation: a blend of both modes."""
    assert _moments(student_probs(start)) == pytest.approx(_moments(teacher_probs()), abs=0.3)


def test_oracle_sits_on_the_heavier_mode(optimum: Tensor, best: dict[str, float]) -> None:
    """Exact descent of reverse KL leaves the blend for N(18, 4), at KL(G || T) 0.36, where its gradient vanishes."""
    assert best["kl_student_teacher"] == pytest.approx(0.36, abs=0.005)
    assert (best["mu"], best["sigma"]) == pytest.approx((18.0, 4.07), abs=0.05)
    assert _reverse_kl_gradient(optimum).abs().max().item() < 1e-3


def test_the_game_finds_what_the_oracle_finds(
    game: list[dict[str, Any]], start: Tensor, best: dict[str, float]
) -> None:
    """GAD lowers KL(G || T) from SeqKD's 0.96 to within 0.02 nats of the oracle's, and pays in KL(T || G)."""
    imitation, last = student_metrics(start), game[-1]
    assert imitation["kl_student_teacher"] > 0.9
    assert last["kl_student_teacher"] == pytest.approx(best["kl_student_teacher"], abs=0.02)
    assert last["kl_teacher_student"] > imitation["kl_teacher_student"] + 1
    assert [metrics["step"] for metrics in game] == list(range(1, STEPS + 1))


def test_a_frozen_discriminator_is_hacked(frozen_game: list[dict[str, Any]], best: dict[str, float]) -> None:
    """Against a fixed reward the student collapses to a point: reward and mass on modes rise, KL(G || T) gets worse."""
    first, last = frozen_game[0], frozen_game[-1]
    assert last["sigma"] < 1.0 < best["sigma"]
    assert last["reward"] > first["reward"] + 1
    assert last["mass_on_modes"] > 0.99
    assert last["kl_student_teacher"] > first["kl_student_teacher"] + 0.5


def test_only_an_unfrozen_discriminator_moves(game: list[dict[str, Any]], frozen_game: list[dict[str, Any]]) -> None:
    """Both games share the warmed-up D; `frozen` keeps its scores for good, the other's change."""
    assert game[0]["reward"] == frozen_game[0]["reward"]
    assert torch.equal(frozen_game[0]["scores"], frozen_game[-1]["scores"])
    assert not torch.equal(game[0]["scores"], game[-1]["scores"])


def test_an_untrained_discriminator_is_at_chance(start: Tensor) -> None:
    """Without warm-up the first scores are all zero: accuracy 0.5, ties counting half, and the student stays."""
    first = next(play(1, 0, start=start, warmup_steps=0))
    assert (first["discriminator/accuracy"], first["reward"], first["reward_std"]) == (0.5, 0.0, 0.0)
    assert torch.equal(first["student_probs"], student_probs(start))


def test_the_students_rate_falls_to_its_final_fraction(start: Tensor) -> None:
    """With Adam a step is at most about the rate, so the student's last steps are shorter than with a constant rate."""

    def last_moves(final_fraction: float) -> float:
        mus = [m["mu"] for m in play(200, 0, start=start, warmup_steps=100, final_fraction=final_fraction)]
        return max(abs(b - a) for a, b in zip(mus[-20:-1], mus[-19:], strict=True))

    assert last_moves(0.01) < 0.2 * last_moves(1.0)


def test_a_seed_reproduces_itself_and_leaves_global_state_alone(start: Tensor) -> None:
    """The same seed gives the same numbers to the last bit, another seed others; torch's own generator is not used."""
    before = torch.random.get_rng_state()
    runs = [list(play(20, seed, start=start, warmup_steps=20)) for seed in (3, 3, 4)]
    assert torch.equal(seqkd(3, 20), seqkd(3, 20))
    assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = ([(m["mu"], m["sigma"], m["reward"]) for m in run] for run in runs)
    assert first == again
    assert first != other
