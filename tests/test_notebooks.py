"""The notebooks: built from their sources, and every cell of them runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("jupytext")

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("[0-9][0-9]_*.py"))
LARGEST = 400_000  # bytes of a committed notebook


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_notebooks() -> None:
    """Without this, a wrong folder would let the tests below pass by testing nothing."""
    assert "00_gad_in_one_sitting.py" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_built_from_its_source(build: ModuleType, name: str) -> None:
    """The committed notebook holds the cells of its source, in order and under the same names."""
    assert build.same_source(FOLDER / name), f"run python notebooks/build.py {name}"


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_clean(name: str) -> None:
    """Small, no path of the machine that built it, no widget, no warning or error among the outputs."""
    text = (FOLDER / name).with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    for unwanted in ("/home/", "/root/", "/tmp/", "/Users/", "jupyter.widget", '"stderr"', '"output_type": "error"'):
        assert unwanted not in text, unwanted


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(build: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs and its asserts hold in the smoke profile, with nothing on stderr."""
    monkeypatch.setenv("MINIGAD_PROFILE", "smoke")
    notebook = build.convert(FOLDER / name)
    build.execute(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
