"""The report shows what a model wrote as text, whatever it wrote; it needs nothing from outside."""

import json
import re
from pathlib import Path

import pytest
import torch

from minigad.config import GADConfig, UserError
from minigad.plots import plot_1d, plot_frontier, plot_lengths, plot_run
from minigad.report import write_report
from minigad.run_directory import RunDirectory

HOSTILE = (
    '<script>alert(1)</script> **bold** "quoted" \u202eevil\u202c \x1b[31m \ud800 <img src=http://x.example/a.png>'
)
GAME = {"reward": 0.1, "discriminator/margin": 0.5, "discriminator/accuracy": 0.7, "completions/mean_length": 9.0}


def metrics_of(steps: int) -> list[dict]:
    warmup = [{"phase": "warmup", "step": i + 1, "loss": 2.0 / (i + 1)} for i in range(steps)]
    early = [{"phase": "discriminator_warmup", "step": i + 1, **GAME} for i in range(3)]
    game = [{"phase": "gad", "step": i + 1, "loss": 0.0, "entropy": 1.0, **GAME} for i in range(steps)]
    game[-1]["discriminator/accuracy_eval"] = 0.6
    return warmup + early + game


def sample_of(text: str) -> dict:
    return {"prompt": text, "teacher": text, "student": text, "finished": False}


def new_run(folder: Path, **changes) -> RunDirectory:
    return RunDirectory(folder, GADConfig(**changes), {"method": "gad"})


def full_run(folder: Path, text: str = "a plain answer") -> str:
    run = new_run(folder, student=text.replace("\ud800", ""))  # RunDirectory cannot write half a character
    list(run.record(iter(metrics_of(5))))
    numbers = {"honest_auc": 0.61234, "honest_auc_low": 0.55, "honest_auc_high": 0.67, "honest_auc_ceiling": 0.52}
    (folder / "evaluation.json").write_text(json.dumps({"metrics": numbers, "samples": [sample_of(text)] * 30}))
    return write_report(folder).read_text(encoding="utf-8")


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_model_text_is_shown_and_never_interpreted(tmp_path):
    """A script, an image, a quote, a reordering mark, an escape and half a character all arrive as visible text."""
    page = full_run(tmp_path / "run", HOSTILE)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; **bold** &quot;quoted&quot; ⟨U+202E⟩evil⟨U+202C⟩ ⟨U+001B⟩[31m" in page
    assert "⟨U+D800⟩" in page
    assert not set(page) & set("\u202e\u202c\x1b")


def test_page_refers_to_nothing_outside(tmp_path):
    """Every src is a data URI, there are no links, and no script, even where a model wrote an address."""
    page = full_run(tmp_path / "run", HOSTILE)
    tags = " ".join(re.findall(r"<[^>]*>", page))
    sources = re.findall(r'\bsrc="([^"]{,30})', tags)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"http:|https:|//|\bhref|<link|@import|url\(", re.sub(r"base64,[^\"]*", "", tags))
    assert tags.count("<img alt=") == 2


def test_headline_is_read_beside_its_interval_and_ceiling(tmp_path):
    """honest_auc stands with its interval and ceiling in one cell; 20 of 30 samples are shown, marked as cut."""
    page = full_run(tmp_path / "run")
    assert "0.6123 (95%: 0.55 to 0.67); teacher against itself: 0.52" in page
    assert page.count("<article>") == 20
    assert page.count("Student (cut off)") == 20
    assert page.count("default toy") == 1  # the one setting that was changed


def test_empty_run_says_what_is_missing(tmp_path):
    """A run that was stopped at once still has a report; nothing temporary is left beside it."""
    new_run(tmp_path / "run")
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Not evaluated" in page
    assert "No training metrics" in page
    assert "No samples" in page
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "report.html"]


def test_unevaluated_run_shows_training_samples(tmp_path):
    """Without an evaluation the samples of training are shown."""
    run = new_run(tmp_path / "run")
    samples = [{"prompt": "why?", "teacher": "because", "student": "I do not know", "score": 0.5}]
    list(run.record(iter([{"phase": "gad", "step": 1, **GAME, "samples": samples}])))
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "last samples of training" in page
    assert "I do not know" in page


def test_no_run_is_a_user_error(tmp_path):
    """A folder without config.json is refused, and nothing is written into it."""
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_run_figure_has_panels_for_what_was_measured():
    """Only panels with data are drawn, warm-up of the discriminator lies at steps up to 0, and chance is marked."""
    assert titles(plot_run(metrics_of(5)[:5])) == ["Cross-entropy on teacher text"]
    figure = plot_run(metrics_of(200))
    assert len(titles(figure)) == 5
    assert "KL to the reference" not in titles(figure)
    accuracy = figure.axes[titles(figure).index("Discriminator accuracy")]
    assert list(accuracy.lines[0].get_xdata()[:4]) == [-2, -1, 0, 1]
    assert {"chance", "held-out prompts"} <= set(accuracy.get_legend_handles_labels()[1])


def test_figures_draw_without_pyplot_state():
    """Every figure can be saved, also of one step or with a dollar sign in a name, and pyplot learns of none."""
    import io

    from matplotlib import pyplot

    figures = [
        plot_run(metrics_of(1)),
        plot_run(metrics_of(1)[1:3]),  # stopped within the discriminator's warm-up
        plot_lengths([sample_of("")]),
        plot_lengths([sample_of("one two three " * 50)]),
        plot_frontier({"gad $x": [(0.1, 0.2, 1.0), (0.2, 0.1, 0.5)], "seqkd": [(0.3, 0.3, 1.0)]}, "x", "y"),
        plot_1d(torch.full((60,), 1 / 60), {"gad": torch.full((60,), 1 / 60)}),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO())
    assert pyplot.get_fignums() == []
