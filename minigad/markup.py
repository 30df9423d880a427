"""Texts of models as HTML: escaped, and coloured by what the discriminator sees in them. No script, nothing is fetched."""

from __future__ import annotations

import html
from typing import Any

from minigad.attribution import PIECE_MEANINGS, Attribution, colour_limit
from minigad.config import visible

__all__ = ["LEGEND", "attribution_html", "coloured", "escape"]

# Orange and blue are told apart with any colour vision; the line under a piece says the sign without colour.
FOR_TEACHER, FOR_STUDENT = "213,94,0", "0,114,178"
FULL = 0.6  # opacity of the strongest colour: dark text on it stays readable
FAINT = 0.05  # share of the limit below which a piece has no line
BOX = "white-space:pre-wrap;overflow-wrap:anywhere;background:#fff;color:#111;padding:.2em .4em;line-height:1.7"


def _key(colour: str, line: str, words: str) -> str:
    """Words in a full colour, on white of their own: the page around them may be dark."""
    full = f"rgba({colour},{FULL})"
    style = f"background:linear-gradient({full},{full}),#fff;color:#111;border-bottom:2px {line} rgb({colour})"
    return f'<span style="{style}">{words}</span>'


LEGEND = (
    f"{_key(FOR_TEACHER, 'solid', 'orange, whole line')}: it raises the score, as teacher text does; "
    f"{_key(FOR_STUDENT, 'dotted', 'blue, dotted line')}: it lowers it"
)


def escape(value: Any) -> str:
    """Escape a value for HTML, and show what would reorder or hide text as ⟨U+202E⟩."""
    return html.escape(visible(str(value)))


def coloured(seen: Attribution, limit: float) -> str:
    """Return a completion as coloured pieces, each with its contribution as title; colours are full at ±limit."""
    pieces = zip(seen.pieces, seen.contributions, strict=True)
    inside = "".join(_piece(text, value, limit) for text, value in pieces)
    return f'<div dir="auto" style="{BOX}">{inside}</div>'


def attribution_html(seen: Attribution) -> str:
    """Return a completion with the discriminator's contributions: coloured, explained, and as a table for who cannot hover."""
    limit = colour_limit([seen])
    rows = "".join(
        f'<tr><td><code style="white-space:pre-wrap">{_shown(text).replace(" ", "␣")}</code></td><td>{value:+.3f}</td></tr>'
        for text, value in zip(seen.pieces, seen.contributions, strict=True)
    )
    return (
        f"<div>{coloured(seen, limit)}<p>Score {seen.score:+.3f} ({escape(seen.kind)}). {LEGEND}; full at ±{limit:.3g}. "
        f"Each number: {PIECE_MEANINGS[seen.kind]}.</p><details><summary>Numbers</summary><table>{rows}</table></details></div>"
    )


def _piece(text: str, value: float, limit: float) -> str:
    share = min(abs(value) / limit, 1.0)
    colour, line = (FOR_TEACHER, "solid") if value > 0 else (FOR_STUDENT, "dotted")
    under = f";border-bottom:2px {line} rgb({colour})" if share > FAINT else ""
    return (
        f'<span title="{value:+.3f}" style="background:rgba({colour},{FULL * share:.2f}){under}">{_shown(text)}</span>'
    )


def _shown(text: str) -> str:
    """Escape a piece, and show where a line ends."""
    return escape(text).replace("\n", "↵\n")
