"""The letters language: does the game beat imitation, at equal processor time, on a frontier and not at one point?

    python benchmarks/toy_letters.py --seeds 0 1 2 3 4

Every method is measured on held-out prompts at sampling temperatures 0.1 to 3, so that the curves of sharp and of blunt
students meet. Settings were chosen on validation prompts with seeds 100 and 101 (tune_letters.py). cpu_seconds holds everything a method needs: warm-up, the language model
under its discriminator, the game. One thread.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from results import Row, row, run_timed, table, write_results

from minigad import PRESETS
from minigad.discriminator import Discriminator
from minigad.model import LanguageModel
from minigad.rivals import dial, orpo
from minigad.student import Student
from minigad.toy.letters import (
    MAX_COMPLETION_LENGTH,
    letters_dataset,
    letters_metrics,
    letters_tokenizer,
    teacher_metrics,
)
from minigad.train import fit_teacher_text, gad, soda, warmup

TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
SIZE = 8000
EQUAL_CPU_EPOCHS = 110.0  # of SeqKD: the processor time of warm-up, surrogate and game together, to a few percent
SFT_WEIGHT = 0.1  # of the cross-entropy beside the policy loss in gad-implicit-sft
FAST = 3e-3  # three times the toy preset's
LATE_STEPS = 200  # of the game from saturated SeqKD, as in beyond.py, where validation prompts spoke for it
LONGER_EPOCHS = 160.0  # of SeqKD: the processor time of that start and game together, from beyond.py's seconds
# ORPO-Distill and DIAL, chosen by tune_rivals.py; epochs and rounds so that the processor time is that of the games.
ORPO: dict[str, Any] = {"epochs": 27.0, "learning_rate": 1e-2, "weight": 0.1}
DIAL: dict[str, Any] = {"discriminator": "implicit", "dpo_learning_rate": 3e-4}
DIAL_ROUNDS: dict[str, Any] = {"rounds": 6, "prompts_a_round": 1024}
# A head that judges whole texts learns more slowly than a log-ratio: more warm-up, a lower student rate.
HEAD = {
    "discriminator": "sequence",
    "learning_rate": 1e-4,
    "discriminator_learning_rate": 1e-3,
    "discriminator_warmup_steps": 300,
}


class Bench:
    """One seed. What methods share (warmed-up student, surrogate) is made once and copied, its time charged to each."""

    def __init__(
        self,
        seed: int,
        split: str,
        temperatures: Sequence[float] = TEMPERATURES,
        *,
        start_epochs: float | None = None,
        surrogate_epochs: float | None = None,
        data: Any = None,
    ) -> None:
        self.seed, self.split, self.temperatures = seed, split, temperatures
        preset = PRESETS["toy"]
        self.config = preset.replace(
            seed=seed,
            max_completion_length=MAX_COMPLETION_LENGTH,
            warmup_epochs=start_epochs or preset.warmup_epochs,
            discriminator_sft_epochs=surrogate_epochs or preset.discriminator_sft_epochs,
        )
        self.tokenizer = letters_tokenizer()
        self.data = data or letters_dataset(SIZE, seed)
        self.rows: list[Row] = []
        self.start, self.start_seconds = self._imitator(self.config.warmup_epochs, self.data)
        self.surrogate, self.surrogate_seconds = self.fit_surrogate("toy-large")

    def measure(self, method: str, student: Student, seconds: float) -> None:
        """Add a row for every temperature."""
        for temperature in self.temperatures:
            metrics = letters_metrics(
                student, self.config, self.split, temperature, samples=4 if temperature == 1.0 else 2
            )
            if temperature == 1.0:
                away = letters_metrics(student, self.config, "out-of-domain", temperature, samples=1)
                metrics["out_of_domain_validity"] = away["validity"]
            self.rows.append(row("toy-letters", method, self.seed, metrics, seconds))
        last = next(r["metrics"] for r in reversed(self.rows) if r["metrics"]["temperature"] == 1.0)
        print(
            f"seed {self.seed}  {method:32s} {seconds:4.0f} s  validity {last['validity']:.3f}  modes {last['modes']:.1f}",
            flush=True,
        )

    def imitate(self, method: str, epochs: float, data: Any = None, extra_seconds: float = 0.0) -> None:
        """SeqKD on the teacher's text, or on other text that took `extra_seconds` to make."""
        student, seconds = self._imitator(epochs, data or self.data)
        self.measure(method, student, seconds + extra_seconds)

    def play(
        self,
        method: str,
        *,
        after_soda: bool = False,
        judge: Callable[..., Discriminator] = Discriminator,
        rank: int = 0,
        extra_seconds: float = 0.0,
        **changes: Any,
    ) -> None:
        """The game from the warmed-up student, or from SODA's; the discriminator's language model starts from the surrogate.

        With a `rank` both players train a LoRA adapter of it. `extra_seconds`: what was done for this method before.
        """
        config = self.config.replace(warmup_epochs=0.0, discriminator_sft_epochs=0.0, **changes)
        name = config.discriminator_model
        model, fitted = (self.surrogate, self.surrogate_seconds) if name == "toy-large" else self.fit_surrogate(name)
        student = self._student(self.start, rank)
        seconds = run_timed(soda(student, self.data, config)) if after_soda else 0.0
        discriminator = judge(self._student(model, rank), student, config)
        seconds += run_timed(warmup(student, discriminator, self.data, config))
        seconds += run_timed(gad(student, discriminator, self.data, config))
        self.measure(method, student, self.start_seconds + fitted + extra_seconds + seconds)

    def prefer(self, method: str) -> None:
        """SODA: DPO on static pairs, from the same warmed-up student."""
        student = self._student(self.start)
        seconds = run_timed(soda(student, self.data, self.config.replace(warmup_epochs=0.0)))
        self.measure(method, student, self.start_seconds + seconds)

    def prefer_odds(self, method: str, **settings: Any) -> None:
        """ORPO-Distill, from the same warmed-up student."""
        student = self._student(self.start)
        seconds = run_timed(orpo(student, self.data, self.config, **(ORPO | settings)))
        self.measure(method, student, self.start_seconds + seconds)

    def play_rounds(self, method: str, rounds: dict[str, Any] = DIAL_ROUNDS, **changes: Any) -> None:
        """DIAL, from the same warmed-up student; a discriminator's language model starts from the surrogate."""
        config = self.config.replace(**(DIAL | changes))
        student = self._student(self.start)
        discriminator = Discriminator(self._student(self.surrogate), student, config)
        seconds = run_timed(dial(student, discriminator, self.data, config, **rounds))
        self.measure(method, student, self.start_seconds + self.surrogate_seconds + seconds)

    def surrogate_text(self) -> tuple[Any, float]:
        """Ask the surrogate for a data set of the teacher's size, for the same prompts."""
        from datasets import Dataset

        started = time.process_time()
        prompts = list(self.data["prompt"])
        texts = self._student(self.surrogate).generate(prompts, self.config, seed=self.seed, temperature=1.0).texts
        pairs = [{"prompt": p, "completion": text or "."} for p, text in zip(prompts, texts, strict=True)]
        return Dataset.from_list(pairs), time.process_time() - started

    def _student(self, like: LanguageModel, rank: int = 0) -> Student:
        if not rank:
            return Student(copy.deepcopy(like.model), self.tokenizer)
        torch.manual_seed(self.seed)
        lora = LoraConfig(r=rank, lora_alpha=32, target_modules=list(self.config.lora_target_modules))
        return Student(get_peft_model(copy.deepcopy(like.model), lora, "student"), self.tokenizer, "student")

    def _imitator(self, epochs: float, data: Any) -> tuple[Student, float]:
        student = Student.load(self.config, tokenizer=self.tokenizer)
        seconds = run_timed(
            fit_teacher_text(student, data, self.config, "warmup", epochs, self.config.warmup_learning_rate)
        )
        return student, seconds

    def fit_surrogate(self, name: str, seed: int | None = None) -> tuple[LanguageModel, float]:
        """Fit a language model of that size to the teacher's text, with this bench's seed or another; and its processor time."""
        config = self.config.replace(discriminator_model=name, seed=self.seed if seed is None else seed)
        model = Discriminator.load(config, self.start).language_model
        epochs, rate = config.discriminator_sft_epochs, config.discriminator_sft_learning_rate
        return model, run_timed(fit_teacher_text(model, self.data, config, "discriminator_sft", epochs, rate))


def run_rivals(seed: int, split: str) -> list[Row]:
    """Run the methods that came later, with one seed."""
    bench = Bench(seed, split)
    bench.prefer_odds("orpo-distill")
    bench.play_rounds("dial")
    bench.play("gad-after-soda", discriminator="implicit", after_soda=True)
    return bench.rows


def run_fast(seed: int, split: str) -> list[Row]:
    """Run the log-ratio discriminator with the student's rate that beyond.py found better on validation prompts, with one seed."""
    bench = Bench(seed, split)
    bench.play("gad-implicit-fast", discriminator="implicit", learning_rate=FAST)
    return bench.rows


def run_late(seed: int, split: str) -> list[Row]:
    """Play from where SeqKD has little more to give, and give SeqKD the time that this takes, with one seed."""
    bench = Bench(seed, split, start_epochs=EQUAL_CPU_EPOCHS)
    bench.play("gad-after-seqkd", discriminator="implicit", max_steps=LATE_STEPS)
    bench.imitate("seqkd-longer", LONGER_EPOCHS)
    return bench.rows


def run_seed(seed: int, split: str) -> list[Row]:
    """Run every method but those of run_rivals, run_fast and run_late with one seed."""
    bench = Bench(seed, split)
    bench.rows.append(row("toy-letters", "teacher", seed, teacher_metrics(split), 0.0))
    bench.measure("base", Student.load(bench.config, tokenizer=bench.tokenizer), 0.0)
    bench.measure("seqkd", bench.start, bench.start_seconds)
    bench.imitate("seqkd-equal-cpu", EQUAL_CPU_EPOCHS)
    bench.prefer("soda")
    bench.play("gad-implicit", discriminator="implicit")
    bench.play("gad-implicit-sft", discriminator="implicit", sft_weight=SFT_WEIGHT)
    bench.play("frozen-implicit", discriminator="implicit", freeze_discriminator=True)
    bench.play("gad-implicit-small", discriminator="implicit", discriminator_model="toy")
    bench.play("gad-sequence", **HEAD)
    bench.play("gad-prefix", **(HEAD | {"discriminator": "prefix"}))
    bench.play("frozen-sequence", freeze_discriminator=True, **HEAD)
    bench.imitate("seqkd-on-surrogate", EQUAL_CPU_EPOCHS / 2, *bench.surrogate_text())
    cheat = letters_dataset(SIZE, seed, styles=(2, 3))  # the two orders that this student can learn
    bench.imitate("seqkd-cheating", EQUAL_CPU_EPOCHS / 2, cheat)
    return bench.rows


def main() -> None:
    """Run the seeds that were asked for, and merge them into benchmarks/results/toy_letters.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--split", choices=["validation", "heldout"], default="heldout")
    parser.add_argument(
        "--part", choices=["all", "rivals", "fast", "late"], default="all", help="all, or only what came later"
    )
    parser.add_argument("--name", default="toy_letters", help="of the results file; parts of a run may go to several")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for seed in args.seeds:
        rows += run_seed(seed, args.split) if args.part == "all" else []
        rows += run_rivals(seed, args.split) if args.part in ("all", "rivals") else []
        rows += run_fast(seed, args.split) if args.part in ("all", "fast") else []
        rows += run_late(seed, args.split) if args.part in ("all", "late") else []
        command = f"python benchmarks/toy_letters.py --split {args.split} --seeds {' '.join(map(str, args.seeds))}"
        write_results(args.name, command, rows, dataclasses.asdict(PRESETS["toy"]))
    print(table(rows, ["validity", "kl_student_teacher", "kl_teacher_student", "entropy", "modes", "cpu_seconds"], 1.0))


if __name__ == "__main__":
    main()
