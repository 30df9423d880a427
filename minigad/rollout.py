"""Rollouts: the student's own completions, N for each prompt, with the log-probabilities they were sampled at.

A prompt is read once for its N completions, and a row that has ended soon leaves the batch. Tokens are drawn by inverting the
cumulative distribution at uniform numbers that depend on (seed, row, position) alone: how rows are split, sorted or dropped
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minigad import parallel
from minigad.chat import Prompt, Row, decode, encode_prompt
from minigad.config import UserError
from minigad.model import LanguageModel, split_rows

__all__ = ["Rollouts", "Sampled", "Sampler", "SamplingParams", "generate", "sample", "up_to_end"]

# Finished rows leave the batch when they are this share of it: every departure copies the cache of those that stay.
DEPARTURE = 1 / 8


@dataclass(frozen=True)
class Rollouts:
    """B·N completions, those of one prompt beside each other. Groups are known by index, never by the prompt's text.

    rows: ids as sampled; texts: without the end token; finished: whether the student stopped by itself; logprobs (R, T): of
    the sampled tokens at the sampling temperature, as the sampler computed them, zero on padding.
    """

    prompts: list[Prompt]
    rows: list[Row]
    texts: list[str]
    finished: list[bool]
    num_generations: int
    logprobs: Tensor | None = None


class SamplingParams(NamedTuple):
    """What a sampler is asked for; temperature 0 is greedy, token_budget the padded tokens it may hold at one time."""

    num_generations: int
    temperature: float
    max_completion_length: int
    seed: int
    token_budget: int
    merged: bool = False
    first_prompt: int = 0  # place of the first prompt in the step's whole batch, where processes share it


class Sampled(NamedTuple):
    """One completion: ids, up to the end token inclusive if it ended, and their log-probabilities."""

    ids: list[int]
    logprobs: list[float]


class Sampler(Protocol):
    """Anything that completes prompts: `sample` below, or an engine of its own (minigad.vllm).

    Returns N completions a prompt, those of one prompt beside each other, sampled from the full distribution.
    """

    def __call__(
        self, model: LanguageModel, prompt_ids: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Sampled]:
        """Sample with the model's weights as they are now."""
        ...


def generate(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    num_generations: int = 1,
    temperature: float = 1.0,
    max_prompt_length: int = 2048,
    max_completion_length: int = 256,
    seed: int,
    token_budget: int = 262_144,
    merged: bool = False,
    first_prompt: int = 0,
    sampler: Sampler | None = None,
) -> Rollouts:
    """Sample completions from the full distribution at `temperature`; 0 means greedy.

    top-p, top-k and every penalty are off whatever the model's own generation settings say: the log-probabilities that the
    loss uses are those of the distribution that was sampled. The draw depends on `seed`, the prompts and, where several
    processes share a batch, the place of the first of them in it.
    `merged` folds the adapter into a scratch copy of the weights while sampling: faster, and exact but for rounding.
    """
    prompt_ids = [encode_prompt(model.tokenizer, prompt)[-max_prompt_length:] for prompt in prompts]
    if [] in prompt_ids:
        raise UserError(
            f"prompt {prompt_ids.index([])} has no tokens, so that nothing leads to the first of a completion; leave it out"
        )
    params = SamplingParams(
        num_generations, temperature, max_completion_length, seed, token_budget, merged, first_prompt
    )
    sampled = (sampler or sample)(model, prompt_ids, params)
    assert len(sampled) == len(prompts) * num_generations, (len(sampled), len(prompts), num_generations)
    decoded = [decode(model.tokenizer, one.ids) for one in sampled]
    repeated = [tuple(ids) for ids in prompt_ids for _ in range(num_generations)]
    return Rollouts(
        prompts=list(prompts),
        rows=[Row(prompt, tuple(one.ids)) for prompt, one in zip(repeated, sampled, strict=True)],
        texts=[text for text, _ in decoded],
        finished=[finished for _, finished in decoded],
        num_generations=num_generations,
        logprobs=torch.nn.utils.rnn.pad_sequence([torch.tensor(one.logprobs) for one in sampled], batch_first=True),
    )


@torch.no_grad()
def sample(model: LanguageModel, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> list[Sampled]:
    """Sample with transformers' own forward pass: the sampler that needs nothing but the model."""
    num, length = params.num_generations, params.max_completion_length
    generator = torch.Generator().manual_seed(params.seed)
    everyone = torch.rand(params.first_prompt + len(prompt_ids), num, length, generator=generator, dtype=torch.float64)
    uniforms = everyone[params.first_prompt :]
    completions: list[list[Sampled]] = [[] for _ in prompt_ids]
    sizes = [num * (len(ids) + length) for ids in prompt_ids]
    with model.active(train=False), model.merged() if params.merged else nullcontext():
        for chunk, _ in parallel.in_step(split_rows(sizes, params.token_budget)):
            rows = _sample_chunk(model, [prompt_ids[i] for i in chunk], uniforms[chunk], params)
            for k, i in enumerate(chunk):
                completions[i] = rows[k * num : (k + 1) * num]
    return [one for group in completions for one in group]


def _sample_chunk(
    model: LanguageModel, prompt_ids: Sequence[Sequence[int]], uniforms: Tensor, params: SamplingParams
) -> list[Sampled]:
    """Sample prompts that fit together. uniforms (P, N, T)."""
    num, length, end = params.num_generations, params.max_completion_length, model.tokenizer.eos_token_id
    uniforms = uniforms.flatten(0, 1).to(model.device)
    batch = _Batch(model, prompt_ids, num)
    ids = torch.full(uniforms.shape, end, device=model.device)
    logprobs = torch.zeros(uniforms.shape, device=model.device)
    for step in range(length):
        tokens, values = _draw(batch.logits(), uniforms[batch.alive, step], params.temperature)
        ids[batch.alive, step], logprobs[batch.alive, step] = tokens, values
        speaking = batch.leave(tokens == end)
        if step == length - 1 or not parallel.anyone(speaking):
            break
        batch.advance(ids[batch.alive, step])
    return [up_to_end(row, values, end) for row, values in zip(ids.tolist(), logprobs.tolist(), strict=True)]


def _draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return one token a row of (R, V) logits, at the place where the cumulative distribution passes uniforms (R,), and its log p.

    In float64, so that a token of probability 1e-9 keeps its share of the draws.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.float().log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    logprobs = (logits.float() / temperature).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    thresholds = uniforms.unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, thresholds, right=True).clamp_(max=logits.shape[1] - 1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


class _Batch:
    """The rows that are still speaking, and what the model remembers of them."""

    def __init__(self, model: LanguageModel, prompt_ids: Sequence[Sequence[int]], num_generations: int) -> None:
        """Read each prompt once, padded on the left so that all rows begin to speak at the same place; then copy for N rows."""
        from transformers import DynamicCache

        self.model, width = model, max(map(len, prompt_ids))
        ids = torch.full((len(prompt_ids), width), model.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompt_ids):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        self.mask, self.cache = mask.to(model.device), DynamicCache(config=model.config)
        self.hidden = self._read(ids.to(model.device), (self.mask.cumsum(1) - 1).clamp(min=0))
        self.cache.batch_repeat_interleave(num_generations)
        self.mask, self.hidden = (x.repeat_interleave(num_generations, 0) for x in (self.mask, self.hidden))
        self.rows = torch.arange(len(self.mask), device=model.device)  # which row of the chunk each row of the batch is
        self.speaking = torch.ones_like(self.rows, dtype=torch.bool)
        self.alive = self.rows

    def logits(self) -> Tensor:
        """Return (R, V) logits of the next token of the rows that speak."""
        return self.model.next_logits(self.hidden[self.speaking])

    def leave(self, ended: Tensor) -> bool:
        """Note which speaking rows have ended, and drop them once they are many. False if nobody speaks any more."""
        self.speaking[self.speaking.nonzero().squeeze(1)[ended]] = False
        self.alive = self.rows[self.speaking]
        silent = len(self.rows) - len(self.alive)
        if len(self.alive) and silent >= DEPARTURE * len(self.rows):
            kept = self.speaking.nonzero().squeeze(1)
            self.cache.batch_select_indices(kept)
            self.mask, self.rows, self.speaking = self.mask[kept], self.rows[kept], self.speaking[kept]
        return len(self.alive) > 0

    def advance(self, tokens: Tensor) -> None:
        """Give each speaking row the token it said; silent rows still in the batch say an end token that nobody reads."""
        ids = torch.full_like(self.rows, self.model.tokenizer.eos_token_id)
        ids[self.speaking] = tokens
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(positions)], 1)
        self.hidden = self._read(ids.unsqueeze(1), positions)

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.model.read(ids, self.mask, positions, self.cache)


def up_to_end(ids: list[int], logprobs: list[float], end: int) -> Sampled:
    """Cut after the first end token, inclusive: it is the student's choice to stop and must be trained."""
    length = ids.index(end) + 1 if end in ids else len(ids)
    return Sampled(ids[:length], logprobs[:length])
