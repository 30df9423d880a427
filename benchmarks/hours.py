"""How many GPU-hours does a recipe take? Counts of the work in it, times seconds measured by gpu.py, or times assumed rates.

    python benchmarks/hours.py configs/paper-14b.toml --results benchmarks/results/gpu.json     # measured seconds
    python benchmarks/hours.py configs/paper-14b.toml                                           # the rates given as flags
    python benchmarks/hours.py configs/paper-14b.toml --levers                                  # and what would bring it down

The paper (arXiv 2511.10643, A.2) reports 480 H100-hours for its 14B run: 200K prompts, N = 8, one epoch of warm-up and two
of the game. Warm-up, game and sampling are counted; evaluation, judging and collecting the teacher's text are not. All of it is
prediction: nobody has run this recipe with minigad.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from minigad.config import GADConfig, read_recipe
from minigad.fit import Architecture, architecture

PAPER = Path(__file__).parent.parent / "configs" / "paper-14b.toml"
PROMPTS = 200_000
STAGES = ("rollout", "discriminator_update", "reference", "student_update")
# vLLM 0.11 with Qwen3-14B in bfloat16 on one H100 SXM: 201,648 tokens of 1,000 ShareGPT requests, all sent at once, in 63.5 s
# (docs.gpustack.ai, Performance Lab, Qwen3-14B on H100; its peak was 8,890). Another 14B, no adapter, over HTTP.
ENGINE = 3174.0
CARD = 784.0  # TFLOP/s: the matrix rate of the H100 in results/gpu.json
# What each line of --levers changes on top of the lines before it.
LEVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sampled by vLLM", {"sampler": "vllm"}),
    ("and a prompt read once in the discriminator's update", {"shared_prompts": True}),
    ("and no KL term", {"beta": 0.0}),
    ("and a 3B discriminator of its own", {"discriminator_model": "qwen2.5-3b"}),
)


def count(config: GADConfig, prompts: int, processes: int = 1) -> dict[str, float]:
    """Count how often each stage does its unit of work: a completion, or for the discriminator a prompt's N + 1 rows."""
    batch = config.per_device_train_batch_size * processes
    game = config.max_steps * batch
    judged = game + config.discriminator_warmup_steps * batch
    return {
        "rollout": judged * config.num_generations,
        "discriminator_update": judged,
        "reference": game * config.num_generations if config.beta > 0 else 0,
        "student_update": game * config.num_generations + config.warmup_epochs * prompts,
    }


def hours(counts: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    """Turn seconds a unit of work into hours of the whole run, by stage and in total."""
    parts = {name: counts[name] * seconds[name] / 3600 for name in STAGES}
    return {name: round(value, 1) for name, value in (parts | {"total": sum(parts.values())}).items()}


def unit_seconds(entry: dict[str, Any]) -> dict[str, float] | None:
    """Return seconds a unit of work in one case of gpu.py, sampling as the fastest did; None if a stage is missing."""
    stages, case = entry.get("stages", {}), entry["case"]
    rollouts = [s["seconds"] / s["rows"] for n, s in stages.items() if n.startswith("rollout") and "seconds" in s]
    if not rollouts or any("seconds" not in stages[name] for name in STAGES[1:]):
        return None
    completions = case["prompts"] * case["num_generations"]
    return {
        "rollout": min(rollouts),
        "discriminator_update": stages["discriminator_update"]["seconds"] / case["prompts"],
        "reference": stages["reference"]["seconds"] / completions,
        "student_update": stages["student_update"]["seconds"] / completions,
    }


def predict(cases: list[dict[str, Any]], config: GADConfig, counts: dict[str, float]) -> dict[str, dict[str, float]]:
    """Predict a run from each measured case of its student: every row as long as the case's.

    For the paper's run 512+512 is the nearest case above the mean completion (439 tokens on LMSYS, Table 2; its prompts' mean
    is unpublished); 2048+1536 has every row at the paper's limits, which no run has.
    """
    found = {}
    for entry in cases:
        seconds = unit_seconds(entry) if entry["case"]["model"] == config.student else None
        if seconds:
            found[f"{entry['case']['prompt_length']}+{entry['case']['completion_length']}"] = hours(counts, seconds)
    return found


def assumed_seconds(
    config: GADConfig, shape: Architecture, judge: Architecture, lengths: tuple[int, int], flops: float, sampled: float
) -> dict[str, float]:
    """Return seconds a unit of work from rates: operations a second that training reaches, and tokens sampled a second.

    Training on a frozen base is a forward pass and one back to the activations; with checkpointing, one more forward. A group of
    N + 1 rows that exceeds the token budget is read once more, as its loss needs every score before the first gradient.
    Shared prompts save the discriminator's update alone: a pass over the student's rows holds few of one prompt.
    """
    length, passes, group = sum(lengths), 3 if config.gradient_checkpointing else 2, config.num_generations + 1
    again = group * length > config.token_budget
    body, head = shape.layer_flops(length), shape.head_flops(lengths[1])
    judged = packed_flops(judge, *lengths, group) if config.shared_prompts else group * judge.layer_flops(length)
    return {
        "rollout": lengths[1] / sampled,
        "discriminator_update": (passes + again) * judged / flops,
        "reference": (body + head) / flops,
        "student_update": passes * (body + head) / flops,
    }


def packed_flops(shape: Architecture, prompt: int, completion: int, rows: int) -> float:
    """Count one forward pass over a prompt and its completions in one sequence; its attention computes what the mask hides, too."""
    length = prompt + rows * completion
    matrices = 2 * shape.linear_parameters() * length
    return matrices + 2 * (shape.layer_flops(length) - matrices)


def levers(
    config: GADConfig, prompts: int, lengths: tuple[int, int], tflops: float, sampled: float
) -> dict[str, dict[str, float]]:
    """Predict the recipe, then with each of LEVERS on top of those before it, then what no sampler can help with.

    The last line is the recipe with sampling for nothing and training at all of the card's matrix rate.
    """

    def total(changed: GADConfig, rate: float, speed: float) -> dict[str, float]:
        shapes = architecture(changed.student), architecture(changed.discriminator_model or changed.student)
        seconds = assumed_seconds(changed, *shapes, lengths, rate * 1e12, speed)
        return hours(count(changed, prompts), seconds)

    found, changed = {"the recipe": total(config, tflops, sampled)}, config
    for words, changes in LEVERS:
        changed = changed.replace(**changes)
        found[words] = total(changed, tflops, ENGINE if changed.sampler == "vllm" else sampled)
    return found | {"the recipe, sampled for nothing, at the card's rate": total(config, CARD, float("inf"))}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=PAPER)
    parser.add_argument("--results", type=Path, help="a file written by gpu.py; without it the rates below are assumed")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="training prompts: what an epoch is")
    parser.add_argument("--processes", type=int, default=1, help="GPUs; each takes the recipe's batch")
    parser.add_argument("--prompt", type=int, default=256, help="mean tokens of a prompt (the paper's is unpublished)")
    parser.add_argument("--completion", type=int, default=439, help="mean tokens of a completion (Table 2: 439)")
    parser.add_argument(
        "--tflops", type=float, default=290.0, help="reached in training; an H100 did 0.33 to 0.40 of 784"
    )
    parser.add_argument(
        "--sampled", type=float, default=1050.0, help="tokens a second; an H100 did 1054 (128 rows, merged)"
    )
    parser.add_argument(
        "--levers", action="store_true", help="what would bring the hours down, one change after another"
    )
    return parser.parse_args()


def main() -> None:
    """Print the prediction and its inputs."""
    args = parse()
    config = read_recipe(args.recipe)
    counts = count(config, args.prompts, args.processes)
    print(f"{args.recipe}: {config.student}; units of work: { ({name: round(n) for name, n in counts.items()}) }")
    if args.results:
        cases = json.loads(args.results.read_text(encoding="utf-8"))["cases"]
        for lengths, parts in predict(cases, config, counts).items():
            print(f"GPU-hours with every row at {lengths}, from measured seconds: {parts}")
        return
    lengths = (args.prompt, args.completion)
    shapes = architecture(config.student), architecture(config.discriminator_model or config.student)
    seconds = assumed_seconds(config, *shapes, lengths, args.tflops * 1e12, args.sampled)
    print(f"assumed: {lengths[0]}+{lengths[1]} tokens, {args.tflops:g} TFLOP/s, {args.sampled:g} tokens/s sampled")
    print(f"GPU-hours: {hours(counts, seconds)}")
    if args.levers:
        print(f"an engine is taken to sample {ENGINE:g} tokens/s; hours by what is changed:")
        for words, parts in levers(config, args.prompts, lengths, args.tflops, args.sampled).items():
            print(f"  {words:54s}{parts['total']:7.0f}  {parts}")


if __name__ == "__main__":
    main()
