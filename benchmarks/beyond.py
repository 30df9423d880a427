"""What the paper did not try, in the letters language: replay, ensembles, a gradient penalty, LoRA, warm starts, more steps.

    python benchmarks/beyond.py --seeds 200 201 202

Like variants.py: one change at a time from `base` (the log-ratio discriminator, 200 steps), on *validation* prompts, since presets are
chosen from it. `from SeqKD to saturation` also measures its start, imitation with the processor time of the toy preset's game.
"""

from __future__ import annotations

import argparse
import functools
import random
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from results import Row, write_results
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy_letters import EQUAL_CPU_EPOCHS, SIZE, Bench
from variants import IMPLICIT, STEPS, TEMPERATURES, CrossEntropy

from minigad.chat import Row as TextRow
from minigad.config import GADConfig
from minigad.discriminator import Discriminator, Scores
from minigad.model import LanguageModel
from minigad.student import Student
from minigad.toy.letters import LettersTeacher, letters_prompts

BASE: dict[str, Any] = IMPLICIT | {"max_steps": STEPS}


class Replay(Discriminator):
    """Also learns on the batch of some earlier step, drawn evenly: half the loss each."""

    def __init__(self, language_model: LanguageModel, student: Student, config: GADConfig) -> None:
        super().__init__(language_model, student, config)
        self.past: list[Sequence[TextRow]] = []
        self.random = random.Random(config.seed)

    def score(self, rows: Sequence[TextRow]) -> Scores:
        """Score rows and, in training, those of an earlier step beside them."""
        if torch.is_grad_enabled():
            self.past.append(rows)
            self.again = super().score(self.random.choice(self.past))
        return super().score(rows)

    def loss(self, teacher: Scores, student: Scores) -> Tensor:
        """The mean of the losses on this step's texts and on the earlier step's."""
        now, num = super().loss(teacher, student), len(student.scores) // len(teacher.scores)
        if not torch.is_grad_enabled():
            return now
        then = len(self.again.scores) // (num + 1)
        return (now + super().loss(self.again.take(slice(0, then)), self.again.take(slice(then, None)))) / 2


class Penalised(Discriminator):
    """Adds `weight` times the squared gradient of the teacher's scores by the embeddings (R1, arXiv 1801.04406, Eq 9)."""

    def __init__(self, language_model: LanguageModel, student: Student, config: GADConfig, weight: float) -> None:
        super().__init__(language_model, student, config)
        self.weight = weight

    def score(self, rows: Sequence[TextRow]) -> Scores:
        """Score rows and, in training, keep their embeddings; by plain attention, since the fast ones cannot be differentiated twice."""
        if not torch.is_grad_enabled():
            return super().score(rows)
        self.embedded: list[Tensor] = []
        embedding = self.language_model.model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _module, _inputs, output: self.embedded.append(output))
        with sdpa_kernel(SDPBackend.MATH):
            scores = super().score(rows)
        hook.remove()
        return scores

    def loss(self, teacher: Scores, student: Scores) -> Tensor:
        """Bradley-Terry and the penalty, a mean over teacher completions."""
        plain = super().loss(teacher, student)
        if not torch.is_grad_enabled():
            return plain
        slopes = torch.autograd.grad(teacher.scores.sum(), self.embedded, create_graph=True)
        return plain + self.weight * sum(slope.pow(2).sum() for slope in slopes) / len(teacher.scores)


class Ensemble(Discriminator):
    """Several discriminators from language models fitted with other seeds: each has its loss, the reward is the mean score."""

    def __init__(
        self, language_model: LanguageModel, student: Student, config: GADConfig, others: Sequence[LanguageModel]
    ) -> None:
        super().__init__(language_model, student, config)
        self.others = [Discriminator(other, student, config) for other in others]

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the weights of all members."""
        return [*super().parameters(), *(p for other in self.others for p in other.parameters())]

    def score(self, rows: Sequence[TextRow]) -> Scores:
        """Return the mean of the members' scores; keeps each, for the loss."""
        self.each = [super().score(rows), *(other.score(rows) for other in self.others)]
        prefixes = torch.stack([one.prefix_scores for one in self.each])  # type: ignore[misc]
        scores = torch.stack([one.scores for one in self.each])
        return Scores(scores.mean(0), prefixes.mean(0), self.each[0].mask)

    def loss(self, teacher: Scores, student: Scores) -> Tensor:
        """The sum of the members' losses."""
        num = len(teacher.scores)
        losses = [super(Ensemble, self).loss(s.take(slice(0, num)), s.take(slice(num, None))) for s in self.each]
        return torch.stack(losses).sum()


class Terminal(Discriminator):
    """A log-ratio whose whole reward comes with the last token, as the paper's head gives it."""

    def score(self, rows: Sequence[TextRow]) -> Scores:
        """Score rows without what came before the end."""
        scores = super().score(rows)
        return Scores(scores.scores, None, scores.mask)


VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "replay of earlier steps": {"judge": Replay},
    "gradient penalty 0.001": {"judge": functools.partial(Penalised, weight=0.001)},
    "gradient penalty 0.1": {"judge": functools.partial(Penalised, weight=0.1)},
    "reward on the last token": {"judge": Terminal},
    "scale / 3": {"discriminator_scale": 1 / 3},
    "scale x 3": {"discriminator_scale": 3.0},
    "LoRA 2": {"rank": 2},
    "LoRA 2, rates x 3": {"rank": 2, "learning_rate": 3e-3, "discriminator_learning_rate": 1e-3},
    "LoRA 2, rates x 10": {"rank": 2, "learning_rate": 1e-2, "discriminator_learning_rate": 3e-3},
    "LoRA 16": {"rank": 16},
    "LoRA 16, rates x 3": {"rank": 16, "learning_rate": 3e-3, "discriminator_learning_rate": 1e-3},
    "LoRA 16, rates x 10": {"rank": 16, "learning_rate": 1e-2, "discriminator_learning_rate": 3e-3},
    "from SODA": {"after_soda": True},
    "400 steps": {"max_steps": 400},  # the toy preset, and what the 200-step runs say of it
    "400 steps, student rate x 3": {"max_steps": 400, "learning_rate": 3e-3},
    "400 steps, cross-entropy": {"max_steps": 400, "judge": CrossEntropy},
    "400 steps, student rate x 3, cross-entropy": {"max_steps": 400, "learning_rate": 3e-3, "judge": CrossEntropy},
    "600 steps": {"max_steps": 600},
    "64 prompts a step": {"per_device_train_batch_size": 64},
}


def _ensemble(bench: Bench) -> None:
    fitted = [bench.fit_surrogate("toy-large", seed=bench.seed + 1000 * (1 + i)) for i in range(2)]
    judge = functools.partial(Ensemble, others=[model for model, _ in fitted])
    bench.play("ensemble of 3", judge=judge, extra_seconds=sum(seconds for _, seconds in fitted), **BASE)


def _saturated(bench: Bench) -> None:
    late = Bench(bench.seed, "validation", TEMPERATURES, start_epochs=EQUAL_CPU_EPOCHS)
    late.measure("seqkd-equal-cpu", late.start, late.start_seconds)
    late.play("from SeqKD to saturation", **BASE)
    bench.rows += late.rows


def _texts_a_prompt(bench: Bench, num: int) -> None:
    """As many teacher texts as elsewhere, `num` of each prompt; elsewhere prompts are drawn with replacement."""
    rng, teacher = random.Random(bench.seed), LettersTeacher()
    prompts = rng.sample(letters_prompts("train"), SIZE // num) * num
    data = Dataset.from_dict({"prompt": prompts, "completion": [teacher.sample(prompt, rng) for prompt in prompts]})
    other = Bench(bench.seed, "validation", TEMPERATURES, data=data)
    other.measure(f"texts a prompt: {num}, start", other.start, other.start_seconds)
    other.play(f"texts a prompt: {num}", **BASE)
    bench.rows += other.rows


OTHERS: dict[str, Callable[[Bench], None]] = {
    "ensemble of 3": _ensemble,
    "texts a prompt: 1": lambda bench: _texts_a_prompt(bench, 1),
    "texts a prompt: 8": lambda bench: _texts_a_prompt(bench, 8),
    "from SeqKD to saturation": _saturated,
}


def run_seed(seed: int, methods: Sequence[str]) -> list[Row]:
    """Run methods with one seed."""
    bench = Bench(seed, "validation", TEMPERATURES)
    for name in methods:
        if name in VARIANTS:
            bench.play(name, **(BASE | VARIANTS[name]))
        else:
            OTHERS[name](bench)
    return bench.rows


def main() -> None:
    """Run the seeds that were asked for and write benchmarks/results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202])
    every = [*VARIANTS, *OTHERS]
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    parser.add_argument("--name", default="beyond", help="of the results file; parts of a run may go to several")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for seed in args.seeds:
        rows += run_seed(seed, args.methods)
        command = (
            f"python benchmarks/beyond.py --methods {shlex.join(args.methods)} --seeds {' '.join(map(str, args.seeds))}"
        )
        write_results(args.name, command, rows, {"steps": STEPS, "temperatures": TEMPERATURES})


if __name__ == "__main__":
    main()
