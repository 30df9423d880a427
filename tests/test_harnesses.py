"""The outside harnesses themselves on what `minigad evaluate` writes for them. Run with `-m slow`.

MINIGAD_LM_EVAL_PYTHON and MINIGAD_ALPACA_EVAL_PYTHON name the Pythons of environments that have lm-eval[hf] and alpaca-eval
(ours has neither: they bring their own versions of much); default: this one.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import tiny_folder
from fault_server import FaultServer

from minigad.outputs import read_outputs, write_alpaca_eval, write_harness_task

pytestmark = pytest.mark.slow
PROMPTS = ["What is {{1}}?", 'Say é\nand "more"', "{% if %} [[A]]"]
OURS, THEIRS = ["one", "é, and more", "yes"], ["one and two", "é", "no"]

# AlpacaEval's own annotator and metric; its count of tokens asks a hub, so it counts characters here.
ALPACA = """
import sys, types, tiktoken
tiktoken.encoding_for_model = lambda name: types.SimpleNamespace(encode=lambda text, **more: list(text))
import alpaca_eval
files = {"model_outputs": sys.argv[1], "reference_outputs": sys.argv[2], "caching_path": None, "output_path": None}
more = {"precomputed_leaderboard": None, "fn_metric": "get_winrate", "sort_by": "win_rate"}
found, _ = alpaca_eval.evaluate(annotators_config="alpaca_eval_gpt4", is_return_instead_of_print=True, **files, **more)
print(found[["win_rate", "n_total"]].to_json(orient="index"))
"""


def python_with(module, variable):
    python = os.environ.get(variable, sys.executable)
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
        pytest.skip(f"no {module} here; name a Python that has it in {variable}")
    return python


def output_of(command, **more):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("chat", [[], ["--apply_chat_template"]], ids=["plain", "chat"])
def test_lm_evaluation_harness_scores_a_student_and_its_samples_come_back(chat, tmp_path):
    """A student of random weights; the harness's chrF is sacrebleu's of the samples that we read back."""
    python = python_with("lm_eval", "MINIGAD_LM_EVAL_PYTHON")
    name = write_harness_task(tmp_path / "heldout", PROMPTS, THEIRS, 8)
    student = f"pretrained={tiny_folder(tmp_path / 'student')},dtype=float32"
    where = [
        "--include_path",
        tmp_path / "heldout",
        "--tasks",
        name,
        "--output_path",
        tmp_path / "out",
        "--log_samples",
    ]
    output_of(
        [python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", student, "--device", "cpu", *where, *chat]
    )
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    (results,) = (tmp_path / "out").rglob("results_*.json")
    outputs = read_outputs(samples)[1]
    assert list(outputs) == PROMPTS
    assert (
        any(outputs.values()) or chat
    )  # greedy and at random it repeats the last token: in a chat one that is not shown
    sacrebleu = pytest.importorskip("sacrebleu")
    expected = sacrebleu.corpus_chrf([outputs[prompt] for prompt in PROMPTS], [THEIRS]).score
    assert json.loads(results.read_text())["results"][name]["chrf,none"] == pytest.approx(expected)


def test_alpaca_eval_judges_our_file_against_another(tmp_path):
    """Its judge is a rule behind an endpoint: the longer one. Ours is longer for two prompts of three."""
    python = python_with("alpaca_eval", "MINIGAD_ALPACA_EVAL_PYTHON")
    for name, texts in (("ours", OURS), ("teacher", THEIRS)):
        write_alpaca_eval(tmp_path / f"{name}.json", PROMPTS, texts, name, "heldout")

    def longer(text):
        first, second = re.findall(r'"answer": """(.*?)"""\n    }', text, re.DOTALL)
        best = 1 if len(first) > len(second) else 2
        return f"[{{'model': 'model_1', 'rank': {best}}}, {{'model': 'model_2', 'rank': {3 - best}}}]"

    with FaultServer(answer=longer) as server:
        where = {"OPENAI_API_BASE": server.url, "OPENAI_API_KEY": "sk-none", "NO_PROXY": "127.0.0.1"}
        said = output_of(
            [python, "-W", "ignore", "-c", ALPACA, tmp_path / "ours.json", tmp_path / "teacher.json"], **where
        )
        assert len(server.requests) == 3
    assert json.loads(said.splitlines()[-1])["ours"] == {"win_rate": pytest.approx(200 / 3), "n_total": 3}
