"""Runs that go wrong say so: values that are not finite, alarms, the curve reader, the audit of shortcuts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minigad import audit as audit_module
from minigad import diagnose as d
from minigad import run as run_module
from minigad import step as step_module
from minigad import train
from minigad.audit import audit
from minigad.config import PRESETS, UserError
from minigad.diagnose import ALARMS, WINDOW, alarms, diagnose
from minigad.discriminator import Discriminator
from minigad.run import distill
from minigad.run_directory import RunDirectory
from minigad.student import Student
from minigad.toy.letters import letters_dataset, letters_tokenizer
from minigad.train import discriminator_step

ROOT = Path(__file__).parent.parent
CONFIG = PRESETS["toy"].replace(
    max_completion_length=10,
    warmup_epochs=0.25,
    warmup_batch_size=16,
    discriminator_sft_epochs=0.25,
    discriminator_warmup_steps=1,
    max_steps=3,
    per_device_train_batch_size=4,
    num_generations=2,
    save_steps=1,
)


@pytest.fixture(scope="module")
def rows():
    data = letters_dataset(144, 0)
    return [{"prompt": p, "completion": c} for p, c in zip(data["prompt"], data["completion"], strict=True)]


def play(folder, rows, method="gad", **changes):
    return distill(
        CONFIG.replace(output_dir=str(folder), **changes), rows[:128], rows[128:], method, letters_tokenizer()
    )


# --- not finite ---


@pytest.mark.parametrize(
    ("method", "phase", "what"),
    [
        ("gad", "warmup", "gradient"),
        ("gad", "discriminator_sft", "weight"),
        ("gad", "discriminator_warmup", "gradient"),
        ("gad", "gad", "gradient"),
        ("gad", "gad", "weight"),
        ("gad", "gad", "loss"),
        ("seqkd", "seqkd", "loss"),
        ("soda", "dpo", "gradient"),
    ],
)
def test_a_value_that_is_not_finite_stops_the_run_with_all_that_is_needed(
    method, phase, what, rows, tmp_path, monkeypatch
):
    """The step, the tensor, the batch and the last good checkpoint are named; the step is not written anywhere."""
    update, calls = step_module.apply_gradients, []

    def poisoned(model, optimizer, parameters, config):
        calls.append(phase_of(tmp_path))
        if calls[-1] == phase and what == "gradient":
            parameters[2].grad[0] = math.nan
        metrics = update(model, optimizer, parameters, config)
        if calls[-1] == phase and what != "loss":
            with torch.no_grad():
                parameters[2][0] = math.inf
        return metrics | ({"loss": math.nan} if calls[-1] == phase and what == "loss" else {})

    started = []
    count_steps = run_module.State._count

    def counted(self, name, start, num_steps):
        for step in count_steps(self, name, start, num_steps):
            started.append(name)
            yield step

    def phase_of(folder):
        return started[-1]

    monkeypatch.setattr(run_module.State, "_count", counted)
    for module in (step_module, train):  # the loops of train.py call it by its own name there
        monkeypatch.setattr(module, "apply_gradients", poisoned)
    with pytest.raises(FloatingPointError) as error:
        play(tmp_path / "run", rows, method)
    said = str(error.value)
    assert f"step 1 of {phase}" in said
    assert what in said
    dump = tmp_path / "run" / f"not-finite-{phase}-1.json"
    assert str(dump) in said
    first = phase in ("warmup", "seqkd")
    assert ("there is no checkpoint yet" in said) == first
    assert first or "is the last good checkpoint" in said
    batch = json.loads(dump.read_text())
    assert len(batch["rows"]) == {"warmup": 16, "seqkd": 16, "discriminator_sft": 16, "dpo": 32}.get(phase, 8)
    assert all(set(row) == {"prompt_ids", "completion_ids", "text"} for row in batch["rows"])
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text() if not first else ""
    assert "NaN" not in metrics and "Infinity" not in metrics
    assert started[-1] == phase


# --- alarms ---

HEALTHY = {
    "phase": "gad",
    "reward": 0.0,
    "discriminator/accuracy": 0.6,
    "discriminator/accuracy_eval": 0.6,
    "discriminator/identical_text_gap": 1e-7,
    "discriminator/length_corr": 0.1,
    "completions/mean_length": 10.0,
    "completions/clipped_ratio": 0.0,
    "entropy": 1.0,
    "frac_reward_zero_std": 0.0,
    "kl": 0.1,
    "nll_eval": 1.0,
}
SICK = {
    "discriminator saturated": {"discriminator/accuracy": 0.99, "discriminator/accuracy_eval": 0.99},
    "discriminator overfitted": {"discriminator/accuracy": 0.9},
    "identical text": {"discriminator/identical_text_gap": 0.01},
    "reward hacking": {"reward": 2.0, "nll_eval": 2.0},
    "length drift": {"completions/mean_length": 15.0},
    "length decides": {"discriminator/length_corr": -0.9},
    "entropy collapse": {"entropy": 0.1},
    "groups tied": {"frac_reward_zero_std": 0.8},
    "far from the start": {"kl": 2.0},
}


def game(changes: dict, steps: int = WINDOW) -> list[dict]:
    return [{**HEALTHY, **changes, "step": i + 1} for i in range(steps)]


def test_every_alarm_has_a_game_that_sets_it_off_alone():
    assert SICK.keys() == ALARMS.keys()
    assert alarms(game({}), game({})) == []
    for name, changes in SICK.items():
        (alarm,) = alarms(game({}), game(changes))
        assert alarm.name == name
        assert len(alarm.words) > 80
    assert alarms(game({}, WINDOW - 1), game(SICK["groups tied"], WINDOW - 1)) == []  # too early to tell
    (alarm,) = alarms(game({}), game({"discriminator/accuracy": 0.2, "discriminator/accuracy_eval": 0.2}))
    assert alarm.name == "reward hacking"
    bare = [{"phase": "gad", "step": 1, "reward": 0.0}] * WINDOW
    assert alarms(bare, bare) == []  # what was not measured cannot be alarming


# alarm, limit, side of it that is alarming (1: above), steps whose measure lies at x
EDGES = [
    (
        "discriminator saturated",
        d.SATURATED,
        1,
        lambda x: {"discriminator/accuracy": x, "discriminator/accuracy_eval": x},
    ),
    ("discriminator overfitted", d.OVERFITTED, 1, lambda x: {"discriminator/accuracy": 0.6 + x}),
    ("identical text", d.IDENTICAL_GAP, 1, lambda x: {"discriminator/identical_text_gap": x}),
    ("reward hacking", d.HACKED_NLL, 1, lambda x: {"reward": 2.0, "nll_eval": 1.0 + x}),
    ("reward hacking", 0.0, 1, lambda x: {"reward": x, "nll_eval": 2.0}),  # worse, but is anybody rewarded for it?
    ("reward hacking", d.OUTSCORED, -1, lambda x: {"discriminator/accuracy": x, "discriminator/accuracy_eval": x}),
    ("length drift", d.LENGTH_DRIFT, 1, lambda x: {"completions/mean_length": 10.0 * x}),
    ("length drift", d.LENGTH_DRIFT, 1, lambda x: {"completions/mean_length": 10.0 / x}),
    ("length decides", d.LENGTH_CORRELATION, 1, lambda x: {"discriminator/length_corr": x}),
    ("length decides", -d.LENGTH_CORRELATION, -1, lambda x: {"discriminator/length_corr": x}),
    ("entropy collapse", d.ENTROPY_LEFT, -1, lambda x: {"entropy": x}),
    ("groups tied", d.TIED, 1, lambda x: {"frac_reward_zero_std": x}),
    ("far from the start", d.KL_LIMIT, 1, lambda x: {"kl": x}),
]


@pytest.mark.parametrize(("name", "limit", "side", "at"), EDGES)
def test_every_alarm_is_silent_just_within_its_limit_and_speaks_just_beyond(name, limit, side, at):
    assert {edge[0] for edge in EDGES} == ALARMS.keys()
    assert alarms(game({}), game(at(limit - side * 1e-7))) == []
    assert [alarm.name for alarm in alarms(game({}), game(at(limit + side * 1e-7)))] == [name]


@pytest.mark.parametrize("name", SICK)
def test_every_alarm_can_stop_a_run(name, tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG, {})
    stream = [{**step, "step": i + 1} for i, step in enumerate(game({}) + game(SICK[name]))]
    with pytest.raises(UserError, match=f"stopped by an alarm, {name}, step "):
        list(run_module._watched(iter(stream), run, "stop"))


def test_measured_games_are_told_apart():
    """Of benchmarks/health.py's games the healthy set off nothing, idle ones length at most, and every sick one its own alarm."""
    record = json.loads((ROOT / "benchmarks" / "results" / "health.json").read_text())
    spoken: dict[str, list[set[str]]] = {}
    for row in record["rows"]:
        windows = row["metrics"]["windows"]
        found = {a.name for w in windows for a in alarms([windows[0]] * WINDOW, [w] * WINDOW)}
        spoken.setdefault(row["method"], []).append(found)
    assert {len(games) for games in spoken.values()} == {2}, "two seeds of each"
    assert not any(spoken["gad-implicit"])
    assert all(
        found <= {"length decides"} for name in ("gad-sequence", "no-discriminator-warmup") for found in spoken[name]
    )
    own = {
        "frozen-sequence": "reward hacking",
        "fast-student": "far from the start",
        "end-token-leak": "discriminator saturated",
    }
    assert all(alarm in found for name, alarm in own.items() for found in spoken[name])


def test_an_alarm_is_said_once_or_stops_the_run(tmp_path, capsys):
    run = RunDirectory(tmp_path / "run", CONFIG, {})
    stream = game({}) + [{**step, "step": step["step"] + WINDOW} for step in game(SICK["groups tied"], 3 * WINDOW)]
    assert len(list(run_module._watched(iter(stream), run, "warn"))) == 4 * WINDOW
    assert capsys.readouterr().err.count("alarm, groups tied") == 1
    assert list(run_module._watched(iter(stream), run, "ignore")) == stream
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="stopped by an alarm, groups tied, step 70"):
        list(run_module._watched(iter(stream), run, "stop"))


def test_a_resumed_run_remembers_how_its_game_began(tmp_path, capsys):
    run = RunDirectory(tmp_path / "run", CONFIG, {})
    stream = [{**step, "step": i + 1} for i, step in enumerate(game({}) + game(SICK["entropy collapse"]))]
    list(run.record(iter(stream[:80])))
    list(run_module._watched(iter(stream[80:]), run, "warn"))
    assert "entropy fell from 1.00 to 0.280" in capsys.readouterr().err


def test_the_curve_reader_speaks_of_what_is_there():
    assert diagnose([]) == ["No metrics: nothing was trained, or metrics.jsonl is missing."]
    warmup = [{"phase": "warmup", "step": i + 1, "loss": 2.0 - i / 50} for i in range(50)]
    flat = [{"phase": "warmup", "step": i + 1, "loss": 2.0} for i in range(50)]
    assert any("loss of warmup was still falling" in line for line in diagnose(warmup))
    assert not any("still falling" in line for line in diagnose(flat))
    assert "3 logged steps of the game are too few" in " ".join(diagnose(game({}, 3)))
    assert "No alarm in 60 steps" in " ".join(diagnose(game({}, 60)))
    sick = [{**step, "step": i + 1} for i, step in enumerate(game({}, 60) + game(SICK["length drift"], 60))]
    lines = [line for line in diagnose(sick) if line.startswith("ALARM")]
    assert len(lines) == 1
    assert lines[0].startswith("ALARM, length drift, from step 100: completions went from 10.0 to 14.0 tokens")
    judged = diagnose(flat, {"metrics": {"honest_auc": 0.8, "honest_auc_low": 0.7}})
    assert "a fresh classifier tells it from the teacher (honest AUC 0.80" in judged[-1]


# --- the audit ---


def trained(rows, mark=lambda text: text):
    """A discriminator that was trained until it tells marked text from the start's, and all that an audit takes."""
    from datasets import Dataset

    config = CONFIG.replace(discriminator="sequence", max_completion_length=16, discriminator_model="toy")
    student = Student.load(config, tokenizer=letters_tokenizer())
    list(train.seqkd(student, Dataset.from_list(rows), config.replace(seqkd_epochs=12.0, seqkd_learning_rate=1e-2)))
    data = Dataset.from_list([{**row, "completion": mark(row["completion"])} for row in rows])
    judge = Discriminator.load(config, student)
    judge.language_model.copy_from(student)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    for step in range(24):
        batch = data[step * 8 % 128 : step * 8 % 128 + 8]
        rollouts = student.generate(batch["prompt"], config, seed=step, num_generations=2)
        discriminator_step(judge, optimizer, rollouts, batch["completion"])
    return {f.check: f for f in audit(judge, student, data, data.select(range(128, 144)), config)}


def test_the_audit_finds_planted_shortcuts_and_only_those(rows):
    honest = trained(rows)
    assert honest["identical text"].value < 1e-4
    assert honest["identical text"].ok
    for name in ("probe: first token only", "probe: format only", "edit: a trailing space"):
        assert honest[name].ok, (name, honest[name].value)
    marked = trained(rows, lambda text: "," + text)
    assert not marked["probe: first token only"].ok
    assert not marked["probe: format only"].ok
    longer = trained(rows, lambda text: text + "!!!!")
    assert longer["probe: length only"].value > honest["probe: length only"].value + 0.1


def test_the_audit_finds_text_that_comes_in_two_forms(rows, monkeypatch):
    """If one side's text gains a character on its way, one text has two scores."""
    plain = audit_module.decode
    monkeypatch.setattr(audit_module, "decode", lambda *args: (plain(*args)[0] + "!", True))
    assert not trained(rows)["identical text"].ok


def test_the_audit_changes_nothing_and_asks_for_enough_rows(rows):
    from datasets import Dataset

    data = Dataset.from_list(rows[:40])
    config = CONFIG.replace(discriminator="implicit")
    student = Student.load(config, tokenizer=letters_tokenizer())
    judge = Discriminator.load(config, student)
    before = [p.detach().clone() for p in [*student.parameters().values(), *judge.parameters()]]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    findings = audit(judge, student, data, data, config)
    assert torch.equal(torch.rand(1), expected)
    assert len(findings) == 16
    assert all(math.isfinite(finding.value) and finding.words for finding in findings)
    after = [*student.parameters().values(), *judge.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert audit(judge, student, data, data.select(range(7)), config) == []
