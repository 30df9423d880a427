# %% [markdown]
# # 06 · The game: mode-covering against mode-seeking, then the toy language
#
# **You will learn** how the two players move each other, why the game trades coverage for quality, and what that was worth
# where every probability is known, measured against the controls that cost nothing.
#
# **You need** a CPU, and notebooks 02 to 05. Nothing is downloaded. **It takes** about two minutes of computing.

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

from minigad.plots import plot_1d, plot_frontier, plot_panels, show

torch.set_num_threads(1)  # models this small only lose time to a second thread

# %%
# The toy group: the same in notebooks 03 to 06.
prompt = "cab"
teacher_completion = "a,b,c."
student_completions = ["cb,a.", "bca.", "c,b,a.", "abc!"]
teacher_scores = torch.tensor([1.2])  # (B,): one prompt
student_scores = torch.tensor([[0.3, -0.5, 1.9, 0.8]])  # (B, N): four completions of it

# %% [markdown]
# ## A whole step, by hand
#
# Notebook 03 made the judge's loss, 04 the advantage, 05 the student's. A step of the game uses each once (arXiv 2511.10643, Eq 1):
#
# $$\max_G \min_D \; \mathbb{E}\left[-\log \sigma\big(D(y_t) - D(y_s)\big)\right]$$
#
# $G$: the student. $D$: the discriminator, the judge. $y_t$, $y_s$: a completion by teacher, by student. $\sigma$: the logistic
# function. $\mathbb{E}$: the mean over samples. Order: the *old* $D$ scores, then $D$ learns, then the student.

# %% [markdown]
# In the world of 60 categories there is one prompt, so that the 64 samples of a step are one group, and each of the teacher's
# samples meets all 64 of the student's. The student is two numbers (centre, log of the width), the judge a table of 60 scores.
# The advantage is the reward less the group's mean; no division by the std, which only rescales. Fifty steps:

# %%
from minigad.losses import bradley_terry_loss
from minigad.toy.one_dimension import play, seqkd, student_probs, teacher_probs

teacher, start = teacher_probs(), seqkd(seed=0)
generator = torch.Generator().manual_seed(0)
student, judge = start.clone().requires_grad_(), torch.zeros(60, dtype=torch.float64, requires_grad=True)
optimizers = torch.optim.Adam([judge], lr=0.1), torch.optim.Adam([student], lr=0.01)
for _ in range(50):
    y_t = torch.multinomial(teacher, 64, True, generator=generator)
    y_s = torch.multinomial(student_probs(student.detach()), 64, True, generator=generator)
    rewards = judge.detach()[y_s]  # the D of before its update
    loss_d = bradley_terry_loss(judge[y_t], judge[y_s].expand(64, 64))
    loss_g = -((rewards - rewards.mean()) * student_probs(student).log()[y_s]).mean()
    for optimizer, loss in zip(optimizers, (loss_d, loss_g), strict=True):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# %%
# The package's game, with what it adds to the loop above switched off: a warm-up of the judge, a student's rate that decays.
*_, theirs = play(50, seed=0, start=start, warmup_steps=0, final_fraction=1.0)
assert abs(student[0].item() - theirs["mu"]) < 1e-6
assert torch.allclose(judge.detach(), theirs["scores"])
print(f"after 50 steps, mine and minigad's: centre {student[0]:.3f}, width {student[1].exp():.3f}")

# %% [markdown]
# ## Where it goes
#
# With a perfect judge, $D^* = \log p_T - \log p_G + c$ (notebook 03), the student climbs
#
# $$\mathbb{E}_{y \sim G}[D^*(y)] = -\mathrm{KL}(G \| T) + c$$
#
# $p_T$, $p_G$: the probability of $y$ under teacher and student. $c$: a constant. $\mathrm{KL}(G \| T)$: the price of saying what
# the teacher would not. ($D^*$ holds $p_G$ and still counts as a constant in the student's step: the mean of
# $\nabla \log p_G$ over the student's own samples is zero.) So the game should end where exact descent of that KL does, `oracle`.

# %%
from minigad.toy.one_dimension import oracle, student_metrics

history = list(play(int(size(2500, 1200)), seed=0, start=start))
game = history[-1]
ends = {"SeqKD": student_metrics(start), "GAD": game, "oracle": student_metrics(oracle(start))}

assert abs(game["kl_student_teacher"] - ends["oracle"]["kl_student_teacher"]) < 0.05
names = ("mu", "sigma", "kl_student_teacher", "kl_teacher_student", "mass_on_modes")
lines = ["| | centre | width | KL(G‖T) | KL(T‖G) | mass on modes |", "|---|---|---|---|---|---|"]
for method, end in ends.items():
    lines.append(f"| {method} | " + " | ".join(f"{end[name]:.2f}" for name in names) + " |")
Markdown("\n".join(lines))

# %%
exact = student_probs(oracle(start))
densities = {"SeqKD": student_probs(start), "GAD": game["student_probs"], "oracle": exact}
alt = "Teacher: two modes. SeqKD: one wide bell over both. GAD and the oracle, one on the other, on the larger mode."
show(plot_1d(teacher, densities), alt)

# %%
steps = [metrics["step"] for metrics in history]


def curve(name: str) -> tuple[list[int], list[float]]:
    """A metric over the steps, every tenth."""
    return steps[::10], [metrics[name] for metrics in history[::10]]


panels = {
    "Divergence (nats)": {"KL(G‖T)": curve("kl_student_teacher"), "KL(T‖G)": curve("kl_teacher_student")},
    "Width of the student": {"student": curve("sigma")},
    "Accuracy of the judge": {"discriminator": curve("discriminator/accuracy"), "chance": ([0, steps[-1]], [0.5, 0.5])},
}
alt = "KL(G,T) falls, KL(T,G) rises; the width falls to the mode's; the judge's accuracy falls, and stays above chance."
show(plot_panels(panels, "step"), alt)

# %% [markdown]
# Three things to keep. The judge's accuracy falls and then wanders above chance: one bell can never be two, and the judge
# moves too, so accuracy does not say how good the student is. The width settles at the mode's and not below: a judge that goes
# on learning punishes a student that is too narrow. (The waves are the two chasing each other.) And KL(T‖G) went *up*: one way of
# the teacher is gone. That is *mode seeking*.

# %% [markdown]
# ## Twenty seeds
#
# One run is an anecdote. The table is made from the benchmark's results, which lie beside the notebooks. `gad-sequence` is the run
# above (*sequence*: one score a completion), and below it one change a row: the judge frozen; the student's rate constant, not
# decaying to a tenth; then also a judge at a fifth of its rate; then also a student three times as fast. `kl_student_teacher` is
# KL(G‖T), `sigma` the width.

# %%
import json
from pathlib import Path
from statistics import fmean, stdev

RESULTS = Path("../benchmarks/results")


def table(name: str, methods: list[str], metrics: list[str], where: dict[str, float]) -> str:
    """Make a table from a results file: mean ± standard deviation over seeds."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    lines = ["| method | seeds | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 2) + "|"]
    for method in methods:
        rows = [r["metrics"] for r in record["rows"] if r["method"] == method]
        rows = [row for row in rows if all(row[key] == value for key, value in where.items())]
        cells = [f"{fmean(r[m] for r in rows):.2f} ± {stdev(r[m] for r in rows):.2f}" for m in metrics]
        lines.append(f"| {method} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"`{record['command'].split(' --')[0]}`, {record['machine']}"])


methods = [
    "seqkd",
    "oracle",
    "gad-sequence",
    "frozen-sequence",
    "gad-sequence-constant-rate",
    "gad-sequence-slow-discriminator",
    "gad-sequence-fast-student",
]
Markdown(table("toy_1d", methods, ["kl_student_teacher", "kl_teacher_student", "sigma", "mass_on_modes"], {}))

# %% [markdown]
# In all seeds the game ends at the oracle. A judge ten times faster than the student, and a student's rate that decays, keep it
# there: look at the spreads of the last three rows.
#
# `frozen-sequence`: its student ends as a point on the score's highest category, with *all* its mass on the modes. A single
# number would call it the winner. (Its story is in notebook 07.)

# %% [markdown]
# ## The toy language: two kinds of judge
#
# Now text: a Llama of 11 thousand weights as student, a larger one as judge; both first imitate (notebook 02). GAD *as published*
# puts a linear head on the judge's last hidden state. The *implicit* judge's score is a log-ratio:
#
# $$D(x, y) = \log p_\phi(y \mid x) - \log p_G(y \mid x)$$
#
# $x$: the prompt. $p_\phi$: the judge's language model, weights $\phi$, trained by Bradley-Terry. $p_G$: the student. This has the
# *form* of the optimum $D^*$ from the start, and pays every token its own log-ratio (dense rewards, notebook 04).

# %%
import copy

from minigad import PRESETS, Discriminator, GADConfig, Student, gad, warmup
from minigad.model import LanguageModel
from minigad.toy.letters import LettersTeacher, letters_dataset, letters_metrics, letters_tokenizer

config = PRESETS["toy"].replace(
    max_completion_length=16,
    warmup_epochs=size(25, 0.2),
    discriminator_sft_epochs=size(10, 0.2),
    max_steps=int(size(150, 3)),
)
data = letters_dataset(8000, seed=0)
warm = Student.load(config, tokenizer=letters_tokenizer())
surrogate = Discriminator.load(config, warm)  # its language model stands in for the teacher
*_, last = warmup(warm, surrogate, data, config.replace(discriminator_warmup_steps=0))
print(f"the judge's language model has read the teacher's text: {last['loss']:.2f} nats a token")


# %%
def play_letters(config: GADConfig) -> tuple[Student, Discriminator]:
    """Play from copies of the warmed-up student and of the language model that read the teacher's text."""
    student = Student(copy.deepcopy(warm.model), warm.tokenizer)
    model = LanguageModel(copy.deepcopy(surrogate.language_model.model), warm.tokenizer)
    discriminator = Discriminator(model, student, config)
    for _ in warmup(student, discriminator, data, config.replace(warmup_epochs=0, discriminator_sft_epochs=0)):
        pass
    for _ in gad(student, discriminator, data, config):
        pass
    return student, discriminator


# %%
published = config.replace(
    discriminator="sequence",
    learning_rate=1e-4,  # a head learns more slowly than a log-ratio: a slower student, a faster judge
    discriminator_learning_rate=1e-3,
    discriminator_warmup_steps=int(size(100, 3)),
)
students = {"SeqKD, the warm-up": warm, "GAD, as published": play_letters(published)[0]}
students["GAD, implicit"], discriminator = play_letters(config)

# %%
lines = ["| one seed, held-out prompts, T = 1 | validity | modes | KL(G‖T) | KL(T‖G) |", "|---|---|---|---|---|"]
names = ("validity", "modes", "kl_student_teacher", "kl_teacher_student")
measured = {method: letters_metrics(one, config, "heldout", 1.0) for method, one in students.items()}
for method, result in measured.items():
    lines.append(f"| {method} | " + " | ".join(f"{result[name]:.2f}" for name in names) + " |")

assert measured["GAD, implicit"]["teacher_logprob"] > measured["SeqKD, the warm-up"]["teacher_logprob"]
Markdown("\n".join(lines))

# %% [markdown]
# **Expect** about these numbers: GAD as published stays where the warm-up left it; the implicit judge's student is right more than
# twice as often, in half as many ways, and its KL(T‖G) doubles. `modes`: how many of the right ways it uses, in effect.

# %% [markdown]
# ## The toy group, judged by a log-ratio
#
# Two language models and a subtraction: by hand (checked against the package's), beside the truth that only we know,
# $\log p_T - \log p_G$, where $G$ is the student after the game.

# %%
from minigad.chat import encode

player = discriminator.student
texts = [teacher_completion, *student_completions]
rows = [encode(player.tokenizer, prompt, text) for text in texts]
own = player.logprobs_of(rows).sum(1)
mine = discriminator.language_model.logprobs_of(rows).sum(1) - own
with torch.no_grad(), discriminator.language_model.active(train=False):
    assert torch.allclose(mine, discriminator.score(rows).scores, atol=1e-3)

lines = ["| completion | frozen toy score | implicit judge | truth |", "|---|---|---|---|"]
frozen = [*teacher_scores.tolist(), *student_scores[0].tolist()]
for text, made_up, score, log_p in zip(texts, frozen, mine, own, strict=True):
    truth = LettersTeacher().logprob(prompt, text) - log_p.item()
    lines.append(f"| `{text}` | {made_up:+.1f} | {score:+.2f} | {truth:+.2f} |")
Markdown("\n".join(lines))

# %% [markdown]
# The judge is near the truth on four. It is far too kind to `bca.`, which is wrong. `cb,a.` is wrong too, and yet high on both: a
# thousandth of the teacher's text is noise, and this student says it even more rarely. A log-ratio asks who says it *more*, not
# whether it is right. And `c,b,a.` at +15 is a mode that was dropped: the judge would pay for it, but the student no longer
# samples it, so nothing is ever paid.

# %% [markdown]
# ## The honest result
#
# Five seeds, longer runs, and the controls: more SeqKD for the computing time of the games (`seqkd-equal-cpu`), DPO on teacher
# text against one sample of the student each (`soda`), a judge that stops learning (`frozen-...`), a log-ratio judge of the
# student's own size (`-small`), a head at every token (`gad-prefix`, notebook 04), and a cheat: SeqKD that is told to learn only
# two of the four orders.

# %%
methods = ["seqkd", "seqkd-equal-cpu", "soda", "gad-sequence", "gad-prefix", "gad-implicit"]
methods += ["gad-implicit-small", "frozen-sequence", "frozen-implicit", "seqkd-cheating"]
columns = ["validity", "modes", "kl_student_teacher", "kl_teacher_student"]
Markdown(table("toy_letters", methods, columns, {"temperature": 1.0}))

# %%
rows = json.loads((RESULTS / "toy_letters.json").read_text())["rows"]


def mean(method: str, metric: str, temperature: float = 1.0) -> float:
    """Average a metric over the seeds."""
    found = [r["metrics"] for r in rows if r["method"] == method]
    return fmean(m[metric] for m in found if m["temperature"] == temperature)


assert mean("gad-sequence", "validity") < mean("seqkd-equal-cpu", "validity")
assert mean("seqkd-equal-cpu", "validity") < mean("gad-implicit", "validity") < mean("seqkd-cheating", "validity")
assert mean("gad-implicit", "modes") < mean("seqkd-cheating", "modes") < mean("seqkd-equal-cpu", "modes")

# %% [markdown]
# Those three asserts are the result; in words: **GAD as published** stays where its warm-up was, and loses clearly to more epochs
# of SeqKD. **The implicit judge**'s student is the most often right of all that see the whole teacher, and pays with modes. **The
# cheat** is right more often *and* keeps more modes: dropping half is cheap if somebody says which half. Its KL(T‖G) of 24 tells on
# it, and validity and modes do not.

# %% [markdown]
# ## Never one number
#
# Every student can be sampled colder, for free. So a method is not a point but a curve of temperatures, and a fair question is
# which curve lies higher at the same number of modes. (Means of five seeds. `gad-prefix` would lie on `gad-sequence`.)

# %%
shown = ("seqkd-equal-cpu", "gad-implicit", "frozen-implicit", "gad-sequence")
temperatures = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
curves = {name: [(mean(name, "modes", t), mean(name, "validity", t), t) for t in temperatures] for name in shown}
alt = (
    "Validity against modes, a curve a method: the implicit judge top left, SeqKD right of it, GAD as published below."
)
show(plot_frontier(curves, "valid strings in use (of 15.5)", "validity"), alt)

# %% [markdown]
# The curves cross. As long as half of the teacher's ways are enough, the implicit judge's student is ahead; for more of them,
# SeqKD is. This picture does **not** show one above the other.

# %% [markdown]
# ## Why
#
# - **A judge from scratch cannot verify.** Telling `bca` from `abc` needs a model of the language. The log-ratio has one on its
#   first day; a head on the last token must find it in one bit a pair.
# - **Much of the gain is the judge's larger language model.** With one of the student's size (`gad-implicit-small`) there is none.
# - **Online updates are insurance.** `frozen-implicit` ties in four seeds and is exploited in one: look at its spread.

# %% [markdown]
# On real text with no gap between teacher and student (SmolLM2, three seeds, `benchmarks/smollm2.py`) sixteen steps of either
# game gave no more than a lower sampling temperature gives for nothing. Its chance is a student too small to copy: not measured.

# %% [markdown]
# ## Recap
#
# 1. One step: the old judge scores, the judge learns, the student climbs.
# 2. The game lowers KL(G‖T) from samples alone, and lets modes go.
# 3. Report quality *and* coverage, over temperatures, beside SeqKD of equal cost.

# %% [markdown]
# ## Exercise 1
#
# A text has probability 0.2 under the teacher and 0.05 under the student. What is its optimal score, in nats, up to the
# constant of the prompt? Replace the dots and run the cell: it says `right`, or stops at an `assert`.

# %%
optimal_score = ...

assert optimal_score is ... or abs(optimal_score - 1.3863) < 1e-2
print("not answered yet" if optimal_score is ... else "right")

# %% [markdown]
# ## Exercise 2
#
# The game finds *a* mode, not the best. Choose a start, `torch.tensor([mu, log_sigma], dtype=torch.float64)`, from which it ends
# on the smaller mode at 40, `play` 1,200 steps from it, and give the last step's metrics. *Hint: start near, and narrow; take the
# last, as `game` did.*

# %%
other_game = ...

assert other_game is ... or other_game["step"] == 1200
assert other_game is ... or abs(other_game["mu"] - 40) < 2
print("not answered yet" if other_game is ... else "right")
