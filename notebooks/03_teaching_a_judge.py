# %% [markdown]
# # 03 · Teaching a judge: Bradley-Terry by hand
#
# **You will learn** how a discriminator (the judge, for short) learns to rank the teacher's text above the student's, what it
# knows when it is done, and the two questions that expose a false one.
#
# **You need** a CPU, and notebook 02. Nothing is downloaded. **It takes** about one minute of computing.

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

from minigad.plots import plot_histogram, plot_panels, show

torch.set_num_threads(1)  # models this small only lose time to a second thread

# %% [markdown]
# ## The toy group
#
# Four numbers are easier to follow than four thousand. One prompt of the letters language, one teacher completion, four
# student completions, and a made-up score for each stay with us to notebook 06. The teacher writes a prompt's letters as
# given, reversed, ascending or descending, with or without commas, and ends with `.` or `!`. Which two of the four are right?

# %%
# The toy group: the same in notebooks 03 to 06.
prompt = "cab"
teacher_completion = "a,b,c."
student_completions = ["cb,a.", "bca.", "c,b,a.", "abc!"]
teacher_scores = torch.tensor([1.2])  # (B,): one prompt
student_scores = torch.tensor([[0.3, -0.5, 1.9, 0.8]])  # (B, N): four completions of it

# %%
from minigad.toy.letters import LettersTeacher

teacher = LettersTeacher()
for text, score in zip(student_completions, student_scores[0].tolist(), strict=True):
    print(f"{text:7s} score {score:+.1f}   right: {text in teacher.valid(prompt)}")

# %% [markdown]
# ## Who wins a match?
#
# Bradley and Terry (1952) give every player one number, and only differences of numbers matter:
#
# $$P(y_t \text{ beats } y_s) = \sigma\big(D(y_t) - D(y_s)\big)$$
#
# $D(y)$: the score of a text. $y_t$, $y_s$: a completion by teacher, by student. $\sigma(m) = 1/(1+e^{-m})$: the logistic
# function of the margin $m$. The loss is $-\log P$, averaged over the pairs (arXiv 2511.10643, Eq 3).

# %%
from minigad.losses import bradley_terry_loss

margins = teacher_scores.unsqueeze(1) - student_scores
win = torch.sigmoid(margins)
loss = -win.log().mean()

assert torch.allclose(loss, bradley_terry_loss(teacher_scores, student_scores))
print("margin ", [f"{m:+.1f}" for m in margins[0].tolist()])
print("P(win) ", [f"{p:.2f}" for p in win[0].tolist()])
print(f"loss {loss:.3f} nats a pair")

# %% [markdown]
# ## What one pair teaches
#
# The gradient of one pair is its surprise:
#
# $$\frac{\partial}{\partial D(y_s)}\big(-\log \sigma(m)\big) = 1 - \sigma(m), \qquad m = D(y_t) - D(y_s)$$
#
# It is the probability that the judge gave to the wrong winner. A step of descent lowers $D(y_s)$ by it and raises $D(y_t)$ by
# as much. A pair ranked right by a wide margin teaches next to nothing; the third pair, where the student was ranked *above*
# the teacher, pulls hardest.

# %%
t, s = teacher_scores.clone().requires_grad_(), student_scores.clone().requires_grad_()
bradley_terry_loss(t, s).backward()
surprise = (1 - win) / 4  # the mean over four pairs

assert torch.allclose(s.grad, surprise)
assert torch.allclose(t.grad, -surprise.sum(1))
print("gradient: students", [f"{g:+.3f}" for g in s.grad[0].tolist()], f"teacher {t.grad.item():+.3f}")

# %% [markdown]
# Add 100 to every score, and nothing changes: a score has no zero, no unit, and means nothing across prompts. When the
# student's reward wanders up or down in a real run, that alone is no news.

# %%
assert torch.allclose(bradley_terry_loss(teacher_scores + 100, student_scores + 100), loss)

# %% [markdown]
# ## What a perfect judge knows
#
# Train without limit, and Bradley-Terry has one optimum:
#
# $$D^*(x, y) = \log p_T(y \mid x) - \log p_G(y \mid x) + c(x)$$
#
# $p_T$, $p_G$: the probability of text $y$ under teacher and student. $x$: the prompt. $c$: any constant of the prompt. Why: of
# texts $i$ and $j$, the odds that $i$ is the teacher's are $p_T(i)\,p_G(j) : p_T(j)\,p_G(i)$, and $D(i) - D(j)$ fits their
# logarithm. So the score is what an API hides, the teacher's log-probability, less our own. Sixty categories and a table of
# scores show it.

# %%
from minigad.toy.one_dimension import seqkd, student_probs, teacher_probs

p_teacher, p_student = teacher_probs(), student_probs(seqkd(seed=0, steps=int(size(2500, 300))))
table = torch.zeros(60, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.Adam([table], lr=0.1)
pairs = p_teacher.unsqueeze(1) * p_student  # (60, 60): how often teacher's i meets student's j
for _ in range(1500):
    optimizer.zero_grad()
    margin = table.unsqueeze(1) - table  # (60, 60): of teacher's i over student's j
    (-pairs * torch.nn.functional.logsigmoid(margin)).sum().backward()
    optimizer.step()

# %%
log_ratio = (p_teacher / p_student).log()
learned = table.detach() - (p_teacher * (table.detach() - log_ratio)).sum()  # the constant is free: take it off
error = (learned - log_ratio).abs().max()

assert error < 0.1, error
x = list(range(60))
lines = {"log p_T - log p_G": (x, log_ratio.tolist()), "discriminator": (x, learned.tolist())}
masses = {"teacher": (x, p_teacher.tolist()), "student": (x, p_student.tolist())}
figure = plot_panels({"Score, nats": lines, "Probability": masses}, "category")
figure.axes[0].get_lines()[1].set(linestyle="none", marker="o", markersize=3)
figure.axes[0].legend(frameon=False, fontsize="small")
alt = "Left: the learned scores lie on the curve of the log-ratio. Right: teacher with two modes, student with one."
show(figure, alt)
print(f"largest error {error:.0e} nats, of a range of {log_ratio.max() - log_ratio.min():.1f}")

# %% [markdown]
# The score is high where the student says too little (on the modes) and lowest where it says too much (in the gap, at 32). A
# student that climbs it moves mass from the second to the first. That is all of GAD; notebook 06 plays it.

# %% [markdown]
# ## A judge of text
#
# Now a network, as in the paper: a language model (here a Llama of two layers that has first been trained on the teacher's
# text) and a linear head that reads the score off its last hidden state. The student is warmed up by imitation. We ask about
# prompts that the judge never trained on; 0.5 is chance. (A tie counts half, so the untrained head, all zeros, has 0.5 exactly.)

# %%
from minigad import PRESETS, Discriminator, Student, warmup
from minigad.toy.letters import letters_dataset, letters_tokenizer

config = PRESETS["toy"].replace(
    discriminator="sequence",  # one score a text; notebook 00 played with another kind
    max_completion_length=16,
    warmup_epochs=size(10, 0.2),
    discriminator_sft_epochs=size(10, 0.2),
    discriminator_warmup_steps=int(size(120, 12)),
    discriminator_learning_rate=1e-3,
)
data, heldout = letters_dataset(8000, seed=0), letters_dataset(256, seed=1, split="heldout")
student = Student.load(config, tokenizer=letters_tokenizer())
discriminator = Discriminator.load(config, student)


# %%
def judge(prompts: list[str], texts: list[str], finished: list[bool]) -> torch.Tensor:
    """Score texts, whoever wrote them: one function for both sides."""
    rows = discriminator.encode(prompts, texts, finished)
    with torch.no_grad(), discriminator.language_model.active(train=False):
        return discriminator.score(rows).scores


def heldout_scores() -> tuple[torch.Tensor, torch.Tensor]:
    """Score the teacher's and the student's completions of the held-out prompts."""
    prompts = list(heldout["prompt"])
    rollouts = student.generate(prompts, config, seed=0)
    theirs = judge(prompts, list(heldout["completion"]), [True] * len(prompts))
    return theirs, judge(prompts, rollouts.texts, rollouts.finished)


# %%
steps, training, unseen = [], [], []
for metrics in warmup(student, discriminator, data, config):
    if metrics["phase"] == "discriminator_warmup" and metrics["step"] % size(12, 4) == 0:
        theirs, ours = heldout_scores()
        steps.append(metrics["step"])
        training.append(metrics["discriminator/accuracy"])
        unseen.append(((theirs - ours).sign().mean().item() + 1) / 2)

assert unseen[-1] > 0.5, "a judge that is not above chance on held-out prompts has nothing to teach"
print(f"held-out accuracy {unseen[-1]:.2f}")

# %%
accuracy = {
    "discriminator, training (one batch)": (steps, training),
    "held out": (steps, unseen),
    "chance": ([0, steps[-1]], [0.5, 0.5]),
}
alt = "Share of pairs ranked right over the judge's steps: training and held-out prompts rise together from chance."
show(plot_panels({"Share of pairs ranked right": accuracy}, "step of the discriminator"), alt)

# %%
theirs, ours = heldout_scores()
alt = "Histograms of the scores of teacher and student completions; they overlap and the teacher's mean is higher."
both = {"teacher": theirs.tolist(), "student": ours.tolist()}
show(plot_histogram(both, "score, held-out prompts (dashed: the means)"), alt)
print(f"margin, prompt by prompt: mean {(theirs - ours).mean():+.2f}, above 0 in {(theirs > ours).float().mean():.0%}")

# %% [markdown]
# **Expect** a held-out accuracy of about 0.7, overlapping histograms, and a teacher's mean that is higher. (The histograms mix
# prompts, each with its own zero; the accuracy compares within a prompt.) Overlap is what a game needs: a judge that is always
# right by far no longer says which student text is *less* wrong. A new head above 0.95 at once: look for a leak first.

# %% [markdown]
# ## The cheapest leak: the end token
#
# If teacher text comes without the token that ends a completion, and student text with it, the judge needs to read
# nothing else. A third-party port of GAD scored *identical text* +7.0 as the teacher's and -7.9 as the student's. So all text
# goes through one encoder, and one probe goes with every run: the same words, once from each side.

# %%
same = judge([prompt, prompt], [teacher_completion, teacher_completion], [True, True])
leaky = judge([prompt, prompt], [teacher_completion, teacher_completion], [False, True])

assert torch.allclose(same[0], same[1], atol=1e-5)
assert not torch.allclose(leaky[0], leaky[1], atol=1e-3)
print(f"identical text: gap {same[0] - same[1]:+.3f};  without its end token: gap {leaky[0] - leaky[1]:+.3f}")

# %% [markdown]
# A gap of exactly zero is what we want, and any other says: two encoders. This judge never met the leak, so it hardly minds a
# missing end token. One that trains on leaky text learns little else: notebook 07 shows its curves.

# %% [markdown]
# ## The toy group, judged
#
# The frozen scores were made up. This judge's own:

# %%
lines = ["| completion | right | made-up score | this judge |", "|---|---|---|---|"]
scores = judge([prompt] * 5, [teacher_completion, *student_completions], [True] * 5).tolist()
made_up = [*teacher_scores.tolist(), *student_scores[0].tolist()]
for text, old, new in zip([teacher_completion, *student_completions], made_up, scores, strict=True):
    lines.append(f"| `{text}` | {'yes' if text in teacher.valid(prompt) else 'no'} | {old:+.1f} | {new:+.2f} |")
Markdown("\n".join(lines))

# %% [markdown]
# At 0.7 it is a poor referee: some wrong text stands above some right one. All it is ever told is who won, one bit a pair, and
# in that it must find what an order of letters is. Notebook 06 has a judge that does better, and what that is worth.

# %% [markdown]
# ## Recap
#
# 1. A discriminator ranks; only differences of its scores within a prompt mean anything.
# 2. Its optimum is the log-ratio of teacher and student: what an API does not tell.
# 3. Ask it about held-out prompts, and about identical text, before you believe it.

# %% [markdown]
# ## Exercise 1
#
# How large must the margin be for the teacher to win nine matches of ten? *Hint: solve* $\sigma(m) = 0.9$. Replace the dots
# and run the cell: it says `right`, or stops at an `assert`.

# %%
margin_for_nine_of_ten = ...

assert margin_for_nine_of_ten is ... or abs(torch.sigmoid(torch.tensor(float(margin_for_nine_of_ten))) - 0.9) < 1e-3
print("not answered yet" if margin_for_nine_of_ten is ... else "right")

# %% [markdown]
# ## Exercise 2
#
# The paper also tried plain cross-entropy (Eq 4): "is this text the teacher's?", $-\log \sigma(D(y_t))$ for the teacher and
# $-\log(1 - \sigma(D(y_s)))$, mean over the four, for the student; the sum of both. Compute it for the toy group. Does adding
# 100 to all scores change it? *Hint:* `torch.nn.functional.logsigmoid` *of the score and of minus the score.*

# %%
cross_entropy = ...

truth = [(teacher_scores, torch.ones(1)), (student_scores, torch.zeros(1, 4))]
expected = sum(torch.nn.functional.binary_cross_entropy_with_logits(*pair) for pair in truth)
assert cross_entropy is ... or abs(cross_entropy - expected) < 1e-3
print("not answered yet" if cross_entropy is ... else "right")
