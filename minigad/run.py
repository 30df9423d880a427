"""A run directory that can be read without this library: config.json, metrics.jsonl, samples.jsonl, student/, discriminator/, report.html.

`distill` fills it, and can be killed at any moment and resumed: see minigad.checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

import minigad
from minigad import hub, parallel
from minigad.attribution import PIECE_MEANINGS, judged
from minigad.audit import Finding, audit
from minigad.chat import encode_prompt, prompt_text
from minigad.checkpoint import (
    Damaged,
    State,
    newest,
    prune,
    save,
    seal,
    set_aside,
    to_json,
    verify,
    write_synced,
    write_whole,
)
from minigad.config import GADConfig, UserError, visible
from minigad.data import check_disjoint, group_by_prompt, limit_prompts, load_pairs, prompt_key, split_by_prompt
from minigad.diagnose import WINDOW, alarms, dump_batch, not_finite
from minigad.discriminator import Discriminator
from minigad.evaluate import evaluate
from minigad.locking import held
from minigad.optim import check_optimizer
from minigad.precision import settled
from minigad.report import write_report
from minigad.seen import TESTED_ON, TRAINED_ON, add_seen
from minigad.student import Student
from minigad.toy.model import TOY_SIZES
from minigad.train import Metrics, gad, num_steps, seqkd, soda, warmup
from minigad.vllm_sampler import VLLMSampler

__all__ = [
    "Players",
    "RunDirectory",
    "distill",
    "load_players",
    "lock",
    "phase_steps",
    "progress",
    "read_json",
    "read_metrics",
    "read_run",
    "save_discriminator",
    "save_student",
    "whole_folder",
]

LOGS = ("metrics.jsonl", "samples.jsonl")
PARTS = (*LOGS, TRAINED_ON, TESTED_ON, "student", "discriminator", "evaluation.json", "audit.json", "report.html")


class RunDirectory:
    """Where a run writes. Metrics and samples are appended line by line, everything else is written whole or not at all.

    Every failure to write is a UserError that says what is safe and what to do.
    """

    def __init__(self, folder: str | Path, config: GADConfig, details: dict[str, Any], *, resume: bool = False) -> None:
        """Make the folder; UserError if it cannot be written, or holds a run that is not to be resumed, or anything of a run's names."""
        self.folder = Path(folder)
        self.about = {"minigad": minigad.__version__, **details, "config": dataclasses.asdict(config)}
        self.saved: Path | None = None  # the newest good checkpoint
        before = _begun(self.folder)
        if before is None:
            _check_nothing_is_lost(self.folder)
        elif resume:
            _check_same_run(before, self.about, self.folder)
        else:
            raise UserError(
                f"output_dir {str(folder)!r} already holds a run; go on with it by --resume, "
                "give another --output-dir, or move that one away"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir {str(folder)!r} cannot be made ({error.strerror}); give another --output-dir"
            ) from error
        with self.writing("config.json"):
            write_json(self.folder / "config.json", self.about)

    def record(self, stream: Iterable[Metrics], logging_steps: int = 1) -> Iterator[Metrics]:
        """Pass metrics through, appending every `logging_steps`-th to metrics.jsonl and its samples to samples.jsonl."""
        for metrics in stream:
            if metrics["step"] % logging_steps == 0 or metrics["step"] == 1:
                about = {key: metrics[key] for key in ("phase", "step")}
                samples = [
                    {**about, **sample, "prompt": prompt_text(sample["prompt"])}
                    for sample in metrics.get("samples", ())
                ]
                self._append("metrics.jsonl", [{key: value for key, value in metrics.items() if key != "samples"}])
                self._append("samples.jsonl", samples)
            yield metrics

    def resume(self, student: Student | None, discriminator: Discriminator | None) -> State:
        """Return the state to go on from: that of the newest checkpoint that verifies, or of a run that begins.

        Damaged checkpoints are named, with the reason, and set aside. metrics.jsonl and samples.jsonl are cut back to
        what they held at that checkpoint: the steps that come after it are done, and written, again.
        """
        with self.writing("checkpoints"):
            checkpoint, skipped = newest(self.folder)
            for path, why in skipped:
                _say(f"{path} is damaged and was skipped: {why}; it is kept as {set_aside(path).name}")
            for name in LOGS:
                _cut(self.folder / name, checkpoint.record["logs"][name] if checkpoint else 0)
        if checkpoint is not None:
            self.saved = checkpoint.path
            _say(f"going on from {checkpoint.path}, step {checkpoint.record['step']} of {checkpoint.record['phase']}")
            _compare_versions(checkpoint.record["versions"])
        return State(student, discriminator, checkpoint)

    def save(self, state: State, keep: int) -> None:
        """Write a checkpoint, then delete all but the `keep` newest."""
        with self.writing("checkpoint"):
            logs = {name: _synced_size(self.folder / name) for name in LOGS}
            self.saved = save(self.folder, state, {"logs": logs, "versions": versions(), **self.about})
            prune(self.folder, keep)

    def write_trained_on(self, prompts: Iterable[Any]) -> None:
        """Write trained_on.txt: short hashes of the training prompts, by which `evaluate` and `choose` know them again."""
        with self.writing(TRAINED_ON):
            add_seen(self.folder / TRAINED_ON, prompts)

    def write_evaluation(self, numbers: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Write evaluation.json: what was measured on held-out prompts, and the texts it was measured on."""
        with self.writing("evaluation.json"):
            write_json(self.folder / "evaluation.json", {"metrics": numbers, "samples": samples})

    def write_audit(self, findings: list[Finding]) -> None:
        """Write audit.json: what the discriminator of the last step judges by."""
        rows = [{**finding._asdict(), "ok": finding.ok} for finding in findings]
        with self.writing("audit.json"):
            write_json(self.folder / "audit.json", {"findings": rows})

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with self.writing(name), (self.folder / name).open("ab") as file:
            file.write(b"".join(to_json(row, indent=None) + b"\n" for row in rows))

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn a failure to write into a UserError that says what is safe and what to do."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            safe = f"{self.saved.name} is safe" if self.saved else "no checkpoint was written yet"
            raise UserError(
                f"{what} could not be written in {str(self.folder)!r} ({getattr(error, 'strerror', None) or error}); {safe}: make room "
                "or mend the permissions, then run the same command with --resume"
            ) from error


def distill(
    config: GADConfig,
    data: Any,
    eval_data: Any = None,
    method: str = "gad",
    tokenizer: Any = None,
    *,
    resume: bool = False,
) -> Path:
    """Train a student on a teacher's text and write the whole run: metrics, samples, student, evaluation, report.

    `method` is gad, seqkd or soda. `data` and `eval_data` are what load_pairs takes; without `eval_data` a share of the prompts is
    held out. `resume` goes on where a run in that folder stopped, bit for bit on a CPU, and begins where there is none.
    Ctrl-C and SIGTERM finish the step, save a checkpoint and the student as it is, and then raise KeyboardInterrupt or
    SystemExit. Returns the run's folder.
    """
    alone_or_first = parallel.start().rank == 0
    config = settled(config)  # what is written down must mean the same on the machine that goes on
    train, heldout = _datasets(config, data, eval_data, say=alone_or_first)
    with _loading(config.student):
        student = Student.load(config, tokenizer=tokenizer)
    train, heldout = (
        _limited(part, name, student, config, say=alone_or_first)
        for part, name in ((train, "training"), (heldout, "held-out"))
    )
    _check_batches(config, method, len(train))
    check_optimizer(config, student.device)
    if config.sampler == "vllm":
        student.sampler = VLLMSampler(config)
    with _loading(config.discriminator_model or config.student):
        discriminator = Discriminator.load(config, student) if method == "gad" else None
    if not alone_or_first:
        return _follow(State(student, discriminator), train, heldout, config, method, resume=resume)
    details = {
        "method": method,
        "models": {name: _revision(name) for name in (config.student, config.discriminator_model) if name},
        "processes": parallel.world().size,  # the batch of a step is theirs together
        "train_rows": len(train),
        "heldout_rows": len(heldout),
        "data": _fingerprint(train),
    }
    with lock(config.output_dir):
        run = RunDirectory(config.output_dir, config, details, resume=resume)
        run.write_trained_on(train["prompt"])
        state = run.resume(student, discriminator)
        parallel.wait()  # the others read the checkpoint that this process goes on from
        stopped = _train(run, state, _play(state, train, heldout, config, method), config, len(train))
        with run.writing("student"):
            save_student(student, run.folder / "student", config, method)
        if discriminator is not None:
            with run.writing("discriminator"):
                save_discriminator(discriminator, run.folder / "discriminator")
        findings, evaluation = _measure(state, train, heldout, config, stopped=bool(stopped))
        if discriminator is not None:
            run.write_audit(findings)
        if evaluation:
            run.write_evaluation(*evaluation)
        with run.writing("report.html"):
            write_report(run.folder)
    if stopped == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    if stopped:
        raise KeyboardInterrupt
    return run.folder


def _follow(state: State, train: Any, heldout: Any, config: GADConfig, method: str, *, resume: bool) -> Path:
    """Do this process's share of the steps; process 0 alone writes, measures and reports. Returns the run's folder."""
    parallel.wait()
    folder = Path(config.output_dir)
    state.checkpoint, stopped = newest(folder)[0] if resume else None, False
    with stop_requests() as asked:
        for _ in _play(state, train, heldout, config, method):
            stopped = bool(parallel.total(sum(asked[:1])))
            if stopped:
                break
    if parallel.sharded():  # process 0 measures, and a pass over the base takes all of them
        _measure(state, train, heldout, config, stopped=stopped)
    return folder


def _measure(
    state: State, train: Any, heldout: Any, config: GADConfig, *, stopped: bool
) -> tuple[list[Finding], tuple[dict[str, Any], list[dict[str, Any]]] | None]:
    """Return what the discriminator judges by and, unless the run was stopped, the student's evaluation."""
    student, discriminator = state.student, state.discriminator
    assert student is not None
    compares = config.discriminator == "implicit" and config.discriminator_against == "reference"
    early = compares and student.reference is None  # stopped before there was a reference: no text can be scored
    findings = [] if discriminator is None or early else audit(discriminator, student, train, heldout, config)
    if stopped:
        return findings, None
    metrics, samples = evaluate(student, heldout, config, seed=config.seed)
    if discriminator is not None:
        samples = judged(discriminator, [prompt for prompt, _ in group_by_prompt(heldout)], samples)
    return findings, (metrics, samples)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Name the model in what the libraries raise for a broken folder, of whatever kind it is."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory while model {name!r} was loaded: its weights alone are too much; --quantization nf4 with "
            "--lora-r 16, --dtype bfloat16 or a smaller --student helps, and minigad fit shows the whole bill"
        ) from error
    except Exception as error:  # tokenizers raises just that
        why = " ".join(str(error).split())[:300]
        raise UserError(f"model {name!r} could not be loaded ({why}); copy or download its folder again") from error


def _train(run: RunDirectory, state: State, stream: Iterator[Metrics], config: GADConfig, num_rows: int) -> int:
    """Run the generators and save on the way; return the number of the signal that stopped them, or 0."""
    totals = phase_steps(config, num_rows)
    watched = _watched(run.record(_finite(stream, state, run), config.logging_steps), run, config.on_alarm)
    with stop_requests() as asked:
        for metrics in progress(watched, totals):
            due = config.save_steps and state.total % config.save_steps == 0
            stop = parallel.total(sum(asked[:1]))  # any process may have been asked; all must stop at one step
            if due or stop or metrics["step"] == totals[metrics["phase"]]:
                run.save(state, config.save_total_limit)
            if stop:
                _say(f"stopped at step {metrics['step']} of {metrics['phase']}; go on with --resume")
                return int(asked[0]) if asked else signal.SIGTERM
    return 0


def _finite(stream: Iterator[Metrics], state: State, run: RunDirectory) -> Iterator[Metrics]:
    """Pass steps through; at the first value that is not finite write the batch down and raise FloatingPointError."""
    try:
        for metrics in stream:
            if problem := not_finite(state, metrics):
                raise FloatingPointError(problem)
            yield metrics
    except FloatingPointError as error:
        problem = f"{error}; {not_finite(state, {})}".removesuffix("; ")
        with run.writing("the batch"):
            batch = dump_batch(run.folder, state, problem)
        kept = f"{run.saved} is the last good checkpoint" if run.saved else "there is no checkpoint yet"
        raise FloatingPointError(
            f"step {state.step} of {state.phase}: {problem}; its batch is in {batch}, {kept}; start again with lower "
            "learning rates or a wider dtype, since --resume would repeat this step exactly"
        ) from error


def _watched(stream: Iterator[Metrics], run: RunDirectory, on_alarm: str) -> Iterator[Metrics]:
    """Pass steps through and look at them every WINDOW / 5 steps; say an alarm once, and raise UserError if it shall stop the run."""
    game = [metrics for metrics in read_metrics(run.folder) if metrics["phase"] == "gad"]
    first, last, said = game[:WINDOW], deque(game, maxlen=WINDOW), set[str]()
    for metrics in stream:
        yield metrics
        if metrics["phase"] != "gad" or on_alarm == "ignore":
            continue
        last.append({key: value for key, value in metrics.items() if key != "samples"})
        first += [last[-1]] if len(first) < WINDOW else []
        for alarm in alarms(first, list(last)) if metrics["step"] % (WINDOW // 5) == 0 else ():
            words = f"alarm, {alarm.name}, step {alarm.step}: {alarm.words}"
            if alarm.name not in said:
                _say(words)
            said.add(alarm.name)
            if on_alarm == "stop":
                raise UserError(f"stopped by an {words}; on_alarm is 'stop', the last checkpoint is {run.saved}")


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of dying of them, so that the step at hand can end; the second one is obeyed at once.

    Yields the list of signals so far. Outside the main thread, where Python allows no handlers, it stays empty.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, b"minigad: finishing this step, then saving; once more stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keep a second process out of a run's folder. Where the file system has no locks, say so and go on."""
    from filelock import Timeout

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _check_links(Path(folder))
        lock = held(Path(folder) / ".lock")
    except Timeout as error:
        raise UserError(
            f"output_dir {str(folder)!r} is in use by another process; wait for it or give another --output-dir"
        ) from error
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a ValueError for NUL in the name
        raise UserError(
            f"output_dir {str(folder)!r} cannot be written ({getattr(error, 'strerror', error)}); give another --output-dir"
        ) from error
    with lock:
        yield


# What may differ when a run goes on: where and how often it writes, and how it splits its work.
FREE = {
    "output_dir",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "on_alarm",
    "token_budget",
    "gradient_checkpointing",
    "vllm_gpu_memory_utilization",
}


def _check_same_run(before: Any, now: dict[str, Any], folder: Path) -> None:
    """Name the settings that changed since a run began; UserError for those that its past depends on."""
    if not isinstance(before, dict) or not isinstance(before.get("config"), dict):
        raise UserError(f"{folder / 'config.json'} holds no configuration of a run; give another --output-dir")
    defaults, config = dataclasses.asdict(GADConfig()), json.loads(to_json(now["config"]))
    if unknown := sorted(before["config"].keys() - config.keys()):
        raise UserError(
            f"the run in {str(folder)!r} was begun by minigad {before.get('minigad')}, whose settings {', '.join(unknown)} this one "
            f"({minigad.__version__}) does not have; resume it with that version, or give another --output-dir"
        )
    old = {name: before["config"].get(name, default) for name, default in json.loads(to_json(defaults)).items()}
    changed = {name: (old[name], config[name]) for name in config if old[name] != config[name]}
    changed |= {
        name: (before.get(name), now.get(name))
        for name in ("method", "models", "data", "processes")
        if name in before and before[name] != now.get(name)
    }
    # More steps at a constant rate leave the past as it was.
    free = FREE | (
        {"max_steps"} if config["lr_final_fraction"] == 1 and config["max_steps"] > old["max_steps"] else set()
    )
    words = {name: f"{name} ({a!r} then, {b!r} now)" for name, (a, b) in changed.items()}
    if refused := [words[name] for name in changed if name not in free]:
        raise UserError(
            f"the run in {str(folder)!r} was made with other settings: {', '.join(refused)}; "
            "put them back to resume it, or give another --output-dir"
        )
    if changed:
        _say(f"changed since the run began: {', '.join(words.values())}")


def _check_links(folder: Path) -> None:
    """Refuse links: what is written under their names would be written elsewhere. A student/ that lies elsewhere can be read."""
    links = [path for path in folder.iterdir() if path.is_symlink()]
    if names := sorted(path.name for path in links if path.name.startswith(".") or not path.is_dir()):
        raise UserError(
            f"run {str(folder)!r} holds links ({', '.join(names)}), through which a run would write outside it; put the files "
            "themselves there, or give another folder"
        )


def _begun(folder: Path) -> Any:
    """Return what a folder's run was begun with: config.json or, if that is lost, the newest checkpoint's copy; None without a run."""
    if (folder / "config.json").exists():
        return read_json(folder / "config.json")
    checkpoint = newest(folder)[0] if folder.is_dir() else None
    return checkpoint.record if checkpoint else None


def _check_nothing_is_lost(folder: Path) -> None:
    """Without a run in it, what a folder has of a run's names is somebody else's, or all that is left of one."""
    if there := [name for name in PARTS if (folder / name).exists()]:
        raise UserError(
            f"output_dir {str(folder)!r} holds no run but {', '.join(there)}, which a run would write over; give another "
            "--output-dir, or move them away"
        )


def _revision(name: str) -> str:
    """Return what is loaded under a model's name: the hub's commit (its snapshots are called so), or the folder's name."""
    return name if name in TOY_SIZES else hub.resolve(name, progress=False).name


def _fingerprint(dataset: Any) -> str:
    """Return a SHA-256 of the rows, in order."""
    digest = hashlib.sha256()
    for prompt, completion in zip(dataset["prompt"], dataset["completion"], strict=True):
        digest.update(to_json([prompt_key(prompt), completion]))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    packages = ("torch", "transformers", "peft", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _compare_versions(before: dict[str, str]) -> None:
    changed = [
        f"{name} {old} then, {versions().get(name)} now" for name, old in before.items() if versions().get(name) != old
    ]
    if changed:
        _say(f"the run goes on, but maybe not to the last bit: {'; '.join(changed)}")


def _datasets(config: GADConfig, data: Any, eval_data: Any, *, say: bool) -> tuple[Any, Any]:
    dataset, report = load_pairs(data)
    if say:
        print(visible("\n".join(report.lines())), file=sys.stderr)
    if eval_data is None:
        return split_by_prompt(dataset, config.eval_fraction, config.seed)
    heldout, report = load_pairs(eval_data)
    if say:
        print(visible("\n".join(report.lines())), file=sys.stderr)
    check_disjoint(dataset, heldout)
    return dataset, heldout


def _limited(dataset: Any, name: str, student: Student, config: GADConfig, *, say: bool) -> Any:
    def encoded(prompt: Any) -> list[int]:
        return encode_prompt(student.tokenizer, prompt)

    limited, count = limit_prompts(dataset, encoded, config.max_prompt_length, config.overlong_prompts)
    if count and say:
        done = "dropped" if config.overlong_prompts == "drop" else "will be cut from the left"
        print(
            f"{count} {name} rows have a prompt of more than {config.max_prompt_length} tokens: {done}.",
            file=sys.stderr,
        )
    return limited


def _check_batches(config: GADConfig, method: str, num_rows: int) -> None:
    """Say before anything is written that a batch is larger than the data."""
    sizes = {"warmup_batch_size": config.warmup_batch_size}
    if method == "gad":
        sizes["per_device_train_batch_size"] = config.per_device_train_batch_size
    for field, own in sizes.items():
        size = own * parallel.world().size
        if size > num_rows:
            raise UserError(
                f"config field {field!r} is {own}{_times(parallel.world().size)} but only {num_rows} training rows are there; "
                f"set --{field.replace('_', '-')} to {num_rows // parallel.world().size} or less, or give more data"
            )


def _times(processes: int) -> str:
    return f" on each of {processes} processes" if processes > 1 else ""


def phase_steps(config: GADConfig, num_rows: int) -> dict[str, int]:
    """Return the number of steps of each phase, for a progress bar."""

    def steps(epochs: float) -> int:
        return num_steps(epochs, num_rows, config.warmup_batch_size * parallel.world().size)

    return {
        "warmup": steps(config.warmup_epochs),
        "seqkd": steps(config.seqkd_epochs),
        "dpo": steps(config.dpo_epochs),
        "discriminator_sft": steps(config.discriminator_sft_epochs),
        "discriminator_warmup": config.discriminator_warmup_steps,
        "gad": config.max_steps,
    }


def _play(state: State, train: Any, heldout: Any, config: GADConfig, method: str) -> Iterator[Metrics]:
    student, discriminator = state.student, state.discriminator
    assert student is not None
    if method == "seqkd":
        yield from seqkd(student, train, config, state)
    elif method == "soda":
        yield from soda(student, train, config, state)
    else:
        assert method == "gad" and discriminator is not None, method
        yield from warmup(student, discriminator, train, config, state)
        if state.checkpoint is None:  # else the game had begun
            for finding in audit(discriminator, student, train, heldout, config):
                if not finding.ok:
                    _say(f"audit before the game, {finding.check}: {finding.value:.2f} ({finding.words})")
        yield from gad(student, discriminator, train, config, heldout, state)


def save_student(student: Student, folder: Path, config: GADConfig, method: str) -> None:
    """Write a student's folder, whole or not at all, with a model card that says what it is and what it is not."""
    peft, name = student.adapter is not None, " ".join(visible(config.student).replace("`", "'").split())
    card = f"""---
library_name: {"peft" if peft else "transformers"}
tags: [distillation, generative-adversarial-distillation, minigad]
---
# A student distilled with minigad

{"A LoRA adapter" if peft else "All weights"} of `{name}`, trained by `{method}` on a teacher's text alone
(discriminator: `{config.discriminator}`, {config.max_steps} steps, seed {config.seed}). Generative Adversarial Distillation: arXiv 2511.10643.

It imitates its teacher's manner on prompts like those it was trained on. Its answers are not checked for truth or safety.
The numbers that were measured are in `evaluation.json` of the run that made it.
"""
    with whole_folder(folder) as work:
        student.save_pretrained(work)
        write_synced(work / "README.md", card.encode("utf-8", "backslashreplace"))


def save_discriminator(discriminator: Discriminator, folder: Path) -> None:
    """Write a discriminator's folder, whole or not at all; `load_players` reads it."""
    with whole_folder(folder) as work:
        discriminator.save_pretrained(work)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that takes the place of `folder` at the end, and of nothing if an error comes first."""
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield work
        seal(work)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


class Players(NamedTuple):
    """A run's configuration, its student, and its discriminator as the game left it."""

    config: GADConfig
    student: Student
    discriminator: Discriminator


def load_players(folder: str | Path) -> Players:
    """Load both players of a finished run. Base models are found by their names, as when the run was made.

    Raises UserError if the folder holds no run, or a run without a discriminator (seqkd, soda, or one that has not ended).
    """
    folder = Path(folder)
    record = read_run(folder)["config"]
    if not (folder / "discriminator").is_dir():
        raise UserError(
            f"run {str(folder)!r} has no discriminator/ (its method is {record.get('method')!r}); methods without a game leave "
            "none, and a run that was stopped, or made by an older minigad, writes it when distill is given again with --resume"
        )
    config = GADConfig().replace(**record["config"])
    student = load_student(folder, config)
    return Players(config, student, load_discriminator(folder, config, student))


def load_student(folder: str | Path, config: GADConfig) -> Student:
    """Load a run's student; UserError if its folder is damaged."""
    _check_weights(Path(folder) / "student")
    with _loading(config.student):
        return Student.from_pretrained(Path(folder) / "student", config)


def load_discriminator(folder: str | Path, config: GADConfig, student: Student) -> Discriminator:
    """Load a run's discriminator beside its student; UserError if its folder is damaged."""
    _check_weights(Path(folder) / "discriminator")
    with _loading(config.discriminator_model or config.student):
        return Discriminator.from_pretrained(Path(folder) / "discriminator", student)


def _check_weights(folder: Path) -> None:
    try:
        verify(folder)
    except Damaged as error:
        raise UserError(
            f"{folder} is damaged: {error}; give distill again with --resume, which writes it anew from the checkpoint"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON, the whole file or nothing."""
    write_whole(path, to_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; UserError if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it from a copy, or delete it if it can be missed"
        ) from error


def read_metrics(folder: str | Path) -> list[Metrics]:
    """Read metrics.jsonl; a last line that a killed run left torn is dropped."""
    return _read_lines(Path(folder) / "metrics.jsonl", STEP, numbers=True)


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return {"config", "metrics", "samples", "evaluation", "audit"} of a run; UserError if the folder holds none, or a damaged one."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"folder {str(folder)!r} holds no run (no config.json); give the --output-dir of one")
    _check_links(folder)
    return {
        "config": _read_part(folder / "config.json", {"config": dict}),
        "metrics": read_metrics(folder),
        "samples": _read_lines(folder / "samples.jsonl", TEXTS),
        "evaluation": _read_evaluation(folder / "evaluation.json"),
        "audit": _read_audit(folder / "audit.json"),
    }


Fields = dict[str, type | tuple[type, ...]]
STEP: Fields = {"phase": str, "step": int}
TEXTS: Fields = {"prompt": str, "teacher": str, "student": str}
OPINION: Fields = {"teacher_read": str, "teacher_score": (int, float), "student_score": (int, float), "seen": dict}
SEEN: Fields = {"pieces": list, "contributions": list, "score": (int, float), "kind": str}
JUDGED: Fields = {"title": str, "judge": str, "protocol": str, "counts": dict, "numbers": dict, "comparisons": list}
FINDING: Fields = {"check": str, "value": (int, float), "limit": (int, float), "words": str, "ok": bool}


def _read_part(path: Path, fields: Fields) -> Any:
    return _checked(str(path), read_json(path), fields)


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    evaluation = _read_part(path, {"metrics": dict, "samples": list})
    _checked(f"{path}, metrics", evaluation["metrics"], {}, numbers=True)
    for number, sample in enumerate(evaluation["samples"], start=1):
        _check_sample(f"{path}, sample {number}", sample)
    judged = _checked(f"{path}", {"judge": evaluation.get("judge", [])}, {"judge": list})["judge"]
    for number, record in enumerate(judged, start=1):
        where = f"{path}, judge record {number}"
        _checked(where, record, JUDGED)
        for part in (record["numbers"], record["counts"]):
            _checked(where, part, {}, numbers=True)
        for row in record["comparisons"]:
            _checked(where, row, {"with": str}, numbers=True)
    return evaluation


def _check_sample(where: str, sample: Any) -> None:
    """Check a sample and, where there is one, the discriminator's opinion of it (see attribution.judged)."""
    _checked(where, sample, TEXTS)
    _checked(where, sample, {name: kind for name, kind in OPINION.items() if name in sample})
    if ("teacher_score" in sample) != ("student_score" in sample):
        raise UserError(f"{where}: there is a score of one side only; restore the file from a copy")
    for who in ("teacher", "student") if "seen" in sample else ():
        seen = _checked(f"{where}, seen", sample["seen"], {who: dict})[who]
        _checked(f"{where}, seen, {who}", seen, SEEN)
        texts, numbers = seen["pieces"], seen["contributions"]
        whole = all(isinstance(t, str) for t in texts) and all(isinstance(n, (int, float)) for n in numbers)
        if not whole or len(texts) != len(numbers) or seen.keys() != SEEN.keys() or seen["kind"] not in PIECE_MEANINGS:
            raise UserError(f"{where}: what the discriminator sees in the {who}'s text is damaged; restore the file")


def _read_audit(path: Path) -> list[dict[str, Any]]:
    findings = _read_part(path, {"findings": list})["findings"] if path.is_file() else []
    return [_checked(f"{path}, finding {number}", one, FINDING) for number, one in enumerate(findings, start=1)]


def _checked(where: str, value: Any, fields: Fields, numbers: bool = False) -> Any:
    """Return `value` if it is an object with these fields, and, if asked, with numbers in all others; UserError else."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: this is {str(value)[:60]!r} and not an object; restore the file from a copy")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise UserError(f"{where}: field {name!r} is {str(value.get(name))[:60]!r}; restore the file from a copy")
    for name in value.keys() - fields.keys() if numbers else ():
        if not isinstance(value[name], (int, float)):
            raise UserError(
                f"{where}: field {name!r} is {str(value[name])[:60]!r}, not a number; restore the file from a copy"
            )
    return value


def _read_lines(path: Path, fields: Fields, numbers: bool = False) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    complete = path.read_bytes().split(b"\n")[:-1]  # bytes after the last newline were never finished
    rows = []
    for number, line in enumerate(complete, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: the line is damaged ({error}); delete it") from error
        rows.append(_checked(f"{path}:{number}", row, fields, numbers))
    return rows


def _cut(path: Path, size: int) -> None:
    """Cut a log back to `size` bytes; if it is shorter already, to its last whole line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        kept = file.read(size)
        if len(kept) < size:
            _say(f"{path} has lost {size - len(kept)} bytes that it had at the checkpoint; the rest is kept")
        file.truncate(kept.rfind(b"\n") + 1)


def _synced_size(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def _say(text: str) -> None:
    print(f"minigad: {visible(text)}", file=sys.stderr)


def progress(stream: Iterable[Metrics], totals: dict[str, int]) -> Iterator[Metrics]:
    """Show where a run stands: a bar a phase on a terminal, a plain line every few seconds elsewhere.

    `totals` is the number of steps of each phase. Shows loss or reward, D accuracy, tokens/s and the time left.
    """
    from tqdm import tqdm

    terminal, bar, phase, said = sys.stderr.isatty(), None, "", 0.0
    try:
        for metrics in stream:
            if metrics["phase"] != phase:
                phase, started, first = metrics["phase"], time.monotonic(), metrics["step"]
                if bar is not None:
                    bar.close()
                bar = tqdm(
                    total=totals.get(phase),
                    desc=phase,
                    unit="step",
                    file=sys.stderr,
                    disable=not terminal,
                    initial=first - 1,
                )
            assert bar is not None
            bar.set_postfix_str(_headline(metrics), refresh=False)
            bar.update()
            last = metrics["step"] == totals.get(phase)
            if not terminal and (last or time.monotonic() - said > 10):
                said = time.monotonic()
                left = (totals.get(phase, 0) - metrics["step"]) * (said - started) / max(metrics["step"] - first + 1, 1)
                print(
                    f"{phase} {metrics['step']}/{totals.get(phase, '?')}  {_headline(metrics)}  {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )
            yield metrics
    finally:
        if bar is not None:
            bar.close()


def _headline(metrics: Metrics) -> str:
    shown = [
        ("reward", "reward", ".2f"),
        ("discriminator/accuracy", "D acc", ".2f"),
        ("tokens_per_second", "tok/s", ".0f"),
    ]
    if "reward" not in metrics:
        shown[0] = ("loss", "loss", ".3f")
    return "  ".join(f"{label} {metrics[key]:{form}}" for key, label, form in shown if key in metrics)
