"""A GPU without memory: the step is done again in smaller pieces, with the gradients of a run that had them from the start."""

import pytest
import torch
from conftest import shake, tiny_config, tiny_folder

from minigad import run as run_module
from minigad.chat import encode
from minigad.checkpoint import State
from minigad.config import PRESETS, UserError
from minigad.discriminator import Discriminator
from minigad.fit import shortage
from minigad.model import LanguageModel
from minigad.reading import read_run
from minigad.run import _measure, distill
from minigad.student import Student
from minigad.train import discriminator_step, fit_teacher_text, gad, soda, student_step

PROMPTS = ["ab", "a longer prompt", "x"]
TEACHER = ["cd ef", "gh", "ijkl mnop"]
BUDGET = 64  # a few rows a pass, and half of it fewer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def players(folder, **changes):
    settings = {"num_generations": 2, "token_budget": BUDGET, "beta": 0.01, "sft_weight": 0.1} | changes
    config = tiny_config(student=str(folder), **settings)
    student = Student.load(config)
    shake(student)
    student.freeze_reference()
    discriminator = Discriminator.load(config, student)
    torch.nn.init.normal_(discriminator.head.weight, generator=torch.Generator().manual_seed(0))
    return student, discriminator, config


def exhaust(monkeypatch, *calls, owner=LanguageModel, name="hidden"):
    """Let these calls, counted from 1 over all models, run out of memory after the work is done; return the counter."""
    honest, count = getattr(owner, name), [0]

    def greedy(self, *args, **kwargs):
        count[0] += 1
        result = honest(self, *args, **kwargs)
        if count[0] in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    monkeypatch.setattr(owner, name, greedy)
    return count


def exhaust_each(monkeypatch):
    """Let the first training pass of every player run out of memory."""
    honest, seen = LanguageModel.hidden, []

    def greedy(self, rows):
        result = honest(self, rows)
        if torch.is_grad_enabled() and self not in seen:
            seen.append(self)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(LanguageModel, "hidden", greedy)
    return seen


def watched(parameters):
    """An optimizer that moves nothing and keeps the gradients it is given."""
    optimizer, seen = torch.optim.SGD(parameters, lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in parameters]))
    return optimizer, seen


def student_gradients(folder, budget):
    student, _, config = players(folder, token_budget=budget, beta=0.0)  # the reference has a budget of its own
    rollouts = student.generate(PROMPTS, config, seed=0, num_generations=2)
    rows = [encode(student.tokenizer, p, c) for p, c in zip(PROMPTS, TEACHER, strict=True)]
    width = max(len(row.completion_ids) for row in rollouts.rows)
    advantages = torch.randn(6, width, generator=torch.Generator().manual_seed(2))
    optimizer, seen = watched(list(student.parameters().values()))
    metrics = student_step(student, optimizer, rollouts.rows, advantages, config, rows, rollouts.logprobs)
    return seen, metrics


def judge_gradients(folder, budget):
    student, discriminator, config = players(folder, token_budget=budget)
    rollouts = student.generate(PROMPTS, config, seed=0, num_generations=2)
    optimizer, seen = watched(discriminator.parameters())
    _, metrics = discriminator_step(discriminator, optimizer, rollouts, TEACHER)
    return seen, metrics


def sft_gradients(folder, budget):
    student, _, config = players(folder, token_budget=budget, warmup_batch_size=3)
    seen, before = [], torch.optim.AdamW.step
    data = {"prompt": PROMPTS, "completion": TEACHER}

    def step(self, *args, **kwargs):
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        return before(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        (metrics,) = fit_teacher_text(student, data, config, "warmup", 1.0, 1e-3)
    return seen, metrics


@pytest.mark.parametrize(
    ("gradients", "call"),
    [(student_gradients, 1), (student_gradients, 2), (judge_gradients, 1), (judge_gradients, 2), (sft_gradients, 1)],
)
def test_a_step_that_ran_out_of_memory_has_the_gradients_of_half_the_budget(
    folder, monkeypatch, capsys, gradients, call
):
    expected, wanted = gradients(folder, BUDGET // 2)
    whole, _ = gradients(folder, BUDGET)
    assert any(not torch.equal(a, b) for a, b in zip(whole[0], expected[0], strict=True)), "the budget must matter"
    with monkeypatch.context() as patch:
        exhaust(patch, call)
        mine, metrics = gradients(folder, BUDGET)
    assert len(mine) == len(expected) == 1
    assert all(torch.equal(a, b) for a, b in zip(mine[0], expected[0], strict=True))
    timed = {"step_time", "tokens_per_second"}
    assert {k: v for k, v in metrics.items() if k not in timed} == {k: v for k, v in wanted.items() if k not in timed}
    said = capsys.readouterr().err
    assert said.count("out of GPU memory") == 1
    assert f"halved to {BUDGET // 2}" in said


def test_when_half_the_budget_is_too_much_as_well_one_sentence_ends_the_run(folder, monkeypatch):
    student, discriminator, config = players(folder)
    rollouts = student.generate(PROMPTS, config, seed=0, num_generations=2)
    exhaust(monkeypatch, *range(100))
    judge, seen = watched(discriminator.parameters())
    with pytest.raises(
        UserError, match=r"out of GPU memory in the discriminator update.*what helps: .*--resume"
    ) as error:
        discriminator_step(discriminator, judge, rollouts, TEACHER)
    assert str(error.value).count(" --") >= 3
    assert seen == []  # nothing was updated


def test_the_budget_is_halved_once_and_stays_halved(folder, monkeypatch):
    student, _, config = players(folder, sft_weight=0.0, beta=0.0)
    rows = [encode(student.tokenizer, p, c) for p, c in zip(PROMPTS, TEACHER, strict=True)]
    optimizer, _ = watched(list(student.parameters().values()))
    advantages = torch.ones(3, max(len(row.completion_ids) for row in rows))
    exhaust(monkeypatch, 1)
    student_step(student, optimizer, rows, advantages, config)
    assert student.within(BUDGET) == BUDGET // 2
    count = exhaust(monkeypatch, 1)
    with pytest.raises(UserError, match="out of GPU memory in the student update"):
        student_step(student, optimizer, rows, advantages, config)
    assert count[0] == 1  # not tried a third time


def test_an_optimizer_step_that_ran_out_of_memory_is_never_done_twice(folder, monkeypatch):
    student, discriminator, config = players(folder)
    rollouts = student.generate(PROMPTS, config, seed=0, num_generations=2)
    judge, seen = watched(discriminator.parameters())
    judge.register_step_post_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(UserError, match=r"out of GPU memory in the optimizer step.*last checkpoint"):
        discriminator_step(discriminator, judge, rollouts, TEACHER)
    assert len(seen) == 1


def test_rollouts_are_the_same_when_they_had_to_be_sampled_in_smaller_parts(folder, monkeypatch):
    from minigad.train import _rollouts

    student, _, config = players(folder)
    before = _rollouts(student, PROMPTS, config, "gad", 0)
    exhaust(monkeypatch, 3, name="read")
    after = _rollouts(student, PROMPTS, config, "gad", 0)
    assert student.halved
    assert [row.completion_ids for row in after.rows] == [row.completion_ids for row in before.rows]


HELD_OUT = [{"prompt": f"{prompt}{i}", "completion": c} for i in range(3) for prompt, c in zip(PROMPTS, TEACHER, strict=True)]  # fmt: skip


@pytest.mark.parametrize(("name", "owner"), [("read", "student"), ("hidden", "student"), ("hidden", "discriminator")])
def test_an_evaluation_goes_on_in_smaller_parts_and_finds_the_same(folder, monkeypatch, capsys, name, owner):
    """Sampling, the student's likelihoods, and the discriminator's opinions: whichever ran out is done again, alone."""
    from datasets import Dataset

    held_out = Dataset.from_list(HELD_OUT)

    def measure(budget, greedy):
        student, discriminator, config = players(folder, token_budget=budget)
        model = student if owner == "student" else discriminator.language_model
        honest, left = getattr(LanguageModel, name), [1 if greedy else 0]

        def once(self, *args, **kwargs):
            result = honest(self, *args, **kwargs)
            if self is model and left[0]:
                left[0] = 0
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(LanguageModel, name, once)
            found = _measure(State(student, discriminator), held_out, held_out, config, stopped=False)
        halved = [one.halved for one in (student, discriminator.language_model)]
        return found, halved

    (findings, evaluation), halved = measure(BUDGET, greedy=True)
    assert halved == [owner == "student", owner == "discriminator"]
    said = capsys.readouterr().err
    assert said.count("out of GPU memory in the") == 1 and f"halved to {BUDGET // 2}, and it goes on" in said
    (wanted_findings, wanted), _ = measure(BUDGET // 2, greedy=False)
    assert [f.value for f in findings] == pytest.approx([f.value for f in wanted_findings], abs=1e-5)
    assert evaluation[0] == pytest.approx(wanted[0], abs=1e-5)
    assert [row["student"] for row in evaluation[1]] == [row["student"] for row in wanted[1]]


def test_a_run_whose_evaluation_had_no_room_at_all_keeps_its_players_and_is_measured_later(
    folder, tmp_path, monkeypatch
):
    settings = {"warmup_batch_size": 3, "per_device_train_batch_size": 3, "warmup_epochs": 1.0, "max_steps": 1}
    config = tiny_config(student=str(folder), num_generations=2, discriminator_warmup_steps=1, **settings)
    config = config.replace(output_dir=str(tmp_path / "run"), eval_fraction=0.4)
    measure = run_module._measure

    def full(state, *args, **kwargs):
        with monkeypatch.context() as patch:
            exhaust(patch, *range(1000))
            return measure(state, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_measure", full)
        with pytest.raises(UserError, match=r"out of GPU memory in the reference.*what helps: --.*--resume"):
            distill(config, HELD_OUT)
    weights = (tmp_path / "run" / "student" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "run" / "discriminator").is_dir() and not (tmp_path / "run" / "evaluation.json").exists()
    distill(config, HELD_OUT, resume=True)
    run = read_run(tmp_path / "run")
    assert run["evaluation"]["metrics"]["nll"] > 0
    assert [m["phase"] for m in run["metrics"]].count("gad") == 1  # nothing was trained again
    assert (tmp_path / "run" / "student" / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("method", ["gad", "soda"])
def test_a_run_goes_on_as_one_that_had_the_smaller_budget(folder, monkeypatch, method):
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in zip(PROMPTS, TEACHER, strict=True)])

    def weights(budget):
        steps = {"max_steps": 2, "per_device_train_batch_size": 3, "warmup_batch_size": 3, "dpo_epochs": 2.0}
        student, discriminator, config = players(folder, token_budget=budget, warmup_epochs=0.0, **steps)
        list(gad(student, discriminator, data, config) if method == "gad" else soda(student, data, config))
        return torch.cat([p.detach().flatten() for p in student.parameters().values()])

    expected = weights(BUDGET // 2)
    with monkeypatch.context() as patch:
        seen = exhaust_each(patch)
        mine = weights(BUDGET)
    assert len(seen) == (2 if method == "gad" else 1)
    assert torch.allclose(mine, expected, atol=1e-6)  # the reference keeps the whole budget


def test_the_sentence_names_the_largest_part_of_the_phase_and_what_saves_most_in_it():
    config = PRESETS["qwen2.5-14b"].replace(gradient_checkpointing=False, token_budget=8192)
    said = shortage(config, "student update")
    assert "GB of them activations" in said
    assert said.split("what helps: ")[1].startswith("--gradient-checkpointing")
    assert "KV cache" in shortage(config.replace(gradient_checkpointing=True), "rollout")
    assert "what helps: --" in shortage(config.replace(student="somebody/elses-model"), "rollout")
