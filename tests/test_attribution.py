"""What a piece contributes is recomputed here from scores of whole rows, one at a time; texts of models stay text."""

import io
import itertools
import re

import pytest
import torch
from conftest import shake, tiny_config, tiny_folder, tiny_reader

from minigad.attribution import END, PIECE_MEANINGS, Attribution, attribute, colour_limit
from minigad.chat import Row
from minigad.discriminator import Discriminator
from minigad.markup import attribution_html, coloured, escape
from minigad.plots import plot_attribution
from minigad.student import Student

HOSTILE = "<script>alert('é')</script> \u202e & \x1b[31m 日本 \U0001f600\n\"quoted\""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return str(tiny_folder(folder / "base")), str(tiny_reader(folder / "reader"))


def judge_of(folders, kind, **changes) -> Discriminator:
    config = tiny_config(
        student=folders[0], discriminator=kind, max_prompt_length=12, max_completion_length=64, **changes
    )
    student = Student.load(config)
    discriminator = Discriminator.load(config, student)
    shake(discriminator.language_model, 0.2)
    if discriminator.head is not None:
        torch.nn.init.normal_(discriminator.head.weight)
    return discriminator


def score(discriminator, row: Row) -> float:
    return discriminator.scores_of([row]).scores.item()


@pytest.mark.parametrize("finished", [True, False])
def test_prefix_contributions_are_differences_of_scores_of_cut_texts(folders, finished):
    """Bytes of one character count together: every piece's number is score(text up to its end) - score(up to its start)."""
    discriminator = judge_of(folders, "prefix")
    seen = attribute(discriminator, "why?", "aé b", finished=finished)
    assert seen.pieces == ["a", "é", " ", "b", END][: 5 if finished else 4]
    row = discriminator.encode(["why?"], ["aé b"], [finished])[0]
    ends = [1, 3, 4, 5, 6][: len(seen.pieces)]
    upto = [0.0, *(score(discriminator, Row(row.prompt_ids, row.completion_ids[:end])) for end in ends)]
    assert seen.contributions == pytest.approx([b - a for a, b in itertools.pairwise(upto)], abs=1e-4)
    assert sum(seen.contributions) == pytest.approx(seen.score, abs=1e-4)


def test_implicit_contributions_are_log_ratios_of_softmax_probabilities(folders):
    """Against log-probabilities that transformers' own logits give, with each player's adapter switched on by hand."""
    discriminator = judge_of(folders, "implicit", discriminator_scale=0.3)
    seen = attribute(discriminator, "why?", "so é", finished=True)
    row = discriminator.encode(["why?"], ["so é"], [True])[0]
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    model, logprobs = discriminator.language_model.model, {}
    for who in ("discriminator", "student"):
        model.set_adapter(who)
        with torch.no_grad():
            every = model.eval()(input_ids=ids).logits.log_softmax(-1)[0, len(row.prompt_ids) - 1 : -1]
        logprobs[who] = every[range(len(row.completion_ids)), list(row.completion_ids)]
    ratios = (0.3 * (logprobs["discriminator"] - logprobs["student"])).tolist()
    assert seen.pieces == ["s", "o", " ", "é", END]
    assert seen.contributions == pytest.approx([*ratios[:3], ratios[3] + ratios[4], ratios[5]], abs=1e-5)
    assert seen.score == pytest.approx(sum(ratios), abs=1e-5)


@pytest.mark.parametrize("model", ["shared base", "reads both ways"])
def test_sequence_contributions_are_what_leaving_a_piece_out_costs(folders, model):
    own = {"discriminator_model": folders[1]} if model == "reads both ways" else {}
    discriminator = judge_of(folders, "sequence", **own)
    seen = attribute(discriminator, "why?", "aéb", finished=True)
    row = discriminator.encode(["why?"], ["aéb"], [True])[0]
    ids = row.completion_ids
    assert seen.pieces == ["a", "é", "b", END]
    rests = [ids[1:], ids[:1] + ids[3:], ids[:3] + ids[4:], ids[:4]]
    without = [score(discriminator, Row(row.prompt_ids, rest)) for rest in rests]
    assert seen.contributions == pytest.approx([seen.score - one for one in without], abs=1e-4)
    assert max(map(abs, seen.contributions)) > 1e-2


def test_cost_of_leaving_out_is_bounded_and_no_character_is_lost(folders, monkeypatch):
    discriminator = judge_of(folders, "sequence")
    text, rows = "some words of 31 characters, é...", []
    scores_of = discriminator.scores_of
    monkeypatch.setattr(discriminator, "scores_of", lambda some: rows.append(len(some)) or scores_of(some))
    seen = attribute(discriminator, "why?", text, max_parts=5)
    assert rows == [1, 6]  # the whole, then without each of five parts and without the end
    assert "".join(seen.pieces) == text + END
    assert len({len(piece) for piece in seen.pieces[:4]}) == 1


def test_a_text_of_one_piece_has_all_of_the_score(folders):
    seen = attribute(judge_of(folders, "sequence"), "why?", "")
    assert (seen.pieces, seen.contributions) == ([END], [seen.score])


@pytest.mark.parametrize("kind", PIECE_MEANINGS)
def test_pieces_join_to_what_was_read(folders, kind):
    """Of any text, however its bytes were split; beyond max_completion_length nothing was read, half a character shows as �."""
    discriminator = judge_of(folders, kind)
    assert "".join(attribute(discriminator, "p", HOSTILE[:30], finished=False).pieces) == HOSTILE[:30]
    long = attribute(discriminator, "p", "x" * 63 + "é", max_parts=64)
    assert "".join(long.pieces) == "x" * 63 + "\ufffd"  # 64 tokens


def test_the_first_piece_does_not_set_the_colours():
    """It carries the prompt's arbitrary zero, unless it is all there is."""
    one = Attribution(["a", "b"], [9.0, -0.5], 8.5, "prefix")
    assert colour_limit([one, Attribution(["c"], [0.1], 0.1, "prefix")]) == 0.5
    assert colour_limit([Attribution(["a"], [-2.0], -2.0, "prefix")]) == 2.0
    assert colour_limit([Attribution(["a"], [0.0], 0.0, "prefix")]) == 1.0


def test_html_says_every_number_in_words_and_runs_nothing():
    seen = Attribution([HOSTILE, "<b>", END], [0.5, -0.25, 0.0], 0.25, "prefix")
    page = attribution_html(seen)
    assert "<script" not in page and "<b>" not in page.replace("<b></b>", "")
    assert "⟨U+202E⟩" in page and "⟨U+001B⟩" in page and escape("'é'") in page
    assert re.findall(r'title="([^"]*)"', page) == ["+0.500", "-0.250", "+0.000"]
    assert page.count("<tr>") == 3
    assert PIECE_MEANINGS["prefix"] in page
    assert not re.search(r"https?:|src=|href=|url\(", page)


def test_dark_text_stands_on_white_of_its_own():
    """Notebooks and the report may be dark: what sets the colour of its text sets what is under it too, and opaquely."""
    seen = Attribution(["a\n", "b"], [0.5, -0.25], 0.25, "prefix")
    styles = re.findall(r'style="([^"]*)"', attribution_html(seen))
    dark = [style for style in styles if "color:#111" in style]
    assert len(dark) == 3 and all("#fff" in style for style in dark)
    assert "a↵\n</code>" in attribution_html(seen)


def test_sign_is_shown_by_a_line_as_well_as_by_colour():
    spans = re.findall(r"<span[^>]*>", coloured(Attribution(["a", "b", "c"], [0.5, -0.25, 0.001], 0.0, "prefix"), 0.5))
    assert ["solid" in span for span in spans] == [True, False, False]
    assert ["dotted" in span for span in spans] == [False, True, False]
    assert re.findall(r"background:rgba\(([^)]*)\)", "".join(spans)) == [
        "213,94,0,0.60",
        "0,114,178,0.30",
        "213,94,0,0.00",
    ]


def test_figure_draws_a_bar_a_piece_and_any_text():
    """A dollar sign or a control character in a piece must not stop it; a text of many pieces is drawn without names."""
    few = Attribution(["$x", "\x1b", "\n", "é"], [3.0, -0.2, 0.1, 0.0], 2.9, "implicit")
    many = Attribution(["x"] * 200, [0.1] * 200, 20.0, "implicit")
    figure = plot_attribution({"teacher": few, "student $": many})
    figure.savefig(io.BytesIO())
    top, bottom = figure.axes
    assert [bar.get_height() for bar in top.patches] == few.contributions
    assert [bar.get_hatch() for bar in top.patches] == ["", "///", "", "///"]
    assert [label.get_text() for label in top.get_xticklabels()] == ["$x", "⟨U+001B⟩", "↵", "é"]
    assert [text.get_text() for text in top.texts] == ["↑+3.00"]  # beyond the scale, which the other pieces set
    assert len(bottom.patches) == 200
    assert "of 200" in bottom.get_xlabel()
