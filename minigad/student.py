"""The student: loading it, its adapter, its frozen reference, and saving it as a folder that others can load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minigad import parallel
from minigad.chat import Prompt
from minigad.config import SHORT_NAMES, GADConfig, UserError, check_context
from minigad.memory import with_room
from minigad.model import LanguageModel
from minigad.precision import settled
from minigad.quiet import progress_bars, without_notes
from minigad.rollout import Rollouts, Sampler, generate
from minigad.toy.model import TOY_SIZES, toy_model, toy_tokenizer

__all__ = ["Student", "load_language_model"]

# Sampling keeps keys and values of its tokens and nothing else, a small part of what a training pass keeps.
SAMPLING_BUDGET = 16


class Student(LanguageModel):
    """The model that is trained. On top of a LanguageModel it samples, keeps a reference, and can be saved."""

    reference: LanguageModel | None = None
    sampler: Sampler | None = None  # None: transformers, with this model's own forward pass

    @classmethod
    def load(cls, config: GADConfig, *, tokenizer: Any = None) -> Student:
        """Load `config.student`, with a fresh LoRA adapter if `config.lora_r` > 0.

        `tokenizer` is for the toy only, which has none of its own: default one over bytes, which spell any text.
        """
        loaded = load_language_model(config.student, config, adapter="student", tokenizer=tokenizer)
        return cls(loaded.model, loaded.tokenizer, loaded.adapter, shared_prompts=config.shared_prompts)

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: GADConfig) -> Student:
        """Load what `save_pretrained` wrote; an adapter goes on the base that `config.student` names.

        Raises UserError for an adapter of another rank than `config.lora_r` or of another base, and for a pickled one.
        """
        from minigad import hub

        folder = Path(folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not (folder / "adapter_config.json").is_file():
            folder = hub.resolve(str(folder))
            model = hub.load_model(folder, getattr(torch, settled(config).dtype), device)
            return cls(model, hub.load_tokenizer(folder), shared_prompts=config.shared_prompts)
        about = _read_adapter(folder, config)
        base, tokenizer = _load_base(config.student, config, None)
        _check_base(folder, about, base, config)
        with _calling_peft():
            from peft import PeftModel

            model = PeftModel.from_pretrained(base, folder, adapter_name="student", is_trainable=True)
        return cls(model, tokenizer, "student", shared_prompts=config.shared_prompts)

    def freeze_reference(self) -> LanguageModel:
        """Keep a frozen copy of the student as it is now: the policy that the KL term holds on to.

        Not "adapter off": that would be the model before warm-up, another policy.
        """
        if self.reference is None:
            self.reference = self.spawn("reference")
        self.reference.copy_from(self)
        for parameter in self.reference.parameters().values():
            parameter.requires_grad_(False)
        return self.reference

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: GADConfig,
        *,
        seed: int,
        num_generations: int = 1,
        temperature: float | None = None,
        first_prompt: int = 0,
    ) -> Rollouts:
        """Sample completions with the config's lengths; `temperature` None takes the config's, 0 is greedy.

        Where the GPU's memory runs out, all are sampled again in smaller parts, and come out the same: see minigad.memory.
        """

        def sample() -> Rollouts:
            return generate(
                self,
                prompts,
                num_generations=num_generations,
                temperature=config.temperature if temperature is None else temperature,
                max_prompt_length=config.max_prompt_length,
                max_completion_length=config.max_completion_length,
                seed=seed,
                token_budget=SAMPLING_BUDGET * self.within(config.token_budget),
                merged=config.rollout_weights == "merged",
                first_prompt=first_prompt,
                sampler=self.sampler,
            )

        return with_room("rollout", self, config, sample)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the student as a plain PEFT adapter, or as a transformers folder if all its weights are trained."""
        folder = Path(folder)
        if self.adapter is None:
            with progress_bars():
                self.model.save_pretrained(folder)
        else:
            self.save_adapter(folder)
        self.tokenizer.save_pretrained(folder)


def load_language_model(name: str, config: GADConfig, *, adapter: str, tokenizer: Any = None) -> LanguageModel:
    """Load a model by name, with a fresh LoRA adapter called `adapter` if `config.lora_r` > 0."""
    model, tokenizer = _load_base(name, config, tokenizer)
    if config.lora_r == 0:
        return LanguageModel(model, tokenizer, shared_prompts=config.shared_prompts)
    return LanguageModel(
        _with_adapter(model, config, adapter), tokenizer, adapter, shared_prompts=config.shared_prompts
    )


def _load_base(name: str, config: GADConfig, tokenizer: Any) -> tuple[Any, Any]:
    if name in TOY_SIZES:
        if config.quantization != "none":
            raise UserError(
                f"config field 'quantization' is {config.quantization!r} but {name!r} is a toy, too small for 4 bits; set it to 'none'"
            )
        tokenizer = tokenizer or toy_tokenizer()
        return toy_model(name, tokenizer, config.seed), tokenizer
    from minigad import hub

    folder = hub.resolve(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check_sharding(config)
    at = torch.device("cpu") if parallel.sharded() else device  # a base that no GPU holds is read on the host
    model = hub.load_model(folder, getattr(torch, settled(config).dtype), at, config.quantization)
    if parallel.sharded():
        parallel.shard(model, device)
    # What a saved adapter will name as its base: a path on this machine would mean nothing on another.
    model.name_or_path = SHORT_NAMES.get(name, name)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    tokenizer = hub.load_tokenizer(folder)
    _check_ids(model, tokenizer, folder)
    check_context(config, name, getattr(model.config, "max_position_embeddings", None))
    return model, tokenizer


def _check_ids(model: Any, tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer of another model: on a GPU an id without an embedding is an assertion of the device, and no sentence."""
    largest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise UserError(
            f"the tokenizer in {folder} has ids up to {largest} but the model embeds {rows}; put the model's own tokenizer there, "
            f"or call model.resize_token_embeddings({largest + 1}) and save it again"
        )


def _check_sharding(config: GADConfig) -> None:
    """Refuse, where accelerate asks for FSDP, what a sharded base cannot do."""
    for field, value in (("lora_r", 0), ("quantization", "nf4"), ("rollout_weights", "merged")):
        if parallel.sharded() and getattr(config, field) == value:
            raise UserError(
                f"accelerate's configuration asks for FSDP, but config field {field!r} is {value!r}: a sharded base is frozen, in "
                "16 or 32 bits, and never whole in one place; change it, or take a configuration without FSDP"
            )


def enable_gradient_checkpointing(model: Any) -> None:
    """Keep one hidden state a layer in training and make the rest again in the backward pass.

    Non-reentrant: the reentrant kind drops the gradients of adapters behind a frozen embedding.
    """
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its newer name; the older one warns of that
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def _with_adapter(model: Any, config: GADConfig, adapter: str) -> Any:
    _check_targets(model, config)
    with torch.random.fork_rng(devices=[]), _calling_peft():
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            target_modules=list(config.lora_target_modules),
            lora_dropout=0.0,  # dropout would make the ratio of GRPO differ from 1 for no reason
            bias="none",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(config.seed)
        # autocast_adapter_dtype keeps the adapter in float32 over a bf16 base: bf16 rounds small updates away.
        return get_peft_model(model, lora, adapter_name=adapter, autocast_adapter_dtype=True)


@contextmanager
def _calling_peft() -> Iterator[None]:
    """Hide its notes, and say what to do where it refuses an old release of torchao, which Colab has, even where it is not used."""
    try:
        with without_notes():
            yield
    except ImportError as error:
        raise UserError(
            f"peft cannot add an adapter ({error}); if it names torchao: pip uninstall -y torchao"
        ) from error


def _linears(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _targeted(name: str, targets: Sequence[str]) -> bool:
    """Say whether peft puts an adapter on the module of that name."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _check_targets(model: Any, config: GADConfig) -> None:
    """Refuse a LoRA target that the model has not: peft complains only if it has none of them."""
    linears = _linears(model)
    unknown = [t for t in config.lora_target_modules if not any(_targeted(name, [t]) for name in linears)]
    if unknown or not config.lora_target_modules:
        known = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise UserError(
            f"config field 'lora_target_modules' is {config.lora_target_modules!r}, which names "
            f"{'what this model does not have: ' + ', '.join(unknown) if unknown else 'nothing'}; "
            f"its linear layers are {', '.join(known)}"
        )


def _read_adapter(folder: Path, config: GADConfig) -> dict[str, Any]:
    """Return adapter_config.json; UserError if it is damaged, of another rank, of another base by name, or has no safetensors."""
    try:
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, base = int(about["r"]), str(about.get("base_model_name_or_path") or "")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / 'adapter_config.json'} is damaged ({error}); restore it from a copy") from error
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"folder {folder} has no adapter_model.safetensors (pickled adapters can run code and are not loaded); convert it "
            "on a machine you trust with PeftModel.from_pretrained(...).save_pretrained(folder)"
        )
    if rank != config.lora_r:
        raise UserError(
            f"the adapter in {folder} has rank {rank} but config field 'lora_r' is {config.lora_r}; set --lora-r {rank}"
        )
    mine, its = (SHORT_NAMES.get(name, name) for name in (config.student, base))
    if its and mine != its and not Path(mine).expanduser().exists() and not Path(its).is_absolute():
        raise UserError(
            f"the adapter in {folder} belongs to {its!r} but config field 'student' is {config.student!r}; "
            "set --student to the adapter's own base"
        )
    return about


def _check_base(folder: Path, about: dict[str, Any], base: Any, config: GADConfig) -> None:
    """Refuse an adapter whose matrices are not those of this base: peft leaves out, in silence, what it does not find."""
    from safetensors import safe_open

    targets, rank = about.get("target_modules"), config.lora_r
    wanted: dict[str, list[int]] = {}
    for name, module in _linears(base).items():
        if isinstance(targets, list) and _targeted(name, targets):
            wanted[f"base_model.model.{name}.lora_A.weight"] = [rank, module.in_features]
            wanted[f"base_model.model.{name}.lora_B.weight"] = [module.out_features, rank]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        there = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  it is no dictionary
    wrong = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if wrong:
        raise UserError(
            f"the adapter in {folder} was made for another base than {config.student!r} ({len(wrong)} of its matrices do not "
            f"fit, such as {wrong[0]}); set --student to its own base"
        )
