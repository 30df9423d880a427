"""What the README says is what the results files hold and what the package has."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_readme_tables_are_those_of_the_results_files():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run python benchmarks/tables.py"


def test_code_of_the_discriminator_as_a_tool_runs(tmp_path, monkeypatch, capsys):
    """As it stands in docs/judging.md, on a toy run of a few steps."""
    from minigad import PRESETS, distill

    rows = [{"prompt": f"say {i}", "completion": f"you said {i}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = PRESETS["toy"].replace(
        warmup_epochs=1, warmup_batch_size=8, discriminator_sft_epochs=1, discriminator_warmup_steps=1, max_steps=1,
        num_generations=2, per_device_train_batch_size=4, max_completion_length=12, eval_fraction=0.4,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nq\n"))
    distill(config, "pairs.jsonl")
    section = (ROOT / "docs" / "judging.md").read_text(encoding="utf-8").split("## The discriminator as a tool")[1]
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    said = capsys.readouterr().out
    assert "You: " in said
    assert "Read 40 pairs: kept " in said
    best = names["best"][0]
    assert abs(sum(names["seen"].contributions) - names["seen"].score) < 1e-4
    assert best.scores[best.place] == max(best.scores)
    assert len(names["reward"](prompts=["a"], completions=["b"])) == 1


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
