"""Adapters and bases that do not fit: each is one sentence that says what to do."""

import importlib.metadata
import json

import pytest
import torch
from conftest import shake, tiny_config, tiny_folder

from minigad import hub
from minigad.config import UserError
from minigad.student import Student
from minigad.toy.model import toy_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def saved(folder, tmp_path):
    """A saved adapter, and the configuration that made it."""
    config = tiny_config(student=str(folder))
    student = Student.load(config)
    shake(student)
    student.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", config


def edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_of_another_rank_is_refused(saved):
    adapter, config = saved
    with pytest.raises(UserError, match=r"has rank 4 but config field 'lora_r' is 8; set --lora-r 4"):
        Student.from_pretrained(adapter, config.replace(lora_r=8))


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_of_a_base_with_fewer_or_more_layers_is_refused(saved, tmp_path, layers):
    adapter, config = saved
    other = tiny_folder(tmp_path / "other", layers=layers)
    with pytest.raises(UserError, match=r"was made for another base than .*14 of its matrices do not fit.*--student"):
        Student.from_pretrained(adapter, config.replace(student=str(other)))


def test_an_adapter_of_a_wider_base_is_refused(saved, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter, config = saved
    other = tiny_folder(tmp_path / "other")
    wide = LlamaConfig.from_pretrained(other, hidden_size=128)
    LlamaForCausalLM(wide).save_pretrained(other)
    with pytest.raises(UserError, match="was made for another base"):
        Student.from_pretrained(adapter, config.replace(student=str(other)))


def test_an_adapter_of_a_base_with_another_name_is_refused_before_a_base_is_loaded(saved, monkeypatch):
    adapter, config = saved
    monkeypatch.setattr(hub, "resolve", lambda *_, **__: pytest.fail("a base was looked up"))
    edit(adapter, base_model_name_or_path="Qwen/Qwen2.5-3B-Instruct")
    with pytest.raises(UserError, match=r"belongs to 'Qwen/Qwen2.5-3B-Instruct' but .*'student' is 'qwen2.5-7b'"):
        Student.from_pretrained(adapter, config.replace(student="qwen2.5-7b"))


def test_an_adapter_on_a_base_that_was_moved_still_loads(saved, tmp_path):
    adapter, config = saved
    moved = tiny_folder(tmp_path / "moved")
    again = Student.from_pretrained(adapter, config.replace(student=str(moved)))
    assert all(p.abs().max() > 0 for p in again.parameters().values())


def test_a_pickled_or_damaged_adapter_is_refused(saved):
    adapter, config = saved
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model.safetensors \(pickled.*save_pretrained"):
        Student.from_pretrained(adapter, config)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        Student.from_pretrained(adapter, config)


@pytest.mark.parametrize("targets", [("q_proj", "query"), ("query",), ()])
def test_an_unknown_lora_target_is_refused_even_beside_a_known_one(folder, targets):
    with pytest.raises(UserError, match=r"lora_target_modules.*its linear layers are .*q_proj"):
        Student.load(tiny_config(student=str(folder), lora_target_modules=targets))


@pytest.fixture
def old_torchao(tmp_path, monkeypatch):
    """A torchao 0.10 that can be found, as on Colab."""
    from peft.import_utils import is_torchao_available

    (tmp_path / "site" / "torchao").mkdir(parents=True)
    (tmp_path / "site" / "torchao" / "__init__.py").write_text("")
    info = tmp_path / "site" / "torchao-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert importlib.metadata.version("torchao") == "0.10.0"
    is_torchao_available.cache_clear()
    yield
    is_torchao_available.cache_clear()


def test_torchao_0_10_is_one_sentence_with_the_remedy(saved, old_torchao):
    adapter, config = saved
    with pytest.raises(UserError, match=r"torchao.*0\.10\.0.*pip uninstall -y torchao"):
        Student.load(config)
    with pytest.raises(UserError, match=r"torchao.*0\.10\.0.*pip uninstall -y torchao"):
        Student.from_pretrained(adapter, config)


@pytest.mark.parametrize(("device", "capability"), [("mps", (9, 9)), ("cuda", (5, 2))])
def test_four_bits_on_a_device_without_them_is_refused(folder, monkeypatch, device, capability):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with pytest.raises(UserError, match=f"'nf4', which bitsandbytes has for .* not for this {device} device"):
        hub.load_model(folder, torch.float16, torch.device(device), "nf4")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """On a GPU an id without an embedding is an assertion of the device (trap 17)."""
    folder = tiny_folder(tmp_path / "base")
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"ids up to (\d+) but the model embeds \1; .*resize_token_embeddings"):
        Student.load(tiny_config(student=str(folder)))


def test_rows_beyond_a_models_context_are_refused(folder):
    """Qwen and Llama would go on, worse, without a word; models with a table of positions fail in the middle."""
    config = tiny_config(student=str(folder), max_prompt_length=2000, max_completion_length=48)
    assert Student.load(config).config.max_position_embeddings == 2048
    with pytest.raises(UserError, match=r"2000 \+ max_completion_length 49 is beyond the 2048 tokens"):
        Student.load(config.replace(max_completion_length=49))


def test_a_prompt_without_tokens_is_refused(folder):
    """A tokenizer with a chat template, or one that begins every text with a token, has none such."""
    student = Student.load(tiny_config(student=str(folder)))
    assert student.generate(["a", ""], tiny_config(), seed=0).rows[1].prompt_ids
    student.tokenizer.chat_template = None
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        student.generate(["a", ""], tiny_config(), seed=0)


def test_a_base_that_does_not_fit_on_the_gpu_is_one_sentence(folder, tmp_path, monkeypatch):
    from minigad.run import distill

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(hub, "load_model", full)
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(20)]
    with pytest.raises(UserError, match=r"out of GPU memory while model .* was loaded.*--quantization nf4"):
        distill(tiny_config(student=str(folder), output_dir=str(tmp_path / "run")), rows)
