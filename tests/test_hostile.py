"""Hostile input ends in a sentence: a fixed list through the command line, and random input through the functions."""

import json
import re
from pathlib import Path

import hostile
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minigad.checkpoint import MANIFEST, Damaged, load, write_json
from minigad.config import GADConfig, UserError, get_preset, make_config, visible
from minigad.data import load_pairs
from minigad.diagnose import diagnose
from minigad.reading import read_run
from minigad.report import write_report
from minigad.run_directory import RunDirectory

DOCUMENT = Path(__file__).parent.parent / "docs" / "hostile-inputs.md"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

any_text = st.text(st.characters(), max_size=30)  # surrogates and control characters too
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("group", sorted({name.split(":")[0] for name in hostile.CASES}))
def test_each_hostile_input_ends_in_one_sentence(group, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = [line.replace("'", "") for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    for name in hostile.CASES:
        if name.startswith(f"{group}:"):
            row, wrong = hostile.row_of(name)
            assert not wrong, name
            assert row.replace("'", "") in rows, "run python tests/hostile.py"  # argparse's quotes differ by version


def test_the_list_is_long_and_in_the_documentation():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(hostile.CASES) >= 100
    assert hostile.CASES.keys() >= hostile.FINE
    missing = [name for name in hostile.CASES if f"| {hostile.cell(name)} |" not in text]
    assert not missing, "run python tests/hostile.py"
    assert not CONTROL.search(text)


def one_sentence(error: UserError, about: str = "") -> None:
    said = str(error)
    assert about in said
    assert len(said) > 20
    assert "\n" not in said
    assert not CONTROL.search(said)


@FEW
@given(st.lists(any_json | st.fixed_dictionaries({"prompt": any_json, "completion": any_json}), min_size=1, max_size=4))
def test_any_rows_are_read_or_refused(rows):
    try:
        dataset, _ = load_pairs(rows)
    except UserError as error:
        one_sentence(error)
    else:
        assert all(isinstance(text, str) and text.strip() for text in dataset["completion"])


@FEW
@given(st.binary(max_size=200), st.sampled_from([".json", ".jsonl"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("bytes") / f"pairs{suffix}"
    path.write_bytes(content)
    try:
        load_pairs(path)
    except UserError as error:
        one_sentence(error, str(path))


@FEW
@given(st.dictionaries(st.sampled_from(sorted(GADConfig.__dataclass_fields__)) | any_text, any_json, max_size=3))
def test_any_settings_make_a_configuration_or_are_refused(overrides):
    try:
        config = make_config("toy", overrides)
    except UserError as error:
        one_sentence(error)
    else:
        json.dumps(config.__dict__)


@FEW
@given(any_text)
def test_any_name_of_a_preset(name):
    try:
        get_preset(name)
    except UserError as error:
        one_sentence(error)


FILES = ["config.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "audit.json"]
some_step = st.fixed_dictionaries(
    {"phase": st.just("gad") | any_text, "step": st.integers()},
    optional={"reward": st.floats(), "entropy": st.floats(allow_nan=False), "discriminator/accuracy": any_json},
)
some_sample = st.fixed_dictionaries({"prompt": any_text, "teacher": any_text, "student": any_text | any_json})
some_evaluation = st.fixed_dictionaries(
    {"metrics": st.dictionaries(st.just("honest_auc") | any_text, st.floats() | any_json, max_size=3)},
    optional={"samples": st.lists(some_sample, max_size=2)},
)


@settings(FEW, max_examples=40)
@given(st.sampled_from(FILES), st.binary(max_size=60) | any_json | some_step | some_sample | some_evaluation)
@example("metrics.jsonl", {"phase": "gad", "step": 0})  # nothing that could be drawn
def test_any_run_folder_is_reported_or_refused(tmp_path_factory, file, content):
    folder = tmp_path_factory.mktemp("run")
    RunDirectory(folder, GADConfig(), {"method": "gad"})
    if isinstance(content, bytes):
        (folder / file).write_bytes(content)
    elif file.endswith("l"):
        (folder / file).write_bytes(json.dumps(content).encode() + b"\n")
    else:
        write_json(folder / file, content)
    try:
        page = write_report(folder).read_text(encoding="utf-8")
        run = read_run(folder)
        diagnose(run["metrics"], run["evaluation"])
    except UserError as error:
        one_sentence(error)
    else:
        assert not CONTROL.search(page)
        assert "<script" not in page


@FEW
@given(any_json | st.dictionaries(any_text | st.just("state.json"), any_json, max_size=2), any_json)
def test_any_manifest_is_damaged(tmp_path_factory, manifest, record):
    folder = tmp_path_factory.mktemp("run") / "checkpoint-1"
    folder.mkdir()
    write_json(folder / MANIFEST, manifest)
    write_json(folder / "state.json", record)
    with pytest.raises(Damaged):
        load(folder)


@given(any_text)
def test_what_would_act_on_a_terminal_is_written_out(text):
    shown = visible(text)
    assert not CONTROL.search(shown)
    assert CONTROL.search(text) or shown == text or "\u061c" in text or "\u200e" in text or "\u200f" in text
