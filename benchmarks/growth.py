"""What a step of the game costs as it grows: seconds and memory against prompts, N, completion length and model width.

    python benchmarks/growth.py --repeats 2

Tiny Llamas with random weights and LoRA on a CPU, every completion at its full length, one size changed at a time from the
same middle case, each in a process of its own. Seconds are the processor's, so that other work on the machine does not count.
Memory is the most the process ever held, less what it held before the model was loaded: weights, adapters, optimizers and all that a step
needs. The first step, which warms, is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft  # noqa: F401  here, or its own memory would count as the first model's
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from results import FOLDER, Row, row, select, write_results
from vs_trl import never_end

from minigad.config import GADConfig
from minigad.discriminator import Discriminator
from minigad.student import Student
from minigad.toy.model import toy_tokenizer
from minigad.train import gad

AXES = {
    "prompts": [1, 2, 4, 8],
    "N": [2, 4, 8, 16],
    "completion length": [32, 64, 128, 256],
    "width": [128, 256, 512, 768],
}
MIDDLE = {"prompts": 4, "N": 4, "completion length": 64, "width": 256}
LAYERS, PROMPT_LENGTH, TOKEN_BUDGET, RANK, DATA = 4, 64, 2048, 8, 16  # DATA: rows, of which steps take theirs


def write_model(folder: Path, width: int) -> None:
    """Write a Llama of that width with random weights, heads of 32, and a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = toy_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=LAYERS,
        num_attention_heads=width // 32, num_key_value_heads=width // 64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(case: dict[str, int], folder: Path, repeats: int) -> GADConfig:
    """Return the configuration of a case."""
    return GADConfig(
        student=str(folder),
        lora_r=RANK,
        max_prompt_length=PROMPT_LENGTH,
        max_completion_length=case["completion length"],
        per_device_train_batch_size=case["prompts"],
        num_generations=case["N"],
        token_budget=TOKEN_BUDGET,
        max_steps=1 + repeats,
    )


def measure(case: dict[str, int], folder: Path, repeats: int, out: Any) -> None:
    """Play the steps of one case and send their processor seconds, and the peak of the process's memory."""
    before = resident()
    config = settings(case, folder, repeats)
    student = Student.load(config)
    never_end(student.model.get_base_model(), student.tokenizer)
    text = "x" * case["completion length"]  # a byte is a token
    data = Dataset.from_list([{"prompt": f"{i}" + "y" * PROMPT_LENGTH, "completion": text} for i in range(DATA)])
    ends = [time.process_time() for _ in gad(student, Discriminator.load(config, student), data, config)]
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    out.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e9))


def resident() -> int:
    """Return the bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_case(case: dict[str, int], repeats: int) -> tuple[list[float], float]:
    """Measure a case in a process forked from this one, so that nothing is imported again and no peak is another's."""
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), case["width"])
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=measure, args=(case, Path(name), repeats, send))
        process.start()
        send.close()
        measured = receive.recv()
        process.join()
    return measured


def points(rows: Sequence[Row], axis: str, metric: str) -> list[tuple[int, float]]:
    """Return (size, mean of a metric) along an axis."""
    own = select(rows, axis)
    sizes = sorted({r["metrics"]["size"] for r in own})
    values = {size: [r["metrics"][metric] for r in own if r["metrics"]["size"] == size] for size in sizes}
    return [(size, sum(values[size]) / len(values[size])) for size in sizes]


def growth_table(rows: Sequence[Row]) -> str:
    """A line an axis: sizes, seconds a step, memory, and by how much the last doubling (or step) multiplied each."""
    lines = [
        "| grows | sizes | processor seconds a step | memory, GB | last step of size | of seconds | of memory |",
        "|---" * 7 + "|",
    ]
    for axis in AXES:
        seconds, memory = points(rows, axis, "seconds"), points(rows, axis, "memory_gb")
        times = [f"{line[-1][1] / line[-2][1]:.2f}x" for line in (seconds, memory)]
        lines.append(
            f"| {axis} | {', '.join(str(size) for size, _ in seconds)} | {', '.join(f'{s:.2f}' for _, s in seconds)} "
            f"| {', '.join(f'{m:.2f}' for _, m in memory)} | {seconds[-1][0] / seconds[-2][0]:.2f}x | {' | '.join(times)} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row]) -> Figure:
    """Draw seconds and memory against each size, logarithmic both ways; dashed is growth in proportion."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    shown = {"seconds": ("processor seconds a step", "#0072B2"), "memory_gb": ("memory (GB)", "#D55E00")}
    grid = figure.subplots(2, len(AXES), sharey="row")
    for line, (metric, (label, colour)) in enumerate(shown.items()):
        for column, axis in enumerate(AXES):
            axes, measured = grid[line][column], points(rows, axis, metric)
            sizes, values = [size for size, _ in measured], [value for _, value in measured]
            guide = [values[-1] * size / sizes[-1] for size in sizes]
            axes.loglog(sizes, values, "o-", color=colour)
            axes.loglog(sizes, guide, "--", color="#7F7F7F")
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set(xlabel=axis if line else "", ylabel=label if column == 0 else "")
    grid[0][0].annotate("dashed: in proportion", (0.97, 0.05), xycoords="axes fraction", ha="right", color="#595959")
    return figure


def main() -> None:
    """Run every case and write benchmarks/results/growth.json; tables.py draws growth.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="steps that are counted, of each case")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for axis, sizes in AXES.items():
        for size in sizes:
            seconds, memory = run_case(MIDDLE | {axis: size}, args.repeats)
            for repeat, value in enumerate(seconds):
                metrics = {"size": size, "seconds": round(value, 3), "memory_gb": round(memory, 3)}
                rows.append(row("growth", axis, repeat, metrics, value))
            print(axis, size, [round(value, 2) for value in seconds], f"{memory:.2f} GB", flush=True)
    about = {
        "middle": MIDDLE,
        "layers": LAYERS,
        "prompt_length": PROMPT_LENGTH,
        "token_budget": TOKEN_BUDGET,
        "lora_r": RANK,
    }
    write_results("growth", f"python benchmarks/growth.py --repeats {args.repeats}", rows, about, args.out)
    print(growth_table(rows))


if __name__ == "__main__":
    main()
