"""A run that was killed and resumed is, bit for bit, the run that was never stopped."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from minigad import run as run_module
from minigad import run_directory, train
from minigad.checkpoint import MANIFEST, Damaged, State, load, newest, save
from minigad.config import PRESETS, UserError
from minigad.discriminator import Discriminator
from minigad.players import load_players
from minigad.reading import read_run
from minigad.run import distill
from minigad.run_directory import RunDirectory, lock
from minigad.student import Student
from minigad.toy.letters import letters_dataset, letters_tokenizer

CONFIG = PRESETS["toy"].replace(
    max_completion_length=10,
    warmup_epochs=0.25,
    warmup_batch_size=16,
    discriminator_sft_epochs=0.25,
    discriminator_warmup_steps=2,
    max_steps=3,
    per_device_train_batch_size=4,
    num_generations=3,
    beta=0.01,
    ema_decay=0.5,
    seqkd_epochs=0.5,
    dpo_epochs=0.25,
    save_steps=2,
)
SHARED = {"discriminator": "sequence", "discriminator_model": "", "lora_r": 2, "sft_weight": 0.1, "eval_steps": 2}
TIMES = {"step_time", "tokens_per_second"}


@pytest.fixture(scope="module")
def rows():
    data = letters_dataset(192, 0)
    return [{"prompt": p, "completion": c} for p, c in zip(data["prompt"], data["completion"], strict=True)]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing takes longer than training here; test_cli writes reports."""
    monkeypatch.setattr(run_module, "write_report", lambda folder: (folder / "report.html").write_text("page"))


class Killed(BaseException):
    """Like SIGKILL, nothing catches it."""


def play(folder: Path, rows, config=CONFIG, method="gad", resume=False):
    config = config.replace(output_dir=str(folder))
    return distill(config, rows[:128], rows[184:], method, letters_tokenizer(), resume=resume)


def killed_at(monkeypatch, steps: int, folder: Path, rows, **options) -> bool:
    """Run until `steps` steps were recorded, in all phases; True if the run was killed, False if it ended before."""

    def progress(stream, totals):
        for number, metrics in enumerate(stream):
            if number == steps:
                raise Killed
            yield metrics

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "progress", progress)
        try:
            play(folder, rows, **options)
        except Killed:
            return True
    return False


def outcome(folder: Path):
    """All that a run leaves, times aside."""
    run = read_run(folder)
    metrics = [{key: value for key, value in row.items() if key not in TIMES} for row in run["metrics"]]
    weights = [path.read_bytes() for path in sorted((folder / "student").glob("*.safetensors"))]
    assert weights
    return weights, json.dumps(metrics), json.dumps(run["samples"]), json.dumps(run["evaluation"])


@pytest.mark.parametrize(
    ("method", "changes", "stride"), [("gad", {}, 1), ("gad", SHARED, 2), ("seqkd", {}, 1), ("soda", {}, 1)], ids=str
)
def test_killed_at_every_step_and_resumed_nothing_differs(method, changes, stride, rows, tmp_path, monkeypatch):
    """Every second step has a checkpoint; a kill comes after each step of each phase in turn (every second one on a shared base)."""
    config = CONFIG.replace(**changes)
    whole = play(tmp_path / "whole", rows, config, method)
    steps = len(read_run(whole)["metrics"])
    assert steps >= 4
    kills = 0
    for at in range(0, steps, stride):
        folder = tmp_path / f"killed-{at}"
        kills += killed_at(monkeypatch, at, folder, rows, config=config, method=method)
        torch.manual_seed(at)  # what else the new process does must not matter
        assert outcome(play(folder, rows, config, method, resume=True)) == outcome(whole), at
    assert kills == len(range(0, steps, stride))


def test_an_unfinished_evaluation_is_made_up_for(rows, tmp_path, monkeypatch):
    """Killed after the last step: what is left is the average's way into the student, and the evaluation."""
    whole, folder = play(tmp_path / "whole", rows), tmp_path / "killed"

    def killed(*args, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "evaluate", killed)
        with pytest.raises(Killed):
            play(folder, rows)
    assert outcome(play(folder, rows, resume=True)) == outcome(whole)
    assert outcome(play(folder, rows, resume=True)) == outcome(whole)  # a finished run can be asked again


def test_more_steps_continue_a_finished_run(rows, tmp_path, capsys):
    """At a constant rate a run of 3 steps that goes on to 5 is the run of 5: the average is not installed twice."""
    config = CONFIG.replace(lr_final_fraction=1.0)
    whole = play(tmp_path / "whole", rows, config.replace(max_steps=5))
    folder = play(tmp_path / "run", rows, config)
    assert outcome(play(folder, rows, config.replace(max_steps=5, save_steps=1), resume=True)) == outcome(whole)
    assert (
        "changed since the run began: max_steps (3 then, 5 now), save_steps (2 then, 1 now)" in capsys.readouterr().err
    )


def test_random_generators_go_on_too(rows, tmp_path):
    """Dropout inside a model draws from torch's global generator, libraries from Python's and numpy's."""

    def run(state: State, stop: int) -> list:
        seen = []
        for metrics in train.seqkd(state.student, dataset, CONFIG, state):
            seen.append((metrics["loss"], random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
            if metrics["step"] == stop:
                break
        return seen

    def fresh(checkpoint=None) -> State:
        student = Student.load(CONFIG, tokenizer=letters_tokenizer())
        for layer in student.model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return State(student, None, checkpoint)

    dataset = letters_dataset(64, 0)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    whole = run(fresh(), -1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    state = fresh()
    begun = run(state, 1)
    path = save(tmp_path, state, {})
    random.seed(2), np.random.seed(2), torch.manual_seed(2)  # noqa: NPY002
    assert begun + run(fresh(load(path)), -1) == whole
    assert len(whole) == 2


# --- settings and processes ---


def test_what_would_change_the_past_is_refused_by_name(rows, tmp_path):
    folder = tmp_path / "run"
    play(folder, rows)
    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    for changes, words in (
        ({"learning_rate": 0.5}, "learning_rate (0.001 then, 0.5 now)"),
        ({"max_steps": 9}, "max_steps (3 then, 9 now)"),  # the rate decays over max_steps
        ({"seed": 1, "beta": 0.0}, "beta (0.01 then, 0.0 now), seed (0 then, 1 now)"),
    ):
        with pytest.raises(UserError, match="made with other settings") as error:
            play(folder, rows, CONFIG.replace(**changes), resume=True)
        assert words in str(error.value)
    with pytest.raises(UserError, match="data \\("):
        play(folder, [*rows[1:], rows[0]], resume=True)
    with pytest.raises(UserError, match="other settings: heldout_data \\("):
        play(folder, [*rows[:184], *rows[185:], rows[184]], resume=True)
    with pytest.raises(UserError, match="method \\('gad' then, 'soda' now\\)"):
        play(folder, rows, method="soda", resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before


def _hold(folder: str, held, done) -> None:
    with lock(folder):
        held.set()
        done.wait(60)


def test_two_processes_cannot_share_a_run(rows, tmp_path):
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "run"), held, done))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(UserError, match="in use by another process"):
            play(tmp_path / "run", rows, resume=True)
        process.kill()  # a lock dies with its holder
        process.join()
        with lock(tmp_path / "run"):
            pass
    finally:
        process.kill()


def other(value):
    """Another value of the same type, for a setting."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return (*value, "x") if isinstance(value, tuple) else f"{value}x"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CONFIG)])
def test_each_setting_is_free_or_refused_by_name(name, tmp_path, capsys):
    """Only where and how often a run writes, and how it splits its work, may change; the change is said."""
    run = RunDirectory(tmp_path / "run", CONFIG, {"method": "gad"})
    before = (tmp_path / "run" / "config.json").read_bytes()
    changed = dataclasses.asdict(CONFIG) | {name: other(getattr(CONFIG, name))}
    now = run.about | {"config": changed}
    if name in run_directory.FREE:
        run_directory._check_same_run(json.loads(before), now, run.folder)
        assert f"changed since the run began: {name} (" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=rf"made with other settings: {name} \(.* then, .* now\); put them back"):
            run_directory._check_same_run(json.loads(before), now, run.folder)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_what_else_a_run_depends_on_is_refused_by_name(tmp_path):
    about = {"method": "gad", "models": {"toy": "commit-a"}, "data": "sha-a", "heldout_data": "sha-h", "processes": 1}
    run = RunDirectory(tmp_path / "run", CONFIG, about)
    others = {"method": "soda", "models": {"toy": "commit-b"}, "data": "b", "heldout_data": "b", "processes": 2}
    for name, value in others.items():
        with pytest.raises(UserError, match=rf"other settings: {name} \("):
            RunDirectory(tmp_path / "run", CONFIG, about | {name: value}, resume=True)
    assert RunDirectory(tmp_path / "run", CONFIG, about, resume=True).about == run.about


def test_a_run_of_another_version_is_named(tmp_path):
    """An older one lacks settings, which then have their defaults; a newer one has some that would be lost in silence."""
    run = RunDirectory(tmp_path / "run", CONFIG, {"method": "gad"})
    record = json.loads(json.dumps(run.about))
    defaults = dataclasses.asdict(PRESETS["toy"])
    lacking = {name: value for name, value in record["config"].items() if name != "shared_prompts"}
    assert defaults["shared_prompts"] == CONFIG.shared_prompts
    run_directory._check_same_run(record | {"config": lacking}, run.about, run.folder)
    newer = record | {"minigad": "9.0", "config": record["config"] | {"telepathy": 0.5}}
    with pytest.raises(UserError, match=r"begun by minigad 9.0, whose settings telepathy this one .* does not have"):
        run_directory._check_same_run(newer, run.about, run.folder)


@pytest.mark.parametrize("name", ["student", "discriminator", "metrics.jsonl", "samples.jsonl", "report.html"])
def test_what_is_not_a_runs_is_never_written_over(name, rows, tmp_path):
    """`--student student --output-dir .` would have emptied the student's own folder at its end."""
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.write_bytes(b"mine") if "." in name else (path.mkdir(), (path / "model.safetensors").write_bytes(b"mine"))
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    for resume in (False, True):
        with pytest.raises(UserError, match=f"holds no run but {name}, which a run would write over"):
            play(tmp_path / "run", rows, resume=resume)
    assert {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_lost_config_is_that_of_the_checkpoint(finished, rows, tmp_path):
    """It is neither begun anew over what is there, nor resumed with other settings."""
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "config.json").unlink()
    config = CONFIG.replace(save_steps=1)
    with pytest.raises(UserError, match="already holds a run"):
        play(folder, rows, config)
    with pytest.raises(UserError, match=r"made with other settings: seed \(0 then, 5 now\)"):
        play(folder, rows, config.replace(seed=5), resume=True)
    assert not (folder / "config.json").exists()
    assert outcome(play(folder, rows, config, resume=True)) == outcome(finished)


@pytest.mark.parametrize("name", ["metrics.jsonl", ".config.json.tmp", ".lock", "evaluation.json"])
def test_a_link_in_a_run_leads_nothing_out_of_it(name, finished, rows, tmp_path):
    folder, outside = shutil.copytree(finished, tmp_path / "run"), tmp_path / "precious"
    outside.write_text("precious\n")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"holds links \({name}\), through which a run would write outside it"):
        play(folder, rows, CONFIG.replace(save_steps=1), resume=True)
    with pytest.raises(UserError, match="holds links"):
        read_run(folder)
    assert outside.read_text() == "precious\n"


def test_links_to_folders_are_left_alone(finished, rows, tmp_path):
    """Neither followed nor emptied, where a run would put a folder of its own."""
    folder, outside = shutil.copytree(finished, tmp_path / "run"), tmp_path / "precious"
    (outside / "inside").mkdir(parents=True)
    shutil.rmtree(folder / "student")
    for name, words in (
        ("student", r"student could not be written in .*checkpoint-\d+ is safe"),
        (".student.tmp", "holds links"),
    ):
        (folder / name).symlink_to(outside)
        with pytest.raises(UserError, match=words):
            play(folder, rows, CONFIG.replace(save_steps=1), resume=True)
        (folder / name).unlink()
    assert [path.name for path in outside.iterdir()] == ["inside"]


# --- damage ---


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory):
    """A run with the two checkpoints that a resumed run may choose from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "write_report", lambda folder: folder)
        folder = play(tmp_path_factory.mktemp("finished") / "run", rows, CONFIG.replace(save_steps=1))
    assert len(checkpoints(folder)) == 2
    return folder


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))


def test_every_flipped_bit_is_found(finished, tmp_path):
    """1,500 random bits of the manifest, 40 of each other file: none is loaded, and the older checkpoint is taken."""
    older, newer = checkpoints(shutil.copytree(finished, tmp_path / "run"))
    rng, flips = random.Random(0), 0
    players = {
        f"{name}.safetensors" for name in ("student", "reference", "discriminator", "average", "optimizer", "random")
    }
    assert {path.name for path in newer.iterdir()} == players | {"state.json", MANIFEST}
    state = json.loads((newer / "state.json").read_bytes())
    about = {
        "phase",
        "step",
        "total",
        "optimizers",
        "loss_scales",
        "random",
        "logs",
        "versions",
        "config",
        "models",
        "data",
    }
    assert about <= state.keys()
    for path in sorted(newer.iterdir()):
        good = path.read_bytes()
        for bit in rng.sample(range(8 * len(good)), 1500 if path.name == MANIFEST else 40):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            with pytest.raises(Damaged):
                load(newer)
            flips += 1
        path.write_bytes(good)
    assert flips > 1500
    path.write_bytes(bad)
    found, skipped = newest(newer.parent)
    assert found.path == older
    assert [path for path, why in skipped] == [newer]


def test_a_flipped_bit_in_what_a_run_leaves_is_found_or_does_no_harm(finished, tmp_path):
    """In both players' folders: every one in weights is found; one in a text file is found, or is read as another text."""
    folder = shutil.copytree(finished, tmp_path / "run")
    rng, found = random.Random(0), 0
    for path in [*sorted((folder / "student").iterdir()), *sorted((folder / "discriminator").iterdir())]:
        good = path.read_bytes()
        for bit in rng.sample(range(8 * len(good)), 12 if path.suffix == ".safetensors" else 6):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            try:
                load_players(folder)
            except UserError:
                found += 1
            else:
                assert path.suffix != ".safetensors", (path.name, bit)
        path.write_bytes(good)
    assert found > 30
    assert load_players(folder)


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("harm", ["cut", "empty", "missing", "longer", "folder"])
def test_a_damaged_file_costs_the_steps_since_the_checkpoint_before(name, harm, finished, tmp_path, rows, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    older, newer = checkpoints(folder)
    path = newer / name
    data = path.read_bytes()
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm != "missing":
        path.write_bytes({"cut": data[:-1], "empty": b"", "longer": data + b"}"}[harm])
    config = CONFIG.replace(output_dir=str(folder), save_steps=1)
    run = RunDirectory(
        folder, config, json.loads((folder / "config.json").read_bytes()) | {"config": None}, resume=True
    )
    state = run.resume(None, None)
    assert state.checkpoint.path == older
    said = capsys.readouterr().err
    assert f"{newer} is damaged and was skipped: {name}" in said or f"skipped: {MANIFEST}" in said
    assert (folder / f"damaged-{newer.name}").is_dir()


def test_a_run_with_only_damaged_checkpoints_starts_again(finished, tmp_path, rows, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    for path in checkpoints(folder):
        (path / MANIFEST).unlink()
    assert outcome(play(folder, rows, CONFIG.replace(save_steps=1), resume=True)) == outcome(finished)
    assert capsys.readouterr().err.count("is damaged and was skipped") == 2


def test_a_manifest_cannot_lead_out_of_its_folder(finished, tmp_path):
    newer = checkpoints(shutil.copytree(finished, tmp_path / "run"))[-1]
    for name in ("../config.json", "/etc/passwd", "a/../../x"):
        (newer / MANIFEST).write_text(json.dumps({name: {"bytes": 1, "sha256": "0"}}))
        with pytest.raises(Damaged, match="not the name of a file"):
            load(newer)


@pytest.mark.parametrize("harm", [{"phase": None}, {"step": "1"}, {"optimizers": {}}, {"random": []}])
def test_a_state_that_verifies_but_lacks_something_is_damaged(harm, finished, tmp_path):
    newer = checkpoints(shutil.copytree(finished, tmp_path / "run"))[-1]
    record = json.loads((newer / "state.json").read_bytes()) | harm
    seal(newer, "state.json", json.dumps(record).encode())
    with pytest.raises(Damaged, match=f"state.json is not there or lacks {next(iter(harm))}"):
        load(newer)


@pytest.mark.parametrize("name", ["student.safetensors", "state.json"])
def test_what_no_library_reads_is_damaged_though_its_hash_is_right(name, finished, tmp_path):
    newer = checkpoints(shutil.copytree(finished, tmp_path / "run"))[-1]
    seal(newer, name, b"\xff" * 64)
    with pytest.raises(Damaged, match=f"{name} cannot be read"):
        load(newer)


def test_an_optimizer_of_another_library_is_refused(finished, tmp_path):
    newer = checkpoints(shutil.copytree(finished, tmp_path / "run"))[-1]
    record = json.loads((newer / "state.json").read_bytes())
    record |= {"optimizers": [{"pairs": [["telepathy", 1]]}] * len(record["optimizers"])}
    seal(newer, "state.json", json.dumps(record).encode())
    student = Student.load(CONFIG, tokenizer=letters_tokenizer())
    state = State(student, Discriminator.load(CONFIG, student), load(newer))
    with pytest.raises(UserError, match="an optimizer or a random generator that these libraries do not read"):
        list(train.gad(student, state.discriminator, letters_dataset(16, 0), CONFIG, state=state))


def seal(checkpoint: Path, name: str, data: bytes) -> None:
    """Write a file of a checkpoint, and a manifest that vouches for it."""
    (checkpoint / name).write_bytes(data)
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_of_another_model_is_refused(finished):
    other = Student.load(CONFIG.replace(student="toy-large"), tokenizer=letters_tokenizer())
    state = State(other, Discriminator.load(CONFIG, other), load(checkpoints(finished)[-1]))
    other.freeze_reference()
    with pytest.raises(UserError, match="was not made by these models"):
        state.steps("gad", 3)


def test_torn_and_surplus_lines_are_cut_off(rows, tmp_path, monkeypatch):
    """A kill can tear the last line of a log; a machine that lost power can lose lines that were not synced."""
    whole = play(tmp_path / "whole", rows)
    for harm in ("tear", "surplus", "lose"):
        folder = tmp_path / harm
        assert killed_at(monkeypatch, 7, folder, rows)
        for name in ("metrics.jsonl", "samples.jsonl"):
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(
                {
                    "tear": data + b'{"phase": "ga',
                    "surplus": data + data[data.rfind(b"\n", 0, -1) + 1 :],
                    "lose": data[:-10],
                }[harm]
            )
        assert len(read_run(folder)["metrics"]) in (7, 8, 9)  # a torn run can be read as it is
        assert outcome(play(folder, rows, resume=True)) == outcome(whole)


def test_a_log_that_lost_lines_is_said(finished, tmp_path, rows, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:-10])
    play(folder, rows, CONFIG.replace(save_steps=1), resume=True)
    assert "metrics.jsonl has lost 10 bytes" in capsys.readouterr().err
    assert all(line.endswith("}") for line in (folder / "metrics.jsonl").read_text().splitlines())


# --- writes that fail ---


def test_every_write_that_fails_leaves_the_last_checkpoint_and_says_what_to_do(rows, tmp_path, monkeypatch):
    """The k-th write of a run fails, for every k: one sentence, and --resume reaches the end that no fault had reached."""
    config = CONFIG.replace(seqkd_epochs=0.25, save_steps=1, save_total_limit=1)

    def run(name: str, resume: bool = False) -> Path:
        return play(tmp_path / name, rows, config, "seqkd", resume)

    whole = run("whole")
    count = failing(monkeypatch, None, lambda: run("counted"))
    assert count > 40
    for k in range(count):
        folder = tmp_path / f"fault-{k}"
        with pytest.raises(UserError) as error:
            failing(monkeypatch, k, lambda folder=folder: run(folder.name))
        assert "No space left on device" in str(error.value), k
        assert "--resume" in str(error.value) or "give another --output-dir" in str(error.value), k
        if folder.exists():
            found, skipped = newest(folder)
            assert not skipped, k
            assert found is not None or "no checkpoint" in str(error.value) or "give another" in str(error.value), k
        if k % 6 == 0:
            assert outcome(run(folder.name, resume=True)) == outcome(whole), k


def failing(monkeypatch, k, action) -> int:
    """Let the k-th call that writes fail with "disk full", a write with half of its bytes done; return the number of calls."""
    calls = 0

    def broken(original, half=lambda *args: None):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls - 1 != k:
                return original(*args, **options)
            half(*args)
            raise OSError(28, "No space left on device")

        return call

    def opened(path, mode="r", *args, **options):
        file = open_path(path, mode, *args, **options)
        if mode not in ("r", "rb"):
            write = file.write
            file = Proxy(file, broken(write, lambda data: write(data[: len(data) // 2])))
        return file

    open_path = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        for owner, name in ((Path, "rename"), (Path, "mkdir"), (os, "fsync"), (os, "replace")):
            patch.setattr(owner, name, broken(getattr(owner, name)))
        patch.setattr(Student, "save_pretrained", broken(Student.save_pretrained))
        action()
    return calls


class Proxy:
    """A file with another write()."""

    def __init__(self, file, write) -> None:
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def test_a_file_that_can_only_be_half_written(rows, tmp_path, monkeypatch):
    """The kernel's own refusal, in the middle of a file: no library's promise is taken for granted."""
    whole, folder = play(tmp_path / "whole", rows), tmp_path / "run"
    assert killed_at(monkeypatch, 4, folder, rows)
    sizes = [path.stat().st_size for path in checkpoints(folder)[-1].iterdir()]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) // 2, hard))
    try:
        with pytest.raises(UserError, match=r"could not be written .*File too large.*checkpoint-4 is safe"):
            play(folder, rows, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert newest(folder)[0].path.name == "checkpoint-4"
    assert not newest(folder)[1]
    assert outcome(play(folder, rows, resume=True)) == outcome(whole)


def test_a_full_disk(rows, tmp_path):
    """A real one, of 400 kB, where the test may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        with pytest.raises(UserError, match=r"No space left on device.*is safe: make room .*--resume"):
            play(disk / "run", rows, CONFIG.replace(save_steps=1, save_total_limit=9))
        found, skipped = newest(disk / "run")
        assert found.record["total"] >= 1
        assert not skipped
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        resumed = play(disk / "run", rows, CONFIG.replace(save_steps=1, save_total_limit=9), resume=True)
        assert outcome(resumed) == outcome(play(tmp_path / "whole", rows))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_goes_on_exactly(eight_bit, dtype, tmp_path):
    """Also one whose state is 8-bit numbers, shared tables and block scales; the next three updates are the same bits."""
    optim = pytest.importorskip("bitsandbytes").optim.AdamW8bit if eight_bit else torch.optim.AdamW
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(128, 64, generator=generator).to(dtype)
    gradients = [torch.randn(128, 64, generator=generator).to(dtype) for _ in range(6)]

    def step(weights, optimizer, gradient):
        for weight in weights:
            weight.grad = gradient.clone()
        optimizer.step()

    def fresh(values):
        weights = [torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone() + 1)]  # two share 8-bit tables
        return weights, optim(weights, lr=1e-2, betas=(0.9, 0.95))

    weights, optimizer = fresh(start)
    state = State()
    for number in state.steps("phase", 3, optimizer):
        step(weights, optimizer, gradients[number])
    resumed_weights, resumed = fresh(start)
    for mine, theirs in zip(resumed_weights, weights, strict=True):
        mine.data.copy_(theirs)
    again = State(None, None, load(save(tmp_path, state, {})))
    for number in again.steps("phase", 6, resumed):
        step(weights, optimizer, gradients[number])
        step(resumed_weights, resumed, gradients[number])
        assert all(torch.equal(a, b) for a, b in zip(weights, resumed_weights, strict=True))
    assert again.total == 6
    assert not torch.equal(weights[0], start)
