"""The gain along a frontier is what was put in: two curves of one shape, sampled at other places, a known height apart."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def frontier(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import frontier

    yield frontier
    for name in ("frontier", "results"):
        sys.modules.pop(name, None)


def curve(method, seed, xs, height, x="modes", y="validity"):
    """Rows of a method whose quality falls by 0.05 for every unit of coverage."""
    return [{"method": method, "seed": seed, "metrics": {x: at, y: height - 0.05 * at}} for at in xs]


def test_the_gain_is_the_height_between_two_curves_wherever_they_were_sampled(frontier):
    rows = curve("game", 0, (1, 2.5, 7), 0.9) + curve("base", 0, (3, 4, 11), 0.8)
    rows += curve("game", 1, (1, 9), 0.7) + curve("base", 1, (2, 3, 5), 0.8)
    assert frontier.frontier_gains(rows, "game", "modes", "base") == pytest.approx([0.1, -0.1])


def test_curves_that_share_no_coverage_have_no_gain(frontier):
    rows = curve("game", 0, (1, 2), 0.9) + curve("base", 0, (3, 4), 0.8)
    assert frontier.frontier_gains(rows, "game", "modes", "base") == []


def test_the_gain_of_curves_that_cross_is_its_mean_over_the_overlap(frontier):
    """A flat curve at 0.5 against one that falls from 0.7 at 2 to 0.4 at 8: they share 2 to 8, the mean of the other is 0.55."""
    rows = [{"method": "game", "seed": 0, "metrics": {"modes": x, "validity": 0.5}} for x in (0, 10)]
    rows += curve("base", 0, (2, 8), 0.8)
    assert frontier.frontier_gains(rows, "game", "modes", "base") == pytest.approx([-0.05])


def test_another_quality_over_another_coverage(frontier):
    axes = {"x": "kl_teacher_student", "y": "kl_student_teacher"}
    rows = curve("game", 0, (3, 5), 2.0, **axes) + curve("base", 0, (4, 6), 3.0, **axes)
    gains = frontier.frontier_gains(rows, "game", "kl_teacher_student", "base", "kl_student_teacher")
    assert gains == pytest.approx([-1.0])
