"""The discriminator as a tool: best of N, a filter of pairs, and a reward function for TRL.

It was trained to rank completions of one prompt (Bradley-Terry), so that a score has no zero that holds across prompts:
everything here compares texts of the same prompt. It knows its own student's mistakes, on prompts like those of its run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from minigad.chat import Prompt
from minigad.config import UserError
from minigad.data import load_pairs
from minigad.discriminator import Discriminator
from minigad.sources import count_of

__all__ = ["Best", "Filtered", "as_reward_function", "best_of_n", "filter_pairs", "score_texts"]


class Best(NamedTuple):
    """The completion of the highest score (the first of equals), its place, and the scores of all."""

    completion: str
    place: int
    scores: list[float]


class Filtered(NamedTuple):
    """Every pair that was given, either kept or dropped, as rows with `score` and `preference`; `lines()` counts them."""

    kept: list[dict[str, Any]]
    dropped: list[dict[str, Any]]
    at_least: float
    cut: int  # pairs of which the discriminator read the beginning alone
    repeats: int  # exact repeats of an earlier row, in neither list

    def lines(self) -> list[str]:
        """Return the counts as sentences."""
        total = len(self.kept) + len(self.dropped) + self.repeats
        lines = [
            f"Read {count_of(total, 'pair')}: kept {len(self.kept)}, dropped {len(self.dropped)} with a preference below "
            f"{self.at_least:g}."
        ]
        if self.repeats:
            lines.append(f"Left out as an exact repeat of an earlier row: {count_of(self.repeats, 'row')}.")
        if self.cut:
            lines.append(f"Judged by the beginning, being longer than max_completion_length: {self.cut}.")
        return lines


def score_texts(
    discriminator: Discriminator,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    finished: Sequence[bool] | None = None,
) -> list[float]:
    """Score completions, each of its own prompt, in the form of prompt that the run was trained on.

    `finished` False: cut off, without an end token; default: all are whole. What lies beyond max_completion_length is not
    read. Raises UserError for lists of unequal length, FloatingPointError for a score that is not finite.
    """
    done = [True] * len(completions) if finished is None else list(finished)
    if not len(prompts) == len(completions) == len(done):
        raise UserError(
            f"there are {len(prompts)} prompts, {len(completions)} completions and {len(done)} finished flags; "
            "give a prompt and a flag for each completion"
        )
    if not completions:
        return []
    return _finite(discriminator.scores_of(discriminator.encode(prompts, completions, done)).scores).tolist()


def _finite(scores: torch.Tensor) -> torch.Tensor:
    """Return scores as they are; FloatingPointError for one that is not finite."""
    for i, score in enumerate(scores.tolist()):
        if not math.isfinite(score):
            raise FloatingPointError(f"the discriminator's score of completion {i} is {score}; its weights are damaged")
    return scores


def best_of_n(
    discriminator: Discriminator,
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[str]],
    finished: Sequence[Sequence[bool]] | None = None,
) -> list[Best]:
    """Return the candidate that the discriminator ranks first, for each prompt; groups may differ in size.

    Best of N lies up to log N - (N-1)/N nats (KL) from what it draws from (arXiv 2009.01325); a large N finds what fools the
    discriminator. `finished`: see score_texts. Raises UserError for a prompt without candidates, or lists that do not match.
    """
    sizes = [len(group) for group in candidates]
    if len(prompts) != len(sizes) or (finished is not None and [len(flags) for flags in finished] != sizes):
        raise UserError(
            f"there are {len(prompts)} prompts and groups of {sizes[:8]} candidates, and what is given as finished must match; "
            "give a group a prompt, and a flag a candidate"
        )
    if 0 in sizes:
        raise UserError(f"prompt {sizes.index(0)} has no candidates; give at least one")
    every = [prompt for prompt, group in zip(prompts, candidates, strict=True) for _ in group]
    texts = [text for group in candidates for text in group]
    done = None if finished is None else [flag for group in finished for flag in group]
    scores = iter(score_texts(discriminator, every, texts, done))
    return [_best(group, [next(scores) for _ in group]) for group in candidates]


def _best(group: Sequence[str], scores: list[float]) -> Best:
    index = scores.index(max(scores))
    return Best(group[index], index, scores)


def filter_pairs(
    discriminator: Discriminator, source: Any, *, at_least: float = 0.5, num_generations: int = 8, seed: int = 0
) -> Filtered:
    """Divide pairs (whatever load_pairs reads) by whether the discriminator prefers them to its student's own samples.

    preference = mean over N fresh samples ŷ of the run's student of sigmoid(score(x, y) - score(x, ŷ)): the probability,
    by Bradley-Terry, that y and not ŷ is the teacher's. Prompts can be compared by it, as they cannot by raw scores. Costs N
    samples a prompt. Kept is a pair with preference >= at_least; no row is lost: see Filtered.
    """
    if not 0 <= at_least <= 1:
        raise UserError(f"at_least is {at_least:g}, which no probability is; give a number between 0 and 1")
    if num_generations < 1:
        raise UserError(f"num_generations is {num_generations}; give at least 1")
    dataset, report = load_pairs(source)
    prompts, completions = list(dataset["prompt"]), list(dataset["completion"])
    read = discriminator.encode_teacher(prompts, completions)
    scores = _finite(discriminator.scores_of(read).scores)
    against = _sample_scores(discriminator, prompts, num_generations, seed)
    preferences = torch.sigmoid(scores.unsqueeze(1) - against).double().mean(1)
    columns = (prompts, completions, scores.tolist(), preferences.tolist())
    rows = [
        dict(zip(("prompt", "completion", "score", "preference"), row, strict=True))
        for row in zip(*columns, strict=True)
    ]
    kept = [row for row in rows if row["preference"] >= at_least]
    dropped = [row for row in rows if not row["preference"] >= at_least]
    end = discriminator.language_model.tokenizer.eos_token_id
    return Filtered(kept, dropped, at_least, sum(r.completion_ids[-1] != end for r in read), report.duplicates_dropped)


def _sample_scores(discriminator: Discriminator, prompts: list[Prompt], num: int, seed: int) -> torch.Tensor:
    """Score (P, N) fresh samples of the student at the run's temperature."""
    rollouts = discriminator.student.generate(prompts, discriminator.config, seed=seed, num_generations=num)
    every = [prompt for prompt in prompts for _ in range(num)]
    scores = score_texts(discriminator, every, rollouts.texts, rollouts.finished)
    return torch.tensor(scores, device=discriminator.language_model.device).view(len(prompts), num)


def as_reward_function(discriminator: Discriminator, *, end_token_id: int | None = None) -> Callable[..., list[float]]:
    """Return f(prompts, completions, **columns) -> scores, as TRL's GRPOTrainer takes it, plain and conversational.

    The discriminator stays as it is: this is the frozen judge of the paper's Fig 6, which a policy learns to exploit, and not
    the game. An implicit one compares with the run's student, not with TRL's policy. With `end_token_id`, the policy's,
    completions whose `completion_ids` (TRL passes them) lack it at the end are scored as cut off, as in training; without
    it all count as whole. Raises UserError for a completion that is not one message of text.
    """

    def discriminator_reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        finished = None
        if end_token_id is not None and columns.get("completion_ids") is not None:
            finished = [bool(len(ids)) and int(ids[-1]) == end_token_id for ids in columns["completion_ids"]]
        texts = [_said(i, completion) for i, completion in enumerate(completions)]
        return score_texts(discriminator, [_asked(i, prompt) for i, prompt in enumerate(prompts)], texts, finished)

    return discriminator_reward


def _said(index: int, completion: Any) -> str:
    """The text of a completion: a string, or a conversation of one message of the assistant."""
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = completion[0].get("content")
    if not isinstance(completion, str):
        raise UserError(
            f"completion {index} is {str(completion)[:60]!r}; the discriminator reads a string or one message of text, "
            "no tool calls and no images"
        )
    return completion


def _asked(index: int, prompt: Any) -> Prompt:
    """A prompt as the discriminator's run has them; TRL's messages may hold fields of None beside role and content."""
    if isinstance(prompt, str):
        return prompt
    messages = prompt if isinstance(prompt, list) else [prompt]
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(
                f"prompt {index} is {str(prompt)[:60]!r}; the discriminator reads a string or messages of role and text"
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]
