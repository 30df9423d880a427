"""`minigad teach`: prompts in, pairs out. Reads and checks the prompts, asks, checks the answers, writes what is kept.

Everything is read from the files and the store piece by piece: what grows with the data are a few hashes a row.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minigad.chat import Prompt, prompt_text
from minigad.checks import BAD_CHARACTER, IDENTICAL, CheckReport, answer_classes, make_policies, mask, prompt_classes
from minigad.collect import (
    PRICES,
    CollectSettings,
    Price,
    Progress,
    Summary,
    asked,
    collect,
    drawn,
    estimate_tokens,
    find_price,
)
from minigad.config import UserError, visible
from minigad.data import loose_key, stream_prompts, text_hash, write_jsonl
from minigad.export import check_out, write_pairs
from minigad.sources import object_of, read_rows, short
from minigad.store import Ledger, Store
from minigad.teacher import HiddenPromptTeacher, OpenAITeacher, Sampling, Teacher, find_key, is_local

__all__ = [
    "Kept",
    "Taught",
    "check_prompts",
    "dry_run",
    "load_prices",
    "make_teacher",
    "price_line",
    "progress_bar",
    "rows_to_keep",
    "settings_of",
    "teach",
]

SILENCE = 30.0  # seconds between lines where there is no terminal for a bar
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Kept(NamedTuple):
    """Which rows of a prompt file are asked (1) or not (0), by their number, and what was found."""

    asked: bytearray
    report: CheckReport


@dataclass(frozen=True)
class Taught:
    """What `teach` did."""

    summary: Summary
    report: CheckReport
    ledger: Ledger


def teach(
    teacher: Teacher,
    prompts: str | os.PathLike[str],
    out: str | os.PathLike[str],
    store: Store,
    settings: CollectSettings,
    *,
    eval_prompts: str | os.PathLike[str] | None = None,
    show: bool = True,
) -> Taught:
    """Collect the teacher's answers to a file of prompts and write pairs that `load_pairs` reads.

    Writes `out` (.jsonl, .parquet or a folder of `datasets`) and, beside it, NAME.report.json. Stopped early, it writes
    what is there; run again, it goes on. Raises UserError for bad input or an endpoint that refuses every call.
    """
    check_out(out)
    kept = check_prompts(prompts, settings.policies, eval_prompts)
    wanted = sum(kept.asked) * settings.samples
    rows = rows_to_keep(lambda: _asked(prompts, kept), teacher.name, store, settings, kept.report)
    try:
        with progress_bar(wanted, show) as (say, tick):
            summary = collect(teacher, _asked(prompts, kept), store, settings, wanted=wanted, say=say, tick=tick)
    except BaseException:  # what was paid for goes to the file; nothing does not replace what an earlier run wrote
        if (first := next(rows, None)) is not None:
            write_pairs(out, itertools.chain([first], rows))
        raise
    kept.report.kept = write_pairs(out, rows)
    taught = Taught(summary, kept.report, store.ledger())
    write_report(out, taught, teacher.name, settings)
    return taught


def check_prompts(
    prompts: str | os.PathLike[str], policies: dict[str, str], eval_prompts: str | os.PathLike[str] | None = None
) -> Kept:
    """Read all prompts and decide which are asked, before anything is sent anywhere.

    Raises UserError for a row that holds no prompt and for a file without rows.
    """
    report, flags, seen = CheckReport(), bytearray(), set[int]()
    held_out = _HeldOut(eval_prompts) if eval_prompts else None
    for where, prompt in stream_prompts(prompts):
        loose = _loose_hash(prompt)
        found = prompt_classes(prompt) + (held_out.classes(prompt, loose) if held_out else [])
        found += ["duplicate_prompt"] if loose in seen else []
        seen.add(loose)
        for name in found:
            report.add(name, policies[name], f"{where}: {prompt_text(prompt)}")
        flags.append(not any(policies[name] == "drop" for name in found))
    if not flags:
        raise UserError(f"{prompts}: there are no prompts in it; give at least one row with 'prompt'")
    report.prompts = len(flags)
    return Kept(flags, report)


class _HeldOut:
    """The evaluation prompts: which prompts are among them, or nearly."""

    def __init__(self, source: str | os.PathLike[str]) -> None:
        from minigad.near import NearIndex

        self.hashes = {_loose_hash(prompt) for _, prompt in stream_prompts(source)}
        self.near = NearIndex(prompt for _, prompt in stream_prompts(source))

    def classes(self, prompt: Prompt, loose: int) -> list[str]:
        """Return "eval_overlap" or "eval_near" for a prompt that must not be asked."""
        return ["eval_overlap"] if loose in self.hashes else ["eval_near"] if prompt in self.near else []


def dry_run(prompts: str | os.PathLike[str], settings: CollectSettings, kept: Kept, model: str) -> list[str]:
    """Return what a collection would send and cost, as sentences. Makes no call."""
    tokens = [estimate_tokens(asked(prompt, settings.system)) for _, prompt in _asked(prompts, kept)]
    calls = len(tokens) * settings.samples
    prompt_tokens, most = sum(tokens) * settings.samples, calls * settings.sampling.max_tokens
    lines = [
        f"{len(tokens)} prompts would be sent to {model}, {settings.samples} answers each: {calls} calls.",
        f"About {prompt_tokens} prompt tokens (a token is about four bytes) and at most {most} completion tokens.",
    ]
    lines.append(price_line(settings.price, prompt_tokens, most))
    return [*lines, "First prompts:", *(f"  {line}" for line in _first(prompts, kept))]


def price_line(price: Price | None, prompt_tokens: int, most: int) -> str:
    """Say what calls would cost with at most `most` completion tokens, or that the price is not known."""
    if price is None:
        return "The price of this model is not known; give --price IN OUT in dollars a million tokens."
    low, high = price.cost(prompt_tokens, most // 4), price.cost(prompt_tokens, most)
    rates = f"${price.prompt:g} and ${price.completion:g} a million"
    return f"At {rates}: ${high:.4f} if every answer has its full length, ${low:.4f} at a quarter of it."


def rows_to_keep(
    prompts: Callable[[], Iterable[tuple[str, Prompt]]],
    model: str,
    store: Store,
    settings: CollectSettings,
    report: CheckReport,
) -> Iterator[dict[str, Any]]:
    """Yield the rows that the policies keep, `{"prompt", "completion"}`, and count everything in the report.

    `prompts` gives them anew at each call: an answer that many prompts share is known only after a first round.
    """
    shared = _shared_answers(prompts(), model, store, settings)
    for where, prompt in prompts():
        seen: set[str] = set()
        for answers in drawn(store, model, prompt, settings):
            for number, answer in enumerate(answers, start=1):
                found = answer_classes(prompt, answer)
                found += ["duplicate"] if answer.text in seen else []
                found += ["identical"] if text_hash(answer.text) in shared else []
                did = _policies(found, settings.policies, last=number == len(answers))
                report.answers += 1
                for name, policy in did.items():
                    report.add(name, policy, f"{where}: {prompt_text(prompt)!s:.60} -> {answer.text}")
                if not {"drop", "retry"} & set(did.values()):
                    seen.add(answer.text)
                    yield {"prompt": prompt, "completion": _writable(answer.text)}


def _policies(found: list[str], policies: dict[str, str], last: bool) -> dict[str, str]:
    """Return what is done about each class: after the last draw there is no asking again, and the answer is dropped."""
    did = {name: policies[name] for name in found}
    return {name: "drop" if last and policy == "retry" else policy for name, policy in did.items()}


def load_prices(path: str | None) -> dict[str, Price]:
    """Return the table of prices, with those of a JSON file {"model": [in, out]} (dollars a million tokens) on top."""
    if path is None:
        return PRICES
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return PRICES | {name: Price(float(pair[0]), float(pair[1])) for name, pair in found.items()}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f'--prices {path}: cannot read it ({error}); write {{"model": [in, out]}} in dollars a million tokens'
        ) from None


def write_report(out: str | os.PathLike[str], taught: Taught, model: str, settings: CollectSettings) -> Path:
    """Write NAME.report.json beside `out` and return its path: the counts, examples, costs and settings."""
    path = Path(out).with_name(f"{Path(out).name}.report.json")
    record = {
        "model": model,
        "stopped": taught.summary.stopped,
        "failures": taught.summary.failures,
        "this_run": dataclasses.asdict(taught.summary.progress) | {"seconds": round(taught.summary.seconds, 3)},
        "store": taught.ledger._asdict(),
        "checks": dataclasses.asdict(taught.report),
        "settings": dataclasses.asdict(settings),
    }
    write_jsonl(path, [record])
    return path


def settings_of(args: argparse.Namespace) -> CollectSettings:
    """Return the settings that the command line asks for, each checked."""
    price = Price(*args.price) if args.price else find_price(args.model, load_prices(args.prices))
    if price is None and (args.local or is_local(args.base_url)):
        price = Price(0.0, 0.0)
    names = {field.name for field in dataclasses.fields(CollectSettings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    sampling = Sampling(args.temperature, args.max_tokens, args.seed)
    return CollectSettings(**given | {"sampling": sampling, "price": price, "policies": make_policies(args.on)})


@contextlib.contextmanager
def closed_after(teacher: Teacher | None) -> Iterator[None]:
    """Close a teacher's connections at the end of a block, if it has any."""
    try:
        yield
    finally:
        if isinstance(teacher, OpenAITeacher):
            teacher.close()


def make_teacher(args: argparse.Namespace) -> Teacher:
    """Return the teacher that the command line names; an endpoint's key is looked for here."""
    if not args.local:
        if args.hidden_prompt:
            raise UserError("--hidden-prompt goes with --local; an endpoint takes --system")
        return OpenAITeacher(args.model, args.base_url, find_key(args.base_url), args.timeout)
    import torch

    from minigad import hub
    from minigad.model import LanguageModel
    from minigad.precision import choose_dtype

    hidden = _messages_of(args.hidden_prompt) if args.hidden_prompt else []
    folder, device = hub.resolve(args.model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, choose_dtype(lora_r=1)[0])  # 16 bits: nothing is trained here
    model = LanguageModel(hub.load_model(folder, dtype, device), hub.load_tokenizer(folder))
    return HiddenPromptTeacher(model, hidden, args.temperature, args.model)


def _messages_of(path: str) -> list[dict[str, str]]:
    """Read the hidden conversation: one JSON list of messages."""
    rows = [object_of(where, row) for where, row in read_rows(path)]
    for i, row in enumerate(rows):
        if row.keys() != {"role", "content"} or not all(isinstance(value, str) for value in row.values()):
            raise UserError(f"{path}: message {i} is {short(row)}; a message has the texts 'role' and 'content'")
    return rows


def _asked(prompts: str | os.PathLike[str], kept: Kept) -> Iterator[tuple[str, Prompt]]:
    """Yield the rows that are asked, reading the file anew."""
    for flag, row in zip(kept.asked, stream_prompts(prompts), strict=True):
        if flag:
            yield row


def _first(prompts: str | os.PathLike[str], kept: Kept) -> list[str]:
    return [f"{where}: {mask(prompt_text(prompt))}" for where, prompt in itertools.islice(_asked(prompts, kept), 3)]


def _shared_answers(
    prompts: Iterable[tuple[str, Prompt]], model: str, store: Store, settings: CollectSettings
) -> set[int]:
    """Return the hashes of answers that several prompts got."""
    counts: Counter[int] = Counter()
    for _, prompt in prompts:
        counts.update({text_hash(answers[-1].text) for answers in drawn(store, model, prompt, settings) if answers})
    return {key for key, count in counts.items() if count >= IDENTICAL}


def _writable(text: str) -> str:
    """Return the text as files can hold it; what is kept in spite of its bad characters has them replaced."""
    return BAD_CHARACTER.sub(REPLACEMENT, text)


@contextlib.contextmanager
def progress_bar(wanted: int, show: bool = True) -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None]]]:
    """Give `say`, which prints above the bar, and `tick`, which moves it; without a terminal, a line now and then."""
    from tqdm import tqdm

    terminal, started = sys.stderr.isatty(), time.monotonic()
    said = started
    with tqdm(total=wanted, unit="answer", file=sys.stderr, disable=not (show and terminal)) as bar:

        def say(sentence: str) -> None:
            if show:
                tqdm.write(visible(sentence), file=sys.stderr)

        def tick(progress: Progress) -> None:
            nonlocal said
            spent = f"${progress.spent:.4f}"
            bar.set_postfix(failed=progress.failed, retried=progress.retried, spent=spent, refresh=False)
            bar.update(progress.done - bar.n)
            if not terminal and time.monotonic() - said > SILENCE:
                said = time.monotonic()
                say(_so_far(progress, said - started))

        yield say, tick


def _so_far(progress: Progress, seconds: float) -> str:
    """Return the counts and the time left, as the answers so far suggest it."""
    new = progress.done - progress.found
    left = f", about {seconds / new * (progress.wanted - progress.done):.0f} s left" if new else ""
    counts = f"{progress.failed} failed, {progress.retried} retried, ${progress.spent:.4f} spent"
    return f"{progress.done} of {progress.wanted} answers, {counts}, {seconds:.0f} s{left}"


def _loose_hash(prompt: Prompt) -> int:
    """Return 64 bits that are equal for prompts that differ in white space and case only."""
    return text_hash(loose_key(prompt).casefold())
