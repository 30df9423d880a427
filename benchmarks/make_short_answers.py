"""Make the embedded data set: SmolLM2-135M-Instruct behind a hidden conversation answers every prompt twice.

    python benchmarks/make_short_answers.py

Reads minigad/assets/short_answers/prompts.jsonl and writes train.jsonl, validation.jsonl and heldout.jsonl beside it.
The teacher is sampled at temperature 0.7 from the full distribution, so that its log-likelihood is exact.
"""

from __future__ import annotations

from pathlib import Path

import torch

from minigad import PRESETS, hub
from minigad.data import read_jsonl, write_jsonl
from minigad.model import LanguageModel
from minigad.teacher import SHORT_ANSWERS, HiddenPromptTeacher

FOLDER = Path(hub.__file__).parent / "assets" / "short_answers"
TEMPERATURE = 0.7
SAMPLES = 2
MAX_TOKENS = 96  # twice what a student may say; an answer that is longer is counted below and drawn again


def main() -> None:
    """Answer the prompts of each split and print what was made."""
    folder = hub.resolve(PRESETS["smollm2-135m"].student)
    model = LanguageModel(hub.load_model(folder, torch.bfloat16, torch.device("cpu")), hub.load_tokenizer(folder))
    teacher = HiddenPromptTeacher(model, SHORT_ANSWERS, TEMPERATURE)
    prompts = read_jsonl(FOLDER / "prompts.jsonl")
    for number, split in enumerate(("train", "validation", "heldout")):
        rows = answer(teacher, [row["prompt"] for row in prompts if row["split"] == split], seed=number)
        write_jsonl(FOLDER / f"{split}.jsonl", rows)


def answer(teacher: HiddenPromptTeacher, prompts: list[str], seed: int) -> list[dict[str, str]]:
    """Return SAMPLES rows a prompt; an answer that is cut off or blank is drawn again, and counted."""
    wanted = [prompt for prompt in prompts for _ in range(SAMPLES)]
    answers: list[str | None] = [None] * len(wanted)
    redrawn = 0
    for attempt in range(10):
        missing = [i for i, text in enumerate(answers) if text is None]
        redrawn += len(missing) if attempt else 0
        draws = teacher.sample(
            [wanted[i] for i in missing], num_samples=1, max_completion_length=MAX_TOKENS, seed=10 * seed + attempt
        )
        for i, text, finished in zip(missing, draws.texts, draws.finished, strict=True):
            answers[i] = text if finished and text.strip() else None
        if None not in answers:
            break
    rows = [{"prompt": p, "completion": text} for p, text in zip(wanted, answers, strict=True) if text is not None]
    assert len(rows) == len(wanted), f"{len(wanted) - len(rows)} prompts have no whole answer in 10 draws"
    words = [len(row["completion"].split()) for row in rows]
    print(
        f"{len(prompts)} prompts, {len(rows)} answers, {sum(words) / len(words):.1f} words on average, {redrawn} drawn again"
    )
    return rows


if __name__ == "__main__":
    main()
