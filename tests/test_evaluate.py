"""The measures against truths computed another way: by hand, by counting pairs, by scikit-learn, in closed form."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score

from minigad import evaluate as measures
from minigad.chat import Row, encode
from minigad.config import PRESETS
from minigad.evaluate import (
    bayes_auc,
    distinct_n,
    evaluate,
    heldout_nll,
    honest_discriminator,
    length_stats,
    ngram_f1,
    ngram_overlap,
    teacher_ceiling,
    words_of,
)
from minigad.student import Student
from minigad.toy import letters
from minigad.toy.letters import LettersTeacher, letters_metrics, letters_prompts, letters_tokenizer

CONFIG = PRESETS["toy"].replace(max_completion_length=16)
WORDS = ["red", "green", "blue", "one", "two", "three", "fox", "dog"]


def pairs(*rows):
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])


def exact_logprob(prompts, texts, finished):
    return [LettersTeacher().logprob(*one) for one in zip(prompts, texts, finished, strict=True)]


@pytest.fixture(scope="module")
def student():
    return Student.load(CONFIG, tokenizer=letters_tokenizer())


# --- texts ---


def test_words():
    """Case and punctuation do not count; a digit and an accent do."""
    assert words_of("Ça va, 2 cats?\n- No!") == ["ça", "va", "2", "cats", "no"]


def test_f1_by_hand():
    """Counts are clipped: "the cat" twice in the reference, once in the candidate, is one match."""
    candidate, reference = "the cat sat on the mat", "The cat, the cat on a mat!"
    assert ngram_f1(candidate, [reference], 1) == pytest.approx(2 * 5 / (6 + 7))
    assert ngram_f1(candidate, [reference], 2) == pytest.approx(2 * 1 / (5 + 6))
    assert ngram_f1(candidate, ["a dog", reference], 1) == pytest.approx(10 / 13)


def test_f1_of_short_texts():
    """A text without n-grams overlaps with nothing, not even with itself; an empty candidate is no error."""
    assert ngram_f1("a b", ["a b"], 2) == 1
    assert ngram_f1("a b", ["a b"], 3) == 0
    assert ngram_f1("", ["a b"], 1) == 0


def test_overlap_is_mean_over_candidates():
    """One candidate agrees wholly, one not at all, each against its own references."""
    overlap = ngram_overlap(["a b c d e f", "x"], [["a b c d e f"], ["y", "z"]])
    assert overlap == {f"f1_{n}": 0.5 for n in range(1, 7)}


def test_distinct_by_hand():
    """Counted over all texts together, but no n-gram reaches from one text into the next."""
    assert distinct_n(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct_n(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a"], 2) == 0


def test_length_stats_by_hand():
    """Lengths are in tokens of the completion, the prompt does not count."""
    rows = [Row((1, 2, 3), (4,)), Row((1,), (4, 5, 6))]
    assert length_stats(rows, [True, False]) == {"mean_length": 2.0, "clipped_ratio": 0.5}


# --- likelihoods ---


def test_nll_is_token_mean(student):
    """Against transformers' own logits, one row at a time; rows of 3 and 8 tokens weigh 3 and 8. The end token counts."""
    rows = [("abc", "ab"), ("bdfh", "b,d,f,h")]
    total, tokens = 0.0, 0
    for prompt, completion in rows:
        row = encode(student.tokenizer, prompt, completion)
        assert row.completion_ids[-1] == student.tokenizer.eos_token_id
        with torch.no_grad():
            logits = student.model(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0].double()
        predicted = logits.log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
        total -= predicted[range(len(row.completion_ids)), list(row.completion_ids)].sum().item()
        tokens += len(row.completion_ids)
    assert tokens == 11
    assert heldout_nll(student, pairs(*rows), CONFIG) == pytest.approx(total / tokens, rel=1e-5)


def test_bayes_auc_counts_pairs():
    """Ties count half and infinities compare; scikit-learn agrees on random integers."""
    assert bayes_auc(torch.tensor([1.0, 2.0, torch.inf]), torch.tensor([1.0, 0.0])) == pytest.approx(5.5 / 6)
    teacher, ours = (torch.randint(9, (n,), generator=torch.Generator().manual_seed(n)) for n in (50, 31))
    expected = roc_auc_score([1] * 50 + [0] * 31, torch.cat([teacher, ours]).numpy())
    assert bayes_auc(teacher, ours) == pytest.approx(expected)
    with pytest.raises(AssertionError, match="not a number"):
        bayes_auc(torch.tensor([1.0, math.nan]), torch.tensor([1.0]))


def test_bayes_auc_of_two_gaussians():
    """For N(d, 1) against N(0, 1) the log-ratio is dx - d²/2, and its AUC is Phi(d / sqrt 2)."""
    generator, d = torch.Generator().manual_seed(0), 1.3
    teacher, ours = torch.randn(100_000, generator=generator) + d, torch.randn(100_000, generator=generator)
    expected = torch.special.ndtr(torch.tensor(d / math.sqrt(2))).item()
    assert bayes_auc(d * teacher - d * d / 2, d * ours - d * d / 2) == pytest.approx(expected, abs=0.003)


# --- the honest discriminator ---


def random_texts(rng, num_prompts, num):
    return [[" ".join(rng.choice(WORDS, size=rng.integers(2, 5))) for _ in range(num)] for _ in range(num_prompts)]


def word_counts(texts):
    return np.array([[text.split().count(word) for word in WORDS] for text in texts])


@pytest.mark.parametrize(("features", "num_prompts", "runs"), [(word_counts, 80, 20), (None, 30, 10)])
def test_honest_auc_of_equal_distributions(features, num_prompts, runs):
    """Both sides drawn from one distribution again and again: AUC and accuracy are 0.5 on average, whatever the folds."""
    rng = np.random.default_rng(2)
    draws = [(random_texts(rng, num_prompts, 2), random_texts(rng, num_prompts, 2)) for _ in range(runs)]
    results = [honest_discriminator(*draw, seed=i, features=features) for i, draw in enumerate(draws)]
    assert np.mean([result["honest_auc"] for result in results]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([result["honest_accuracy"] for result in results]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("teacher", "ours"),
    [("{}", "{:title}"), ("{}.", "{}!"), ("{}\nx", "{}\n\nx"), ("{}", ""), ("{}", "{0} {0} {0}"), ("{} a b", "{} b a")],
    ids=["case", "punctuation", "paragraph", "empty", "length", "order"],
)
def test_honest_auc_of_different_texts(teacher, ours):
    """Case, the last mark, an empty line, no text, length, the order of two words: each alone gives the sides away."""
    rng = np.random.default_rng(0)

    def written(form):
        title, form = ":title" in form, form.replace(":title", "")
        texts = [[form.format(text) for text in texts] for texts in random_texts(rng, 40, 2)]
        return [[text.title() for text in group] for group in texts] if title else texts

    result = honest_discriminator(written(teacher), written(ours))
    assert result["honest_auc"] > 0.95
    assert result["honest_accuracy"] > 0.85
    assert result["honest_auc_low"] <= result["honest_auc"] <= result["honest_auc_high"]


def test_constant_features_are_chance():
    """With nothing to go by all scores of a fold are equal: exactly 0.5, however many texts a prompt and a side have."""
    teacher, ours = [["abcd"] * (1 + i % 3) for i in range(13)], [["efgh"] * (3 - i % 2) for i in range(13)]
    result = honest_discriminator(teacher, ours, features=lambda texts: np.ones((len(texts), 2)))
    assert set(result.values()) == {0.5}


def test_no_prompt_is_on_both_sides():
    """Features that name prompt and side would give 1.0 to a classifier tested on prompts it was trained on."""

    def memory(texts):
        vocabulary = sorted(set(texts))
        return np.eye(len(vocabulary))[[vocabulary.index(text) for text in texts]]

    teacher, ours = [[f"t{i:02d}"] * 4 for i in range(20)], [[f"s{i:02d}"] * 4 for i in range(20)]
    assert honest_discriminator(teacher, ours, features=memory)["honest_auc"] == pytest.approx(0.5)


def test_interval_is_over_prompts():
    """Five copies of each text are no new evidence; a bootstrap over texts would find a narrower interval."""
    rng = np.random.default_rng(0)

    def value(texts):
        return np.array([[float(text)] for text in texts])

    def copies(values, num):
        return [[f"{x:+.4f}"] * num for x in values]

    teacher, ours = rng.normal(0.7, 1, 30), rng.normal(0, 1, 30)
    one, five = (honest_discriminator(copies(teacher, n), copies(ours, n), features=value) for n in (1, 5))
    assert one == pytest.approx(five)
    assert 0.1 < one["honest_auc_high"] - one["honest_auc_low"] < 0.4


def test_auc_is_mean_of_folds_against_sklearn():
    """Fold offsets of 100 change nothing; a draw that has prompt 0 twice equals scikit-learn on doubled texts."""
    rng = np.random.default_rng(0)
    prompt, fold = np.repeat(np.arange(8), 3), np.repeat([0, 1], 12)
    teacher, ours = (rng.integers(6, size=24) + shift + 100.0 * fold for shift in (1, 0))
    auc, draws = measures._auc_with_draws(teacher, ours, prompt, fold, rng)
    folds = [np.concatenate([teacher[fold == k], ours[fold == k]]) for k in (0, 1)]
    label = np.repeat([1, 0], 12)
    assert auc == pytest.approx(np.mean([roc_auc_score(label, scores) for scores in folds]))
    assert draws.mean() == pytest.approx(auc, abs=0.02)
    wins, sizes = measures._wins(teacher[:12], ours[:12], prompt[:12])
    drawn = np.concatenate([np.arange(6), np.arange(3), np.arange(9, 12)])  # prompts 0 1 0 3
    expected = roc_auc_score(label, np.concatenate([teacher[drawn], ours[drawn]]))
    assert measures._auc(wins, sizes, np.array([[2, 1, 0, 1]])) == pytest.approx(expected)


def test_scikit_learn_fits_without_warning_on_odd_texts():
    """Huge length, one character, only punctuation, no text: converges, and no vocabulary is empty (warnings are errors)."""
    odd = [["x" * 5000], ["?"], [""], ["..."], [" "], ["\n\n"]]
    assert 0 <= honest_discriminator(odd, odd[::-1])["honest_auc"] <= 1
    assert honest_discriminator([[""]] * 4, [[""]] * 4)["honest_auc"] == 0.5


def test_ceiling_halves_are_random_and_disjoint():
    """The first of a prompt's two texts is always short: halves by order would give 1, one text in both halves 0.5 always.

    A prompt with a single text is left out.
    """
    texts = [["a", "bbbb"] for _ in range(40)] + [["c" * 99]]
    ceilings = [teacher_ceiling(texts, seed=seed, features=lambda t: np.zeros((len(t), 1))) for seed in range(20)]
    assert np.mean(ceilings) == pytest.approx(0.5, abs=0.06)
    assert np.std(ceilings) > 0.01


def test_ceiling_limits_texts(monkeypatch):
    """Six texts a prompt make halves of three, or of as many as are asked for, and no text twice."""
    halves = []
    monkeypatch.setattr(measures, "honest_discriminator", lambda a, b, **_: halves.append((a, b)) or {"honest_auc": 0})
    for limit in (None, 2):
        teacher_ceiling([list("abcdef")], max_texts=limit)
    assert [len(half[0]) for both in halves for half in both] == [3, 3, 2, 2]
    assert sorted(halves[0][0][0] + halves[0][1][0]) == list("abcdef")


# --- everything at once ---


def test_divergences_against_the_letters_world(student, monkeypatch):
    """Same seed and samples: KL(S||T) and entropy equal letters_metrics'; KL(T||S) over all 16 ways equals its exact sum.

    The exact sum leaves out the teacher's noise, which adds log(0.999) to each log-probability.
    """
    prompts, temperature = letters_prompts("heldout")[:50], 0.8
    monkeypatch.setattr(letters, "letters_prompts", lambda split: prompts)
    orders = [(p, p[::-1], "".join(sorted(p)), "".join(sorted(p, reverse=True))) for p in prompts]
    ways = [c.join(order) + end for o in orders for order in o for c in ("", ",") for end in ".!"]
    dataset = pairs(*zip([p for p in prompts for _ in range(16)], ways, strict=True))
    metrics, samples = evaluate(
        student, dataset, CONFIG, num_samples=2, temperature=temperature, seed=3, teacher_logprob=exact_logprob
    )
    expected = letters_metrics(student, CONFIG, "heldout", temperature, samples=2, seed=3)
    assert metrics["kl_student_teacher"] == pytest.approx(expected["kl_student_teacher"], rel=1e-6)
    assert metrics["sequence_entropy"] == pytest.approx(expected["entropy"], rel=1e-6)
    assert metrics["entropy"] == pytest.approx(expected["entropy"] / expected["mean_length"], rel=1e-6)
    assert metrics["mean_length"] == pytest.approx(expected["mean_length"])
    assert metrics["kl_teacher_student"] == pytest.approx(expected["kl_teacher_student"] + math.log(0.999), abs=1e-4)
    assert metrics["bayes_auc"] > 0.99
    assert metrics["teacher_clipped_ratio"] == 0
    assert len(samples) == 100
    assert samples[3]["prompt"] == prompts[1]
    assert samples[3]["teacher"] == ways[17]
    assert np.mean([not sample["finished"] for sample in samples]) == pytest.approx(metrics["clipped_ratio"])


def test_honest_measures_of_an_untrained_student(student):
    """Noise is told from the teacher's text; the ceiling is the teacher's own halves', as many texts as were sampled."""
    rows = [(prompt, prompt + end) for prompt in letters_prompts("heldout")[:20] for end in (".", "!", ",", "")]
    metrics, _ = evaluate(student, pairs(*rows), CONFIG, num_samples=1, teacher_logprob=exact_logprob)
    assert metrics["bayes_auc"] >= metrics["honest_auc"] > 0.9
    assert metrics["honest_auc_low"] <= metrics["honest_auc"] <= metrics["honest_auc_high"]
    texts = [[completion for _, completion in rows[i : i + 4]] for i in range(0, len(rows), 4)]
    assert metrics["honest_auc_ceiling"] == teacher_ceiling(texts, max_texts=1) != teacher_ceiling(texts)
    assert metrics["kl_student_teacher_se"] > 0
    assert metrics["kl_teacher_student_se"] > 0


def test_mean_over_prompts_by_hand():
    """Prompts weigh alike, and the error is that of their means: sd of (2, 5) over sqrt 2. One prompt has no error."""
    found = measures._mean_over_prompts("kl", torch.tensor([1.0, 3.0, 5.0]), [2, 1])
    assert found == pytest.approx({"kl": 3.5, "kl_se": 1.5})
    assert measures._mean_over_prompts("kl", torch.tensor([1.0, 3.0]), [2]) == {"kl": 2.0}


def test_what_cannot_be_measured_is_left_out(student):
    """Nine prompts, greedy, one teacher completion, no likelihood: no honest_*, entropy or divergence, and all is finite."""
    rows = [(prompt, prompt + ".") for prompt in letters_prompts("heldout")[:9]]
    metrics, _ = evaluate(student, pairs(*rows), CONFIG, temperature=0.0, teacher_logprob=exact_logprob)
    assert not {name for name in metrics if name.startswith(("honest", "kl_", "bayes")) or "entropy" in name}
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["nll"] == pytest.approx(heldout_nll(student, pairs(*rows), CONFIG))
    again, _ = evaluate(student, pairs(*rows, ("abc", "abc")), CONFIG)
    assert "honest_auc" in again
    assert "honest_auc_ceiling" not in again
    assert "bayes_auc" not in again


def test_both_sides_are_cut_alike(student):
    """Of teacher text beyond the limit the prefix counts, as unfinished: for the teacher's likelihood too."""
    asked = []

    def record(prompts, texts, finished):
        asked.append(list(zip(prompts, texts, finished, strict=True)))
        return [0.0] * len(texts)

    config = CONFIG.replace(max_completion_length=4)
    metrics, samples = evaluate(student, pairs(("abc", "abc"), ("abcd", "d,c,b,a.")), config, teacher_logprob=record)
    assert asked[0] == [("abc", "abc", True), ("abcd", "d,c,", False)]
    assert metrics["teacher_clipped_ratio"] == 0.5
    assert metrics["teacher_mean_length"] == 4
    assert [sample["teacher"] for sample in samples] == ["abc", "d,c,b,a."]


def test_diversity_compares_equal_numbers_of_texts(student):
    """Three equal teacher completions, one sample: the teacher's share is that of one text, not a third of it."""
    metrics, _ = evaluate(student, pairs(*[("abc", "a,b,c.")] * 3), CONFIG)
    assert metrics["teacher_distinct_1"] == 1
    assert metrics["teacher_mean_words"] == 3
