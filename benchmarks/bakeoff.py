"""The bake-off: every method on both worlds, what it cost, and who wins at a budget of processor time.

    python benchmarks/toy_letters.py && python benchmarks/smollm2.py    # hours; the results are committed
    python benchmarks/bakeoff.py                                        # the tables and the figure, from those results

Seeds are paired: a difference is taken seed by seed, and its interval is Student's t over seeds, 95%.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import smollm2
import smollm2_gap
import toy_letters
from claims import interval
from frontier import FRONTIER_BASE, frontier_gains
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from results import FOLDER, Row, mean_std, read_results, select, table

from minigad import PRESETS
from minigad.config import GADConfig
from minigad.plots import METHOD_COLOURS, plot_frontier
from minigad.train import num_steps

LETTERS = ["validity", "kl_student_teacher", "kl_teacher_student", "modes", "mean_length", "cpu_seconds"]
REAL = ["kl_student_teacher", "kl_teacher_student", "bayes_auc", "honest_auc", "distinct_2", "mean_length", "nll", "cpu_seconds"]  # fmt: skip
ELSEWHERE = "seqkd, second machine"  # the start and the control of a method that ran on another one
CONTROLS = ("teacher", "base", "seqkd-cheating", ELSEWHERE)  # not ways to learn from the teacher's text, or not others
GAP = ["kl_student_teacher", "kl_teacher_student", "sequence_entropy", "honest_auc", "mean_length", "discriminator_accuracy", "cpu_seconds"]  # fmt: skip
SMOLLM2_ROWS = 400  # teacher texts that its students learn from
BUDGETS = {"toy_letters": (60, 150, 200), "smollm2": (300, 800, 1200)}  # CPU seconds, all in


def world_rows(name: str) -> list[Row]:
    """Return the rows of a world; those of SmolLM2's second machine are held against their own start, which is named ELSEWHERE."""
    rows: list[Row] = read_results(name)["rows"]
    if name != "smollm2":
        return rows
    elsewhere = read_results("smollm2_prefix")["rows"]
    return rows + [r | {"method": ELSEWHERE} if r["method"] == "seqkd" else r for r in elsewhere]


def winners(name: str) -> str:
    """Return a line a budget: who is best at temperature 1, in validity and modes (letters) or in both divergences (SmolLM2)."""
    rows = world_rows(name)
    measures = {"validity": 1, "modes": 1} if name == "toy_letters" else {"kl_student_teacher": -1, "kl_teacher_student": -1}  # fmt: skip
    lines = ["| CPU seconds | " + " | ".join(f"best {m}" for m in measures) + " |", "|---" * (len(measures) + 1) + "|"]
    for budget in BUDGETS[name]:
        inside = [m for m in _methods(rows) if mean_std(_at_one(rows, m), "cpu_seconds")[0] <= budget]
        cells = [_winner(rows, inside, measure, sign) for measure, sign in measures.items()]
        lines.append(f"| up to {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _winner(rows: Sequence[Row], methods: Sequence[str], measure: str, sign: int) -> str:
    """Name the best method and how far it is ahead of the next, with the interval of that."""
    ranked = sorted(methods, key=lambda m: -sign * mean_std(_at_one(rows, m), measure)[0])
    first = _by_seed(rows, ranked[0], measure)
    if len(ranked) == 1:
        return f"{ranked[0]} ({statistics.fmean(first.values()):.3g}), alone"
    second = _by_seed(rows, ranked[1], measure)
    seeds = sorted(first.keys() & second.keys())
    ahead = [sign * (first[s] - second[s]) for s in seeds]
    mean, half = interval(ahead)
    return f"{ranked[0]} ({statistics.fmean(first.values()):.3g}), {mean:.3g} ± {half:.2g} ahead of {ranked[1]}" + (
        "" if mean > half else ": not told apart"
    )


def _by_seed(rows: Sequence[Row], method: str, measure: str) -> dict[int, float]:
    return {r["seed"]: r["metrics"][measure] for r in _at_one(rows, method)}


def _at_one(rows: Sequence[Row], method: str) -> list[Row]:
    return select(rows, method, 1.0)


def _methods(rows: Sequence[Row]) -> list[str]:
    """Return what competes; SeqKD's best epoch only where it is not the first, which `seqkd` is."""
    names = [m for m in dict.fromkeys(r["method"] for r in rows) if m not in CONTROLS]
    same = [_by_seed(rows, m, "kl_student_teacher") for m in ("seqkd", "seqkd-best")]
    return [m for m in names if m != "seqkd-best" or same[0] != same[1]]


def against_seqkd() -> str:
    """Return a line a method of the letters language: validity gained along both frontiers on SeqKD of its CPU time, with intervals."""
    rows = read_results("toy_letters")["rows"]
    lines = ["| method | against | at equal entropy (95%) | at equal modes (95%) |", "|---|---|---|---|"]
    for method in _methods(rows):
        base = "seqkd-longer" if method == "gad-after-seqkd" else FRONTIER_BASE
        if method not in (base, FRONTIER_BASE):
            lines.append(_gains_line(rows, method, base, ("entropy", "modes")))
    return "\n".join(lines)


def _gains_line(rows: Sequence[Row], method: str, base: str, axes: Sequence[str], quality: str = "validity") -> str:
    """What a method gains on `base` in that quality at equal values of each axis."""
    gains = [_interval(frontier_gains(rows, method, axis, base, quality)) for axis in axes]
    return f"| {method} | {base} | {' | '.join(gains)} |"


def real_differences() -> str:
    """Return a line a method of SmolLM2: both divergences less those of SeqKD, temperature 1, nats, with intervals; below 0 is better."""
    rows = world_rows("smollm2")
    lines = ["| method | KL(S‖T) less SeqKD's (95%) | KL(T‖S) less SeqKD's (95%) |", "|---|---|---|"]
    for method in _methods(rows):
        if method != "seqkd":
            cells = " | ".join(_difference(rows, method, f"kl_{way}") for way in ("student_teacher", "teacher_student"))
            lines.append(f"| {method} | {cells} |")
    return "\n".join(lines)


def _difference(rows: Sequence[Row], method: str, measure: str) -> str:
    control = ELSEWHERE if method == "gad-prefix" else "seqkd"
    ours, base = (_by_seed(rows, name, measure) for name in (method, control))
    return _interval([ours[seed] - base[seed] for seed in sorted(ours)])


def _interval(values: Sequence[float]) -> str:
    return "{:+.3f} ± {:.3f}".format(*interval(values)) if len(values) > 1 else "no overlap"


def real_table(metrics: Sequence[str] = REAL) -> str:
    """Return SmolLM2's rows at temperature 1, and those at the teacher's own temperature under their own names."""
    rows = world_rows("smollm2")
    named = [r | {"method": r["method"] + ("" if r["metrics"]["temperature"] == 1.0 or r["method"] == "teacher" else " at T 0.7")} for r in rows]  # fmt: skip
    return table(named, metrics)


def letters_table() -> str:
    """Return the letters language's rows at temperature 1."""
    return table(read_results("toy_letters")["rows"], LETTERS, 1.0)


def late_table() -> str:
    """Return both methods from saturated SeqKD on seeds that came later, and what the game gains along both frontiers."""
    rows = read_results("toy_letters_late")["rows"]
    head = "| method | against | at equal entropy (95%) | at equal modes (95%) |\n|---|---|---|---|"
    gains = _gains_line(rows, "gad-after-seqkd", "seqkd-longer", ("entropy", "modes"))
    return "\n".join([table(rows, LETTERS, 1.0), "", head, gains])


def gap_table() -> str:
    """Return the rows of the world with a capacity gap, a line a method and sampling temperature."""
    named = [
        r | {"method": f"{r['method']} at T {r['metrics']['temperature']:g}"}
        for r in read_results("smollm2_gap")["rows"]
    ]
    return table(named, GAP)


def gap_differences() -> str:
    """Return a line a game of that world: KL(S‖T) less that of SeqKD where both curves over temperature have one KL(T‖S)."""
    rows = read_results("smollm2_gap")["rows"]
    lines = [
        "| method | against | KL(S‖T) at equal KL(T‖S), nats (95%) | KL(S‖T) at equal entropy, nats (95%) |",
        "|---|---|---|---|",
    ]
    for method in dict.fromkeys(r["method"] for r in rows):
        if method.startswith("gad"):
            axes = ("kl_teacher_student", "sequence_entropy")
            lines.append(_gains_line(rows, method, "seqkd-best", axes, "kl_student_teacher"))
    return "\n".join(lines)


def draw_gap() -> Figure:
    """Both divergences in the world with a capacity gap, a curve a method over sampling temperature; low and left is better."""
    rows = read_results("smollm2_gap")["rows"]
    seeds, curves = len({r["seed"] for r in rows}), {}
    for method in dict.fromkeys(r["method"] for r in rows):
        every = sorted({r["metrics"]["temperature"] for r in select(rows, method)})
        means = {t: [mean_std(select(rows, method, t), f"kl_{way}")[0] for way in ("teacher_student", "student_teacher")] for t in every}  # fmt: skip
        tokens = mean_std(select(rows, method, 1.0), "mean_length")[0]
        curves[f"{method}, {tokens:.0f} tokens at T 1"] = [
            (x, y, t) for t, (x, y) in means.items() if len(select(rows, method, t)) == seeds
        ]
    theirs = mean_std(rows, "teacher_mean_length")[0]
    layers = smollm2_gap.WORLDS[rows[0]["world"]].layers
    title = f"SmolLM2 with {layers} of its {smollm2_gap.ALL_LAYERS} layers (teacher: {theirs:.0f} tokens); small numbers are temperatures"
    return plot_frontier(curves, "KL(teacher‖student), nats: what is missed", "KL(student‖teacher), nats: what is wrong", title)  # fmt: skip


def completions_sampled(world: str, method: str) -> int:
    """Return how many completions a method samples while it trains, warm-up included, from its world's settings.

    Training steps times batch times N for the game; one a training text for SODA. Raises KeyError for a method not known.
    """
    letters = world == "toy_letters"
    config, rows = (PRESETS["toy"], toy_letters.SIZE) if letters else (PRESETS["smollm2-135m"], SMOLLM2_ROWS)
    batch, head = config.warmup_batch_size, config.replace(**toy_letters.HEAD) if letters else config
    orpo, rounds = (toy_letters.ORPO, toy_letters.DIAL_ROUNDS) if letters else (smollm2.ORPO, smollm2.DIAL)
    counts: dict[str, Callable[[], int]] = {
        **dict.fromkeys(("teacher", "base", "seqkd", "seqkd-best", "seqkd-equal-cpu", "seqkd-longer", "seqkd-cheating", ELSEWHERE), lambda: 0),
        **dict.fromkeys(("soda", "seqkd-on-surrogate"), lambda: rows),
        **dict.fromkeys(("gad-sequence", "gad-prefix", "frozen-sequence"), lambda: _played(head)),
        **dict.fromkeys((f"{who}-implicit{how}" for who in ("gad", "frozen") for how in ("", "-sft", "-small", "-fast")), lambda: _played(config)),
        "gad-after-seqkd": lambda: _played(config.replace(max_steps=toy_letters.LATE_STEPS)),
        "gad-after-soda": lambda: rows + _played(config),
        "orpo-distill": lambda: rows + round(rows / 2) * ((num_steps(orpo["epochs"], rows, batch) - 1) // max(1, round(rows / batch))),
        "dial": lambda: rounds["rounds"] * rounds["prompts_a_round"] * config.num_generations,
    }  # fmt: skip
    return counts[method]()


def _played(config: GADConfig) -> int:
    steps = config.discriminator_warmup_steps + config.max_steps
    return steps * config.per_device_train_batch_size * config.num_generations


def with_sampled(world: str, markdown: str) -> str:
    """Return a table of methods with a column more: the completions that each one samples while it trains."""
    head, rule, *lines = markdown.splitlines()
    methods = [line.removeprefix("| ").split(" | ")[0].partition(" at T ")[0] for line in lines]
    counted = [f"{line} {completions_sampled(world, m)} |" for line, m in zip(lines, methods, strict=True)]
    return "\n".join([f"{head} completions sampled |", f"{rule}---|", *counted])


def draw() -> Figure:
    """Both divergences of every method on both worlds; low and left is better. Hollow: sampled at the teacher's temperature."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    worlds = {name: world_rows(name) for name in ("toy_letters", "smollm2")}
    every = list(dict.fromkeys(method for rows in worlds.values() for method in _methods(rows)))
    for i, ((name, rows), title) in enumerate(zip(worlds.items(), ("Letters language", "SmolLM2-135M"), strict=True)):
        axes = figure.add_subplot(1, 2, i + 1)
        for method in _methods(rows):
            k = every.index(method)  # a method looks alike in both worlds
            look = {"color": METHOD_COLOURS[k % len(METHOD_COLOURS)], "marker": "osD^vPX*"[k % 8]}
            seconds = mean_std(_at_one(rows, method), "cpu_seconds")[0]
            _point(axes, _at_one(rows, method), look, f"{method}, {seconds:.0f} CPU seconds")
            if name == "smollm2" and select(rows, method, 0.7):
                _point(
                    axes, select(rows, method, 0.7), look | {"markerfacecolor": "white"}, f"{method}, sampled at T 0.7"
                )
        axes.set(title=title, xlabel="KL(teacher‖student), nats: what is missed", ylabel="KL(student‖teacher), nats: what is wrong")  # fmt: skip
        if name == "toy_letters":
            axes.set(xscale="log", yscale="log", xlim=(0.8, 40), ylim=(2.5, 60))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
                axis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize="small", frameon=False)
    return figure


def _point(axes: Axes, rows: Sequence[Row], look: dict[str, str], label: str) -> None:
    (x, dx), (y, dy) = (mean_std(rows, metric) for metric in ("kl_teacher_student", "kl_student_teacher"))
    axes.errorbar(x, y, dy, dx, linestyle="none", capsize=2, label=label, **look)


if __name__ == "__main__":
    print(letters_table(), against_seqkd(), winners("toy_letters"), real_table(), winners("smollm2"), sep="\n\n")
    draw().savefig(FOLDER / "bakeoff.png", dpi=110)
