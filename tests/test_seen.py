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
from minigad.reading import read_run
from minigad.seen import add_seen, seen_among, text_key

CONVERSATION = [{"role": "user", "content": "say  1"}]


def test_prompts_that_read_the_same_are_the_same(tmp_path):
    """White space aside, as text or as one user message; a longer conversation is another prompt."""
    longer = [*CONVERSATION, {"role": "assistant", "content": "1"}, {"role": "user", "content": "say 1"}]
    add_seen(tmp_path / "trained_on.txt", ["say 1", "say\n2"])
    asked = ["say 1 ", CONVERSATION, "say 2", "say 3", longer, "Say 1"]
    assert seen_among(tmp_path / "trained_on.txt", asked) == ["say 1 ", CONVERSATION, "say 2"]
    assert prompt_text(CONVERSATION) == "say  1"
    assert text_key("user: say 1") == text_key(CONVERSATION), "as evaluations of older versions have it"
    assert seen_among(tmp_path / "other.txt", asked) is None
    add_seen(tmp_path / "other.txt", [longer])
    assert seen_among(tmp_path / "other.txt", asked) == [longer]


def test_the_list_is_written_once_a_prompt_and_holds_no_prompt(tmp_path):
    add_seen(tmp_path / "trained_on.txt", ["b", "a", "b"])
    digits = sorted(hashlib.sha256(prompt).hexdigest()[:12] for prompt in (b"a", b"b"))
    assert (tmp_path / "trained_on.txt").read_text().splitlines() == digits
    add_seen(tmp_path / "trained_on.txt", ["c", "a"])
    assert seen_among(tmp_path / "trained_on.txt", ["a", "b", "c", "d"]) == ["a", "b", "c"], (
        "what is added joins the rest"
    )
    add_seen(tmp_path / "empty.txt", [])
    assert seen_among(tmp_path / "empty.txt", ["a"]) == []


def test_a_run_without_a_list_and_a_damaged_one_are_told_apart(tmp_path):
    assert seen_among(tmp_path / "trained_on.txt", ["a"]) is None
    add_seen(tmp_path / "trained_on.txt", ["a", "b"])
    path = tmp_path / "trained_on.txt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged: its lines are not 12 hexadecimal digits"):
        seen_among(tmp_path / "trained_on.txt", ["a"])


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
    from minigad.run_directory import RunDirectory

    (tmp_path / "trained_on.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run but trained_on"):
        RunDirectory(tmp_path, GADConfig(), {})
    assert json.loads((made / "run" / "config.json").read_text())["train_rows"] == 24
    assert len((made / "run" / "trained_on.txt").read_text().split()) == 24


def test_nobody_chooses_on_what_was_ever_tested_on(folder, judge, capsys):  # noqa: F811
    """The samples of the run's own evaluation make room for those of the next; prompts of a set never were among them."""
    write_jsonl(folder / "set.jsonl", [{"prompt": "say 205"}])
    assert run(folder, "--set", folder / "set.jsonl", "--greedy", data=None) == 0
    assert run(folder, "--greedy", data="train") == 0
    assert read_run(folder / "run")["evaluation"]["samples"][0]["prompt"] == "say 0"
    for data, words in (("heldout", "12 prompts of"), ("validation", "1 of the 12 prompts of")):
        assert choose(folder, "--measure", "nll", data=data) == 2
        message = capsys.readouterr().err
        assert words in message and "measured on before" in message
    assert not (folder / "chosen").exists()


def test_a_dry_run_is_no_test(folder, judge):  # noqa: F811
    assert run(folder, "--dry-run") == 0
    assert not (folder / "run" / "tested_on.txt").exists()


def test_the_report_is_not_left_behind_by_a_judge_that_was_stopped(folder, judge, capsys):  # noqa: F811
    """New metrics are in evaluation.json then, and so in the report."""
    before = (folder / "run" / "report.html").read_text(encoding="utf-8")
    flags = ["--greedy", "--price", "1", "1", "--judge-max-tokens", "10", "--budget", "0.001"]
    assert run(folder, *flags, data="train") == 1
    after = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "of 24 held-out prompts" in after and "of 24 held-out prompts" not in before
