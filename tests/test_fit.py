"""The memory bill against what torch counts: weights on the meta device, saved tensors, live bytes of whole steps."""

import importlib
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minigad import fit
from minigad.chat import Row
from minigad.cli import main
from minigad.config import PRESETS, SHORT_NAMES, GADConfig, preset_for, read_recipe
from minigad.discriminator import Discriminator
from minigad.fit import (
    ARCHITECTURES,
    Architecture,
    adapter_parameters,
    architecture,
    bill_of,
    fitting_changes,
    gpu_bytes,
    largest,
    memory_bill,
    report,
)
from minigad.rollout import Rollouts
from minigad.student import Student, _with_adapter, enable_gradient_checkpointing
from minigad.toy.model import toy_tokenizer
from minigad.train import discriminator_step, student_step

CONFIGS = Path(__file__).parent.parent / "configs"
# What the models' own pages say, where they give the exact count of weights.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
}
# Small enough for a test, and wide enough that no term hides behind another. The vocabulary makes logits matter.
SMALL = Architecture(3000, 128, 384, 4, 4, 2, 32, tied=True, qkv_bias=True)
SQUARE = Architecture(600, 192, 256, 3, 3, 3, 64, tied=False, qkv_bias=True)


def transformers_config(shape, model_type=None):
    from transformers import LlamaConfig, Qwen2Config

    kind = Qwen2Config if shape.qkv_bias else LlamaConfig
    return kind(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_counted_exactly(name):
    from transformers import AutoModelForCausalLM

    shape = ARCHITECTURES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(shape))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters() == PUBLISHED[name]
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    assert linear == shape.linear_parameters()


@pytest.mark.parametrize("targets", [fit.LINEARS, ("q_proj", "v_proj"), ("down_proj",)])
def test_adapters_are_counted_exactly(targets):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(ARCHITECTURES["qwen2.5-7b"]))
        wrapped = _with_adapter(model, GADConfig(lora_r=8, lora_target_modules=targets), "student")
    count = sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)
    assert count == adapter_parameters(ARCHITECTURES["qwen2.5-7b"], 8, targets)


def test_four_bits_take_what_bitsandbytes_takes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(512, 1024), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    scales = [state.absmax, state.state2.absmax]
    taken = sum(t.numel() * t.element_size() for t in (packed, *scales))
    assert taken == pytest.approx(fit.NF4_BYTES * 512 * 1024, rel=1e-3)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, and their peak; `known` ones are left out."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.sizes = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage):
        key = storage._cdata
        if key not in self.known and key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.live -= self.sizes.pop(key)


def make_players(shape, config):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers_config(shape), dtype=getattr(torch, config.dtype)).eval()
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    tokenizer = toy_tokenizer()
    if config.lora_r:
        student = Student(_with_adapter(model, config, "student"), tokenizer, "student")
    else:
        student = Student(model, tokenizer)
    student.freeze_reference()
    return student, Discriminator.load(config, student)


def full_rollouts(config):
    prompt_ids = tuple(range(1, config.max_prompt_length + 1))
    text = "a" * (config.max_completion_length - 1)
    tokenizer = toy_tokenizer()
    completion = (*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id)
    overhead = len(
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True).input_ids
    )
    prompts = ["b" * (config.max_prompt_length - overhead)] * config.per_device_train_batch_size
    count = config.per_device_train_batch_size * config.num_generations
    return Rollouts(
        prompts, [Row(prompt_ids, completion)] * count, [text] * count, [True] * count, config.num_generations
    )


def measured(work, *models):
    """Peak of live bytes that `work` makes, without the weights of the models."""
    known = [t for model in models for t in (*model.parameters(), *model.buffers())]
    counter = LiveBytes(known)
    with counter:
        work()
    return counter.peak


CASES = {
    "LoRA, bf16": {"lora_r": 8, "dtype": "bfloat16"},
    "LoRA, bf16, checkpointing": {"lora_r": 8, "dtype": "bfloat16", "gradient_checkpointing": True},
    "LoRA on two matrices": {"lora_r": 4, "dtype": "bfloat16", "lora_target_modules": ("q_proj", "v_proj")},
    "LoRA, fp32": {"lora_r": 8, "dtype": "float32"},
    "LoRA, fp32, checkpointing": {"lora_r": 8, "dtype": "float32", "gradient_checkpointing": True},
    "all weights, fp32": {"dtype": "float32"},
    "all weights, bf16, checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
}


def small_config(changes):
    settings = {
        "max_prompt_length": 64,
        "max_completion_length": 96,
        "per_device_train_batch_size": 2,
        "num_generations": 3,
        "token_budget": 640,  # a group of four rows in one pass
        "beta": 0.1,
    }
    return GADConfig(**(settings | changes))


def training_peaks(shape, config):
    student, discriminator = make_players(shape, config)
    rollouts = full_rollouts(config)
    models = [student.model, student.reference.model, discriminator.language_model.model, discriminator.head]
    teacher = [rollouts.texts[0]] * len(rollouts.prompts)
    judge, player = (
        torch.optim.SGD(p, lr=0.0) for p in (discriminator.parameters(), list(student.parameters().values()))
    )
    advantages = torch.randn(len(rollouts.rows), config.max_completion_length)
    phases = {
        "discriminator update": lambda: discriminator_step(discriminator, judge, rollouts, teacher),
        "reference": lambda: student.reference.logprobs_of(rollouts.rows, 1.0, config.token_budget),
        "student update": lambda: student_step(student, player, rollouts.rows, advantages, config),
    }
    return {name: measured(work, *models) for name, work in phases.items()}


def assert_close(config, shape, peaks):
    bill = memory_bill(config, shape)
    ratios = {name: bill.phase_bytes(name) / peak for name, peak in peaks.items()}
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_each_training_phase_is_within_15_percent_of_what_is_alive(changes):
    config = small_config(changes)
    assert_close(config, SMALL, training_peaks(SMALL, config))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_group_beyond_the_token_budget_is_billed_by_its_parts(checkpointing):
    config = small_config(
        {"lora_r": 8, "dtype": "bfloat16", "gradient_checkpointing": checkpointing, "token_budget": 320}
    )
    whole = config.replace(token_budget=640)
    peaks = training_peaks(SMALL, config)
    assert_close(config, SMALL, peaks)
    saved = memory_bill(whole, SMALL).phase_bytes("discriminator update") - peaks["discriminator update"]
    assert saved > 0.3 * peaks["discriminator update"]


@pytest.mark.parametrize("name", ["LoRA, bf16", "LoRA on two matrices", "all weights, fp32"])
def test_a_rollout_is_within_15_percent_of_what_is_alive(name):
    config = small_config(CASES[name]).replace(max_completion_length=32)
    student, _ = make_players(SQUARE, config)
    prompts = full_rollouts(config).prompts
    peak = measured(lambda: student.generate(prompts, config, seed=0, num_generations=3), student.model)
    assert_close(config, SQUARE, {"rollout": peak})


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b"])
def test_real_shapes_are_within_15_percent_of_what_is_alive(name, checkpointing):
    config = small_config({"lora_r": 16, "dtype": "bfloat16", "gradient_checkpointing": checkpointing})
    assert_close(config, ARCHITECTURES[name], training_peaks(ARCHITECTURES[name], config))


# The smallest of the three cards that holds a preset as it is.
SMALLEST_CARD = {
    "qwen2.5-0.5b": "t4",
    "qwen2.5-3b": "t4",
    "llama-3.2-3b": "t4",
    "qwen2.5-7b": "t4",
    "llama-3.1-8b": "t4",
    "qwen2.5-14b": "24GB",
}
CARDS = ("t4", "24GB", "80GB")


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", SMALLEST_CARD)
def test_presets_fit_their_card_and_the_advice_fits_smaller_ones(name, card):
    config, memory = PRESETS[name], gpu_bytes(card)

    def fits(changed):
        return bill_of(changed).on_gpu <= memory

    if CARDS.index(card) >= CARDS.index(SMALLEST_CARD[name]):
        assert fits(config)
        room = largest(config, "max_completion_length", memory)
        assert fits(config.replace(max_completion_length=room))
        assert room >= config.max_completion_length
        longer = config.replace(max_completion_length=room + 64)
        assert not fits(longer) or 2048 + room + 64 > architecture(name).context
    else:
        assert not fits(config)
        assert fits(config.replace(**fitting_changes(config, fits)))


def test_where_nothing_helps_the_report_says_so():
    config = PRESETS["qwen2.5-14b"]
    assert fitting_changes(config, lambda changed: bill_of(changed).on_gpu <= 8e9) is None
    assert "take a smaller student" in report(config, 8e9)[-1]


def test_every_model_has_a_preset_a_short_name_and_sizes():
    students = set(PRESETS) - {"toy"}
    assert students == set(ARCHITECTURES)
    assert students <= set(SHORT_NAMES)
    assert all(PRESETS[name].student == name for name in students)


@pytest.mark.parametrize(
    ("recipe", "card"),
    [
        ("1x24gb", "24GB"),
        ("1x24gb-14b", "24GB"),
        ("1x80gb", "80GB"),
        ("8x80gb", "80GB"),
        ("paper-14b", "80GB"),
    ],
)
def test_recipes_fit_the_card_they_are_for(recipe, card):
    assert bill_of(read_recipe(CONFIGS / f"{recipe}.toml")).on_gpu <= gpu_bytes(card)


def test_no_recipe_is_left_out():
    assert {path.stem for path in CONFIGS.glob("*.toml")} == {"1x24gb", "1x24gb-14b", "1x80gb", "8x80gb", "paper-14b"}


def test_the_paper_recipe_states_the_hours_that_the_script_prints(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(CONFIGS.parent / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["hours.py"])
    importlib.import_module("hours").main()
    total = round(float(re.search(r"'total': ([\d.]+)", capsys.readouterr().out)[1]))
    assert f"Predicted: {total} H100-hours" in (CONFIGS / "paper-14b.toml").read_text(encoding="utf-8")


def test_the_readme_states_what_would_bring_the_papers_hours_down(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS.parent / "benchmarks"))
    hours = importlib.import_module("hours")
    found = hours.levers(read_recipe(CONFIGS / "paper-14b.toml"), hours.PROMPTS, (256, 439), 290.0, 1050.0)
    totals = [parts["total"] for parts in found.values()]
    assert totals == sorted(totals, reverse=True) and totals[-1] > 100
    readme = (CONFIGS.parent / "README.md").read_text(encoding="utf-8")
    said = readme[readme.index("**The paper's 14B run**") : readme.index("vLLM was not run on a GPU here")]
    for number in (*totals, *(found["the recipe"][stage] for stage in hours.STAGES), hours.ENGINE):
        assert re.search(rf"(?<![\d,]){round(number):,}(?![\d,]\d)", said), number


def test_a_packed_group_is_billed_as_torch_counts_it(monkeypatch):
    """Every pair of the sequence, the masked ones too: there is no flash kernel with a mask."""
    monkeypatch.syspath_prepend(str(CONFIGS.parent / "benchmarks"))
    hours = importlib.import_module("hours")
    length = 30 + 4 * 10
    attention = 4 * SQUARE.layers * SQUARE.heads * SQUARE.head_dim * length**2
    assert hours.packed_flops(SQUARE, 30, 10, 4) == 2 * SQUARE.linear_parameters() * length + attention
    assert hours.packed_flops(SQUARE, 30, 10, 4) < 4 * SQUARE.layer_flops(40)


def test_the_work_in_a_recipe_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS.parent / "benchmarks"))
    hours = importlib.import_module("hours")
    config = GADConfig(
        max_steps=10, per_device_train_batch_size=4, num_generations=2, discriminator_warmup_steps=3, warmup_epochs=2
    )
    expected = {"rollout": 104, "discriminator_update": 52, "reference": 80, "student_update": 180}
    assert hours.count(config, prompts=50) == expected
    assert hours.count(config.replace(beta=0.0), prompts=50)["reference"] == 0
    assert hours.hours(expected, dict.fromkeys(expected, 3600.0)) == expected | {"total": 416}


def test_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config, length = transformers_config(SQUARE), 40
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()  # its products are counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.long))
    attention = 4 * SQUARE.layers * SQUARE.heads * SQUARE.head_dim * length**2  # torch counts the masked half too
    expected = SQUARE.layer_flops(length) + attention / 2 + SQUARE.head_flops(length)
    assert counter.get_total_flops() == expected


def test_a_folder_with_only_a_config_is_enough(tmp_path):
    transformers_config(ARCHITECTURES["llama-3.2-3b"]).save_pretrained(tmp_path)
    assert architecture(str(tmp_path)) == ARCHITECTURES["llama-3.2-3b"]
    assert architecture("Qwen/Qwen2.5-7B-Instruct") == ARCHITECTURES["qwen2.5-7b"]


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24 gb", 24e9), ("16", 16e9), ("1GiB", 2**30), ("T4", 16e9), ("RTX 4090", 24e9)]
)
def test_gpu_sizes(text, size):
    assert gpu_bytes(text) == size


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--student", "qwen2.5-14b", "--gpu", "big"], "--gpu is 'big'; give the memory of one card, such as 24GB"),
        (["--student", "qwen2.5-14b", "--gpu", "A100"], "an A100 has 40 or 80"),
        (["--gpu", "24GB"], "which runs on any machine and has no bill; give a --student"),
        (["--student", "qwen2.5-7b", "--gpu", "80GB", "--max-completion-length", "40000"], "beyond the 32768 tokens"),
        (["--student", "qwen2.5-14b", "--gpu", "0GB"], "--gpu is '0GB'"),
        (["--student", "qwen2.5-14", "--gpu", "24GB"], "did you mean 'qwen2.5-14b'"),
        (["--student", "EMPTY", "--gpu", "24GB"], "no config.json that transformers can read"),
        (["--student", "GPT2", "--gpu", "24GB"], "model_type 'gpt2'"),
        (["--student", "qwen2.5-7b", "--gpu", "t4", "--discriminator-model", "minilm"], "discriminator_model 'minilm'"),
        (["--student", "qwen2.5-7b", "--gpu", "t4", "--lora-target-modules", "c_attn"], "names c_attn"),
        (["--student", "qwen2.5-7b", "--gpu", "t4", "--num-generations", "1"], "'num_generations' is 1"),
    ],
)
def test_bad_input_is_one_sentence(flags, words, tmp_path, capsys):
    from transformers import GPT2Config

    (tmp_path / "empty").mkdir()
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    places = {"EMPTY": str(tmp_path / "empty"), "GPT2": str(tmp_path / "gpt2")}
    assert main(["fit", *(places.get(flag, flag) for flag in flags)]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("minigad: error: ")
    assert "\n" not in message
    assert words in message


def test_the_report_names_every_part_and_its_advice_holds(capsys):
    command = ["fit", "--student", "qwen2.5-14b", "--gpu", "t4"]
    assert main(command) == 0
    out = capsys.readouterr().out
    for part in ("base weights", "adapters", "optimizers", "KV cache", "discriminator update", "CUDA context"):
        assert part in out, part
    assert "does not fit in 16.0 GB" in out
    assert f"{bill_of(PRESETS['qwen2.5-14b']).peak / 1e9:.1f} GB of tensors" in out
    advised = re.search(r"this fits: (.*)", out)[1]
    assert main([*command, *advised.split()]) == 0
    assert ": fits in 16.0 GB" in capsys.readouterr().out


def test_advice_is_what_saves_memory():
    """14B on a T4 is short of room for the cache: there a smaller token budget alone saves nothing, and a shorter prompt costs."""
    lines = report(PRESETS["qwen2.5-14b"], 16e9)
    needs = bill_of(PRESETS["qwen2.5-14b"]).on_gpu / 1e9
    advised = [line for line in lines if line.startswith("  --")]
    assert 1 <= len(advised) <= 3
    assert all(float(re.search(r": ([\d.]+) GB", line)[1]) < needs - 0.05 for line in advised), advised


def test_a_student_by_its_hub_name_takes_its_own_preset(capsys):
    assert preset_for("Qwen/Qwen2.5-14B-Instruct") == "qwen2.5-14b"
    assert all(preset_for(SHORT_NAMES[name]) == name for name in ARCHITECTURES)
    assert preset_for("somebody/elses-model") == "smollm2-135m"
    assert main(["fit", "--student", "Qwen/Qwen2.5-14B-Instruct", "--gpu", "24GB"]) == 0
    by_hub_name = capsys.readouterr().out
    assert main(["fit", "--student", "qwen2.5-14b", "--gpu", "24GB"]) == 0
    assert by_hub_name.replace("Qwen/Qwen2.5-14B-Instruct", "qwen2.5-14b") == capsys.readouterr().out


def test_a_student_without_a_preset_is_told_whose_settings_it_takes(tmp_path, capsys):
    """A folder with a 7B model would else be trained on 48 tokens without a word."""
    transformers_config(ARCHITECTURES["qwen2.5-7b"]).save_pretrained(tmp_path)
    command = ["fit", "--student", str(tmp_path), "--gpu", "80GB"]
    assert main(command) == 0
    assert (
        "is as in 'smollm2-135m' (prompts to 128 tokens, completions to 48, quantization none)"
        in capsys.readouterr().err
    )
    assert main([*command, "--preset", "qwen2.5-7b"]) == 0
    assert main(["fit", "--student", "Qwen/Qwen2.5-7B-Instruct", "--gpu", "80GB"]) == 0
    assert capsys.readouterr().err == ""


def test_no_row_is_advised_beyond_the_models_context():
    room = largest(PRESETS["qwen2.5-0.5b"], "max_completion_length", 80e9)
    assert room == 32768 - 2048
    assert architecture("llama-3.1-8b").context == 131072


def test_the_room_on_a_large_card_ends_at_the_bounds_of_the_settings(capsys):
    assert main(["fit", "--student", "smollm2-135m", "--gpu", "2000GB"]) == 0
    assert "num_generations 4096, token_budget 1048576" in capsys.readouterr().out


def test_the_share_that_vllm_takes_is_not_the_trainers(capsys):
    """14B in 4 bits: the engine's dequantised copy, 30 GB, is beyond 0.3 of 80 GB and within 0.4; the trainer has the rest."""
    command = ["fit", "--student", "qwen2.5-14b", "--sampler", "vllm", "--gpu"]
    assert main([*command, "80GB", "--vllm-gpu-memory-utilization", "0.4"]) == 0
    out = capsys.readouterr().out
    assert "vLLM takes 0.4 of the card, 32.0 GB" in out and "fits in 48.0 GB" in out and "raise" not in out
    config = PRESETS["qwen2.5-14b"]
    assert "rollout" in out and bill_of(config.replace(sampler="vllm")).phase_bytes("rollout") == 0
    shape = architecture("qwen2.5-14b")
    copy, row = 2 * shape.parameters(), 3584 * shape.kv_bytes()
    assert f"at least {(copy + row) / 1e9:.1f} GB" in out and f"takes {copy / 1e9:.1f} GB of disk" in out
    assert main([*command, "80GB"]) == 0
    assert "does not fit: raise --vllm-gpu-memory-utilization" in capsys.readouterr().out
    assert main([*command, "24GB", "--vllm-gpu-memory-utilization", "0.5"]) == 0
    assert "does not fit in 12.0 GB" in capsys.readouterr().out


def test_a_discriminator_of_its_own_is_billed():
    shared = PRESETS["qwen2.5-7b"]
    own = shared.replace(discriminator_model="qwen2.5-0.5b")
    assert bill_of(own).phase_bytes("discriminator update") < 0.4 * bill_of(shared).phase_bytes("discriminator update")
    more = bill_of(own).static["base weights"] - bill_of(shared).static["base weights"]
    assert more == pytest.approx(bill_of(PRESETS["qwen2.5-0.5b"]).static["base weights"])


@pytest.mark.slow
def test_the_gpu_benchmark_runs_small_on_any_device(tmp_path):
    script = CONFIGS.parent / "benchmarks" / "gpu.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path], check=True, timeout=300)
    record = json.loads((tmp_path / "gpu_tiny.json").read_text(encoding="utf-8"))
    for entry in record["cases"]:
        assert all("seconds" in stage for stage in entry["stages"].values()), entry
        assert entry["step_seconds"] > 0


def test_a_stage_without_memory_is_a_result_and_the_next_stage_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS.parent / "benchmarks"))
    gpu = importlib.import_module("gpu")
    card = gpu.Card(torch.device("cpu"))

    def overflow():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert card.attempt("stage", overflow)["out_of_memory"].startswith("CUDA out of memory. Tried")
    assert "seconds" in card.attempt("next", lambda: None)
