"""A run directory that can be read without this library: config.json, metrics.jsonl, samples.jsonl, student/, report.html."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import minigad
from minigad.chat import encode_prompt, prompt_text
from minigad.config import GADConfig, UserError
from minigad.data import check_disjoint, limit_prompts, load_pairs, split_by_prompt
from minigad.discriminator import Discriminator
from minigad.evaluate import evaluate
from minigad.report import write_report
from minigad.student import Student
from minigad.train import Metrics, gad, seqkd, soda, warmup

__all__ = ["RunDirectory", "distill", "phase_steps", "progress", "read_metrics", "read_run", "save_student"]


class RunDirectory:
    """Where a run writes. Metrics and samples are appended line by line, everything else is written whole or not at all."""

    def __init__(self, folder: str | Path, config: GADConfig, details: dict[str, Any]) -> None:
        """Make the folder; UserError if it already holds a run, or cannot be written."""
        self.folder = Path(folder)
        if (self.folder / "config.json").exists():
            raise UserError(
                f"output_dir {str(folder)!r} already holds a run; give another --output-dir, or move that one away"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir {str(folder)!r} cannot be made ({error.strerror}); give another --output-dir"
            ) from error
        record = {"minigad": minigad.__version__, **details, "config": dataclasses.asdict(config)}
        write_json(self.folder / "config.json", record)

    def record(self, stream: Iterable[Metrics], logging_steps: int = 1) -> Iterator[Metrics]:
        """Pass metrics through, appending every `logging_steps`-th to metrics.jsonl and its samples to samples.jsonl."""
        with (
            (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics_file,
            (self.folder / "samples.jsonl").open("a", encoding="utf-8") as samples_file,
        ):
            for metrics in stream:
                if metrics["step"] % logging_steps == 0 or metrics["step"] == 1:
                    numbers = {key: value for key, value in metrics.items() if key != "samples"}
                    metrics_file.write(json.dumps(numbers) + "\n")
                    metrics_file.flush()
                    for sample in metrics.get("samples", ()):
                        row = {
                            "phase": metrics["phase"],
                            "step": metrics["step"],
                            **sample,
                            "prompt": prompt_text(sample["prompt"]),
                        }
                        samples_file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    samples_file.flush()
                yield metrics

    def write_evaluation(self, numbers: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Write evaluation.json: what was measured on held-out prompts, and the texts it was measured on."""
        write_json(self.folder / "evaluation.json", {"metrics": numbers, "samples": samples})


def distill(config: GADConfig, data: Any, eval_data: Any = None, method: str = "gad", tokenizer: Any = None) -> Path:
    """Train a student on a teacher's text and write the whole run: metrics, samples, student, evaluation, report.

    `method` is gad, seqkd or soda. `data` and `eval_data` are what load_pairs takes; without `eval_data` a share of the prompts is
    held out. Ctrl-C ends the training early and keeps the student as it is. Returns the run's folder.
    """
    train, heldout = _datasets(config, data, eval_data)
    student = Student.load(config, tokenizer=tokenizer)
    train, heldout = (
        _limited(part, name, student, config) for part, name in ((train, "training"), (heldout, "held-out"))
    )
    _check_batches(config, method, len(train))
    run = RunDirectory(
        config.output_dir, config, {"method": method, "train_rows": len(train), "heldout_rows": len(heldout)}
    )
    stream = run.record(_play(student, train, heldout, config, method), config.logging_steps)
    finished = True
    try:
        for metrics in progress(stream, phase_steps(config, len(train))):
            if config.save_steps and metrics["phase"] == "gad" and metrics["step"] % config.save_steps == 0:
                save_student(student, run.folder / f"checkpoint-{metrics['step']}", config, method)
    except KeyboardInterrupt:
        finished = False
        print("minigad: stopped; keeping the student as it is now", file=sys.stderr)
    save_student(student, run.folder / "student", config, method)
    if finished:
        run.write_evaluation(*evaluate(student, heldout, config, seed=config.seed))
    write_report(run.folder)
    return run.folder


def _datasets(config: GADConfig, data: Any, eval_data: Any) -> tuple[Any, Any]:
    dataset, report = load_pairs(data)
    print("\n".join(report.lines()), file=sys.stderr)
    if eval_data is None:
        return split_by_prompt(dataset, config.eval_fraction, config.seed)
    heldout, report = load_pairs(eval_data)
    print("\n".join(report.lines()), file=sys.stderr)
    check_disjoint(dataset, heldout)
    return dataset, heldout


def _limited(dataset: Any, name: str, student: Student, config: GADConfig) -> Any:
    def encoded(prompt: Any) -> list[int]:
        return encode_prompt(student.tokenizer, prompt)

    limited, count = limit_prompts(dataset, encoded, config.max_prompt_length, config.overlong_prompts)
    if count:
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
    for field, size in sizes.items():
        if size > num_rows:
            raise UserError(
                f"config field {field!r} is {size} but only {num_rows} training rows are there; "
                f"set --{field.replace('_', '-')} to {num_rows} or less, or give more data"
            )


def phase_steps(config: GADConfig, num_rows: int) -> dict[str, int]:
    """Return the number of steps of each phase, for a progress bar."""

    def steps(epochs: float) -> int:
        return round(epochs * num_rows / config.warmup_batch_size)

    return {
        "warmup": steps(config.warmup_epochs),
        "seqkd": steps(config.seqkd_epochs),
        "dpo": steps(config.dpo_epochs),
        "discriminator_sft": steps(config.discriminator_sft_epochs),
        "discriminator_warmup": config.discriminator_warmup_steps,
        "gad": config.max_steps,
    }


def _play(student: Student, train: Any, heldout: Any, config: GADConfig, method: str) -> Iterator[Metrics]:
    if method == "seqkd":
        yield from seqkd(student, train, config)
    elif method == "soda":
        yield from soda(student, train, config)
    else:
        assert method == "gad", method
        discriminator = Discriminator.load(config, student)
        yield from warmup(student, discriminator, train, config)
        yield from gad(student, discriminator, train, config, heldout)


def save_student(student: Student, folder: Path, config: GADConfig, method: str) -> None:
    """Write a student's folder with a model card that says what it is and what it is not."""
    student.save_pretrained(folder)
    peft = student.adapter is not None
    card = f"""---
library_name: {"peft" if peft else "transformers"}
tags: [distillation, generative-adversarial-distillation, minigad]
---
# A student distilled with minigad

{"A LoRA adapter" if peft else "All weights"} of `{config.student}`, trained by `{method}` on a teacher's text alone
(discriminator: `{config.discriminator}`, {config.max_steps} steps, seed {config.seed}). Generative Adversarial Distillation: arXiv 2511.10643.

It imitates its teacher's manner on prompts like those it was trained on. Its answers are not checked for truth or safety.
The numbers that were measured are in `evaluation.json` of the run that made it.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file and rename it: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def read_metrics(folder: str | Path) -> list[Metrics]:
    """Read metrics.jsonl; a last line that a killed run left torn is dropped."""
    return _read_lines(Path(folder) / "metrics.jsonl")


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return {"config", "metrics", "samples", "evaluation"} of a run; UserError if the folder holds none."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"folder {str(folder)!r} holds no run (no config.json); give the --output-dir of one")
    evaluation = folder / "evaluation.json"
    return {
        "config": json.loads((folder / "config.json").read_text(encoding="utf-8")),
        "metrics": read_metrics(folder),
        "samples": _read_lines(folder / "samples.jsonl"),
        "evaluation": json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else None,
    }


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    complete = lines[:-1]  # text after the last newline was never finished
    return [json.loads(line) for line in complete if line]


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
