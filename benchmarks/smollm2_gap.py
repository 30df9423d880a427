"""Does the game beat SeqKD where the student cannot copy its teacher, from where SeqKD is saturated, judged by a larger model?

    python benchmarks/smollm2_gap.py prepare --folder /tmp/world --world smollm2-gap-cpu
    python benchmarks/smollm2_gap.py choose --folder /tmp/world --world smollm2-gap-cpu   # rates; without it, the preset's
    python benchmarks/smollm2_gap.py run --folder /tmp/world --world smollm2-gap-cpu --kinds implicit --seeds 0 1 2

Teacher: SmolLM2-135M-Instruct behind four hidden examples at temperature 0.7, as in smollm2.py, one completion for each of
some thousand prompts that the model wrote itself (sampled after the start of a user's turn, as in arXiv 2406.08464). Held out:
the 64 prompts of the embedded data set, written by people's hands.

Worlds: `smollm2-gap-cpu` trains a LoRA on a student that lost a part of the 30 layers, at a batch for a CPU. For a GPU, at a batch
and a number of steps that a CPU cannot reach: `smollm2-gap` trains all weights of a student that kept 16 layers, `smollm2-gpu` a
LoRA on the teacher's own weights, no gap. SeqKD's best epoch on the validation prompts is the control; the games start from its
first epoch (no gap) or from that best one (gap). `seqkd-longer` is its last epoch.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results import write_results
from smollm2 import TEACHER_TEMPERATURE, Bench

from minigad import PRESETS, hub
from minigad.config import GADConfig
from minigad.data import load_pairs, write_jsonl
from minigad.model import LanguageModel
from minigad.teacher import SHORT_ANSWERS, HiddenPromptTeacher

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL_LAYERS = 30
CHUNK = 1024  # prompts of one draw
BEFORE_PROMPT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n"
TEMPERATURES = (1.0, 0.85, TEACHER_TEMPERATURE, 0.5)  # of sampling, for the frontier
VALIDATION_SEED = 100


class World(NamedTuple):
    """A student, how much text there is to learn from, and the settings of its warm-up and games."""

    prompts: int  # that the model writes, an answer each
    layers: int  # that the student keeps; ALL_LAYERS: the teacher's own weights
    epochs: int  # of SeqKD
    samples: int  # completions a held-out prompt
    settings: dict[str, Any]


GPU: dict[str, Any] = {
    "warmup_batch_size": 64,
    "per_device_train_batch_size": 128,
    "num_generations": 8,
    "max_steps": 50,
    "discriminator_warmup_steps": 10,
    "token_budget": 4096,
    "discriminator_sft_epochs": 1.0,
}
WORLDS = {
    "smollm2-gap-cpu": World(1024, 24, 3, 4, {
        "lora_r": 64,
        "warmup_learning_rate": 4e-4,
        "discriminator_model": "smollm2-135m",
        "discriminator_sft_epochs": 1.0,
        "max_steps": 24,
    }),
    "smollm2-gap": World(8192, 16, 4, 8, GPU | {
        "lora_r": 0,
        "dtype": "float32",
        "warmup_learning_rate": 2e-4,
        "discriminator_sft_learning_rate": 2e-5,
        "discriminator_model": "smollm2-135m",
        "learning_rate": 1e-5,
        "discriminator_learning_rate": 1e-5,
    }),
    "smollm2-gpu": World(8192, ALL_LAYERS, 4, 8, GPU),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "implicit": {"discriminator": "implicit", "discriminator_scale": 0.05},
    "sequence": {"discriminator": "sequence"},
}
RATES = (1.0, 3.0)  # both players' rates, times this: chosen on validation prompts


def prepare(folder: Path, world: World) -> None:
    """Write prompts, the teacher's completions, and the student that lost layers."""
    folder.mkdir(parents=True, exist_ok=True)
    source = hub.resolve("smollm2-135m")
    tokenizer = hub.load_tokenizer(source)
    model = LanguageModel(hub.load_model(source, torch.bfloat16, DEVICE), tokenizer)
    started = time.monotonic()
    prompts = write_prompts(model, world.prompts)
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
    if world.layers < ALL_LAYERS:
        shorten(source, folder / "student", tokenizer, world.layers)


@torch.no_grad()
def write_prompts(model: LanguageModel, wanted: int) -> list[str]:
    """Let the model write users' turns; keep one line of 4 to 40 words of plain text, each once."""
    ids = torch.tensor([model.tokenizer(BEFORE_PROMPT, add_special_tokens=False).input_ids] * CHUNK, device=DEVICE)
    kept: dict[str, None] = {}
    torch.manual_seed(0)
    while len(kept) < wanted:
        out = model.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_p=1.0, top_k=0,
            max_new_tokens=56, eos_token_id=model.tokenizer.eos_token_id,
        )  # fmt: skip
        for row in out[:, ids.shape[1] :].tolist():
            if model.tokenizer.eos_token_id in row:
                text = model.tokenizer.decode(row[: row.index(model.tokenizer.eos_token_id)]).strip()
                if text.isascii() and "\n" not in text and 4 <= len(text.split()) <= 40:
                    kept[text] = None
    return list(kept)[:wanted]


def shorten(source: Path, folder: Path, tokenizer: Any, layers: int) -> None:
    """Save the model with so many of its layers: without the middle it forgets least before any training."""
    model = hub.load_model(source, torch.float32, torch.device("cpu"))
    kept = [*range(layers // 2), *range(ALL_LAYERS - layers // 2, ALL_LAYERS)]
    model.model.layers = torch.nn.ModuleList(copy.deepcopy(model.model.layers[i]) for i in kept)
    model.config.num_hidden_layers = layers
    model.config.layer_types = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_bench(folder: Path, name: str, seed: int, split: str, temperatures: tuple[float, ...] = TEMPERATURES) -> Bench:
    """Return the benchmark of smollm2.py on this world's student and data."""
    world = WORLDS[name]
    own = {"student": str(folder / "student")} if world.layers < ALL_LAYERS else {}
    config: GADConfig = PRESETS["smollm2-135m"].replace(**world.settings, **own)
    train, _ = load_pairs(folder / "train.jsonl")
    return Bench(
        seed, split, config, train=train, world=name, samples=world.samples,
        temperatures=temperatures, game_temperatures=temperatures,
    )  # fmt: skip


def imitate(bench: Bench, world: World) -> None:
    """SeqKD: with a gap the games start from its best epoch, without one from its first."""
    gap = world.layers < ALL_LAYERS
    bench.imitate(world.epochs, start_from_best=gap, longer=gap)


def scaled(bench: Bench, kind: str, scale: float) -> dict[str, Any]:
    """Return the settings of a game with both players' rates multiplied."""
    rates = ("learning_rate", "discriminator_learning_rate")
    return KINDS[kind] | {name: getattr(bench.config, name) * scale for name in rates}


def run(folder: Path, world: str, seeds: list[int], kinds: list[str], split: str, name: str) -> None:
    """Run SeqKD and every game with each seed, and write what there is after each of them."""
    chosen = {kind: folder / f"rates-{world}-{kind}.json" for kind in kinds}
    scales = {kind: json.loads(path.read_text()) if path.exists() else 1.0 for kind, path in chosen.items()}
    command = f"python benchmarks/smollm2_gap.py run --folder world --world {world} --kinds {' '.join(kinds)} --seeds {' '.join(map(str, seeds))}"
    settings, done = WORLDS[world].settings | {"rate_scales": scales}, []
    for seed in seeds:
        bench = make_bench(folder, world, seed, split)
        imitate(bench, WORLDS[world])
        write_results(name, command, done + bench.rows, settings)
        for kind in kinds:
            bench.play(f"gad-{kind}", **scaled(bench, kind, scales[kind]))
            write_results(name, command, done + bench.rows, settings)
        done += bench.rows


def choose(folder: Path, name: str, kinds: list[str], steps: int) -> None:
    """Try rates for each kind of discriminator on the validation prompts; keep those with the least divergence, both ways added."""
    bench = make_bench(folder, name, VALIDATION_SEED, "validation", (1.0,))
    imitate(bench, WORLDS[name])
    for kind in kinds:
        found = {}
        for scale in RATES:
            bench.play(f"{kind} x{scale:g}", watch=6, **(scaled(bench, kind, scale) | {"max_steps": steps}))
            last = bench.rows[-1]["metrics"]
            found[scale] = last["kl_student_teacher"] + last["kl_teacher_student"]
        best = min(found, key=lambda scale: found[scale])
        print(f"{name}, {kind}: {found} -> {best}", flush=True)
        (folder / f"rates-{name}-{kind}.json").write_text(json.dumps(best))
    write_results(
        f"{name}_choose",
        f"python benchmarks/smollm2_gap.py choose --folder world --world {name}",
        bench.rows,
        WORLDS[name].settings,
    )


def main() -> None:
    """Prepare, choose or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prepare", "choose", "run"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--world", choices=list(WORLDS), default="smollm2-gap-cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=["validation", "heldout"], default="heldout")
    parser.add_argument("--kinds", choices=list(KINDS), nargs="+", default=list(KINDS))
    parser.add_argument("--steps", type=int, default=12, help="of a trial")
    parser.add_argument("--name", default="smollm2_gap", help="of the results file; parts of a run may go to several")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    if args.action == "prepare":
        prepare(args.folder, WORLDS[args.world])
    elif args.action == "choose":
        choose(args.folder, args.world, args.kinds, args.steps)
    else:
        run(args.folder, args.world, args.seeds, args.kinds, args.split, args.name)


if __name__ == "__main__":
    main()
