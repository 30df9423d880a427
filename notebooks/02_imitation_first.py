# %% [markdown]
# # 02 · Imitation first: SeqKD, and what it cannot learn
#
# **You will learn** what cross-entropy on teacher text does well, why a student too small for its teacher then says things
# that the teacher never would, and why the usual curve does not show it.
#
# **You need** a CPU, and notebook 01. Nothing is downloaded. **It takes** about one minute of computing.

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
import random

import torch
from IPython.display import Markdown
from torch.nn.functional import cross_entropy

from minigad.plots import plot_1d, plot_panels, show

torch.set_num_threads(1)  # models this small only lose time to a second thread

# %% [markdown]
# ## Cross-entropy, by hand
#
# Sequence-level knowledge distillation (SeqKD, arXiv 1606.07947) is supervised fine-tuning on the teacher's text:
#
# $$L = -\frac{1}{\sum |y_t|} \sum \log p_\theta(y_{t,i} \mid x, y_{t,<i})$$
#
# $x$: the prompt. $y_{t,i}$: token $i$ of a teacher completion, the end token included; $|y_t|$: how many. $p_\theta$: the
# student with weights $\theta$. The sums run over all completion tokens of the step; prompt tokens do not count. In nats a
# token (a nat is the unit of $\ln$): 0 would be perfect recall, $\ln V$ a blind guess among $V$ tokens.

# %%
from minigad import PRESETS, Student
from minigad.chat import encode
from minigad.losses import sft_loss
from minigad.toy.letters import letters_dataset, letters_metrics, letters_tokenizer, teacher_metrics

config = PRESETS["toy"].replace(max_completion_length=16, seqkd_epochs=size(20, 0.4))  # the one-layer Llama of 00
student = Student.load(config, tokenizer=letters_tokenizer())

# %%
rows = [encode(student.tokenizer, "cab", text) for text in ("a,b,c.", "bac!")]
losses = []
for row in rows:
    logits = student.model(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0]
    before = logits[len(row.prompt_ids) - 1 : -1]  # the logits before a token predict it
    losses.append(cross_entropy(before, torch.tensor(row.completion_ids), reduction="none"))
by_hand = torch.cat(losses).mean()

with student.active(train=True):  # its adapters, where it has some, switched on, and its mode set
    logprobs, mask = student.logprobs(rows)
assert torch.allclose(by_hand, sft_loss(logprobs, mask), atol=1e-5)
vocabulary = len(student.tokenizer)
print(f"untrained: {by_hand:.2f} nats a token; a blind guess among {vocabulary}: {math.log(vocabulary):.2f}")

# %% [markdown]
# ## Train, and ask two questions on the way
#
# On held-out prompts: how surprised is the student by the teacher's text (negative log-likelihood, NLL: the loss above), and
# the *teacher* by the student's? And what tells the two apart: a fresh classifier that reads pieces of text, and the best judge
# there is, $\log p_T - \log p_G$ ($p_T$, $p_G$: a text's probability under teacher, student), which no API gives. AUC: the share
# of pairs ranked right; 0.5 is chance.

# %%
from minigad import seqkd
from minigad.evaluate import bayes_auc, heldout_nll, honest_discriminator
from minigad.toy.letters import LettersTeacher

teacher, rng = LettersTeacher(), random.Random(0)
data = letters_dataset(8000, seed=0)
heldout = letters_dataset(256, seed=1, split="heldout")
prompts = [prompt for prompt in sorted(set(heldout["prompt"]))[:80] for _ in range(2)]
theirs = [teacher.sample(prompt, rng) for prompt in prompts]


def log_ratio(texts: list[str], finished: list[bool]) -> torch.Tensor:
    """Return log p_T - log p_G of each text."""
    written = list(zip(prompts, texts, finished, strict=True))
    rows = [encode(student.tokenizer, prompt, text, finished=done) for prompt, text, done in written]
    return torch.tensor([teacher.logprob(*one) for one in written]) - student.logprobs_of(rows).sum(1)


# %%
def look() -> dict[str, float]:
    """Measure the student as it is now, on held-out prompts."""
    rollouts = student.generate(prompts, config, seed=0)
    pairs = [[texts[i : i + 2] for i in range(0, len(texts), 2)] for texts in (theirs, rollouts.texts)]
    judged = [teacher.logprob(*one) for one in zip(prompts, rollouts.texts, rollouts.finished, strict=True)]
    tokens = sum(len(row.completion_ids) for row in rollouts.rows)
    ratios = log_ratio(theirs, [True] * len(theirs)), log_ratio(rollouts.texts, rollouts.finished)
    return {
        "nll": heldout_nll(student, heldout, config),
        "teacher_nll": -sum(judged) / tokens,
        "auc": honest_discriminator(*pairs)["honest_auc"],
        "best_auc": bayes_auc(*ratios),
    }


# %%
steps, seen = [0], [look()]
for metrics in seqkd(student, data, config):
    if metrics["step"] % size(250, 25) == 0:
        steps.append(metrics["step"])
        seen.append(look())

assert seen[-1]["nll"] < seen[0]["nll"]
assert seen[-1]["teacher_nll"] < seen[0]["teacher_nll"], "the teacher should find the student's text likelier"
assert seen[-1]["best_auc"] > 0.7, "the best judge still tells them apart"

# %%
level = [0, steps[-1]]
pairs = list(zip(heldout["prompt"], heldout["completion"], strict=True))
floor = -sum(teacher.logprob(*pair) for pair in pairs) / sum(len(text) + 1 for _, text in pairs)  # + 1: the end token
surprise = {
    "student, at the teacher's text": (steps, [s["nll"] for s in seen]),
    "teacher, at the student's text": (steps, [s["teacher_nll"] for s in seen]),
    "teacher, at its own": (level, [floor] * 2),
}
auc = {
    "discriminator, reading text": (steps, [s["auc"] for s in seen]),
    "the best there is": (steps, [s["best_auc"] for s in seen]),
    "chance": (level, [0.5, 0.5]),
}
alt = "Left: the student's surprise falls near its floor, the teacher's stays far above. Right: the reader falls to chance."
show(plot_panels({"NLL, nats a token": surprise, "Teacher told from student, AUC": auc}, "step of SeqKD"), alt)

# %% [markdown]
# The student's surprise falls towards its floor: that curve is what most training logs show. The teacher's surprise at the
# student's text, which no log shows, stays far above it. On the right, the classifier that reads pieces of text ends at
# chance, and the best judge does not. Two lessons: a weak judge near 0.5 proves nothing, and something is wrong that the loss
# did not see. Look (✗: not one of the sixteen ways):

# %%
for prompt in prompts[:6:2]:
    rollouts = student.generate([prompt], config, seed=1, num_generations=4)
    print(prompt, "->", "  ".join(f"{text}{'' if text in teacher.valid(prompt) else ' ✗'}" for text in rollouts.texts))

# %% [markdown]
# ## Two directions of one divergence
#
# $$\mathrm{KL}(T \| G) = \mathbb{E}_{y \sim T}\Big[\log \frac{p_T(y)}{p_G(y)}\Big] \qquad \mathrm{KL}(G \| T) = \mathbb{E}_{y \sim G}\Big[\log \frac{p_G(y)}{p_T(y)}\Big]$$
#
# $p_T(y)$, $p_G(y)$: the probability of text $y$ under teacher and student ($p_G$ is $p_\theta$). $\mathbb{E}_{y \sim T}$: the
# mean over the teacher's text. The first is what cross-entropy lowers: the price of *missing* what the teacher says. The second
# is the price of *saying* what the teacher would not; nothing in the loss above ever looks at the student's own text.

# %%
result = letters_metrics(student, config, "heldout", temperature=1.0)
lines = [
    "| | KL(T‖G), what SeqKD lowers | KL(G‖T), what nobody looked at | validity | modes |",
    "|---|---|---|---|---|",
]
names = ("kl_teacher_student", "kl_student_teacher", "validity", "modes")
lines.append("| SeqKD | " + " | ".join(f"{result[name]:.2f}" for name in names) + " |")
theirs = teacher_metrics("heldout")
Markdown("\n".join([*lines, "| the teacher | " + " | ".join(f"{theirs[name]:.2f}" for name in names) + " |"]))

# %% [markdown]
# All in nats a completion, held-out prompts. `validity`: share of the student's text that is one of the right ways. `modes`:
# how many of the sixteen it uses in effect. **Expect** about 2 and 15 nats, a validity of 0.4 and 9 modes: it misses little,
# and is wrong most of the time.

# %% [markdown]
# ## The reason, in one dimension
#
# Sixty categories, a teacher with two modes, a student with one bell: it *cannot* match. Among all bells, cross-entropy
# prefers the one that nowhere gives the teacher's text a tiny probability:

# %%
from minigad.toy.one_dimension import seqkd as seqkd_1d
from minigad.toy.one_dimension import student_metrics, student_probs, teacher_probs

blend = seqkd_1d(seed=0, steps=int(size(2500, 600)))
numbers = student_metrics(blend)
alt = "The teacher's two modes as bars; the student, one wide bell, has its top in the gap between them."
show(plot_1d(teacher_probs(), {"SeqKD": student_probs(blend)}), alt)
print(f"mass on the modes {numbers['mass_on_modes']:.2f}; KL(T||G) {numbers['kl_teacher_student']:.2f}, ", end="")
print(f"KL(G||T) {numbers['kl_student_teacher']:.2f} nats")
assert numbers["kl_teacher_student"] < numbers["kl_student_teacher"]

# %% [markdown]
# That is *mode covering*. More than a third of what this student says is on neither mode (within two standard deviations),
# where the teacher says little. No more data, epochs or care will mend it: it is the optimum. (The letters student is not at
# its own optimum yet. More epochs do help it, and are the rival that a game must beat.)

# %% [markdown]
# ## The control that is free: temperature
#
# Before a game, try the dial. Sampling at temperature $\tau < 1$ sharpens the student: each token is drawn with probability
# proportional to $p_\theta^{1/\tau}$. It costs nothing:

# %%
lines = ["| temperature | validity | modes | KL(T‖G) |", "|---|---|---|---|"]
for temperature in (1.0, 0.8, 0.6):
    cool = letters_metrics(student, config, "heldout", temperature, samples=1)
    numbers = " | ".join(f"{cool[name]:.2f}" for name in ("validity", "modes", "kl_teacher_student"))
    lines.append(f"| {temperature} | {numbers} |")
Markdown("\n".join(lines))

# %% [markdown]
# More valid, fewer modes: quality is bought with coverage. Every claim about a game must be read beside this table, and
# beside SeqKD with the game's computing time. Notebook 06 does.

# %% [markdown]
# ## Recap
#
# 1. SeqKD is cross-entropy on the teacher's text; it lowers KL(T‖G) and never looks at the student's own text.
# 2. A student too small for its teacher then covers, and puts mass where the teacher has none.
# 3. Temperature and more epochs are the controls that any game must beat.

# %% [markdown]
# ## Exercise 1
#
# A teacher gives half its mass to each of two texts. Student A gives all its mass to the first; student B a quarter to each of
# four, the two among them. Give KL(A‖T) and KL(B‖T), in nats; write `float("inf")` for infinite. And which student does KL(T‖·),
# the one that SeqKD lowers, prefer: `"A"` or `"B"`? Replace the dots and run the cell: it says `right`, or stops at an `assert`.

# %%
kl_a, kl_b, preferred = ..., ..., ...

assert kl_a is ... or abs(math.exp(kl_a) - 2) < 2e-3
assert kl_b is ... or math.isinf(kl_b)
assert preferred is ... or preferred == ("A" if math.inf < math.log(2) else "B")  # KL(T‖A), KL(T‖B)
print("not answered yet" if ... in (kl_a, kl_b, preferred) else "right")

# %% [markdown]
# ## Exercise 2
#
# What is the NLL, in nats a completion, of the best student there can be on text of the letters teacher with sixteen equally
# likely ways? *Hint: the entropy of the teacher; forget the noise.*

# %%
best_nll = ...

assert best_nll is ... or abs(math.exp(best_nll) - 16) < 0.2
print("not answered yet" if best_nll is ... else "right")
