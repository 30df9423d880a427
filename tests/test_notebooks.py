"""The notebooks and their solutions: built from their sources, of one anatomy, and every cell of them runs."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("jupytext")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("[0-9][0-9]_*.py"))
LARGEST = 400_000  # bytes of a committed notebook
WORDS, LINES = 90, 24  # of a cell of text without its equations, of a cell of code
TOY_GROUP = ["03_teaching_a_judge.py", "04_rollouts_groups_advantages.py", "05_policy_gradient.py", "06_the_game.py"]
# The Colab image of August 2026, and what else of ours is known to be on it.
COLAB = {"torch": "2.11.*", "transformers": "5.15.*", "peft": "0.20.*", "accelerate": "1.14.*", "datasets": "4.0.*"}
ON_COLAB = {"numpy", "scipy", "scikit-learn", "matplotlib", "tqdm", "filelock"}
ON_COLAB |= {"safetensors", "tokenizers", "huggingface-hub"}
UNWANTED = ["/home/", "/root/", "/tmp/", "/work/", "/Users/", "jupyter.widget", '"stderr"', '"output_type": "error"']


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(name: str, kind: str) -> list[str]:
    """The sources of a committed notebook's cells of one kind."""
    return ["".join(cell["source"]) for cell in committed(name)["cells"] if cell["cell_type"] == kind]


def committed(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).with_suffix(".ipynb").read_text(encoding="utf-8"))


def exercises(name: str) -> dict[str, list[str]]:
    """The checks of each exercise: its heading, and the asserts of the code below it."""
    source = (FOLDER / name).read_text(encoding="utf-8")
    parts = re.split(r"^# ## (Exercise \d+)$", source, flags=re.MULTILINE)[1:]
    return {title: re.findall(r"^assert .*", text, re.M) for title, text in zip(parts[::2], parts[1::2], strict=True)}


def test_there_are_notebooks_and_solutions() -> None:
    """Without this, a wrong folder would let the tests below pass by testing nothing. Each notebook has solutions."""
    own = [name for name in NAMES if "/" not in name]
    assert [name[:2] for name in own][:8] == [f"{i:02d}" for i in range(8)]
    assert [f"solutions/{name}" for name in own] == [name for name in NAMES if "/" in name]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_built_from_its_source(build: ModuleType, name: str) -> None:
    """The committed notebook holds the cells of its source, in order and under the same names."""
    assert build.same_source(FOLDER / name), f"run python notebooks/build.py notebooks/{name}"


def test_text_can_change_without_a_run_and_code_cannot(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`build.py --text` keeps every output, and stops where the code is not what was run."""
    source = FOLDER / "04_rollouts_groups_advantages.py"
    kept = build.refresh_text(source)
    before = build.nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [cell.get("outputs") for cell in kept.cells] == [cell.get("outputs") for cell in before.cells]
    changed = build.convert(source)
    next(cell for cell in changed.cells if cell.cell_type == "code").source += "\n1"
    monkeypatch.setattr(build, "convert", lambda source: changed)
    with pytest.raises(SystemExit, match="has changed"):
        build.refresh_text(source)


def test_the_project_address_is_changed_in_one_place(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """REPOSITORY makes the badge and the first cell of every notebook, and a new one asks for no run."""
    monkeypatch.setattr(build, "REPOSITORY", "https://github.com/some-one/minigad")
    for name in NAMES:
        text = "\n".join(cell.source for cell in build.refresh_text(FOLDER / name).cells)
        assert "GITHUB_OWNER" not in text, name
        assert text.count("some-one/minigad") == 2, name


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_come_from_one_run(name: str) -> None:
    """Every cell of code was executed once, from top to bottom, in a fresh kernel."""
    counts = [cell["execution_count"] for cell in committed(name)["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_clean(name: str) -> None:
    """Small, no path of the machine that built it, no widget, no warning or error among the outputs."""
    text = (FOLDER / name).with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    for unwanted in UNWANTED:
        assert unwanted not in text, unwanted


@pytest.mark.parametrize("name", NAMES)
def test_figures_have_words(name: str) -> None:
    """Every picture carries a text for readers who cannot see it."""
    outputs = [output for cell in committed(name)["cells"] for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures or "/" in name
    for picture in pictures:
        assert len(picture["metadata"].get("image/png", {}).get("alt", "").split()) >= 8, picture["metadata"]


def test_players_keep_their_colours_and_levels_are_dashed() -> None:
    """A label that begins with a player has that player's colour; no other line has a player's."""
    from minigad.plots import COLOURS, plot_panels

    curve, level = ([1, 2, 3], [0.1, 0.2, 0.3]), ([1, 3], [0.5, 0.5])
    figure = plot_panels({"one": {"teacher, held out": curve, "other": curve, "chance": level}}, "step")
    named, other, chance = figure.axes[0].get_lines()
    assert named.get_color() == COLOURS["teacher"]
    assert other.get_color() not in COLOURS.values()
    assert (chance.get_linestyle(), chance.get_color()) == ("--", COLOURS["reference"])


@pytest.mark.parametrize("name", NAMES)
def test_first_cells(build: ModuleType, name: str) -> None:
    """The title carries the badge of this very file; the first code is the same everywhere and imports nothing heavy."""
    title, first = cells(name, "markdown")[0], cells(name, "code")[0]
    assert f"/blob/main/notebooks/{Path(name).with_suffix('.ipynb').as_posix()})" in title
    assert first == cells(NAMES[0], "code")[0]
    assert f'"{build.REPOSITORY}"' in first
    tree = ast.parse(first.replace("%matplotlib inline", ""))
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    assert {module.split(".")[0] for module in imported} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short(name: str) -> None:
    """A cell is read in one breath. Equations and blank lines are not counted."""
    for text in cells(name, "markdown"):
        assert len(re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL).split()) <= WORDS, text
    for code in cells(name, "code"):
        assert sum(bool(line.strip()) for line in code.splitlines()) <= LINES, code


def test_no_notebook_asks_for_its_profile() -> None:
    """The profile is read in the first cell alone: the text of a smoke run is the text of a real one."""
    for name in NAMES:
        assert not [code for code in cells(name, "code")[1:] if "MINIGAD_PROFILE" in code or '"smoke"' in code], name


def test_the_toy_group_is_the_same_everywhere() -> None:
    groups = [code for name in TOY_GROUP for code in cells(name, "code") if code.startswith("# The toy group")]
    assert len(groups) == len(TOY_GROUP)
    assert len(set(groups)) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if "/" not in name])
def test_solutions_pass_the_checks_of_their_exercises(name: str) -> None:
    """Same exercises, same asserts; the run of the solutions then shows that the answers are right."""
    asked = exercises(name)
    assert len(asked) >= 2
    assert asked == exercises(f"solutions/{name}")
    assert "= ...\n" not in (FOLDER / "solutions" / name).read_text(encoding="utf-8")


def test_readme_names_every_notebook_and_only_files_that_exist() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert {Path(name).with_suffix(".ipynb").as_posix() for name in NAMES} <= links
    assert not [link for link in links if not (FOLDER / link).exists()]


def test_readme_bands_are_those_of_notebook_07() -> None:
    """A band in the glossary is the healthy run's, as the last table of notebook 07 printed it."""
    tables = [
        "".join(output["data"]["text/markdown"])
        for cell in committed("07_when_the_game_breaks.py")["cells"]
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    measured = dict(re.findall(r"^\| (\S+) \| (-?[\d.]+ to -?[\d.]+) \|", tables[-1], re.M))
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\S+)` \|[^|]*\| (-?[\d.]+ to -?[\d.]+)", text, re.M))
    assert len(told) >= 8
    assert told == {name: measured[name] for name in told}


@pytest.mark.network
def test_colab_keeps_its_own_packages(tmp_path: Path) -> None:
    """The wheel resolves with Colab's versions in place; what Colab lacks of our own requirements is pure Python."""
    for name in ("minigad", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "colab.txt").write_text("\n".join(f"{name}=={version}" for name, version in COLAB.items()))
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", "wheel", "."], cwd=tmp_path, check=True)
    target = ["--python-version", "3.13", "--only-binary=:all:", "--target", "unused", "--constraint", "colab.txt"]
    wheel = str(next((tmp_path / "wheel").glob("minigad-*.whl")))
    dry = [*pip, "install", "--dry-run", "--ignore-installed", *target, "--report", "report.json", wheel]
    subprocess.run(dry, cwd=tmp_path, check=True)
    chosen = json.loads((tmp_path / "report.json").read_text())["install"]
    files = {one["metadata"]["name"].lower().replace("_", "-"): one["download_info"]["url"] for one in chosen}
    ours = next(one["metadata"] for one in chosen if one["metadata"]["name"] == "minigad")
    wanted = {re.split(r"[^\w-]", line)[0].lower() for line in ours["requires_dist"] if "extra ==" not in line}
    assert "torch" in wanted
    assert all(files[name].endswith("-none-any.whl") for name in wanted - COLAB.keys() - ON_COLAB)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(build: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs and its asserts hold in the smoke profile, with nothing on stderr."""
    monkeypatch.setenv("MINIGAD_PROFILE", "smoke")
    notebook = build.convert(FOLDER / name)
    build.execute(notebook, (FOLDER / name).parent)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs or "/" in name
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
