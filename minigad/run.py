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
from minigad.chat import prompt_text
from minigad.config import GADConfig, UserError
from minigad.train import Metrics

__all__ = ["RunDirectory", "progress", "read_metrics", "read_run"]


class RunDirectory:
    """Where a run writes. Metrics and samples are appended line by line, everything else is written whole or not at all."""

    def __init__(self, folder: str | Path, config: GADConfig, details: dict[str, Any]) -> None:
        """Make the folder; UserError if it already holds a run, or cannot be written."""
        self.folder = Path(folder)
        if (self.folder / "config.json").exists():
            raise UserError(f"output_dir {str(folder)!r} already holds a run; give another --output-dir, or move that one away")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {str(folder)!r} cannot be made ({error.strerror}); give another --output-dir") from error
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
                        row = {"phase": metrics["phase"], "step": metrics["step"], **sample, "prompt": prompt_text(sample["prompt"])}
                        samples_file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    samples_file.flush()
                yield metrics

    def write_evaluation(self, numbers: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Write evaluation.json: what was measured on held-out prompts, and the texts it was measured on."""
        write_json(self.folder / "evaluation.json", {"metrics": numbers, "samples": samples})


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

    terminal, bar, phase, said = sys.stderr.isatty(), None, None, 0.0
    try:
        for metrics in stream:
            if metrics["phase"] != phase:
                phase, started, first = metrics["phase"], time.monotonic(), metrics["step"]
                if bar is not None:
                    bar.close()
                bar = tqdm(total=totals.get(phase), desc=phase, unit="step", file=sys.stderr, disable=not terminal, initial=first - 1)
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
    shown = [("reward", "reward", ".2f"), ("discriminator/accuracy", "D acc", ".2f"), ("tokens_per_second", "tok/s", ".0f")]
    if "reward" not in metrics:
        shown[0] = ("loss", "loss", ".3f")
    return "  ".join(f"{label} {metrics[key]:{form}}" for key, label, form in shown if key in metrics)
