"""Every setting of a run, in one frozen dataclass, and the presets as data.

Imports no torch: `import minigad` and `minigad --help` stay fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

__all__ = [
    "PRESETS",
    "SHORT_NAMES",
    "GADConfig",
    "UserError",
    "check_context",
    "get_preset",
    "make_config",
    "preset_for",
    "read_recipe",
    "recipe_settings",
    "say",
    "visible",
]

# What minigad calls a model, and what the hub does.
SHORT_NAMES = {
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}

# Marks that reorder text, control characters, and halves of characters, which UTF-8 cannot hold.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Write out the characters of a text that would act on a terminal or a page instead of being shown: ESC as ⟨U+001B⟩."""
    return HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def say(text: str) -> None:
    """Print a line to stderr, in minigad's name."""
    print(f"minigad: {visible(text)}", file=sys.stderr)


class UserError(ValueError):
    """Something the user can mend. The message is one sentence, on one line: where, which value, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message).replace("\n", " "))


@dataclass(frozen=True)
class GADConfig:
    """All settings of warm-up, the adversarial game and the baselines.

    Names are TRL's where the thing is the same. Lengths are in tokens, rates are per optimizer step.
    An invalid value raises UserError when the object is made, not in step 300.
    """

    # models
    student: str = "toy"  # "toy", "toy-large", a preset's short name, a local folder or a hub name
    discriminator: str = "sequence"  # sequence | prefix | implicit
    discriminator_model: str = ""  # a causal LM of its own; "" shares the student's base through an adapter
    discriminator_scale: float = 1.0  # implicit only: score = scale * log-ratio; about 1/length for long texts
    discriminator_against: str = "student"  # implicit only: the log-ratio's denominator, student | reference
    lora_r: int = 0  # rank of the LoRA adapters; 0 trains all weights
    lora_alpha: int = 32
    lora_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dtype: str = "float32"  # of the base: auto | float32 | bfloat16 | float16; adapters and heads are float32 always
    quantization: str = "none"  # of the base: none | nf4 (4-bit, double quantisation, bitsandbytes; needs lora_r > 0)
    gradient_checkpointing: bool = (
        False  # keep one hidden state a layer and make the rest again: less memory, more time
    )
    shared_prompts: bool = (
        False  # training passes read a prompt once for its completions (minigad.packing): less work, other rounding
    )
    optim: str = "adamw_torch"  # adamw_torch | adamw_8bit | paged_adamw_8bit (the last two: bitsandbytes, on a GPU)

    # data
    max_prompt_length: int = 2048
    max_completion_length: int = 1536
    overlong_prompts: str = "drop"  # drop | truncate_left; both are counted and reported
    eval_fraction: float = 0.1  # share of prompts held out when no evaluation file is given

    # warm-up: SFT on the teacher's text for the student, then Bradley-Terry on fresh samples for the discriminator
    warmup_epochs: float = 1.0
    warmup_learning_rate: float = 2e-4
    warmup_batch_size: int = 8  # rows of a cross-entropy step
    discriminator_sft_epochs: float = 0.0  # language-model fit to the teacher's text before the first comparison
    discriminator_sft_learning_rate: float = 2e-4
    discriminator_warmup_steps: int = 10

    # the adversarial game
    max_steps: int = 100
    per_device_train_batch_size: int = 8  # B: prompts of a step (each gets num_generations completions)
    num_generations: int = 8  # N
    temperature: float = 1.0
    sampler: str = (
        "transformers"  # transformers | vllm: an engine with a copy of the base, told of the adapter each step
    )
    vllm_gpu_memory_utilization: float = 0.3  # the engine's share of the GPU, beside the trainer's
    rollout_weights: str = (
        "adapter"  # adapter | merged: sample from a scratch copy that holds the adapter; faster, rounded
    )
    importance_sampling_cap: float = (
        2.0  # where the sampler's log p is not the trainer's: weight tokens by min(ratio, cap)
    )
    learning_rate: float = 1e-4
    discriminator_learning_rate: float = 1e-4
    scale_rewards: str = "group"  # group: divide by the group's std (paper, Eq 6); none: centre only
    beta: float = 0.001  # weight of the KL to the warmed-up student
    epsilon: float = 0.2  # PPO clip; never binds with one update per rollout
    sft_weight: float = 0.0  # cross-entropy on the teacher's text beside the policy loss
    lr_final_fraction: float = 1.0  # the student's rate decays linearly to this fraction
    ema_decay: float = 0.0  # >0 keeps an exponential moving average of the student; it replaces the student at the end
    freeze_discriminator: bool = False  # the control of the paper's Fig 6

    # baselines: the paper's three epochs; DPO's usual 0.1. Rates and epochs of DPO were not checked against SODA's paper
    seqkd_epochs: float = 3.0
    seqkd_learning_rate: float = 2e-4
    dpo_epochs: float = 1.0
    dpo_beta: float = 0.1
    dpo_learning_rate: float = 5e-5

    # the run
    max_grad_norm: float = 1.0
    token_budget: int = 16384  # tokens of one forward and backward pass; only speed and memory depend on it
    seed: int = 0
    logging_steps: int = 1
    eval_steps: int = 0  # 0: evaluate at the end only
    save_steps: int = 100  # steps, of any phase, between checkpoints; 0: at the end of each phase only
    save_total_limit: int = 2  # checkpoints that are kept; with one alone, damage to it would lose the run
    on_alarm: str = "warn"  # warn | stop | ignore: what an alarm of minigad.diagnose does during training
    output_dir: str = "run"

    def __post_init__(self) -> None:
        _check(self)

    def replace(self, **changes: Any) -> GADConfig:
        """Return a copy with some fields changed; an unknown field raises UserError with the nearest name."""
        for name in changes:
            if name not in _field_names():
                raise UserError(f"unknown config field {name!r}{_nearest(name, _field_names())}")
        return dataclasses.replace(self, **changes)


CHOICES: dict[str, tuple[str, ...]] = {
    "discriminator": ("sequence", "prefix", "implicit"),
    "discriminator_against": ("student", "reference"),
    "overlong_prompts": ("drop", "truncate_left"),
    "scale_rewards": ("group", "none"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": ("none", "nf4"),
    "sampler": ("transformers", "vllm"),
    "rollout_weights": ("adapter", "merged"),
    "on_alarm": ("warn", "stop", "ignore"),
    "optim": ("adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
}

# Inclusive bounds. A bound says what cannot work, not what is wise.
BOUNDS: dict[str, tuple[float, float]] = {
    "discriminator_scale": (1e-6, 1e3),
    "lora_r": (0, 1024),
    "lora_alpha": (1, 4096),
    "max_prompt_length": (1, 1 << 20),
    "max_completion_length": (1, 1 << 20),
    "eval_fraction": (0.0, 0.9),
    "warmup_epochs": (0.0, 1e4),
    "warmup_batch_size": (1, 1 << 20),
    "discriminator_sft_epochs": (0.0, 1e4),
    "discriminator_warmup_steps": (0, 1 << 31),
    "max_steps": (0, 1 << 31),
    "per_device_train_batch_size": (1, 1 << 20),
    "num_generations": (2, 4096),
    "temperature": (1e-3, 100.0),
    "vllm_gpu_memory_utilization": (0.01, 1.0),
    "importance_sampling_cap": (1.0, 1e6),
    "warmup_learning_rate": (0.0, 1.0),
    "discriminator_sft_learning_rate": (0.0, 1.0),
    "learning_rate": (0.0, 1.0),
    "discriminator_learning_rate": (0.0, 1.0),
    "seqkd_learning_rate": (0.0, 1.0),
    "dpo_learning_rate": (0.0, 1.0),
    "beta": (0.0, 100.0),
    "epsilon": (1e-6, 10.0),
    "sft_weight": (0.0, 100.0),
    "lr_final_fraction": (0.0, 1.0),
    "ema_decay": (0.0, 0.99999),
    "seqkd_epochs": (0.0, 1e4),
    "dpo_epochs": (0.0, 1e4),
    "dpo_beta": (1e-6, 100.0),
    "max_grad_norm": (1e-6, 1e6),
    "token_budget": (1, 1 << 40),
    "seed": (0, (1 << 32) - 1),
    "logging_steps": (1, 1 << 31),
    "eval_steps": (0, 1 << 31),
    "save_steps": (0, 1 << 31),
    "save_total_limit": (1, 1 << 31),
}


def _field_names() -> list[str]:
    return [field.name for field in dataclasses.fields(GADConfig)]


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(names))}"


def _check(config: GADConfig) -> None:
    hints = get_type_hints(GADConfig)
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        object.__setattr__(config, name, _typed(name, value, hints[name]))
        value = getattr(config, name)
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"config field {name!r} is {value!r}; it must be one of {', '.join(CHOICES[name])}")
        if name in BOUNDS and not BOUNDS[name][0] <= value <= BOUNDS[name][1]:
            low, high = BOUNDS[name]
            raise UserError(f"config field {name!r} is {value!r}; it must lie between {low:g} and {high:g}")
    if config.quantization != "none" and config.lora_r == 0:
        raise UserError(
            "config field 'quantization' is 'nf4' but lora_r is 0: 4-bit weights are frozen; set lora_r, say 16"
        )
    if config.dtype == "float16" and config.lora_r == 0:
        raise UserError(
            "config field 'dtype' is 'float16' but lora_r is 0: weights of 16 bits lose small updates; set lora_r, say 16, "
            "or dtype to 'float32'"
        )


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return `value` if it has the field's type (an int may stand for a float, a list for a tuple), else raise."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_args(hint) and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    expected = tuple if get_args(hint) else hint
    if not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"config field {name!r} is {value!r}; it must be of type {getattr(hint, '__name__', hint)}")
    return value


# What the presets of pretrained students from 0.5B share. Paper = arXiv 2511.10643, A.2, which trains all weights; where a
# number is not the paper's, the reason is beside it. QLoRA = scripts/finetune_guanaco_{7b,13b}.sh of github.com/artidoro/qlora,
# which reproduce arXiv 2305.14314. LWR = "LoRA Without Regret" (Schulman et al., 2025), read through TRL's guide to it
# (docs/source/lora_without_regret.md), not in the original.
_PRETRAINED = GADConfig(
    discriminator="sequence",  # paper: a head on the last token, the discriminator initialised from the student
    lora_r=16,  # the paper has no adapters. LWR: rank 1 to 32 for policy gradients, which carry about a bit an episode
    lora_alpha=32,  # LWR: 32, whatever the rank; with it the best rate hardly depends on the rank
    dtype="auto",  # bfloat16; float16 with a scaled loss on a T4, which has none
    quantization="nf4",  # QLoRA, arXiv 2305.14314: one base for all three players
    gradient_checkpointing=True,  # without it one row of 14B keeps 36 GB of activations: `minigad fit` prints both
    warmup_epochs=1.0,  # paper
    warmup_learning_rate=2e-4,  # QLoRA, 7B and 13B; the paper's 1e-6 is for all weights
    warmup_batch_size=16,  # QLoRA, 4 x 4; LWR warns of more than 32 rows; the paper's is 256
    discriminator_warmup_steps=50,  # paper: a whole epoch beside the student's; here the student is warmed up first
    max_steps=200,  # paper: 1600 at 256 prompts. 200 at 32 are the two epochs of 3200 prompts
    per_device_train_batch_size=32,  # paper: 256; an eighth, as one GPU has to sample all of it
    num_generations=8,  # paper
    temperature=0.8,  # paper
    learning_rate=1e-5,  # ten times the paper's 1e-6: LWR's ratio, and TRL's own rates for GRPO with and without LoRA
    discriminator_learning_rate=1e-5,  # as the student's, as in the paper
    beta=0.001,  # paper
    seqkd_epochs=3.0,  # paper
    seqkd_learning_rate=2e-4,  # as the warm-up's
    max_grad_norm=0.2,  # paper
    token_budget=4096,  # a row of the paper's lengths, several of its mean; a larger card takes more, see configs/
)

# A preset is data. Paper = arXiv 2511.10643, A.2; "measured" = chosen on a validation split by a script in benchmarks/.
PRESETS: dict[str, GADConfig] = {
    # The letters language of minigad.toy: full training of an 11k-parameter student on a CPU. Rates and epochs were chosen on
    # validation prompts with seeds 100 and 101 (benchmarks/tune_letters.py).
    "toy": GADConfig(
        student="toy",
        discriminator="implicit",
        discriminator_model="toy-large",
        max_prompt_length=256,
        max_completion_length=64,
        warmup_epochs=40.0,
        warmup_learning_rate=1e-2,
        warmup_batch_size=64,
        discriminator_sft_epochs=15.0,
        discriminator_sft_learning_rate=5e-3,
        discriminator_warmup_steps=10,
        max_steps=400,
        per_device_train_batch_size=16,
        num_generations=8,
        temperature=1.0,
        learning_rate=1e-3,
        discriminator_learning_rate=3e-4,
        lr_final_fraction=0.1,
        beta=0.0,  # departs from the paper's 0.001, which was inert here: 5e-5 of the loss, at the price of a forward pass
        seqkd_epochs=25.0,
        seqkd_learning_rate=1e-2,
        dpo_learning_rate=3e-4,
        token_budget=65536,
    ),
    # A real pretrained student that a laptop CPU can train: LoRA on SmolLM2-135M-Instruct. Sizes are for a CPU's minutes,
    # rates are the class's defaults; neither was searched (benchmarks/tune_smollm2.py is there for that).
    "smollm2-135m": GADConfig(
        student="smollm2-135m",
        discriminator="sequence",  # paper
        lora_r=16,  # as in _PRETRAINED
        lora_alpha=32,
        dtype="auto",
        max_prompt_length=128,  # the embedded set's prompts and completions are short; the paper's 2048 and 1536 are not for a CPU
        max_completion_length=48,
        warmup_epochs=1.0,  # paper
        discriminator_warmup_steps=4,  # 32 prompts' samples; the paper has an epoch
        max_steps=16,  # 128 prompts; paper: 1600 steps of 256
        per_device_train_batch_size=8,
        num_generations=4,  # paper: 8; half the sampling
        temperature=1.0,  # paper: 0.8; likelihoods are compared at 1
        beta=0.0,  # as in "toy"
        token_budget=4096,
    ),
    # All at the paper's lengths, 2048 + 1536. The smallest card that holds the step, by `minigad fit` (tests/test_fit.py):
    "qwen2.5-0.5b": _PRETRAINED.replace(student="qwen2.5-0.5b"),  # T4
    "qwen2.5-3b": _PRETRAINED.replace(student="qwen2.5-3b"),  # T4
    "llama-3.2-3b": _PRETRAINED.replace(student="llama-3.2-3b"),  # T4
    "qwen2.5-7b": _PRETRAINED.replace(student="qwen2.5-7b"),  # T4
    "llama-3.1-8b": _PRETRAINED.replace(student="llama-3.1-8b", token_budget=2048),  # T4; its cache is twice Qwen's
    "qwen2.5-14b": _PRETRAINED.replace(  # 24 GB; configs/1x80gb.toml has more room
        student="qwen2.5-14b",
        token_budget=2048,
        warmup_learning_rate=1e-4,  # QLoRA's README, for models larger than 13B
        seqkd_learning_rate=1e-4,
    ),
}


def get_preset(name: str) -> GADConfig:
    """Return the preset of that name; an unknown name raises UserError with the nearest one."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{_nearest(name, list(PRESETS))}")
    return PRESETS[name]


def check_context(config: GADConfig, model: str, context: int | None) -> None:
    """Raise UserError for rows beyond the tokens that a model was made for: they fail, or come out worse without a word."""
    if context is not None and config.max_prompt_length + config.max_completion_length > context:
        raise UserError(
            f"max_prompt_length {config.max_prompt_length} + max_completion_length {config.max_completion_length} is beyond the "
            f"{context} tokens that {model!r} was made for; lower one of them"
        )


def make_config(preset: str, overrides: dict[str, Any]) -> GADConfig:
    """Return `preset` with the fields of `overrides` changed, each checked."""
    return get_preset(preset).replace(**overrides)


def preset_for(student: str) -> str:
    """Return the preset whose settings a student, by its short or its hub name, takes when nothing else is said; else SmolLM2's."""
    short = next((name for name, hub_id in SHORT_NAMES.items() if hub_id == student), student)
    return short if short in PRESETS else "smollm2-135m"


def read_recipe(path: str | Path) -> GADConfig:
    """Return the configuration that a TOML file describes; see recipe_settings."""
    settings = recipe_settings(path)
    return make_config(settings.pop("preset"), settings)


def recipe_settings(path: str | Path) -> dict[str, Any]:
    """Return what a TOML file sets: fields of GADConfig, and `preset`, where its other fields come from.

    Without a `preset` it is the student's own. Raises UserError naming the file and what is wrong in it: the line of a
    syntax error, or the field and its value.
    """
    settings = _read_toml(Path(path))
    settings.setdefault("preset", preset_for(str(settings.get("student", "toy"))))
    fields = {name: value for name, value in settings.items() if name != "preset"}
    try:
        make_config(str(settings["preset"]), fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return settings


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError as error:
        raise UserError(f"{path} cannot be read before Python 3.11 without tomli: pip install tomli") from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a TOML file of config fields") from error
    except ValueError as error:  # a syntax error, or bytes that are not UTF-8
        raise UserError(f"{path} is not TOML: {error}") from error
