"""The one place where a prompt and a completion become token ids, for both players and both sides.

Teacher text and student text pass through `encode` alike: same template, same tokenizer call, exactly one end token
after a finished completion and none after a cut one. A discriminator fed by anything else wins by the end token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from minigad.config import GADConfig, UserError

__all__ = ["Prompt", "Row", "decode", "encode", "encode_all", "encode_completion", "encode_prompt", "prompt_text"]

# A prompt is a string (one user message) or a conversation [{"role": ..., "content": ...}, ...].
Prompt = str | list[dict[str, str]]


class Row(NamedTuple):
    """Token ids of one prompt and one completion; the completion ends with the end token if it is finished."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the whole row."""
        return len(self.prompt_ids) + len(self.completion_ids)


def encode(
    tokenizer: Any,
    prompt: Prompt,
    completion: str,
    *,
    finished: bool = True,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> Row:
    """Turn a prompt and a completion's text into ids, whoever wrote the completion.

    A completion longer than `max_completion_length` is cut and so loses its end token; a longer prompt keeps its last tokens.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    if max_prompt_length is not None:
        prompt_ids = prompt_ids[-max_prompt_length:]
    completion_ids = encode_completion(tokenizer, completion, finished)[:max_completion_length]
    return Row(tuple(prompt_ids), tuple(completion_ids))


def encode_all(tokenizer: Any, prompts: Sequence[Prompt], completions: Sequence[str], config: GADConfig) -> list[Row]:
    """Encode finished completions, with the config's limits."""
    return [
        encode(
            tokenizer,
            prompt,
            completion,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the ids of a prompt, up to where the completion starts.

    A string is one user message if the tokenizer has a chat template, else plain text. Text that looks like a control
    token (`<|im_end|>`) stays text. Raises UserError for a conversation without a template.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return _conversation_ids(tokenizer, messages)
    if not isinstance(prompt, str):
        raise UserError(
            "the prompts are conversations but the tokenizer has no chat template; "
            "set tokenizer.chat_template, or give the prompts as strings"
        )
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and tokenizer("").input_ids else []
    return bos + _plain_ids(tokenizer, prompt)


def encode_completion(tokenizer: Any, text: str, finished: bool) -> list[int]:
    """Return the ids of a completion's text, with the end token if it is finished."""
    return _plain_ids(tokenizer, text) + ([tokenizer.eos_token_id] if finished else [])


def cut(tokenizer: Any, text: str, max_completion_length: int) -> tuple[str, bool]:
    """Return what a speaker with this tokenizer could have said of `text` in so many tokens, and whether it is all of it."""
    ids = encode_completion(tokenizer, text, finished=True)
    return (text, True) if len(ids) <= max_completion_length else decode(tokenizer, ids[:max_completion_length])


def decode(tokenizer: Any, completion_ids: Sequence[int]) -> tuple[str, bool]:
    """Return a completion's text without its end token, and whether it had one.

    Other control tokens stay visible in the text: a student that emits them should be seen to.
    """
    finished = bool(completion_ids) and completion_ids[-1] == tokenizer.eos_token_id
    ids = list(completion_ids[:-1] if finished else completion_ids)
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), finished


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as one readable string; a conversation of one user message reads as that message."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise text as text: control tokens written out in it are split into ordinary pieces."""
    if not any(token in text for token in _control_tokens(tokenizer)):
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def _conversation_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    contents = [message["content"] for message in messages]
    if not any(token in content for content in contents for token in _control_tokens(tokenizer)):
        return list(tokenizer(_render(tokenizer, messages), add_special_tokens=False).input_ids)
    # Render with a stand-in for each content, then tokenise the template's own pieces and the contents apart:
    # only the template may speak in control tokens.
    marks = [f"\ue000{i}\ue001" for i in range(len(contents))]
    text = _render(tokenizer, [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
    ids: list[int] = []
    for mark, content in zip(marks, contents, strict=True):
        before, found, text = text.partition(mark)
        ids += list(tokenizer(before, add_special_tokens=False).input_ids)
        ids += _plain_ids(tokenizer, content) if found else []
    return ids + list(tokenizer(text, add_special_tokens=False).input_ids)


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _control_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values()]
