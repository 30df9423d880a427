# %% [markdown]
# # 04 · One prompt, N completions: rollouts, groups, advantages
#
# **You will learn** how a student's own text becomes training data: sampling, masks, groups, and the one number per
# completion that says "more of this" or "less of this".
#
# **You need** a CPU, and notebook 03. Nothing is downloaded. **It takes** about half a minute of computing.

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
import torch
from IPython.display import Markdown

from minigad.plots import plot_group, plot_panels, show

torch.set_num_threads(1)  # models this small only lose time to a second thread

# %%
# The toy group: the same in notebooks 03 to 06.
prompt = "cab"
teacher_completion = "a,b,c."
student_completions = ["cb,a.", "bca.", "c,b,a.", "abc!"]
teacher_scores = torch.tensor([1.2])  # (B,): one prompt
student_scores = torch.tensor([[0.3, -0.5, 1.9, 0.8]])  # (B, N): four completions of it

# %% [markdown]
# ## A student that can already write a little
#
# A *rollout* is a completion that the student writes as it is now (*on-policy*: the policy is the student's distribution). Ours
# imitates the teacher for eight epochs first (notebook 02): enough for the form, letters, commas and an end; not for the right
# letters.

# %%
from minigad import PRESETS, Student, seqkd
from minigad.toy.letters import letters_dataset, letters_tokenizer

config = PRESETS["toy"].replace(max_completion_length=16, seqkd_epochs=size(8, 0.2))
student = Student.load(config, tokenizer=letters_tokenizer())
*_, last = seqkd(student, letters_dataset(8000, seed=0), config)
print(f"cross-entropy {last['loss']:.2f} nats a token")

# %% [markdown]
# ## Sampling, token by token
#
# $$y_i \sim \mathrm{softmax}(z_i / \tau), \qquad i = 1, 2, \ldots \text{ until the end token}$$
#
# $y_i$: token $i$ of the completion. $z_i$: the student's logits after the prompt and $y_{<i}$, the tokens before it. $\tau$: the
# temperature. Nothing else: top-p, top-k and penalties off, since the loss will use log-probabilities of the very
# distribution that was sampled.

# %%
from minigad.chat import decode, encode_prompt

tokenizer = student.tokenizer
torch.manual_seed(0)
ids, ends = encode_prompt(tokenizer, prompt), tokenizer.eos_token_id
written: list[int] = []
while len(written) < config.max_completion_length and ends not in written:
    with torch.no_grad():
        logits = student.model(torch.tensor([ids + written])).logits[0, -1]
    probabilities = torch.softmax(logits / config.temperature, dim=0)
    written.append(int(torch.multinomial(probabilities, 1)))

text, finished = decode(tokenizer, written)
print(repr(text), "finished" if finished else "cut off", f"{len(written)} tokens, the end token included")

# %% [markdown]
# The package does the same for many prompts at once, and must agree on how probable each text is. Groups are known by
# *position*, never by the prompt's text: two rows may hold the same prompt.

# %%
rollouts = student.generate([prompt, "fade"], config, seed=0, num_generations=4)
for i, (text, finished) in enumerate(zip(rollouts.texts, rollouts.finished, strict=True)):
    print(f"prompt {i // 4} ({rollouts.prompts[i // 4]:4s})  completion {i % 4}  {text!r:12s} finished: {finished}")

# %%
row = rollouts.rows[0]
with torch.no_grad():
    logits = student.model(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0]
first = len(row.prompt_ids) - 1  # the logits here predict the first token of the completion
mine = torch.log_softmax(logits[first:-1] / config.temperature, -1)
mine = mine.gather(1, torch.tensor(row.completion_ids).unsqueeze(1)).sum()

theirs = student.logprobs_of(rollouts.rows, config.temperature).sum(1)[0]
assert torch.allclose(mine, theirs, atol=1e-4)
print(f"log p of the first completion: {mine:.2f} nats")

# %% [markdown]
# ## The mask: up to the end token, inclusive
#
# Rows are padded to one length, and a mask says which tokens the student chose. The trap: many models pad with the end
# token itself. A mask `ids != pad` then forgets the end token, and the student is never taught to stop.

# %%
from minigad.model import completion_mask

length = max(len(row.completion_ids) for row in rollouts.rows)
padded = torch.full((len(rollouts.rows), length), ends)  # pad == end, as in many models
for i, row in enumerate(rollouts.rows):
    padded[i, : len(row.completion_ids)] = torch.tensor(row.completion_ids)

is_end = padded == ends
mask = is_end.cumsum(1) - is_end.long() == 0  # no end token *before* this place

assert torch.equal(mask, completion_mask(rollouts.rows))
print(f"{mask.sum()} tokens are trained; 'ids != pad' would lose {mask.sum() - (padded != ends).sum()} end tokens")

# %% [markdown]
# ## From rewards to advantages
#
# A score of 0.8 says little by itself. Among the scores of its group it says: a bit above average. The advantage of GRPO
# (group relative policy optimization; arXiv 2511.10643, Eq 6):
#
# $$A_n = \frac{r_n - \operatorname{mean}(r)}{\operatorname{std}(r)}$$
#
# $A_n$, $r_n$: the advantage and the reward (the judge's score) of completion $n$. mean, std: over the rewards $r$ of the $N$
# completions of the prompt; the std divides by $N-1$. The group replaces a second network that would guess the reward.

# %%
from minigad.losses import group_advantages

rewards = student_scores
centred = rewards - rewards.mean(1, keepdim=True)
advantages = centred / rewards.std(1, keepdim=True)

assert torch.allclose(advantages, group_advantages(rewards))
print("rewards   ", [f"{r:+.2f}" for r in rewards[0].tolist()])
print("advantages", [f"{a:+.2f}" for a in advantages[0].tolist()])

# %%
alt = "Left: four rewards with their mean of 0.63. Right: their advantages; two completions are pushed up, two down."
show(plot_group(student_completions, rewards[0].tolist(), advantages[0].tolist()), alt)

# %% [markdown]
# `bca.`, 1.12 standard deviations below the mean, is pushed down, and `c,b,a.` up. Note what is *not* there: the teacher's
# score. It trained the judge, it does not enter the advantage. And any constant of the prompt, such as the $c(x)$ of notebook
# 03, drops out.

# %%
assert torch.allclose(group_advantages(rewards + 100), advantages, atol=1e-4)

# %% [markdown]
# ## When a group says nothing
#
# All four alike: every advantage is zero, and the prompt teaches nothing. Without a floor under the std, rounding noise
# of $10^{-6}$ would be blown up to a full-sized advantage. minigad's floor is $10^{-4}$, and runs log
# `frac_reward_zero_std`, the share of such groups. A share near 1 means that the student writes one answer, or that the
# judge cannot tell.

# %%
noise = 0.7 + 1e-6 * torch.tensor([[1.0, -1.0, 2.0, -2.0]])
naive = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True)

assert group_advantages(torch.full((1, 4), 0.7)).abs().max() == 0
assert group_advantages(noise).abs().max() < 0.05 < naive.abs().max()
print("without a floor", [f"{a:+.2f}" for a in naive[0].tolist()])
print("with it        ", [f"{a:+.2f}" for a in group_advantages(noise)[0].tolist()])

# %% [markdown]
# ## How many completions?
#
# The group's mean is a guess of what the student earns on average, made of $N$ numbers, so it is off by about
# $\operatorname{std}(r)/\sqrt{N}$. Draw a thousand groups of standard normal rewards. The paper takes $N = 8$: the mean is known
# to a third of a standard deviation, and four times the sampling would only halve that.

# %%
torch.manual_seed(0)
sizes = [2, 4, 8, 16, 32]
measured = [torch.randn(1000, n).mean(1).std().item() for n in sizes]
theory = [n**-0.5 for n in sizes]

assert max(abs(m - t) / t for m, t in zip(measured, theory, strict=True)) < 0.1
curves = {"measured, 1000 groups": (sizes, measured), "one over root N": (sizes, theory)}
alt = "The error of the group's mean, measured, lies on one over the root of N: 0.71 at 2, 0.35 at 8, 0.18 at 32."
title = "Error of the group's mean, in standard deviations of the reward"
show(plot_panels({title: curves}, "N, completions a prompt"), alt)

# %% [markdown]
# ## Dense rewards
#
# One number for a whole text tells no token what it did. If the judge gives the first $i$ tokens a score $s_i$, token $i$ earns
# $r_i = s_i - s_{i-1}$ ($s_0 = 0$), and what was earned before a token cannot be its doing:
#
# $$A_i = \frac{1}{\operatorname{std}}\Big(\sum_{k \ge i} r_k - \text{baseline}_i\Big)$$
#
# $A_i$: the advantage of token $i$. The sum: what it and the tokens after it earned. $\text{baseline}_i$: the same, averaged over
# the group. std: of the whole texts' rewards. With all reward on the last token, this *is* the formula above.

# %%
from minigad.losses import token_advantages

alive = torch.ones(1, 4, 3, dtype=torch.bool)  # four completions of three tokens
sparse = torch.zeros(1, 4, 3)
sparse[..., -1] = rewards

assert torch.allclose(token_advantages(sparse, alive), advantages.unsqueeze(-1).expand(1, 4, 3), atol=1e-6)

# %%
# Made up for three tokens each, of the sums that we know: 0.3, -0.5, 1.9, 0.8.
dense = torch.tensor([[[0.1, 0.1, 0.1], [0.1, -0.6, 0.0], [0.6, 0.7, 0.6], [0.4, 0.4, 0.0]]])
to_go = dense.flip(-1).cumsum(-1).flip(-1)
mine = (to_go - to_go.mean(1, keepdim=True)) / dense.sum(-1).std(1).view(1, 1, 1)

assert torch.allclose(dense.sum(-1), rewards)
assert torch.allclose(mine, token_advantages(dense, alive), atol=1e-5)
lines = ["| completion | token 1 | token 2 | token 3 |", "|---|---|---|---|"]
for text, values in zip(student_completions, mine[0].tolist(), strict=True):
    lines.append(f"| `{text}` | " + " | ".join(f"{a:+.2f}" for a in values) + " |")
Markdown("\n".join(lines))

# %% [markdown]
# `bca.` went wrong with its second letter, which earned -0.6: the tokens up to it carry the blame, since all that follows a
# token may be its doing; the third hardly any. `token_advantages` also handles completions of different lengths: the baseline
# at token $i$ is over those that have not ended before it.

# %% [markdown]
# ## Recap
#
# 1. Rollouts are the student's own text, sampled as plainly as the loss will assume.
# 2. The mask keeps the end token; the group, known by position, gives the baseline.
# 3. An advantage is a comparison within a prompt. Equal rewards teach nothing.

# %% [markdown]
# ## Exercise 1
#
# Two right answers and two wrong ones, rewards `[1, 1, 0, 0]`: what is the advantage of a right one, by hand? *Hint: the std
# divides by N - 1.* Replace the dots and run the cell: it says `right`, or stops at an `assert`.

# %%
advantage_of_a_right_one = ...

expected = group_advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))[0, 0]
assert advantage_of_a_right_one is ... or abs(advantage_of_a_right_one - expected) < 5e-3
print("not answered yet" if advantage_of_a_right_one is ... else "right")

# %% [markdown]
# ## Exercise 2
#
# A judge that mostly ties: rewards `[1, 0, 0, 0]` in one group, `[0.001, 0, 0, 0]` in the next. How many times as hard as in the
# second is the winner of the first pushed? And if `group_advantages` does not divide by the std (`scale="none"`)? Guess before
# you compute.

# %%
times_as_hard, times_as_hard_unscaled = ..., ...

clear, close = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.001, 0.0, 0.0, 0.0]])
scaled, unscaled = [(group_advantages(clear, how) / group_advantages(close, how))[0, 0] for how in ("group", "none")]
assert times_as_hard is ... or abs(times_as_hard / scaled - 1) < 0.01
assert times_as_hard_unscaled is ... or abs(times_as_hard_unscaled / unscaled - 1) < 0.01
print("not answered yet" if ... in (times_as_hard, times_as_hard_unscaled) else "right")
