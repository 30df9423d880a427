"""The paper's claims, one by one: what the committed results say of each, with an interval over seeds and a verdict.

    python benchmarks/claims.py        # print the tables that tables.py writes into docs/claims.md

Nothing is run here. A claim is a difference between two methods of the same seed, signed so that the paper expects it
above 0. The verdict comes from Student's t over seeds, its p-value adjusted for the number of claims (Holm): below 0.05 a positive
difference is "reproduced" and a negative one "refuted here", above it nothing was told apart, "not at this scale".
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from frontier import frontier_gains
from results import Row, read_results, select


class Claim(NamedTuple):
    """A claim, where it is made, what was compared, the file that holds it, and the differences, one a seed."""

    text: str
    source: str
    compared: str
    results: str
    differences: list[float]


def claims() -> list[Claim]:
    """Return every claim that the committed results speak of."""
    line, letters, real = (read_results(name)["rows"] for name in ("toy_1d", "toy_letters", "smollm2"))
    return [*_games(line, letters), *_real(real), *_variants()]


def _variants() -> list[Claim]:
    """The paper's ablations."""
    one = read_results("variants")["rows"]
    return [
        Claim("Bradley-Terry over cross-entropy", "Table 4", "validity at equal entropy, log-ratio D", "variants", _against(one, "cross-entropy")),
        Claim("Bradley-Terry over cross-entropy", "Table 4", "validity at equal entropy, the paper's head", "variants", _against(one, "head, cross-entropy", "head")),
        Claim("The student needs its warm-up", "Table 3", "validity", "variants", _difference(one, "validity", "base", "no student warm-up")),
        Claim("The discriminator needs its warm-up", "Table 3", "validity at equal entropy, log-ratio D that has read the teacher's text", "variants", _against(one, "no D warm-up")),
        Claim("The discriminator needs its warm-up", "Table 3", "validity at equal entropy, the paper's head", "variants", _against(one, "head, no D warm-up", "head")),
        Claim("A discriminator larger than the student does not help", "Table 5", "validity at equal entropy, the student's size less 2 layers of 48", "variants", frontier_gains(one, "D (1, 32), the student's size", "entropy", "base")),
    ]  # fmt: skip


def _games(line: Sequence[Row], letters: Sequence[Row]) -> list[Claim]:
    outside = _difference(letters, "out_of_domain_validity", "gad-implicit", "seqkd-equal-cpu")
    published = _difference(letters, "validity", "gad-sequence", "seqkd-equal-cpu")
    late, again = (
        [frontier_gains(rows, "gad-after-seqkd", axis, "seqkd-longer") for axis in ("entropy", "modes")]
        for rows in (letters, read_results("toy_letters_late")["rows"])
    )
    return [
        Claim("The game seeks modes, SeqKD covers them", "Fig 5", "KL(student‖teacher), SeqKD less GAD, nats", "toy_1d", _difference(line, "kl_student_teacher", "seqkd", "gad-sequence")),
        Claim("A frozen discriminator is hacked, one that learns is not", "Fig 6", "KL(student‖teacher), frozen less GAD, nats", "toy_1d", _difference(line, "kl_student_teacher", "frozen-sequence", "gad-sequence")),
        Claim("A frozen discriminator is hacked, one that learns is not", "Fig 6", "validity, the paper's head", "toy_letters", _difference(letters, "validity", "gad-sequence", "frozen-sequence")),
        Claim("A frozen discriminator is hacked, one that learns is not", "Fig 6", "validity, log-ratio D", "toy_letters", _difference(letters, "validity", "gad-implicit", "frozen-implicit")),
        Claim("GAD over SeqKD", "Table 2", "validity, GAD as published less SeqKD of equal CPU", "toy_letters", published),
        Claim("GAD over SeqKD", "Table 2", "validity at equal entropy, log-ratio GAD from saturated SeqKD less SeqKD of equal CPU", "toy_letters", late[0]),
        Claim("GAD over SeqKD", "Table 2", "validity at equal modes, the same", "toy_letters", late[1]),
        Claim("GAD over SeqKD", "Table 2", "validity at equal entropy, once more with ten other seeds", "toy_letters_late", again[0]),
        Claim("GAD over SeqKD", "Table 2", "validity at equal modes, once more with ten other seeds", "toy_letters_late", again[1]),
        Claim("GAD gains out of domain", "Table 2", "validity on unseen kinds of prompts, log-ratio D less SeqKD of equal CPU", "toy_letters", outside),
    ]  # fmt: skip


def _real(rows: Sequence[Row]) -> list[Claim]:
    longer = [
        abs(base["metrics"]["mean_length"] - base["metrics"]["teacher_mean_length"])
        - abs(game["metrics"]["mean_length"] - game["metrics"]["teacher_mean_length"])
        for base, game in zip(*(_at(rows, name) for name in ("seqkd-best", "gad-sequence")), strict=True)
    ]
    return [
        Claim("GAD over SeqKD", "Table 2", "KL(student‖teacher), best SeqKD less GAD as published, nats", "smollm2", _difference(rows, "kl_student_teacher", "seqkd-best", "gad-sequence")),
        Claim("GAD over SeqKD", "Table 2", "KL(student‖teacher), best SeqKD less log-ratio GAD, nats", "smollm2", _difference(rows, "kl_student_teacher", "seqkd-best", "gad-implicit")),
        Claim("GAD over SeqKD, more than by a lower temperature", "-", "KL(student‖teacher), best SeqKD sampled at 0.7 less GAD as published, nats", "smollm2", _difference(rows, "kl_student_teacher", "seqkd-best", "gad-sequence", 0.7)),
        Claim("GAD over SeqKD, more than by a lower temperature", "-", "KL(student‖teacher), best SeqKD sampled at 0.7 less log-ratio GAD, nats", "smollm2", _difference(rows, "kl_student_teacher", "seqkd-best", "gad-implicit", 0.7)),
        Claim("SeqKD overlaps more with the teacher's text", "Fig 4", "4-gram F1, best SeqKD less GAD as published", "smollm2", _difference(rows, "f1_4", "seqkd-best", "gad-sequence")),
        Claim("GAD keeps the length", "section 3", "distance from the teacher's mean length, best SeqKD less GAD as published, tokens", "smollm2", longer),
    ]  # fmt: skip


def _at(rows: Sequence[Row], method: str, temperature: float = 1.0) -> list[Row]:
    """Rows of a method at a sampling temperature, by seed; a world without one has all of them."""
    chosen = [r for r in select(rows, method) if r["metrics"].get("temperature", temperature) == temperature]
    return sorted(chosen, key=lambda r: r["seed"])


def _difference(rows: Sequence[Row], metric: str, more: str, less: str, temperature: float = 1.0) -> list[float]:
    """A metric of `more`, at that temperature, less that of `less` at 1."""
    pairs = zip(_at(rows, more, temperature), _at(rows, less), strict=True)
    return [a["metrics"][metric] - b["metrics"][metric] for a, b in pairs]


def _against(rows: Sequence[Row], variant: str, base: str = "base") -> list[float]:
    """What a variant loses against its base at equal entropy."""
    return [-gain for gain in frontier_gains(rows, variant, "entropy", base)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of one value a seed and half the width of its 95% interval (Student's t)."""
    from scipy.stats import t

    assert len(values) > 1, values
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(half)


def p_values(claims: Sequence[Claim]) -> list[float]:
    """Return the p-value of each claim's mean difference (two-sided t test over seeds), adjusted for asking so many (Holm)."""
    from scipy.stats import ttest_1samp

    from minigad.stats import holm

    return holm([float(ttest_1samp(claim.differences, 0.0).pvalue) for claim in claims])


def verdict(difference: float, p_value: float) -> str:
    """Say what an adjusted p-value says; see the head of this file."""
    return "not at this scale" if p_value >= 0.05 else "reproduced" if difference > 0 else "refuted here"


def claims_table() -> str:
    """Return a line a claim."""
    lines = ["| claim | paper | compared | difference (95%) | seeds | p (Holm) | verdict | file |", "|---" * 8 + "|"]
    made = claims()
    for claim, p_value in zip(made, p_values(made), strict=True):
        mean, half = interval(claim.differences)
        lines.append(
            f"| {claim.text} | {claim.source} | {claim.compared} | {mean:+.3f} ± {half:.3f} | {len(claim.differences)} "
            f"| {p_value:.2g} | {verdict(mean, p_value)} | {claim.results} |"
        )
    return "\n".join(lines)


def variants_table(name: str) -> str:
    """Return a line a method of a results file: validity and modes at temperature 1, and what it gains on `base` along both frontiers.

    Changes to the game of 400 steps are held against that one, not against `base`.
    """
    rows = read_results(name)["rows"]
    lines = [
        "| variant | validity | modes | at equal entropy (95%) | at equal modes (95%) | CPU seconds |",
        "|---" * 6 + "|",
    ]
    for method in dict.fromkeys(r["method"] for r in rows):
        own = _at(rows, method)
        validity, modes = (statistics.fmean(r["metrics"][key] for r in own) for key in ("validity", "modes"))
        gains = " | ".join("-" if method == "base" else _gain(rows, method, axis) for axis in ("entropy", "modes"))
        seconds = statistics.fmean(r["cpu_seconds"] for r in own)
        lines.append(f"| {method} | {validity:.3f} | {modes:.1f} | {gains} | {seconds:.0f} |")
    return "\n".join(lines)


RECIPE: list[tuple[str, str, str, list[str]]] = [
    ("discriminator", "log-ratio", "variants", ["head"]),
    ("its language model (layers, width); the student is (1, 32)", "(2, 48)", "variants", ["D (1, 16)", "D (1, 32), the student's size", "D (3, 64)"]),
    ("its loss", "Bradley-Terry", "variants", ["cross-entropy", "label smoothing 0.1"]),
    ("it learns in the game", "yes", "variants", ["frozen D"]),
    ("its warm-up, after reading the teacher's text", "10 steps", "variants", ["no D warm-up"]),
    ("the student's warm-up", "40 epochs", "variants", ["no student warm-up"]),
    ("compared with", "the student as it is", "variants", ["against the reference"]),
    ("N, rows a step kept at 128", "8", "variants", ["N = 2", "N = 4", "N = 16"]),
    ("temperature", "1.0", "variants", ["temperature 0.8"]),
    ("KL weight", "0", "variants", ["beta 0.001", "beta 0.1"]),
    ("student's rate", "1e-3", "variants", ["student rate / 3", "student rate x 3"]),
    ("discriminator's rate", "3e-4", "variants", ["D rate / 10", "D rate x 10"]),
    ("advantages", "divided by their deviation", "variants", ["rewards centred only"]),
    ("average of weights", "none", "variants", ["EMA 0.98"]),
    ("schedule", "linear to 10%", "variants", ["constant rate"]),
    ("cross-entropy beside it", "none", "variants", ["cross-entropy beside it, 0.1"]),
    ("in the preset's own 400 steps", "-", "beyond", ["400 steps, student rate x 3", "400 steps, cross-entropy", "400 steps, student rate x 3, cross-entropy"]),
    ("scale of the log-ratio", "1", "beyond", ["scale / 3", "scale x 3"]),
    ("reward", "a token", "beyond", ["reward on the last token"]),
    ("discriminators", "one", "beyond", ["ensemble of 3"]),
    ("replay, gradient penalty", "none", "beyond", ["replay of earlier steps", "gradient penalty 0.001", "gradient penalty 0.1"]),
    ("it starts from", "SeqKD", "beyond", ["from SODA", "from SeqKD to saturation"]),
    ("prompts a step", "16", "beyond", ["64 prompts a step"]),
    ("weights trained", "all", "beyond", ["LoRA 2", "LoRA 2, rates x 3", "LoRA 16", "LoRA 16, rates x 3"]),
]  # fmt: skip


def recipe_table() -> str:
    """Return a line a setting: what the toy preset has, and what others gain on it at equal entropy."""
    lines = ["| setting | preset | instead: validity gained at equal entropy (95%) |", "|---|---|---|"]
    for setting, value, name, others in RECIPE:
        rows = read_results(name)["rows"]
        gains = "; ".join(f"{other}: {_gain(rows, other, 'entropy')}" for other in others)
        lines.append(f"| {setting} | {value} | {gains} |")
    return "\n".join(lines)


def _gain(rows: Sequence[Row], name: str, axis: str) -> str:
    gains = frontier_gains(rows, name, axis, "400 steps" if name.startswith("400 steps,") else "base")
    if len(gains) < 2:
        return "no overlap"
    mean, half = interval(gains)
    mark = "" if abs(mean) <= half else " **better**" if mean > 0 else " **worse**"
    return f"{mean:+.3f} ± {half:.3f}{mark}"


if __name__ == "__main__":
    print(claims_table(), variants_table("variants"), variants_table("beyond"), sep="\n\n")
