"""The command line: see `minigad --help`. Every config field is a flag of distill and fit."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from minigad import __version__
from minigad.config import (
    BOUNDS,
    CHOICES,
    PRESETS,
    SHORT_NAMES,
    GADConfig,
    UserError,
    make_config,
    preset_for,
    recipe_settings,
    visible,
)

__all__ = ["main"]

METHODS = ("gad", "seqkd", "soda")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status. What the user can mend is one sentence on stderr and status 2."""
    _open_streams()
    args = _parser().parse_args(argv)
    try:
        status = args.command(args)
        sys.stdout.flush()
        return status
    except (UserError, FloatingPointError) as error:
        print(visible(f"minigad: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minigad: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # what a command knows more of, it says itself
        print(visible(f"minigad: error: {_unwritten(error)}"), file=sys.stderr)
        return 2
    except (
        MemoryError,
        RuntimeError,
    ) as error:  # torch's allocator for CPUs raises no better type; memory.py speaks of GPUs
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        print(
            "minigad: error: this machine's memory is full; lower --token-budget, which a run may change when it goes on from its last "
            "checkpoint with --resume, or close other programs",
            file=sys.stderr,
        )
        return 2


def _open_streams() -> None:
    """Make stdout and stderr take every text, also where the user closed them or their encoding lacks a character.

    The number of a closed one is the next file's that is opened, and what is meant for the user would be written into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _unwritten(error: OSError) -> str:
    where = f"{error.filename2 or error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; files are written whole or not at all: make room or mend the permissions, then give the same command again"


class _Parser(argparse.ArgumentParser):
    """Shows what it complains about, and lets none of it act on the terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


def _seed(text: str) -> int:
    """Read a seed as GADConfig has it: torch and numpy refuse others, each in its own words."""
    low, high = BOUNDS["seed"]
    if not text.isdecimal() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"it is {text!r}; give a whole number from {low} to {high}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="minigad", description="Generative Adversarial Distillation, from a toy to a real student.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="toy language, no download: SeqKD, published GAD, best GAD, report; about 3 minutes"
    )
    demo.add_argument("--output-dir", default="run-demo")
    demo.add_argument("--seed", type=_seed, default=0)
    demo.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the steps, to see that everything works; the numbers mean nothing",
    )
    demo.set_defaults(command=_demo)
    _add_teach(commands)
    distill = commands.add_parser(
        "distill", allow_abbrev=False, help="train a student on prompts and a teacher's completions"
    )
    distill.add_argument(
        "--data", required=True, help="JSONL of prompt and completion, messages, or content and teacher_response"
    )
    distill.add_argument(
        "--eval-data", help="held-out rows of the same form; else --eval-fraction of the prompts is held out"
    )
    distill.add_argument("--method", choices=METHODS, default="gad")
    distill.add_argument(
        "--resume", action="store_true", help="go on where the run in --output-dir stopped; begin where there is none"
    )
    _add_config_flags(distill)
    distill.set_defaults(command=_distill)
    _add_evaluate(commands)
    _add_choose(commands)
    diagnose = commands.add_parser("diagnose", help="say in words what a run's curves mean and what to try")
    diagnose.add_argument("run")
    diagnose.set_defaults(command=_diagnose)
    merge = commands.add_parser(
        "merge", help="fold a run's adapter into plain weights, and say what the rounding costs"
    )
    merge.add_argument("run")
    merge.add_argument("--out", required=True, help="an empty folder for the weights")
    merge.add_argument("--dtype", choices=CHOICES["dtype"][1:], default="bfloat16")  # not auto
    merge.set_defaults(command=_merge)
    _add_tools(commands)
    report = commands.add_parser("report", help="write a run's report.html again")
    report.add_argument("run")
    report.set_defaults(command=_report)
    fit = commands.add_parser(
        "fit",
        allow_abbrev=False,
        help="say whether a step fits on a GPU, part by part, without downloading anything",
    )
    fit.add_argument("--gpu", required=True, help="its memory, such as 24GB, or a card's name, such as t4")
    _add_config_flags(fit)
    fit.set_defaults(command=_fit)
    check = commands.add_parser("check", help="say what this machine has and what minigad will use")
    check.set_defaults(command=_check)
    return parser


def _add_tools(commands: Any) -> None:
    guess = commands.add_parser("guess", help="a game: which of two completions is the teacher's?")
    guess.add_argument("run")
    guess.add_argument("--num-questions", type=int, default=10)
    guess.add_argument("--seed", type=_seed, default=0)
    guess.add_argument("--html", metavar="FILE.html", help="write the game as a page instead of asking here")
    guess.set_defaults(command=_guess)
    rerank = commands.add_parser(
        "rerank",
        allow_abbrev=False,
        help="sample N completions a prompt from a run's student and keep the discriminator's favourite",
    )
    rerank.add_argument("run")
    rerank.add_argument("--prompts", required=True, help="as for teach")
    rerank.add_argument("--out", required=True, help=".jsonl: prompt, completion, score, finished")
    rerank.add_argument("--num-generations", type=int, default=8)
    rerank.add_argument("--seed", type=_seed, default=0)
    rerank.set_defaults(command=_rerank)
    only = commands.add_parser(
        "filter",
        allow_abbrev=False,
        help="keep the pairs that a run's discriminator prefers to its student's own samples",
    )
    only.add_argument("run")
    only.add_argument("--data", required=True, help="pairs in any form that distill reads")
    only.add_argument("--out", required=True, help=".jsonl of the pairs that are kept, with score and preference")
    only.add_argument("--dropped", required=True, help=".jsonl of those that are not")
    only.add_argument("--at-least", type=float, default=0.5, help="preference that a pair needs, between 0 and 1")
    only.add_argument(
        "--num-generations", type=int, default=8, help="samples of the student that a pair is held against"
    )
    only.add_argument("--seed", type=_seed, default=0)
    only.set_defaults(command=_filter)


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        help=f"where the other settings come from: {', '.join(PRESETS)}; default: the student's own, or "
        "smollm2-135m, which is small, where it has none",
    )
    parser.add_argument(
        "--config", metavar="FILE.toml", help="a recipe: config fields, and `preset`; flags override it"
    )
    group = parser.add_argument_group("config fields (default: the preset's)")
    hints = get_type_hints(GADConfig)
    for field in dataclasses.fields(GADConfig):
        flag = "--" + field.name.replace("_", "-")
        if hints[field.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        elif get_args(hints[field.name]):
            group.add_argument(
                flag, type=lambda text: tuple(text.split(",")), default=argparse.SUPPRESS, metavar="A,B,..."
            )
        else:
            group.add_argument(flag, type=hints[field.name], choices=CHOICES.get(field.name), default=argparse.SUPPRESS)


def _add_teach(commands: Any) -> None:
    teach = commands.add_parser(
        "teach", allow_abbrev=False, help="collect a teacher's answers to prompts: the data that distill learns from"
    )
    teach.add_argument("--prompts", required=True, help="JSONL, JSON, CSV, Parquet or a hub name, with a prompt a row")
    teach.add_argument(
        "--model", required=True, help="name of the model at the endpoint; with --local, as for --student"
    )
    teach.add_argument("--base-url", help="of an OpenAI-compatible endpoint; default: OpenAI's. Key: OPENAI_API_KEY")
    teach.add_argument("--local", action="store_true", help="load the model here with transformers instead of calling")
    teach.add_argument("--hidden-prompt", help="with --local: JSON list of messages that come before every prompt")
    teach.add_argument("--out", required=True, help="pairs: .jsonl, .parquet, or a folder of datasets")
    teach.add_argument("--store", help="SQLite file of all answers ever paid for; default: OUT.db")
    teach.add_argument("--eval-prompts", help="prompts that must not be asked, since students are measured on them")
    teach.add_argument("--system", default="", help="system prompt of the teacher; the student does not see it")
    teach.add_argument("--temperature", type=float, default=1.0)
    teach.add_argument("--max-tokens", type=int, default=1024)
    teach.add_argument(
        "--seed", type=_seed, help="sample i of a prompt is asked for with seed + i; default: none is sent"
    )
    teach.add_argument("--samples", type=int, default=1, help="answers a prompt")
    teach.add_argument("--redraws", type=int, default=2, help="answers drawn in place of one that a policy asks again")
    _add_call_flags(teach)
    teach.add_argument("--figure", help="draw the check report to this file, such as checks.png")
    teach.add_argument("--dry-run", action="store_true", help="check the prompts, print tokens and price, call nobody")
    teach.set_defaults(command=_teach)
    split = commands.add_parser(
        "split", allow_abbrev=False, help="check pairs and split them by prompt, in files larger than memory too"
    )
    split.add_argument("--data", required=True, help="pairs in any form that distill reads")
    split.add_argument("--train", required=True, help=".jsonl, .parquet, or a folder of datasets")
    split.add_argument("--heldout", required=True, help="likewise")
    split.add_argument("--eval-fraction", type=float, default=0.1)
    split.add_argument("--seed", type=_seed, default=0)
    split.add_argument(
        "--on", action="append", default=[], metavar="CLASS=POLICY", help="keep or drop what a check finds"
    )
    split.set_defaults(command=_split)


def _add_call_flags(parser: argparse.ArgumentParser) -> None:
    """Add the limits and prices of calls to an endpoint."""
    parser.add_argument("--concurrency", type=int, default=8, help="calls in flight")
    parser.add_argument("--requests-per-minute", type=float, default=0.0)
    parser.add_argument("--tokens-per-minute", type=float, default=0.0)
    parser.add_argument("--max-attempts", type=int, default=6, help="calls for one answer before it is given up")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one call")
    parser.add_argument("--deadline", type=float, help="seconds for a whole collection")
    parser.add_argument("--max-failures", type=int, default=20, help="given-up answers after which it stops")
    parser.add_argument("--budget", type=float, help="dollars; stops before the call that would exceed it")
    parser.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="dollars a million tokens")
    parser.add_argument("--prices", help='JSON file {"model": [in, out]} that overrides the table of prices')
    parser.add_argument(
        "--on",
        action="append",
        default=[],
        metavar="CLASS=POLICY",
        help="keep, drop or retry what a check finds, such as refusal=retry",
    )


def _add_judge_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("judge (its calls are kept in a store, like a teacher's)")
    group.add_argument(
        "--judge", metavar="MODEL", help="name of the judge at the endpoint; with --judge-local, a model"
    )
    group.add_argument(
        "--judge-base-url", help="of an OpenAI-compatible endpoint; default: OpenAI's. Key: OPENAI_API_KEY"
    )
    group.add_argument("--judge-local", action="store_true", help="load the judge here with transformers")
    group.add_argument("--judge-temperature", type=float, help="default: 0")
    group.add_argument("--judge-max-tokens", type=int, help="of one reply; default: 1024")
    group.add_argument(
        "--judge-runs",
        type=int,
        help="how often everything is judged; two show agreement, which says something at a temperature above 0; default: 1",
    )
    group.add_argument("--judge-redraws", type=int, help="further replies for one that cannot be read; default: 2")
    group.add_argument(
        "--store",
        help="SQLite file of all replies ever paid for; default: judge.db in the run's folder (choose: OUT.judge.db)",
    )
    group.add_argument("--dry-run", action="store_true", help="print the judge's calls, tokens and price, call nobody")


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", allow_abbrev=False, help="measure a run's student on held-out prompts, with a judge if one is named"
    )
    evaluate.add_argument("run")
    prompts = evaluate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--data", help="held-out pairs in any form that distill reads")
    prompts.add_argument("--set", help="a fixed set (lmsys, dolly, self-inst, vicuna, mt-bench, ifbench, short-answers) or a file of prompts")  # fmt: skip
    evaluate.add_argument(
        "--temperature", type=float, help="default: the run's; 0 is not allowed, since likelihoods are measured too"
    )
    evaluate.add_argument("--greedy", action="store_true", help="take the likeliest token; measures of likelihood are left out")  # fmt: skip
    evaluate.add_argument("--paper-prompt", action="store_true", help="put the paper's wrapper around every prompt")
    evaluate.add_argument("--seed", type=_seed, default=0)
    evaluate.add_argument("--protocol", choices=("rating", "pairwise"), default="rating")
    evaluate.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="RUN_OR_FILE",
        help="another run, AlpacaEval's .json or lm-evaluation-harness's samples .jsonl; several are Holm-corrected",
    )
    evaluate.add_argument("--alpaca-eval", metavar="FILE.json", help="write the completions as AlpacaEval's JSON")
    evaluate.add_argument("--lm-eval", metavar="FOLDER", help="write the prompts as a task of lm-evaluation-harness")
    _add_judge_flags(evaluate)
    _add_call_flags(evaluate)
    evaluate.set_defaults(command=_evaluate)


def _add_choose(commands: Any) -> None:
    choose = commands.add_parser(
        "choose",
        allow_abbrev=False,
        help="choose among the checkpoints of runs on a validation file, within a length band",
    )
    choose.add_argument("runs", nargs="+", metavar="RUN")
    choose.add_argument("--data", required=True, help="validation pairs: neither trained on nor tested on")
    choose.add_argument("--out", required=True, help="folder for the chosen student, a run of its own")
    choose.add_argument("--measure", default="honest_auc", help="honest_auc, nll, f1_2, score or win_rate (these two by --judge)")  # fmt: skip
    choose.add_argument("--length-band", type=float, nargs=2, default=(0.8, 1.25), metavar=("LOW", "HIGH"), help="student's mean words over the teacher's; default: 0.8 1.25")  # fmt: skip
    choose.add_argument("--test", action="append", default=[], help="prompts that must not be chosen on; those of a run's evaluation.json never are")  # fmt: skip
    choose.add_argument("--greedy", action="store_true", help="sample greedily; default: at the run's temperature")
    choose.add_argument("--seed", type=_seed, default=0)
    _add_judge_flags(choose)
    _add_call_flags(choose)
    choose.set_defaults(command=_choose)


def _config(args: argparse.Namespace) -> GADConfig:
    names = {field.name for field in dataclasses.fields(GADConfig)}
    flags = {name: value for name, value in vars(args).items() if name in names}
    recipe = recipe_settings(args.config) if args.config else {}
    preset = args.preset or recipe.pop("preset", None) or preset_for(flags.get("student", "toy"))
    return make_config(preset, {name: value for name, value in (recipe | flags).items() if name != "preset"})


def _say_preset(args: argparse.Namespace, config: GADConfig) -> None:
    """Say whose settings a student takes that no preset was made for: they may be far too small for it."""
    if (
        args.preset
        or args.config
        or preset_for(config.student) == config.student
        or config.student in SHORT_NAMES.values()
    ):
        return
    print(
        visible(
            f"minigad: there is no preset for student {config.student!r}: what you do not set is as in {preset_for(config.student)!r} (prompts "
            f"to {config.max_prompt_length} tokens, completions to {config.max_completion_length}, quantization {config.quantization}); "
            f"--preset takes another's, of {', '.join(PRESETS)}"
        ),
        file=sys.stderr,
    )


def _distill(args: argparse.Namespace) -> int:
    config = _config(args)  # before the imports: a wrong flag is answered at once
    from minigad import parallel
    from minigad.run import distill

    folder = distill(config, args.data, args.eval_data, args.method, resume=args.resume)
    if parallel.world().rank == 0:
        print(visible(f"wrote {folder}/student and {folder}/report.html"))
    return 0


def _teach(args: argparse.Namespace) -> int:
    from minigad.export import check_out
    from minigad.store import Store
    from minigad.teach import check_prompts, closed_after, dry_run, make_teacher, settings_of, teach

    settings = settings_of(args)
    check_out(args.out)
    if args.dry_run:
        kept = check_prompts(args.prompts, settings.policies, args.eval_prompts)
        print(visible("\n".join([*kept.report.lines(), *dry_run(args.prompts, settings, kept, args.model)])))
        return 0
    teacher = make_teacher(args)
    with closed_after(teacher), Store(args.store or f"{args.out}.db") as store:
        done = teach(teacher, args.prompts, args.out, store, settings, eval_prompts=args.eval_prompts)
    print(visible("\n".join([*done.summary.lines(), *done.ledger.lines(), *done.report.lines()])))
    print(visible(f"wrote {args.out} and {args.out}.report.json"))
    if args.figure:
        from minigad.plots import plot_checks

        plot_checks(done.report).savefig(args.figure, dpi=100)
    if done.summary.stopped:
        print("To go on, give the same command again: what is in the store is not asked again.")
    return 130 if done.summary.stopped == "Ctrl-C" else int(bool(done.summary.stopped or done.summary.failures))


def _split(args: argparse.Namespace) -> int:
    from minigad.checks import make_policies
    from minigad.split import split_pairs

    policies = make_policies(args.on)
    done = split_pairs(args.data, args.train, args.heldout, args.eval_fraction, args.seed, policies)
    print(visible("\n".join(done.lines())))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from minigad.toy.demo import demo

    demo(Path(args.output_dir), args.seed, quick=args.quick)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from minigad.judging import evaluate_run

    return _measured(evaluate_run, args)


def _choose(args: argparse.Namespace) -> int:
    from minigad.choose import choose

    return _measured(choose, args)


def _measured(measure: Callable[[argparse.Namespace], list[str]], args: argparse.Namespace) -> int:
    """Print the lines of a measurement, or how to go on with one whose judge was stopped."""
    from minigad.judging import Unfinished

    try:
        print(visible("\n".join(measure(args))))
    except Unfinished as stopped:
        why = "The judge's verdicts are not written: part of the prompts is no sample of all."
        print(visible("\n".join([*stopped.summary.lines(), why])))
        print("To go on, give the same command again: what is in the store is not asked again.")
        return 130 if stopped.summary.stopped == "Ctrl-C" else 1
    return 0


def _guess(args: argparse.Namespace) -> int:
    from minigad.checkpoint import write_whole
    from minigad.guess import game_page, questions, which_is_the_teacher

    if not args.html:
        which_is_the_teacher(args.run, num_questions=args.num_questions, seed=args.seed, notebook=False)
        return 0
    page = game_page(*questions(args.run, args.num_questions, args.seed))
    write_whole(_out(args.html, ".html"), page.encode("utf-8", "backslashreplace"))
    print(visible(f"wrote {args.html}"))
    return 0


def _rerank(args: argparse.Namespace) -> int:
    from minigad.data import stream_prompts, write_jsonl
    from minigad.players import load_players
    from minigad.reward import best_of_n

    out = _out(args.out, ".jsonl")
    if args.num_generations < 1:
        raise UserError(f"--num-generations is {args.num_generations}; give at least 1")
    prompts = [prompt for _, prompt in stream_prompts(args.prompts)]
    config, student, discriminator = load_players(args.run)
    drawn = student.generate(prompts, config, seed=args.seed, num_generations=args.num_generations)
    groups = [slice(i, i + args.num_generations) for i in range(0, len(drawn.texts), args.num_generations)]
    texts, flags = [drawn.texts[group] for group in groups], [drawn.finished[group] for group in groups]
    best = best_of_n(discriminator, prompts, texts, flags)
    write_jsonl(
        out,
        (
            {
                "prompt": prompt,
                "completion": one.completion,
                "score": one.scores[one.place],
                "finished": done[one.place],
            }
            for prompt, one, done in zip(prompts, best, flags, strict=True)
        ),
    )
    print(visible(f"wrote {out}: {len(best)} prompts, the best of {args.num_generations} completions each"))
    return 0


def _filter(args: argparse.Namespace) -> int:
    from minigad.data import write_jsonl
    from minigad.players import load_players
    from minigad.reward import filter_pairs

    kept, dropped = _out(args.out, ".jsonl"), _out(args.dropped, ".jsonl")
    if kept == dropped:
        raise UserError(f"--out and --dropped are both {args.out!r}; name two files")
    discriminator = load_players(args.run).discriminator
    done = filter_pairs(
        discriminator, args.data, at_least=args.at_least, num_generations=args.num_generations, seed=args.seed
    )
    write_jsonl(kept, done.kept)
    write_jsonl(dropped, done.dropped)
    print(visible("\n".join([*done.lines(), f"wrote {kept} and {dropped}"])))
    return 0


def _out(name: str, ending: str) -> Path:
    """Return a file's path; UserError before any work if it cannot be written there."""
    path = Path(name)
    if path.suffix != ending or not path.parent.is_dir():
        raise UserError(f"cannot write {name!r}: name a {ending} file in a folder that exists")
    return path


def _diagnose(args: argparse.Namespace) -> int:
    from minigad.diagnose import diagnose
    from minigad.reading import read_run

    run = read_run(args.run)
    print(visible("\n".join(diagnose(run["metrics"], run["evaluation"]))))
    for finding in run["audit"]:
        if not finding["ok"]:
            print(visible(f"AUDIT, {finding['check']}: {finding['value']:.2f} ({finding['words']})."))
    return 0


def _merge(args: argparse.Namespace) -> int:
    import torch

    from minigad.chat import encode
    from minigad.merge import merge, merging_loss
    from minigad.players import load_student
    from minigad.reading import read_run
    from minigad.student import Student

    run = read_run(args.run)
    config = GADConfig(**run["config"]["config"])
    student = load_student(args.run, config)
    samples = (run["evaluation"] or {"samples": []})["samples"][:64]
    rows = [
        encode(student.tokenizer, s["prompt"], s["student"], finished=s["finished"]) for s in samples if s["student"]
    ]
    before = student.logprobs_of(rows) if rows else None
    merge(student, args.out, getattr(torch, args.dtype))
    print(visible(f"wrote {args.out}"))
    if before is not None:
        plain = Student.from_pretrained(args.out, config.replace(quantization="none", dtype=args.dtype))
        lost = merging_loss(before, plain, rows)
        print(
            f"against the adapter, on {len(rows)} of the run's own held-out completions: log p moved by "
            f"{lost['logp_difference']:.4f} nats a token on average, KL {lost['kl']:+.5f} nats a token"
        )
    return 0


def _report(args: argparse.Namespace) -> int:
    from minigad.reading import read_run
    from minigad.report import write_report

    read_run(args.run)
    print(visible(f"wrote {write_report(Path(args.run))}"))
    return 0


def _fit(args: argparse.Namespace) -> int:
    from minigad.fit import gpu_bytes, report

    memory, config = gpu_bytes(args.gpu), _config(args)
    lines = report(config, memory)
    _say_preset(args, config)
    print("\n".join(lines))
    return 0


def _check(args: argparse.Namespace) -> int:
    import importlib.metadata
    import platform

    import torch

    from minigad.hub import cache_folder
    from minigad.precision import choose_dtype

    rows: list[tuple[str, Any]] = [("python", platform.python_version()), ("minigad", __version__)]
    for package in ("torch", "transformers", "peft", "datasets", "bitsandbytes", "openai", "vllm", "torchao"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    cuda = torch.cuda.is_available()
    rows.append(("device", torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"))
    rows.append(("dtype of the base", "auto is " + ": ".join(choose_dtype(lora_r=16))))
    rows.append(("without adapters", "auto is " + ": ".join(choose_dtype(lora_r=0))))
    rows.append(("model cache", cache_folder()))
    print("\n".join(f"{name:18s} {value}" for name, value in rows))
    return 0
