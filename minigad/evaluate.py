"""Measures that need no judge: overlap, diversity, length, likelihood, and a discriminator trained afresh.

The discriminator of the game is the one that the student learned to please, so that its accuracy says little about the
student. An *honest* one is trained on finished texts and tested on prompts it has not seen. What it finds is a lower
bound: a weak classifier near 0.5 does not mean that the two distributions are equal. `bayes_auc` is what the best
classifier would find, but needs the teacher's likelihood.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigad.chat import Prompt, Row, decode, encode, prompt_text
from minigad.config import GADConfig
from minigad.data import group_by_prompt
from minigad.memory import with_room
from minigad.model import LanguageModel
from minigad.student import Student

__all__ = [
    "bayes_auc",
    "distinct_n",
    "evaluate",
    "heldout_nll",
    "honest_discriminator",
    "length_stats",
    "ngram_f1",
    "ngram_overlap",
    "teacher_ceiling",
    "words_of",
]

# (prompts, texts, finished) -> log p_T, nats; a text that is not finished was cut, and has the probability of a prefix
TeacherLogprob = Callable[[Sequence[Any], Sequence[str], Sequence[bool]], list[float]]
Features = Callable[[list[str]], np.ndarray]
MIN_PROMPTS = 10  # below this a classifier that is tested on unseen prompts says nothing
MAX_FOLDS = 5
RESAMPLES = 1000


# --- texts ---


def words_of(text: str) -> list[str]:
    r"""Split a text into lower-case words (`\w+`); punctuation does not count, a script without spaces is one word."""
    return re.findall(r"\w+", text.lower())


def ngram_f1(candidate: str, references: Sequence[str], n: int) -> float:
    """Return the F1 overlap of word n-grams with the reference that agrees best (clipped counts, as in ROUGE-N).

    F1 = 2 · matches / (n-grams of both). A text shorter than n words has no n-grams and so an overlap of 0, even with
    itself: over short texts a high n stays low, and is to be read beside another student's, not beside 1.
    """
    assert references, "no reference to compare with"
    return max(_f1(_ngrams(candidate, n), _ngrams(reference, n)) for reference in references)


def ngram_overlap(candidates: Sequence[str], references: Sequence[Sequence[str]], max_n: int = 6) -> dict[str, float]:
    """Return {"f1_1", ...}: `ngram_f1` for n up to `max_n`, the mean over candidates, each with its own references."""
    pairs = list(zip(candidates, references, strict=True))
    return {f"f1_{n}": sum(ngram_f1(text, refs, n) for text, refs in pairs) / len(pairs) for n in range(1, max_n + 1)}


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = words_of(text)
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _f1(a: Counter[tuple[str, ...]], b: Counter[tuple[str, ...]]) -> float:
    both = a.total() + b.total()
    return 2 * (a & b).total() / both if both else 0.0


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the share of different word n-grams among all n-grams of the texts (arXiv 1510.03055); 0 without any.

    Falls as the amount of text grows: compare only sets of the same size.
    """
    counts = Counter(chain.from_iterable(_ngrams(text, n).elements() for text in texts))
    return len(counts) / counts.total() if counts else 0.0


def length_stats(rows: Sequence[Row], finished: Sequence[bool]) -> dict[str, float]:
    """Return mean_length (tokens, the end token included) and clipped_ratio, the share that was cut off."""
    assert len(rows) == len(finished) > 0, (len(rows), len(finished))
    lengths = [len(row.completion_ids) for row in rows]
    return {"mean_length": sum(lengths) / len(lengths), "clipped_ratio": 1 - sum(finished) / len(finished)}


# --- likelihoods ---


def heldout_nll(model: LanguageModel, dataset: Any, config: GADConfig) -> float:
    """Return the mean negative log-likelihood of teacher completions, nats a token over all tokens, at temperature 1.

    The end token counts; what lies beyond max_completion_length does not.
    """
    rows = _encode(model, list(dataset["prompt"]), list(dataset["completion"]), config)
    total = _logprobs(model, rows, 1.0, config).double().sum().item()
    return -total / sum(len(row.completion_ids) for row in rows)


def _logprobs(model: LanguageModel, rows: Sequence[Row], temperature: float, config: GADConfig) -> Tensor:
    return with_room("reference", model, config, lambda: model.logprobs_of(rows, temperature, config.token_budget))


def _encode(
    model: LanguageModel, prompts: Sequence[Prompt], completions: Sequence[str], config: GADConfig
) -> list[Row]:
    return [
        encode(
            model.tokenizer,
            prompt,
            completion,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def bayes_auc(log_ratio_teacher: Tensor, log_ratio_student: Tensor) -> float:
    """Return the AUC of the best classifier there is, which scores a text by log p_T - log p_S.

    Takes that log-ratio on texts of the teacher (M,) and of the student (N,), and returns
    P(teacher's > student's) + P(equal) / 2 over all M·N pairs (Neyman and Pearson, 1933).
    """
    teacher, student = log_ratio_teacher.double(), log_ratio_student.double().sort().values
    assert not torch.cat([teacher, student]).isnan().any(), "a log-ratio is not a number"
    below = torch.searchsorted(student, teacher) + torch.searchsorted(student, teacher, right=True)
    return (below / (2 * len(student))).mean().item()


# --- the honest discriminator ---


def honest_discriminator(
    teacher_texts: Sequence[Sequence[str]],
    student_texts: Sequence[Sequence[str]],
    *,
    seed: int = 0,
    features: Features | None = None,
) -> dict[str, float]:
    """Train a classifier afresh to tell the two sets apart, and test it on prompts it has not seen.

    Outer lists are prompts; of each the first k texts of both sides count, k the smaller number, so that chance is 0.5.
    Logistic regression on word 1-2-grams and character 1-4-grams (TF-IDF), or `features` in their place, and lengths.
    Returns honest_auc, honest_auc_low and honest_auc_high (95%, bootstrap over prompts), and honest_accuracy. The interval
    takes the classifiers as given: between equal distributions of 40 prompts it held 0.5 only four times in five.
    A lower bound: near 0.5 means that this classifier sees no difference, not that there is none.
    """
    pairs = _pairs(teacher_texts, student_texts)
    num_prompts = len({group for group, _, _ in pairs})
    assert num_prompts >= 4, f"{num_prompts} prompts with text on both sides; two folds need 4"
    rng = np.random.default_rng(seed)
    prompt = np.unique([group for group, _, _ in pairs], return_inverse=True)[1]
    fold = (rng.permutation(num_prompts) % min(MAX_FOLDS, num_prompts // 2))[prompt]
    teacher, student = _out_of_fold_scores([t for _, t, _ in pairs], [s for _, _, s in pairs], fold, features)
    auc, draws = _auc_with_draws(teacher, student, prompt, fold, rng)
    low, high = np.percentile(draws, [2.5, 97.5])
    correct = np.concatenate([np.heaviside(teacher, 0.5), np.heaviside(-student, 0.5)])
    return {
        "honest_auc": auc,
        "honest_auc_low": float(low),
        "honest_auc_high": float(high),
        "honest_accuracy": float(correct.mean()),
    }


def teacher_ceiling(
    teacher_texts: Sequence[Sequence[str]],
    *,
    max_texts: int | None = None,
    seed: int = 0,
    features: Features | None = None,
) -> float:
    """Return honest_auc between two disjoint random halves of the teacher's own texts: what a perfect student would get.

    Its expectation is 0.5; how far it lies from there shows the noise in honest_auc. Prompts with one text are left out.
    `max_texts` limits a half's texts of a prompt, to compare with a student that has as many.
    """
    rng = np.random.default_rng(seed)
    shuffled = [[texts[i] for i in rng.permutation(len(texts))] for texts in teacher_texts]
    halves = [texts[0::2][:max_texts] for texts in shuffled], [texts[1::2][:max_texts] for texts in shuffled]
    return honest_discriminator(*halves, seed=seed, features=features)["honest_auc"]


def _pairs(teacher: Sequence[Sequence[str]], student: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
    """Return (prompt's index, teacher text, student text), as many of a prompt as both sides have."""
    groups = enumerate(zip(teacher, student, strict=True))
    return [(i, t, s) for i, (theirs, ours) in groups for t, s in zip(theirs, ours, strict=False)]


def _out_of_fold_scores(
    teacher: list[str], student: list[str], fold: np.ndarray, features: Features | None
) -> tuple[np.ndarray, np.ndarray]:
    """Score each text by a classifier that was fitted without its prompt's fold; positive is "teacher"."""
    texts = [*teacher, *student]
    label, folds, index = np.repeat([1, 0], len(teacher)), np.tile(fold, 2), np.arange(len(texts))
    dense = np.array([[len(text), len(text.split())] for text in texts], dtype=float)
    if features is not None:
        dense = np.hstack([dense, features(texts)])
    scores = np.zeros(len(texts))
    for k in range(fold.max() + 1):
        classifier = _classifier(texts, dense, ngrams=features is None)
        classifier.fit(index[folds != k], label[folds != k])
        scores[folds == k] = classifier.decision_function(index[folds == k])
    return scores[: len(teacher)], scores[len(teacher) :]


def _classifier(texts: list[str], dense: np.ndarray, ngrams: bool) -> Any:
    """Build a classifier of positions in `texts`; vocabulary, IDF and scale come from what it is fitted on alone."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    parts = [make_pipeline(FunctionTransformer(lambda index: dense[index]), StandardScaler())]
    for grams in (_word_features, _character_features) if ngrams else ():
        parts.append(TfidfVectorizer(analyzer=lambda i, grams=grams: grams(texts[i]), sublinear_tf=True))
    return make_pipeline(make_union(*parts), LogisticRegression(C=10.0, max_iter=10_000))


def _word_features(text: str) -> list[str]:
    """Case and punctuation kept. The marks at both ends show how texts begin and end, and give an empty one features."""
    words = ["\x02", *re.findall(r"\w+|[^\w\s]", text), "\x03"]
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def _character_features(text: str) -> list[str]:
    """sklearn's own analyzer would turn an empty line into a space: paragraphs are a matter of style."""
    marked = f"\x02{text}\x03"
    return [marked[i : i + n] for n in range(1, 5) for i in range(len(marked) - n + 1)]


def _auc_with_draws(
    teacher: np.ndarray, student: np.ndarray, prompt: np.ndarray, fold: np.ndarray, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """Return the mean over folds of the AUC within each, and RESAMPLES bootstrap draws of it, prompts drawn in each fold.

    Never pooled: two folds' scores come from two classifiers, with offsets of their own.
    """
    aucs, draws = [], []
    for k in range(fold.max() + 1):
        inside = fold == k
        wins, sizes = _wins(teacher[inside], student[inside], prompt[inside])
        count = len(sizes)
        aucs.append(_auc(wins, sizes, np.ones((1, count))))
        draws.append(_auc(wins, sizes, rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)))
    return float(np.mean(aucs)), np.mean(draws, axis=0)


def _wins(teacher: np.ndarray, student: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (P, P) sums of wins, teacher texts of prompt i over student texts of prompt j, and (P,) texts a prompt."""
    wins = np.greater.outer(teacher, student) + 0.5 * np.equal.outer(teacher, student)
    _, starts, sizes = np.unique(prompt, return_index=True, return_counts=True)
    return np.add.reduceat(np.add.reduceat(wins, starts, axis=0), starts, axis=1), sizes


def _auc(wins: np.ndarray, sizes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """AUC of samples in which prompt i comes times[:, i] times."""
    return ((times @ wins) * times).sum(1) / (times @ sizes) ** 2


# --- everything at once ---


class _Side(NamedTuple):
    """One side's completions, flat, those of a prompt beside each other; `counts` says how many of each."""

    prompts: list[Prompt]
    rows: list[Row]
    texts: list[str]
    finished: list[bool]
    counts: list[int]

    def by_prompt(self) -> list[list[str]]:
        ends = np.cumsum(self.counts)
        return [self.texts[end - count : end] for end, count in zip(ends, self.counts, strict=True)]


def evaluate(
    student: Student,
    dataset: Any,
    config: GADConfig,
    *,
    num_samples: int = 1,
    temperature: float | None = None,
    seed: int = 0,
    teacher_logprob: TeacherLogprob | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Sample `num_samples` completions a held-out prompt; return metrics and samples.

    nll is at temperature 1; entropy (nats a token), sequence_entropy and divergences (nats a completion, means over
    prompts, _se clustered by prompt) are at the sampling temperature (None: the config's) and left out at 0, greedy.
    Both sides are cut at max_completion_length. teacher_* is the measure of the teacher's text; distinct_n and honest_*
    use as many texts of a prompt as both sides have. Left out too: honest_* below 10 prompts, honest_auc_ceiling below
    10 prompts with two teacher completions, divergences and bayes_auc without `teacher_logprob`.
    """
    temperature = config.temperature if temperature is None else temperature
    groups = group_by_prompt(dataset)
    assert groups, "no rows to evaluate on"
    theirs = _teacher_side(student, groups, config)
    ours = _student_side(student, [prompt for prompt, _ in groups], config, num_samples, temperature, seed)
    metrics = {"temperature": temperature, "nll": heldout_nll(student, dataset, config)}
    metrics |= length_stats(ours.rows, ours.finished) | _teacher(length_stats(theirs.rows, theirs.finished))
    metrics |= _text_metrics(theirs.by_prompt(), ours.by_prompt())
    metrics |= _honest_metrics(theirs.by_prompt(), ours.by_prompt(), seed)
    if temperature > 0:
        logprobs = _sequence_logprobs(student, ours, temperature, config)
        metrics["entropy"] = -logprobs.sum().item() / sum(len(row.completion_ids) for row in ours.rows)
        metrics["sequence_entropy"] = -logprobs.mean().item()
        if teacher_logprob is not None:
            ratios = [
                _log_ratios(theirs, _sequence_logprobs(student, theirs, temperature, config), teacher_logprob),
                _log_ratios(ours, logprobs, teacher_logprob),
            ]
            metrics |= _mean_over_prompts("kl_student_teacher", -ratios[1], ours.counts)
            metrics |= _mean_over_prompts("kl_teacher_student", ratios[0], theirs.counts)
            metrics["bayes_auc"] = bayes_auc(*ratios)
    return metrics, _samples(groups, ours)


def _teacher_side(student: Student, groups: Sequence[tuple[Prompt, list[str]]], config: GADConfig) -> _Side:
    """Cut the teacher's text where the student's is cut; else length alone would give the sides away."""
    prompts = [prompt for prompt, texts in groups for _ in texts]
    whole = [text for _, texts in groups for text in texts]
    rows = _encode(student, prompts, whole, config)
    decoded = [decode(student.tokenizer, row.completion_ids) for row in rows]
    finished = [is_finished for _, is_finished in decoded]
    texts = [text if done else cut for text, (cut, done) in zip(whole, decoded, strict=True)]
    return _Side(prompts, rows, texts, finished, [len(texts) for _, texts in groups])


def _student_side(
    student: Student, prompts: list[Prompt], config: GADConfig, num_samples: int, temperature: float, seed: int
) -> _Side:
    rollouts = student.generate(prompts, config, seed=seed, num_generations=num_samples, temperature=temperature)
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    return _Side(repeated, rollouts.rows, rollouts.texts, rollouts.finished, [num_samples] * len(prompts))


def _teacher(metrics: dict[str, float]) -> dict[str, float]:
    return {f"teacher_{name}": value for name, value in metrics.items()}


def _text_metrics(theirs: list[list[str]], ours: list[list[str]]) -> dict[str, float]:
    """Overlap of every student text with its prompt's teacher texts, words a text, and diversity of matched sets."""
    references = [refs for refs, texts in zip(theirs, ours, strict=True) for _ in texts]
    metrics = ngram_overlap(list(chain(*ours)), references)
    matched = _pairs(theirs, ours)
    metrics |= _diversity([text for _, _, text in matched]) | _teacher(_diversity([text for _, text, _ in matched]))
    return metrics | {"mean_words": _mean_words(ours), "teacher_mean_words": _mean_words(theirs)}


def _diversity(texts: list[str]) -> dict[str, float]:
    return {f"distinct_{n}": distinct_n(texts, n) for n in range(1, 5)}


def _mean_words(texts: list[list[str]]) -> float:
    counts = [len(words_of(text)) for text in chain(*texts)]
    return sum(counts) / len(counts)


def _honest_metrics(theirs: list[list[str]], ours: list[list[str]], seed: int) -> dict[str, float]:
    if len(ours) < MIN_PROMPTS:
        return {}
    metrics = honest_discriminator(theirs, ours, seed=seed)
    if sum(len(texts) >= 2 for texts in theirs) >= MIN_PROMPTS:
        metrics["honest_auc_ceiling"] = teacher_ceiling(theirs, max_texts=len(ours[0]), seed=seed)
    return metrics


def _sequence_logprobs(student: Student, side: _Side, temperature: float, config: GADConfig) -> Tensor:
    return _logprobs(student, side.rows, temperature, config).double().sum(1).cpu()


def _log_ratios(side: _Side, logprobs: Tensor, teacher_logprob: TeacherLogprob) -> Tensor:
    """Return log p_T - log p_S of each completion."""
    theirs = teacher_logprob(side.prompts, side.texts, side.finished)
    return torch.tensor(theirs, dtype=torch.float64) - logprobs


def _mean_over_prompts(name: str, values: Tensor, counts: list[int]) -> dict[str, float]:
    """Return the mean of the prompts' means and, of two prompts or more, its standard error."""
    means = torch.stack([part.mean() for part in values.split(counts)])
    error = {f"{name}_se": means.std().item() / len(means) ** 0.5} if len(means) > 1 else {}
    return {name: means.mean().item(), **error}


def _samples(groups: Sequence[tuple[Prompt, list[str]]], ours: _Side) -> list[dict[str, Any]]:
    """Return one row a student completion, beside a teacher completion of the same prompt, uncut."""
    samples, position = [], 0
    for (prompt, texts), count in zip(groups, ours.counts, strict=True):
        for i in range(count):
            row = {"prompt": prompt_text(prompt), "teacher": texts[i % len(texts)]}
            samples.append({**row, "student": ours.texts[position], "finished": ours.finished[position]})
            position += 1
    return samples
