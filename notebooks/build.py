"""Build the notebooks: each NN_*.py (jupytext, percent format) becomes an executed .ipynb beside it.

    python notebooks/build.py            convert and execute all, or those named
    python notebooks/build.py --check    only compare: is each committed .ipynb made from its source?
    python notebooks/build.py --text     take over changed text; stops if any code has changed, for then outputs are stale

The .py is the source, because a diff of it can be read and ruff checks it. Never edit an .ipynb by hand.
The solutions of NN_name.py are in solutions/NN_name.py.

REPOSITORY below is the one place that says where the project lives on GitHub: the badge under each title and the address in each
first cell are made from it. Change it there, then `python notebooks/build.py --text`.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

__all__ = ["REPOSITORY", "convert", "execute", "refresh_text", "same_source", "sources"]

FOLDER = Path(__file__).resolve().parent
PLACEHOLDER = "https://github.com/GITHUB_OWNER/minigad"  # in the sources; no GitHub name may hold "_"
REPOSITORY = PLACEHOLDER  # where Colab finds the notebooks, and the first cell minigad: set it when there is one
COLAB = "https://colab.research.google.com"
SECONDS_A_CELL = 1800


def sources() -> list[Path]:
    """Return the sources, in the order of their numbers, and then their solutions."""
    return [path for folder in (FOLDER, FOLDER / "solutions") for path in sorted(folder.glob("[0-9][0-9]_*.py"))]


def _badge(source: Path) -> str:
    path = source.relative_to(FOLDER.parent).with_suffix(".ipynb").as_posix()
    target = REPOSITORY.replace("https://github.com", f"{COLAB}/github")
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({target}/blob/main/{path})"


def convert(source: Path) -> Any:
    """Return the notebook of a source, without outputs; its cells are named by their position, so that diffs stay small."""
    notebook = jupytext.read(source)
    title, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = f"{title}\n\n{_badge(source)}\n{rest}"
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"cell-{i:02d}", {}
        cell.source = cell.source.replace(PLACEHOLDER, REPOSITORY)
    return notebook


def execute(notebook: Any, folder: Path = FOLDER) -> None:
    """Run all cells in a fresh kernel, in `folder`, on the minigad of this checkout; a cell that raises, raises here."""
    path = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    metadata = dict(notebook.metadata)
    client = NotebookClient(
        notebook,
        timeout=SECONDS_A_CELL,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": path})
    notebook.metadata = metadata  # the kernel adds its own version: not for the repository
    _join_streams(notebook)
    _shrink_pictures(notebook)


def _join_streams(notebook: Any) -> None:
    """Join neighbouring pieces of a stream: where a kernel cuts its text is chance."""
    for cell in notebook.cells:
        joined: list[Any] = []
        for output in cell.get("outputs", []):
            if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        if "outputs" in cell:
            cell.outputs = joined


def _shrink_pictures(notebook: Any) -> None:
    """Give every figure a palette of 128 colours: the eye sees no difference, the file is a third."""
    for cell in notebook.cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "image/png" in data:
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
                small = io.BytesIO()
                picture.quantize(128).save(small, format="png", optimize=True)
                data["image/png"] = base64.b64encode(small.getvalue()).decode()


def refresh_text(source: Path) -> Any:
    """Return the notebook of a source with the outputs of the .ipynb beside it; exit if their code differs."""
    notebook, built = convert(source), nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    new, old = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (notebook, built))
    if [_without_address(cell.source) for cell in new] != [_without_address(cell.source) for cell in old]:
        sys.exit(f"the code of {source.relative_to(FOLDER)} has changed: build it without --text")
    for cell, executed in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = executed.outputs, executed.execution_count
    return notebook


def _without_address(code: str) -> str:
    """Leave out where the project lives: no output depends on it."""
    return re.sub(r'"https://github\.com/[\w.-]+/minigad"', "", code)


def same_source(source: Path) -> bool:
    """Say whether the .ipynb beside a source holds the very cells of that source, outputs aside."""
    if not source.with_suffix(".ipynb").exists():
        return False
    built = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    expected = [(cell.id, cell.cell_type, cell.source) for cell in convert(source).cells]
    return expected == [(cell["id"], cell["cell_type"], "".join(cell["source"])) for cell in built["cells"]]


def _built(source: Path) -> Any:
    """Convert and execute, and say what it took."""
    started, used = time.perf_counter(), _cpu_seconds()
    notebook = convert(source)
    execute(notebook, source.parent)
    seconds, used = time.perf_counter() - started, _cpu_seconds() - used
    print(f"{source.relative_to(FOLDER)} ran in {seconds:.0f} s, {used:.0f} s of CPU", flush=True)
    return notebook


def _write(notebook: Any, source: Path) -> None:
    nbformat.validate(notebook)
    nbformat.write(notebook, source.with_suffix(".ipynb"))


def _cpu_seconds() -> float:
    """Return the processor time of the kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert and execute the notebooks.")
    parser.add_argument(
        "names", nargs="*", help="sources, for example notebooks/00_gad_in_one_sitting.py (default: all)"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare sources with committed notebooks; execute nothing"
    )
    parser.add_argument("--text", action="store_true", help="take over changed text, keep outputs; execute nothing")
    arguments = parser.parse_args()
    chosen = [Path(name).resolve() for name in arguments.names] or sources()
    if arguments.check:
        stale = [str(source.relative_to(FOLDER)) for source in chosen if not same_source(source)]
        sys.exit(f"not built from their source: {', '.join(stale)}; run python notebooks/build.py" if stale else 0)
    for source in chosen:
        _write(refresh_text(source) if arguments.text else _built(source), source)


if __name__ == "__main__":
    main()
