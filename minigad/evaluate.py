"""Measures that need no judge: overlap, diversity, length, likelihood, and a discriminator trained afresh.

The discriminator of the game has been fooled on purpose, so that its accuracy says nothing about the student. An *honest*
one is trained on finished texts and tested on prompts it has not seen. It is a lower bound: a weak classifier that fails
to tell two sets of texts apart does not prove them alike. Read it beside the teacher-against-teacher ceiling.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigad.chat import encode, prompt_text
from minigad.config import GADConfig
from minigad.data import group_by_prompt
from minigad.model import LanguageModel
from minigad.student import Student

__all__ = ["bayes_auc", "distinct_n", "evaluate", "heldout_nll", "honest_discriminator", "ngram_f1"]

TeacherLogprob = Callable[[Sequence[Any], Sequence[str], Sequence[bool]], list[float]]
FOLDS = 5
RESAMPLES = 1000


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words; punctuation does not count."""
    return re.findall(r"\w+", text.lower())


def ngram_f1(candidate: str, references: Sequence[str], n: int) -> float:
    """Return the F1 overlap of word n-grams with the reference that agrees best (clipped counts, as in ROUGE-N).

    F1 = 2 · matches / (n-grams of both). Two texts both shorter than n words have none in common: 0.
    """
    return max(_f1(_ngrams(candidate, n), _ngrams(reference, n)) for reference in references)


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = words_of(text)
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _f1(a: Counter[tuple[str, ...]], b: Counter[tuple[str, ...]]) -> float:
    both = a.total() + b.total()
    return 2 * (a & b).total() / both if both else 0.0


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the share of different word n-grams among all of them (arXiv 1510.03055); falls with the number of texts."""
    counts = sum((_ngrams(text, n) for text in texts), Counter[tuple[str, ...]]())
    return len(counts) / counts.total() if counts else 0.0


def heldout_nll(model: LanguageModel, dataset: Any, config: GADConfig) -> float:
    """Return the mean negative log-likelihood of held-out teacher completions, nats a token, at temperature 1."""
    rows = [
        encode(
            model.tokenizer,
            prompt,
            completion,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
        )
        for prompt, completion in zip(dataset["prompt"], dataset["completion"], strict=True)
    ]
    total = model.logprobs_of(rows, 1.0, config.token_budget).sum().item()
    return -total / sum(len(row.completion_ids) for row in rows)


def bayes_auc(teacher_log_ratios: Tensor, student_log_ratios: Tensor) -> float:
    """Return the AUC of log p_T - log p_S, given on teacher texts and on student texts: the best any classifier can do."""
    difference = teacher_log_ratios.unsqueeze(1) - student_log_ratios.unsqueeze(0)
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def honest_discriminator(
    teacher_texts: Sequence[Sequence[str]], student_texts: Sequence[Sequence[str]], *, seed: int = 0
) -> dict[str, float]:
    """Train a fresh classifier to tell the two sets apart, and test it on prompts it has not seen.

    Logistic regression on word 1-2-grams, character 1-4-grams and length, cross-fitted in 5 folds by prompt. Outer lists are
    prompts. Returns honest_auc (mean over folds) with a 95% bootstrap interval over prompts, and honest_accuracy. 0.5 is chance.
    """
    scores = _out_of_fold_scores(teacher_texts, student_texts, seed)
    by_fold = _fold_tables(scores)
    rng = np.random.default_rng(seed)
    draws = [_mean_auc([_resample(fold, rng) for fold in by_fold]) for _ in range(RESAMPLES)]
    correct = [s > 0 for _, t, _ in scores for s in t] + [s < 0 for _, _, o in scores for s in o]
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "honest_auc": _mean_auc(by_fold),
        "honest_auc_low": float(low),
        "honest_auc_high": float(high),
        "honest_accuracy": sum(correct) / len(correct),
    }


# One prompt's fold, and the scores of its teacher texts and of its student texts.
_Scored = tuple[int, list[float], list[float]]


def _out_of_fold_scores(teacher: Sequence[Sequence[str]], student: Sequence[Sequence[str]], seed: int) -> list[_Scored]:
    prompts = np.random.default_rng(seed).permutation(len(teacher))
    scored: list[_Scored] = []
    for fold in range(FOLDS):
        test = prompts[fold::FOLDS]
        train = [i for i in prompts if i not in set(test.tolist())]
        score = _fit(
            [text for i in train for text in teacher[i]],
            [text for i in train for text in student[i]],
        )
        scored += [(fold, score(teacher[i]), score(student[i])) for i in test]
    return scored


def _fit(teacher: list[str], student: list[str]) -> Callable[[Sequence[str]], list[float]]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    features = make_union(
        TfidfVectorizer(analyzer="word", ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True),
        TfidfVectorizer(analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True),
        make_pipeline(FunctionTransformer(_lengths), StandardScaler()),
    )
    # class_weight: with unequal numbers of texts the score's zero must still mean "either is as likely"
    model = make_pipeline(features, LogisticRegression(C=10.0, max_iter=2000, class_weight="balanced"))
    model.fit(teacher + student, [1] * len(teacher) + [0] * len(student))
    return lambda texts: model.decision_function(list(texts)).tolist()


def _lengths(texts: Sequence[str]) -> np.ndarray:
    return np.array([[len(text), len(text.split())] for text in texts], dtype=float)


def _fold_tables(scores: Sequence[_Scored]) -> list[list[_Scored]]:
    return [[row for row in scores if row[0] == fold] for fold in range(FOLDS)]


def _resample(fold: Sequence[_Scored], rng: np.random.Generator) -> list[_Scored]:
    return [fold[i] for i in rng.integers(len(fold), size=len(fold))]


def _mean_auc(folds: Sequence[Sequence[_Scored]]) -> float:
    """AUC within each fold, then the mean: scores of two folds come from two classifiers and have no common zero."""
    aucs = [
        bayes_auc(torch.tensor([s for _, t, _ in fold for s in t]), torch.tensor([s for _, _, o in fold for s in o]))
        for fold in folds
    ]
    return sum(aucs) / len(aucs)


def evaluate(
    student: Student,
    dataset: Any,
    config: GADConfig,
    *,
    temperature: float | None = None,
    seed: int = 0,
    teacher_logprob: TeacherLogprob | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sample the student on held-out prompts, as often as the teacher answered each, and measure what can be measured.

    Returns metrics and samples. Log-probabilities are at the sampling temperature (None: the config's). With `teacher_logprob` also
    both divergences (nats a completion, standard errors clustered by prompt) and bayes_auc. honest_* need 10 prompts,
    honest_auc_ceiling two teacher completions for each.
    """
    temperature = config.temperature if temperature is None else temperature
    groups = group_by_prompt(dataset)
    prompts = [prompt for prompt, _ in groups]
    teacher_texts = [completions for _, completions in groups]
    num = max(len(texts) for texts in teacher_texts)
    rollouts = student.generate(prompts, config, seed=seed, num_generations=num, temperature=temperature)
    student_texts = [rollouts.texts[i * num : (i + 1) * num] for i in range(len(prompts))]
    own = student.logprobs_of(rollouts.rows, temperature, config.token_budget).sum(1).double()
    metrics = {
        "temperature": temperature,
        "nll": heldout_nll(student, dataset, config),
        "entropy": -own.mean().item(),
        **_text_metrics(teacher_texts, student_texts),
        "mean_length": sum(len(row.completion_ids) for row in rollouts.rows) / len(rollouts.rows),
        "clipped_ratio": 1 - sum(rollouts.finished) / len(rollouts.finished),
    }
    if len(prompts) >= 2 * FOLDS:
        metrics |= honest_discriminator(teacher_texts, student_texts, seed=seed)
        if min(len(texts) for texts in teacher_texts) >= 2:
            halves = [texts[:1] for texts in teacher_texts], [texts[1:2] for texts in teacher_texts]
            metrics["honest_auc_ceiling"] = honest_discriminator(*halves, seed=seed)["honest_auc"]
    if teacher_logprob is not None:
        repeated = [prompt for prompt in prompts for _ in range(num)]
        theirs = torch.tensor(teacher_logprob(repeated, rollouts.texts, rollouts.finished), dtype=torch.float64)
        metrics |= _divergences(student, groups, config, temperature, own - theirs, num, teacher_logprob)
    samples = [
        {"prompt": prompt_text(prompt), "teacher": texts[0], "student": ours[0], "finished": rollouts.finished[i * num]}
        for i, (prompt, texts, ours) in enumerate(zip(prompts, teacher_texts, student_texts, strict=True))
    ]
    return metrics, samples


def _text_metrics(teacher: Sequence[Sequence[str]], student: Sequence[Sequence[str]]) -> dict[str, float]:
    """Overlap with the teacher (mean over texts; best of a prompt's teacher completions), diversity, words."""
    pairs = [(text, references) for texts, references in zip(student, teacher, strict=True) for text in texts]
    metrics = {f"f1_{n}": sum(ngram_f1(text, refs, n) for text, refs in pairs) / len(pairs) for n in range(1, 7)}
    flat = [text for texts in student for text in texts]
    theirs = [text for texts in teacher for text in texts]
    for n in (1, 2, 3, 4):
        metrics[f"distinct_{n}"] = distinct_n(flat, n)
        metrics[f"teacher_distinct_{n}"] = distinct_n(theirs, n)
    metrics["mean_words"] = sum(len(words_of(text)) for text in flat) / len(flat)
    metrics["teacher_mean_words"] = sum(len(words_of(text)) for text in theirs) / len(theirs)
    return metrics


def _divergences(
    student: Student,
    groups: Sequence[tuple[Any, list[str]]],
    config: GADConfig,
    temperature: float,
    student_ratios: Tensor,
    num: int,
    teacher_logprob: TeacherLogprob,
) -> dict[str, float]:
    """`student_ratios` = log p_S - log p_T on the student's own completions, num a prompt."""
    pairs = [(prompt, text) for prompt, texts in groups for text in texts]
    limits = {"max_prompt_length": config.max_prompt_length, "max_completion_length": config.max_completion_length}
    rows = [encode(student.tokenizer, prompt, text, **limits) for prompt, text in pairs]
    own = student.logprobs_of(rows, temperature, config.token_budget).sum(1).double()
    theirs = teacher_logprob([p for p, _ in pairs], [text for _, text in pairs], [True] * len(pairs))
    teacher_ratios = torch.tensor(theirs, dtype=torch.float64) - own
    per_prompt = student_ratios.view(-1, num).mean(1)
    by_teacher = torch.stack([part.mean() for part in teacher_ratios.split([len(texts) for _, texts in groups])])
    return {
        "kl_student_teacher": per_prompt.mean().item(),
        "kl_student_teacher_se": (per_prompt.std() / len(per_prompt) ** 0.5).item(),
        "kl_teacher_student": by_teacher.mean().item(),
        "kl_teacher_student_se": (by_teacher.std() / len(by_teacher) ** 0.5).item(),
        "bayes_auc": bayes_auc(teacher_ratios, -student_ratios),
    }
