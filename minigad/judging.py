"""`minigad evaluate`: a run's student on held-out pairs or on a fixed set, without a judge and with one.

What the judge said goes into evaluation.json, a record for each protocol, judge, set and opponent, and into the report.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minigad.attribution import judged as seen_by
from minigad.chat import Prompt, prompt_text
from minigad.checkpoint import write_json
from minigad.checks import prompt_classes
from minigad.collect import CollectSettings, Summary, estimate_tokens
from minigad.config import GADConfig, UserError
from minigad.data import as_messages, group_by_prompt, load_pairs
from minigad.evaluate import evaluate
from minigad.evaluation_sets import fingerprint, in_papers_prompt, read_set
from minigad.judge import (
    PROTOCOLS,
    RATING,
    Protocol,
    Verdicts,
    compare,
    judge,
    judging_tokens,
    numbers_of,
    own_completions,
)
from minigad.memory import explained
from minigad.outputs import check_outputs, read_outputs, write_alpaca_eval, write_harness_task
from minigad.players import load_discriminator, load_student
from minigad.reading import read_json, read_run
from minigad.report import write_report
from minigad.seen import TESTED_ON, TRAINED_ON, add_seen, seen_among, text_key
from minigad.sources import short
from minigad.stats import holm, is_point
from minigad.store import Store
from minigad.student import Student
from minigad.teach import closed_after, make_teacher, price_line, progress_bar, settings_of
from minigad.teacher import Teacher

__all__ = [
    "Bench",
    "Jury",
    "Unfinished",
    "bench_of",
    "check_unchosen",
    "dry_run",
    "evaluate_run",
    "judged",
    "jury_of",
    "load_run",
    "trained_lines",
    "verdict_lines",
]

# The flags --judge-temperature and so on; what is given without a judge can then be told from what is not given.
JUDGE_DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1024, "runs": 1, "redraws": 2}


class Bench(NamedTuple):
    """Prompts to measure on, their name, and the teacher's completion of each, None where there is none."""

    name: str
    prompts: list[Prompt]
    teacher: list[str | None]


class Jury(NamedTuple):
    """Who judges, how, within what limits."""

    model: Teacher
    protocol: Protocol
    settings: CollectSettings


Side = list[str] | int  # completions, one a prompt, or the most tokens that each of them will have once it is sampled


class Unfinished(Exception):
    """The judging was stopped early; what was answered is in the store. Holds the summary of the collection."""

    def __init__(self, summary: Summary) -> None:
        super().__init__(summary.stopped)
        self.summary = summary


def evaluate_run(args: argparse.Namespace) -> list[str]:
    """Do what `minigad evaluate` was asked for and return its lines.

    Writes evaluation.json, tested_on.txt and report.html, and the files of --alpaca-eval and --lm-eval. Raises UserError for
    bad input, Unfinished if the judge's calls were stopped early: the metrics without a judge are then written.
    """
    _check_flags(args)
    bench, dataset = _bench(args)
    record, config = load_run(args.run)
    check_unchosen(args.run, bench.prompts)
    check_outputs(args.alpaca_eval, args.lm_eval)
    opponents = [_opponent(path, bench) for path in args.against]
    trained_on, lines = _trained_on(args, bench)
    if args.dry_run:
        sides = [side for _, side in opponents]
        return dry_run(args, PROTOCOLS[args.protocol], bench, [config.max_completion_length], sides)
    jury = jury_of(args, args.protocol) if args.judge else None
    temperature = 0.0 if args.greedy else args.temperature
    evaluation = dict(record["evaluation"] or {"metrics": {}, "samples": []})
    student = load_student(args.run, config)
    tested = [*(sample["prompt"] for sample in evaluation["samples"]), *bench.prompts]
    if dataset is not None:
        metrics, samples = _measured(args, student, config, bench, dataset, temperature)
        evaluation |= {"metrics": metrics, "samples": samples, "trained_on": trained_on}
        texts = [sample["student"] for sample in samples]
        lines += [f"{name:24s} {value:.4f}" for name, value in metrics.items()]
    else:
        texts = _completions(student, config, bench.prompts, args, temperature)
    add_seen(Path(args.run) / TESTED_ON, tested)
    if dataset is not None:
        write_json(Path(args.run) / "evaluation.json", evaluation)
    lines += _export(args, bench, texts, config)
    try:
        if jury is not None:
            about = {"student": str(args.run), "paper_prompt": args.paper_prompt, "temperature": temperature}
            records, said = _with_judge(args, jury, bench, texts, opponents, about | {"trained_on": trained_on})
            kept = [one for one in evaluation.get("judge", []) if _place(one) not in map(_place, records)]
            write_json(Path(args.run) / "evaluation.json", evaluation | {"judge": kept + records})
            lines += said
    finally:  # a judge that was stopped leaves new metrics
        write_report(args.run)
    return lines


def _trained_on(args: argparse.Namespace, bench: Bench) -> tuple[int | None, list[str]]:
    """Return on how many of the prompts the student was trained, if that is known, and sentences on it and its opponents."""
    runs = [args.run, *(path for path in args.against if Path(path).is_dir())]
    known = {folder: seen_among(Path(folder) / TRAINED_ON, bench.prompts) for folder in runs}
    lines = [line for folder, seen in known.items() for line in trained_lines(folder, seen, len(bench.prompts))]
    mine = known[args.run]
    return None if mine is None else len(mine), lines


def _measured(
    args: argparse.Namespace,
    student: Student,
    config: GADConfig,
    bench: Bench,
    dataset: Any,
    temperature: float | None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the measures without a judge and the samples, as the run's discriminator judges them where there is one."""
    shown = _in_wrapper(dataset) if args.paper_prompt else dataset
    with explained("rollout", config):
        metrics, samples = evaluate(student, shown, config, temperature=temperature, seed=args.seed)
    if (Path(args.run) / "discriminator").is_dir():
        discriminator = load_discriminator(args.run, config, student)
        samples = seen_by(discriminator, [prompt for prompt, _ in group_by_prompt(shown)], samples)
    plain = [prompt_text(prompt) for prompt in bench.prompts]  # the wrapper aside
    return metrics, [sample | {"prompt": text} for sample, text in zip(samples, plain, strict=True)]


def _with_judge(
    args: argparse.Namespace,
    jury: Jury,
    bench: Bench,
    texts: list[str],
    opponents: list[tuple[str, Side]],
    about: dict[str, Any],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the judge's records and their sentences, with what the store holds."""
    others = [
        (who, _played(who, bench, args, about["temperature"]) if isinstance(side, int) else side)
        for who, side in opponents
    ]
    with closed_after(jury.model), Store(args.store or Path(args.run) / "judge.db") as store:
        records = [one | about for one in judged(jury, bench, texts, others, store, args.seed)]
        return records, [line for one in records for line in verdict_lines(one)] + store.ledger().lines()


def _place(record: dict[str, Any]) -> tuple[str, str]:
    return record["title"], record["judge"]


def _check_flags(args: argparse.Namespace) -> None:
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise UserError(
            f"--temperature is {args.temperature}; it must be above 0 and finite, since likelihoods are measured at it "
            "(--greedy leaves those out)"
        )
    if args.greedy and args.temperature is not None:
        raise UserError("--greedy and --temperature exclude each other; give one of them")
    of_judge = (
        args.against,
        args.judge_base_url,
        args.judge_local,
        args.dry_run,
        args.store,
        args.protocol != "rating",
        *(getattr(args, f"judge_{name}") is not None for name in JUDGE_DEFAULTS),
    )
    if not args.judge and (args.judge is not None or any(of_judge)):
        raise UserError(
            "--against, --protocol, --store, --dry-run and what begins with --judge- are for a judge; name its model with "
            "--judge"
        )
    if args.judge and args.judge_local and args.judge_base_url:
        raise UserError("--judge-local and --judge-base-url exclude each other; give one of them")
    if args.set is not None and not (args.judge or args.alpaca_eval or args.lm_eval):
        raise UserError(
            "a set has no teacher completions to measure by; add --judge MODEL, --alpaca-eval FILE or --lm-eval FOLDER"
        )
    if args.judge and args.set and args.protocol == "pairwise" and not args.against:
        raise UserError("a set has no teacher completions to compare with; give --against, or --protocol rating")


def load_run(folder: str | Path) -> tuple[dict[str, Any], GADConfig]:
    """Return what a run's folder holds and its configuration; UserError if there is no student in it."""
    record = read_run(folder)
    config = GADConfig().replace(**record["config"]["config"])
    if not (Path(folder) / "student").is_dir():
        raise UserError(f"run {str(folder)!r} holds no student; let distill finish it, with --resume if it was stopped")
    return record, config


def jury_of(args: argparse.Namespace, protocol: str) -> Jury:
    """Return the judge that the command line names; an endpoint's key is looked for here."""
    asked = _asked(args)
    settings = settings_of(asked)
    return Jury(make_teacher(asked), PROTOCOLS[protocol], settings)


def _asked(args: argparse.Namespace) -> argparse.Namespace:
    """Return the judge's flags by the names that they have for a teacher."""
    given = {name: getattr(args, f"judge_{name}") for name in JUDGE_DEFAULTS}
    settings = JUDGE_DEFAULTS | {name: value for name, value in given.items() if value is not None}
    named = {
        "model": args.judge,
        "base_url": args.judge_base_url,
        "local": args.judge_local,
        "hidden_prompt": None,
        "samples": settings.pop("runs"),
        "seed": None,
    }
    return argparse.Namespace(**vars(args) | named | settings)


def check_unchosen(folder: str | Path, prompts: Sequence[Prompt]) -> None:
    """Raise UserError if the student in a folder was chosen by its results on some of these prompts (`minigad choose`)."""
    path = Path(folder) / "choice.json"
    if not path.is_file():
        return
    choice = read_json(path)
    used = choice.get("prompts") if isinstance(choice, dict) else None
    if not isinstance(used, list):
        raise UserError(f"{path} does not say on which prompts the student was chosen; restore the file from a copy")
    both = [prompt for prompt in prompts if text_key(prompt) in used]
    if both:
        raise UserError(
            f"{len(both)} of the {len(prompts)} prompts were used to choose this student, such as {short(both[0])}: its "
            "results on them are flattered by the choice; measure it on others"
        )


def trained_lines(folder: str | Path, known: list[Prompt] | None, total: int) -> list[str]:
    """Return a sentence if a run's student was trained on some of `total` prompts (`known`), or if nobody can know."""
    if known is None:
        return [
            f"note: {folder} has no {TRAINED_ON} (an older minigad made it): whether its student was trained on these prompts is "
            "not known"
        ]
    if not known:
        return []
    return [
        f"WARNING: the student of {folder} was trained on {len(known)} of the {total} prompts, such as {short(known[0])}: "
        "what it says to them is no sample of what it says to others"
    ]


# --- completions ---


def _bench(args: argparse.Namespace) -> tuple[Bench, Any]:
    """Return the prompts, and with --data the pairs they come from."""
    if args.set is not None:
        prompts = read_set(args.set)
        return Bench(Path(args.set).name, prompts, [None] * len(prompts)), None
    dataset, _ = load_pairs(args.data)
    return bench_of(args.data, dataset), dataset


def bench_of(path: str, dataset: Any) -> Bench:
    """Return the prompts of pairs, each with the first of its teacher completions."""
    groups = group_by_prompt(dataset)
    return Bench(Path(path).name, [prompt for prompt, _ in groups], [texts[0] for _, texts in groups])


def _in_wrapper(dataset: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": in_papers_prompt(dataset["prompt"]), "completion": list(dataset["completion"])})


def _completions(
    student: Student, config: GADConfig, prompts: list[Prompt], args: argparse.Namespace, temperature: float | None
) -> list[str]:
    shown = in_papers_prompt(prompts) if args.paper_prompt else prompts
    with explained("rollout", config):
        return list(student.generate(shown, config, seed=args.seed, temperature=temperature).texts)


def _played(run: str, bench: Bench, args: argparse.Namespace, temperature: float | None) -> list[str]:
    """Return the completions of another run's student."""
    config = load_run(run)[1]
    return _completions(load_student(run, config), config, bench.prompts, args, temperature)


def _opponent(path: str, bench: Bench) -> tuple[str, Side]:
    """Return an opponent's name and, of a file of outputs, its completions; of a run none yet, but it is looked at."""
    if Path(path).is_dir():
        config = load_run(path)[1]
        check_unchosen(path, bench.prompts)
        return path, config.max_completion_length
    who, outputs = read_outputs(path)
    missing = [prompt for prompt in bench.prompts if prompt_text(prompt) not in outputs]
    if missing:
        raise UserError(
            f"--against {path}: it has no output for {len(missing)} of {len(bench.prompts)} prompts, such as "
            f"{short(prompt_text(missing[0]))}; give one that was made on {bench.name}"
        )
    return who, [outputs[prompt_text(prompt)] for prompt in bench.prompts]


def _export(args: argparse.Namespace, bench: Bench, texts: list[str], config: GADConfig) -> list[str]:
    prompts, lines = [prompt_text(prompt) for prompt in bench.prompts], []
    if args.alpaca_eval:
        write_alpaca_eval(args.alpaca_eval, prompts, texts, str(args.run), bench.name)
        lines.append(f"wrote {args.alpaca_eval}: {len(texts)} completions for AlpacaEval")
    if args.lm_eval:
        completions = [text or "" for text in bench.teacher]
        task = write_harness_task(args.lm_eval, prompts, completions, config.max_completion_length)
        lines.append(f"wrote {args.lm_eval}: the task {task} for lm-evaluation-harness")
    return lines


# --- judging ---


def dry_run(
    args: argparse.Namespace, protocol: Protocol, bench: Bench, students: Sequence[int], opponents: Sequence[Side]
) -> list[str]:
    """Return what judging would send and cost at the most, as sentences. Samples nothing, asks nobody, writes nothing.

    students: the most tokens that each one's completions will have.
    """
    settings = settings_of(_asked(args))
    longest = settings.sampling.max_tokens
    pairs = _pairs(protocol, bench, students, opponents, longest)
    sent = _sendable(settings, bench, [side for pair in pairs for side in pair if not isinstance(side, int)])
    prompts = [bench.prompts[i] for i in sent]
    own = [estimate_tokens(as_messages(prompt)) for prompt in prompts] if protocol is RATING else []
    tokens = [judging_tokens(protocol, prompts, *(_only(sent, side) for side in pair)) for pair in pairs]
    prompt_tokens = sum(own) + settings.samples * sum(tokens)
    calls = len(own) + settings.samples * 2 * len(pairs) * len(sent)
    return [
        f"{len(sent)} of {len(bench.prompts)} prompts of {bench.name} would be sent to {args.judge}: {calls} calls, less those "
        f"that the store has; for a reply that cannot be read up to {settings.redraws} more.",
        f"At most about {prompt_tokens} prompt tokens (a token is about four bytes; a completion that is not written yet "
        f"counts at its longest) and {calls * longest} completion tokens.",
        price_line(settings.price, prompt_tokens, calls * longest),
    ]


def _pairs(
    protocol: Protocol, bench: Bench, students: Sequence[int], opponents: Sequence[Side], longest: int
) -> list[tuple[Side, Side]]:
    """Return what is shown together: everyone with the judge's own completion (rating), or a student with an opponent."""
    if protocol is RATING:
        return [(one, longest) for one in (*students, *opponents)]
    return [(one, other) for one in students for other in opponents or [[text or "" for text in bench.teacher]]]


def _only(sent: list[int], side: Side) -> list[str | int]:
    return [side if isinstance(side, int) else side[i] for i in sent]


def judged(
    jury: Jury, bench: Bench, ours: list[str], others: list[tuple[str, list[str]]], store: Store, seed: int
) -> list[dict[str, Any]]:
    """Return the records of a judged student: one with every opponent compared (rating), or one an opponent (pairwise)."""
    against = others or ([] if jury.protocol is RATING else [("teacher", [text or "" for text in bench.teacher])])
    sent = _sendable(jury.settings, bench, [ours, *(texts for _, texts in against)])
    prompts, ours = [bench.prompts[i] for i in sent], [ours[i] for i in sent]
    against = [(name, [texts[i] for i in sent]) for name, texts in against]
    about: dict[str, Any] = {"data": bench.name, "fingerprint": fingerprint(bench.prompts), "judge": jury.model.name}
    about |= {"judge_temperature": jury.settings.sampling.temperature, "runs": jury.settings.samples}
    withheld = len(bench.prompts) - len(sent)
    if jury.protocol is RATING:
        return [_rated(jury, prompts, ours, against, store, seed, about, withheld)]
    records, values = [], []
    for name, texts in against:
        verdicts = judge(jury.model, jury.protocol, prompts, ours, texts, store, jury.settings, progress_bar)
        _finished(jury, verdicts)
        records.append(_record(jury, f"{bench.name}, against {name}", verdicts, ours, texts, about, withheld, seed))
        values.append(verdicts.values)
    even = [compare(one, [np.full(len(one), 0.5)], seed)[0] for one in values]
    for record, row, p in zip(records, even, holm([row["p_value"] for row in even]), strict=True):
        record["comparisons"] = [{"with": "parity (50)", **row, "p_holm": p}]
    return records


def _rated(
    jury: Jury,
    prompts: list[Prompt],
    ours: list[str],
    against: list[tuple[str, list[str]]],
    store: Store,
    seed: int,
    about: dict[str, Any],
    withheld: int,
) -> dict[str, Any]:
    own = own_completions(jury.model, prompts, store, jury.settings, progress_bar)
    _check_answered(jury, own.summary, any(text is not None for text in own.texts))

    def verdicts_of(texts: list[str]) -> Verdicts:
        return _finished(jury, judge(jury.model, RATING, prompts, texts, own.texts, store, jury.settings, progress_bar))

    mine = verdicts_of(ours)
    record = _record(jury, about["data"], mine, ours, own.texts, about, withheld, seed)
    record["counts"]["own_cut_off"] = own.cut_off
    rows = compare(mine.values, [verdicts_of(texts).values for _, texts in against], seed)
    record["comparisons"] = [{"with": name, **row} for (name, _), row in zip(against, rows, strict=True)]
    return record


def _sendable(settings: CollectSettings, bench: Bench, sides: Iterable[list[str]]) -> list[int]:
    """Return the prompts that may leave this machine: neither they nor a completion holds a key or personal data."""
    policies, sides, sent = settings.policies, list(sides), []
    for i, prompt in enumerate(bench.prompts):
        texts = [prompt, *(texts[i] for texts in sides)]
        if not any(policies[name] == "drop" for text in texts for name in prompt_classes(text)):
            sent.append(i)
    if not sent:
        raise UserError(
            f"all {len(bench.prompts)} prompts of {bench.name} hold what looks like a key or personal data, so none was "
            "sent; --on secrets=keep and --on personal_data=keep send them"
        )
    return sent


def _finished(jury: Jury, verdicts: Verdicts) -> Verdicts:
    _check_answered(jury, verdicts.summary, verdicts.replies > 0)
    return verdicts


def _check_answered(jury: Jury, summary: Summary, answered: bool) -> None:
    """Raise Unfinished if the calls were stopped, since the prompts that come first are no sample of all; UserError if all failed."""
    if summary.stopped:
        raise Unfinished(summary)
    if not answered:
        first = summary.failures[0] if summary.failures else "its replies were empty"
        raise UserError(f"the judge {jury.model.name!r} gave no answer to anything ({first}); mend that and ask again")


def _record(
    jury: Jury,
    title: str,
    verdicts: Verdicts,
    ours: list[str],
    theirs: Sequence[str | None],
    about: dict[str, Any],
    withheld: int,
    seed: int,
) -> dict[str, Any]:
    values = verdicts.values
    places = verdicts.shares.size
    counts = {
        "prompts": len(values) + withheld,
        "judged": int(np.isfinite(values).sum()),
        "withheld": withheld,
        "replies": verdicts.replies,
        "asked_again": verdicts.asked_again,
        "malformed": verdicts.malformed,
        "without_reply": places - int(np.isfinite(verdicts.shares).sum()) - verdicts.malformed,
    }
    return {
        "title": f"{jury.protocol.name} on {title}",
        "protocol": jury.protocol.name,
        **about,
        "counts": counts,
        "numbers": numbers_of(jury.protocol, verdicts, ours, theirs, seed),
        "comparisons": [],
        "values": [float(value) if np.isfinite(value) else None for value in values],
    }


def verdict_lines(record: dict[str, Any]) -> list[str]:
    """Return a judge's record as sentences."""
    numbers, counts = record["numbers"], record["counts"]
    counted = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items())
    lines = [f"{record['title']}, by {record['judge']}: {counted}"]
    for name, value in numbers.items():
        if not name.endswith(("_low", "_high")):
            lines.append(f"  {name.replace('_', ' '):28s} {value:.2f}{_span(name, numbers, '.2f')}")
    for row in record["comparisons"]:
        p = f"p {row['p_value']:.4f}, {row['p_holm']:.4f} after Holm"
        lines.append(
            f"  difference from {row['with']}: {row['difference']:+.2f}{_span('difference', row, '+.2f')}, {p}"
        )
    return lines


def _span(name: str, numbers: dict[str, Any], form: str) -> str:
    """Return a number's interval in words, if it has one."""
    if f"{name}_low" not in numbers:
        return ""
    low, high = numbers[f"{name}_low"], numbers[f"{name}_high"]
    return " (no interval: all prompts alike)" if is_point(low, high) else f" (95%: {low:{form}} to {high:{form}})"
