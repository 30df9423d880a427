"""Two processes with gloo are one process with the whole batch; a dead one is not waited for."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_folder
from parallel_worker import CONFIG, coarse_adam, on_a_base, play
from safetensors.torch import load_file, save_file

from minigad import parallel, train
from minigad.config import UserError
from minigad.data import write_jsonl
from minigad.reading import read_run
from minigad.student import _check_sharding
from minigad.toy.letters import letters_dataset
from minigad.toy.model import toy_tokenizer

WORKER = Path(__file__).parent / "parallel_worker.py"


def launch(folder, kind="sequence", method="gad", die="live", port=29513, **variables):
    """Start two processes as a launcher does."""
    running = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port + os.getpid() % 1000), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables,
        }  # fmt: skip
        command = [sys.executable, str(WORKER), str(folder), kind, method, die]
        running.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    return running


def ends_early(base):
    """Make the end token likely after some prefixes and not after others, so that rows end at different places."""
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][toy_tokenizer().eos_token_id] *= 50
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize(("kind", "method"), [("sequence", "gad"), ("implicit", "gad"), ("sequence", "soda")])
def test_two_processes_are_one_with_the_union_of_their_batches(tmp_path, kind, method):
    for process in launch(tmp_path, kind, method):
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 0, errors
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "the processes drifted apart"
    alone, metrics = play(kind, 4, letters_dataset(128, 0), method)
    gaps = {name: (first[name] - alone[name]).abs().max().item() for name in alone}
    assert max(gaps.values()) < 1e-5, gaps
    together = ast.literal_eval((tmp_path / "metrics.txt").read_text())
    for name in metrics.keys() & together.keys() - {"step_time", "tokens_per_second", "discriminator/length_corr"}:
        assert together[name] == pytest.approx(metrics[name], abs=2e-4), name


@pytest.mark.parametrize(
    "kind",
    ["sequence", pytest.param("prefix", marks=pytest.mark.slow), pytest.param("implicit", marks=pytest.mark.slow)],
)
def test_a_base_that_is_sharded_trains_as_one_that_is_whole(tmp_path, monkeypatch, kind):
    """Two processes hold half of each layer. Their rows differ in length and number of passes, and none waits for ever.

    Against processes that each hold all of it: to the bit. Against one process: to 1e-5, with an Adam that makes no step of a
    gradient that is nothing but rounding.
    """
    weights, base = {}, ends_early(tiny_folder(tmp_path / "base"))
    for asked in ("true", "false"):
        for process in launch(tmp_path, kind, die="fsdp", port=31513, ACCELERATE_USE_FSDP=asked):
            errors = process.communicate(timeout=400)[1]
            assert process.returncode == 0, errors
        weights[asked] = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
        if asked == "true":
            passes = [ast.literal_eval((tmp_path / f"{rank}.passes").read_text()) for rank in range(2)]
    assert passes[0]["counted"] + passes[0]["company"] == passes[1]["counted"] + passes[1]["company"]
    assert all(sum(one[name] for one in passes) > 0 for name in ("company", "silent")), passes
    whole = weights["false"][0]
    assert all(torch.equal(one[name], whole[name]) for one in weights["true"] for name in whole)
    monkeypatch.setattr(train, "make_optimizer", coarse_adam)
    alone, metrics = play(kind, 4, letters_dataset(128, 0), **on_a_base(base))
    gaps = {name: (whole[name] - alone[name]).abs().max().item() for name in alone}
    assert max(gaps.values()) < 1e-5 < CONFIG.learning_rate / 50, gaps  # a fiftieth of one step of Adam
    together = ast.literal_eval((tmp_path / "metrics.txt").read_text())
    for name in metrics.keys() & together.keys() - {"step_time", "tokens_per_second", "discriminator/length_corr"}:
        # the std of a group of equal texts is rounding, and its advantages are divided by the std's floor, 1e-4
        assert together[name] == pytest.approx(metrics[name], rel=1e-4, abs=2e-3 if name == "loss" else 1e-4), name


@pytest.mark.slow
def test_accelerates_own_launcher_distils_on_a_sharded_base_to_the_end(tmp_path):
    """With the file in configs/: weights of process 0 alone, held-out measures, checkpoints, evaluation and report."""
    base, root, data = ends_early(tiny_folder(tmp_path / "base")), Path(__file__).parent.parent, letters_dataset(40, 0)
    rows = [{"prompt": p, "completion": c} for p, c in zip(data["prompt"], data["completion"], strict=True)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)

    def run(name, processes, batch):
        words = [
            "--config_file",
            root / "configs" / "fsdp.yaml",
            "--num_processes",
            processes,
            "-m",
            "minigad",
            "distill",
        ]
        words += [
            "--student",
            base,
            "--data",
            tmp_path / "pairs.jsonl",
            "--output-dir",
            tmp_path / name,
            "--dtype",
            "float32",
        ]
        words += ["--lora-r", 4, "--max-steps", 3, "--per-device-train-batch-size", batch, "--num-generations", 2]
        words += ["--warmup-batch-size", batch, "--warmup-epochs", 0.2, "--discriminator-warmup-steps", 1, "--seed", 1]
        words += ["--max-completion-length", 8, "--max-prompt-length", 64, "--token-budget", 100, "--eval-steps", 2]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", *map(str, words)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(tmp_path / name / "student" / "adapter_model.safetensors")

    alone, together = run("alone", 1, 4), run("together", 2, 2)
    gaps = torch.cat([(together[name] - alone[name]).abs().flatten() for name in alone])
    assert gaps.max() < 2e-4 and gaps.mean() < 1e-6, (gaps.max(), gaps.mean())  # the warm-up's rate
    first, second = (read_run(tmp_path / name) for name in ("alone", "together"))
    for name, value in first["evaluation"]["metrics"].items():
        assert second["evaluation"]["metrics"][name] == pytest.approx(value, abs=1e-3), name
    assert (tmp_path / "together" / "report.html").is_file()


def test_the_file_in_configs_is_what_the_installed_accelerate_reads():
    """By its own loader and its own checks of a launch; what minigad reads of it is in the environment of each process."""
    from accelerate.commands import launch as launcher
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = str(Path(__file__).parent.parent / "configs" / "fsdp.yaml")
    config = load_config_from_file(path)  # refuses a key that it does not know
    assert (config.distributed_type, config.num_processes) == (DistributedType.FSDP, 8)
    words = ["--config_file", path, "-m", "minigad", "distill"]
    args, _, _ = launcher._validate_launch_command(launcher.launch_command_parser().parse_args(words))
    assert (args.use_fsdp, args.num_processes) == (True, 8)
    assert prepare_multi_gpu_env(args)["ACCELERATE_USE_FSDP"] == "true"


def test_what_a_sharded_base_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "sharded", lambda: True)
    for changes in ({"lora_r": 0}, {"quantization": "nf4"}, {"rollout_weights": "merged"}):
        (field,) = changes
        with pytest.raises(UserError, match=f"asks for FSDP, but config field '{field}'"):
            _check_sharding(tiny_config(**changes))


def test_when_a_process_dies_the_others_stop_with_a_sentence(tmp_path):
    """Within a minute of the death: how long a busy machine takes to start two processes is not the question."""
    survivor, victim = launch(tmp_path, die="die", port=30513)
    victim.communicate(timeout=240)
    died = time.monotonic()
    errors = survivor.communicate(timeout=60)[1]
    assert time.monotonic() - died < 60
    assert survivor.returncode != 0
    assert "process 0 of 2 lost another process of this run" in errors
