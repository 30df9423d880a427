"""Write the tables of README.md and of docs/, and four figures, from benchmarks/results/: no number in them was typed.

python benchmarks/tables.py            # rewrite the pages, and frontier.png, bakeoff.png, gap.png and growth.png in benchmarks/results/
python benchmarks/tables.py --check    # exit 1 if a page and the results disagree
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import bakeoff
import growth
from audit import audit_table
from claims import claims_table, recipe_table, variants_table
from frontier import frontier_table
from health import health_table
from results import FOLDER, counts_table, mean_std, read_results, select, table

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
ONE_DIMENSION = ["kl_student_teacher", "kl_teacher_student", "sigma", "mass_on_modes", "cpu_seconds"]
REAL = ["kl_student_teacher", "kl_teacher_student", "bayes_auc", "honest_auc", "mean_length", "cpu_seconds"]
VS_TRL = [
    "seconds",
    "rollout_seconds",
    "discriminator_update_seconds",
    "student_update_seconds",
    "tokens_per_second",
    "peak_memory_gb",
    "times_trl_speed",
    "of_trl_memory",
]
IN_SHORT = {
    "toy_letters": [
        "seqkd",
        "seqkd-equal-cpu",
        "seqkd-longer",
        "soda",
        "gad-sequence",
        "gad-implicit",
        "gad-after-seqkd",
        "frozen-implicit",
    ],
    "smollm2": ["base", "seqkd", "seqkd at T 0.7", "soda", "orpo-distill", "gad-sequence", "gad-implicit"],
}
LETTERS = ["validity", "kl_student_teacher", "kl_teacher_student", "entropy", "modes", "cpu_seconds"]


def render() -> dict[Path, dict[str, str]]:
    """Return each table's text, by page and name."""
    names = ("toy_1d", "toy_letters", "smollm2", "gpu", "vs_trl", "collect_rate", "growth")
    one, letters, real, gpu, trl, rate, grown = (read_results(name) for name in names)
    over_seeds = "mean ± standard deviation over seeds"
    readme = {
        "letters-short": _short("toy_letters", table(letters["rows"], ["validity", "modes", "cpu_seconds"], 1.0)),
        "smollm2-short": _short(
            "smollm2", bakeoff.real_table(["kl_student_teacher", "kl_teacher_student", "cpu_seconds"])
        ),
        "gpu": _source(gpu, "one run") + _gpu_table(gpu),
    }
    results = {
        "toy-1d": _source(one, over_seeds) + table(one["rows"], ONE_DIMENSION),
        "toy-letters": _source(letters, over_seeds) + table(letters["rows"], LETTERS, 1.0),
        "frontier": frontier_table(letters["rows"]),
        "smollm2": _source(real, over_seeds)
        + _source(read_results("smollm2_prefix"), "the same")
        + bakeoff.real_table(REAL),
    }
    large = {
        "vs-trl": _source(trl, "mean ± standard deviation over repeats, numbered as seeds")
        + table(trl["rows"], VS_TRL),
        "growth": _source(grown, "means over repeats") + growth.growth_table(grown["rows"]),
    }
    collecting = {
        "collect-rate": _source(rate, "mean ± standard deviation over rounds") + table(rate["rows"], ["calls_a_second"])
    }
    made_by = {"kill": counts_table, "kill-smollm2-135m": counts_table, "soak": counts_table}
    rows_by = {"health": health_table, "audit": audit_table}
    records = {name: read_results(name) for name in (*made_by, *rows_by)}
    surviving = {name: _source(records[name], "one run") + make(records[name]) for name, make in made_by.items()}
    surviving |= {
        name: _source(records[name], "a value a seed") + make(records[name]["rows"]) for name, make in rows_by.items()
    }
    docs = {
        "results": results,
        "large-students": large,
        "collecting": collecting,
        "surviving": surviving,
        "bakeoff": _bakeoff(),
        "claims": _claims(),
        "recipe": {"recipe": recipe_table()},
    }
    return {README: readme} | {DOCS / f"{name}.md": tables for name, tables in docs.items()}


def _short(name: str, markdown: str) -> str:
    """Return the rows of a table that the README shows, in its order there."""
    head, rule, *lines = markdown.splitlines()
    rows = {line.removeprefix("| ").split(" | ")[0]: line for line in lines}
    return "\n".join([head, rule, *(rows[method] for method in IN_SHORT[name])])


def _claims() -> dict[str, str]:
    changes = {
        name: _source(read_results(name), "means over seeds; differences with their 95% interval")
        + variants_table(name)
        for name in ("variants", "beyond")
    }
    return {"claims": claims_table()} | changes


def _bakeoff() -> dict[str, str]:
    return {
        "bakeoff-letters": bakeoff.with_sampled("toy_letters", bakeoff.letters_table()),
        "bakeoff-frontier": bakeoff.against_seqkd(),
        "bakeoff-letters-winners": bakeoff.winners("toy_letters"),
        "bakeoff-late": _source(read_results("toy_letters_late"), "mean ± standard deviation over seeds")
        + bakeoff.late_table(),
        "bakeoff-smollm2": bakeoff.with_sampled("smollm2", bakeoff.real_table()),
        "bakeoff-smollm2-seqkd": bakeoff.real_differences(),
        "bakeoff-smollm2-winners": bakeoff.winners("smollm2"),
        "bakeoff-gap": _source(read_results("smollm2_gap"), "mean ± standard deviation over seeds")
        + bakeoff.gap_table(),
        "bakeoff-gap-seqkd": bakeoff.gap_differences(),
    }


def _gpu_table(record: dict[str, Any]) -> str:
    """A line a case: seconds and share of the matrix rate of both updates, sampling with the adapter merged, peaks and what fit says."""
    head = "| model | tokens | rows | D update | student update | sampling, merged (rows) | D update: peak (fit) | student update: peak (fit) |"
    lines = [head, "|---" * 8 + "|"]
    for case in record["cases"]:
        about, stages = case["case"], case["stages"]
        merged = [s for n, s in stages.items() if n.endswith("_merged") and "seconds" in s]
        best = max(merged, key=lambda s: s["tokens_per_second"], default=None)
        lines.append(
            f"| {about['model']} | {about['prompt_length']}+{about['completion_length']} "
            f"| {about['prompts']} x {about['num_generations']} "
            f"| {_share(stages['discriminator_update'])} | {_share(stages['student_update'])} "
            f"| {_sampling(best)} "
            f"| {_peak(stages['discriminator_update'])} | {_peak(stages['student_update'])} |"
        )
    return "\n".join(lines)


def _share(stage: dict[str, Any]) -> str:
    return f"{stage['seconds']:.1f} s ({stage['matrix_fraction']:.0%})" if "seconds" in stage else "not reached"


def _sampling(stage: dict[str, Any] | None) -> str:
    return f"{stage['tokens_per_second']:.0f} tok/s ({stage['rows']})" if stage else "-"


def _peak(stage: dict[str, Any]) -> str:
    return f"{stage['peak_gb']:.1f} GB ({stage['fit_gb']:.1f})" if "peak_gb" in stage else "-"


def _source(record: dict[str, str], what: str) -> str:
    return f"`{record['command']}` (commit {record['commit']}; {record['machine']}); {what}.\n\n"


def draw() -> None:
    """Draw the quality-coverage frontier of the letters language."""
    from minigad.plots import plot_frontier

    rows = read_results("toy_letters")["rows"]
    temperatures = sorted({r["metrics"]["temperature"] for r in rows})
    shown = (
        "seqkd-equal-cpu",
        "gad-implicit",
        "frozen-implicit",
        "gad-implicit-sft",
        "gad-sequence",
        "gad-after-seqkd",
    )
    curves = {
        method: [
            (*(mean_std(select(rows, method, t), axis)[0] for axis in ("modes", "validity")), t) for t in temperatures
        ]
        for method in shown
    }
    figure = plot_frontier(
        curves, "valid strings in use (of 15.5)", "validity", "Letters language: quality against coverage, T = 0.1 to 3"
    )
    figure.savefig(FOLDER / "frontier.png", dpi=110)


def fill(text: str, tables: dict[str, str]) -> str:
    """Return a page with every table between its markers made anew."""
    for name, made in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, made=made: m[1] + made + m[2], text, flags=re.DOTALL)
        assert count == 1, f"{count} places for the table {name}"
    return text


def main() -> int:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    made = {page: fill(page.read_text(encoding="utf-8"), tables) for page, tables in render().items()}
    if check:
        return int(any(page.read_text(encoding="utf-8") != text for page, text in made.items()))
    for page, text in made.items():
        page.write_text(text, encoding="utf-8")
    draw()
    bakeoff.draw().savefig(FOLDER / "bakeoff.png", dpi=110)
    bakeoff.draw_gap().savefig(FOLDER / "gap.png", dpi=110)
    growth.draw(read_results("growth")["rows"]).savefig(FOLDER / "growth.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
