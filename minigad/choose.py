"""`minigad choose`: the best checkpoint by a measure on validation prompts, among those whose length is acceptable.

The paper chose its checkpoints by the judge's score on the test prompts, "within an acceptable length". Here the prompts are
others, the band is stated, and every candidate's numbers are written down, those that lost included.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minigad.checkpoint import Damaged, checkpoints, load, write_json, write_whole
from minigad.config import GADConfig, UserError
from minigad.data import group_by_prompt, load_pairs, stream_prompts
from minigad.evaluate import MIN_PROMPTS, evaluate
from minigad.judge import PROTOCOLS
from minigad.judging import JUDGE_DEFAULTS, Jury, bench_of, dry_run, judged, jury_of, load_run, trained_lines
from minigad.memory import explained
from minigad.players import load_student, save_student
from minigad.report import write_report
from minigad.seen import TESTED_ON, TRAINED_ON, seen_among, text_key
from minigad.sources import short
from minigad.store import Store
from minigad.student import Student
from minigad.teach import closed_after

__all__ = ["MEASURES", "choose"]

# measure -> (which end is better, the judge's protocol that gives it)
MEASURES = {
    "honest_auc": (min, None),
    "nll": (min, None),
    "f1_2": (max, None),
    "score": (max, "rating"),
    "win_rate": (max, "pairwise"),
}


def choose(args: argparse.Namespace) -> list[str]:
    """Measure every checkpoint of the runs on args.data, write the best within the band to args.out; return the lines.

    `out` becomes a folder that `minigad evaluate` takes as a run: config.json, student/, choice.json with all candidates
    and the prompts that were used, which evaluate refuses from then on. The runs are left as they are. A run without
    checkpoints stands with its student. Raises UserError if prompts are a test's or were trained on, or no candidate is in
    the band.
    """
    _check(args)
    runs = {folder: load_run(folder) for folder in args.runs}
    dataset, _ = load_pairs(args.data)
    prompts = [prompt for prompt, _ in group_by_prompt(dataset)]
    _check_no_test(args, prompts, runs)
    notes = [line for folder in runs for line in _check_untrained(args, folder, prompts)]
    if args.measure == "honest_auc" and len(prompts) < MIN_PROMPTS:
        raise UserError(
            f"{args.data} has {len(prompts)} prompts; honest_auc needs {MIN_PROMPTS}: add some, or --measure nll"
        )
    protocol = MEASURES[args.measure][1]
    if args.dry_run and protocol:
        lengths = [
            config.max_completion_length for folder, (_, config) in runs.items() for _ in _candidates(Path(folder))
        ]
        return dry_run(args, PROTOCOLS[protocol], bench_of(args.data, dataset), lengths, [])
    jury = jury_of(args, protocol) if protocol else None
    candidates: list[dict[str, Any]] = []
    best: _Kept | None = None
    with closed_after(jury.model if jury else None):
        for folder, (record, config) in runs.items():
            for path, student in _students(Path(folder), config):
                candidates.append({"candidate": str(path), **_measure(student, dataset, config, args, jury)})
                if candidates[-1]["in_band"] and (best is None or _better(candidates[-1], best.found, args.measure)):
                    weights = [parameter.detach().clone() for parameter in student.parameters().values()]
                    best = _Kept(candidates[-1], student, weights, config, record["config"], Path(folder))
    if best is None:
        raise UserError(
            f"none of {len(candidates)} candidates is in the band {_band(args)}: {_ratios(candidates)}; widen it"
        )
    used = sorted({text_key(prompt) for prompt in prompts})
    about = {"measure": args.measure, "length_band": list(args.length_band), "data": str(args.data)}
    choice = {**about, "chosen": best.found["candidate"], "candidates": candidates, "prompts": used}
    _keep(Path(args.out), best, choice)
    write_report(args.out)
    return notes + _lines(args, candidates, best.found)


class _Kept(NamedTuple):
    """The best candidate so far: what was found, its model, its weights (the model goes on to the next), and its run."""

    found: dict[str, Any]
    student: Student
    weights: list[torch.Tensor]
    config: GADConfig
    about: dict[str, Any]
    folder: Path


def _check(args: argparse.Namespace) -> None:
    low, high = args.length_band
    if args.measure not in MEASURES:
        raise UserError(f"--measure is {args.measure!r}; it must be one of {', '.join(MEASURES)}")
    if not 0 <= low < high < float("inf"):
        raise UserError(
            f"--length-band is {low:g} {high:g}; give two finite numbers, the lower one first, neither negative"
        )
    if (MEASURES[args.measure][1] is not None) != (args.judge is not None):
        raise UserError(
            f"--measure {args.measure} and --judge do not go together: score and win_rate need a judge, no other"
        )
    if not args.judge and any(getattr(args, f"judge_{name}") is not None for name in JUDGE_DEFAULTS):
        raise UserError(
            f"what begins with --judge- is for a judge, and --measure {args.measure} needs none; leave it out"
        )
    if args.dry_run and not args.judge:
        raise UserError(f"--dry-run prices a judge's calls, and --measure {args.measure} needs none; leave it out")
    if Path(args.out).exists() and (not Path(args.out).is_dir() or any(Path(args.out).iterdir())):
        raise UserError(f"--out {args.out}: this exists and is not empty; give another folder")
    if not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {str(Path(args.out).parent)!r}; make it first")


def _check_no_test(
    args: argparse.Namespace, prompts: list[Any], runs: dict[str, tuple[dict[str, Any], GADConfig]]
) -> None:
    """Raise UserError if a validation prompt is one of a test: of --test, or of what a run was ever evaluated on."""
    tests = {text_key(prompt) for path in args.test for _, prompt in stream_prompts(path)}
    for folder, (record, _) in runs.items():
        tests |= {text_key(sample["prompt"]) for sample in (record["evaluation"] or {"samples": []})["samples"]}
        tests |= set(map(text_key, seen_among(Path(folder) / TESTED_ON, prompts) or []))
    if both := [prompt for prompt in prompts if text_key(prompt) in tests]:
        raise UserError(
            f"{len(both)} of the {len(prompts)} prompts of {args.data} are test prompts (of --test, or measured on before: a "
            f"run's evaluation.json and {TESTED_ON}), such as {short(both[0])}: a student chosen on them would be flattered by "
            "the test; choose on others"
        )


def _check_untrained(args: argparse.Namespace, folder: str, prompts: list[Any]) -> list[str]:
    """Raise UserError if a run's student was trained on a validation prompt; return a sentence if nobody can know."""
    known = seen_among(Path(folder) / TRAINED_ON, prompts)
    if known:
        raise UserError(
            f"{len(known)} of the {len(prompts)} prompts of {args.data} were trained on in {folder}, such as {short(known[0])}: the "
            "checkpoint that remembers them best would be chosen; choose on others"
        )
    return trained_lines(folder, known, len(prompts))


def _students(folder: Path, config: GADConfig) -> Iterator[tuple[Path, Student]]:
    """Yield each checkpoint with the student as it was then, oldest first: one model, its weights overwritten."""
    student = load_student(folder, config)
    for path in _candidates(folder):
        if path != folder / "student":
            _install(student, path)
        yield path, student


def _install(student: Student, path: Path) -> None:
    """Give the student the weights of a checkpoint; UserError for one that is damaged or another model's."""
    try:
        tensors = load(path).tensors
    except Damaged as error:
        raise UserError(f"{path} is damaged: {error}; move it away") from None
    mine = student.parameters()
    if lacking := [name for name in mine if f"student/{name}" not in tensors]:
        raise UserError(f"{path} lacks {len(lacking)} tensors of the student, such as {lacking[0]!r}; move it away")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(tensors[f"student/{name}"])


def _candidates(folder: Path) -> list[Path]:
    """Return a run's candidates, oldest first: its checkpoints, or its student where there is none."""
    return checkpoints(folder)[::-1] or [folder / "student"]


def _measure(
    student: Student, dataset: Any, config: GADConfig, args: argparse.Namespace, jury: Jury | None
) -> dict[str, Any]:
    temperature = 0.0 if args.greedy else None
    with explained("rollout", config):
        metrics, samples = evaluate(student, dataset, config, temperature=temperature, seed=args.seed)
    if jury is not None:
        bench = bench_of(args.data, dataset)
        with Store(args.store or f"{args.out}.judge.db") as store:
            metrics |= judged(jury, bench, [sample["student"] for sample in samples], [], store, args.seed)[0][
                "numbers"
            ]
    ratio = metrics["mean_words"] / max(metrics["teacher_mean_words"], 1e-9)
    names = [f"{args.measure}{end}" for end in ("", "_low", "_high")]
    kept = {name: metrics[name] for name in (*names, "mean_words", "teacher_mean_words") if name in metrics}
    return {**kept, "length_ratio": ratio, "in_band": args.length_band[0] <= ratio <= args.length_band[1]}


def _better(one: dict[str, Any], other: dict[str, Any], measure: str) -> bool:
    """Tell whether a later candidate is strictly better; of equal ones the earlier is kept."""
    return one[measure] != other[measure] and MEASURES[measure][0](one[measure], other[measure]) == one[measure]


def _keep(out: Path, best: _Kept, choice: dict[str, Any]) -> None:
    """Write the folder, the prompts first: never is there a chosen student that evaluate takes for any other."""
    with torch.no_grad():
        for parameter, weight in zip(best.student.parameters().values(), best.weights, strict=True):
            parameter.copy_(weight)
    out.mkdir(exist_ok=True)
    write_json(out / "choice.json", choice)
    for name in (TRAINED_ON, TESTED_ON):
        if (best.folder / name).is_file():
            write_whole(out / name, (best.folder / name).read_bytes())
    save_student(best.student, out / "student", best.config, str(best.about.get("method", "?")))
    write_json(out / "config.json", best.about)


def _band(args: argparse.Namespace) -> str:
    return f"{args.length_band[0]:g} to {args.length_band[1]:g} (mean words over the teacher's)"


def _ratios(candidates: list[dict[str, Any]]) -> str:
    return ", ".join(f"{Path(one['candidate']).name} {one['length_ratio']:.2f}" for one in candidates)


def _lines(args: argparse.Namespace, candidates: list[dict[str, Any]], best: dict[str, Any]) -> list[str]:
    end = "lower" if MEASURES[args.measure][0] is min else "higher"
    lines = [
        f"{len(candidates)} candidates on {args.data}, by {args.measure} ({end} is better), length band {_band(args)}:"
    ]
    for one in candidates:
        ends = [one.get(f"{args.measure}{end}") for end in ("_low", "_high")]
        interval = f" (95%: {ends[0]:.4f} to {ends[1]:.4f})" if None not in ends else ""
        state = "chosen" if one is best else "" if one["in_band"] else "outside the band"
        lines.append(
            f"  {one['candidate']}  {one[args.measure]:.4f}{interval}  length {one['length_ratio']:.2f}  {state}"
        )
    lines.append(
        f"wrote {args.out}: the number of the chosen one is flattered by the choice; measure it on test prompts"
    )
    return lines
