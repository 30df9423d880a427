"""What a student was trained on is known again: refused where it is chosen, counted and said where it is measured."""

import hashlib
import json
import re
import shutil

import pytest
from test_judging import TRAIN, choose, chosen, folder, judge, made, records, run  # noqa: F401  fixtures among them

from minigad.chat import prompt_text
from minigad.cli import main
from minigad.config import UserError
from minigad.data import write_jsonl
from minigad.run import read_run
from minigad.trained_on import text_key, trained_among, write_trained_on

CONVERSATION = [{"role": "user", "content": "say  1"}]


def test_prompts_that_read_the_same_are_the_same(tmp_path):
    """White space aside, as text or as one user message; a longer conversation is another prompt."""
    longer = [*CONVERSATION, {"role": "assistant", "content": "1"}, {"role": "user", "content": "say 1"}]
    write_trained_on(tmp_path, ["say 1", "say\n2"])
    asked = ["say 1 ", CONVERSATION, "say 2", "say 3", longer, "Say 1"]
    assert trained_among(tmp_path, asked) == ["say 1 ", CONVERSATION, "say 2"]
    assert prompt_text(CONVERSATION) == "say  1"
    assert text_key("user: say 1") == text_key(CONVERSATION), "as evaluations of older versions have it"
    write_trained_on(tmp_path, [longer])
    assert trained_among(tmp_path, asked) == [longer]


def test_the_list_is_written_once_a_prompt_and_holds_no_prompt(tmp_path):
    write_trained_on(tmp_path, ["b", "a", "b"])
    digits = sorted(hashlib.sha256(prompt).hexdigest()[:12] for prompt in (b"a", b"b"))
    assert (tmp_path / "trained_on.txt").read_text().splitlines() == digits
    write_trained_on(tmp_path, [])
    assert trained_among(tmp_path, ["a"]) == []


def test_a_run_without_a_list_and_a_damaged_one_are_told_apart(tmp_path):
    assert trained_among(tmp_path, ["a"]) is None
    write_trained_on(tmp_path, ["a", "b"])
    path = tmp_path / "trained_on.txt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged: its lines are not 12 hexadecimal digits"):
        trained_among(tmp_path, ["a"])


def test_nobody_chooses_on_what_was_trained_on(folder, capsys):  # noqa: F811
    """One prompt in twelve is enough, written as a conversation too; nothing is written."""
    write_jsonl(folder / "mixed.jsonl", [{"prompt": f"say {i}", "completion": "x"} for i in range(23, 35)])
    assert choose(folder, "--measure", "nll", data="mixed") == 2
    message = capsys.readouterr().err
    assert "1 of the 12 prompts of" in message and "were trained on in" in message and "'say 23'" in message
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "completion": "x"} for i in range(23, 35)]
    write_jsonl(folder / "mixed.jsonl", rows)
    assert choose(folder, "--measure", "nll", data="mixed") == 2
    assert "were trained on in" in capsys.readouterr().err
    assert not (folder / "chosen").exists()


def test_the_chosen_student_still_knows_what_it_was_trained_on(folder, capsys):  # noqa: F811
    assert choose(folder, "--measure", "nll", "--length-band", "0", "100") == 0
    assert "trained_on" not in capsys.readouterr().out
    assert main(["evaluate", str(folder / "chosen"), "--data", str(folder / "train.jsonl")]) == 0
    assert read_run(folder / "chosen")["evaluation"]["trained_on"] == 24
    assert chosen(folder)["chosen"]


def test_measuring_on_what_was_trained_on_is_said_and_counted(folder, judge, capsys):  # noqa: F811
    """In the lines, in the record of the metrics and of the judge, and in the report; of an opponent in the lines."""
    rows = [*TRAIN[:3], *({"prompt": f"say {i}", "completion": "x"} for i in range(300, 309))]
    write_jsonl(folder / "mixed.jsonl", rows)
    shutil.copytree(folder / "run", folder / "twin")
    assert run(folder, "--greedy", "--against", folder / "twin", data="mixed") == 0
    said = re.findall(r"WARNING: the student of (\S+) was trained on 3 of the 12 prompts", capsys.readouterr().out)
    assert said == [str(folder / "run"), str(folder / "twin")]
    assert read_run(folder / "run")["evaluation"]["trained_on"] == 3
    assert records(folder)[0]["trained_on"] == 3
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("The student was trained on 3 of these prompts.") == 2
    assert run(folder, "--greedy") == 0
    assert "trained on" not in capsys.readouterr().out
    assert read_run(folder / "run")["evaluation"]["trained_on"] == 0


def test_an_older_run_says_that_nobody_knows(folder, judge, capsys):  # noqa: F811
    (folder / "run" / "trained_on.txt").unlink()
    note = f"note: {folder / 'run'} has no trained_on.txt (an older minigad made it)"
    assert run(folder, "--greedy", data="train") == 0
    assert note in capsys.readouterr().out
    assert records(folder)[0]["trained_on"] is None
    assert choose(folder, "--measure", "nll", "--length-band", "0", "100") == 0
    assert note in capsys.readouterr().out
    assert not (folder / "chosen" / "trained_on.txt").exists()


def test_a_list_that_is_not_the_runs_is_not_written_over(made, tmp_path):  # noqa: F811
    """A folder without a run that holds the name already."""
    from minigad.config import GADConfig
    from minigad.run import RunDirectory

    (tmp_path / "trained_on.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run but trained_on"):
        RunDirectory(tmp_path, GADConfig(), {})
    assert json.loads((made / "run" / "config.json").read_text())["train_rows"] == 24
    assert len((made / "run" / "trained_on.txt").read_text().split()) == 24
