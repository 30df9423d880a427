"""The discriminator as a tool: ranking, filtering, and a reward function that TRL's own trainer runs with."""

import json
import math

import pytest
import torch
from conftest import shake, tiny_config, tiny_folder
from datasets import Dataset

from minigad.cli import main
from minigad.config import UserError
from minigad.discriminator import Discriminator
from minigad.players import save_discriminator, save_student
from minigad.reward import as_reward_function, best_of_n, filter_pairs, score_texts
from minigad.run_directory import RunDirectory
from minigad.student import Student


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("models") / "base"))


@pytest.fixture(scope="module")
def judge(base):
    config = tiny_config(student=base, discriminator="sequence")
    student = Student.load(config)
    discriminator = Discriminator.load(config, student)
    shake(discriminator.language_model, 0.2)
    torch.manual_seed(0)
    torch.nn.init.normal_(discriminator.head.weight)
    return discriminator


def alone(judge, prompt, text, finished=True) -> float:
    return judge.scores_of(judge.encode([prompt], [text], [finished])).scores.item()


def test_scores_are_those_of_texts_scored_alone(judge):
    """In any company, cut off or whole; nothing gives nothing."""
    texts, finished = ["a", "a longer", ""], [True, False, True]
    expected = [alone(judge, f"p{i}", text, done) for i, (text, done) in enumerate(zip(texts, finished, strict=True))]
    assert score_texts(judge, ["p0", "p1", "p2"], texts, finished) == pytest.approx(expected, abs=1e-5)
    assert score_texts(judge, ["p1"], ["a longer"], [True]) != pytest.approx([expected[1]], abs=1e-3)
    assert score_texts(judge, [], []) == []
    with pytest.raises(UserError, match="2 prompts, 1 completions and 1 finished flags"):
        score_texts(judge, ["p", "q"], ["a"])


def test_a_score_that_is_not_finite_is_never_passed_on(judge, monkeypatch):
    damaged = torch.nn.Linear(judge.head.in_features, 1, bias=False)
    torch.nn.init.constant_(damaged.weight, math.nan)
    monkeypatch.setattr(judge, "head", damaged)
    with pytest.raises(FloatingPointError, match="score of completion 0 is nan"):
        score_texts(judge, ["p"], ["a"])


def test_best_of_n_is_the_highest_score_of_each_prompt(judge):
    """Groups of any size; the first of equals; a cut text is another text."""
    groups = [["one", "two", "three", "one"], ["two"], ["x", "y"]]
    best = best_of_n(judge, ["p", "q", "r"], groups)
    for prompt, group, found in zip(["p", "q", "r"], groups, best, strict=True):
        expected = [alone(judge, prompt, text) for text in group]
        assert found.scores == pytest.approx(expected, abs=1e-5)
        assert found.place == expected.index(max(expected))
        assert found.completion == group[found.place]
    same = best_of_n(judge, ["p"], [["one"] * 3])[0]
    assert (same.place, len(set(same.scores))) == (0, 1)
    cut = best_of_n(judge, ["p"], [["one", "one"]], [[True, False]])[0]
    assert cut.scores == pytest.approx([alone(judge, "p", "one"), alone(judge, "p", "one", False)], abs=1e-5)
    with pytest.raises(UserError, match="prompt 1 has no candidates"):
        best_of_n(judge, ["p", "q"], [["a"], []])
    with pytest.raises(UserError, match="must match"):
        best_of_n(judge, ["p", "q"], [["a"], ["b", "c"]], [[True, True], [True]])


PAIRS = [{"prompt": f"say {i % 5}", "completion": f"{i} it is"} for i in range(12)]


def test_filter_keeps_what_is_preferred_to_the_students_samples(judge):
    """preference by hand, from the same samples; every row is in one list, and repeats are counted."""
    long = {"prompt": "say 1", "completion": "longer than twelve tokens"}
    done = filter_pairs(judge, [*PAIRS, PAIRS[0], long], at_least=0.4, num_generations=3, seed=5)
    rows = {(row["prompt"], row["completion"]): row for row in [*done.kept, *done.dropped]}
    assert len(rows) == 13 == len(done.kept) + len(done.dropped)
    assert done.kept and done.dropped
    prompts = [pair["prompt"] for pair in [*PAIRS, long]]
    rollouts = judge.student.generate(prompts, judge.config, seed=5, num_generations=3)
    for i, pair in enumerate(PAIRS):
        row, mine = rows[pair["prompt"], pair["completion"]], range(3 * i, 3 * i + 3)
        theirs = [alone(judge, pair["prompt"], rollouts.texts[k], rollouts.finished[k]) for k in mine]
        score = alone(judge, pair["prompt"], pair["completion"])
        preference = sum(1 / (1 + math.exp(other - score)) for other in theirs) / 3
        assert row["score"] == pytest.approx(score, abs=1e-5)
        assert row["preference"] == pytest.approx(preference, abs=1e-5)
        assert (row in done.kept) == (row["preference"] >= 0.4)
    assert (done.cut, done.repeats) == (1, 1)
    assert done.lines() == [
        f"Read 14 pairs: kept {len(done.kept)}, dropped {len(done.dropped)} with a preference below 0.4.",
        "Left out as an exact repeat of an earlier row: 1 row.",
        "Judged by the beginning, being longer than max_completion_length: 1.",
    ]


@pytest.mark.parametrize(("changes", "words"), [({"at_least": 1.5}, "1.5"), ({"num_generations": 0}, "at least 1")])
def test_filter_refuses_what_means_nothing(judge, changes, words):
    with pytest.raises(UserError, match=words):
        filter_pairs(judge, PAIRS, **changes)


def test_filter_does_not_call_a_pair_bad_whose_score_is_not_a_number(judge, monkeypatch):
    """Of pairs alone, as where a long one overflows: the samples' scores are fine."""
    whole = judge.scores_of

    def scores_of(rows):
        found = whole(rows)
        return found._replace(scores=torch.full_like(found.scores, math.nan)) if len(rows) == 2 else found

    monkeypatch.setattr(judge, "scores_of", scores_of)
    with pytest.raises(FloatingPointError, match="score of completion 0 is nan"):
        filter_pairs(judge, PAIRS[:2], num_generations=3)


def test_reward_function_reads_both_of_trls_forms(judge):
    reward = as_reward_function(judge)
    plain = reward(prompts=["say a", "say b"], completions=["a", "bc"], completion_ids=[[1], [2]], extra=[1, 2])
    assert plain == pytest.approx([alone(judge, "say a", "a"), alone(judge, "say b", "bc")], abs=1e-5)
    talks = [[{"role": "user", "content": prompt, "tool_calls": None}] for prompt in ("say a", "say b")]
    answers = [[{"role": "assistant", "content": text}] for text in ("a", "bc")]
    assert reward(prompts=talks, completions=answers) == plain
    assert all(type(value) is float for value in plain)


def test_reward_function_knows_a_cut_completion_by_its_ids(judge):
    end = judge.student.tokenizer.eos_token_id
    reward = as_reward_function(judge, end_token_id=end)
    both = reward(prompts=["p", "p", "p"], completions=["a", "a", ""], completion_ids=[[70, end], [70], []])
    expected = [alone(judge, "p", "a"), alone(judge, "p", "a", False), alone(judge, "p", "")]
    assert both == pytest.approx(expected, abs=1e-5)
    assert both[0] != both[1]
    assert reward(prompts=["p"], completions=["a"]) == pytest.approx([expected[0]], abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "completion", "words"),
    [
        ("p", [{"role": "assistant", "content": None, "tool_calls": []}], "completion 0 is 'None'"),
        ("p", [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}], "one message of text"),
        ("p", [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}], "one message of text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a", "prompt 0 is"),
    ],
)
def test_reward_function_refuses_what_it_cannot_read(judge, prompt, completion, words):
    with pytest.raises(UserError, match=words):
        as_reward_function(judge)(prompts=[prompt], completions=[completion])


@pytest.mark.filterwarnings("ignore::Warning")  # TRL's, and those of what it imports
@pytest.mark.parametrize("conversational", [False, True])
def test_trl_trains_two_steps_on_the_discriminators_scores(judge, base, conversational, tmp_path, monkeypatch):
    """GRPOTrainer's logged reward is the mean of the scores; the policy moves, the discriminator does not."""
    trl = pytest.importorskip("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = [f"say {i}" for i in range(4)]
    rows = [{"prompt": [{"role": "user", "content": p}] if conversational else p} for p in prompts]
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
    )  # fmt: skip
    given = []
    score = as_reward_function(judge, end_token_id=judge.student.tokenizer.eos_token_id)

    def watched(prompts, completions, **columns):
        given.append(score(prompts, completions, **columns))
        return given[-1]

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=watched, args=args, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in judge.weights().items()}
    start = [parameter.clone() for parameter in model.parameters()]
    trainer.train()
    logged = [step["reward"] for step in trainer.state.log_history if "reward" in step]
    assert logged == pytest.approx([sum(some) / len(some) for some in given], abs=1e-3)
    assert len(given) == 2
    assert all(len(set(some)) > 1 for some in given)
    assert any(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in judge.weights().items())


def test_commands_rerank_and_filter_work_on_a_run(judge, tmp_path, capsys):
    folder = tmp_path / "run"
    RunDirectory(folder, judge.config, {"method": "gad"})
    save_student(judge.student, folder / "student", judge.config, "gad")
    save_discriminator(judge, folder / "discriminator")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    out, dropped, pairs = (str(tmp_path / f"{name}.jsonl") for name in ("out", "dropped", "pairs"))
    assert main(["rerank", str(folder), "--prompts", pairs, "--out", out, "--num-generations", "3"]) == 0
    best = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in best] == [pair["prompt"] for pair in PAIRS]
    sampled = judge.student.generate([p["prompt"] for p in PAIRS], judge.config, seed=0, num_generations=3)
    for i, row in enumerate(best):
        texts, flags = sampled.texts[3 * i : 3 * i + 3], sampled.finished[3 * i : 3 * i + 3]
        scores = [alone(judge, row["prompt"], *one) for one in zip(texts, flags, strict=True)]
        assert row["score"] == pytest.approx(max(scores), abs=1e-5)
    keep = ["filter", str(folder), "--data", pairs, "--out", out, "--dropped", dropped, "--at-least", "0.4"]
    assert main(keep) == 0
    lines = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("out", "dropped")]
    assert f"Read 12 pairs: kept {len(lines[0])}, dropped {len(lines[1])} with" in capsys.readouterr().out
    assert len(lines[0]) + len(lines[1]) == 12
    assert main([*keep, "--dropped", out]) == 2
    assert "name two files" in capsys.readouterr().err
    assert main([*keep, "--out", str(tmp_path / "nowhere" / "x.jsonl")]) == 2
    assert "name a .jsonl file in a folder that exists" in capsys.readouterr().err
