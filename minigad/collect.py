"""Collecting a teacher's answers: many calls at once, within limits, one visible retry loop, and nothing paid for is lost.

The samples of a prompt are an endless sequence, numbered from 0. Sample s of N is number s; where a check's policy is
"retry", number s + N is drawn in its place, then s + 2N. Every number is one row of the store, so that a second run walks
the same way and finds what the first one paid for.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minigad.chat import Prompt
from minigad.checks import POLICIES, answer_classes
from minigad.config import UserError
from minigad.data import as_messages
from minigad.store import Store, request_key
from minigad.teacher import Answer, Messages, Sampling, Teacher, TeacherError

__all__ = [
    "PRICES",
    "CollectSettings",
    "Limiter",
    "Price",
    "Progress",
    "Summary",
    "asked",
    "collect",
    "drawn",
    "estimate_tokens",
    "find_price",
    "upper_tokens",
]

Again = Callable[[Prompt, Answer], bool]  # whether to draw another answer in this one's place

BACKOFF = (1.0, 60.0)  # seconds: the first wait, and the longest that is not the server's own wish
POLL = 0.2  # seconds between looks at what another process or the budget does


class Price(NamedTuple):
    """Dollars for a million tokens."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


# OpenAI's list prices as others quoted its page in March 2026: they change, so look yours up and override with --price or --prices.
PRICES = {
    "gpt-5": Price(1.25, 10.0),
    "gpt-5-mini": Price(0.25, 2.0),
    "gpt-5-nano": Price(0.05, 0.4),
    "gpt-4.1": Price(2.0, 8.0),
    "gpt-4.1-mini": Price(0.4, 1.6),
    "gpt-4.1-nano": Price(0.1, 0.4),
    "gpt-4o": Price(2.5, 10.0),
    "gpt-4o-mini": Price(0.15, 0.6),
}


@dataclass(frozen=True)
class CollectSettings:
    """How to ask: what for, how fast, how stubbornly, and when to stop. 0 or None is "no limit"."""

    sampling: Sampling = field(default_factory=Sampling)
    system: str = ""  # the teacher's own system prompt; the student never sees it
    samples: int = 1  # answers a prompt
    redraws: int = 2  # further answers in place of one that a check wants drawn again
    concurrency: int = 8
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    max_attempts: int = 6  # calls for one answer
    deadline: float | None = None  # seconds for the whole collection
    max_failures: int = 20  # answers given up, after which the collection stops
    budget: float | None = None  # dollars, over everything that this store ever paid
    price: Price | None = None
    policies: dict[str, str] = field(default_factory=lambda: dict(POLICIES))

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("concurrency", 1), ("max_attempts", 1), ("redraws", 0), ("max_failures", 0)):
            if getattr(self, name) < low:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be at least {low}")
        for name in ("requests_per_minute", "tokens_per_minute", "deadline", "budget"):
            if not (getattr(self, name) or 0) >= 0:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must not be negative")
        if self.price is not None and not all(0 <= one < float("inf") for one in self.price):
            raise UserError(
                f"the price is {self.price.prompt:g} and {self.price.completion:g}; give dollars, 0 or more"
            )
        if self.budget is not None and self.price is None:
            raise UserError("a budget needs the model's price; give --price IN OUT in dollars a million tokens")


@dataclass
class Progress:
    """Counts of a collection while it runs: answers wanted and done, and calls."""

    wanted: int = 0
    done: int = 0
    found: int = 0  # of the done ones: answers that were in the store already
    calls: int = 0
    failed: int = 0
    retried: int = 0
    spent: float = 0.0  # dollars, of this run; broken-off calls at the most they can have cost


@dataclass(frozen=True)
class Summary:
    """What a collection came to. `stopped` is empty if it went to its end, else the reason in words."""

    progress: Progress
    stopped: str
    failures: list[str]
    seconds: float

    def lines(self) -> list[str]:
        """Return the summary as sentences."""
        p = self.progress
        rate = f", {p.calls / self.seconds:.2f} calls a second" if p.calls and self.seconds > 0 else ""
        lines = [
            f"{p.done} of {p.wanted} answers there: {p.found} found in the store, {p.done - p.found} new "
            f"({p.calls} calls, {p.retried} of them again) in {self.seconds:.1f} s{rate}."
        ]
        lines += [f"{p.failed} answers given up:", *(f"  {failure}" for failure in self.failures)] if p.failed else []
        return [*lines, f"Stopped early: {self.stopped}."] if self.stopped else lines


class Limiter:
    """Space calls evenly, so that no minute holds more requests or tokens than allowed. Thread-safe."""

    def __init__(self, requests_per_minute: float = 0.0, tokens_per_minute: float = 0.0) -> None:
        self._gap = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._lock = threading.Lock()
        self._requests = self._tokens = self._held = 0.0  # the times before which no call may start

    def reserve(self, tokens: int, now: float) -> float:
        """Take the next place for a call of about `tokens` tokens and return the time when it may start."""
        with self._lock:
            start = max(now, self._requests, self._tokens, self._held)
            self._requests = start + self._gap if self._gap else 0.0
            self._tokens = max(self._tokens, start) + tokens * self._per_token
            return start

    def correct(self, tokens: int) -> None:
        """Add tokens that a call took beyond its reservation; negative gives back."""
        with self._lock:
            self._tokens += tokens * self._per_token

    def hold(self, until: float) -> None:
        """Let no call start before `until`: a server that says Retry-After to one says it to all."""
        with self._lock:
            self._held = max(self._held, until)

    @property
    def held_until(self) -> float:
        """The time of the last `hold`."""
        with self._lock:
            return self._held


def collect(
    teacher: Teacher,
    prompts: Iterable[tuple[str, Prompt]],
    store: Store,
    settings: CollectSettings,
    *,
    wanted: int = 0,
    again: Again | None = None,
    say: Callable[[str], None] = print,
    tick: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Ask the teacher for every sample of every prompt that the store lacks, and store each answer as it comes.

    `prompts` are (place, prompt) pairs, read as they are needed. `again` says which answers are drawn again, at most
    settings.redraws times; default: those that the checks' policies want so. `say` gets a sentence for every retry, `tick` the counts
    after every answer, from one thread at a time. Ctrl-C, the deadline, the budget and too many failures stop it: calls in flight are finished, all
    answers kept. Raises UserError, after that, if the endpoint refuses every call.
    """
    run = _Collection(teacher, store, settings, again or by_policies(settings), say, tick, wanted)
    started = time.monotonic()
    slots = ((where, prompt, slot) for where, prompt in prompts for slot in range(settings.samples))
    with ThreadPoolExecutor(settings.concurrency, thread_name_prefix="teacher") as pool:
        try:
            run.submit(pool, slots)
        except KeyboardInterrupt:
            run.stop("Ctrl-C")
            say("stopping: the calls in flight are being finished, which may take as long as a call may")
        except BaseException:
            run.stop("an error")
            raise
    if run.fatal:
        raise run.fatal
    return Summary(run.progress, run.stopped, run.failures, time.monotonic() - started)


class _Collection:
    """What the threads of one collection share."""

    def __init__(
        self,
        teacher: Teacher,
        store: Store,
        settings: CollectSettings,
        again: Again,
        say: Callable[[str], None],
        tick: Callable[[Progress], None],
        wanted: int,
    ) -> None:
        self.teacher, self.store, self.settings, self.say, self.tick = teacher, store, settings, say, tick
        self.again = again
        self.limiter = Limiter(settings.requests_per_minute, settings.tokens_per_minute)
        self.ends = time.monotonic() + settings.deadline if settings.deadline else float("inf")
        self.progress = Progress(wanted=wanted)
        self.failures: list[str] = []
        self.fatal: UserError | None = None
        self.stopped = ""
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def stop(self, reason: str) -> None:
        """Let no further call start; the first reason counts."""
        with self._lock:
            self.stopped = self.stopped or reason
        self._stop.set()

    def submit(self, pool: ThreadPoolExecutor, slots: Iterator[tuple[str, Prompt, int]]) -> None:
        """Keep the pool busy without reading all slots at once; raise what a thread raised."""
        pending: set[Future[None]] = set()
        while not self._stop.is_set():
            more = list(itertools.islice(slots, 2 * self.settings.concurrency - len(pending)))
            pending |= {pool.submit(self._fill, *slot) for slot in more}
            if not pending:
                return
            done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
        for future in pending:
            future.cancel()

    def _fill(self, where: str, prompt: Prompt, slot: int) -> None:
        """Draw until an answer is one that no check wants drawn again, or the redraws are used up."""
        calls = 0
        for sample in draws(slot, self.settings):
            answer, made = self._obtain(where, asked(prompt, self.settings.system), sample)
            calls += made
            if answer is None:
                return
            if not self.again(prompt, answer):
                break
        with self._lock:
            self.progress.done += 1
            self.progress.found += calls == 0
            self.tick(self.progress)

    def _obtain(self, where: str, messages: Messages, sample: int) -> tuple[Answer | None, int]:
        """Return the answer, from the store or by calling until there is one, and the calls made; None if given up."""
        key = request_key(self.teacher.name, messages, self.settings.sampling, sample)
        for attempt in range(self.settings.max_attempts):
            call = self._claim(key, messages)
            if call is None:
                return None, attempt
            if isinstance(call, Answer):
                return call, attempt
            answer, again = self._call(call, where, messages, sample, attempt)
            if answer is not None or not again or self._stop.is_set():
                break
        return answer, attempt + 1

    def _claim(self, key: str, messages: Messages) -> int | Answer | None:
        """Return the number of a call that may be made now, an answer that is there, or None if the run stops."""
        reserved = False
        while not self._stop.is_set():
            if stored := self.store.get(key):
                return stored.answer
            if not reserved and not self._wait_for_turn(self._tokens(messages)):
                return None
            reserved = True
            call = self.store.claim(key, self._most(messages), self.settings.budget)
            if isinstance(call, int):
                return call
            if call == "budget":
                self.stop(f"the next call might exceed the budget of ${self.settings.budget:g}")
            self._sleep(POLL)
        return None

    def _call(self, call: int, where: str, messages: Messages, sample: int, attempt: int) -> tuple[Answer | None, bool]:
        """Make one call and book it; return the answer, or None and, after the wait, whether to call again."""
        with self._lock:
            self.progress.calls += 1
            self.progress.retried += attempt > 0
        try:
            answer = self.teacher.answer(messages, self.settings.sampling, sample)
        except TeacherError as error:
            return None, self._failed(call, where, messages, attempt, error)
        except UserError as error:
            self.store.fail(call, str(error), 0.0)
            self.fatal = self.fatal or error
            self.stop("the endpoint refuses every call")
            return None, False
        except BaseException as error:
            self.store.fail(call, type(error).__name__, self._most(messages))
            raise
        self._book(call, messages, sample, answer)
        return answer, False

    def _book(self, call: int, messages: Messages, sample: int, answer: Answer) -> None:
        # An endpoint that does not count its tokens is booked at the most that they can be.
        prompt_tokens = upper_tokens(messages) if answer.prompt_tokens is None else answer.prompt_tokens
        completion_tokens = (
            len(answer.text.encode("utf-8", "replace"))
            if answer.completion_tokens is None
            else answer.completion_tokens
        )
        cost = self.settings.price.cost(prompt_tokens, completion_tokens) if self.settings.price else 0.0
        request = {"messages": messages, "sampling": dataclasses.asdict(self.settings.sampling), "sample": sample}
        self.store.settle(call, self.teacher.name, request, answer, (prompt_tokens, completion_tokens), cost)
        self.limiter.correct(prompt_tokens + completion_tokens - self._tokens(messages))
        self._spend(cost)

    def _failed(self, call: int, where: str, messages: Messages, attempt: int, error: TeacherError) -> bool:
        maybe = self._most(messages) if error.maybe_paid else 0.0
        self.store.fail(call, str(error), maybe)
        self._spend(maybe)
        left = self.settings.max_attempts - attempt - 1
        if not error.retry or not left:
            self._give_up(f"{where}: {error}" + (f" ({attempt + 1} calls)" if error.retry else ""))
            return False
        delay, why = _delay(error, attempt)
        if error.retry_after:
            self.limiter.hold(time.monotonic() + delay)
        self.say(f"{where}: {error}; call {attempt + 2} of {self.settings.max_attempts} in {delay:.1f} s{why}")
        if time.monotonic() + delay > self.ends:
            self.stop("the deadline comes before the next call may be made")
        self._sleep(delay)
        return True

    def _give_up(self, failure: str) -> None:
        with self._lock:
            self.progress.failed += 1
            if len(self.failures) < 10:
                self.failures.append(failure)
            self.tick(self.progress)
        self.say(f"given up: {failure}")
        if self.progress.failed > self.settings.max_failures:
            self.stop(f"more than {self.settings.max_failures} answers had to be given up")

    def _wait_for_turn(self, tokens: int) -> bool:
        start = self.limiter.reserve(tokens, time.monotonic())
        while (now := time.monotonic()) < min(start, self.ends):
            if self._sleep(min(start - now, 1.0)):
                return False
            if self.limiter.held_until > start:  # queue again, so that not all start at once when the wait is over
                start = self.limiter.reserve(0, time.monotonic())
        if time.monotonic() >= self.ends:
            self.stop("the deadline has come")
        return not self._stop.is_set()

    def _sleep(self, seconds: float) -> bool:
        """Sleep, or wake early and return True if the run is being stopped."""
        return self._stop.wait(seconds)

    def _spend(self, dollars: float) -> None:
        with self._lock:
            self.progress.spent += dollars
            self.tick(self.progress)

    def _tokens(self, messages: Messages) -> int:
        return estimate_tokens(messages) + self.settings.sampling.max_tokens

    def _most(self, messages: Messages) -> float:
        price = self.settings.price
        return price.cost(upper_tokens(messages), self.settings.sampling.max_tokens) if price else 0.0


def _delay(error: TeacherError, attempt: int) -> tuple[float, str]:
    """Return the seconds before the next call: the server's own, else exponential, half of it at random."""
    if error.retry_after is not None:
        return error.retry_after, f", as the server asks (Retry-After {error.retry_after:g} s)"
    full = min(BACKOFF[1], BACKOFF[0] * 2**attempt)
    return full * random.uniform(0.5, 1.0), ""


def asked(prompt: Prompt, system: str) -> Messages:
    """Return the messages that are sent for a prompt: the teacher's system prompt comes first, if there is one."""
    return ([{"role": "system", "content": system}] if system else []) + as_messages(prompt)


def draws(slot: int, settings: CollectSettings) -> list[int]:
    """Return the sample numbers that may fill a slot, in the order in which they are tried."""
    return [slot + draw * settings.samples for draw in range(settings.redraws + 1)]


def by_policies(settings: CollectSettings) -> Again:
    """Return the rule that draws again where a check whose policy is "retry" found something."""
    return lambda prompt, answer: any(settings.policies[name] == "retry" for name in answer_classes(prompt, answer))


def drawn(
    store: Store, model: str, prompt: Prompt, settings: CollectSettings, again: Again | None = None
) -> Iterator[list[Answer]]:
    """Yield, for every sample of a prompt, the stored answers that were drawn for it, in order. Makes no call.

    The last one counts, those before it were drawn again. An empty list: not collected. `again` as in `collect`.
    """
    again = again or by_policies(settings)
    for slot in range(settings.samples):
        answers: list[Answer] = []
        for sample in draws(slot, settings):
            stored = store.get(request_key(model, asked(prompt, settings.system), settings.sampling, sample))
            if stored is None:
                break
            answers.append(stored.answer)
            if not again(prompt, stored.answer):
                break
        yield answers


def estimate_tokens(messages: Messages) -> int:
    """Guess the tokens of a prompt: a token is about four bytes of English, and a message has about four of its own."""
    return sum(len(m["content"].encode("utf-8", "replace")) // 4 + 4 for m in messages)


def upper_tokens(messages: Messages) -> int:
    """Bound the tokens of a prompt from above: a token has at least one byte."""
    return sum(len(m["content"].encode("utf-8", "replace")) + 8 for m in messages)


def find_price(model: str, table: dict[str, Any]) -> Price | None:
    """Return the price of a model from a table of [prompt, completion]; a dated name has the price of its plain one."""
    names = [name for name in table if model == name or model.startswith(f"{name}-20")]
    return Price(*table[max(names, key=len)]) if names else None
