"""Players on one frozen 4-bit base: gradients, isolation, saving, merging, memory."""

import copy
import sys

import pytest
import torch
from conftest import shake, tiny_config, tiny_folder

from minigad import hub
from minigad.chat import encode
from minigad.config import GADConfig, UserError
from minigad.discriminator import Discriminator
from minigad.losses import sft_loss
from minigad.merge import merge, merging_loss
from minigad.model import lora_layers, plain_weight
from minigad.optim import make_optimizer
from minigad.student import Student
from minigad.train import discriminator_step, student_step, warmup

Linear4bit = pytest.importorskip("bitsandbytes").nn.Linear4bit

PAIRS = [("ab", "cd ef"), ("a longer prompt", "gh"), ("x", "ijkl mnop"), ("yz", "q")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def load(folder, **changes) -> tuple[Student, GADConfig]:
    config = tiny_config(student=str(folder), quantization="nf4", **changes)
    student = Student.load(config)
    shake(student)
    return student, config


def rows_of(student):
    return [encode(student.tokenizer, prompt, text) for prompt, text in PAIRS]


def dequantised(student: Student) -> Student:
    """Return a twin whose 4-bit layers hold the same weights in float32."""
    twin = Student(copy.deepcopy(student.model), student.tokenizer, student.adapter)
    for module in twin.model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                weight = plain_weight(child)
                plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
                setattr(module, name, plain)
    return twin


def gradients(model):
    model.model.zero_grad()
    with model.active(train=True):
        sft_loss(*model.logprobs(rows_of(model))).backward()
    return {name: p.grad.clone() for name, p in model.parameters().items()}


def test_the_base_is_in_four_bits_and_adapters_are_float32(folder):
    student, _ = load(folder, dtype="bfloat16")
    assert sum(isinstance(m, Linear4bit) for m in student.model.modules()) == 14  # 7 a layer, 2 layers
    assert {p.dtype for p in student.parameters().values()} == {torch.float32}


def test_gradients_after_a_rollout_are_those_of_a_dequantised_twin(folder):
    """Trap 13: on a CPU with avx512_bf16 an eval pass repacks 4-bit weights and training goes on without their gradients."""
    student, config = load(folder)
    twin = dequantised(student)
    student.generate(["ab"], config, seed=0)
    mine, theirs = gradients(student), gradients(twin)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-7)
    assert all(g.abs().max() > 0 for g in mine.values())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_adapters_compute_in_the_bases_sixteen_bits_without_losing_the_gradients_direction(folder, quantization):
    exact = Student.load(tiny_config(student=str(folder), quantization=quantization))
    half = Student.load(tiny_config(student=str(folder), quantization=quantization, dtype="bfloat16"))
    for model in (exact, half):
        shake(model)
    truth, mine = gradients(exact), gradients(half)
    assert {g.dtype for g in mine.values()} == {torch.float32}
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (truth, mine))
    assert torch.cosine_similarity(a, b, 0) > 0.99
    assert saved_bytes(half) < 0.62 * saved_bytes(exact)  # no float32 copies of the layers' inputs are kept
    assert all(layer.cast_input_dtype_enabled for _, _, layer in lora_layers(half.model))
    assert half.model(torch.tensor([[5, 6]])).logits.isfinite().all()  # outside, peft casts as it always did


def test_the_switch_that_keeps_gradients_is_set(folder):
    model = hub.load_model(folder, torch.float32, torch.device("cpu"), "nf4")
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(flags) == 14
    assert not any(flags)


@pytest.mark.parametrize("kind", ["sequence", "prefix", "implicit"])
def test_players_on_one_base_do_not_move_each_other(folder, kind):
    student, config = load(folder, discriminator=kind, num_generations=2, learning_rate=1e-2, warmup_epochs=0.0)
    data = {"prompt": [p for p, _ in PAIRS], "completion": [c for _, c in PAIRS]}
    discriminator = Discriminator.load(config, student)
    student.freeze_reference()
    discriminator.start_from_student()
    judge = make_optimizer(discriminator.parameters(), 1e-2, config)
    player = make_optimizer(list(student.parameters().values()), 1e-2, config)
    rows = rows_of(student)
    rollouts = student.generate(data["prompt"], config, seed=0, num_generations=2)
    everyone = {
        "student": lambda: student.logprobs_of(rows),
        "reference": lambda: student.reference.logprobs_of(rows),
        "discriminator": lambda: discriminator.language_model.logprobs_of(rows),
    }
    base = {n: p.clone() for n, p in student.model.named_parameters() if ".lora_" not in n}
    before = {name: logprobs() for name, logprobs in everyone.items()}
    for _ in range(2):  # the head starts at zero: its language model moves from the second step on
        rewards, _ = discriminator_step(discriminator, judge, rollouts, data["completion"])
    between = {name: logprobs() for name, logprobs in everyone.items()}
    student_step(student, player, rollouts.rows, torch.randn(rewards.shape), config)
    after = {name: logprobs() for name, logprobs in everyone.items()}
    assert torch.equal(before["student"], between["student"])
    assert torch.equal(before["reference"], after["reference"])
    assert torch.equal(between["discriminator"], after["discriminator"])
    assert not torch.equal(before["discriminator"], between["discriminator"])
    assert not torch.equal(between["student"], after["student"])
    assert all(torch.equal(p, base[n]) for n, p in student.model.named_parameters() if n in base)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # plain peft's, on transformers 5.23
def test_a_saved_student_loads_with_plain_peft_on_a_base_loaded_the_same_way(folder, tmp_path):
    from peft import PeftModel

    student, config = load(folder)
    student.save_pretrained(tmp_path)
    base = hub.load_model(folder, torch.float32, torch.device("cpu"), "nf4")
    plain = PeftModel.from_pretrained(base, tmp_path)
    row = rows_of(student)[0]
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    with torch.no_grad(), student.active(train=False):
        assert torch.equal(plain.eval()(ids).logits, student.model(ids).logits)
    again = Student.from_pretrained(tmp_path, config)
    assert torch.equal(again.logprobs_of(rows_of(student)), student.logprobs_of(rows_of(student)))


def test_merging_a_four_bit_student_for_rollouts_changes_rounding_only(folder):
    student, _ = load(folder)
    exact = student.logprobs_of(rows_of(student))
    with student.active(train=False), student.merged():
        merged = student.logprobs_of(rows_of(student))
    assert (merged - exact).abs().max() < 1e-4


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_merged_export_is_the_student_but_for_rounding_and_loads_without_peft(folder, tmp_path, quantization):
    config = tiny_config(student=str(folder), quantization=quantization, lora_target_modules=("q_proj", "down_proj"))
    student = Student.load(config)
    shake(student)
    rows = rows_of(student)
    before = student.logprobs_of(rows)
    merge(student, tmp_path / "plain", torch.float32)
    plain = Student.from_pretrained(tmp_path / "plain", config.replace(quantization="none"))
    assert not any("lora" in name for name in plain.parameters())
    assert merging_loss(before, plain, rows)["logp_difference"] < 1e-5
    again = Student.load(config)
    shake(again)
    merge(again, tmp_path / "half", torch.bfloat16)
    half = Student.from_pretrained(tmp_path / "half", config.replace(quantization="none", dtype="bfloat16"))
    assert 1e-5 < merging_loss(before, half, rows)["logp_difference"] < 0.1
    assert next(iter(half.parameters().values())).dtype == torch.bfloat16
    with pytest.raises(UserError, match="no adapter to merge"):
        merge(plain, tmp_path / "other")
    with pytest.raises(UserError, match="is not empty"):
        merge(Student.load(config), tmp_path / "half")


def saved_bytes(model) -> int:
    """Bytes that autograd keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with model.active(train=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sft_loss(*model.logprobs(rows_of(model))).backward()
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    return sum(size for address, size in sizes.items() if address not in weights)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_checkpointing_gives_the_same_gradients_from_less_memory(folder, quantization):
    config = tiny_config(student=str(folder), quantization=quantization)
    plain, checked = Student.load(config), Student.load(config.replace(gradient_checkpointing=True))
    for model in (plain, checked):
        shake(model)
    mine, theirs = gradients(checked), gradients(plain)
    assert all(torch.allclose(mine[n], theirs[n], atol=1e-6) for n in theirs)
    assert all(g.abs().max() > 0 for g in mine.values())
    assert saved_bytes(checked) < 0.5 * saved_bytes(plain)


@pytest.mark.parametrize("kind", ["sequence", "prefix", "implicit"])
def test_a_group_beyond_the_token_budget_is_scored_in_parts_with_the_same_gradient(folder, kind):
    """One prompt's completions cannot be split over losses: they are read twice instead, in less memory."""
    student, config = load(folder, discriminator=kind, num_generations=3)
    student.freeze_reference()
    discriminator = Discriminator.load(config, student)
    if discriminator.head is not None:
        torch.nn.init.normal_(discriminator.head.weight)
    rollouts = student.generate(["a longer prompt"], config, seed=0, num_generations=3)

    def run(budget):
        discriminator.config = config.replace(token_budget=budget)
        optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.0)
        grads = []
        optimizer.register_step_pre_hook(lambda *_: grads.extend(p.grad.clone() for p in discriminator.parameters()))
        rewards, metrics = discriminator_step(discriminator, optimizer, rollouts, ["a completion"])
        return rewards, metrics["discriminator/loss"], grads

    whole, parts = run(100_000), run(1)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=1e-4)
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)
    assert max(g.abs().max() for g in whole[2]) > 0
    for a, b in zip(parts[2], whole[2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_the_whole_loop_runs_on_four_bits(folder):
    from datasets import Dataset

    student, config = load(folder, warmup_batch_size=2, per_device_train_batch_size=2, num_generations=2)
    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in PAIRS])
    discriminator = Discriminator.load(config, student)
    losses = [m["loss"] for m in warmup(student, discriminator, data, config.replace(warmup_epochs=8.0)) if "loss" in m]
    assert losses[-1] < losses[0] - 0.1


def test_four_bits_without_bitsandbytes_is_one_sentence(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"quantization.*nf4.*pip install 'minigad\[qlora\]'"):
        hub.load_model(folder, torch.float32, torch.device("cpu"), "nf4")


def test_an_old_torchao_is_one_sentence_with_the_remedy(folder, monkeypatch):
    import peft

    def refuse(*_args, **_kwargs):
        raise ImportError("Found an incompatible version of torchao. Found version 0.10.0")

    monkeypatch.setattr(peft, "get_peft_model", refuse)
    with pytest.raises(UserError, match=r"torchao.*0\.10\.0.*pip uninstall -y torchao"):
        Student.load(tiny_config(student=str(folder)))


def test_four_bits_without_an_adapter_is_refused():
    with pytest.raises(UserError, match="lora_r is 0"):
        GADConfig(quantization="nf4")


def test_eight_bit_optimizers_need_a_gpu():
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match=r"optim.*adamw_8bit.*needs a CUDA GPU"):
        make_optimizer([weight], 1e-3, GADConfig(optim="adamw_8bit"))


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers_fit_the_teachers_text(folder, optim):
    from minigad.train import fit_teacher_text

    student, config = load(folder, optim=optim, dtype="bfloat16", warmup_batch_size=4, gradient_checkpointing=True)
    data = {"prompt": [p for p, _ in PAIRS], "completion": [c for _, c in PAIRS]}
    losses = [m["loss"] for m in fit_teacher_text(student, data, config, "warmup", 20.0, 1e-2)]
    assert losses[-1] < losses[0] - 0.3
