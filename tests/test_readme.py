"""What the README says is what the results files hold and what the package has."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_readme_tables_are_those_of_the_results_files():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run python benchmarks/tables.py"


def test_import_is_light():
    """`import minigad` loads neither torch nor transformers; the clock is only a backstop."""
    code = "import minigad, sys; assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert time.perf_counter() - started < 10


def test_every_exported_name_exists():
    import minigad

    for name in minigad.__all__:
        assert getattr(minigad, name) is not None
