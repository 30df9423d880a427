"""Read a run that was written before, checking every line: what is in its folder may be torn, edited or somebody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minigad.attribution import PIECE_MEANINGS
from minigad.config import UserError
from minigad.metrics import Metrics

__all__ = ["check_links", "read_json", "read_metrics", "read_run"]

Fields = dict[str, type | tuple[type, ...]]
STEP: Fields = {"phase": str, "step": int}
TEXTS: Fields = {"prompt": str, "teacher": str, "student": str}
OPINION: Fields = {"teacher_read": str, "teacher_score": (int, float), "student_score": (int, float), "seen": dict}
SEEN: Fields = {"pieces": list, "contributions": list, "score": (int, float), "kind": str}
JUDGED: Fields = {"title": str, "judge": str, "protocol": str, "counts": dict, "numbers": dict, "comparisons": list}
FINDING: Fields = {"check": str, "value": (int, float), "limit": (int, float), "words": str, "ok": bool}


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return {"config", "metrics", "samples", "evaluation", "audit"} of a run; UserError if the folder holds none, or a damaged one."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"folder {str(folder)!r} holds no run (no config.json); give the --output-dir of one")
    check_links(folder)
    return {
        "config": _read_part(folder / "config.json", {"config": dict}),
        "metrics": read_metrics(folder),
        "samples": _read_lines(folder / "samples.jsonl", TEXTS),
        "evaluation": _read_evaluation(folder / "evaluation.json"),
        "audit": _read_audit(folder / "audit.json"),
    }


def read_metrics(folder: str | Path) -> list[Metrics]:
    """Read metrics.jsonl; a last line that a killed run left torn is dropped."""
    return _read_lines(Path(folder) / "metrics.jsonl", STEP, numbers=True)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; UserError if it is damaged."""
    try:
        return json.loads(path.read_bytes(), parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it from a copy, or delete it if it can be missed"
        ) from error


def _integer(digits: str) -> int | float:
    """Read what is beyond 64 bits as a float, infinity maybe: no measure is so large, and arithmetic would raise on it."""
    return int(digits) if len(digits) < 19 else float(digits)


def check_links(folder: Path) -> None:
    """Refuse links: what is written under their names would be written elsewhere. A student/ that lies elsewhere can be read.

    And pipes and devices, at which a run would wait for ever.
    """
    there = sorted(folder.iterdir())
    if odd := [path.name for path in there if path.exists() and not path.is_file() and not path.is_dir()]:
        raise UserError(
            f"run {str(folder)!r} holds pipes or devices ({', '.join(odd)}); delete them, or give another folder"
        )
    links = [path for path in there if path.is_symlink()]
    if names := sorted(path.name for path in links if path.name.startswith(".") or not path.is_dir()):
        raise UserError(
            f"run {str(folder)!r} holds links ({', '.join(names)}), through which a run would write outside it; put the files "
            "themselves there, or give another folder"
        )


def _read_part(path: Path, fields: Fields) -> Any:
    return _checked(str(path), read_json(path), fields)


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    evaluation = _read_part(path, {"metrics": dict, "samples": list})
    _checked(f"{path}, metrics", evaluation["metrics"], {}, numbers=True)
    for number, sample in enumerate(evaluation["samples"], start=1):
        _check_sample(f"{path}, sample {number}", sample)
    judged = _checked(f"{path}", {"judge": evaluation.get("judge", [])}, {"judge": list})["judge"]
    for number, record in enumerate(judged, start=1):
        where = f"{path}, judge record {number}"
        _checked(where, record, JUDGED)
        for part in (record["numbers"], record["counts"]):
            _checked(where, part, {}, numbers=True)
        for row in record["comparisons"]:
            _checked(where, row, {"with": str}, numbers=True)
    return evaluation


def _check_sample(where: str, sample: Any) -> None:
    """Check a sample and, where there is one, the discriminator's opinion of it (see attribution.judged)."""
    _checked(where, sample, TEXTS)
    _checked(where, sample, {name: kind for name, kind in OPINION.items() if name in sample})
    if ("teacher_score" in sample) != ("student_score" in sample):
        raise UserError(f"{where}: there is a score of one side only; restore the file from a copy")
    for who in ("teacher", "student") if "seen" in sample else ():
        seen = _checked(f"{where}, seen", sample["seen"], {who: dict})[who]
        _checked(f"{where}, seen, {who}", seen, SEEN)
        texts, numbers = seen["pieces"], seen["contributions"]
        whole = all(isinstance(t, str) for t in texts) and all(isinstance(n, (int, float)) for n in numbers)
        if not whole or len(texts) != len(numbers) or seen.keys() != SEEN.keys() or seen["kind"] not in PIECE_MEANINGS:
            raise UserError(f"{where}: what the discriminator sees in the {who}'s text is damaged; restore the file")


def _read_audit(path: Path) -> list[dict[str, Any]]:
    findings = _read_part(path, {"findings": list})["findings"] if path.is_file() else []
    return [_checked(f"{path}, finding {number}", one, FINDING) for number, one in enumerate(findings, start=1)]


def _checked(where: str, value: Any, fields: Fields, numbers: bool = False) -> Any:
    """Return `value` if it is an object with these fields, and, if asked, with numbers in all others; UserError else."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: this is {str(value)[:60]!r} and not an object; restore the file from a copy")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise UserError(f"{where}: field {name!r} is {str(value.get(name))[:60]!r}; restore the file from a copy")
    for name in value.keys() - fields.keys() if numbers else ():
        if not isinstance(value[name], (int, float)):
            raise UserError(
                f"{where}: field {name!r} is {str(value[name])[:60]!r}, not a number; restore the file from a copy"
            )
    return value


def _read_lines(path: Path, fields: Fields, numbers: bool = False) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    complete = path.read_bytes().split(b"\n")[:-1]  # bytes after the last newline were never finished
    rows = []
    for number, line in enumerate(complete, start=1):
        try:
            row = json.loads(line, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: the line is damaged ({error}); delete it") from error
        rows.append(_checked(f"{path}:{number}", row, fields, numbers))
    return rows
