"""A run from its data to its report: `distill`, which can be killed at any moment and resumed (see minigad.checkpoint)."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigad import hub, parallel
from minigad.attribution import judged
from minigad.audit import Finding, audit
from minigad.chat import encode_prompt
from minigad.checkpoint import State, newest, to_json
from minigad.config import GADConfig, UserError, say, visible
from minigad.data import check_disjoint, group_by_prompt, limit_prompts, load_pairs, prompt_key, split_by_prompt
from minigad.diagnose import WINDOW, alarms, dump_batch, not_finite
from minigad.discriminator import Discriminator
from minigad.evaluate import evaluate
from minigad.optim import check_optimizer
from minigad.players import loading, save_discriminator, save_student
from minigad.precision import settled
from minigad.progress import progress
from minigad.reading import read_metrics, read_run
from minigad.report import write_report
from minigad.run_directory import RunDirectory, check_output_dir, lock
from minigad.student import Student
from minigad.toy.model import TOY_SIZES
from minigad.train import Metrics, gad, num_steps, seqkd, soda, warmup
from minigad.vllm_sampler import VLLMSampler

__all__ = ["distill", "phase_steps", "read_run"]


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
    if alone_or_first and os.path.isdir(config.output_dir):  # False, not an error, for a name that cannot be
        with lock(config.output_dir):
            check_output_dir(config.output_dir, resume=resume)  # also before models load: that takes minutes
    train, heldout = _datasets(config, data, eval_data, aloud=alone_or_first)
    with loading(config.student):
        student = Student.load(config, tokenizer=tokenizer)
    train, heldout = (
        _limited(part, name, student, config, aloud=alone_or_first)
        for part, name in ((train, "training"), (heldout, "held-out"))
    )
    _check_batches(config, method, len(train))
    check_optimizer(config, student.device)
    with _engine(student, config):
        return _distill(student, train, heldout, config, method, resume=resume)


@contextmanager
def _engine(student: Student, config: GADConfig) -> Iterator[None]:
    """Let the student sample with the engine that the configuration asks for; nothing of it is left at the end, whatever that is."""
    if config.sampler != "vllm":
        yield
        return
    with VLLMSampler(config, student=student) as student.sampler:
        yield


def _distill(student: Student, train: Any, heldout: Any, config: GADConfig, method: str, *, resume: bool) -> Path:
    """Play this process's part of the run: process 0's, which writes, or another's, which follows."""
    with loading(config.discriminator_model or config.student):
        discriminator = Discriminator.load(config, student) if method == "gad" else None
    if parallel.world().rank > 0:
        return _follow(State(student, discriminator), train, heldout, config, method, resume=resume)
    details = {
        "method": method,
        "models": {name: _revision(name) for name in (config.student, config.discriminator_model) if name},
        "processes": parallel.world().size,  # the batch of a step is theirs together
        "train_rows": len(train),
        "heldout_rows": len(heldout),
        "data": _fingerprint(train),
        "heldout_data": _fingerprint(heldout),  # the game's curves are measured on it
    }
    with lock(config.output_dir):
        run = RunDirectory(config.output_dir, config, details, resume=resume)
        run.write_trained_on(train["prompt"])
        state = run.resume(student, discriminator)
        parallel.wait()  # the others read the checkpoint that this process goes on from
        stopped = _train(run, state, _play(state, train, heldout, config, method), config, len(train))
        _leave(run, state, train, heldout, config, method, stopped=bool(stopped))
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


def _leave(
    run: RunDirectory, state: State, train: Any, heldout: Any, config: GADConfig, method: str, *, stopped: bool
) -> None:
    """Write what a run leaves beside its logs and checkpoints: the players' folders, what was measured, the report."""
    student, discriminator = state.student, state.discriminator
    assert student is not None
    with run.writing("student"):
        save_student(student, run.folder / "student", config, method)
    if discriminator is not None:
        with run.writing("discriminator"):
            save_discriminator(discriminator, run.folder / "discriminator")
    findings, evaluation = _measure(state, train, heldout, config, stopped=stopped)
    if discriminator is not None:
        run.write_audit(findings)
    if evaluation:
        run.write_evaluation(*evaluation)
    with run.writing("report.html"):
        write_report(run.folder)


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
                say(f"stopped at step {metrics['step']} of {metrics['phase']}; go on with --resume")
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
                say(words)
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


def _revision(name: str) -> str:
    """Return what is loaded under a model's name: the hub's commit (its snapshots are called so), or the folder's name."""
    return name if name in TOY_SIZES else hub.resolve(name, progress=False).name


def _fingerprint(dataset: Any) -> str:
    """Return a SHA-256 of the rows, in order."""
    digest = hashlib.sha256()
    for prompt, completion in zip(dataset["prompt"], dataset["completion"], strict=True):
        digest.update(to_json([prompt_key(prompt), completion]))
    return digest.hexdigest()


def _datasets(config: GADConfig, data: Any, eval_data: Any, *, aloud: bool) -> tuple[Any, Any]:
    dataset, report = load_pairs(data)
    if aloud:
        print(visible("\n".join(report.lines())), file=sys.stderr)
    if eval_data is None:
        return split_by_prompt(dataset, config.eval_fraction, config.seed)
    heldout, report = load_pairs(eval_data)
    if aloud:
        print(visible("\n".join(report.lines())), file=sys.stderr)
    check_disjoint(dataset, heldout)
    return dataset, heldout


def _limited(dataset: Any, name: str, student: Student, config: GADConfig, *, aloud: bool) -> Any:
    def encoded(prompt: Any) -> list[int]:
        return encode_prompt(student.tokenizer, prompt)

    limited, count = limit_prompts(dataset, encoded, config.max_prompt_length, config.overlong_prompts)
    if count and aloud:
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
                    say(f"audit before the game, {finding.check}: {finding.value:.2f} ({finding.words})")
        yield from gad(student, discriminator, train, config, heldout, state)
