"""A hundred hostile inputs and what minigad answers. `python tests/hostile.py` writes the list into docs/hostile-inputs.md.

Each case makes files in an empty folder and returns the words of a command line. The answer must be one sentence on
stderr and status 2, quickly, with nothing left behind in the output folder; a few inputs are odd but fine, and must be used.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigad.cli import main
from minigad.toy.model import toy_tokenizer

CASES: dict[str, Callable[[Path], list[str]]] = {}
SMALL = (  # noqa: SIM905
    "--preset toy --warmup-epochs 0.1 --warmup-batch-size 4 --discriminator-sft-epochs 0 --discriminator-warmup-steps 1 "
    "--max-steps 1 --num-generations 2 --per-device-train-batch-size 2 --max-completion-length 8 --eval-fraction 0.4"
).split()
GOOD = [{"prompt": f"say {i}", "completion": f"you said {i}"} for i in range(24)]
SECONDS = 600.0  # a backstop, not a measure


def case(name: str, make: Callable[[Path], list[str]]) -> None:
    assert name not in CASES, name
    CASES[name] = make


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def pairs(folder: Path, content: bytes | None = None, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_bytes(lines(GOOD) if content is None else content)
    return path


def distill(folder: Path, *words: str, data: Path | None = None) -> list[str]:
    given = set(words)
    small = [w for flag, value in zip(SMALL[::2], SMALL[1::2], strict=True) if flag not in given for w in (flag, value)]
    return ["distill", "--data", str(data or pairs(folder)), "--output-dir", str(folder / "run"), *small, *words]


# --- data ---


def data_case(name: str, content: bytes, file: str = "pairs.jsonl") -> None:
    case(f"data: {name}", lambda folder: distill(folder, data=pairs(folder, content, file)))


def row_case(name: str, row: Any) -> None:
    data_case(name, lines([*GOOD, row]))


data_case("empty file", b"")
data_case("white space only", b" \n\n\t\n")
data_case("random bytes", bytes(range(256)) * 40)
data_case("not UTF-8", lines(GOOD) + b'{"prompt": "caf\xe9", "completion": "x"}\n')
data_case("UTF-16", lines(GOOD).decode().encode("utf-16"))
data_case("last line cut off", lines(GOOD)[:-9])
data_case("a list on a line", lines([*GOOD, ["a", "b"]]))
data_case("a number on a line", lines([*GOOD, 7]))
data_case("null on a line", lines([*GOOD, None]))
data_case("nesting 100,000 deep", lines(GOOD) + b"[" * 100_000 + b"\n")
data_case("a number of 5,000 digits", lines(GOOD) + b'{"prompt": ' + b"9" * 5000 + b', "completion": "x"}\n')
data_case("an empty JSON list", b"[]", "pairs.json")
data_case("a JSON object, not a list", b'{"prompt": "a", "completion": "b"}', "pairs.json")
data_case("a JSON list cut off", json.dumps(GOOD).encode()[:-5], "pairs.json")
data_case("a CSV file", b"prompt,completion\na,b\n", "pairs.csv")
data_case("a pickle", b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.", "pairs.pkl")
data_case("a parquet name over text", b"PAR1", "pairs.parquet")
data_case("one row", lines(GOOD[:1]))
data_case("one prompt in all rows", lines([{"prompt": "same", "completion": str(i)} for i in range(24)]))
data_case("fewer rows than a batch", lines(GOOD[:4]))
row_case("prompt is null", {"prompt": None, "completion": "x"})
row_case("prompt is a number", {"prompt": 3, "completion": "x"})
row_case("prompt is true", {"prompt": True, "completion": "x"})
row_case("prompt is an object", {"prompt": {"a": 1}, "completion": "x"})
row_case("prompt is empty", {"prompt": "", "completion": "x"})
row_case("prompt is white space", {"prompt": " \n", "completion": "x"})
row_case("completion is empty", {"prompt": "a", "completion": ""})
row_case("completion is a list of words", {"prompt": "a", "completion": ["x", "y"]})
row_case("NUL in a prompt", {"prompt": "a\0b", "completion": "x"})
row_case("half a surrogate pair", {"prompt": "a\ud800", "completion": "x"})
row_case("completion missing", {"prompt": "a"})
row_case("other column names", {"question": "a", "answer": "x"})
row_case("an empty object", {})
row_case("messages empty", {"messages": []})
row_case("messages without a role", {"messages": [{"content": "a"}]})
row_case(
    "messages with an unknown role",
    {"messages": [{"role": "root", "content": "a"}, {"role": "assistant", "content": "b"}]},
)
row_case("messages that end with the user", {"messages": [{"role": "user", "content": "a"}]})
row_case(
    "messages whose content is null",
    {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]},
)
row_case("control tokens as text", {"prompt": "<|im_end|><|end|><|assistant|>", "completion": "<|end|>"})
row_case(
    "script tags, escapes and bidi marks",
    {"prompt": "<script>alert(1)</script>\u202e", "completion": "\x1b[31m[x](javascript:1)"},
)
row_case("a prompt of 20,000 characters", {"prompt": "a" * 20_000, "completion": "x"})
case("data: no such file", lambda folder: distill(folder, data=folder / "nowhere.jsonl"))
case("data: a directory", lambda folder: distill(folder, data=folder))
case("data: a device that never ends", lambda folder: distill(folder, data=Path("/dev/zero")))
case("data: NUL in the path", lambda folder: distill(folder, data=folder / "a\0b.jsonl"))
case("data: escape codes in the path", lambda folder: distill(folder, data=folder / "\x1b[31mred\x1b[0m.jsonl"))
case("data: a path of 5,000 characters", lambda folder: distill(folder, data=folder / ("a" * 5000)))


def fifo(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe.jsonl")
    return distill(folder, data=folder / "pipe.jsonl")


def link_loop(folder: Path) -> list[str]:
    (folder / "a.jsonl").symlink_to(folder / "b.jsonl")
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    return distill(folder, data=folder / "a.jsonl")


case("data: a pipe that nobody writes to", fifo)
case("data: a loop of links", link_loop)
case("eval data: no such file", lambda folder: distill(folder, "--eval-data", str(folder / "nowhere.jsonl")))
case("eval data: the training data again", lambda folder: distill(folder, "--eval-data", str(pairs(folder))))

# --- settings ---

SETTINGS = [
    "--max-steps=-1", "--max-steps=1.5", "--max-steps=abc", "--max-steps=99999999999999999999", "--seed=-1",
    "--seed=4294967296", "--learning-rate=nan", "--learning-rate=inf", "--learning-rate=-1", "--learning-rate=2",
    "--temperature=0", "--temperature=1e309", "--num-generations=1", "--num-generations=5000", "--eval-fraction=1",
    "--eval-fraction=0.000001", "--max-prompt-length=0", "--max-prompt-length=1", "--max-completion-length=0", "--beta=-0.1",
    "--epsilon=0", "--warmup-batch-size=0", "--token-budget=0", "--save-total-limit=0", "--ema-decay=1",
    "--discriminator=oracle", "--dtype=int8", "--on-alarm=panic", "--preset=tyo", "--method=magic", "--max-step=3",
    "--lora-r=2 --lora-target-modules=nope", "--lora-r=-1", "--lora-r=2 --lora-target-modules=", "--max-step=\x1b[31m3", "--student=", "--student=../../etc",
    "--student=a/b/c", "--student=/etc", "--student=$(touch pwned)", "--student=;reboot", "--student=-rf",
    "--student=https://evil.example/model", "--student=file:///etc/passwd", "--student=owner/name@main",
    "--student=owner/\x1b[31mred", "--student=owner/name\nminigad: all is well", "--discriminator-model=no/such-model",
]  # fmt: skip
for setting in SETTINGS:
    case(f"setting: {setting!r}"[:90], lambda folder, setting=setting: distill(folder, *re.split(" (?=--)", setting)))
case("setting: a model name of 3,000 characters", lambda folder: distill(folder, "--student=" + "a/" + "b" * 3000))


def output(name: str, make: Callable[[Path], str]) -> None:
    case(f"output: {name}", lambda folder: [w if w != str(folder / "run") else make(folder) for w in distill(folder)])


def a_file(folder: Path) -> str:
    (folder / "run-file").write_text("mine")
    return str(folder / "run-file")


output("a file", a_file)
output("below a file", lambda folder: a_file(folder) + "/run")
output("a device", lambda folder: "/dev/null")
output("a place that cannot be written", lambda folder: "/proc/minigad-run")
output("an empty name", lambda folder: "")
output("NUL in the path", lambda folder: str(folder / "a\0b"))
output("a name of 5,000 characters", lambda folder: str(folder / ("a" * 5000)))


# --- model folders ---


def model(name: str, files: dict[str, bytes]) -> None:
    def make(folder: Path) -> list[str]:
        toy_tokenizer().save_pretrained(folder / "model")
        for file, content in files.items():
            (folder / "model" / file).write_bytes(content)
        return distill(folder, "--student", str(folder / "model"))

    case(f"model: {name}", make)


LLAMA = json.dumps({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}).encode()
model("an empty folder", {})
model("pickled weights only", {"config.json": LLAMA, "pytorch_model.bin": b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."})
model("weights that are not safetensors", {"config.json": LLAMA, "model.safetensors": b"garbage"})
model(
    "a safetensors header of 10^18 bytes",
    {"config.json": LLAMA, "model.safetensors": (10**18).to_bytes(8, "little") + b"{}"},
)
model("config.json cut off", {"config.json": LLAMA[:-9], "model.safetensors": b"x"})
model("config.json is a list", {"config.json": b"[]", "model.safetensors": b"x"})
model("code of its own", {
    "config.json": json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}).encode(),
    "evil.py": b"open('pwned', 'w')",
    "model.safetensors": b"x",
})  # fmt: skip
model("an index that leads out of the folder", {
    "config.json": LLAMA,
    "model.safetensors.index.json": json.dumps({"weight_map": {"w": "../../../etc/passwd"}}).encode(),
})  # fmt: skip
model("an index that is a list", {"config.json": LLAMA, "model.safetensors.index.json": b"[]"})


# --- run folders ---

RECORD = {"minigad": "0", "method": "gad", "config": {}}
ROW = {"phase": "gad", "step": 1, "reward": 0.1, "discriminator/accuracy": 0.5}


def run(name: str, files: dict[str, Any], *words: str) -> None:
    def make(folder: Path) -> list[str]:
        (folder / "old").mkdir()
        for file, content in ({"config.json": RECORD} | files).items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            if content is not None:
                (folder / "old" / file).write_bytes(data)
        return [words[0] if words else "report", str(folder / "old"), *words[1:]]

    case(f"run: {name}", make)


run("no config.json", {"config.json": None})
run("config.json cut off", {"config.json": b'{"conf'})
run("config.json is a list", {"config.json": []})
run("config.json without a config", {"config.json": {"method": "gad"}})
run("config.json not UTF-8", {"config.json": b'{"config": "\xff"}'})
run("config.json 100,000 deep", {"config.json": b"[" * 100_000})
run("config is a string", {"config.json": {"config": "x"}})
run("metrics.jsonl with garbage in the middle", {"metrics.jsonl": b"{}\n\x00\xff\n{}\n"})
run("metrics.jsonl with a list", {"metrics.jsonl": b"[]\n"})
run("metrics without a phase", {"metrics.jsonl": lines([{"step": 1}])})
run("metrics whose step is text", {"metrics.jsonl": lines([{**ROW, "step": "<script>"}])})
run("metrics whose reward is text", {"metrics.jsonl": lines([{**ROW, "reward": "high"}])})
run("metrics whose step is 10^400", {"metrics.jsonl": lines([{**ROW, "step": 10**400}])})
run("diagnosis of a reward of 10^400", {"metrics.jsonl": lines([{**ROW, "reward": 10**400}])}, "diagnose")
run("metrics with NaN", {"metrics.jsonl": b'{"phase": "gad", "step": 1, "reward": NaN}\n'})
run("metrics with a torn last line", {"metrics.jsonl": lines([ROW]) + b'{"phase": "g'})
run("samples that are numbers", {"samples.jsonl": b"1\n2\n"})
run("samples without text", {"samples.jsonl": lines([{"phase": "gad"}])})
run(
    "samples with scripts and escapes",
    {"samples.jsonl": lines([{"prompt": "<script>\u202e", "teacher": "\x1b[2J", "student": "\ud800"}])},
)
run("evaluation.json is a list", {"evaluation.json": []})
run("evaluation.json without metrics", {"evaluation.json": {"samples": []}})
run("evaluation.json cut off", {"evaluation.json": b'{"metrics": '})
run("evaluation whose numbers are text", {"evaluation.json": {"metrics": {"honest_auc": "<b>"}, "samples": []}})
run("judge records that are a number", {"evaluation.json": {"metrics": {}, "samples": [], "judge": 3}})
run("judge records without fields", {"evaluation.json": {"metrics": {}, "samples": [], "judge": [{"title": "\u202e"}]}})
run("audit.json is a number", {"audit.json": 1})
run("audit.json without fields", {"audit.json": {"findings": [{}]}})
FINDING = {"check": "\x1b[2J\u202e", "value": 9.0, "limit": 1.0, "words": "<script>\x1b]0;", "ok": False}
run("diagnosis of an audit with escapes", {"audit.json": {"findings": [FINDING]}}, "diagnose")
run("diagnosis of metrics without a phase", {"metrics.jsonl": lines([{"step": 1}])}, "diagnose")
run("diagnosis of nothing", {}, "diagnose")
EVALUATE = ("evaluate", "--data", "old/pairs.jsonl")
run("evaluation of a run without a student", {"pairs.jsonl": lines(GOOD)}, *EVALUATE)
PAIRS = {"pairs.jsonl": lines(GOOD)}
run("evaluation of a run with an unknown setting", {"config.json": {"config": {"max_stps": 1}}, **PAIRS}, *EVALUATE)
run(
    "evaluation of a run with a setting of another type", {"config.json": {"config": {"seed": "x"}}, **PAIRS}, *EVALUATE
)
SET = ("evaluate", "--judge", "m", "--price", "0", "0", "--set")
run("evaluation on a set that is not there", {}, *SET, "old/\x1b[2J.jsonl")
run("evaluation with a pairwise judge and nobody to compare with", {}, *SET, "vicuna", "--protocol", "pairwise")
run(
    "choice by a measure that is not there",
    {"pairs.jsonl": lines(GOOD)},
    "choose",
    "--data",
    "old/pairs.jsonl",
    "--out",
    "new",
    "--measure",
    "\x1b",
)


def linked(folder: Path) -> list[str]:
    (folder / "old").mkdir()
    (folder / "old" / "config.json").write_text(json.dumps(RECORD))
    (folder / "old" / "report.html").symlink_to(folder / "precious")
    return ["report", str(folder / "old")]


case("run: a report that is a link to elsewhere", linked)
case("run: no such folder", lambda folder: ["report", str(folder / "nowhere")])
case("run: a file", lambda folder: ["report", str(pairs(folder))])
case("run: NUL in the path", lambda folder: ["report", "a\0b"])


def pipe(folder: Path, name: str) -> None:
    """Put a pipe, whose reader waits for ever, in the place of a file of a run."""
    os.mkfifo(folder / name)


def piped_run(folder: Path) -> list[str]:
    (folder / "old").mkdir()
    (folder / "old" / "config.json").write_bytes(json.dumps(RECORD).encode())
    pipe(folder / "old", "metrics.jsonl")
    return ["diagnose", str(folder / "old")]


def resumed_pipe(below: str, name: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "run" / below).mkdir(parents=True)
        pipe(folder / "run" / below, name)
        return distill(folder, "--resume")

    return make


case("run: a pipe for metrics.jsonl", piped_run)


def resumed(name: str, files: dict[str, Any]) -> None:
    def make(folder: Path) -> list[str]:
        (folder / "run").mkdir()
        for file, content in files.items():
            path = folder / "run" / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return distill(folder, "--resume")

    case(f"resume: {name}", make)


resumed("config.json cut off", {"config.json": b"{"})
resumed("config.json is a list", {"config.json": []})
resumed("config.json of another run", {"config.json": {"config": {"seed": 7}}})
resumed("config.json of a newer version", {"config.json": {"minigad": "9", "config": {"telepathy": 1}}})
resumed("metrics without a run", {"metrics.jsonl": lines([ROW])})
resumed("somebody's student without a run", {"student/model.safetensors": b"x"})
resumed("a checkpoint without a manifest", {"checkpoint-9/state.json": {}})
resumed("a manifest that leads out of the folder", {"checkpoint-9/manifest.json": {"../../pairs.jsonl": {"bytes": 1}}})
resumed("a manifest 100,000 deep", {"checkpoint-9/manifest.json": b"[" * 100_000})
resumed("a checkpoint that is a file", {"checkpoint-9": b"x"})

case("resume: a pipe for config.json", resumed_pipe("", "config.json"))
case("resume: a pipe for a manifest", resumed_pipe("checkpoint-9", "manifest.json"))

# --- collecting ---


def priced(folder: Path) -> list[str]:
    prompts = pairs(folder, lines([{"prompt": "\x1b]0;a\u202eb"}]), "\x1b[31mred.jsonl")
    return ["teach", "--prompts", str(prompts), "--model", "m", "--out", str(folder / "new.jsonl"), "--dry-run"]


case("teach: a dry run of prompts with escapes, in a file with escapes", priced)

# --- the command line itself ---

case("command: none", lambda folder: [])
case("command: unknown", lambda folder: ["destroy"])
case("command: an option without its value", lambda folder: ["distill", "--data"])
case("command: no data", lambda folder: ["distill"])
case("command: temperature nan", lambda folder: ["evaluate", str(folder), "--data", "x", "--temperature", "nan"])
case("command: temperature 0", lambda folder: ["evaluate", str(folder), "--data", "x", "--temperature", "0"])

# Odd, but nothing is wrong with them: they are used.
FINE = {
    "data: control tokens as text",
    "data: script tags, escapes and bidi marks",
    "data: a prompt of 20,000 characters",
    "teach: a dry run of prompts with escapes, in a file with escapes",
    "run: metrics with a torn last line",
    "run: metrics with NaN",
    "run: samples with scripts and escapes",
    "run: diagnosis of an audit with escapes",
    "run: diagnosis of nothing",
    "resume: a checkpoint without a manifest",
    "resume: a manifest that leads out of the folder",
    "resume: a manifest 100,000 deep",
    "resume: a checkpoint that is a file",
    "resume: a pipe for a manifest",
    "run: diagnosis of a reward of 10^400",
}


def answer(name: str) -> tuple[int, str, float, list[str]]:
    """Run a case in a folder of its own; return status, last line of stderr, seconds, and what is wrong with the answer."""
    folder, before = Path(tempfile.mkdtemp(prefix="hostile-")), Path.cwd()
    out, err = io.StringIO(), io.StringIO()
    started = time.monotonic()
    try:
        words = CASES[name](folder)
        there = snapshot(folder)
        os.chdir(folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(words)
            except SystemExit as error:
                status = error.code
        said = [line for line in err.getvalue().splitlines() if line.strip()]
        last = said[-1].replace(str(folder), "FOLDER") if said else ""
        seconds = time.monotonic() - started
        wrong = complaints(name, status, out.getvalue() + err.getvalue(), last, seconds) + left_behind(
            name, folder, there
        )
        return status, re.sub(r"hostile-\w+", "FOLDER", last), seconds, wrong
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def complaints(name: str, status: Any, shown: str, last: str, seconds: float) -> list[str]:
    wrong = []
    if status != (0 if name in FINE else 2):
        wrong.append(f"status {status}")
    if "Traceback" in shown:
        wrong.append("a traceback")
    if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", shown.replace("\x1b[A", "")):
        wrong.append("control characters on the terminal")
    if seconds > SECONDS:
        wrong.append(f"{seconds:.0f} seconds")
    if name not in FINE and not re.match(r"minigad( \w+)?: error: .{15,}", last):
        wrong.append(f"no sentence: {last!r}")
    return wrong


def left_behind(name: str, folder: Path, there: set[str]) -> list[str]:
    """What a refused input left in its folder. Only the lock may stay: it is how two processes find each other."""
    new = set() if name in FINE else snapshot(folder) - there - {"run", "run/.lock"}
    half = {path for path in snapshot(folder) if path.endswith(".tmp")}
    return [f"left {path}" for path in sorted(new | half)] + (
        ["code was run"] if any("pwned" in p for p in new) else []
    )


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def document() -> str:
    rows = []
    for name in CASES:
        row, wrong = row_of(name)
        assert not wrong, (name, wrong)
        rows.append(row)
    return (
        f"# Hostile inputs\n\n{len(CASES)} inputs and the answers to them, written by `python tests/hostile.py` and held to by "
        "`tests/test_hostile.py`: one sentence and status 2, no traceback, no control characters on the terminal, nothing "
        "left in the output folder.\n\n| input | answer |\n|---|---|\n" + "\n".join(rows) + "\n"
    )


def row_of(name: str) -> tuple[str, list[str]]:
    """Run a case; return its row of the document, and what is wrong with its answer."""
    status, last, _, wrong = answer(name)
    said = "used" if status == 0 else cell(re.sub(r"^minigad( \w+)?: error: ", "", last))
    return f"| {cell(name)} | {said} |", wrong


def cell(text: str) -> str:
    text = text if len(text) < 400 else text[:400] + "..."
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


if __name__ == "__main__":
    path = Path(__file__).parent.parent / "docs" / "hostile-inputs.md"
    path.parent.mkdir(exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    only = sys.argv[1:]
    if only:
        for name in CASES:
            if any(word in name for word in only):
                print(name, answer(name))
    else:
        path.write_text(document(), encoding="utf-8")
