"""A notebook's cell that trains: stopped, its kernel killed and started again, and run again, it goes on where it was."""

import json
import sys
from pathlib import Path

import pytest

from minigad.reading import read_run

ROOT = Path(__file__).parent.parent
SETUP = """
import torch
torch.set_num_threads(1)
from minigad import run as run_module
run_module.write_report = lambda folder: None
"""
CELL = """
from minigad.config import PRESETS
from minigad.run import distill
from minigad.toy.letters import letters_dataset, letters_tokenizer
config = PRESETS["toy"].replace(
    output_dir={folder!r}, warmup_epochs=0.25, warmup_batch_size=16, discriminator_sft_epochs=0.25, discriminator_warmup_steps=1,
    max_steps=4, num_generations=2, per_device_train_batch_size=2, max_completion_length=8, save_steps=1, ema_decay=0.5,
)
data = letters_dataset(80, 0)
rows = [{{"prompt": p, "completion": c}} for p, c in zip(data["prompt"], data["completion"])]
distill(config, rows[:64], rows[64:], "gad", letters_tokenizer(), resume=True)
"""
SIGNALLED = """
import os, signal
def progress(stream, totals):
    for number, metrics in enumerate(stream):
        if number == 2:
            os.kill(os.getpid(), signal.{name})
        yield metrics
run_module.progress = progress
"""


def run(client, code: str) -> str:
    """Run a cell; return the name of its error, "" if there was none, or "dead" if the kernel died of it."""
    message = client.execute(code)
    while True:
        try:
            reply = client.get_shell_msg(timeout=1)
        except Exception:  # queue.Empty
            if not client.is_alive():
                return "dead"
            continue
        if reply["parent_header"].get("msg_id") == message:
            return reply["content"].get("ename", "")


def outcome(folder: Path):
    found = read_run(folder)
    metrics = [
        {k: v for k, v in row.items() if k not in ("step_time", "tokens_per_second")} for row in found["metrics"]
    ]
    weights = [path.read_bytes() for path in sorted(folder.glob("[sd]*/*.safetensors"))]
    assert len(weights) == 2
    return weights, json.dumps(metrics), json.dumps(found["samples"]), json.dumps(found["evaluation"])


def test_a_cell_that_is_run_again_goes_on(tmp_path, monkeypatch):
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    manager.kernel_spec.argv[0] = sys.executable
    cell = CELL.format(folder=str(tmp_path / "run"))
    manager.start_kernel()
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=300)
        assert run(client, SETUP) == ""
        assert run(client, SIGNALLED.format(name="SIGINT") + cell) == "KeyboardInterrupt"  # the stop button
        assert len(read_run(tmp_path / "run")["metrics"]) == 3
        assert run(client, SIGNALLED.format(name="SIGKILL") + cell) == "dead"
        assert not (tmp_path / "run" / "evaluation.json").exists()
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=300)
        assert run(client, SETUP + cell) == ""
        assert run(client, CELL.format(folder=str(tmp_path / "whole"))) == ""
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
