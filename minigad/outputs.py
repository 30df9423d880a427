"""Completions in the forms of other harnesses: AlpacaEval's JSON, and lm-evaluation-harness's task and sample files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigad.checkpoint import write_json
from minigad.config import UserError
from minigad.data import write_jsonl
from minigad.sources import object_of, read_rows, short

__all__ = ["check_outputs", "read_outputs", "write_alpaca_eval", "write_harness_task"]

TASK = """# For EleutherAI's lm-evaluation-harness: lm-eval run --include_path THIS_FOLDER --tasks {name} --log_samples ...
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: completion
generation_kwargs:
  do_sample: false
  until: []
  max_gen_toks: {tokens}
metric_list:
  - metric: chrf
    aggregation: chrf
    higher_is_better: true
metadata:
  version: 1.0
"""


def check_outputs(file: str | None, folder: str | None) -> None:
    """Raise UserError if AlpacaEval's file or the harness's folder could not be written: before any work for them."""
    for path in (file, folder):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: there is no folder {str(Path(path).parent)!r}; make it first")
    if file is not None and (Path(file).suffix != ".json" or Path(file).is_dir()):
        raise UserError(f"cannot write {file!r} for AlpacaEval, which reads JSON; name a .json file")
    name = "task" if folder is None else folder and Path(folder).absolute().name
    if not re.fullmatch(r"[\w-]+", name) or (folder and Path(folder).is_file()):
        raise UserError(
            f"{folder!r}: this cannot be the folder of a task; name one with letters, digits, _ and - alone"
        )


def write_alpaca_eval(
    path: str | os.PathLike[str], prompts: Sequence[str], texts: Sequence[str], generator: str, dataset: str
) -> None:
    """Write what `alpaca_eval --model_outputs` reads: a JSON list of {instruction, output, generator, dataset}."""
    rows = zip(prompts, texts, strict=True)
    check_outputs(os.fspath(path), None)
    write_json(
        Path(path),
        [{"instruction": p, "output": text, "generator": generator, "dataset": dataset} for p, text in rows],
    )


def write_harness_task(
    folder: str | os.PathLike[str], prompts: Sequence[str], completions: Sequence[str], max_tokens: int
) -> str:
    """Write a task of lm-evaluation-harness (0.4) into a folder, NAME.yaml and NAME.jsonl, and return NAME, minigad_FOLDER.

    The harness then samples any student greedily on these prompts and scores it by chrF against `completions`, the
    teacher's (empty where there are none). Prompts are single texts: with --apply_chat_template each is one user message.
    """
    check_outputs(None, os.fspath(folder))
    path = Path(folder).absolute()
    path.mkdir(exist_ok=True)
    name = f"minigad_{path.name}"
    rows = zip(prompts, completions, strict=True)
    write_jsonl(path / f"{name}.jsonl", [{"prompt": prompt, "completion": text} for prompt, text in rows])
    (path / f"{name}.yaml").write_text(
        TASK.format(name=name, file=json.dumps(str(path / f"{name}.jsonl")), tokens=max_tokens), encoding="utf-8"
    )
    return name


def read_outputs(path: str | os.PathLike[str]) -> tuple[str, dict[str, str]]:
    """Return (who wrote them, {prompt: completion}) of a file of outputs.

    .json: AlpacaEval's list with `instruction`, `output` and `generator`. .jsonl: the samples that lm-evaluation-harness
    writes with --log_samples (`arguments`, `filtered_resps`), of one task that generates. Raises UserError for anything else.
    """
    outputs: dict[str, str] = {}
    who = Path(path).stem
    for where, row in read_rows(Path(path)):
        read = _alpaca_row if "instruction" in object_of(where, row) else _harness_row
        prompt, text, who = read(where, row, who)
        if outputs.setdefault(prompt, text) != text:
            raise UserError(f"{where}: the prompt {short(prompt)} has two different outputs; keep one")
    if not outputs:
        raise UserError(f"{path}: there are no outputs in it; give at least one")
    return who, outputs


def _alpaca_row(where: str, row: dict[str, Any], who: str) -> tuple[str, str, str]:
    for field in ("instruction", "output"):
        if not isinstance(row.get(field), str):
            raise UserError(
                f"{where}: field {field!r} is {short(row.get(field))}; make it a text, as AlpacaEval has it"
            )
    generator = row.get("generator", who)
    if not isinstance(generator, str):
        raise UserError(f"{where}: field 'generator' is {short(generator)}; make it the name of the model")
    return row["instruction"], row["output"], generator


def _harness_row(where: str, row: dict[str, Any], who: str) -> tuple[str, str, str]:
    doc, replies = row.get("doc"), row.get("filtered_resps")
    prompt = doc.get("prompt") if isinstance(doc, dict) else None
    text = replies[0] if isinstance(replies, list) and replies else None
    if not isinstance(prompt, str) or not isinstance(text, str):
        raise UserError(
            f"{where}: the row is {short(row)}; give AlpacaEval's 'instruction' and 'output', or the samples of a task "
            "that `minigad evaluate --lm-eval` wrote ('doc' with its 'prompt', 'filtered_resps' with one text)"
        )
    return prompt, text, who
