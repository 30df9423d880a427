"""Teachers: something that answers prompts. The student sees the text and nothing else.

Three of them behind one protocol: any OpenAI-compatible endpoint, a local model behind a conversation that the student is
not shown, and a plain function. Only the local one knows its log-likelihood, which no API gives: we use it to *measure*
students, never to train them. What comes back from an endpoint is checked here before anyone counts it as an answer.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol
from urllib.parse import urlsplit

from minigad.chat import Prompt
from minigad.config import UserError

if TYPE_CHECKING:
    from minigad.model import LanguageModel
    from minigad.rollout import Rollouts

__all__ = [
    "SHORT_ANSWERS",
    "Answer",
    "HiddenPromptTeacher",
    "OpenAITeacher",
    "Sampling",
    "ScriptedTeacher",
    "Teacher",
    "TeacherError",
    "find_key",
    "is_local",
]

Messages = list[dict[str, str]]

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

MAX_BODY = 1 << 26  # bytes; an answer longer than this is no answer
MIN_SECRET = 12  # a shorter key ("EMPTY", "ollama") is a placeholder, and may be a word of an answer
STOP_AT_ONCE = (401, 402, 403, 404)  # what is wrong with these is wrong with every call
STOP_CODES = ("insufficient_quota", "model_not_found", "invalid_api_key")
MAX_WAIT = 86400.0  # seconds
ASK_AGAIN = (408, 409, 425, 429)  # and everything from 500 on


@dataclass(frozen=True)
class Sampling:
    """What a call asks for beside its messages. `seed` None leaves it to the server; sample i gets seed + i."""

    temperature: float = 1.0
    max_tokens: int = 1024
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature is {self.temperature!r}; it must lie between 0 and 100")
        if not 1 <= self.max_tokens <= 1 << 20:
            raise UserError(f"max_tokens is {self.max_tokens!r}; it must lie between 1 and {1 << 20}")


@dataclass(frozen=True)
class Answer:
    """What a teacher said. Untrusted text: it may be empty, hostile, or hold halves of characters.

    finish_reason: stop, length, content_filter or whatever the endpoint wrote; model: the name that the endpoint gave;
    tokens as the endpoint counted them, or None if it did not.
    """

    text: str
    finish_reason: str = "stop"
    refusal: str = ""
    model: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class TeacherError(Exception):
    """A call that gave no answer. `retry`: it may succeed if made again; `maybe_paid`: it may have been charged."""

    def __init__(
        self, message: str, *, retry: bool, retry_after: float | None = None, maybe_paid: bool = False
    ) -> None:
        super().__init__(message)
        self.retry = retry
        self.retry_after = retry_after  # seconds, if the server named them
        self.maybe_paid = maybe_paid


class Teacher(Protocol):
    """Anything that answers a conversation; called from several threads at once."""

    name: str  # part of the key under which an answer is stored

    def answer(self, messages: Messages, sampling: Sampling, sample: int) -> Answer:
        """Return sample number `sample`; raise TeacherError for this call, UserError if every call would fail."""
        ...


class ScriptedTeacher:
    """A function of (messages, sample) that returns text: for tests, templates, and teachers we have not thought of."""

    def __init__(self, name: str, function: Callable[[Messages, int], str]) -> None:
        self.name = name
        self.function = function

    def answer(self, messages: Messages, sampling: Sampling, sample: int) -> Answer:
        """Return what the function returns; temperature and length are its own affair."""
        return Answer(self.function(messages, sample), model=self.name)


class HiddenPromptTeacher:
    """A language model that answers behind `examples`, sampled at exactly `temperature`."""

    def __init__(
        self, model: LanguageModel, examples: list[dict[str, str]], temperature: float, name: str = "local"
    ) -> None:
        self.model = model
        self.examples = examples
        self.temperature = temperature
        hidden = hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:8]
        self.name = f"{name}+{hidden}" if examples else name
        self._one_at_a_time = threading.Lock()

    def answer(self, messages: Messages, sampling: Sampling, sample: int) -> Answer:
        """Draw one completion; threads take turns. Without a seed the draw depends on the prompt and `sample` alone."""
        assert sampling.temperature == self.temperature, (sampling.temperature, self.temperature)
        seed = (sampling.seed or 0) + sample
        with self._one_at_a_time:
            drawn = self.sample([messages], num_samples=1, max_completion_length=sampling.max_tokens, seed=seed)
        row, finished = drawn.rows[0], drawn.finished[0]
        tokens = (len(row.prompt_ids), len(row.completion_ids))
        return Answer(drawn.texts[0], "stop" if finished else "length", "", self.name, *tokens)

    def sample(self, prompts: Sequence[Prompt], *, num_samples: int, max_completion_length: int, seed: int) -> Rollouts:
        """Answer each prompt `num_samples` times."""
        from minigad.rollout import generate

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
        from minigad.chat import encode

        rows = [
            encode(
                self.model.tokenizer, self._behind(p), text, finished=done, max_completion_length=max_completion_length
            )
            for p, text, done in zip(prompts, texts, finished, strict=True)
        ]
        return self.model.logprobs_of(rows, self.temperature).sum(1).tolist()

    def _behind(self, prompt: Prompt) -> list[dict[str, str]]:
        return [*self.examples, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)]


class OpenAITeacher:
    """Any endpoint that speaks OpenAI's chat completions: OpenAI, vLLM, Ollama, llama.cpp, OpenRouter.

    The client's own silent retries are off: `collect` has the one retry loop. `timeout` bounds a whole call in seconds,
    a slow trickle of bytes included. The key is blotted out of everything that the endpoint sends back.
    """

    def __init__(self, model: str, base_url: str | None = None, key: str = "none", timeout: float = 120.0) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                "an OpenAI-compatible teacher needs the openai package; pip install 'minigad[teacher]'"
            ) from None
        if not 0 < timeout <= MAX_WAIT:
            raise UserError(f"timeout is {timeout!r}; it must be above 0 and at most {MAX_WAIT:g} seconds")
        self.name = model
        self.timeout = timeout
        self._key = key
        self._limit_field = "max_tokens"
        self._client = openai.OpenAI(api_key=key, base_url=_checked_url(base_url), timeout=timeout, max_retries=0)
        self._errors = openai

    def __repr__(self) -> str:
        return f"OpenAITeacher({self.name!r})"

    def answer(self, messages: Messages, sampling: Sampling, sample: int) -> Answer:
        """Make one call and return its checked answer; sampling.seed + sample goes with it, if there is a seed."""
        fields: dict[str, Any] = {"temperature": sampling.temperature, self._limit_field: sampling.max_tokens}
        if sampling.seed is not None:
            fields["seed"] = sampling.seed + sample
        return _read_answer(self._redacted(self._call(messages, fields)))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _call(self, messages: Messages, fields: dict[str, Any]) -> bytes:
        ends = time.monotonic() + self.timeout
        create: Any = self._client.chat.completions.with_streaming_response.create
        try:
            # The raw body, since the client lets HTML, error bodies and broken JSON through as answers.
            with create(model=self.name, messages=messages, **fields) as response:
                return _read_body(response, ends)
        except self._errors.APIStatusError as error:
            text = self._redacted(error.response.content).decode("utf-8", "replace")
            status, headers = error.status_code, error.response.headers
        except self._errors.APIConnectionError as error:  # a timeout is one too
            sent = type(error.__cause__).__name__ != "ConnectError"
            message = f"no answer: {self._in_words(error)}"
            raise TeacherError(message, retry=True, maybe_paid=sent) from None
        if status == 400 and "max_completion_tokens" in text and self._limit_field == "max_tokens":
            self._limit_field = "max_completion_tokens"  # what newer models of OpenAI call it
            raise TeacherError("the endpoint wants max_completion_tokens", retry=True, retry_after=0.0)
        _raise_status(status, text, _retry_after(headers), self.name)

    def _in_words(self, error: Exception) -> str:
        cause = error.__cause__ or error
        return self._redacted(f"{type(cause).__name__} ({cause})".encode()).decode()[:200]

    def _redacted(self, body: bytes) -> bytes:
        return body.replace(self._key.encode(), b"[key]") if len(self._key) >= MIN_SECRET else body


def find_key(base_url: str | None) -> str:
    """Return the key: OPENAI_API_KEY of the environment, of Colab's secrets, or typed at a prompt that does not echo.

    An endpoint on this machine needs none. Raises UserError if there is no key and nobody to ask.
    """
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        return key
    if key := _colab_key():
        return key
    if is_local(base_url):
        return "none"
    if not sys.stdin.isatty():
        raise UserError("there is no key for the endpoint; set the environment variable OPENAI_API_KEY")
    import getpass

    return getpass.getpass("key of the endpoint (not shown, not stored): ").strip()


def is_local(base_url: str | None) -> bool:
    """Tell whether the endpoint is on this machine."""
    return bool(base_url) and urlsplit(base_url or "").hostname in ("localhost", "127.0.0.1", "::1", "0.0.0.0")


def _colab_key() -> str:
    if "google.colab" not in sys.modules:
        return ""
    from google.colab import userdata  # type: ignore[import-not-found]

    try:
        return (userdata.get("OPENAI_API_KEY") or "").strip()
    except Exception:  # not granted or not there: Colab has an exception of its own for each
        return ""


def _checked_url(base_url: str | None) -> str | None:
    """Return the URL; refuse one that carries a secret, since URLs are logged everywhere."""
    if base_url is None:
        return None
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--base-url is {base_url!r}; give a whole URL such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError("--base-url holds a user name, a password or a query; give the key in OPENAI_API_KEY instead")
    return base_url


def _read_body(response: Any, ends: float) -> bytes:
    body = bytearray()
    try:
        for piece in response.iter_bytes():
            body += piece
            if time.monotonic() > ends or len(body) > MAX_BODY:
                break
        else:
            return bytes(body)
    except Exception as error:  # of the HTTP library, which differs between versions of openai
        message = f"the answer broke off after {len(body)} bytes: {type(error).__name__}"
        raise TeacherError(message, retry=True, maybe_paid=True) from None
    wrong = f"is above {MAX_BODY} bytes" if len(body) > MAX_BODY else f"was still coming ({len(body)} bytes)"
    raise TeacherError(f"the answer {wrong} at the end of the time for one call", retry=True, maybe_paid=True)


def _raise_status(status: int, text: str, retry_after: float | None, model: str) -> NoReturn:
    message = f"status {status}: {_server_words(text)}"
    if status in STOP_AT_ONCE or _error_of(text).get("code") in STOP_CODES:
        remedy = {401: "check the key", 403: "check what the key may do", 402: "check the account's balance"}
        remedy[404] = f"check --base-url and the model name {model!r}"
        raise UserError(f"the endpoint refuses every call, {message}; {remedy.get(status, 'check the account')}")
    raise TeacherError(message, retry=status in ASK_AGAIN or status >= 500, retry_after=retry_after)


def _server_words(text: str) -> str:
    """Return the message of an error body, or its beginning, on one line that a terminal can be trusted with."""
    words = str(_error_of(text).get("message") or text)
    return "".join(c if c.isprintable() else "?" for c in " ".join(words.split()))[:200] or "(no words)"


def _error_of(text: str) -> dict[str, Any]:
    """Return the error object of a body, {} if there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    error = found.get("error", found) if isinstance(found, dict) else found
    return error if isinstance(error, dict) else {"message": error}


def _retry_after(headers: Any) -> float | None:
    """Return the seconds of a Retry-After header, which may be a number or a date; a day at most."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return None if math.isnan(seconds) else min(max(0.0, seconds), MAX_WAIT)


def _read_answer(body: bytes) -> Answer:
    """Turn a body with status 200 into an Answer, or say in a TeacherError why it is none."""
    found = _parse(body)
    if found.get("error"):
        raise TeacherError(f"status 200 with an error in it: {_server_words(json.dumps(found))}", retry=True)
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise _no_answer("no choices" if not choices else "a choice without a message")
    content, refusal = message.get("content"), message.get("refusal")
    if not isinstance(content, str | None) or not isinstance(refusal, str | None):
        raise _no_answer(f"a content of type {type(content).__name__}")
    usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
    return Answer(
        text=content or "",
        finish_reason=str(choice.get("finish_reason") or "unknown"),
        refusal=refusal or "",
        model=str(found.get("model") or ""),
        prompt_tokens=_tokens(usage, "prompt_tokens"),
        completion_tokens=_tokens(usage, "completion_tokens"),
    )


def _parse(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        start = " ".join(body[:60].decode("utf-8", "replace").split())
        why = "HTML instead of JSON" if start.startswith("<") else f"broken JSON ({error})"
        raise _no_answer(f"{why}, beginning {start!r}") from None
    if not isinstance(found, dict):
        raise _no_answer(f"JSON that is no object but a {type(found).__name__}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _no_answer(what: str) -> TeacherError:
    return TeacherError(f"status 200 with {what}", retry=True, maybe_paid=True)


def _tokens(usage: Any, field: str) -> int | None:
    value = usage.get(field)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else None
