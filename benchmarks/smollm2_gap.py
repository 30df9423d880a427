"""Does the game beat SeqKD at a batch and a number of steps that a CPU cannot reach? Two students, one GPU.

    python benchmarks/smollm2_gpu.py prepare --folder /tmp/world
    python benchmarks/smollm2_gpu.py choose --folder /tmp/world
    python benchmarks/smollm2_gpu.py run --folder /tmp/world --world smollm2-gap --seed 0

Teacher: SmolLM2-135M-Instruct behind four hidden examples at temperature 0.7, as in smollm2.py, one completion for each of
8,192 prompts that the model wrote itself (sampled after the start of a user's turn, as in arXiv 2406.08464). Held out:
the 64 prompts of the embedded data set, written by people's hands.

Worlds: `smollm2-gpu` trains a LoRA on the same weights, no capacity gap; `smollm2-gap` trains all weights of a student that
kept 16 of the 30 layers. SeqKD's best epoch on the validation prompts is the control; the games start from its first epoch
(no gap) or from that best one (gap).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from results import write_results
from smollm2 import TEACHER_TEMPERATURE, Bench

from minigad import PRESETS, hub
from minigad.config import GADConfig
from minigad.data import load_pairs, write_jsonl
from minigad.model import LanguageModel
from minigad.teacher import SHORT_ANSWERS, HiddenPromptTeacher

PROMPTS = 8192
CHUNK = 2048  # prompts of one draw
BEFORE_PROMPT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n"
KEPT_LAYERS = 16
COMMON: dict[str, Any] = {
    "warmup_batch_size": 64,
    "per_device_train_batch_size": 128,
    "num_generations": 8,
    "max_steps": 50,
    "discriminator_warmup_steps": 10,
    "token_budget": 4096,
    "discriminator_sft_epochs": 1.0,
}
WORLDS: dict[str, dict[str, Any]] = {
    "smollm2-gpu": COMMON | {"learning_rate": 1e-4, "discriminator_learning_rate": 1e-4},
    "smollm2-gap": COMMON
    | {
        "lora_r": 0,
        "dtype": "float32",
        "warmup_learning_rate": 2e-4,
        "discriminator_sft_learning_rate": 2e-5,
        "discriminator_model": "smollm2-135m",
        "learning_rate": 1e-5,
        "discriminator_learning_rate": 1e-5,
        "dpo_learning_rate": 5e-6,
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "implicit": {"discriminator": "implicit", "discriminator_scale": 0.05},
    "sequence": {"discriminator": "sequence"},
}
RATES = (1.0, 3.0)  # both players' rates, times this: chosen on validation prompts with seed 100
EPOCHS = 4  # of SeqKD
SELF = [sys.executable, __file__]


def prepare(folder: Path) -> None:
    """Write prompts, the teacher's completions, and the student that lost layers."""
    folder.mkdir(parents=True, exist_ok=True)
    source = hub.resolve("smollm2-135m")
    tokenizer = hub.load_tokenizer(source)
    model = LanguageModel(hub.load_model(source, torch.bfloat16, torch.device("cuda")), tokenizer)
    started = time.monotonic()
    prompts = write_prompts(model)
    print(f"{len(prompts)} prompts in {time.monotonic() - started:.0f} s, such as {prompts[:3]}", flush=True)
    teacher = HiddenPromptTeacher(model, SHORT_ANSWERS, TEACHER_TEMPERATURE)
    rows = []
    for start in range(0, len(prompts), CHUNK):
        part = prompts[start : start + CHUNK]
        drawn = teacher.sample(part, num_samples=1, max_completion_length=64, seed=start)
        rows += [
            {"prompt": p, "completion": text}
            for p, text, done in zip(part, drawn.texts, drawn.finished, strict=True)
            if done and text.strip()
        ]
    write_jsonl(folder / "train.jsonl", rows)
    print(f"{len(rows)} answers in {time.monotonic() - started:.0f} s, such as {rows[:2]}", flush=True)
    shorten(source, folder / "student", tokenizer)


@torch.no_grad()
def write_prompts(model: LanguageModel) -> list[str]:
    """Let the model write users' turns; keep one line of 4 to 40 words of plain text, each once."""
    ids = torch.tensor([model.tokenizer(BEFORE_PROMPT, add_special_tokens=False).input_ids] * CHUNK, device="cuda")
    kept: dict[str, None] = {}
    torch.manual_seed(0)
    while len(kept) < PROMPTS:
        out = model.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_p=1.0, top_k=0,
            max_new_tokens=56, eos_token_id=model.tokenizer.eos_token_id,
        )  # fmt: skip
        for row in out[:, ids.shape[1] :].tolist():
            if model.tokenizer.eos_token_id in row:
                text = model.tokenizer.decode(row[: row.index(model.tokenizer.eos_token_id)]).strip()
                if text.isascii() and "\n" not in text and 4 <= len(text.split()) <= 40:
                    kept[text] = None
    return list(kept)[:PROMPTS]


def shorten(source: Path, folder: Path, tokenizer: Any) -> None:
    """Save the model with 16 of its 30 layers: without the middle it forgets least before any training."""
    model = hub.load_model(source, torch.float32, torch.device("cpu"))
    total = model.config.num_hidden_layers
    kept = [*range(KEPT_LAYERS // 2), *range(total - KEPT_LAYERS // 2, total)]
    model.model.layers = torch.nn.ModuleList(copy.deepcopy(model.model.layers[i]) for i in kept)
    model.config.num_hidden_layers = KEPT_LAYERS
    model.config.layer_types = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_bench(folder: Path, world: str, seed: int, split: str, samples: int = 8) -> Bench:
    """Return the benchmark of smollm2.py on this world's student and data."""
    changes = dict(WORLDS[world])
    if world == "smollm2-gap":
        changes["student"] = str(folder / "student")
    config: GADConfig = PRESETS["smollm2-135m"].replace(**changes)
    train, _ = load_pairs(folder / "train.jsonl")
    temperatures = (1.0, TEACHER_TEMPERATURE)
    return Bench(seed, split, config, train=train, world=world, samples=samples, game_temperatures=temperatures)


def scaled(world: str, kind: str, scale: float) -> dict[str, Any]:
    """Return the settings of a game with both players' rates multiplied."""
    rates = {name: WORLDS[world][name] * scale for name in ("learning_rate", "discriminator_learning_rate")}
    return KINDS[kind] | rates


def run(folder: Path, world: str, seed: int, split: str, out: Path | None) -> None:
    """Run every method with one seed, and write what there is after each."""
    scales = json.loads((folder / f"rates-{world}.json").read_text())
    bench = make_bench(folder, world, seed, split)
    command = f"python benchmarks/smollm2_gpu.py run --world {world} --seed {seed}"

    def save() -> None:
        write_results(f"{world}_{seed}", command, bench.rows, WORLDS[world] | {"rate_scales": scales}, folder=out)

    bench.base()
    bench.imitate(epochs=EPOCHS, start_from_best=world == "smollm2-gap")
    save()
    for kind in KINDS:
        bench.play(f"gad-{kind}", **scaled(world, kind, scales[kind]))
        save()
    bench.prefer("soda")
    save()


def tune(folder: Path, world: str, kind: str, scale: float, steps: int) -> float:
    """Try one pair of rates on the validation prompts, from one epoch of SeqKD; return the divergences' sum."""
    bench = make_bench(folder, world, 100, "validation")
    bench.imitate(epochs=1)
    bench.play(f"{kind} x{scale:g}", watch=6, **(scaled(world, kind, scale) | {"max_steps": steps}))
    last = bench.rows[-1]["metrics"]
    return last["kl_student_teacher"] + last["kl_teacher_student"]


def choose(folder: Path, world: str, steps: int) -> None:
    """Try rates for each kind of discriminator, side by side; keep those with the least divergence, both ways added."""
    tried = list(itertools.product(KINDS, RATES))
    commands = [
        [*SELF, "tune", "--folder", str(folder), "--world", world, "--kind", kind, "--scale", str(scale), "--steps", str(steps)]
        for kind, scale in tried
    ]  # fmt: skip
    found = dict(zip(tried, side_by_side(commands), strict=True))
    best = {kind: min(RATES, key=lambda scale, kind=kind: found[kind, scale]) for kind in KINDS}
    print(f"{world}: {found} -> {best}", flush=True)
    (folder / f"rates-{world}.json").write_text(json.dumps(best))


def side_by_side(commands: list[list[str]]) -> list[float]:
    """Run commands at one time and return the number that each prints last; a trial that failed is infinitely bad."""
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    return [float((process.communicate()[0].split() or ["inf"])[-1]) for process in running]


def main() -> None:
    """Prepare, tune, choose or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prepare", "tune", "choose", "run"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--world", choices=list(WORLDS), default="smollm2-gap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=["validation", "heldout"], default="heldout")
    parser.add_argument("--kind", choices=list(KINDS), default="implicit")
    parser.add_argument("--scale", type=float, default=1.0, help="of both players' rates")
    parser.add_argument("--steps", type=int, default=12, help="of a trial")
    parser.add_argument("--out", type=Path, help="a folder for the results; default benchmarks/results")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if args.action == "prepare":
        prepare(args.folder)
    elif args.action == "tune":
        print(tune(args.folder, args.world, args.kind, args.scale, args.steps))
    elif args.action == "choose":
        choose(args.folder, args.world, args.steps)
    else:
        run(args.folder, args.world, args.seed, args.split, args.out)


if __name__ == "__main__":
    main()
