"""Teachers: something that answers prompts. The student sees the text and nothing else.

A teacher here is a local model behind a conversation that the student is not shown. Because it is local, its
log-likelihood is known, which no API gives: we use it to *measure* students, never to train them.
"""

from __future__ import annotations

from collections.abc import Sequence

from minigad.chat import Prompt, encode
from minigad.model import LanguageModel
from minigad.rollout import Rollouts, generate

__all__ = ["SHORT_ANSWERS", "HiddenPromptTeacher"]

# The hidden conversation of the embedded data set: it teaches by example to answer in one plain sentence.
SHORT_ANSWERS: list[dict[str, str]] = [
    {"role": "user", "content": "What is a lighthouse for?"},
    {
        "role": "assistant",
        "content": "A lighthouse warns ships of dangerous rocks and shows them the way to the harbor.",
    },
    {"role": "user", "content": "My socks keep disappearing in the laundry. Any idea?"},
    {"role": "assistant", "content": "Wash them together in a small mesh bag, so that none can hide."},
    {"role": "user", "content": "Describe thunder to a child."},
    {"role": "assistant", "content": "Thunder is the loud sound that air makes when lightning heats it in a flash."},
    {"role": "user", "content": "Name two uses for an old newspaper."},
    {"role": "assistant", "content": "You can clean windows with it, or wrap glasses in it before you move house."},
]


class HiddenPromptTeacher:
    """A language model that answers behind `examples`, sampled at exactly `temperature`."""

    def __init__(self, model: LanguageModel, examples: list[dict[str, str]], temperature: float) -> None:
        self.model = model
        self.examples = examples
        self.temperature = temperature

    def sample(self, prompts: Sequence[Prompt], *, num_samples: int, max_completion_length: int, seed: int) -> Rollouts:
        """Answer each prompt `num_samples` times."""
        hidden = [self._behind(prompt) for prompt in prompts]
        return generate(
            self.model,
            hidden,
            num_generations=num_samples,
            temperature=self.temperature,
            max_completion_length=max_completion_length,
            seed=seed,
        )

    def logprob(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finished: Sequence[bool], max_completion_length: int
    ) -> list[float]:
        """Return log p_T(completion | prompt) in nats, of text cut at `max_completion_length` tokens like a student's."""
        rows = [
            encode(
                self.model.tokenizer, self._behind(p), text, finished=done, max_completion_length=max_completion_length
            )
            for p, text, done in zip(prompts, texts, finished, strict=True)
        ]
        return self.model.logprobs_of(rows, self.temperature).sum(1).tolist()

    def _behind(self, prompt: Prompt) -> list[dict[str, str]]:
        return [*self.examples, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)]
