# %% [markdown]
# # 08 · A real student with QLoRA: SmolLM2-135M on a CPU, Qwen2.5-0.5B on a T4
#
# **You will learn** what an adapter and a 4-bit base are, where memory goes, and how the game compares with imitation on a pretrained
# model whose teacher we can measure.
#
# **You need** notebooks 02 to 06, and a CPU for a quarter of an hour, or Colab's T4 (not tried). **It downloads** SmolLM2-135M
# (93 MB), or Qwen2.5-0.5B (1 GB). The outputs: a CPU, one seed. Cut off, it starts again.

# %%
# The first cell of every notebook. Where minigad is missing, as on Colab, it installs that and what that lacks.
# %matplotlib inline
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("minigad") is None:
    url = "https://github.com/GITHUB_OWNER/minigad"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", url, "minigad-source"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "./minigad-source"], check=True)
if os.path.isdir("minigad-source"):
    os.chdir("minigad-source/notebooks")


def size(auto: float, smoke: float) -> float:
    """Pick a number for this run; the project's tests set MINIGAD_PROFILE=smoke and take the small one."""
    return {"auto": auto, "smoke": smoke}[os.environ.get("MINIGAD_PROFILE", "auto")]


# %%
import logging
import time
import warnings
from importlib import resources

import torch
from IPython.display import Markdown

from minigad.plots import plot_frontier, plot_lengths, plot_stacked, show

warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # peft reads what transformers has renamed
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses kernels that we do not use
if importlib.util.find_spec("bitsandbytes") is None:  # the one thing that Colab lacks
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "bitsandbytes"], check=True)

# %% [markdown]
# ## The student that this machine can train
#
# With a GPU: Qwen2.5-0.5B on a base of 4-bit weights. Without: SmolLM2-135M in bfloat16, since 4 bits save nothing worth having
# at its size and cost time. Everything below is the same for both. A T4 has no bfloat16, so it computes in float16.

# %%
from minigad import PRESETS, Student

gpu = torch.cuda.is_available()
four_bits = {"quantization": "nf4", "dtype": "float16", "gradient_checkpointing": True}
config = PRESETS["smollm2-135m"].replace(
    student=size("qwen2.5-0.5b" if gpu else "smollm2-135m", "toy"),
    max_steps=int(size(8, 1)),
    discriminator_warmup_steps=int(size(3, 6)),
    discriminator_learning_rate=size(1e-4, 5e-3),
    token_budget=1024,  # rows of a pass: memory and speed depend on it, no result does
    **(four_bits if gpu else {}),
)
student = Student.load(config)
trained = sum(p.numel() for p in student.parameters().values())
print(f"{config.student}: {student.model.num_parameters():,} weights, {trained:,} of them in the adapter")

# %% [markdown]
# ## LoRA, by hand
#
# Low-rank adaptation (arXiv 2106.09685) leaves a matrix alone and learns a thin one beside it:
#
# $$h = W x + \frac{\alpha}{r} B A x$$
#
# $W$: the frozen matrix. $A$, of $r$ rows, $B$, of $r$ columns: what is trained; $r$, the rank, is 16 here. $\alpha$: a scale. $x$,
# $h$: the layer's input and output. $B$ starts at zero, so that the student starts as the model that was loaded.

# %%
layer = student.model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
A, B, scale = layer.lora_A["student"].weight, layer.lora_B["student"].weight, layer.scaling["student"]
torch.manual_seed(0)
x = torch.randn(5, A.shape[1], device=A.device, dtype=student.model.dtype)

with torch.no_grad():
    assert torch.equal(layer(x), layer.base_layer(x)), "a fresh adapter changes nothing"
    B.normal_(std=0.2)
    by_hand = layer.base_layer(x) + scale * (x.float() @ A.T @ B.T).to(x.dtype)
    assert torch.allclose(layer(x), by_hand, atol=0.05, rtol=0.05)
    B.zero_()
print(f"W holds {layer.base_layer.weight.numel():,} weights, A and B {A.numel() + B.numel():,}")

# %% [markdown]
# ## Four bits, by hand
#
# QLoRA (LoRA on a quantised base, arXiv 2305.14314) stores $W$ in blocks of 64, each weight as the nearest of sixteen levels:
#
# $$w \approx m \, q_k, \qquad m = \max_{\text{block}} |w|$$
#
# $w$: a weight of $W$. $q_k$: level $k$, a quantile of the normal distribution scaled to $[-1, 1]$, since trained weights look
# normal (`ndtri` gives quantiles; 0.9677 is bitsandbytes' outermost, where 1 would be infinite). $m$: the block's scale. Half a
# byte a weight, one byte of scale for 64, four more for 256 scales.

# %%
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from minigad.fit import NF4_BYTES

upper = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9)[:-1])
lower = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8)[:-1])
levels = torch.cat([lower, torch.zeros(1), upper]).sort().values
levels = levels / levels.max()

blocks = 0.05 * torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
largest = blocks.abs().amax(1, keepdim=True)
by_hand = largest * levels[(blocks / largest).unsqueeze(-1).sub(levels).abs().argmin(-1)]

theirs = dequantize_4bit(*quantize_4bit(blocks, blocksize=64, quant_type="nf4"), quant_type="nf4")
assert torch.allclose(by_hand, theirs, atol=1e-3)
error = (by_hand - blocks).std() / blocks.std()
print(f"{8 * NF4_BYTES:.3f} bits a weight; error {error:.1%} of the weights' spread")

# %% [markdown]
# Adapters stay in float32: at small rates a 16-bit adapter rounds its updates away. Gradients pass *through* the frozen 4-bit
# matrix, and only $A$ and $B$ change.

# %% [markdown]
# ## Where the memory goes
#
# One 4-bit base carries three players: student, reference and discriminator are adapters on it. `minigad.fit` counts every
# tensor of a step from a model's shape, before anything is downloaded. An adapter's weights, for each matrix of $i$ inputs and $o$
# outputs: $r\,(i + o)$. *GPU's own* in the figure: CUDA's context, and what torch's allocator holds and cannot use. *One layer or
# logits*: the larger of the two, since they are never alive together.

# %%
from minigad.fit import adapter_parameters, architecture, bill_of

shape = architecture("qwen2.5-0.5b")
by_hand = shape.layers * sum(16 * (inputs + outputs) for inputs, outputs in shape.linears().values())
assert by_hand == adapter_parameters(shape, 16)

qlora = PRESETS["qwen2.5-0.5b"]  # at the paper's lengths: 2048 + 1536 tokens a row
kinds = {
    "all weights, bf16": qlora.replace(quantization="none", lora_r=0, dtype="bfloat16", gradient_checkpointing=False),
    "LoRA, bf16": qlora.replace(quantization="none", gradient_checkpointing=False),
    "QLoRA": qlora.replace(gradient_checkpointing=False),
    "QLoRA, checkpointing": qlora,
}
GB = 1e9


def parts(config) -> dict[str, float]:
    """Return what a step holds at its peak, in GB, by part."""
    bill = bill_of(config)
    phase = dict(bill.phases[bill.worst])
    work = max(phase.pop("layer", 0), phase.pop("logits", 0))
    sizes = bill.static | phase | {"one layer or logits": work, "GPU's own": bill.on_gpu - bill.peak}
    return {name: value / GB for name, value in sizes.items()}


# %%
alt = "Stacked bars of memory: training all weights takes most; QLoRA with checkpointing fits far below a T4's 16 GB."
show(plot_stacked({kind: parts(one) for kind, one in kinds.items()}, "GB at the peak of a step", {"T4": 16.0}), alt)
assert sum(parts(qlora).values()) < 16 < sum(parts(kinds["all weights, bf16"]).values())

# %% [markdown]
# What grows with a batch are activations; what grows with a model are weights, and for all-weights training their gradients and
# AdamW's moments (*optimizers*). Four bits save little at 0.5B, where weights are the smallest part; at 14B they decide (notebook 10).
# Checkpointing keeps one hidden state a layer and makes the rest again: less memory, for one more forward pass.
#
# The first bar's weights are bf16, to compare like with like; minigad itself trains all weights in float32, which is nearly twice that.

# %% [markdown]
# ## A teacher that can be measured
#
# SmolLM2 itself, behind four hidden examples that teach it brevity, at temperature 0.7. The student sees half of its 397 answers
# to 200 prompts, and never the examples: prompt distillation, without a capacity gap if the student is SmolLM2. We know $p_T$, its
# distribution, and use it to *measure*, never to train.

# %%
from minigad import load_pairs
from minigad.student import load_language_model
from minigad.teacher import SHORT_ANSWERS, HiddenPromptTeacher

FILES = resources.files("minigad") / "assets" / "short_answers"
train, validation, heldout = (
    load_pairs(str(FILES / f"{name}.jsonl"))[0] for name in ("train", "validation", "heldout")
)
train, heldout = train.select(range(0, int(size(len(train), 128)), 2)), heldout.select(range(int(size(64, 24))))
plain = config.replace(student=size("smollm2-135m", "toy"), lora_r=0, quantization="none")
teacher = HiddenPromptTeacher(load_language_model(plain.student, plain, adapter=""), SHORT_ANSWERS, 0.7)

for row in [train[0], heldout[0]]:
    print(row["prompt"], "->", row["completion"])

# %% [markdown]
# What is measured, on held-out prompts ($S$: the student, $G$ until now; $T$: the teacher): $\mathrm{KL}(S \| T)$, what the
# student says and the teacher would not; $\mathrm{KL}(T \| S)$, what it misses; and the AUC of the best judge there is (notebook
# 02). In nats a completion, at two sampling temperatures: sharpening is free, so every claim must beat it. `known` keeps what was
# asked before.

# %%
from minigad.evaluate import evaluate

rows, seconds, known = [], {}, {}


def teacher_logprob(prompts, texts, finished) -> list[float]:
    """Return log p_T of completions, each asked for once."""
    asked = list(zip(prompts, texts, finished, strict=True))
    new = [one for one in dict.fromkeys(asked) if one not in known]
    if new:
        known.update(zip(new, teacher.logprob(*zip(*new, strict=True), config.max_completion_length), strict=True))
    return [known[one] for one in asked]


def measure(method: str, temperatures: tuple[float, ...] = (1.0, 0.7)) -> list[dict]:
    """Measure the student as it is, and return its samples at the last temperature."""
    for temperature in temperatures:
        found, samples = evaluate(
            student, heldout, config, temperature=temperature, seed=0, teacher_logprob=teacher_logprob
        )
        rows.append({"method": method, "seconds": seconds.get(method, 0.0), **found})
    return samples


measure("as loaded", (1.0,))
print(f"as loaded: KL(S|T) {rows[0]['kl_student_teacher']:.1f}, {rows[0]['mean_length']:.0f} tokens a text")

# %% [markdown]
# ## Imitation, epoch by epoch
#
# SeqKD, looked at after every epoch on *validation* prompts. The student of the first epoch is the game's start, that of the last
# its rival. (In the run below the second epoch is the best by a little, and the third overfits: a search would take the second.)

# %%
from minigad.evaluate import heldout_nll
from minigad.train import fit_teacher_text

epochs, epoch_steps = int(size(3, 2)), len(train) // config.warmup_batch_size


def copy_weights() -> list[torch.Tensor]:
    """Keep the adapter as it is."""
    return [p.detach().clone() for p in student.parameters().values()]


training = fit_teacher_text(student, train, config, "warmup", epochs, size(config.warmup_learning_rate, 3e-3))
nll, kept, used = [heldout_nll(student, validation, config)], [copy_weights()], [0.0]
started = time.process_time()
for metrics in training:
    if metrics["step"] % epoch_steps == 0:
        used.append(time.process_time() - started)
        nll.append(heldout_nll(student, validation, config))
        kept.append(copy_weights())

print("validation NLL, as loaded and by epoch:", *(f"{value:.3f}" for value in nll))
assert nll[1] < nll[0]


# %%
def install(weights: list[torch.Tensor]) -> None:
    """Put an adapter back."""
    with torch.no_grad():
        for parameter, weight in zip(student.parameters().values(), weights, strict=True):
            parameter.copy_(weight)


for method, epoch in ((f"SeqKD, {epochs} epochs", epochs), ("SeqKD, 1 epoch", 1)):
    install(kept[epoch])
    seconds[method] = used[epoch]
    measure(method)

# %% [markdown]
# ## The game
#
# From the one-epoch student: the discriminator is a third adapter with a head on the last token, as published. Warmed up for a
# few steps on the student's samples, and then tested on *held-out* prompts before it may reward anybody. Three steps are far too
# few: with 64 pairs the standard error is 0.06, so the 0.53 below is chance, and this judge hardly has anything to teach.
# Notebook 07, exhibit 3, says what to do, given more than a quarter of an hour.

# %%
from minigad import Discriminator, gad, warmup

started = time.process_time()
discriminator = Discriminator.load(config, student)
for _ in warmup(student, discriminator, train, config.replace(warmup_epochs=0)):
    pass

prompts, texts = heldout["prompt"], heldout["completion"]
rollouts = student.generate(prompts, config, seed=1)
with torch.no_grad(), discriminator.language_model.active(train=False):
    theirs = discriminator.score(discriminator.encode(prompts, texts, [True] * len(texts))).scores
    ours = discriminator.score(discriminator.encode(prompts, rollouts.texts, rollouts.finished)).scores
accuracy = ((theirs > ours).float() + (theirs == ours).float() / 2).mean().item()
print(f"held-out accuracy of the discriminator: {accuracy:.2f}")
assert accuracy > 0.5

# %%
history = list(gad(student, discriminator, train, config))
seconds["GAD"] = used[1] + time.process_time() - started
samples = measure("GAD")

last = history[-1]
print(f"step {last['step']}: reward {last['reward']:+.2f}, accuracy {last['discriminator/accuracy']:.2f}")
for sample in samples[:4]:
    print(sample["prompt"], "\n   teacher:", sample["teacher"], "\n   student:", sample["student"])

# %% [markdown]
# ## The bake-off
#
# *CPU-s*: seconds of training, the warm-up's included. *SE*: standard error over the held-out prompts. *Best AUC*: the best judge's;
# 0.5 would be no difference. *NLL*: of the teacher's text, nats a token, at temperature 1. *Tokens*: mean length. Then the same as a
# picture, and the lengths of GAD's samples at 0.7, the last that were drawn.

# %%
names = ("bayes_auc", "nll", "mean_length")
lines = ["| method | T | CPU-s | KL(S‖T) ± SE | KL(T‖S) ± SE | best AUC | NLL | tokens |", "|---" * 8 + "|"]
for row in rows:
    divergences = [f"{row[k]:.1f} ± {row[f'{k}_se']:.1f}" for k in ("kl_student_teacher", "kl_teacher_student")]
    numbers = " | ".join([*divergences, *(f"{row[name]:.2f}" for name in names)])
    lines.append(f"| {row['method']} | {row['temperature']} | {row['seconds']:.0f} | {numbers} |")
Markdown("\n".join(lines))

# %%
curves = {}
for row in rows[1:]:
    point = (row["kl_teacher_student"], row["kl_student_teacher"], row["temperature"])
    curves.setdefault(row["method"], []).append(point)
alt = "KL from student against KL from teacher, a line a method over two temperatures; lower left is better."
show(plot_frontier(curves, "KL(T‖S), what it misses (nats)", "KL(S‖T), what it should not say (nats)"), alt)

# %%
alt = "Lengths of the student's and the teacher's texts, in words, as two histograms."
show(plot_lengths(samples), alt)

# %% [markdown]
# ## Who wins, in words
#
# In the picture the axes are zoomed: each point has an error of 0.6 to 1 nat upwards and 0.4 to 1 sideways, so its heights do not
# rank anybody. What it does show: sampling colder moves every student to the right.
#
# From the table, at temperature 1: the game against the rival that costs least thought, more epochs. A difference counts when it
# is more than two of its standard errors (taken as independent, which is cautious: the prompts are the same).

# %%
found = {(row["method"], row["temperature"]): row for row in rows}
game, rival, start = found["GAD", 1.0], found[f"SeqKD, {epochs} epochs", 1.0], found["SeqKD, 1 epoch", 1.0]
for name, words in (("kl_student_teacher", "KL(S‖T)"), ("kl_teacher_student", "KL(T‖S)")):
    gap, error = game[name] - rival[name], (game[f"{name}_se"] ** 2 + rival[f"{name}_se"] ** 2) ** 0.5
    verdict = "no difference" if abs(gap) < 2 * error else "GAD is better" if gap < 0 else "GAD is worse"
    colder = found["SeqKD, 1 epoch", 0.7][name] - start[name]
    print(f"{words}: GAD less {rival['method']} {gap:+.1f} ± {error:.1f} nats: {verdict}; ", end="")
    print(f"its gain over the start {game[name] - start[name]:+.1f}, of which a T of 0.7 gives {colder:+.1f} for free")
print(f"CPU-seconds: GAD {game['seconds']:.0f}, {rival['method']} {rival['seconds']:.0f}")

# %% [markdown]
# One seed, few prompts, a few steps of a small batch: this is how such a comparison is made, not its result. More seeds and prompts,
# 16 steps, two more methods: `python benchmarks/smollm2.py`. The paper plays 1,600 steps of 2,048 completions, and its student
# *cannot* copy its teacher; this one can.

# %% [markdown]
# ## Recap
#
# 1. An adapter is two thin matrices; a 4-bit base is a level a weight and a scale a block. Three players share one base.
# 2. Memory goes to activations and logits long before it goes to adapters: count before you download.
# 3. A game is compared with more epochs of imitation, and with a lower temperature; a difference needs its standard error.

# %% [markdown]
# ## Exercise 1
#
# How many bytes does one token of one row take in the cache of keys and values of Qwen2.5-0.5B (24 layers, 2 key-value heads of
# 64, 16-bit numbers)? Replace the dots and run the
# cell: it says `right`, or stops at an `assert`.

# %%
cache_bytes = ...

assert cache_bytes is ... or cache_bytes == architecture("qwen2.5-0.5b").kv_bytes()
print("not answered yet" if cache_bytes is ... else "right")

# %% [markdown]
# ## Exercise 2
#
# A 7B student on an old card of 11 GB, at the paper's lengths: change `PRESETS["qwen2.5-7b"]` until `bill_of` says that it fits.
# *Hint:* `.on_gpu` is in bytes, and one field changes speed and memory but no result.

# %%
fits = ...

assert fits is ... or (
    fits.student == "qwen2.5-7b"
    and (fits.max_prompt_length, fits.max_completion_length) == (2048, 1536)
    and bill_of(fits).on_gpu <= 11e9
)
print("not answered yet" if fits is ... else "right")

# %% [markdown]
# ## Exercise 3
#
# Two students have the same KL(S‖T) of 5 nats; A reached it at temperature 1, B by sampling at 0.7. Whose NLL of teacher text, at
# temperature 1, do you have to know before you call one better: "A", "B" or "both"?

# %%
ask_for = ...

assert ask_for is ... or ask_for == "both"
print("not answered yet" if ask_for is ... else "right")
