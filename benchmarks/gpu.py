"""What a step costs on one GPU, by stage: 0.5B, 7B and 14B students with random weights, no network, no download.

    python benchmarks/gpu.py --out /tmp/gpu --deadline 480

The base is made in 4 bits (NF4) in place, matrix by matrix; student, reference and discriminator are LoRA adapters on it.
Every completion has the full length, so that a step costs what the longest step would. A rollout is not sampled to its end:
LONG - SHORT tokens are timed at the context where it starts and at the one where it ends, and the time between is a line.
Sampling is timed with the adapter beside the 4-bit base, and with the adapter merged into a scratch copy in bf16.
Both ceilings (matrix rate, bandwidth) are measured in the same run. --tiny runs the same code on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hours import PAPER, PROMPTS, count, predict
from results import COMMIT, machine

from minigad.chat import encode_all, encode_prompt
from minigad.checkpoint import write_json
from minigad.config import GADConfig, read_recipe
from minigad.discriminator import Discriminator
from minigad.fit import ARCHITECTURES, NF4_BYTES, Architecture, adapter_parameters, memory_bill
from minigad.rollout import Rollouts, generate
from minigad.student import Student, _with_adapter, enable_gradient_checkpointing
from minigad.toy.model import toy_tokenizer
from minigad.train import discriminator_step, student_step

SHORT, LONG = 4, 20  # tokens of the two generations whose difference is the decoding rate
REPEATED = 6.0  # seconds below which a training stage is run twice
GB = 1e9
RANK = 16
TINY = Architecture(512, 64, 128, 2, 4, 2, 16, tied=True, qkv_bias=True)
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: a model, lengths, prompts of a step, and how sampling is tried.

    A rollout is (completions sampled at a time, adapter merged or not); the first is the step's.
    """

    model: str
    prompt_length: int
    completion_length: int
    prompts: int
    rollouts: tuple[tuple[int, bool], ...]
    token_budget: int
    num_generations: int = 8

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt_length + self.completion_length


# Cheap first. The 14B cases at 1024+1024 and 2048+1536 are those that should stay within 24 GB and 40 GB; larger and merged
# rollouts show what a full card samples.
CASES = [
    Case("qwen2.5-0.5b", 512, 512, 4, ((32, False), (32, True), (512, True)), 32768),
    Case("qwen2.5-0.5b", 2048, 1536, 4, ((32, False), (32, True), (256, True)), 32768),
    Case("qwen2.5-7b", 512, 512, 4, ((32, False), (32, True), (256, True)), 16384),
    Case("qwen2.5-14b", 512, 512, 4, ((32, False), (32, True), (128, True)), 16384),
    Case("qwen2.5-14b", 1024, 1024, 2, ((16, False), (64, True)), 4096),
    Case("qwen2.5-7b", 2048, 1536, 2, ((16, False), (128, True)), 16384),
    Case("qwen2.5-14b", 2048, 1536, 2, ((16, False), (32, True), (48, True)), 8192),
]
TINY_CASES = [
    Case("tiny", 48, 24, 2, ((16, False),), 512),
    Case("tiny", 64, 48, 2, ((16, False), (32, True)), 512),
]


class Card:
    """The device, its clock and its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Run once and return how long it took, the device's queue included."""
        self.sync()
        started = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - started

    def measure(self, work: Callable[[], Any], again: bool = False) -> Record:
        """Run once; return seconds, and on a GPU the peak of allocated memory in GB (all that is alive counts).

        What is short is run again without emptying the allocator, and the second time counts: kernels are chosen and memory is
        fetched from the driver once.
        """
        self.free()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        record = {"seconds": self.seconds(work)}
        if again and record["seconds"] < REPEATED:
            record = {"seconds": self.seconds(work), "first_seconds": record["seconds"]}
        if self.cuda:
            record["peak_gb"] = torch.cuda.max_memory_allocated() / GB
            record["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / GB
        return record

    def attempt(
        self, name: str, work: Callable[[], Any], players: Players | None = None, again: bool = False
    ) -> Record:
        """Measure a stage; running out of memory or failing is a result of that stage, not the end of the run."""
        try:
            record = self.measure(work, again)
        except torch.OutOfMemoryError as error:
            record = {"out_of_memory": str(error)[:160]}
        except Exception as error:  # the machine is lent for minutes: the other stages must still run
            traceback.print_exc()
            record = {"error": f"{type(error).__name__}: {error}"[:500]}
        if players is not None and "seconds" not in record:
            players.clear()
        say(
            f"  {name}: " + ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
        )
        return record


def say(text: str) -> None:
    """Print at once: a run that is cut off still shows where it was."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def ceilings(card: Card) -> Record:
    """Measure the card's bf16 matrix rate and its copy bandwidth (bytes read and written), best of five."""
    size, count = (8192, 1 << 31) if card.cuda else (256, 1 << 22)
    a, b = (torch.randn(size, size, device=card.device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(count // 4, device=card.device)
    target = torch.empty_like(source)
    multiply = min(card.seconds(lambda: [torch.mm(a, b, out=product) for _ in range(10)]) / 10 for _ in range(5))
    copy = min(card.seconds(lambda: [target.copy_(source) for _ in range(5)]) / 5 for _ in range(5))
    return {"matrix_flops": 2 * size**3 / multiply, "copy_bytes": 2 * count / copy}


def hf_config(shape: Architecture) -> Any:
    """Return transformers' configuration of a Qwen2.5 of that shape."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=shape.tied,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def random_base(shape: Architecture, device: torch.device) -> Any:
    """Make a frozen Qwen2.5 with random weights, its decoder's matrices in NF4 with double quantisation.

    Each matrix is drawn in bf16 on the device and quantised before the next is: no full-precision model ever exists.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(shape), dtype=torch.bfloat16)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.model.set_submodule(name, nf4_linear(module, device))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, torch.nn.Parameter(random_like(parameter, device), requires_grad=False))
    with device:  # its frequencies are a buffer, computed when it is made
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    model.tie_weights()
    model.is_loaded_in_4bit = True  # what peft asks before it wraps a 4-bit layer as one
    enable_gradient_checkpointing(model)
    return model.requires_grad_(False).eval()


def nf4_linear(module: torch.nn.Linear, device: torch.device) -> Any:
    """Return a 4-bit layer of that shape with random weights."""
    import bitsandbytes as bnb

    bias = module.bias is not None
    layer = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias, torch.bfloat16, quant_type="nf4", device="meta"
    )
    weight = random_like(module.weight, device)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(device)
    if bias:
        layer.bias = torch.nn.Parameter(torch.zeros(module.out_features, device=device, dtype=torch.bfloat16), False)
    layer.support_avx512bf16_for_cpu = False  # its CPU kernel cuts the autograd graph after an eval forward
    return layer


def random_like(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Draw a matrix, std 0.02; a vector (a norm's scale) is ones."""
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
    return torch.empty(parameter.shape, device=device, dtype=torch.bfloat16).normal_(0, 0.02)


class Players:
    """Student, reference and discriminator on one random base, with their optimizers."""

    def __init__(self, shape: Architecture, config: GADConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.tokenizer = toy_tokenizer()
        base = random_base(shape, device)
        self.student = Student(_with_adapter(base, config, "student"), self.tokenizer, "student")
        with torch.no_grad():  # LoRA starts at zero: a step must have something to move
            for parameter in self.student.parameters().values():
                parameter.normal_(0, 0.01)
        self.student.freeze_reference()
        self.discriminator = Discriminator.load(config, self.student)
        assert self.discriminator.head is not None
        torch.nn.init.normal_(self.discriminator.head.weight, std=0.01)
        self.optimizers = [
            torch.optim.AdamW(parameters, lr=1e-5)
            for parameters in (list(self.student.parameters().values()), self.discriminator.parameters())
        ]

    def clear(self) -> None:
        """Drop gradients that a failed stage left."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def text(self, length: int, rng: random.Random, *, completion: bool) -> str:
        """Return a text that is exactly `length` tokens as a prompt, or as a finished completion."""
        overhead = 1 if completion else len(encode_prompt(self.tokenizer, ""))
        return "".join(rng.choices("abcdefghijklmnop", k=length - overhead))


def make_config(case: Case) -> GADConfig:
    """Return the settings of a case."""
    return GADConfig(
        student=case.model,
        lora_r=RANK,
        lora_alpha=2 * RANK,
        dtype="bfloat16",
        quantization="nf4",
        gradient_checkpointing=True,
        max_prompt_length=case.prompt_length,
        max_completion_length=case.completion_length,
        per_device_train_batch_size=case.prompts,
        num_generations=case.num_generations,
        beta=0.0,  # the reference's pass is timed apart from the student's update
        token_budget=case.token_budget,
    )


def run_case(
    case: Case, players: Players, card: Card, shape: Architecture, limits: Record, late: Callable[[], bool]
) -> Record:
    """Time every stage of a case; a stage that would start after the deadline says so."""
    config = make_config(case)
    players.discriminator.config = config
    rng = random.Random(0)
    rollouts, teacher = full_length_rollouts(case, players, config, rng)
    stages: Record = {}

    def stage(name: str, work: Callable[[], Any]) -> None:
        stages[name] = {"skipped": "deadline"} if late() else card.attempt(name, work, players, again=True)

    student, judge = players.student, players.discriminator
    advantages = torch.randn(len(rollouts.rows), case.completion_length, device=card.device)
    stage("discriminator_update", lambda: discriminator_step(judge, players.optimizers[1], rollouts, teacher))
    stage("reference", lambda: student.reference.logprobs_of(rollouts.rows, config.temperature, config.token_budget))
    stage("student_update", lambda: student_step(student, players.optimizers[0], rollouts.rows, advantages, config))
    for rows, merged in case.rollouts:
        stages[rollout_name(rows, merged)] = time_rollout(case, rows, merged, players, card, late)
    compare_with_fit(config, shape, stages)
    return {"case": asdict(case), "stages": stages, **summarise(case, shape, stages, limits)}


def compare_with_fit(config: GADConfig, shape: Architecture, stages: Record) -> None:
    """Put what `minigad fit` says beside each measured peak: tensors of the training stages."""
    bill = memory_bill(config.replace(beta=0.001), shape)
    phases = {name.replace(" ", "_"): sum(bill.static.values()) + bill.phase_bytes(name) for name in bill.phases}
    for name in phases.keys() & stages.keys():
        stages[name]["fit_gb"] = phases[name] / GB
        if "peak_gb" in stages[name]:
            stages[name]["fit_over_measured"] = stages[name]["fit_gb"] / stages[name]["peak_gb"]
            say(f"  {name}: fit says {phases[name] / GB:.2f} GB, measured {stages[name]['peak_gb']:.2f} GB")


def full_length_rollouts(
    case: Case, players: Players, config: GADConfig, rng: random.Random
) -> tuple[Rollouts, list[str]]:
    """Return rollouts and teacher completions in which every row has the case's full length."""
    prompts = [players.text(case.prompt_length, rng, completion=False) for _ in range(case.prompts)]
    count = case.prompts * case.num_generations
    texts = [players.text(case.completion_length, rng, completion=True) for _ in range(count)]
    rows = encode_all(players.tokenizer, [p for p in prompts for _ in range(case.num_generations)], texts, config)
    assert all(row.length == case.length for row in rows), {row.length for row in rows}
    teacher = [players.text(case.completion_length, rng, completion=True) for _ in prompts]
    return Rollouts(prompts, rows, texts, [True] * count, case.num_generations), teacher


def rollout_name(rows: int, merged: bool) -> str:
    """Name a rollout in the results."""
    return f"rollout_{rows}" + ("_merged" if merged else "")


def time_rollout(case: Case, rows: int, merged: bool, players: Players, card: Card, late: Callable[[], bool]) -> Record:
    """Extrapolate a whole rollout of `rows` completions from short generations at its first and its last context.

    seconds = prefill (and merging) + T · (seconds a token at the start + at the end) / 2

    The peak is an upper bound: the generation at the last context also prefills all of it.
    """
    parts: Record = {}
    known = {"rows": rows, "merged": merged}
    for where, context in (("start", case.prompt_length), ("end", case.length - LONG)):
        for new in (SHORT, LONG):
            name = f"{rollout_name(rows, merged)}, {new} tokens after {context}"
            if late():
                return known | {"skipped": "deadline", "at": name}
            part = card.attempt(name, lambda c=context, n=new: sample(case, rows, merged, c, n, players), players)
            if "seconds" not in part:
                return known | part | {"at": name}
            parts[where, new] = part
    return known | extrapolate(case, parts)


def extrapolate(case: Case, parts: Record) -> Record:
    """Return a whole rollout's seconds from four short ones."""
    start, end = ((parts[w, LONG]["seconds"] - parts[w, SHORT]["seconds"]) / (LONG - SHORT) for w in ("start", "end"))
    prefill = max(parts["start", SHORT]["seconds"] - SHORT * start, 0.0)
    record = {
        "seconds": prefill + case.completion_length * (start + end) / 2,
        "extrapolated_from_tokens": LONG - SHORT,
        "prefill_seconds": prefill,
        "token_seconds_at_start": start,
        "token_seconds_at_end": end,
    }
    peaks = [part["peak_gb"] for part in parts.values() if "peak_gb" in part]
    return record | ({"peak_gb": max(peaks)} if peaks else {})


def sample(case: Case, rows: int, merged: bool, context: int, new: int, players: Players) -> None:
    """Sample `new` tokens for `rows` completions of prompts of `context` tokens, in one batch."""
    rng = random.Random(rows)
    prompts = [players.text(context, rng, completion=False) for _ in range(rows // case.num_generations)]
    generate(
        players.student,
        prompts,
        num_generations=case.num_generations,
        temperature=1.0,
        max_prompt_length=context,
        max_completion_length=new,
        seed=0,
        token_budget=rows * (context + new),
        merged=merged,
    )


def summarise(case: Case, shape: Architecture, stages: Record, limits: Record) -> Record:
    """Return tokens a second, peak memory, and the shares of the two ceilings; None where a stage is missing."""
    rows = case.prompts * case.num_generations
    groups = rows + case.prompts
    forward, head = shape.layer_flops(case.length), shape.head_flops(case.completion_length)
    # Frozen base with checkpointing: forward, forward again, and the gradient to the activations; none to the weights. A group
    # that exceeds the token budget is read once more.
    again = (case.num_generations + 1) * case.length > case.token_budget
    work = {
        "discriminator_update": (3 + again) * groups * forward,
        "reference": rows * (forward + head),
        "student_update": 3 * rows * (forward + head),
    }
    for name, flops in work.items():
        if "seconds" in stages[name]:
            stages[name]["matrix_fraction"] = flops / stages[name]["seconds"] / limits["matrix_flops"]
    for record in (stages[rollout_name(*rollout)] for rollout in case.rollouts):
        if "seconds" in record:
            record |= decoding_fractions(case, shape, record, limits)
    first = rollout_name(*case.rollouts[0])
    seconds = [stages[name].get("seconds") for name in (first, *work)]
    step = None if None in seconds else sum(seconds)
    peaks = [stages[name]["peak_gb"] for name in (first, *work) if "peak_gb" in stages[name]]
    return {
        "step_seconds": step,
        "tokens_per_second": step and rows * case.completion_length / step,
        "peak_gb": max(peaks) if len(peaks) == len(work) + 1 else None,
    }


def decoding_fractions(case: Case, shape: Architecture, record: Record, limits: Record) -> Record:
    """Compare sampling with the least it must move and compute: the weights as stored once a token, each row's cache once."""
    element = 2 if record["merged"] else NF4_BYTES
    weights = shape.linear_parameters() * element + 2 * shape.vocab_size * shape.hidden_size
    weights += 0 if record["merged"] else 4 * adapter_parameters(shape, RANK)
    cache = record["rows"] * (case.prompt_length + case.completion_length / 2) * shape.kv_bytes()
    token = (record["token_seconds_at_start"] + record["token_seconds_at_end"]) / 2
    flops = 2 * (shape.linear_parameters() + shape.vocab_size * shape.hidden_size) * record["rows"]
    return {
        "bandwidth_fraction": (weights + cache) / token / limits["copy_bytes"],
        "matrix_fraction": flops / token / limits["matrix_flops"],
        "tokens_per_second": record["rows"] * case.completion_length / record["seconds"],
    }


def warm_up(case: Case, players: Players) -> None:
    """Run every stage once, small: libraries load, kernels compile, optimizers make their state."""
    small = Case(case.model, 64, 48, 1, ((case.num_generations, False),), case.token_budget, case.num_generations)
    config = make_config(small)
    players.discriminator.config = config
    rollouts, teacher = full_length_rollouts(small, players, config, random.Random(0))
    discriminator_step(players.discriminator, players.optimizers[1], rollouts, teacher)
    advantages = torch.randn(len(rollouts.rows), 48, device=players.student.device)
    student_step(players.student, players.optimizers[0], rollouts.rows, advantages, config)
    sample(small, case.num_generations, False, 64, SHORT, players)


def main() -> None:
    """Run the cases, cheap first, and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--deadline", type=float, default=480.0, help="seconds after which no stage is started")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of 100 thousand weights, on whatever device is there"
    )
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="run these models only")
    args = parser.parse_args()
    started = time.monotonic()
    run(args.out, args.tiny, args.only, lambda: time.monotonic() - started > args.deadline)


def run(out: Path, tiny: bool, only: list[str] | None, late: Callable[[], bool]) -> Record:
    """Measure the ceilings and then every case; return what was written."""
    torch.set_float32_matmul_precision("high")  # of the float32 adapters
    card = Card(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    cases = TINY_CASES if tiny else [case for case in CASES if not only or case.model in only]
    out.mkdir(parents=True, exist_ok=True)
    limits = ceilings(card)
    say(f"{machine()}: {limits['matrix_flops'] / 1e12:.1f} TFLOP/s, {limits['copy_bytes'] / 1e12:.2f} TB/s")
    record: Record = {
        "command": "python benchmarks/gpu.py" + (" --tiny" if tiny else ""),
        "commit": COMMIT,
        "machine": machine(),
        "versions": versions(),
        "settings": {"lora_r": RANK, "gradient_checkpointing": True, "quantization": "nf4", "dtype": "bfloat16"},
        "ceilings": limits,
        "cases": [],
    }
    players, loaded, paper = None, "", read_recipe(PAPER)
    for case in cases:
        shape = TINY if tiny else ARCHITECTURES[case.model]
        say(
            f"{case.model} at {case.prompt_length}+{case.completion_length}, {case.prompts} prompts of {case.num_generations}"
        )
        if late():
            record["cases"].append({"case": asdict(case), "skipped": "deadline"})
        else:
            if case.model != loaded:
                players, loaded = None, case.model
                card.free()
                players = build(case, shape, card, record)
            if players is not None:
                record["cases"].append(run_case(case, players, card, shape, limits, late))
        record["paper_run"] = predict(record["cases"], paper, count(paper, PROMPTS))
        write_json(out / ("gpu_tiny.json" if tiny else "gpu.json"), record)
    for line in table(record):
        say(line)
    return record


def build(case: Case, shape: Architecture, card: Card, record: Record) -> Players | None:
    """Make the players of a model and warm up; None if that failed, and the file says why."""
    made: list[Players] = []
    load = card.attempt(
        f"{case.model}: making the base", lambda: made.append(Players(shape, make_config(case), card.device))
    )
    if made:
        load["warm_up"] = card.attempt("warm-up", lambda: warm_up(case, made[0]))
    if card.cuda:
        card.free()
        free, total = torch.cuda.mem_get_info()
        load["resident_gb"] = torch.cuda.memory_allocated() / GB
        load["outside_torch_gb"] = (total - free - torch.cuda.memory_reserved()) / GB
    record.setdefault("models", {})[case.model] = load
    return made[0] if made and "seconds" in load["warm_up"] else None


def versions() -> dict[str, str]:
    """Return the versions of what ran."""
    import bitsandbytes
    import peft
    import transformers

    return {m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes)}


def table(record: Record) -> list[str]:
    """Return one line a case, for the end of the output."""
    lines = ["model              lengths     step s   rollout  D update  reference  student  tok/s  peak GB"]
    for entry in record["cases"]:
        case, stages = entry["case"], entry.get("stages", {})
        names = (rollout_name(*case["rollouts"][0]), "discriminator_update", "reference", "student_update")
        cells = [entry.get("step_seconds"), *(stages.get(name, {}).get("seconds") for name in names)]
        cells += [entry.get("tokens_per_second"), entry.get("peak_gb")]
        numbers = "  ".join("       -" if cell is None else f"{cell:8.2f}" for cell in cells)
        lines.append(f"{case['model']:14s} {case['prompt_length']:5d}+{case['completion_length']:<5d} {numbers}")
    return [*lines, *(f"paper's run, {key}: {value}" for key, value in record.get("paper_run", {}).items())]


if __name__ == "__main__":
    main()
