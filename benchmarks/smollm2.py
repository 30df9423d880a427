"""A real model: SmolLM2-135M learns from itself behind a hidden prompt, so that the teacher's likelihood is known.

    python benchmarks/smollm2.py --seeds 0 1 2

Teacher: the same weights behind four hidden examples, sampled at exactly temperature 0.7. Its likelihood is used to
measure (divergences both ways, the best classifier possible), never to train. Every method is measured at temperature 1,
`base` and the SeqKD students also at the teacher's own: sharpening is free. No capacity gap, so say that it is prompt
distillation. Settings were fixed before the first run; the number of SeqKD epochs is chosen on the validation prompts.
cpu_seconds hold warm-up and training, not measuring. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from results import Row, row, run_timed, table, write_results

from minigad import PRESETS, hub
from minigad.config import GADConfig
from minigad.data import load_pairs
from minigad.discriminator import Discriminator
from minigad.evaluate import evaluate, heldout_nll
from minigad.metrics import Metrics
from minigad.model import LanguageModel
from minigad.rivals import dial, orpo
from minigad.student import Student
from minigad.teacher import SHORT_ANSWERS, HiddenPromptTeacher
from minigad.train import fit_teacher_text, gad, soda, warmup

DATA = Path(hub.__file__).parent / "assets" / "short_answers"
TEACHER_TEMPERATURE = 0.7
SAMPLES = 2  # completions a held-out prompt
MOST_EPOCHS = 6  # SeqKD looks for its best epoch among so many
# A log-ratio of whole texts is ~20 nats wide: times 1 / length it starts where the sigmoid is not flat.
IMPLICIT = {"discriminator": "implicit", "discriminator_scale": 0.05, "discriminator_sft_epochs": 2.0}

ORPO: dict[str, Any] = {"epochs": 1.0, "learning_rate": 2e-4}  # the rate of SeqKD
DIAL: dict[str, Any] = {"rounds": 2, "prompts_a_round": 64}  # as many samples as 16 steps of the game


class Bench:
    """One seed: a student is warmed up once, and every method starts from those weights."""

    def __init__(
        self,
        seed: int,
        split: str,
        config: GADConfig,
        *,
        train: Any = None,
        world: str = "smollm2",
        samples: int = SAMPLES,
        temperatures: tuple[float, ...] = (1.0, TEACHER_TEMPERATURE),
        game_temperatures: tuple[float, ...] = (1.0,),
    ) -> None:
        self.temperatures, self.game_temperatures = temperatures, game_temperatures
        self.seed, self.config, self.world, self.samples = seed, config.replace(seed=seed), world, samples
        own, self.validation, self.split = (
            load_pairs(DATA / f"{name}.jsonl")[0] for name in ("train", "validation", split)
        )
        self.train = own if train is None else train
        folder = hub.resolve("smollm2-135m")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base = hub.load_model(folder, torch.bfloat16, device)
        tokenizer = hub.load_tokenizer(folder)
        self.teacher = HiddenPromptTeacher(LanguageModel(base, tokenizer), SHORT_ANSWERS, TEACHER_TEMPERATURE)
        self.known: dict[
            tuple[str, str, bool], float
        ] = {}  # log p_T: the teacher's own texts come in every measurement
        self.student = Student.load(self.config)
        self.weights = _copy(self.student)  # the untrained adapter
        self.rows: list[Row] = []

    def teacher_logprob(self, prompts: Sequence[Any], texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
        """Return log p_T of completions, each asked for once."""
        asked = list(zip(prompts, texts, finished, strict=True))
        new = list(dict.fromkeys(one for one in asked if one not in self.known))
        if new:
            limit = self.config.max_completion_length
            values = self.teacher.logprob(*zip(*new, strict=True), max_completion_length=limit)
            self.known.update(zip(new, values, strict=True))
        return [self.known[one] for one in asked]

    def measure(self, method: str, seconds: float, temperatures: tuple[float, ...] = (1.0,), **more: Any) -> None:
        """Add a row for every temperature."""
        for temperature in temperatures:
            metrics, _ = evaluate(
                self.student,
                self.split,
                self.config,
                num_samples=self.samples,
                temperature=temperature,
                seed=self.seed,
                teacher_logprob=self.teacher_logprob,
            )
            self.rows.append(row(self.world, method, self.seed, metrics | more, seconds))
            shown = ("kl_student_teacher", "kl_teacher_student", "bayes_auc", "nll", "mean_length")
            numbers = "  ".join(f"{name} {metrics[name]:.3f}" for name in shown)
            print(
                f"seed {self.seed}  {method:14s} T {temperature}  {seconds:5.0f} s  {numbers}",
                file=sys.stderr,
                flush=True,
            )

    def base(self) -> None:
        """Measure the model as it came, and the teacher against itself."""
        self.measure("base", 0.0, (1.0, TEACHER_TEMPERATURE))
        found = self.rows[-1]["metrics"]
        exact = {"temperature": TEACHER_TEMPERATURE, "kl_student_teacher": 0.0, "kl_teacher_student": 0.0}
        ceiling = {"bayes_auc": 0.5, "honest_auc": found["honest_auc_ceiling"]}
        length = {"mean_length": found["teacher_mean_length"]}
        self.rows.append(row(self.world, "teacher", self.seed, exact | ceiling | length, 0.0))

    def imitate(self, epochs: int = MOST_EPOCHS, *, start_from_best: bool = False, longer: bool = False) -> None:
        """SeqKD, looked at after every epoch: the best on validation is the control, the first one each game's start.

        `start_from_best` starts the games where imitation has nothing more to give; `longer` measures the last epoch too.
        """
        config, epoch_steps = self.config, round(len(self.train) / self.config.warmup_batch_size)
        steps = fit_teacher_text(self.student, self.train, config, "warmup", epochs, config.warmup_learning_rate)
        seconds, scores, best = 0.0, [], (0, 0.0, self.weights)
        for epoch in range(1, epochs + 1):
            seconds += run_timed(itertools.islice(steps, epoch_steps))
            scores.append(heldout_nll(self.student, self.validation, config))
            if scores[-1] == min(scores):
                best = (epoch, seconds, _copy(self.student))
            if epoch == 1 and not start_from_best:
                self.weights, self.start_seconds = _copy(self.student), seconds
                self.measure("seqkd", seconds, self.temperatures)
        if longer:
            self.measure("seqkd-longer", seconds)
        _install(self.student, best[2])
        self.measure("seqkd-best", best[1], self.temperatures, epochs=best[0], validation_nll=scores)
        if start_from_best:
            self.start_seconds, self.weights = best[1:]

    def play(self, method: str, *, watch: int = 0, after_soda: bool = False, **changes: Any) -> None:
        """The game from the warmed-up student; measured at its end and, with `watch`, every so many steps before."""
        config = self.config.replace(warmup_epochs=0.0, **changes)
        self._restart()
        seconds = run_timed(soda(self.student, self.train, config)) if after_soda else 0.0
        discriminator = Discriminator.load(config, self.student)
        seconds += run_timed(warmup(self.student, discriminator, self.train, config))
        accuracies: deque[float] = deque(maxlen=8)  # the last steps': at 1 the discriminator is saturated
        steps = _noted(gad(self.student, discriminator, self.train, config), "discriminator/accuracy", accuracies)
        for done in range(watch, config.max_steps, watch) if watch else ():
            seconds += run_timed(itertools.islice(steps, watch))
            self.measure(f"{method} step {done}", self.start_seconds + seconds)
        seconds += run_timed(steps)
        last = statistics.fmean(accuracies)
        self.measure(method, self.start_seconds + seconds, self.game_temperatures, discriminator_accuracy=last)

    def prefer(self, method: str) -> None:
        """SODA: DPO on static pairs, from one epoch of SeqKD."""
        self._restart()
        seconds = run_timed(soda(self.student, self.train, self.config.replace(warmup_epochs=0.0)))
        self.measure(method, self.start_seconds + seconds, self.game_temperatures)

    def prefer_odds(self, method: str) -> None:
        """ORPO-Distill, from one epoch of SeqKD."""
        self._restart()
        seconds = run_timed(orpo(self.student, self.train, self.config, **ORPO))
        self.measure(method, self.start_seconds + seconds, self.game_temperatures)

    def play_rounds(self, method: str) -> None:
        """DIAL, from one epoch of SeqKD; the head, as the paper has it."""
        self._restart()
        discriminator = Discriminator.load(self.config, self.student)
        seconds = run_timed(dial(self.student, discriminator, self.train, self.config, **DIAL))
        self.measure(method, self.start_seconds + seconds, self.game_temperatures)

    def _restart(self) -> None:
        _install(self.student, self.weights)
        self.student.freeze_reference()


def _noted(steps: Iterator[Metrics], name: str, values: deque[float]) -> Iterator[Metrics]:
    """Pass steps through and keep a metric of them."""
    for metrics in steps:
        values.append(metrics[name])
        yield metrics


def _copy(student: Student) -> list[torch.Tensor]:
    return [p.detach().clone() for p in student.parameters().values()]


def _install(student: Student, weights: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, weight in zip(student.parameters().values(), weights, strict=True):
            parameter.copy_(weight)


METHODS: dict[str, Callable[[Bench], None]] = {
    "base": Bench.base,
    "seqkd": Bench.imitate,
    "soda": lambda bench: bench.prefer("soda"),
    "gad-sequence": lambda bench: bench.play("gad-sequence"),
    "gad-prefix": lambda bench: bench.play("gad-prefix", discriminator="prefix"),
    "frozen-sequence": lambda bench: bench.play("frozen-sequence", freeze_discriminator=True),
    "gad-implicit": lambda bench: bench.play("gad-implicit", **IMPLICIT),
    "orpo-distill": lambda bench: bench.prefer_odds("orpo-distill"),
    "dial": lambda bench: bench.play_rounds("dial"),
    "gad-after-soda": lambda bench: bench.play("gad-after-soda", after_soda=True),
}


def run_seed(
    seed: int, split: str, config: GADConfig, methods: Sequence[str], *, keep_start: bool = False
) -> Iterator[list[Row]]:
    """Run methods with one seed, and yield all rows so far after each: an hour's work is not lost to the last minute."""
    bench = Bench(seed, split, config)
    if "seqkd" not in methods:
        bench.imitate(1)  # the others' start, measured elsewhere unless it is kept
        bench.rows = [r for r in bench.rows if keep_start and r["method"] == "seqkd"]
        yield bench.rows
    for method in METHODS:
        if method in methods:
            METHODS[method](bench)
            yield bench.rows


def main() -> None:
    """Run the seeds that were asked for and write benchmarks/results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=["validation", "heldout"], default="heldout")
    parser.add_argument("--methods", choices=list(METHODS), nargs="*", default=list(METHODS))
    parser.add_argument(
        "--keep-start",
        action="store_true",
        help="without the method seqkd: keep its one epoch, the control of a run on another machine",
    )
    parser.add_argument("--name", default="smollm2", help="of the results file; parts of a run may go to several")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = PRESETS["smollm2-135m"]
    done: list[Row] = []
    part = (
        ""
        if args.methods == list(METHODS)
        else f" --methods {' '.join(args.methods)}{' --keep-start' * args.keep_start}"
    )
    command = f"python benchmarks/smollm2.py --split {args.split}{part} --seeds {' '.join(map(str, args.seeds))}"
    for seed in args.seeds:
        for rows in run_seed(seed, args.split, config, args.methods, keep_start=args.keep_start):
            write_results(args.name, command, done + rows, dataclasses.asdict(config))
        done += rows
    print(
        table(done, ["kl_student_teacher", "kl_teacher_student", "bayes_auc", "honest_auc", "nll", "cpu_seconds"], 1.0)
    )


if __name__ == "__main__":
    main()
