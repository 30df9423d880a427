"""The bake-off's count of sampled completions is what its worlds' own code samples, with every length made short."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import tiny_folder

from minigad import hub
from minigad import student as student_module
from minigad.config import PRESETS
from minigad.data import load_pairs

LETTERS = {"warmup_epochs": 1.0, "discriminator_sft_epochs": 1.0, "max_steps": 3, "discriminator_warmup_steps": 2}
SMALL = {"warmup_batch_size": 4, "per_device_train_batch_size": 4, "num_generations": 2}


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules, which are scripts beside each other, and a count of completions by method."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import bakeoff
    import smollm2
    import toy_letters

    yield bakeoff, toy_letters, smollm2
    for name in ("bakeoff", "claims", "frontier", "results", "smollm2", "smollm2_gap", "toy_letters"):
        sys.modules.pop(name, None)


@pytest.fixture
def counted(monkeypatch):
    """What was sampled since the last measurement, by the method that was measured then."""
    counts, drawn = Counter(), [0]
    real = student_module.generate

    def generate(*args, **settings):
        rollouts = real(*args, **settings)
        drawn[0] += len(rollouts.texts)
        return rollouts

    def measure(bench, method, *rest, **more):
        counts[method] += drawn[0]
        drawn[0] = 0

    monkeypatch.setattr(student_module, "generate", generate)
    return counts, measure, drawn


def test_letters_sample_what_is_published(benchmarks, counted, monkeypatch):
    bakeoff, toy_letters, _ = benchmarks
    counts, measure, _ = counted
    monkeypatch.setitem(PRESETS, "toy", PRESETS["toy"].replace(**LETTERS, **SMALL))
    monkeypatch.setattr(toy_letters, "SIZE", 20)
    monkeypatch.setattr(toy_letters, "EQUAL_CPU_EPOCHS", 2.0)
    monkeypatch.setattr(toy_letters, "HEAD", toy_letters.HEAD | {"discriminator_warmup_steps": 4})
    monkeypatch.setattr(toy_letters, "ORPO", toy_letters.ORPO | {"epochs": 3.0})
    monkeypatch.setattr(toy_letters, "DIAL_ROUNDS", {"rounds": 2, "prompts_a_round": 12})
    monkeypatch.setattr(toy_letters.Bench, "play_rounds", _with_defaults(toy_letters))
    monkeypatch.setattr(toy_letters.Bench, "measure", measure)
    toy_letters.run_seed(0, "validation")
    toy_letters.run_rivals(0, "validation")
    assert set(counts) > {"base", "gad-sequence", "gad-implicit-small", "dial", "orpo-distill", "gad-after-soda"}
    assert counts == {method: bakeoff.completions_sampled("toy_letters", method) for method in counts}
    assert counts["gad-sequence"] != counts["gad-implicit"] > 0


def _with_defaults(toy_letters):
    """DIAL's rounds are a default value, which was bound before the test made them short."""
    real = toy_letters.Bench.play_rounds
    return lambda bench, method, **changes: real(bench, method, toy_letters.DIAL_ROUNDS, **changes)


def test_smollm2_samples_what_is_published(benchmarks, counted, monkeypatch, tmp_path):
    """On a tiny model in its place."""
    bakeoff, _, smollm2 = benchmarks
    counts, measure, _ = counted
    folder = tiny_folder(tmp_path / "tiny")
    monkeypatch.setattr(hub, "resolve", lambda name: folder)
    short = {"max_steps": 2, "discriminator_warmup_steps": 3, "max_prompt_length": 32, "max_completion_length": 4}
    config = PRESETS["smollm2-135m"].replace(**short, **SMALL)
    monkeypatch.setitem(PRESETS, "smollm2-135m", config)
    monkeypatch.setitem(smollm2.DIAL, "prompts_a_round", 12)
    monkeypatch.setattr(smollm2, "load_pairs", lambda path: (load_pairs(path)[0].select(range(24)), None))
    monkeypatch.setattr(bakeoff, "SMOLLM2_ROWS", 24)
    monkeypatch.setattr(smollm2, "heldout_nll", lambda *args: 0.0)
    monkeypatch.setattr(smollm2, "MOST_EPOCHS", 1)
    monkeypatch.setattr(smollm2.Bench, "measure", measure)
    methods = [name for name in smollm2.METHODS if name != "base"]
    list(smollm2.run_seed(0, "validation", config, methods))
    assert set(counts) == {*methods, "seqkd-best"}
    assert counts == {method: bakeoff.completions_sampled("smollm2", method) for method in counts}


def test_a_column_is_added_to_every_line(benchmarks):
    bakeoff, *_ = benchmarks
    found = bakeoff.with_sampled("smollm2", "| method | nll |\n|---|---|\n| seqkd at T 0.7 | 1 |\n| soda | 2 |")
    assert found.splitlines()[-2:] == ["| seqkd at T 0.7 | 1 | 0 |", "| soda | 2 | 400 |"]
    for world, made in (("toy_letters", bakeoff.letters_table()), ("smollm2", bakeoff.real_table())):
        assert len(bakeoff.with_sampled(world, made).splitlines()) == len(made.splitlines())
    with pytest.raises(KeyError):
        bakeoff.completions_sampled("smollm2", "a new one")
