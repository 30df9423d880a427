"""The sampler: exact draws that do not depend on how the work is split, honest log-probabilities, merged weights."""

import math

import pytest
import torch
from conftest import shake, tiny_config, tiny_folder

from minigad import rollout
from minigad.chat import encode_prompt
from minigad.rollout import SamplingParams, _draw, generate, sample
from minigad.student import Student
from minigad.toy.model import toy_model, toy_tokenizer

PROMPTS = ["ab", "abcabcabcabcabcabc", "c", "bbcabc"]  # of several lengths, to be padded


@pytest.fixture(scope="module")
def student():
    tokenizer = toy_tokenizer("abc")  # few symbols, so that rows end at different times
    return Student(toy_model("toy", tokenizer, 3), tokenizer)


def ids_of(model, **changes):
    params = {"num_generations": 3, "max_completion_length": 40, "seed": 1, "temperature": 1.3} | changes
    return [row.completion_ids for row in generate(model, PROMPTS, **params).rows]


def test_draws_follow_the_distribution_to_its_tail():
    logits = torch.tensor([[0.0, 2.0, -1.0, -8.0]]).repeat(200_000, 1)
    uniforms = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = _draw(logits, uniforms, 2.0)
    p = (logits[0] / 2.0).softmax(0)
    counts = torch.bincount(tokens, minlength=4)
    chi2 = ((counts - 200_000 * p) ** 2 / (200_000 * p)).sum().item()
    assert chi2 < 16.3, (counts, p)  # 3 degrees of freedom, one in a thousand
    assert torch.allclose(logprobs, p.log()[tokens])


def test_a_token_of_probability_zero_is_never_drawn_even_at_the_edges():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for u, expected in ((0.0, 1), (0.499999, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert _draw(logits, torch.tensor([u], dtype=torch.float64), 1.0)[0].item() == expected


def test_neither_the_budget_nor_departures_change_a_draw(student, monkeypatch):
    whole = ids_of(student)
    assert len({len(ids) for ids in whole}) > 3, "the test needs rows that end at different times"
    assert ids_of(student, token_budget=1) == whole
    for share in (0.0, 1.1):
        monkeypatch.setattr(rollout, "DEPARTURE", share)
        assert ids_of(student) == whole


def test_a_prompt_is_read_once_and_a_row_that_ended_no_more(student, monkeypatch):
    monkeypatch.setattr(rollout, "DEPARTURE", 0.0)  # at once
    seen = []
    hook = student.model.base_model.register_forward_hook(
        lambda _module, _args, kwargs, _output: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    spoken = ids_of(student)
    hook.remove()
    assert seen[0] == (len(PROMPTS), max(len(encode_prompt(student.tokenizer, prompt)) for prompt in PROMPTS))
    still = [sum(len(ids) > step for ids in spoken) for step in range(1, max(map(len, spoken)))]
    assert seen[1:] == [(rows, 1) for rows in still]
    assert still[-1] < still[0]


def test_rows_of_one_prompt_differ_and_another_seed_gives_other_draws(student):
    whole = ids_of(student)
    assert len(set(whole)) > len(PROMPTS)
    assert ids_of(student, seed=2) != whole


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_a_full_forward_pass(student, temperature):
    rollouts = generate(student, PROMPTS, num_generations=3, max_completion_length=30, seed=0, temperature=temperature)
    again = student.logprobs_of(rollouts.rows, temperature)
    assert torch.allclose(rollouts.logprobs, again, atol=2e-5), (rollouts.logprobs - again).abs().max()


def test_greedy_is_what_transformers_generates(student):
    mine = generate(student, PROMPTS, max_completion_length=20, seed=0, temperature=0.0)
    for prompt, row in zip(PROMPTS, mine.rows, strict=True):
        ids = torch.tensor([encode_prompt(student.tokenizer, prompt)])
        theirs = student.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20,
            eos_token_id=student.tokenizer.eos_token_id, pad_token_id=student.tokenizer.pad_token_id,
        )  # fmt: skip
        expected = theirs[0, ids.shape[1] :].tolist()
        assert list(row.completion_ids) == expected


def lora_student(folder):
    model = Student.load(tiny_config(student=str(tiny_folder(folder))))
    shake(model)
    return model


def test_merged_weights_give_the_adapters_distribution_and_leave_no_trace(tmp_path):
    model = lora_student(tmp_path)
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    prompts = [encode_prompt(model.tokenizer, p) for p in PROMPTS]
    plain = sample(model, prompts, SamplingParams(2, 1.0, 20, 0, 10_000))
    folded = sample(model, prompts, SamplingParams(2, 1.0, 20, 0, 10_000, merged=True))
    assert [one.ids for one in plain] == [one.ids for one in folded]
    gaps = [abs(a - b) for x, y in zip(plain, folded, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)]
    assert max(gaps) < 1e-4, max(gaps)
    after = dict(model.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with model.model.disable_adapter():  # the adapter matters: without it the draws are others
        bare = sample(model, prompts, SamplingParams(2, 1.0, 20, 0, 10_000))
    assert [one.ids for one in bare] != [one.ids for one in plain]


def test_merged_weights_go_away_after_an_error(tmp_path):
    model = lora_student(tmp_path)
    names = [name for name, _ in model.model.named_modules()]
    with pytest.raises(RuntimeError, match="stop"), model.merged():
        raise RuntimeError("stop")
    assert [name for name, _ in model.model.named_modules()] == names


@pytest.mark.parametrize(("offset", "factor"), [(0.5, math.exp(-0.5)), (-0.3, math.exp(0.3)), (-3.0, 2.0)])
def test_importance_weights_scale_the_gradient_and_are_capped(student, offset, factor):
    """A sampler that is off by a constant log-probability: every token's weight is its exponential, at most 2."""
    from minigad.config import PRESETS
    from minigad.train import student_step

    config = PRESETS["toy"].replace(learning_rate=0.0, max_grad_norm=1e6)
    rollouts = generate(student, PROMPTS, num_generations=2, max_completion_length=12, seed=0)
    exact = student.logprobs_of(rollouts.rows)
    advantages = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))

    def norm(sampled):
        optimizer = torch.optim.SGD(student.model.parameters(), lr=0.0)
        return student_step(student, optimizer, rollouts.rows, advantages, config, (), sampled)

    plain, weighted = norm(None), norm(exact + offset)
    assert weighted["grad_norm"] == pytest.approx(factor * plain["grad_norm"], rel=1e-4)
    assert weighted["sampling/importance_weight"] == pytest.approx(factor, rel=1e-4)
    assert weighted["sampling/logp_difference"] == pytest.approx(abs(offset), rel=1e-4)
