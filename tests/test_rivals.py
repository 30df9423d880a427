"""ORPO-Distill and DIAL on the toy: whose text is preferred, and what each round begins with."""

import math

import pytest
import torch

from minigad import rivals
from minigad.chat import encode, encode_all
from minigad.config import PRESETS
from minigad.discriminator import Discriminator
from minigad.rivals import dial, orpo
from minigad.step import _sft_backward
from minigad.student import Student
from minigad.toy.letters import letters_dataset, letters_tokenizer

CONFIG = PRESETS["toy"].replace(
    max_completion_length=16, warmup_batch_size=32, per_device_train_batch_size=8, num_generations=4
)


@pytest.fixture(scope="module")
def data():
    return letters_dataset(128, 0)


def make_student():
    return Student.load(CONFIG, tokenizer=letters_tokenizer())


def gradients(student):
    found = [p.grad.clone() for p in student.parameters().values() if p.grad is not None]
    for p in student.parameters().values():
        p.grad = None
    return found


def test_orpo_without_its_preference_is_cross_entropy(data):
    student = make_student()
    rows = encode_all(student.tokenizer, data["prompt"][:8], data["completion"][:8], CONFIG)
    rejected = encode_all(student.tokenizer, data["prompt"][:8], data["completion"][8:16], CONFIG)
    _sft_backward(student, rows, CONFIG, sum(len(row.completion_ids) for row in rows))
    expected = gradients(student)
    rivals._orpo_backward(student, rows, rejected, 0.0, CONFIG)
    torch.testing.assert_close(gradients(student), expected)


def test_orpos_gradient_does_not_depend_on_the_token_budget(data):
    student = make_student()
    rows = encode_all(student.tokenizer, data["prompt"][:8], data["completion"][:8], CONFIG)
    rejected = encode_all(student.tokenizer, data["prompt"][:8], data["completion"][8:16], CONFIG)
    whole = rivals._orpo_backward(student, rows, rejected, 0.7, CONFIG)
    expected = gradients(student)
    parts = rivals._orpo_backward(student, rows, rejected, 0.7, CONFIG.replace(token_budget=64))
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(gradients(student), expected, rtol=1e-4, atol=1e-6)


def test_orpo_learns_the_teachers_text_and_shuns_its_own(data):
    student = make_student()
    first = student.generate(list(data["prompt"]), CONFIG, seed=0).rows
    rows = encode_all(student.tokenizer, list(data["prompt"]), list(data["completion"]), CONFIG)

    def gap():
        means = [
            student.logprobs_of(side).sum(1) / torch.tensor([len(r.completion_ids) for r in side])
            for side in (rows, first)
        ]
        return (means[0] - means[1]).mean()

    before = gap()
    steps = list(orpo(student, data, CONFIG, epochs=5, learning_rate=3e-3, weight=1.0))
    assert len(steps) == 20
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert gap() > before + 0.5
    assert steps[-1]["sft_loss"] < steps[0]["sft_loss"] - 0.3


def test_half_of_the_rejected_texts_are_fresh(data):
    student = make_student()
    kept = rivals._samples(student, data, range(len(data)), CONFIG, "orpo/first")
    mixed = [rivals._mixed(student, data, kept, 0.5, CONFIG, epoch) for epoch in (1, 2)]
    changed = [{i for i, (a, b) in enumerate(zip(kept, rows, strict=True)) if a != b} for rows in mixed]
    assert all(0.4 * len(kept) < len(rows) <= 0.5 * len(kept) for rows in changed)
    assert changed[0] != changed[1]
    assert all(a.prompt_ids == b.prompt_ids for a, b in zip(kept, mixed[0], strict=True))


def test_dial_prefers_what_the_discriminator_ranks_first(data):
    student = make_student()
    discriminator = Discriminator.load(CONFIG, student)
    rollouts = student.generate(list(data["prompt"][:8]), CONFIG, seed=1, num_generations=4)
    pairs = rivals._ranked(discriminator, rollouts)
    assert 6 <= len(pairs) <= 8
    for best, worst in pairs:
        group = [i for i, row in enumerate(rollouts.rows) if row.prompt_ids == best.prompt_ids]
        texts = discriminator.encode(
            [rollouts.prompts[i // 4] for i in group],
            [rollouts.texts[i] for i in group],
            [rollouts.finished[i] for i in group],
        )
        scores = dict(zip(group, discriminator.scores_of(texts).scores.tolist(), strict=True))
        ranked = sorted(group, key=scores.get)
        assert rollouts.rows[ranked[-1]] == best
        assert rollouts.rows[ranked[0]] == worst


def test_each_round_of_dial_begins_with_the_same_discriminator(data, monkeypatch):
    student = make_student()
    config = CONFIG.replace(discriminator_learning_rate=1e-2)
    discriminator = Discriminator.load(config, student)
    step, seen = rivals.discriminator_step, []

    def watched(judge, *rest):
        seen.append([p.detach().clone() for p in judge.parameters()])
        return step(judge, *rest)

    monkeypatch.setattr(rivals, "discriminator_step", watched)
    before = [p.detach().clone() for p in student.parameters().values()]
    steps = list(dial(student, discriminator, data, config, rounds=2, prompts_a_round=32))
    assert len(seen) == 8  # two rounds of four batches
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[3], strict=True))
    assert {step["phase"] for step in steps} == {"dial_discriminator", "dial"}
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters().values(), strict=True))
    assert student.reference is not None
    row = encode(student.tokenizer, "abc", "a,b,c.")
    assert student.logprobs_of([row]).sum() != student.reference.logprobs_of([row]).sum()
