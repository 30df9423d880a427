"""A discriminator that was saved scores every text as it did before, of whatever kind and on whatever base."""

import json
import math

import pytest
import safetensors
import torch
from conftest import shake, tiny_config, tiny_folder, tiny_reader

from minigad import run as run_module
from minigad.checkpoint import whole_folder
from minigad.config import PRESETS, UserError
from minigad.discriminator import Discriminator
from minigad.players import load_players, save_discriminator, save_student
from minigad.reading import read_run
from minigad.run import distill
from minigad.run_directory import RunDirectory
from minigad.student import Student
from minigad.toy.letters import letters_dataset, letters_tokenizer

TOY = {"student": "toy", "lora_r": 0}
SHAPES = {
    "all weights, a copy of the toy": {**TOY, "discriminator": "sequence"},
    "all weights, a larger toy, log-ratio": {**TOY, "discriminator": "implicit", "discriminator_model": "toy-large"},
    "log-ratio to the reference": {**TOY, "discriminator": "implicit", "discriminator_against": "reference"},
    "adapters on the toy": {**TOY, "lora_r": 4, "discriminator": "prefix"},
    "adapters on one base": {"student": "{base}", "discriminator": "sequence"},
    "adapters on one base, log-ratio to the reference": {
        "student": "{base}", "discriminator": "implicit", "discriminator_against": "reference", "discriminator_scale": 0.1,
    },
    "adapters on a base of its own": {"student": "{base}", "discriminator": "prefix", "discriminator_model": "{other}"},
    "a model that reads both ways": {"student": "{base}", "discriminator_model": "{reader}"},
}  # fmt: skip
TEXTS = [("say a", "a", True), ("say b", "not b at all", False), ("say é", "", True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "base": tiny_folder(folder / "base"),
        "other": tiny_folder(folder / "other", layers=1, seed=3),
        "reader": tiny_reader(folder / "reader"),
    }


def players_of(models, shape) -> Discriminator:
    """Players whose every weight matters and differs from what a fresh load would give."""
    names = {k: v.format(**models) if isinstance(v, str) else v for k, v in shape.items()}
    config = tiny_config(**names)
    student = Student.load(config)
    discriminator = Discriminator.load(config, student)
    shake(student)
    student.freeze_reference()
    shake(student, 0.1)
    shake(discriminator.language_model, 0.2)
    if discriminator.head is not None:
        torch.nn.init.normal_(discriminator.head.weight)
    return discriminator


def scores(discriminator):
    return discriminator.scores_of(discriminator.encode(*zip(*TEXTS, strict=True))).scores


@pytest.mark.parametrize("name", SHAPES)
def test_scores_are_equal_after_saving_and_loading(name, models, tmp_path):
    before = players_of(models, SHAPES[name])
    save_student(before.student, tmp_path / "student", before.config, "gad")
    save_discriminator(before, tmp_path / "discriminator")
    assert {path.name for path in (tmp_path / "discriminator").iterdir()} == {
        "discriminator.json",
        "discriminator.safetensors",
        "manifest.json",
    }
    fresh = Student.from_pretrained(tmp_path / "student", before.config)
    after = Discriminator.from_pretrained(tmp_path / "discriminator", fresh)
    assert scores(before).abs().min() > 1e-4
    assert torch.equal(scores(before), scores(after))
    assert not torch.allclose(scores(before), scores(Discriminator.load(before.config, fresh)), atol=1e-3)


def test_a_finished_run_gives_back_the_discriminator_that_judged_its_samples(tmp_path, monkeypatch):
    """evaluation.json has scores and, of the first samples, contributions, from the players that load_players returns."""
    monkeypatch.setattr(run_module, "write_report", lambda folder: None)
    data = letters_dataset(160, 0)
    config = PRESETS["toy"].replace(
        max_completion_length=6, warmup_epochs=0.5, warmup_batch_size=16, discriminator_sft_epochs=0.25,
        discriminator_warmup_steps=2, max_steps=2, per_device_train_batch_size=4, num_generations=2, ema_decay=0.5,
        save_steps=0, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    distill(config, data.select(range(120)), data.select(range(130, 160)), tokenizer=letters_tokenizer())
    samples = read_run(tmp_path / "run")["evaluation"]["samples"]
    _, _, discriminator = load_players(tmp_path / "run")
    prompts, teacher, student = ([s[key] for s in samples] for key in ("prompt", "teacher", "student"))
    theirs = discriminator.scores_of(discriminator.encode_teacher(prompts, teacher)).scores
    ours = discriminator.scores_of(discriminator.encode(prompts, student, [s["finished"] for s in samples])).scores
    assert theirs.tolist() == [s["teacher_score"] for s in samples]
    assert ours.tolist() == [s["student_score"] for s in samples]
    assert 0 < sum("seen" in s for s in samples) < len(samples)
    assert any(len(s.get("teacher_read", s["teacher"])) < len(s["teacher"]) for s in samples)
    for sample in samples:
        for who in ("teacher", "student") if "seen" in sample else ():
            seen = sample["seen"][who]
            assert math.isclose(sum(seen["contributions"]), seen["score"], abs_tol=1e-4)
            assert math.isclose(seen["score"], sample[f"{who}_score"], abs_tol=1e-4)


def test_what_cannot_be_loaded_is_said_in_one_sentence(models, tmp_path):
    with pytest.raises(UserError, match="holds no discriminator that can be read"):
        Discriminator.from_pretrained(tmp_path, None)
    judge = players_of(models, SHAPES["adapters on one base"])
    folder = tmp_path / "discriminator"
    save_discriminator(judge, folder)
    other = Student.load(judge.config.replace(student=str(models["other"])))
    record = json.loads((folder / "discriminator.json").read_text())
    with pytest.raises(UserError, match="does not fit its models"):
        Discriminator.from_pretrained(folder, other)
    record["config"]["future_field"] = 1
    (folder / "discriminator.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="unknown config field 'future_field'"):
        Discriminator.from_pretrained(folder, judge.student)
    (folder / "discriminator.json").write_text("[]")
    with pytest.raises(UserError, match="holds no configuration"):
        Discriminator.from_pretrained(folder, judge.student)
    (folder / "discriminator.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="holds no discriminator that can be read"):
        Discriminator.from_pretrained(folder, judge.student)


@pytest.mark.parametrize("error", [Exception, safetensors.SafetensorError])
def test_a_library_that_cannot_write_leaves_the_old_folder_and_says_what_to_do(error, tmp_path):
    """tokenizers raises a bare Exception for a full disk, safetensors one of its own."""
    run = RunDirectory(tmp_path / "run", PRESETS["toy"], {})
    old = tmp_path / "run" / "student" / "tokenizer.json"
    old.parent.mkdir()
    old.write_text("old")
    with (
        pytest.raises(UserError, match=r"student could not be written .*No space left on device .*--resume"),
        run.writing("student"),
        whole_folder(old.parent) as work,
    ):
        work.mkdir()
        (work / "tokenizer.json").write_text("ne")
        raise error("No space left on device (os error 28)")
    assert [path.name for path in old.parent.parent.iterdir() if path.is_dir()] == ["student"]
    assert old.read_text() == "old"


def test_a_checkpoint_that_somebody_deleted_is_not_called_safe(tmp_path):
    run = RunDirectory(tmp_path / "run", PRESETS["toy"], {})
    run.saved = run.folder / "checkpoint-3"
    with (
        pytest.raises(UserError, match=r"No such file or directory.*; checkpoint-3 is gone: "),
        run.writing("metrics.jsonl"),
    ):
        raise OSError(2, "No such file or directory")


def test_a_run_without_a_game_has_no_discriminator_to_load(tmp_path):
    RunDirectory(tmp_path, PRESETS["toy"], {"method": "seqkd"})
    with pytest.raises(UserError, match=r"has no discriminator/ \(its method is 'seqkd'\)"):
        load_players(tmp_path)


def test_a_saved_folder_is_whole_or_the_old_one(models, tmp_path, monkeypatch):
    """An error on the way leaves the folder that was there."""
    judge = players_of(models, SHAPES["all weights, a copy of the toy"])
    save_discriminator(judge, tmp_path / "discriminator")
    before = (tmp_path / "discriminator" / "discriminator.safetensors").read_bytes()

    def fail(tensors):
        raise OSError(28, "No space left on device")

    shake(judge.language_model)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("safetensors.torch.save", fail)
        save_discriminator(judge, tmp_path / "discriminator")
    assert (tmp_path / "discriminator" / "discriminator.safetensors").read_bytes() == before
