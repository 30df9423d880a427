"""Formats in and out: Alpaca, ShareGPT, CSV, Parquet, folders, hub data sets; prompts alone; TRL's preferences."""

import csv
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict, are_progress_bars_disabled

from minigad.config import UserError
from minigad.data import load_pairs, read_jsonl, stream_prompts, to_preferences, write_jsonl
from minigad.export import check_out, write_pairs


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TURNS = [{"from": "system", "value": ""}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
FORMS = [
    ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n\n1 and 2", "3"),
    ({"instruction": "Sing.", "input": "", "output": "La."}, "Sing.", "La."),
    ({"instruction": "Sing.", "output": "La."}, "Sing.", "La."),
    ({"conversations": TURNS}, [{"role": "system", "content": ""}, user("a")], "b"),
    ({"conversations": [user("a"), assistant("b")]}, [user("a")], "b"),
    (
        {"conversations": [*TURNS, {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
        [{"role": "system", "content": ""}, user("a"), assistant("b"), user("c")],
        "d",
    ),
]


@pytest.mark.parametrize(("row", "prompt", "completion"), FORMS)
def test_forms_of_others(row, prompt, completion):
    """Alpaca's and ShareGPT's rows become pairs, and prompts alone; no column of theirs counts as ignored."""
    dataset, report = load_pairs([row])
    assert dataset.to_list() == [{"prompt": prompt, "completion": completion}]
    assert report.extra_columns == {}
    assert list(stream_prompts([row])) == [("list[0]", prompt)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": [{"from": "tool", "value": "a"}]}, "'conversations[0].from' is 'tool'; it must be one of"),
        ({"conversations": [{"from": "human", "value": None}]}, "'conversations[0].content' is null"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "'conversations' is"),
        ({"conversations": []}, "'conversations' is []"),
        ({"conversations": "a"}, "'conversations' is 'a'"),
        ({"instruction": "a", "input": 5, "output": "b"}, "'input' is 5 (type int)"),
        ({"instruction": "a"}, "'output' is missing"),
    ],
)
def test_bad_rows_of_those_forms(row, words):
    with pytest.raises(UserError) as caught:
        load_pairs([row])
    assert str(caught.value).startswith("list[0]: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a"}, "a"),
        ({"prompt": [user("a")]}, [user("a")]),
        ({"content": "a"}, "a"),
        ({"messages": [user("a")]}, [user("a")]),
        ({"messages": [user("a"), assistant("b")]}, [user("a")]),
        ({"messages": [user("a"), assistant("b"), user("c")]}, [user("a"), assistant("b"), user("c")]),
        ({"instruction": "a", "input": "b"}, "a\n\nb"),
        ({"prompt": "a", "completion": "ignored"}, "a"),
    ],
)
def test_prompts_alone(row, prompt):
    assert list(stream_prompts([row])) == [("list[0]", prompt)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "no prompt among ['text']"),
        ({"prompt": ""}, "'prompt' is ''"),
        ({"messages": [assistant("a")]}, "end of the prompt in field 'messages'"),
        ("a", "the row is 'a'"),
    ],
)
def test_rows_without_a_prompt(row, words):
    with pytest.raises(UserError) as caught:
        list(stream_prompts([row]))
    assert words in str(caught.value)


PAIRS = [{"prompt": 'a, "b"\nc', "completion": "x\r\ny é 🎈"}, {"prompt": "d", "completion": "e"}]
CONVERSATIONS = [{"prompt": [user("a"), assistant("b"), user("c")], "completion": "d"}]


def test_csv(tmp_path):
    """Quotes, line breaks and a byte-order mark are read as spreadsheets write them."""
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(PAIRS)
    assert load_pairs(tmp_path / "a.csv")[0].to_list() == PAIRS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"prompt,completion\na,b\nc,d,e\n", "a.csv:3: the row has more fields than the header"),
        (b"prompt,completion\na\n", "a.csv:2: the row has fewer fields"),
        (b"prompt,completion\na,\n", "a.csv:2: field 'completion' is ''"),
        (b'prompt,completion\na,"b\n', "a.csv:2: invalid CSV"),
        (b"prompt,completion\n\xe9,b\n", "not UTF-8"),
        (b"", "there are no rows"),
    ],
)
def test_bad_csv(tmp_path, data, words):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_pairs(tmp_path / "a.csv")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder"])
@pytest.mark.parametrize("rows", [PAIRS, CONVERSATIONS, [*PAIRS, *CONVERSATIONS]])
def test_what_is_written_is_read_back(tmp_path, name, rows):
    """All three forms out, written twice, hold what load_pairs makes of the rows; nothing else is left in the folder."""
    for _ in range(2):
        assert write_pairs(tmp_path / name, iter(rows)) == len(rows)
    assert load_pairs(tmp_path / name)[0].to_list() == load_pairs(rows)[0].to_list()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_no_rows_can_be_written_too(tmp_path, name):
    """Except as a folder, which datasets cannot read."""
    assert write_pairs(tmp_path / name, []) == 0
    with pytest.raises(UserError, match="there are no rows in it"):
        load_pairs(tmp_path / name)
    with pytest.raises(UserError, match="no row is left to write"):
        write_pairs(tmp_path / "folder", [])
    assert not are_progress_bars_disabled(), "the user's bars are as they were"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def broken():
        yield PAIRS[0]
        raise RuntimeError("stop")

    for name in ("a.jsonl", "a.parquet", "folder"):
        write_pairs(tmp_path / name, PAIRS)
        with pytest.raises(RuntimeError):
            write_pairs(tmp_path / name, broken())
        assert len(load_pairs(tmp_path / name)[0]) == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_parquet_of_others(tmp_path):
    """Extra columns are named; a broken file and a bad row are one sentence."""
    Dataset.from_list([{**PAIRS[0], "id": 1}]).to_parquet(tmp_path / "a.parquet")
    assert load_pairs(tmp_path / "a.parquet")[1].extra_columns == {"id": 1}
    Dataset.from_list([PAIRS[0], {"prompt": "", "completion": "c"}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: field 'prompt' is ''"):
        load_pairs(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"hello")
    with pytest.raises(UserError, match="cannot read Parquet after row 0"):
        load_pairs(tmp_path / "a.parquet")


def test_a_folder_of_splits_asks_for_one(tmp_path):
    DatasetDict({"train": Dataset.from_list(PAIRS)}).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match="has the splits train; give the folder of one"):
        load_pairs(tmp_path / "d")
    assert load_pairs(tmp_path / "d" / "train")[0].to_list() == PAIRS


def test_a_hub_data_set_by_name(monkeypatch):
    """The authors' data set is streamed by its name; a split may follow a colon; what fails is one sentence."""
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        if "missing" in name:
            raise datasets.exceptions.DatasetNotFoundError("it does not exist\non the hub")
        return Dataset.from_list([{"content": "a", "teacher_response": "b"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    name = "ytz20/LMSYS-Chat-GPT-5-Chat-Response"
    assert load_pairs(name)[0].to_list() == [{"prompt": "a", "completion": "b"}]
    assert load_pairs(f"{name}:test")[1].source == f"{name}:test"
    assert asked == [(name, "train", True), (name, "test", True)]
    with pytest.raises(UserError, match=r"cannot be had as a data set of the hub .it does not exist on the hub."):
        load_pairs("missing/data")
    with pytest.raises(UserError, match="there is no such file"):
        load_pairs("missing/data.jsonl")
    assert load_pairs(Dataset.from_list(PAIRS).to_iterable_dataset())[0].to_list() == PAIRS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.txt", "cannot write the file ending '.txt'"),
        ("no/a.jsonl", "there is no folder"),
        ("d.jsonl", "is a folder"),
        ("f", "is no folder of datasets"),
    ],
)
def test_bad_outputs_are_found_at_the_door(tmp_path, name, words):
    (tmp_path / "d.jsonl").mkdir()
    (tmp_path / "f").mkdir()
    with pytest.raises(UserError, match=words):
        check_out(tmp_path / name)


def test_preferences_are_what_trl_reads():
    """prompt, chosen, rejected in TRL's two forms; equal completions are left out."""
    trl = pytest.importorskip("trl.data_utils")
    rows = to_preferences(PAIRS, ["other", "e"])
    assert rows == [{"prompt": PAIRS[0]["prompt"], "chosen": PAIRS[0]["completion"], "rejected": "other"}]
    assert not trl.is_conversational(rows[0])
    assert trl.is_conversational(to_preferences(CONVERSATIONS, ["other"])[0])
    with pytest.raises(ValueError, match="shorter"):
        to_preferences(PAIRS, ["one"])


def test_json_lists_and_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a"}]))
    assert list(stream_prompts(tmp_path / "a.json")) == [(f"{tmp_path}/a.json, row 1 of the list", "a")]
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a"}])
    assert list(stream_prompts(str(tmp_path / "b.jsonl"))) == [(f"{tmp_path}/b.jsonl:1", "a")]
    assert read_jsonl(tmp_path / "b.jsonl") == [{"prompt": "a"}]
