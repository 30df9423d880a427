"""Will it fit? The memory bill of a training step, from the configuration alone: no weights, no GPU, no download.

Sizes are in bytes, and a GB is 10**9 of them: what a card's maker prints, and a little less than most cards have.
Nothing here loads a model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigad.config import BOUNDS, SHORT_NAMES, GADConfig, UserError, check_context

__all__ = [
    "ARCHITECTURES",
    "NF4_BYTES",
    "Architecture",
    "Bill",
    "adapter_parameters",
    "architecture",
    "bill_of",
    "changes",
    "fitting_changes",
    "gpu_bytes",
    "largest",
    "memory_bill",
    "report",
    "shortage",
]

# NF4 with double quantisation (arXiv 2305.14314, section 3): half a byte a weight, one byte of scale for every 64, and
# four bytes for every 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What a maker's name stands for, in GB.
GPUS = {
    "t4": 16,
    "l4": 24,
    "a10": 24,
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
    "l40s": 48,
    "a6000": 48,
    "h100": 80,
    "h200": 141,
}
SMALL_BUDGET = 1024  # a longer row is a pass of its own
# Beside tensors: the CUDA context with the libraries' workspaces (0.81 to 0.91 GB on an H100), and what the allocator holds and
# cannot hand out again (4 to 11% there at 7B and 14B, some of it free for the asking). Measured by benchmarks/gpu.py.
CONTEXT_BYTES, FRAGMENTATION = 0.9e9, 0.06
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """The sizes of a dense decoder of Llama's or Qwen2's kind: what its config.json says about shapes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool  # input and output embeddings are one matrix
    qkv_bias: bool = False  # Qwen2 has them
    context: int = 32768  # tokens of the longest row it was made for

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of each linear layer of one decoder layer."""
        h, i, q, kv = (
            self.hidden_size,
            self.intermediate_size,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        return dict(zip(LINEARS, [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)], strict=True))

    def linear_parameters(self) -> int:
        """Count the weights of the decoder layers' matrices: what 4-bit loading stores in 4 bits."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears().values())

    def other_parameters(self) -> int:
        """Count the rest: embeddings (once if tied), norms and biases."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.layers * (2 * self.hidden_size + biases) + self.hidden_size

    def parameters(self) -> int:
        """Count all weights."""
        return self.linear_parameters() + self.other_parameters()

    def kv_bytes(self, element_bytes: int = 2) -> int:
        """Return the bytes that one token of one row takes in the cache of keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes

    def layer_flops(self, length: int) -> float:
        """Count the operations of the decoder layers in one forward pass over one row of `length` tokens.

        A multiplication and an addition count as two; attention is causal, half of the square.
        """
        attention = 4 * self.layers * self.heads * self.head_dim * length**2 / 2
        return 2 * self.linear_parameters() * length + attention

    def head_flops(self, tokens: int) -> float:
        """Count the operations of the LM head in one forward pass over `tokens` completion tokens."""
        return 2 * self.vocab_size * self.hidden_size * tokens


# Shapes from the config.json of each model's repository on the hub, by minigad's short name.
ARCHITECTURES: dict[str, Architecture] = {
    # HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2-135m": Architecture(49152, 576, 1536, 30, 9, 3, 64, tied=True, context=8192),
    # Qwen/Qwen2.5-*-Instruct; also Table 1 of the Qwen2.5 report, arXiv 2412.15115
    "qwen2.5-0.5b": Architecture(151936, 896, 4864, 24, 14, 2, 64, tied=True, qkv_bias=True),
    "qwen2.5-3b": Architecture(151936, 2048, 11008, 36, 16, 2, 128, tied=True, qkv_bias=True),
    "qwen2.5-7b": Architecture(152064, 3584, 18944, 28, 28, 4, 128, tied=False, qkv_bias=True),
    "qwen2.5-14b": Architecture(152064, 5120, 13824, 48, 40, 8, 128, tied=False, qkv_bias=True),
    # meta-llama/Llama-3.2-3B-Instruct and Llama-3.1-8B-Instruct
    "llama-3.2-3b": Architecture(128256, 3072, 8192, 28, 24, 8, 128, tied=True, context=131072),
    "llama-3.1-8b": Architecture(128256, 4096, 14336, 32, 32, 8, 128, tied=False, context=131072),
}


def adapter_parameters(shape: Architecture, rank: int, targets: tuple[str, ...] = LINEARS) -> int:
    """Count the weights of one LoRA adapter: rank · (inputs + outputs) for each matrix it sits on."""
    return shape.layers * sum(rank * sum(size) for name, size in shape.linears().items() if name in targets)


@dataclass(frozen=True)
class Bill:
    """Bytes by part. `static` parts are there all the time; each phase adds its own, and the largest phase decides.

    In a phase the work of one layer and the logits do not coexist: the larger of the two counts.
    """

    static: dict[str, float]
    phases: dict[str, dict[str, float]]

    def phase_bytes(self, name: str) -> float:
        """Return what a phase adds to the static parts."""
        parts = dict(self.phases[name])
        return max(parts.pop("layer", 0.0), parts.pop("logits", 0.0)) + sum(parts.values())

    @property
    def worst(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak(self) -> float:
        """The most that is ever held, without the GPU's own overhead."""
        return sum(self.static.values()) + self.phase_bytes(self.worst)

    @property
    def on_gpu(self) -> float:
        """The peak with what a GPU takes beside tensors."""
        return self.peak * (1 + FRAGMENTATION) + CONTEXT_BYTES


def memory_bill(config: GADConfig, shape: Architecture, judge: Architecture | None = None) -> Bill:
    """Return the memory bill of one step of the game in which every row has the longest prompt and completion.

    `judge` is the discriminator's own model where config.discriminator_model names one. Rows go through as the loop splits
    them: by token_budget, and a row that is longer alone.
    """
    if config.dtype == "auto":  # 16 bits on any machine, unless all weights are trained
        config = config.replace(dtype="bfloat16" if config.lora_r else "float32")
    own = judge is not None
    judge = judge or shape
    completions = config.per_device_train_batch_size * config.num_generations
    rows = min(completions, _rows_of_a_pass(config))
    judged_rows = min(
        completions + config.per_device_train_batch_size, _rows_of_a_pass(config, config.num_generations + 1)
    )
    trained, judged = _trained_bytes(config, shape), _trained_bytes(config, judge)
    return Bill(
        static=_static(config, shape, judge, own),
        phases={
            "rollout": _rollout(config, shape) if config.sampler == "transformers" else {},  # see _engine_line
            "discriminator update": _training(config, judge, judged_rows, config.discriminator == "implicit")
            | {"gradients": judged},
            "reference": _scoring(config, shape, rows) if config.beta > 0 else {},
            "student update": _training(config, shape, rows, logits=True) | {"gradients": trained},
            "optimizer step": {"gradients": max(trained, judged), "temporaries": max(trained, judged)},
        },
    )


def _rows_of_a_pass(config: GADConfig, group: int = 1) -> int:
    """How many of the longest rows the token budget lets through at a time: whole groups if one fits, else single rows."""
    rows = max(1, config.token_budget // (config.max_prompt_length + config.max_completion_length))
    return rows if rows < group else rows // group * group


def _static(config: GADConfig, shape: Architecture, judge: Architecture, own: bool) -> dict[str, float]:
    """What stays: base weights, adapters (student, reference, discriminator), and both optimizers' moments."""
    trained, judged = _trained_bytes(config, shape), _trained_bytes(config, judge)
    adapters = 2 * trained + judged + (trained if config.ema_decay > 0 else 0)
    moments = _moment_bytes(config) * (trained + judged)
    if config.lora_r == 0:  # whole models: every player is one
        return {"weights": adapters, "optimizers": moments}
    weights = _weight_bytes(config, shape) + (_weight_bytes(config, judge) if own else 0)
    return {"base weights": weights, "adapters": adapters, "optimizers": moments}


def _weight_bytes(config: GADConfig, shape: Architecture) -> float:
    element = DTYPE_BYTES[config.dtype]
    linear: float = NF4_BYTES if config.quantization == "nf4" else element
    return shape.linear_parameters() * linear + shape.other_parameters() * element


def _trained_bytes(config: GADConfig, shape: Architecture) -> float:
    """Bytes of the weights that one player trains: a float32 adapter, or all of them. Their gradients are as large."""
    if config.lora_r == 0:
        return shape.parameters() * DTYPE_BYTES[config.dtype]
    return 4 * adapter_parameters(shape, config.lora_r, config.lora_target_modules)


def _moment_bytes(config: GADConfig) -> float:
    """Bytes of AdamW's two moments for each byte of trained weights."""
    element = 4 if config.lora_r else DTYPE_BYTES[config.dtype]
    # 8-bit: a byte each, and a float32 scale for every 256 of them
    return 2.0 if config.optim == "adamw_torch" else 2 * (1 + 4 / 256) / element


def _saved_bytes(config: GADConfig, shape: Architecture) -> float:
    """Bytes a token that autograd keeps in one decoder layer, without checkpointing.

    Counted term by term from what the operations save, and checked against autograd's own count (tests/test_fit.py).
    """
    h, i = shape.hidden_size, shape.intermediate_size
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    small = 4 * shape.heads + 8 + 4 * config.lora_r * len(config.lora_target_modules)  # log-sums, norms, LoRA's middles
    if config.dtype == "float32":
        return (16 if config.lora_r else 24) * h + 8 * q + 8 * kv + 16 * i + small
    if config.lora_r == 0:
        return 16 * h + 4 * q + 4 * kv + 8 * i + small
    # A frozen matrix needs no input in the backward pass, its adapter does: in 16 bits, one for matrices that share it.
    inputs = {("q_proj", "k_proj", "v_proj"): h, ("o_proj",): q, ("gate_proj", "up_proj"): h, ("down_proj",): i}
    kept = 2 * sum(size for names, size in inputs.items() if set(names) & set(config.lora_target_modules))
    return 8 * h + 4 * q + 4 * kv + 6 * i + small + kept


def _layer_bytes(config: GADConfig, shape: Architecture, *, train: bool) -> float:
    """Bytes a token of what lives for a moment only, in the layer that is being computed. Measured, as are the saved ones."""
    wide, adapters = config.dtype == "float32", config.lora_r > 0
    wide_mlp = adapters and any(name in config.lora_target_modules for name in ("gate_proj", "up_proj", "down_proj"))
    if train:
        h, i = (8, 8) if wide else (6, 4)
    elif wide:
        h, i = 16, 16 if wide_mlp else 12
    else:
        h, i = 12 if adapters else 8, 12 if wide_mlp else 6
    return h * shape.hidden_size + i * shape.intermediate_size


def _training(config: GADConfig, shape: Architecture, rows: int, logits: bool) -> dict[str, float]:
    """One forward and backward pass over `rows` rows of the longest length."""
    tokens = rows * (config.max_prompt_length + config.max_completion_length)
    completion = rows * config.max_completion_length
    saved, layer = _saved_bytes(config, shape), _layer_bytes(config, shape, train=True)
    kept = shape.layers * saved
    if config.gradient_checkpointing:  # a layer's input is kept, and one layer at a time is made again
        kept, layer = float(shape.layers * DTYPE_BYTES[config.dtype] * shape.hidden_size), layer + saved
    heads = completion * shape.hidden_size * (2 * DTYPE_BYTES[config.dtype] if logits else 6)
    parts = {"activations": tokens * kept + heads, "layer": tokens * layer + _unpacked_bytes(config, shape)}
    return parts | ({"logits": _logits_bytes(shape, completion, train=True)} if logits else {})


def _scoring(config: GADConfig, shape: Architecture, rows: int) -> dict[str, float]:
    """One forward pass without gradients."""
    tokens = rows * (config.max_prompt_length + config.max_completion_length)
    layer = tokens * _layer_bytes(config, shape, train=False) + _unpacked_bytes(config, shape)
    return {"layer": layer, "logits": _logits_bytes(shape, rows * config.max_completion_length, train=False)}


def _rollout(config: GADConfig, shape: Architecture) -> dict[str, float]:
    """Sampling: keys and values of all rows at full length, one layer's work, and the weights that an adapter is merged into."""
    from minigad.student import SAMPLING_BUDGET

    element, prompt_length = DTYPE_BYTES[config.dtype], config.max_prompt_length
    length = prompt_length + config.max_completion_length
    prompts = SAMPLING_BUDGET * config.token_budget // (config.num_generations * length)
    prompts = max(1, min(config.per_device_train_batch_size, prompts))
    rows = prompts * config.num_generations
    cache = rows * shape.kv_bytes(element)
    # A prompt is read once, while the completions' share of the cache is still free. Later a layer's keys grow by being copied,
    # and a token is drawn from logits in the base's dtype, log p in float32 and two float64 arrays.
    prefill = prompts * prompt_length * _layer_bytes(config, shape, train=False)
    grow = cache * length / (2 * shape.layers) + (20 + element) * rows * shape.vocab_size
    layer = max(prefill - cache * config.max_completion_length, grow) + _unpacked_bytes(config, shape)
    merged = shape.linear_parameters() * element if config.rollout_weights == "merged" else 0
    return {"KV cache": cache * length, "layer": layer} | ({"merged weights": merged} if merged else {})


def _logits_bytes(shape: Architecture, completion_tokens: int, *, train: bool) -> float:
    """float32 logits of one chunk: two arrays of them at a time in a forward pass, three in a backward pass."""
    from minigad.model import LOGITS_CHUNK

    return (12 if train else 8) * min(LOGITS_CHUNK, completion_tokens) * shape.vocab_size


def _unpacked_bytes(config: GADConfig, shape: Architecture) -> float:
    """The largest 4-bit matrix, unpacked for its multiplication."""
    largest = max(inputs * outputs for inputs, outputs in shape.linears().values())
    return 2 * largest if config.quantization == "nf4" else 0


def architecture(name: str, field: str = "student") -> Architecture:
    """Return the sizes of a model: a preset's short name, its name on the hub, or a local folder with a config.json.

    Never downloads. Raises UserError, naming the config field it came from, for a name that is none of these, and for a
    folder of another kind of model.
    """
    by_hub_name = {hub_id: ARCHITECTURES[short] for short, hub_id in SHORT_NAMES.items() if short in ARCHITECTURES}
    known = ARCHITECTURES | by_hub_name
    if name in known:
        return known[name]
    if Path(name).expanduser().is_dir():
        return _from_folder(Path(name).expanduser())
    if name in ("toy", "toy-large"):
        raise UserError(
            f"{field} is {name!r}, which runs on any machine and has no bill; give a --student, one of {', '.join(ARCHITECTURES)}"
        )
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]!r}" if close else f"known: {', '.join(ARCHITECTURES)}"
    raise UserError(
        f"{field} {name!r} is neither a model whose sizes minigad knows nor a local folder; {hint} (for another, "
        "give a folder with its config.json; the weights are not needed)"
    )


def _from_folder(folder: Path) -> Architecture:
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"folder {folder} has no config.json that transformers can read; copy it there") from error
    if found.model_type not in ("llama", "qwen2", "mistral"):
        raise UserError(
            f"{folder}/config.json is of model_type {found.model_type!r}; fit counts llama, qwen2 and mistral"
        )
    return Architecture(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        layers=found.num_hidden_layers,
        heads=found.num_attention_heads,
        kv_heads=found.num_key_value_heads,
        head_dim=getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads,
        tied=found.tie_word_embeddings,
        qkv_bias=found.model_type == "qwen2",
        context=found.max_position_embeddings,
    )


def gpu_bytes(text: str) -> float:
    """Read a memory size ("24GB", "40 GiB", "16") or a card's name ("t4"); UserError for anything else.

    A GB is 10**9 bytes: cards sold as 24 GB have between 24.1 and 25.8 of them.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib|g)?", text.strip().lower())
    if match and 0 < float(match[1]) <= 100_000:
        return float(match[1]) * (2**30 if match[2] == "gib" else 1e9)
    name = re.sub(r"[\s_-]", "", text.lower())
    if name in GPUS:
        return GPUS[name] * 1e9
    raise UserError(
        f"--gpu is {text!r}; give the memory of one card, such as 24GB (an A100 has 40 or 80, a V100 16 or 32), "
        f"or one of {', '.join(GPUS)}"
    )


def bill_of(config: GADConfig) -> Bill:
    """Return the bill of a configuration, its models known by name; UserError for a model or a LoRA target that is not."""
    unknown = sorted(set(config.lora_target_modules) - set(LINEARS))
    if unknown:
        raise UserError(
            f"config field 'lora_target_modules' names {', '.join(unknown)}, which these models do not have; "
            f"they have {', '.join(LINEARS)}"
        )
    own = config.discriminator_model
    judge = architecture(own, "discriminator_model") if own else None
    return memory_bill(config, architecture(config.student), judge)


def largest(config: GADConfig, field: str, memory: float) -> int:
    """Return how far a whole-number field of a configuration that fits can be raised until the step fills `memory`.

    Found by doubling and halving from the present value; a length is rounded down to a multiple of 64, and no row grows
    beyond the model's context, nor the field beyond its bounds.
    """
    context, limit = architecture(config.student).context, min(1 << 20, int(BOUNDS[field][1]))

    def fits(value: int) -> bool:
        if value > limit:
            return False
        changed = config.replace(**{field: value})
        return _longest(changed) <= context and bill_of(changed).on_gpu <= memory

    present = low = getattr(config, field)
    assert fits(low), (field, low, memory)
    high = 2 * low
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(present, low // 64 * 64) if "length" in field else low


def changes(config: GADConfig) -> dict[str, dict[str, Any]]:
    """Return the changes that save memory and are not made yet, gentle ones first: what to type -> the fields."""
    candidates: list[tuple[bool, dict[str, Any]]] = [
        (config.rollout_weights == "merged", {"rollout_weights": "adapter"}),
        (config.token_budget > SMALL_BUDGET, {"token_budget": SMALL_BUDGET}),
        (not config.gradient_checkpointing, {"gradient_checkpointing": True}),
        (config.lora_r == 0, {"lora_r": 16}),
        (config.quantization == "none", {"quantization": "nf4", "lora_r": config.lora_r or 16}),
        (config.dtype == "float32", {"dtype": "bfloat16"}),
        (config.optim == "adamw_torch", {"optim": "adamw_8bit"}),
        (config.num_generations > 4, {"num_generations": 4}),
        (config.max_completion_length > 512, {"max_completion_length": 512}),
        (config.max_prompt_length > 512, {"max_prompt_length": 512}),
    ]
    return {_flags(fields): fields for useful, fields in candidates if useful}


def _flags(fields: dict[str, Any]) -> str:
    words = []
    for name, value in fields.items():
        flag = "--" + name.replace("_", "-")
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def report(config: GADConfig, memory: float) -> list[str]:
    """Return the bill in lines for a reader: parts, phases, whether it fits, and what to change or what else would fit."""
    bill, shape, mine = bill_of(config), architecture(config.student), _trainers(config, memory)
    check_context(config, config.student, shape.context)
    lines = [
        f"{config.student}: {shape.parameters():,} weights, {config.dtype}"
        + (", decoder matrices in 4 bits (nf4)" if config.quantization == "nf4" else "")
        + (f", LoRA of rank {config.lora_r}" if config.lora_r else ", all trained"),
        f"every row at its longest: {config.max_prompt_length} + {config.max_completion_length} tokens, "
        f"{config.num_generations} completions a prompt, token budget {config.token_budget}",
        "",
        "always there",
        *_table(bill.static),
        f"added at the peak: {bill.worst}",
        *_table(bill.phases[bill.worst]),
        "added in each phase (in it the larger of layer and logits counts)",
        *_table({name: bill.phase_bytes(name) for name in bill.phases}),
        *_checkpointing_lines(config, bill),
        "",
        *([_engine_line(config, shape, memory)] if config.sampler == "vllm" else []),
        _verdict(bill, mine),
    ]
    return lines + (_room(config, mine) if bill.on_gpu <= mine else _advice(config, mine))


def _longest(config: GADConfig) -> int:
    """Tokens of the longest row that the settings allow."""
    return config.max_prompt_length + config.max_completion_length


def _trainers(config: GADConfig, memory: float) -> float:
    """Return what an engine beside the trainer leaves to it: vLLM takes its share of the card at its start, used or not."""
    return memory * (1 - config.vllm_gpu_memory_utilization) if config.sampler == "vllm" else memory


def _engine_line(config: GADConfig, shape: Architecture, memory: float) -> str:
    """Say whether vLLM's share holds its copy of the base and one row of the longest; what it takes beside them is not counted.

    A base in 4 bits counts dequantised, as minigad.plain_base writes it: vLLM 0.32 reads no 4 bits. An older one may need less.
    """
    settled = config.replace(dtype="bfloat16") if config.dtype == "auto" else config
    base = _weight_bytes(settled.replace(quantization="none"), shape)
    needed = base + _longest(config) * shape.kv_bytes(DTYPE_BYTES[settled.dtype])
    share, part = memory * config.vllm_gpu_memory_utilization, config.vllm_gpu_memory_utilization
    verdict = "fits" if needed <= share else "does not fit: raise --vllm-gpu-memory-utilization"
    if config.quantization == "nf4":
        verdict += f"; the copy, dequantised since vLLM 0.32 reads no 4 bits, takes {base / 1e9:.1f} GB of disk in output_dir meanwhile"
    return (
        f"vLLM takes {part:g} of the card, {share / 1e9:.1f} GB, for which it needs at least {needed / 1e9:.1f} GB (its copy of the base "
        f"and one row's keys and values; more rows sample faster): {verdict}"
    )


def _table(parts: dict[str, float]) -> list[str]:
    return [f"  {name:24s}{size / 1e9:8.2f} GB" for name, size in parts.items()]


def _checkpointing_lines(config: GADConfig, bill: Bill) -> list[str]:
    other = bill_of(config.replace(gradient_checkpointing=not config.gradient_checkpointing))
    on, off = (bill, other) if config.gradient_checkpointing else (other, bill)
    name = max(("discriminator update", "student update"), key=bill.phase_bytes)
    cells = [f"{b.phases[name]['activations'] / 1e9:.2f} GB" for b in (on, off)]
    return [f"activations kept in the {name}: {cells[0]} with gradient checkpointing, {cells[1]} without"]


def _verdict(bill: Bill, memory: float) -> str:
    word = "fits" if bill.on_gpu <= memory else "does not fit"
    return (
        f"{bill.peak / 1e9:.1f} GB of tensors, {bill.on_gpu / 1e9:.1f} GB with the CUDA context ({CONTEXT_BYTES / 1e9:g} GB) and "
        f"fragmentation ({FRAGMENTATION:.0%}): {word} in {memory / 1e9:.1f} GB"
    )


def _room(config: GADConfig, memory: float) -> list[str]:
    fields = ["max_completion_length", "num_generations", "token_budget"]
    if config.sampler == "vllm":
        fields.remove("num_generations")  # the engine takes as many rows at a time as its share holds
    found = [f"{name} {largest(config, name, memory)}" for name in fields]
    return ["largest that still fit, each alone: " + ", ".join(found)]


def _advice(config: GADConfig, memory: float) -> list[str]:
    """The three changes that save most, each alone; then the fewest, gentle ones first, that make it fit."""
    best = _best(config, lambda changed: bill_of(changed).on_gpu)
    lines = ["what saves most, each alone:", *(f"  {flags}: {size / 1e9:.1f} GB" for flags, size in best.items())]
    together = fitting_changes(config, lambda changed: bill_of(changed).on_gpu <= memory)
    if together is None:
        return [*lines, "no combination of these fits: take a smaller student or a larger GPU"]
    return [*lines, f"this fits: {_flags(together)}"]


def _best(config: GADConfig, size: Callable[[GADConfig], float]) -> dict[str, float]:
    """Return the (at most) three changes that lower `size` most, each alone: what to type -> the size."""
    sizes, now = {flags: size(config.replace(**fields)) for flags, fields in changes(config).items()}, size(config)
    return {flags: sizes[flags] for flags in sorted(sizes, key=lambda flags: sizes[flags])[:3] if sizes[flags] < now}


def shortage(config: GADConfig, phase: str) -> str:
    """Say, for the phase in which a GPU's memory ran out, its largest part on the bill, and three settings that help it most.

    Without numbers for a model whose sizes minigad does not know.
    """

    def size(changed: GADConfig) -> float:
        bill = bill_of(changed)
        return sum(bill.static.values()) + bill.phase_bytes(phase)

    if phase == "reference":  # any pass that only scores: the bill has none of them without a KL
        config = config.replace(beta=config.beta or 1.0)
    try:
        bill, best = bill_of(config), list(_best(config, size))
    except UserError:
        return f"out of GPU memory in the {phase}; what helps: {', '.join(list(changes(config))[:3])}"
    parts = bill.static | bill.phases[phase]
    part = max(bill.phases[phase], key=lambda name: parts[name], default=max(bill.static, key=lambda name: parts[name]))
    return (
        f"out of GPU memory in the {phase}, for which the bill says {size(config) / 1e9:.1f} GB, "
        f"{parts[part] / 1e9:.1f} GB of them {part} (minigad fit shows all); what helps: {', '.join(best)}"
    )


def fitting_changes(config: GADConfig, fits: Callable[[GADConfig], bool]) -> dict[str, Any] | None:
    """Return the first changes, gentle ones first, with which `fits` holds, leaving out what is not needed; None if none do."""
    made: list[dict[str, Any]] = []
    for fields in changes(config).values():
        made.append(fields)
        if fits(config.replace(**_joined(made))):
            break
    else:
        return None
    for fields in list(made[:-1]):
        fewer = [other for other in made if other is not fields]
        if fits(config.replace(**_joined(fewer))):
            made = fewer
    return _joined(made)


def _joined(changes: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for fields in changes for name, value in fields.items()}
