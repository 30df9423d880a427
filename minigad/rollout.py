"""Rollouts: the student's own completions, N for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minigad.chat import Prompt, Row, decode, encode_prompt
from minigad.model import LanguageModel, split_rows

__all__ = ["Rollouts", "generate"]


@dataclass(frozen=True)
class Rollouts:
    """B·N completions, those of one prompt beside each other. Groups are known by index, never by the prompt's text.

    rows: ids as sampled; texts: without the end token; finished: whether the student stopped by itself.
    """

    prompts: list[Prompt]
    rows: list[Row]
    texts: list[str]
    finished: list[bool]
    num_generations: int


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    num_generations: int = 1,
    temperature: float = 1.0,
    max_prompt_length: int = 2048,
    max_completion_length: int = 256,
    seed: int,
    token_budget: int = 16384,
) -> Rollouts:
    """Sample completions from the full distribution at `temperature`; 0 means greedy.

    top-p, top-k and every penalty are off whatever the model's own generation settings say: the log-probabilities that the
    loss uses are those of the distribution that was sampled. The draw depends on `seed` and the prompts alone.
    """
    prompt_ids = [encode_prompt(model.tokenizer, prompt)[-max_prompt_length:] for prompt in prompts]
    repeated = [ids for ids in prompt_ids for _ in range(num_generations)]
    completions: list[list[int]] = [[] for _ in repeated]
    devices = [model.device] if model.device.type == "cuda" else []
    with model.active(train=False), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for chunk in split_rows([len(ids) + max_completion_length for ids in repeated], token_budget):
            sampled = _sample(model, [repeated[i] for i in chunk], temperature, max_completion_length)
            for i, ids in zip(chunk, sampled, strict=True):
                completions[i] = ids
    decoded = [decode(model.tokenizer, ids) for ids in completions]
    return Rollouts(
        prompts=list(prompts),
        rows=[Row(tuple(p), tuple(c)) for p, c in zip(repeated, completions, strict=True)],
        texts=[text for text, _ in decoded],
        finished=[finished for _, finished in decoded],
        num_generations=num_generations,
    )


def _sample(model: LanguageModel, prompt_ids: list[list[int]], temperature: float, max_new: int) -> list[list[int]]:
    tokenizer, width = model.tokenizer, max(map(len, prompt_ids))
    ids = torch.full((len(prompt_ids), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompt_ids):  # padding on the left: all rows start to speak at the same place
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    out = model.model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=_generation_config(tokenizer, temperature, max_new),
    )
    return [_up_to_end(row, tokenizer.eos_token_id) for row in out[:, width:].tolist()]


def _up_to_end(ids: list[int], eos_token_id: int) -> list[int]:
    """Cut after the first end token, inclusive: it is the student's choice to stop and must be trained."""
    return ids[: ids.index(eos_token_id) + 1] if eos_token_id in ids else ids


def _generation_config(tokenizer: Any, temperature: float, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    # An unset field is filled in from the model's own generation_config, so that every one that matters is set here.
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    return GenerationConfig(
        **sampling,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
