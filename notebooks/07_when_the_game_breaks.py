# %% [markdown]
# # 07 · When the game breaks: frozen D, EOS leak, no warm-up, saturation, length
#
# **You will learn** to recognise five failures by their curves, each beside the healthy run, and what to do first.
#
# **You need** a CPU, and notebook 06. Nothing is downloaded. **It takes** about three minutes of computing.

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
import copy

import torch
from IPython.display import Markdown

from minigad.plots import plot_1d, plot_panels, show

torch.set_num_threads(1)  # models this small only lose time to a second thread

# %% [markdown]
# ## The healthy run
#
# The letters language, the student after imitation, the implicit judge of notebook 06 (a log-ratio). Every exhibit starts from
# copies of what warm-up left, and says what it changes. `validity`, the exact share of right text, is what no real run can
# plot; the question is always which curve you *can* see would have told you.

# %%
from minigad import PRESETS, Discriminator, GADConfig, Student, gad, warmup
from minigad.model import LanguageModel
from minigad.toy.letters import letters_dataset, letters_metrics, letters_tokenizer
from minigad.train import Metrics

healthy = PRESETS["toy"].replace(
    max_completion_length=16,
    warmup_epochs=size(25, 0.2),
    discriminator_sft_epochs=size(10, 0.2),
    discriminator_warmup_steps=int(size(10, 2)),
    max_steps=int(size(100, 2)),
)
data = letters_dataset(8000, seed=0)
warm = Student.load(healthy, tokenizer=letters_tokenizer())
judge = Discriminator.load(healthy, warm)
*_, last = warmup(warm, judge, data, healthy.replace(discriminator_warmup_steps=0))
reader = judge.language_model  # it has read the teacher's text, and compared nothing yet

# %%
healthy = healthy.replace(warmup_epochs=0, discriminator_sft_epochs=0)  # done: what follows starts from copies


def play(config: GADConfig, start: LanguageModel, judge: LanguageModel) -> list[Metrics]:
    """Play from copies; return the metrics of every tenth step, with the exact validity."""
    student = Student(copy.deepcopy(start.model), start.tokenizer)
    discriminator = Discriminator(LanguageModel(copy.deepcopy(judge.model), start.tokenizer), student, config)
    for _ in warmup(student, discriminator, data, config):
        pass
    history = []
    for metrics in gad(student, discriminator, data, config):
        if metrics["step"] == 1 or metrics["step"] % size(10, 2) == 0:
            exact = letters_metrics(student, config, "validation", 1.0, samples=1)
            history.append({**metrics, "validity": exact["validity"], "modes": exact["modes"]})
    return history


runs = {"healthy": play(healthy, warm, reader)}


# %%
def curves(names: list[str], metric: str) -> dict[str, tuple[list[int], list[float]]]:
    """Return a metric of some runs over the steps; the healthy run is drawn in the student's blue."""
    labels = {name: name.replace("healthy", "student, healthy") for name in names}
    return {labels[name]: ([m["step"] for m in runs[name]], [m[metric] for m in runs[name]]) for name in names}


CURVES = {"Reward": "reward", "Accuracy of the judge": "discriminator/accuracy", "Validity (the truth)": "validity"}
panels = {title: curves(["healthy"], metric) for title, metric in CURVES.items()}
alt = "The healthy run: the reward rises, the judge's accuracy stays below 1, validity rises."
show(plot_panels(panels, "step of the game"), alt)

# %% [markdown]
# **Healthy:** the reward climbs and then wanders, validity rises, the judge is right most of the time and not always. A log-ratio
# judge that has read the teacher's text *starts* high (0.95), and wanders down; not to 0.5, for this student cannot become its
# teacher. (Mind the scale of the middle panel. A group of 128 pairs is a noisy thing.)

# %% [markdown]
# ## Exhibit 1: the frozen judge
#
# Stop training the judge when the game begins. Its score is then a fixed reward,
#
# $$\max_G \; \mathbb{E}_{y \sim G}\big[D_{\text{frozen}}(y)\big]$$
#
# whose optimum is the single text with the highest score, $\arg\max_y D(y)$: no teacher in it any more. ($G$: the student.
# $D_{\text{frozen}}$: the judge as warm-up left it.) In one dimension:

# %%
from minigad.toy.one_dimension import play as play_1d
from minigad.toy.one_dimension import seqkd, student_probs, teacher_probs

start = seqkd(seed=0)
*_, online = play_1d(1200, seed=0, start=start)
*_, frozen = play_1d(1200, seed=0, start=start, frozen=True)

assert frozen["sigma"] < 1 < online["sigma"]
assert frozen["mass_on_modes"] > online["mass_on_modes"]  # by this number the collapsed student is the better one
assert frozen["kl_student_teacher"] > 2 * online["kl_student_teacher"]
students = {
    "before": student_probs(start),
    "online judge": online["student_probs"],
    "frozen judge": frozen["student_probs"],
}
alt = "With an online judge the student fills the larger mode; with a frozen one it is a spike inside it."
show(plot_1d(teacher_probs(), students), alt)

# %% [markdown]
# And in the letters language, with the published judge, a head on the last token. Same judge, same rates, once frozen
# and once learning on. (A head's scores and a log-ratio's are numbers of different kinds, so the reward of these two has a panel
# of its own, without the healthy run.)

# %%
published = healthy.replace(
    discriminator="sequence",
    discriminator_learning_rate=1e-3,
    discriminator_warmup_steps=int(size(100, 4)),
)
runs["frozen judge"] = play(published.replace(freeze_discriminator=True), warm, reader)
runs["the same, learning"] = play(published, warm, reader)

# %%
pair = ["frozen judge", "the same, learning"]
panels = {"Reward, of a head": curves(pair, "reward")}
panels |= {title: curves(["healthy", *pair], metric) for title, metric in list(CURVES.items())[1:]}
alt = (
    "Frozen: the reward creeps up, accuracy falls far below chance, validity to nothing. Learning: accuracy comes back."
)
show(plot_panels(panels, "step of the game"), alt)

# %%
ends = {name: history[-1] for name, history in runs.items()}
assert ends["frozen judge"]["validity"] < ends["healthy"]["validity"] + size(0, 1)  # a smoke run is too short to fail
samples = ends["frozen judge"]["samples"][:5]
print("frozen judge, last step, prompt", samples[0]["prompt"], "->", *[sample["student"] for sample in samples])

# %% [markdown]
# This student is ten times too fast for a head (notebook 06 takes a rate of $10^{-4}$), so even a judge that learns on lets it slip:
# two failures beside one healthy run. But it answers: its accuracy comes back, the reward falls, and validity stops falling at a
# third of what it was. The frozen one's ends at nothing.

# %% [markdown]
# **The sign:** the reward creeps up, and *the judge's accuracy goes below chance*: it prefers the student's text to the teacher's.
# The samples say the same at a glance, so read samples.
#
# **First:** let the judge learn; if it does, a faster judge or a slower student.

# %% [markdown]
# ## Exhibit 2: the end token leaks
#
# The teacher's file has no end tokens, and somebody forgot to add them. Everything else is right. Two fresh heads, trained alike,
# one of them on the file with the leak. Beside each step's accuracy: the score of the teacher's text as the file has it, less
# that of the *same* text with its end token.


# %%
def learn(judge: Discriminator, optimizer: torch.optim.Optimizer, step: int, finished: bool) -> tuple[float, float]:
    """Take a Bradley-Terry step on 16 pairs; return the accuracy and the score gap of identical text."""
    batch = data[step * 16 : step * 16 + 16]
    rollouts = warm.generate(batch["prompt"], published, seed=step)
    with judge.language_model.active(train=True):
        theirs = judge.score(judge.encode(batch["prompt"], batch["completion"], [finished] * 16))
        whole = judge.score(judge.encode(batch["prompt"], batch["completion"], [True] * 16)).scores.detach()
        ours = judge.score(judge.encode(batch["prompt"], rollouts.texts, rollouts.finished))
        judge.loss(theirs, ours).backward()
    optimizer.step()
    optimizer.zero_grad()
    return ((theirs.scores - ours.scores).sign().mean().item() + 1) / 2, (theirs.scores - whole).mean().item()


# %%
def train_judge(finished: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Train a fresh head; return accuracy and gap of each step."""
    judge = Discriminator(LanguageModel(copy.deepcopy(reader.model), reader.tokenizer), warm, published)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3)
    accuracy, gap = zip(*(learn(judge, optimizer, i, finished) for i in range(int(size(40, 12)))), strict=True)
    return accuracy, gap


# %%
right, leaky = train_judge(finished=True), train_judge(finished=False)
steps = list(range(1, len(right[0]) + 1))
panels = {
    title: {"discriminator, healthy": (steps, right[i]), "with the leak": (steps, leaky[i])}
    for i, title in enumerate(("Accuracy of the judge", "Score gap of identical text"))
}
alt = (
    "With the leak, accuracy is 1 from the second step, and the gap of identical text grows; without, about 0.5 and 0."
)
show(plot_panels(panels, "step of the judge"), alt)

assert max(map(abs, right[1])) < 1e-4 < 0.1 < leaky[1][-1]
assert sum(leaky[0][-5:]) > sum(right[0][-5:])
print(f"identical text, last step: gap {right[1][-1]:+.3f} without, {leaky[1][-1]:+.2f} with the leak")

# %% [markdown]
# **The sign:** accuracy 1 within a few steps, and it stays. No head learns a language that fast; the healthy one is at chance
# after forty. **The proof:** identical text must have identical scores; minigad logs `discriminator/identical_text_gap` whenever
# a student happens to write the teacher's text.
#
# **First:** send both sides through one encoder (notebook 01). Other leaks: a template, a space in front, a cut length.

# %% [markdown]
# ## Exhibit 3: a judge that has not read
#
# Skip all of the judge's warm-up: its language model has random weights on the game's first day.

# %%
stranger = Discriminator.load(healthy, warm).language_model  # random weights
runs["no D warm-up"] = play(healthy.replace(discriminator_warmup_steps=0), warm, stranger)
alt = "Without warm-up of the judge: score follows length, accuracy starts at chance, validity falls to zero and stays."
panels = {"Correlation of length and score": "discriminator/length_corr"} | dict(list(CURVES.items())[1:])
lines = {title: curves(["healthy", "no D warm-up"], metric) for title, metric in panels.items()}
show(plot_panels(lines, "step of the game"), alt)
ends["no D warm-up"] = runs["no D warm-up"][-1]

assert ends["no D warm-up"]["validity"] < ends["healthy"]["validity"] + size(0, 1)

# %% [markdown]
# To a model that knows nothing every token costs the same, so the shortest text wins (the correlation starts near -1), and the
# student learns that before the judge has learnt to read. When it has, its accuracy is 1, and it is too late: all of the student's
# text is short and wrong. The paper, more mildly: without D warm-up GAD ends *below* SeqKD (49.0 against 49.2, Table 3).

# %% [markdown]
# **The sign:** accuracy at or below chance while length already moves (exhibit 5). **First:** warm up the judge until it beats
# chance on held-out prompts.

# %% [markdown]
# ## Exhibit 4: saturation
#
# The other extreme: a student without warm-up, and a judge for whom it is no match. A pair pulls at the judge's scores with
# (notebook 03)
#
# $$1 - \sigma(m), \qquad m = D(y_t) - D(y_s)$$
#
# $m$: the margin, the score $D$ of the teacher's completion $y_t$ less that of the student's, $y_s$. $\sigma$: the logistic
# function. What is left of the pull, by margin:

# %%
margins = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64, requires_grad=True)
(pull,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(margins).sum(), margins)

assert torch.allclose(-pull, 1 - torch.sigmoid(margins))
print("  ".join(f"margin {m:.0f}: {p:.4f}" for m, p in zip(margins.tolist(), (-pull).tolist(), strict=True)))

# %%
beginner = Student.load(healthy, tokenizer=letters_tokenizer())
slow = published.replace(learning_rate=1e-4, discriminator_warmup_steps=int(size(30, 12)))
runs["no student warm-up"] = play(slow, beginner, reader)

# %%
panels = {"Accuracy of the judge": "discriminator/accuracy", "Margin": "discriminator/margin"}
panels |= {"Judge's gradient": "discriminator/grad_norm", "Validity": "validity"}
lines = {title: curves(["healthy", "no student warm-up"], metric) for title, metric in panels.items()}
alt = "Without student warm-up: the judge is always right, the margin grows, its gradient and validity stay near zero."
show(plot_panels(lines, "step of the game"), alt)

assert runs["no student warm-up"][-1]["discriminator/accuracy"] > 0.8
print("a beginner writes:", *[repr(sample["student"]) for sample in runs["no student warm-up"][-1]["samples"][:4]])

# %% [markdown]
# **The sign:** accuracy 1, a margin that grows (compare its course, not its level: the healthy judge is a log-ratio, this one a
# head), `discriminator/grad_norm` near 0, and nothing happens. The advantages are still of full size, they are made so: they rank
# gibberish. **First:** more warm-up of the student; then a smaller judge's rate. With the implicit judge on long texts,
# `discriminator_scale` of about one over the length.

# %% [markdown]
# ## Exhibit 5: length
#
# Length is the cheapest thing to learn, for both players. Look at it in all exhibits at once; the teacher's mean is known.

# %%
teacher_length = sum(len(text) + 1 for text in data["completion"]) / len(data)  # + 1: the end token
lengths = curves(["healthy", "frozen judge", "no D warm-up"], "completions/mean_length")
lengths["teacher"] = ([1, healthy.max_steps], [teacher_length] * 2)
alt = "Mean length: healthy settles two tokens below the teacher's; frozen judge: longer; no D warm-up: three tokens."
show(plot_panels({"Mean length of completions (tokens)": lengths}, "step of the game"), alt)
commas = {name: sum("," in sample["student"] for sample in runs[name][-1]["samples"]) for name in runs}
drawn = len(runs["healthy"][-1]["samples"])
print(
    f"the teacher's mean: {teacher_length:.1f} tokens; healthy, last step: {commas['healthy']} of {drawn} with commas"
)

# %% [markdown]
# The frozen judge's student gets longer, the unread judge's ends at three tokens. The healthy one drifts too, and settles two tokens
# below the teacher's mean: which ways it drops decides where (half of the teacher's texts have commas; of these eight, none). The
# paper's students are 11 to 36% longer than before training, and LLM judges like length. So: report length beside every score.

# %% [markdown]
# **Worry when** `discriminator/length_corr` stays beyond ±0.3 for many steps (a port's alarm; single steps here exceed it in
# health too), or the mean length goes on moving away from the teacher's. That it settles elsewhere is a question, not an alarm.

# %% [markdown]
# ## One seed of five
#
# Failures are often a matter of the seed. Validity at the end of the benchmark's games (four times as long as these); look along
# `frozen-implicit`, the implicit judge, frozen:

# %%
import json
from pathlib import Path

record = json.loads(Path("../benchmarks/results/toy_letters.json").read_text())


def by_seed(method: str) -> list[float]:
    """Validity at temperature 1, a value a seed."""
    rows = [r["metrics"] for r in record["rows"] if r["method"] == method]
    return [m["validity"] for m in rows if m["temperature"] == 1.0]


lines = ["| method | " + " | ".join(f"seed {i}" for i in range(5)) + " |", "|---" * 6 + "|"]
for method in ("seqkd", "gad-implicit", "frozen-implicit", "frozen-sequence"):
    lines.append(f"| {method} | " + " | ".join(f"{value:.2f}" for value in by_seed(method)) + " |")

assert min(by_seed("frozen-implicit")) < 0.1 < 0.8 < min(by_seed("gad-implicit"))
Markdown("\n".join(lines))

# %% [markdown]
# Four times it equals the game, and once nothing is left. One seed would have told either story.

# %% [markdown]
# ## All curves, as bands
#
# What each curve did, lowest to highest, over the steps that were kept. The [glossary](README.md) is made of the first column.
# Scores, margins and rewards of a head and of a log-ratio do not compare.

# %%
names = ["reward", "reward_std", "frac_reward_zero_std", "discriminator/accuracy", "discriminator/margin", "entropy"]
names += [
    "discriminator/loss",
    "discriminator/grad_norm",
    "discriminator/length_corr",
    "grad_norm",
    "completions/mean_length",
]


def band(history: list[Metrics], name: str) -> str:
    """Lowest to highest of a metric; a frozen judge has no gradient."""
    values = [metrics[name] for metrics in history if name in metrics]
    return f"{min(values):.2f} to {max(values):.2f}" if values else "none"


lines = ["| | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
lines += [f"| {name} | " + " | ".join(band(history, name) for history in runs.values()) + " |" for name in names]
Markdown("\n".join(lines))

# %% [markdown]
# ## Recap
#
# 1. A rising reward is no evidence: in exhibit 1 it rose while the student died.
# 2. The judge's accuracy has two bad ends: at 1 and staying there (leak, saturation), and below chance (frozen, unread).
# 3. Watch length, identical text, held-out accuracy, and read samples.

# %% [markdown]
# ## Exercise 1
#
# At a margin of 6, which share of a pair's pull at margin 0 is left? Replace the dots and run the cell: it says `right`, or stops
# at an `assert`.

# %%
share_left = ...

assert share_left is ... or abs(share_left - 0.00495) < 1e-4
print("not answered yet" if share_left is ... else "right")

# %% [markdown]
# ## Exercise 2
#
# Step 4 of a run: accuracy 0.98, margin 9, `identical_text_gap` 6.1, length like the teacher's. Which exhibit is it, 1 to 5?
# And step 300 of another: reward up since step 50, accuracy 0.31, length growing?

# %%
first_run, second_run = ..., ...

assert first_run is ... or first_run == 2
assert second_run is ... or second_run == 1
print("not answered yet" if first_run is ... or second_run is ... else "right")
