# %% [markdown]
# # 00 · GAD in one sitting
#
# **You will learn** what Generative Adversarial Distillation does, why imitation alone falls short, and what the game
# costs: first where every number is exact, then with a small language model.
#
# **You need** a CPU, PyTorch, and to have met a language model. Nothing is downloaded. **It takes** about two minutes of
# computing. What is only named here (policy gradient, advantage, log-ratio) is built by hand in 01 to 06.

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
from IPython.display import Markdown, display
from matplotlib.figure import Figure

torch.set_num_threads(1)  # models this small only lose time to a second thread

# %% [markdown]
# ## The game, in one line
#
# A teacher can be sampled but not opened: you have its text, no probabilities. Two players (arXiv 2511.10643, Eq 1):
#
# $$\max_G \min_D \; \mathbb{E}\left[-\log \sigma\big(D(y_t) - D(y_s)\big)\right]$$
#
# $G$: the student. $D$: the discriminator (the *judge*, for short), which gives a text a score. $y_t$, $y_s$: a completion
# by teacher, by student. $\sigma(m) = 1/(1 + e^{-m})$: the logistic function. $\mathbb{E}$: the mean over prompts and
# samples. $D$ learns to rank the teacher higher; its score is the student's reward.

# %% [markdown]
# ### One step of it
#
# ```
# prompt ──▶ teacher ──▶ one completion, collected beforehand ──┐
#    │                                                          ▼
#    └─────▶ student ──▶ N completions, written now ──▶ discriminator ──▶ scores
#               ▲                                               ▲           │
#               │                              learns to rank ──┘           ▼
#               └── policy gradient ◀── advantages ◀── less their mean ── rewards
# ```
#
# The student writes; the discriminator scores. Completions above the mean of their prompt become likelier, the rest less
# likely (a *policy gradient*). The discriminator learns from the same texts. Both start from imitation, the *warm-up*.

# %% [markdown]
# ### By hand, once
#
# The bracket is the Bradley-Terry loss, from the model of who wins a match. One teacher completion with score 1.2
# meets four student completions of the same prompt. The loss is near 0 if $D$ ranks every pair right by a wide margin,
# and $\log 2 \approx 0.693$ if it cannot tell.

# %%
from minigad.losses import bradley_terry_loss

teacher_scores = torch.tensor([1.2])  # (B,): one prompt
student_scores = torch.tensor([[0.3, -0.5, 1.9, 0.8]])  # (B, N): four completions of it

margin = teacher_scores.unsqueeze(1) - student_scores
by_hand = -torch.log(torch.sigmoid(margin)).mean()

assert torch.allclose(by_hand, bradley_terry_loss(teacher_scores, student_scores))
print(f"loss {by_hand:.3f}")

# %% [markdown]
# ## A world of one dimension
#
# One prompt; a completion is one of 60 categories. The teacher has two modes. The student is a single bell curve and cannot
# have both, as a small model is too small for its teacher.
#
# Imitation first. SeqKD (sequence-level knowledge distillation) trains by cross-entropy on the teacher's samples. That lowers
# the divergence $\mathrm{KL}(T \,\|\, G)$, the cost of missing what the teacher does, in nats (units of $\ln$). So the student
# covers all, the gap too. *On the modes*: within two deviations of either.

# %%
from minigad.plots import COLOURS, plot_1d, show
from minigad.toy.one_dimension import oracle, play, seqkd, student_metrics, student_probs, teacher_probs

teacher = teacher_probs()
start = seqkd(seed=0)
imitation = student_metrics(start)
print(f"SeqKD: centre {imitation['mu']:.1f}, width {imitation['sigma']:.1f}, ", end="")
print(f"{imitation['mass_on_modes']:.0%} of its mass on the modes")

# %% [markdown]
# Now the game, from that student. At each step both players see 64 samples: the discriminator, a table of 60 scores,
# takes one Bradley-Terry step; the student takes one policy-gradient step towards what scored above the mean.
# `play` yields after each step, so the figure moves while it trains.

# %%
words = "The teacher's two modes as bars; the student's bell moves from the middle onto the larger one."
alt = {"image/png": {"alt": words}}
live = display(plot_1d(teacher, {"student": student_probs(start)}), metadata=alt, display_id=True)
history = []
for metrics in play(1200, seed=0, start=start):
    history.append(metrics)
    if metrics["step"] % 100 == 0:
        figure = plot_1d(teacher, {"student": metrics["student_probs"]})
        figure.axes[0].set_title(f"step {metrics['step']}")
        live.update(figure, metadata=alt)

# %% [markdown]
# With a perfect discriminator, the game is known to lower $\mathrm{KL}(G \,\|\, T)$, the cost of saying what the
# teacher would not. Here that can be checked: `oracle` descends this KL exactly, without samples or discriminator. The
# game, which saw samples only, should end within 0.05 nats of it.

# %%
best = student_metrics(oracle(start))
game = history[-1]

for name in ("kl_student_teacher", "kl_teacher_student"):
    print(f"{name}: SeqKD {imitation[name]:.2f}, game {game[name]:.2f}, oracle {best[name]:.2f}")

assert abs(game["kl_student_teacher"] - best["kl_student_teacher"]) < 0.05

# %%
alt = "SeqKD: one wide bell over both modes and the gap. GAD: a narrow bell on the larger mode."
show(plot_1d(teacher, {"SeqKD": student_probs(start), "GAD": game["student_probs"]}), alt)

# %% [markdown]
# Read both numbers. The game's student says little that the teacher would not, and one of the teacher's two modes is
# gone: $\mathrm{KL}(T \,\|\, G)$ went *up*. That is the trade of this method. It is a gain if you want every answer
# to be good, a loss if you want all the teacher's ways.

# %% [markdown]
# ## A language with a known teacher
#
# A prompt is 3 to 5 letters. The teacher writes them in one of four orders, with or without commas, and ends with `.`
# or `!`: sixteen right ways. The student is a Llama of 11 thousand weights, trained by the code that trains a real
# model. The discriminator is a larger Llama: `score = log-probability under it - under the student`. (The paper's is a
# head that reads a score off a model; here that gains nothing: notebook 06.)

# %%
from minigad import PRESETS, Discriminator, Student, gad, warmup
from minigad.toy.letters import letters_dataset, letters_metrics, letters_tokenizer

config = PRESETS["toy"].replace(
    max_completion_length=16,
    warmup_epochs=size(25, 0.2),
    discriminator_sft_epochs=size(10, 0.2),
    max_steps=int(size(150, 2)),
)
data = letters_dataset(8000, seed=0)
student = Student.load(config, tokenizer=letters_tokenizer())
discriminator = Discriminator.load(config, student)
print(data[0], data[1], sep="\n")

# %% [markdown]
# **Warm-up** is imitation of both players: the student learns the teacher's text (SeqKD), then the discriminator
# does, then it compares the two for a few steps. `validity` is the share of a student's text that is one of the
# sixteen right ways; 1 is perfect. It is summed exactly, not sampled.

# %%
for metrics in warmup(student, discriminator, data, config):
    if metrics["step"] % 500 == 0:
        print(f"{metrics['phase']:20s} step {metrics['step']:4d}  loss {metrics['loss']:.3f} nats a token")

before = letters_metrics(student, config, "heldout", temperature=1.0)
print(f"validity after warm-up: {before['validity']:.2f}")


# %% [markdown]
# **The game.** The reward is the discriminator's mean score of the student's text, a log-ratio: below 0 while the
# discriminator's Llama knows better than the student what the teacher writes, 0 when both agree. It is no measure of
# quality, since the judge moves too. So we watch validity beside it, on validation prompts that neither player trains
# on.


# %%
def draw(rewards: list[float], validity: dict[int, float]) -> Figure:
    """Draw the judge's opinion beside the truth."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(rewards) + 1), rewards, color=COLOURS["student"])
    left.set(title="Reward of the student", xlabel="step", ylabel="mean score")
    right.plot(list(validity), list(validity.values()), color=COLOURS["student"], marker="o")
    right.set(title="Validity on validation prompts", xlabel="step", ylabel="share of text")
    return figure


# %%
rewards: list[float] = []
validity = {0: letters_metrics(student, config, "validation", 1.0)["validity"]}
alt = {"image/png": {"alt": "Over the steps, the student's reward rises towards 0 and its validity rises."}}
live = display(draw(rewards, validity), metadata=alt, display_id=True)
for metrics in gad(student, discriminator, data, config):
    rewards.append(metrics["reward"])
    if metrics["step"] % size(50, 2) == 0:
        validity[metrics["step"]] = letters_metrics(student, config, "validation", 1.0)["validity"]
        live.update(draw(rewards, validity), metadata=alt)

# %% [markdown]
# The last step's samples: what the teacher wrote for a prompt, and three of the student's eight attempts at it (✗: none
# of the sixteen ways).

# %%
from minigad.toy.letters import LettersTeacher

for sample in metrics["samples"][:3]:
    right = sample["student"] in LettersTeacher().valid(sample["prompt"])
    line = "{prompt}   teacher {teacher:12s} student {student:12s} score {score:+.2f}".format(**sample)
    print(line, "" if right else "✗")

# %% [markdown]
# ## What was gained, what was paid
#
# On held-out prompts, once more with both divergences. `modes` is how many of the right ways the student in effect
# uses: the exponential of their entropy. The teacher has 15.5 (where the letters come in order, two ways are one).

# %%
after = letters_metrics(student, config, "heldout", temperature=1.0)
lines = ["| | validity | modes | KL(G‖T) | KL(T‖G) |", "|---|---|---|---|---|"]
names = ("validity", "modes", "kl_student_teacher", "kl_teacher_student")
for method, result in (("SeqKD (the warm-up)", before), ("GAD", after)):
    lines.append(f"| {method} | " + " | ".join(f"{result[name]:.2f}" for name in names) + " |")
Markdown("\n".join(lines))

# %% [markdown]
# Expect about this: validity from 0.31 to 0.77, KL(G‖T) from 15.4 to 5.1 nats. But the student is left with 4.0 ways of
# sixteen instead of 8.5, and KL(T‖G) goes up from 2.4 to 4.6: the gain is partly **bought by dropping modes**. And more
# SeqKD is the cheaper rival: given the computing time of the benchmark's longer game, it reaches a validity of about 0.7
# with 11 modes (`benchmarks/toy_letters.py`; the game there 0.88 with 7). And this is one seed.

# %% [markdown]
# ## Recap
#
# 1. SeqKD lowers KL(T‖G): it covers, and it puts mass where the teacher has none.
# 2. The game lowers KL(G‖T) from samples alone: a discriminator ranks, the student climbs its score.
# 3. Quality and coverage trade against each other, so report both.

# %% [markdown]
# ## Exercise 1
#
# The student has become the teacher, and the discriminator can only give every text the same score. What is its
# Bradley-Terry loss, in nats? *Hint: `bradley_terry_loss` on equal scores, or think of* $\sigma(0)$. Replace the dots and
# run the cell: it says `right`, or stops at an `assert`.

# %%
loss_when_equal = ...

assert loss_when_equal is ... or abs(loss_when_equal - bradley_terry_loss(torch.zeros(1), torch.zeros(1, 4))) < 1e-3
print("not answered yet" if loss_when_equal is ... else "right")

# %% [markdown]
# ## Exercise 2
#
# Against a discriminator that stops learning when the game begins, will the student's width `sigma` end `"larger"` or
# `"smaller"` than the game's? Write down your prediction and why, then play the one-dimensional game that way for 1,200
# steps. *Hint: `play(..., frozen=True)` from the same `start`; take the last metrics, as `game` did.*

# %%
prediction = ...
frozen_game = ...

assert frozen_game is ... or frozen_game["step"] == 1200
assert frozen_game is ... or (prediction == "smaller") == (frozen_game["sigma"] < game["sigma"])
print("not answered yet" if frozen_game is ... else "right")
