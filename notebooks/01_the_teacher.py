# %% [markdown]
# # 01 · The teacher you may only read: prompts, completions, a dataset
#
# **You will learn** what black-box distillation gets to see, how a file of text becomes token ids without a leak, and
# which looks at the data save a week of training.
#
# **You need** a CPU. Nothing is downloaded: the data set comes with minigad. **It takes** ten seconds of computing.

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
from collections import Counter
from importlib import resources

import torch
from IPython.display import Markdown
from matplotlib.figure import Figure

from minigad.plots import COLOURS, METHOD_COLOURS, plot_histogram, show

torch.set_num_threads(1)  # models this small only lose time to a second thread

# %% [markdown]
# ## Text, and nothing else
#
# A teacher behind an API gives
#
# $$y_t \sim p_T(\cdot \mid x)$$
#
# $x$: a prompt. $y_t$: one completion, drawn by the teacher. $p_T$: its distribution over all texts, which stays hidden: no
# logits, no weights, often another tokenizer. We may ask again, at a price. So text is collected once, and everything
# else is learnt from it.

# %% [markdown]
# ## A teacher that is an open book
#
# To check claims we keep one teacher whose $p_T$ we wrote ourselves. A prompt is 3 to 5 letters; it writes them as given,
# reversed, ascending or descending, with or without commas, and ends with `.` or `!`, all equally likely. One text in a
# thousand is noise, symbols at random, so that no text is impossible. Training code never gets to see the probabilities;
# the notebooks use them to *measure*.

# %%
from minigad.toy.letters import LettersTeacher

teacher = LettersTeacher()
rng = random.Random(0)
drawn = Counter(teacher.sample("cab", rng) for _ in range(4000))
for text, count in drawn.most_common(3):
    print(f"{text:8s} drawn {count / 4000:.3f}   exact {math.exp(teacher.logprob('cab', text)):.3f}")
print(f"{len(teacher.valid('cab'))} right answers, of probability {min(teacher.valid('cab').values())} before noise")

# %% [markdown]
# Ask often enough, and the shares come near the probabilities. That is all that sampling gives, and real text is longer:
# a completion of a few sentences hardly ever comes twice, so its share says nothing.

# %% [markdown]
# ## A teacher of real text
#
# The data set that comes with minigad: 200 prompts, two short answers each, by SmolLM2-135M-Instruct behind a hidden
# conversation that taught it brevity. It is a small model and says foolish things. That does not matter: the aim is to
# write *like the teacher*.

# %%
from minigad import load_pairs

FILES = resources.files("minigad") / "assets" / "short_answers"
train, report = load_pairs(str(FILES / "train.jsonl"))
heldout, _ = load_pairs(str(FILES / "heldout.jsonl"))
print(*report.lines()[1:], sep="\n")
print(f"for example: {train[2]['prompt']}\n -> {train[2]['completion']}")

# %% [markdown]
# `load_pairs` reads every row before any model is loaded, and names the file, line and field of the first that is no use.
# A truncated last line, as a full disk leaves it, should stop you now and not in step 300:

# %%
import tempfile
from pathlib import Path

from minigad import UserError

with tempfile.TemporaryDirectory() as folder:
    broken = Path(folder) / "pairs.jsonl"
    broken.write_text('{"prompt": "Hi", "completion": "Hello."}\n{"prompt": "Name a river", "compl')
    try:
        load_pairs(broken)
        message = ""
    except UserError as error:
        message = str(error).replace(folder, "...")

assert "pairs.jsonl:2" in message
print(message)

# %% [markdown]
# ## One encoder for both sides
#
# Text becomes ids in one function, whoever wrote it: the prompt in its chat template, the completion's tokens, then exactly
# one end token if it was finished, none if it was cut. A discriminator, the judge of notebook 00, sees ids. If the two sides
# differ in anything but the words, it will find that, and call it judgement (notebook 07).

# %%
from minigad.chat import decode, encode
from minigad.toy.letters import letters_tokenizer

tokenizer = letters_tokenizer()
template = tokenizer.apply_chat_template(
    [{"role": "user", "content": "cab"}], add_generation_prompt=True, tokenize=False
)
prompt_ids = tokenizer(template, add_special_tokens=False).input_ids
completion_ids = [*tokenizer("a,b,c.", add_special_tokens=False).input_ids, tokenizer.eos_token_id]

row = encode(tokenizer, "cab", "a,b,c.")
assert (list(row.prompt_ids), list(row.completion_ids)) == (prompt_ids, completion_ids)
print(template, "->", prompt_ids)
print("a,b,c. + end ->", completion_ids)

# %% [markdown]
# Cut is not finished: at four tokens the text loses its end token, and decoding says so. And a prompt that *mentions* a
# control token must stay text, or a user could end your prompt for you.

# %%
cut = encode(tokenizer, "cab", "a,b,c.", max_completion_length=4)
hostile = encode(tokenizer, "ab<|end|>", "ab.")

assert decode(tokenizer, cut.completion_ids) == ("a,b,", False)
assert tokenizer.eos_token_id not in hostile.prompt_ids
print("cut:", decode(tokenizer, cut.completion_ids))

# %% [markdown]
# ## Hold out prompts, not rows
#
# Nearly every prompt has two completions here. Shuffle *rows*, and most of what you call unseen has its twin in training. So
# whole prompts are held out, chosen by a hash of the prompt: rows added later move none of them.

# %%
from minigad import split_by_prompt

kept, out = split_by_prompt(train, eval_fraction=0.2, seed=0)
both = set(kept["prompt"]) & set(out["prompt"])

indices = list(range(len(train)))
random.Random(0).shuffle(indices)
naive_out, naive_kept = indices[: len(out)], indices[len(out) :]
seen = {train[i]["prompt"] for i in naive_kept}
leaked = sum(train[i]["prompt"] in seen for i in naive_out) / len(naive_out)

assert not both
print(f"by prompt: {len(kept)} rows to train, {len(out)} held out, none shared")
print(f"by row: {leaked:.0%} of the held-out rows have a prompt that is also in training")
assert leaked > 0.5

# %% [markdown]
# ## Look before you train
#
# Two looks at the teacher find most accidents: how long its texts are, and how they begin. Set a second sample beside the
# first (here the same teacher's on held-out prompts): if *those two* differ, every comparison with a student will too.
# **Expect** about 18 words on both, and the same words in front.

# %%
lengths = {
    "teacher, training prompts": [len(text.split()) for text in train["completion"]],
    "the same, held-out prompts": [len(text.split()) for text in heldout["completion"]],
}
alt = "Histograms of words a completion on training and on held-out prompts: most have 5 to 40, and they agree."
show(plot_histogram(lengths, "words a completion (dashed: the means)"), alt)
means = [sum(values) / len(values) for values in lengths.values()]
assert abs(means[0] - means[1]) < 4, means
print(f"mean words: training {means[0]:.1f}, held out {means[1]:.1f}")

# %%
first_words = [Counter(text.split()[0] for text in part["completion"]) for part in (train, heldout)]
top = [word for word, _ in first_words[0].most_common(12)]

figure = Figure(figsize=(9, 3), layout="constrained")
axes = figure.subplots()
colours = (COLOURS["teacher"], METHOD_COLOURS[0])  # those of the figure above
for shift, counts, label, colour in zip((-0.2, 0.2), first_words, lengths, colours, strict=True):
    heights = [counts[word] / counts.total() for word in top]
    axes.bar([i + shift for i in range(12)], heights, width=0.4, color=colour, label=label)
axes.set_xticks(range(12), top)
axes.set(title="How completions begin", xlabel="first word", ylabel="share of completions")
axes.legend(frameon=False)
show(figure, "The twelve most frequent first words of the teacher, with similar shares on both sets of prompts.")

# %% [markdown]
# **Worry when** one first word has half of all texts ("Sure!", "As an AI"): a discriminator needs only that word, and so
# does a student. Strip what is constant before you train.

# %% [markdown]
# ## How far apart are two samples of one teacher?
#
# The last look: a fresh classifier that reads words and characters tries to tell two halves of the teacher's *own* text
# apart. Its AUC (area under the ROC curve) is the share of pairs that it ranks right; 0.5 is chance, and what a perfect
# student would get. How far off it lands on your data is the noise of every later measurement. Then the text against
# itself, one small thing changed:

# %%
from minigad.data import group_by_prompt
from minigad.evaluate import honest_discriminator, teacher_ceiling

texts = [completions for _, completions in group_by_prompt(train)]
ceiling = teacher_ceiling(texts, max_texts=1)
bare = [[text.rstrip(".") for text in some] for some in texts]
clue = honest_discriminator(texts, bare)["honest_auc"]

assert abs(ceiling - 0.5) < 0.15 < clue - 0.5
lines = ["| a classifier tells apart | AUC |", "|---|---|", f"| the teacher and the teacher | {ceiling:.2f} |"]
Markdown("\n".join([*lines, f"| the teacher, and the same text without its full stop | {clue:.2f} |"]))

# %% [markdown]
# A missing full stop is enough. A discriminator finds what nobody meant, and a student is then paid for leaving out (or
# adding) full stops.

# %% [markdown]
# ## Recap
#
# 1. The teacher gives samples; its probabilities stay hidden, except for teachers we wrote to check ourselves.
# 2. One encoder for both sides, one end token for what is finished.
# 3. Hold out prompts, and look at lengths and first words before any training.

# %% [markdown]
# ## Exercise 1
#
# The teacher's text is `ab.`, cut at three tokens (its end token is the fourth). Is the encoded completion finished, and how
# many ids has it? *Hint:* `encode(..., max_completion_length=3)` *and* `decode`. Replace the dots and run the cell: it says
# `right`, or stops at an `assert`.

# %%
is_finished, number_of_ids = ..., ...

answer = encode(tokenizer, "ab", "ab.", max_completion_length=3).completion_ids
assert is_finished is ... or is_finished == decode(tokenizer, answer)[1]
assert number_of_ids is ... or number_of_ids == len(answer)
print("not answered yet" if is_finished is ... or number_of_ids is ... else "right")

# %% [markdown]
# ## Exercise 2
#
# What is the log-probability, in nats and to three decimals, that the letters teacher answers `cab` with `bac!`? *Hint: one
# of sixteen ways; noise takes one text in a thousand.* `LettersTeacher().logprob` *knows.*

# %%
log_probability = ...

assert log_probability is ... or abs(log_probability - teacher.logprob("cab", "bac!")) < 6e-4
print("not answered yet" if log_probability is ... else "right")
