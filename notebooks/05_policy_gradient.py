# %% [markdown]
# # 05 · The policy gradient on a page: log-probs, ratio, KL
#
# **You will learn** how an advantage becomes a step of the weights, why the famous ratio is 1 here and still matters, and
# how to measure a KL divergence from samples without fooling yourself.
#
# **You need** a CPU, and notebook 04. Nothing is downloaded. **It takes** about half a minute of computing.

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
import math

import torch
from IPython.display import Markdown

from minigad.plots import COLOURS, plot_panels, show

torch.set_num_threads(1)  # models this small only lose time to a second thread

# %%
# The toy group: the same in notebooks 03 to 06.
prompt = "cab"
teacher_completion = "a,b,c."
student_completions = ["cb,a.", "bca.", "c,b,a.", "abc!"]
teacher_scores = torch.tensor([1.2])  # (B,): one prompt
student_scores = torch.tensor([[0.3, -0.5, 1.9, 0.8]])  # (B, N): four completions of it

# %% [markdown]
# The student of notebook 04, eight epochs of imitation old, and the advantages that the group's scores gave there:

# %%
from minigad import PRESETS, Student, seqkd
from minigad.losses import group_advantages
from minigad.toy.letters import letters_dataset, letters_tokenizer

config = PRESETS["toy"].replace(max_completion_length=16, seqkd_epochs=size(8, 0.2))
student = Student.load(config, tokenizer=letters_tokenizer())
*_, last = seqkd(student, letters_dataset(8000, seed=0), config)

advantages = group_advantages(student_scores).squeeze(0)  # (R,): R rows, here one prompt's four
print([f"{a:+.2f}" for a in advantages.tolist()])

# %% [markdown]
# ## Log-probabilities
#
# $$\log p_\theta(y \mid x) = \sum_{i=1}^{|y|} \log p_\theta(y_i \mid x, y_{<i})$$
#
# $\theta$: the student's weights. $x$: the prompt. $y_i$: token $i$ of the completion $y$, the end token included; $|y|$: how many.
# The logits *before* a token predict it: shift by one, and take the completion's part only.

# %%
from minigad.chat import encode

rows = [encode(student.tokenizer, prompt, text) for text in student_completions]
mine = []
for row in rows:
    logits = student.model(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0]
    before = logits[len(row.prompt_ids) - 1 : -1].log_softmax(-1)  # (tokens, V): over the vocabulary
    mine.append(before.gather(1, torch.tensor(row.completion_ids).unsqueeze(1)).sum())

with student.active(train=True):
    logprobs, mask = student.logprobs(rows)  # (R, T) each: T, the longest's tokens

assert torch.allclose(torch.stack(mine), logprobs.sum(1), atol=1e-4)
for text, value in zip(student_completions, mine, strict=True):
    print(f"{text:7s} log p = {value:6.2f} nats")

# %% [markdown]
# ## The gradient
#
# We cannot differentiate a sampled text. But since $\nabla p = p\,\nabla \log p$, and with $A$ held fixed,
#
# $$\nabla_\theta \, \mathbb{E}_{y \sim p_\theta}[A(y)] = \mathbb{E}_{y \sim p_\theta}\big[A(y)\, \nabla_\theta \log p_\theta(y \mid x)\big]$$
#
# $A(y)$: the advantage of text $y$. $\mathbb{E}_{y \sim p_\theta}$: the mean over the student's own samples. $\nabla_\theta$: the
# gradient in the weights. Raise the log-probability of what was better than its group, lower the rest, each by its advantage.
# The loss is its negative, a mean over all tokens of the step.

# %%
from minigad.losses import grpo_loss

by_hand = -(advantages.unsqueeze(1) * logprobs * mask).sum() / mask.sum()
weights = list(student.parameters().values())
my_gradient = torch.autograd.grad(by_hand, weights, retain_graph=True)
gradient = torch.autograd.grad(grpo_loss(logprobs, advantages, mask), weights, retain_graph=True)

assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(my_gradient, gradient, strict=True))
print(f"{sum(g.numel() for g in gradient):,} weights, one gradient")

# %% [markdown]
# ## The ratio, and why it is 1
#
# GRPO writes the loss with a ratio, to reuse samples that an older student drew:
#
# $$-\min\big(\rho_i A,\ \mathrm{clip}(\rho_i, 1-\varepsilon, 1+\varepsilon)\, A\big), \qquad \rho_i = \frac{p_\theta(y_i \mid x, y_{<i})}{p_{\text{old}}(y_i \mid x, y_{<i})}$$
#
# $\rho_i$: the ratio of token $i$. $p_{\text{old}}$: the student that drew it. clip: $\rho_i$, held between the two bounds.
# $\varepsilon$: 0.2, how far a reused sample may pull. GAD takes one update per rollout: $p_{\text{old}}$ *is* $p_\theta$, so
# $\rho_i = 1$, nothing is clipped, and the gradient of $\rho_i$ is that of $\log p_\theta$.

# %%
ratio = torch.exp(logprobs - logprobs.detach())

assert (ratio == 1).all()
assert ratio.requires_grad  # 1, and yet not a constant

rho = torch.linspace(0.5, 1.5, 101)
adds = {f"A = {a:+d}": torch.minimum(rho * a, rho.clamp(0.8, 1.2) * a) for a in (1, -1)}
lines = {name: (rho.tolist(), values.tolist()) for name, values in adds.items()}
figure = plot_panels({"What a token adds to the objective": lines}, "ratio")
figure.axes[0].axvline(1, color=COLOURS["student"], linewidth=1)
figure.axes[0].annotate(" GAD is here", (1, 0), color=COLOURS["student"])
alt = "The clipped objective: flat above 1.2 for a positive advantage, flat below 0.8 for a negative one. GAD is at 1."
show(figure, alt)

# %% [markdown]
# Beyond the corner the curve is flat: a sample that has already moved the student that far pulls no more. If your run shows
# clipping with one update per rollout, old and new log-probabilities disagree: another temperature, another precision, or a
# bug.

# %% [markdown]
# ## One step
#
# Take it (at three times the toy preset's rate, to see it), and look at the same four texts again.

# %%
optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.0)
grpo_loss(logprobs, advantages, mask).backward()
optimizer.step()

after = student.logprobs_of(rows).sum(1)
change = after - logprobs.detach().sum(1)
assert (advantages * change).sum() > 0, "better than the group must have become likelier than the rest"

table = ["| completion | advantage | log p before | after |", "|---|---|---|---|"]
for text, a, old, new in zip(student_completions, advantages, logprobs.sum(1), after, strict=True):
    table.append(f"| `{text}` | {a:+.2f} | {old:.2f} | {new:.2f} |")
Markdown("\n".join(table))

# %% [markdown]
# The best rose, the worst fell. Those between may go either way: `abc!` fell, though its advantage is above 0. All four share
# the same weights, and what lowers the others' letters lowers its own.

# %% [markdown]
# ## Staying close: KL from samples
#
# The paper adds $\beta\,\mathrm{KL}(p_\theta \| p_{\text{ref}})$ to the loss. $\beta$: its weight, 0.001. $p_{\text{ref}}$: the
# reference, a frozen copy of the warmed-up student. A sum over all texts is out of reach, so it is estimated on the samples:
#
# $$k_3 = e^{r} - 1 - r, \qquad r = \log p_{\text{ref}}(y) - \log p_\theta(y)$$
#
# Its mean over $y \sim p_\theta$ is the KL, and no sample of it is negative. $k_1 = -r$ has the same mean and more noise;
# $k_2 = r^2/2$ has less noise and another mean (close by, while the two policies are close).

# %%
from minigad.losses import kl_k3

p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)  # the student, over three texts
q = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)  # the reference
truth = (p * (p / q).log()).sum().item()

torch.manual_seed(0)
y = torch.multinomial(p, 20_000, replacement=True)  # the student's own samples
r = q.log()[y] - p.log()[y]
estimators = {"k1": -r, "k2": r**2 / 2, "k3": r.exp() - 1 - r, "k3, sign of r wrong": (-r).exp() - 1 + r}

assert torch.allclose(estimators["k3"], kl_k3(p.log()[y], q.log()[y]))
assert (estimators["k3"] >= 0).all()
assert abs(estimators["k3"].mean() - truth) < 0.02

# %% [markdown]
# With three texts the mean that each estimator tends to can be summed; the KL is 0.373. (**Expect** 0.364 of `k2`, 0.418 of the
# wrong sign.)

# %%
table = ["| estimator | tends to | mean of 20,000 | standard deviation | share negative |", "|---|---|---|---|---|"]
for name, k in estimators.items():
    limit = sum(p[text] * k[y == text][0] for text in range(3))  # each text's value, by its probability
    table.append(f"| {name} | {limit:.3f} | {k.mean():.3f} | {k.std():.3f} | {(k < 0).double().mean():.2f} |")
Markdown("\n".join([*table, f"| **the KL** | **{truth:.3f}** | | | |"]))

# %%
counts = torch.arange(1, len(y) + 1)
shown = torch.logspace(1, 4.3, 200).long().clamp(max=len(y)) - 1
running = {name: (k.cumsum(0) / counts)[shown] for name, k in estimators.items()}
lines = {name: (counts[shown].tolist(), values.tolist()) for name, values in running.items()}
lines["the KL"] = ([10, len(y)], [truth, truth])
figure = plot_panels({"Estimated KL, nats": lines}, "samples (log scale)")
figure.axes[0].set_xscale("log")
alt = "Running means over samples: k1 and k3 reach the truth, k2 ends close by, the k3 with a wrong sign clearly above."
show(figure, alt)

# %% [markdown]
# The wrong sign is no slip of a beginner: a well-known teaching repository has it. It looks fine, positive and the smoothest of
# all, and what it tends to is no KL. So: samples from the student, $r$ = reference minus student.

# %% [markdown]
# ## Which student is the reference?
#
# The warmed-up one. A large model is trained by an *adapter*, small matrices on frozen weights (LoRA, notebook 08), and it is
# tempting to switch the adapter off instead. But that is the base from before warm-up: another policy, and a pull away from
# all that imitation taught. minigad keeps a frozen copy.

# %%
reference = student.freeze_reference()
kl_now = kl_k3(student.logprobs_of(rows), reference.logprobs_of(rows))

assert kl_now.abs().max() == 0  # a copy, so far
print(f"weight of the KL term in the loss, paper: 0.001; the toy preset: {PRESETS['toy'].beta}")

# %% [markdown]
# Prototypes, before this package, measured that term at $5 \cdot 10^{-5}$ of the loss: inert, at the price of a forward pass. So
# the presets of the toy and of SmolLM2 leave it out; the larger ones, not measured here, keep the paper's. If your student
# drifts, it is the first thing to switch on (`beta`).

# %% [markdown]
# ## Recap
#
# 1. The gradient of a mean reward is advantage times the gradient of the log-probability.
# 2. One update per rollout: the ratio is 1, nothing is clipped.
# 3. k3 estimates KL(student ‖ reference) from the student's samples; with its sign wrong it estimates no KL.

# %% [markdown]
# ## Exercise 1
#
# A token's ratio is 1.5, its advantage +1, epsilon 0.2. What does it add to the objective (which the loss negates)? And with
# advantage -1? Replace the dots and run the cell: it says `right`, or stops at an `assert`.

# %%
adds_plus, adds_minus = ..., ...

one, logprob, old = torch.ones(1, 1), torch.tensor([[1.5]]).log(), torch.zeros(1, 1)
plus, minus = [-grpo_loss(logprob, a * one, one, old_logprobs=old) for a in (1, -1)]
assert adds_plus is ... or abs(adds_plus - plus) < 1e-4
assert adds_minus is ... or abs(adds_minus - minus) < 1e-4
print("not answered yet" if ... in (adds_plus, adds_minus) else "right")

# %% [markdown]
# ## Exercise 2
#
# Log-probabilities must be taken at the temperature that was sampled. For logits $(2, 0)$ sampled at temperature 0.5, how much
# is the log-probability of the first token wrong, in nats, if you forget the temperature? *Hint:* `torch.log_softmax` *twice.*

# %%
wrong_by = ...

assert wrong_by is ... or abs(abs(wrong_by) - math.log1p(math.exp(-2)) + math.log1p(math.exp(-4))) < 1e-3
print("not answered yet" if wrong_by is ... else "right")
