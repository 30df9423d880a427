"""float16 with a scaled loss: gradients against float32's, overflows skipped, counted and survived, resumed exactly; dtype auto."""

import functools
import json

import pytest
import torch
from conftest import shake, tiny_config, tiny_folder

from minigad import run as run_module
from minigad.chat import encode
from minigad.config import PRESETS, GADConfig, UserError
from minigad.discriminator import Discriminator
from minigad.losses import sft_loss
from minigad.precision import MAX_SKIPPED, LossScale, choose_dtype, settled
from minigad.reading import read_run
from minigad.run import distill
from minigad.student import Student
from minigad.train import fit_teacher_text, gad

PAIRS = [("ab", "cd ef"), ("a longer prompt", "gh"), ("x", "ijkl mnop"), ("yz", "q")]
DATA = {"prompt": [p for p, _ in PAIRS], "completion": [c for _, c in PAIRS]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def half(folder, **changes):
    config = tiny_config(student=str(folder), dtype="float16", **changes)
    student = Student.load(config)
    shake(student)
    return student, config


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_goes_by_the_compute_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert choose_dtype(16)[0] == dtype
    assert f"{capability[0]}.{capability[1]}" in choose_dtype(16)[1]
    assert choose_dtype(0)[0] == "float32"
    assert settled(PRESETS["qwen2.5-7b"]).dtype == dtype
    assert settled(PRESETS["qwen2.5-7b"].replace(dtype="float32")).dtype == "float32"


def test_check_says_what_auto_means_here_and_why(monkeypatch, capsys):
    from minigad.cli import main

    assert main(["check"]) == 0
    assert "bfloat16: a CPU computes in it" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert main(["check"]) == 0
    assert "float16: this GPU's compute capability is 7.5" in capsys.readouterr().out


def test_training_all_weights_in_sixteen_bits_is_refused():
    with pytest.raises(UserError, match="'float16' but lora_r is 0"):
        GADConfig(dtype="float16")


def test_small_gradients_live_and_are_those_of_float32(folder):
    """Times 1e-7 most of these gradients are below what float16 can hold; scaled, they keep their direction and their size."""
    exact = Student.load(tiny_config(student=str(folder)))
    shake(exact)

    def gradient(model, backward):
        rows = [encode(model.tokenizer, p, c) for p, c in PAIRS]
        optimizer = torch.optim.SGD(list(model.parameters().values()), lr=0.0)
        with model.active(train=True):
            backward(model, 1e-7 * sft_loss(*model.logprobs(rows)))
        seen = []
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]))
        )
        model.loss_scale.step(optimizer, list(model.parameters().values()), 1e9)
        return seen[0].double()

    truth = gradient(exact, lambda model, loss: loss.backward())
    scaled = gradient(half(folder)[0], lambda model, loss: model.loss_scale.backward(loss))
    plain = half(folder)[0]
    plain.loss_scale = LossScale("cpu", enabled=False)
    lost = gradient(plain, lambda model, loss: loss.backward())
    assert torch.cosine_similarity(truth, scaled, 0) > 0.999
    assert scaled.norm().item() == pytest.approx(truth.norm().item(), rel=1e-2)
    assert (lost == 0).float().mean() > 0.3


def overflowing(monkeypatch, scale=2.0**30, interval=2):
    """Let every scale begin so high that the first steps overflow."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=scale, growth_interval=interval)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


def test_a_step_that_overflows_moves_nothing_and_is_counted_and_said(folder, monkeypatch, capsys):
    overflowing(monkeypatch)
    student, config = half(folder, warmup_batch_size=4)
    before = torch.cat([p.detach().flatten().clone() for p in student.parameters().values()])
    steps, moved = [], []
    for metrics in fit_teacher_text(student, DATA, config, "warmup", 30.0, 1e-2):
        steps.append(metrics)
        moved.append(not torch.equal(before, torch.cat([p.detach().flatten() for p in student.parameters().values()])))
    skipped = [m["skipped_steps"] for m in steps]
    first = moved.index(True)
    assert 0 < first < MAX_SKIPPED
    assert skipped[: first + 1] == [
        *range(1, first + 1),
        first,
    ]  # each skipped step counts one, the first good one none
    assert [m["loss_scale"] for m in steps[:first]] == [2.0 ** (29 - i) for i in range(first)]
    assert all(m["grad_norm"] == 0 for m in steps[:first]) and steps[first]["grad_norm"] > 0
    assert capsys.readouterr().err.count("float16 gradients overflowed; the update was skipped") == skipped[-1]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3  # and then it learns


def test_too_many_in_a_row_stop_the_run(folder, monkeypatch):
    overflowing(monkeypatch, scale=2.0**120)
    student, config = half(folder, warmup_batch_size=4)
    done = []
    with pytest.raises(FloatingPointError, match=f"{MAX_SKIPPED} steps in a row .* loss scale of 1.26765e"):
        done.extend(metrics for metrics in fit_teacher_text(student, DATA, config, "warmup", 30.0, 1e-2))


def test_without_float16_a_gradient_that_is_not_finite_stops_at_once():
    weight = torch.nn.Parameter(torch.ones(2))
    (weight * float("inf")).sum().backward()
    with pytest.raises(FloatingPointError, match="gradient norm is"):
        LossScale("cpu", enabled=False).step(torch.optim.SGD([weight], lr=1.0), [weight], 1.0)
    assert weight.tolist() == [1.0, 1.0]


def test_both_players_updates_are_scaled(folder):
    from datasets import Dataset

    student, config = half(folder, max_steps=2, per_device_train_batch_size=2, num_generations=2, learning_rate=1e-2)
    discriminator = Discriminator.load(config, student)
    steps = list(gad(student, discriminator, Dataset.from_dict(DATA), config))
    for name in ("", "discriminator/"):
        assert steps[-1][f"{name}loss_scale"] == 65536.0
        assert steps[-1][f"{name}skipped_steps"] == 0
        assert steps[-1][f"{name}grad_norm"] > 0
    assert student.loss_scale is not discriminator.language_model.loss_scale


def test_a_resumed_run_has_the_scales_of_one_that_was_never_stopped(folder, tmp_path, monkeypatch):
    """They grow every second step and overflow again: what is skipped depends on where the scale and its counter stand."""
    overflowing(monkeypatch, scale=2.0**30)
    monkeypatch.setattr(run_module, "write_report", lambda folder: (folder / "report.html").write_text("page"))
    settings = {"warmup_batch_size": 3, "per_device_train_batch_size": 2, "num_generations": 2, "warmup_epochs": 8.0}
    more = {"discriminator_warmup_steps": 3, "max_steps": 9, "save_steps": 4, "eval_fraction": 0.3}
    config = tiny_config(student=str(folder), dtype="float16", **settings, **more)
    rows = [{"prompt": f"{p}{i}", "completion": c} for i in range(2) for p, c in PAIRS]

    def play(name, kill=None):
        def progress(stream, totals):
            for number, metrics in enumerate(stream):
                if number == kill:
                    raise KeyboardInterrupt
                yield metrics

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "progress", progress)
            distill(config.replace(output_dir=str(tmp_path / name)), rows, resume=True)

    play("whole")
    metrics = read_run(tmp_path / "whole")["metrics"]
    scales = [m["loss_scale"] for m in metrics if "loss_scale" in m]
    assert scales != sorted(scales, reverse=True) and metrics[-1]["skipped_steps"] > 0  # grew and shrank
    kills = (6, 9, 5)  # steps after each start
    for kill in kills:
        with pytest.raises(KeyboardInterrupt):
            play("killed", kill)
    play("killed")
    times = {"step_time", "tokens_per_second"}
    mine, theirs = (
        [json.dumps({k: v for k, v in m.items() if k not in times}) for m in read_run(tmp_path / name)["metrics"]]
        for name in ("whole", "killed")
    )
    assert mine == theirs
    weights = [(tmp_path / name / "student" / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.gpu
def test_a_gpu_learns_in_float16(folder):
    student, config = half(folder, warmup_batch_size=4, quantization="nf4", gradient_checkpointing=True)
    steps = list(fit_teacher_text(student, DATA, config, "warmup", 30.0, 1e-2))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert student.loss_scale.scaler.get_scale() == 65536.0
