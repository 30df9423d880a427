"""The command line: a whole toy run on the user's file, and bad input answered in one sentence."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minigad import run as run_module
from minigad.cli import main
from minigad.config import GADConfig
from minigad.data import write_jsonl
from minigad.reading import read_run
from minigad.run_directory import RunDirectory

ROOT = Path(__file__).parent.parent

SMALL = [
    "--preset",
    "toy",
    "--warmup-epochs",
    "1",
    "--warmup-batch-size",
    "8",
    "--discriminator-sft-epochs",
    "1",
    "--discriminator-warmup-steps",
    "1",
    "--max-steps",
    "2",
    "--num-generations",
    "2",
    "--per-device-train-batch-size",
    "4",
    "--max-completion-length",
    "12",
    "--eval-fraction",
    "0.4",
]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {i} é <|end|>", "completion": f"you said {i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def distill(pairs, folder, *more):
    return main(["distill", "--data", str(pairs), "--output-dir", str(folder), *SMALL, *more])


@pytest.mark.parametrize("method", ["gad", "seqkd", "soda"])
def test_distill_writes_a_run_that_reads_without_the_library(method, pairs, tmp_path):
    folder = tmp_path / "run"
    assert distill(pairs, folder, "--method", method, "--seqkd-epochs", "1", "--save-steps", "1") == 0
    made = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "report.html", "student"} <= made
    run = read_run(folder)
    assert run["config"]["config"]["max_steps"] == 2
    assert run["config"]["method"] == method
    assert run["config"]["models"] == {"toy": "toy", "toy-large": "toy-large"}
    assert "honest_auc" in run["evaluation"]["metrics"]
    assert (folder / "student" / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    if method == "gad":
        assert [m["step"] for m in run["metrics"] if m["phase"] == "gad"] == [1, 2]
        checkpoints = sorted((path for path in made if path.startswith("checkpoint-")), key=lambda name: int(name[11:]))
        assert len(checkpoints) == 2  # of many: save_total_limit
        assert checkpoints[-1] == f"checkpoint-{len(run['metrics'])}"
    assert main(["evaluate", str(folder), "--data", str(pairs)]) == 0
    assert main(["report", str(folder)]) == 0
    assert main(["diagnose", str(folder)]) == 0
    assert ("What the discriminator judges by" in (folder / "report.html").read_text()) == (method == "gad")


def test_a_second_run_does_not_overwrite_the_first(pairs, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert distill(pairs, tmp_path / "run") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "tyo"], "did you mean 'toy'"),
        (["--num-generations", "1"], "'num_generations' is 1; it must lie between 2"),
        (["--warmup-batch-size", "64"], "'warmup_batch_size' is 64 but only"),
        (["--max-prompt-length", "2"], "2"),
        (["--lora-r", "2", "--lora-target-modules", "nope"], "its linear layers are"),
        (["--student", "../x y"], "neither"),
        (["--optim", "adamw_8bit"], "needs a CUDA GPU"),
        (["--quantization", "nf4", "--lora-r", "4"], "is a toy, too small for 4 bits"),
        (["--eval-data", "/no/such/file.jsonl"], "/no/such/file.jsonl"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(flags, words, pairs, tmp_path, capsys):
    folder = tmp_path / "run"
    assert distill(pairs, folder, *flags) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("minigad: error: ")
    assert words in message
    assert not folder.exists()


@pytest.mark.parametrize(
    ("redirect", "status"),
    [("| true", 1), (">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), ("> out", 0)],
)
def test_any_terminal_is_written_to(redirect, status, tmp_path):
    """A reader that has seen enough, closed streams, and an encoding that lacks the characters of a folder's name."""
    run = RunDirectory(tmp_path / "ü", GADConfig(), {"method": "gad"}).folder
    row = {"phase": "gad", "step": 1, "reward": 0.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps({**row, "step": i}) + "\n" for i in range(1, 9)))
    command = f'set -o pipefail; "{sys.executable}" -m minigad report "$1" {redirect}'
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-c", command, "bash", str(run)], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stderr) == (status, "")
    assert (run / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    if redirect == "> out":
        assert r"\xfc" in (tmp_path / "out").read_text()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_machine_whose_memory_is_full_is_one_sentence(error, pairs, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise error

    monkeypatch.setattr(run_module, "distill", full)
    assert distill(pairs, tmp_path / "run") == 2
    assert "this machine's memory is full; lower --token-budget" in capsys.readouterr().err


def test_an_unknown_flag_is_refused_rather_than_guessed(pairs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distill(pairs, tmp_path / "run", "--max-step", "3")
    assert "--max-step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "status", "flags"),
    [
        (signal.SIGINT, 130, []),
        (signal.SIGTERM, 143, []),
        (
            signal.SIGINT,
            130,
            ["--discriminator-against", "reference", "--warmup-epochs", "2"],
        ),  # in warm-up there is none yet
    ],
)
def test_a_stop_saves_first_and_the_run_goes_on(number, status, flags, pairs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    bar = run_module.progress

    def signalled(stream, totals):
        for count, metrics in enumerate(bar(stream, totals)):
            if count == 2:
                signal.raise_signal(number)
            yield metrics

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "progress", signalled)
        if number == signal.SIGINT:
            assert distill(pairs, folder, *flags) == status
        else:
            with pytest.raises(SystemExit) as stopped:
                distill(pairs, folder, *flags)
            assert stopped.value.code == status
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (folder / "student" / "model.safetensors").is_file()
    assert (folder / "report.html").is_file()
    assert not (folder / "evaluation.json").exists()
    assert (folder / "checkpoint-3").is_dir()
    assert distill(pairs, folder, *flags, "--resume") == 0
    assert "going on from" in capsys.readouterr().err
    assert (folder / "evaluation.json").exists()


def test_check_names_what_is_installed(capsys):
    assert main(["check"]) == 0
    assert "torch" in capsys.readouterr().out


def test_a_recipe_gives_the_settings_and_flags_override_it(pairs, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'preset = "toy"\nwarmup_epochs = 1\nwarmup_batch_size = 8\ndiscriminator_sft_epochs = 1\n'
        "discriminator_warmup_steps = 1\nmax_steps = 9\nnum_generations = 2\nper_device_train_batch_size = 4\n"
        "max_completion_length = 12\neval_fraction = 0.4\n",
        encoding="utf-8",
    )
    folder = tmp_path / "run"
    command = ["distill", "--config", str(recipe), "--data", str(pairs), "--output-dir", str(folder)]
    assert main([*command, "--max-steps", "1"]) == 0
    config = read_run(folder)["config"]["config"]
    assert (config["max_steps"], config["num_generations"], config["learning_rate"]) == (1, 2, 1e-3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_step = 5", "recipe.toml: unknown config field 'max_step'; did you mean 'max_steps'"),
        ("num_generations = 1", "recipe.toml: config field 'num_generations' is 1; it must lie between 2"),
        ('max_steps = "many"', "recipe.toml: config field 'max_steps' is 'many'; it must be of type int"),
        ('dtype = "int4"', "recipe.toml: config field 'dtype' is 'int4'; it must be one of"),
        ("[model]\nstudent = 1", "recipe.toml: unknown config field 'model'"),
        ('preset = "tyo"', "recipe.toml: unknown preset 'tyo'; did you mean 'toy'"),
        ("preset = 3", "recipe.toml: unknown preset '3'"),
        ("max_steps = = 3", "recipe.toml is not TOML: Invalid value (at line 1"),
        ("max_steps = 3\nmax_steps = 4", "recipe.toml is not TOML"),
    ],
)
def test_a_bad_recipe_is_one_sentence_with_file_field_and_value(text, words, pairs, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    command = ["--config", str(tmp_path / "recipe.toml"), "--data", str(pairs), "--output-dir", str(tmp_path / "run")]
    assert main(["distill", *command]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, b"\xff\xfe student"])
def test_a_recipe_that_cannot_be_read_is_one_sentence(content, pairs, tmp_path, capsys):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    assert main(["distill", "--config", str(path), "--data", str(pairs), "--output-dir", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err.strip()
    assert "recipe.toml" in message
    assert "\n" not in message


def test_without_a_toml_reader_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    assert main(["fit", "--gpu", "t4", "--config", str(tmp_path / "recipe.toml")]) == 2
    assert "pip install tomli" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "writes"),
    [
        (["report", "{run}"], "report.html"),
        (["evaluate", "{run}", "--data", "{pairs}"], "tested_on.txt"),
        (["evaluate", "{run}", "--data", "{pairs}"], "evaluation.json"),
        (["guess", "{run}", "--html", "{new}/page.html"], "page.html"),
        (
            ["rerank", "{run}", "--prompts", "{pairs}", "--num-generations", "2", "--out", "{new}/best.jsonl"],
            "best.jsonl",
        ),
        (["filter", "{run}", "--data", "{pairs}", "--out", "{new}/a.jsonl", "--dropped", "{new}/b.jsonl"], "a.jsonl"),
        (["split", "--data", "{pairs}", "--train", "{new}/a.jsonl", "--heldout", "{new}/b.jsonl"], "a.jsonl"),
        (
            [
                "choose",
                "{run}",
                "--data",
                "{others}",
                "--measure",
                "nll",
                "--length-band",
                "0",
                "99",
                "--out",
                "{new}/run",
            ],
            "choice.json",
        ),
    ],
)
def test_a_command_that_cannot_write_says_so_and_leaves_nothing_half_done(
    words, writes, a_run, tmp_path, monkeypatch, capsys
):
    """A full disk, at the last moment: one sentence, the old file or none, and the same command again succeeds."""
    new = tmp_path / "new"
    new.mkdir()
    names = {"run": str(a_run / "run"), "new": str(new)}
    names |= {name: str(a_run / f"{name}.jsonl") for name in ("pairs", "others")}
    command = [word.format(**names) for word in words]
    before = files(a_run, new)
    real = os.replace

    def full(source, target):
        if Path(target).name == writes:
            raise OSError(28, "No space left on device", str(source), None, str(target))
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert main(command) == 2
    assert files(a_run, new) == before
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("minigad: error: ")
    assert writes in said and "No space left on device" in said and "same command again" in said
    assert main(command) == 0


def files(*folders):
    """All files but tested_on.txt, which is written before the results: better a prompt too many in it than one too few."""
    paths = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != "tested_on.txt"
    ]
    return {path: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A finished run, with pairs and others to look at."""
    folder = tmp_path_factory.mktemp("a_run")
    for name, number in (("pairs", 40), ("others", 12)):
        rows = [{"prompt": f"{name}: say {i}", "completion": f"you said {i}"} for i in range(number)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    assert distill(folder / "pairs.jsonl", folder / "run") == 0
    return folder


def full_disk(*args, **options):
    raise OSError(28, "No space left on device")


def full_disk_as_tokenizers_says_it(*args, **options):
    raise Exception("No space left on device (os error 28)")


def test_merge_writes_plain_weights_says_what_they_cost_and_refuses_what_it_cannot_merge(
    pairs, tmp_path, monkeypatch, capsys
):
    run, plain = tmp_path / "run", tmp_path / "plain"
    assert distill(pairs, run, "--method", "seqkd", "--seqkd-epochs", "1", "--lora-r", "4") == 0
    for full in (full_disk, full_disk_as_tokenizers_says_it):
        with monkeypatch.context() as patch:
            patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
            assert main(["merge", str(run), "--out", str(plain), "--dtype", "float32"]) == 2
        assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "run"]
    assert main(["merge", str(run), "--out", str(plain), "--dtype", "float32"]) == 0
    assert "log p moved by 0.0000 nats a token" in capsys.readouterr().out
    assert (plain / "model.safetensors").is_file()
    assert main(["merge", str(run), "--out", str(plain)]) == 2
    assert "is not empty; give another --out" in capsys.readouterr().err
    assert main(["merge", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "holds no run" in capsys.readouterr().err
