"""What tests/test_vllm.py asks of a real vLLM, in its environment: prints one line of JSON.

MINIGAD_VLLM_PYTHON tests/vllm_worker.py bfloat16|float32 none|nf4
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
import torch
from conftest import shake
from datasets import Dataset

from minigad.config import PRESETS
from minigad.discriminator import Discriminator
from minigad.student import Student
from minigad.train import gad
from minigad.vllm_sampler import VLLMEngine, VLLMSampler

PROMPTS = ["Name a colour.", "Tell me a short story about a lighthouse keeper.", "What is the capital of France?"]
CONFIG = PRESETS["smollm2-135m"].replace(
    sampler="vllm", lora_r=8, max_prompt_length=64, max_completion_length=32, num_generations=4, max_steps=2,
    per_device_train_batch_size=2, learning_rate=1e-3,
)  # fmt: skip
LONG = CONFIG.replace(max_completion_length=192)  # what the engine has room for
STARTS = []


def start(config):
    """Start an engine and note how long it took."""
    began = time.perf_counter()
    engine = VLLMEngine(config)
    STARTS.append(time.perf_counter() - began)
    return engine


def mismatch(student, rollouts):
    """Mean absolute difference of the recorded log-probabilities to the trainer's own, nats a token."""
    own = student.logprobs_of(rollouts.rows, CONFIG.temperature).cpu()
    tokens = sum(len(row.completion_ids) for row in rollouts.rows)
    return (own - rollouts.logprobs).abs().sum().item() / tokens


def rollouts(student, prompts=PROMPTS, seed=0, **changes):
    """Sample; return the rollouts and completion tokens a second."""
    began = time.perf_counter()
    made = student.generate(prompts, CONFIG.replace(**changes), seed=seed, num_generations=CONFIG.num_generations)
    return made, sum(len(row.completion_ids) for row in made.rows) / (time.perf_counter() - began)


def descendants(parent):
    """Ids of the processes that this one started, and those that they started."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.splitlines()
    children = [int(pid) for pid, ppid in map(str.split, lines[1:]) if int(ppid) == parent]
    return [one for child in children for one in (child, *descendants(child))]


def kill_engine():
    """Kill every process of the engine, as a machine without memory would."""
    for pid in descendants(os.getpid()):
        if "EngineCore" in title(pid):
            os.kill(pid, signal.SIGKILL)


def title(pid):
    """Command line and name of a process, either of which an engine sets to its own."""
    folder = Path(f"/proc/{pid}")
    try:
        return (folder / "cmdline").read_text(errors="replace") + (folder / "comm").read_text(errors="replace")
    except OSError:  # it has ended
        return ""


def probe(student, seen):
    """Sample with two adapters in turn and compare what the engine recorded with what the trainer computes."""
    rollouts(student)  # the first call is slower
    fresh, _ = rollouts(student)
    seen["fresh_mismatch"] = mismatch(student, fresh)
    shake(student, 0.02)
    changed, seen["vllm_tokens_per_second"] = rollouts(student)
    seen["changed_mismatch"] = mismatch(student, changed)
    seen["stale_mismatch"] = mismatch(student, fresh)  # the old adapter's log-probabilities against the new weights
    seen["changed_rows"] = sum(a != b for a, b in zip(fresh.texts, changed.texts, strict=True)) / len(fresh.rows)
    twice, _ = rollouts(student, [PROMPTS[1]] * 3, seed=5)
    seen["different_of_12"] = len({row.completion_ids for row in twice.rows})


def play(student, seen):
    """Play two steps of the game with the engine."""
    data = Dataset.from_list([{"prompt": prompt, "completion": "Blue."} for prompt in PROMPTS])
    steps = gad(student, Discriminator.load(CONFIG, student), data, CONFIG)
    seen["steps"] = [{k: v for k, v in step.items() if isinstance(v, (int, float))} for step in steps]


def kill(student, seen):
    """Kill the engine in the middle of a step."""
    before = len(STARTS)
    timer = threading.Timer(1.0, kill_engine)
    timer.start()
    survived, _ = rollouts(student, PROMPTS, seed=9, max_completion_length=LONG.max_completion_length)
    timer.join()
    seen["restarts"], seen["survived_rows"] = len(STARTS) - before, len(survived.rows)
    seen["survived_mismatch"] = mismatch(student, survived)


def main():
    """Exercise the sampler in the dtype and the bits that are named, and print what was seen."""
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    config = LONG.replace(dtype=sys.argv[1], quantization=sys.argv[2], output_dir=folder.name)
    student, seen = Student.load(config), {"dtype": config.dtype, "quantization": config.quantization}
    with folder, VLLMSampler(config, start, student) as student.sampler:
        seen["copies"] = [path.name for path in Path(folder.name).iterdir() if path.is_dir()]
        probe(student, seen)
        if config.dtype == "bfloat16":
            play(student, seen)
        if config.dtype == "bfloat16" and config.quantization == "none":
            kill(student, seen)
    student.sampler = None
    _, seen["transformers_tokens_per_second"] = rollouts(student)
    seen["start_seconds"] = STARTS
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
