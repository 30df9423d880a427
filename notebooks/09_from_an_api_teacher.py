# %% [markdown]
# # 09 · 3B and 7B from an API teacher: collect, distill, judge
#
# **You will learn** the whole road: your prompts, a teacher with a budget, checks, a student that fits, the game and its control, a
# judge with intervals, a model card, a server.
#
# **You need** notebook 08, a GPU of 16 GB (24 give room), and hours. Or a CPU and a minute for the **rehearsal**, with
# `MINIGAD_PROFILE=smoke` set before Jupyter starts: a toy student, nothing downloaded. The outputs below are the rehearsal's: no
# result.

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
import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from IPython.display import Markdown

from minigad.plots import plot_checks, plot_intervals, show

for package in ("openai", "bitsandbytes"):
    if importlib.util.find_spec(package) is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # peft reads what transformers has renamed
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses kernels that we do not use

# %% [markdown]
# ## Where everything is kept
#
# In one folder, `minigad-09` in your home. On Colab, mount your Drive in a cell before this one: what is there outlives the machine.
#
# ```
# from google.colab import drive
# drive.mount("/content/drive")
# ```
#
# After a cut, run all cells again: what was asked, paid for and trained is found there, and goes on. (A rehearsal uses a new
# temporary folder each time.)

# %%
drive = Path("/content/drive/MyDrive")
home = Path(size(str(Path.home()), tempfile.mkdtemp()))
work = (drive if drive.is_dir() else home) / "minigad-09"
work.mkdir(exist_ok=True)
os.chdir(work)

# %% [markdown]
# ## Your prompts
#
# One JSON object a line with a `prompt`, in `prompts.jsonl`: put your own file there and this cell leaves it alone. As a
# stand-in: prompts of the embedded set, and three rows such as every real file has: a repeat, an address, a key.

# %%
from minigad import load_pairs
from minigad.data import read_jsonl, write_jsonl

FILES = importlib.util.find_spec("minigad").submodule_search_locations[0] + "/assets/short_answers"
embedded, _ = load_pairs(f"{FILES}/train.jsonl")
prompts = list(dict.fromkeys(embedded["prompt"]))[: int(size(100, 40))]
planted = [
    "Write to jo@example.org that I am late.",
    "My key is sk-proj-a8Zk2LmQ9wXr4TnV7bYc1D, is it safe?",
    prompts[0],
]
if not Path("prompts.jsonl").exists():
    write_jsonl("prompts.jsonl", [{"prompt": prompt} for prompt in prompts + planted])
print(len(read_jsonl("prompts.jsonl")), "prompts, such as:", prompts[2])

# %% [markdown]
# ## The teacher
#
# Any endpoint that speaks OpenAI's chat completions. Set `TEACHER_URL` and `TEACHER_MODEL`, say by `os.environ["TEACHER_URL"] =
# "https://api.openai.com/v1"` in a cell above; the key comes from `OPENAI_API_KEY`, Colab's secrets, or a prompt that does not
# echo, and is never written anywhere. Without them the teacher is **rehearsed**: a server on this machine replays the embedded
# answers. Rehearse before you pay.

# %%
from minigad.teacher import OpenAITeacher, find_key
from minigad.toy.endpoint import Endpoint

replay = dict(zip(embedded["prompt"], embedded["completion"], strict=True))
rehearsal = Endpoint(lambda messages: replay.get(messages[-1]["content"], "I have no answer to that."))
url, name = os.environ.get("TEACHER_URL", rehearsal.url), os.environ.get("TEACHER_MODEL", "rehearsal")
teacher = OpenAITeacher(name, url, find_key(url))
print("teacher:", name)

# %% [markdown]
# ## What will it cost?
#
# $$\text{dollars} = 10^{-6}\,(n_{\text{in}}\, p_{\text{in}} + n_{\text{out}}\, p_{\text{out}})$$
#
# $n_{\text{in}}$, $n_{\text{out}}$: tokens sent and received. $p$: dollars a million of them; look yours up, and set them, the
# longest answer (`max_tokens`) and the budget in the next cells. The dry run counts, and calls nobody; what it finds in prompts
# (keys, personal data, repeats) is found *before* anything is sent.

# %%
from minigad import CollectSettings, Sampling
from minigad.collect import Price
from minigad.teach import check_prompts, dry_run, teach

price = Price(2.0, 8.0)
assert price.cost(6_000, 4_000) == (6_000 * 2.0 + 4_000 * 8.0) / 1e6

sampling = Sampling(temperature=0.7, max_tokens=64)  # short answers; a longer one is cut off, and the checks say so
settings = CollectSettings(sampling=sampling, price=price, budget=0.006)
checked = check_prompts("prompts.jsonl", settings.policies)
print(*checked.report.lines()[:7], *dry_run("prompts.jsonl", settings, checked, name)[:3], sep="\n")

# %% [markdown]
# ## Collect, with a budget
#
# The budget is dollars over everything that this store ever paid. This one is too small on purpose: the collection stops *before*
# the call that would exceed it, and what was paid for is kept. With more, it goes on, and asks nothing twice.

# %%
from dataclasses import replace

from minigad.store import Store

with Store("pairs.db") as store:
    first = teach(teacher, "prompts.jsonl", "pairs.jsonl", store, settings, show=False)
    done = teach(teacher, "prompts.jsonl", "pairs.jsonl", store, replace(settings, budget=5.0), show=False)
print(f"First: {first.summary.stopped or 'nothing left to ask'}. {first.ledger.lines()[0]}")
print("With more:", *done.ledger.lines())

assert not done.summary.stopped and done.summary.progress.found == first.summary.progress.done
assert first.summary.stopped or first.summary.progress.calls == 0, "run again, there is nothing left to ask"

# %%
alt = (
    "Bars of what the checks found: one key, one address and one repeated prompt were dropped, nothing else was found."
)
show(plot_checks(done.report), alt)

# %% [markdown]
# Look at the classes before you train: refusals and cut-off answers teach a student to refuse and to stop in the middle. What is
# kept, dropped or asked again is yours to say (`--on refusal=retry`).

# %% [markdown]
# ## Hold out prompts
#
# Whole prompts are held out, chosen by a hash of their text, so that rows added later move nothing that was there. A near-duplicate
# goes where the first of its kind went (notebook 01).

# %%
from minigad.split import split_pairs

report = split_pairs("pairs.jsonl", "train.jsonl", "heldout.jsonl", eval_fraction=0.25)
train, heldout = load_pairs("train.jsonl")[0], load_pairs("heldout.jsonl")[0]
print(len(train), "rows to learn from,", len(heldout), "to judge by:", heldout[0]["prompt"])
assert not set(train["prompt"]) & set(heldout["prompt"])

# %% [markdown]
# ## The largest student that fits
#
# `bill_of` knows what a step takes before anything is downloaded (notebook 08). By it 7B fits into 16 GB, a pass of one or two
# rows at a time; 24 GB let it sample faster. Without a GPU: SmolLM2-135M, four steps.

# %%
from minigad import PRESETS
from minigad.fit import bill_of

memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
for preset in ("qwen2.5-7b", "qwen2.5-3b", "qwen2.5-0.5b"):
    print(f"{preset}: {bill_of(PRESETS[preset]).on_gpu / 1e9:.1f} GB at the paper's lengths")
fitting = [p for p in ("qwen2.5-7b", "qwen2.5-3b", "qwen2.5-0.5b") if bill_of(PRESETS[p]).on_gpu <= 0.95 * memory]
chosen = (fitting or ["smollm2-135m"])[0]

tiny = {"student": "toy", "warmup_learning_rate": 3e-3, "seqkd_learning_rate": 3e-3, "max_steps": 2}
few = {} if fitting else {"max_steps": 4}  # a CPU shows the way, not the result
config = PRESETS[chosen].replace(save_steps=20, **size(few, tiny))
print("this run:", config.student)

# %% [markdown]
# ## The game, and its control
#
# `distill` writes a folder that can be read without this library. With `resume=True` it begins, or goes on after a cut, with the
# same line. The control is SeqKD (three epochs in the presets, as in the paper): without it nobody knows what the game was worth.

# %%
from minigad.run import distill, read_run

with contextlib.redirect_stderr(io.StringIO()) as log:  # progress: minutes to hours of it
    distill(config.replace(output_dir="run-seqkd"), "train.jsonl", "heldout.jsonl", "seqkd", resume=True)
    distill(config.replace(output_dir="run-gad"), "train.jsonl", "heldout.jsonl", "gad", resume=True)
print(log.getvalue().splitlines()[-1])

# %%
from minigad.diagnose import diagnose

runs = {name: read_run(f"run-{name}") for name in ("seqkd", "gad")}
print(*diagnose(runs["gad"]["metrics"], runs["gad"]["evaluation"])[:6], sep="\n")
for name, run in runs.items():
    found = run["evaluation"]["metrics"]
    print(
        f"{name}: NLL {found['nll']:.2f}, words {found['mean_words']:.0f}, the teacher's {found['teacher_mean_words']:.0f}"
    )

# %% [markdown]
# ## A judge
#
# Another language model, a *judge* in the common sense now and not the discriminator, compares two completions of a prompt, in
# *both* orders, since judges like what comes first. What it says is read strictly, asked again if it cannot be read, and counted;
# every reply is in a store. Set `JUDGE_URL` and `JUDGE_MODEL`, not the teacher's model. In the rehearsal a script judges: it
# likes about twelve words, and the first text.

# %%
import re

ENDS = re.compile(r"\[(?:Completion \w|End of the completions)\]\n?")
seen = set()


def scripted(messages) -> str:
    """Judge by length, lean to the first, and now and then say nothing that can be read."""
    text = messages[-1]["content"]
    first, second = (len(part.split()) for part in ENDS.split(text)[1:3])
    new, _ = text not in seen, seen.add(text)
    if new and len(text) % 10 == 0:
        return "Both have their merits."
    lead = abs(second - 12) - abs(first - 12) + 2
    return f"Length is what I see. [[{'A' if lead > 0 else 'B' if lead < 0 else 'C'}]]"


umpire = Endpoint(scripted)
url = os.environ.get("JUDGE_URL", umpire.url)
judge_model = OpenAITeacher(os.environ.get("JUDGE_MODEL", "script"), url, find_key(url))

# %%
from minigad.judge import PAIRWISE, compare, judge, numbers_of

asked = list(dict.fromkeys(heldout["prompt"]))
teachers = dict(zip(heldout["prompt"], heldout["completion"], strict=True))
theirs = [teachers[prompt] for prompt in asked]


def answers(name: str) -> list[str]:
    """Return the run's student's text for each held-out prompt."""
    written = {sample["prompt"]: sample["student"] for sample in runs[name]["evaluation"]["samples"]}
    return [written[prompt] for prompt in asked]


# %%
def bar(wanted: int):
    """Show nothing: a judge's progress is minutes of lines."""
    return contextlib.nullcontext((lambda sentence: None, lambda progress: None))


verdicts, numbers = {}, {}
how = CollectSettings(sampling=Sampling(temperature=0.0, max_tokens=512), price=Price(0.0, 0.0))
with Store("judge.db") as store:
    for name in runs:
        ours = answers(name)
        verdicts[name] = judge(judge_model, PAIRWISE, asked, ours, theirs, store, how, bar)
        numbers[name] = numbers_of(PAIRWISE, verdicts[name], ours, theirs)
        print(name, f"{verdicts[name].replies} replies, {verdicts[name].asked_again} asked again")

# %% [markdown]
# ## The length-controlled win rate, by hand
#
# A judge that likes length can be fed length. So its verdicts are explained by quality and by length (after arXiv 2404.04475):
#
# $$\log \frac{P(\text{win})}{1 - P(\text{win})} = \theta + \varphi \tanh(d / s)$$
#
# $P(\text{win})$: the chance that the student's text wins. $d$: its characters less the other's. $s$: the standard deviation of
# $d$. $\varphi$: what length earns. $\theta$: what is left; $1 / (1 + e^{-\theta})$ is the win rate at equal length. A verdict is
# 1, 0, or 1/2 where the two orders disagree; the fit is a logistic regression.

# %%
won = torch.tensor(verdicts["gad"].values)
known = won.isfinite()
d = torch.tensor([len(mine) - len(other) for mine, other in zip(answers("gad"), theirs, strict=True)]).double()
x = torch.tanh(d / d[known].std())[known]

design = torch.stack([torch.ones_like(x), x], 1)
ridge = 1e-3 * torch.eye(2).double()  # a pinch, that keeps one-sided verdicts finite
coefficients = torch.zeros(2).double()  # theta, phi
for _ in range(50):  # Newton's method
    p = torch.sigmoid(design @ coefficients)
    slope = design.T @ (p - won[known]) + ridge @ coefficients
    curvature = design.T @ (design * (p * (1 - p)).unsqueeze(1)) + ridge
    coefficients = coefficients - torch.linalg.solve(curvature, slope)

by_hand = 100 * torch.sigmoid(coefficients[0]).item()
assert abs(by_hand - numbers["gad"]["length_controlled_win_rate"]) < 0.1
print(f"win rate {numbers['gad']['win_rate']:.1f}%, at equal length {by_hand:.1f}%")

# %%
measures = {"win rate": "win_rate", "length-controlled": "length_controlled_win_rate"}
labels = {"seqkd": "SeqKD against the teacher", "gad": "GAD against the teacher"}
intervals = [
    (f"{labels[n]}, {title}", *(numbers[n][f"{key}{end}"] for end in ("", "_low", "_high")))
    for n in runs
    for title, key in measures.items()
]
alt = (
    "Win rates of both students against the teacher with 95% intervals, plain and length-controlled; dashed is parity."
)
show(plot_intervals(intervals, "percent of comparisons won, 95% intervals over prompts", 50.0), alt)

# %% [markdown]
# The intervals are for other prompts of the same kind: prompts are drawn anew (bootstrap), nothing is trained or judged anew. Two
# students are compared prompt by prompt, which is far sharper than two intervals side by side:

# %%
(against,) = compare(verdicts["gad"].values, [verdicts["seqkd"].values])
print(f"GAD less SeqKD: {against['difference']:+.1f} points ", end="")
print(f"[{against['difference_low']:+.1f}, {against['difference_high']:+.1f}], p = {against['p_holm']:.2f}, ", end="")
print(f"{against['prompts']} prompts; points for the first place: {numbers['gad']['first_share']:.0f}%")

# %% [markdown]
# `p` is the paired test's, corrected if several are compared. In the rehearsal two toys that have learnt nothing get the same
# verdicts, so the difference is exactly 0. 50% of the points for the first place would be a fair judge; this script is not, and
# both orders cancel it. The numbers mean nothing about the methods: the student is a toy, its judge counts words. What is real is
# every step.

# %% [markdown]
# ## The model card
#
# `distill` wrote one that says what the student is and what nobody checked. Add what you measured, with intervals and the judge's
# name:

# %%
card = Path("run-gad/student/README.md")
section = ["## Measured", "", f"Judge: `{judge_model.name}`, pairwise, both orders, {len(asked)} held-out prompts.", ""]
section += ["| against the teacher | value | 95% interval |", "|---|---|---|"]
for title, key in measures.items():
    found = numbers["gad"]
    section.append(f"| {title} | {found[key]:.0f}% | {found[f'{key}_low']:.0f} to {found[f'{key}_high']:.0f} |")
low, high = against["difference_low"], against["difference_high"]
section.append(f"| win rate, less the control's (SeqKD) | {against['difference']:+.0f} | {low:+.0f} to {high:+.0f} |")
text = card.read_text().split("## Measured")[0] + "\n".join(section) + "\n"
card.write_text(text)
body = text.split("---\n")[2]  # what stands above is the hub's own header
Markdown(f"\n{body}".replace("\n#", "\n###"))

# %% [markdown]
# ## Serve it
#
# vLLM loads the adapter beside its base; llama.cpp wants plain weights, which `minigad merge` writes:
#
# ```
# vllm serve Qwen/Qwen2.5-7B-Instruct --enable-lora --lora-modules student=run-gad/student
#
# minigad merge run-gad --out plain
# python llama.cpp/convert_hf_to_gguf.py plain --outfile student.gguf
# llama-server -m student.gguf
# ```
#
# (With the base that was chosen above.) Either speaks the protocol of this notebook's teacher; neither server was run for this page.
# Below: the merged weights, loaded by transformers alone.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from minigad import Student
from minigad.chat import encode
from minigad.merge import merge, merging_loss
from minigad.model import LanguageModel

transformers_logging.disable_progress_bar()
student = Student.from_pretrained("run-gad/student", config)
rows = [encode(student.tokenizer, *pair) for pair in zip(asked[:8], theirs[:8], strict=True)]
before = student.logprobs_of(rows)
shutil.rmtree("plain", ignore_errors=True)
merge(student, "plain")

plain = AutoModelForCausalLM.from_pretrained("plain", dtype="auto")
merged = LanguageModel(plain.eval(), AutoTokenizer.from_pretrained("plain"))
lost = merging_loss(before, merged, rows)
assert lost["logp_difference"] < 0.2
print(f"merging and 16 bits move log p by {lost['logp_difference']:.4f} nats a token, KL {lost['kl']:+.5f}")

# %% [markdown]
# And the same client that read the teacher reads the student, from a server that is three lines here and vLLM in earnest. (In the
# rehearsal it answers with a toy's gibberish.)

# %%
served = Student(plain, merged.tokenizer)
with Endpoint(lambda messages: served.generate([messages], config, seed=0, temperature=0.0).texts[0]) as server:
    reply = OpenAITeacher("student", server.url).answer([{"role": "user", "content": asked[0]}], Sampling(), 0)
print(asked[0], "->", reply.text[:60].encode("ascii", "replace").decode())

# %% [markdown]
# ## Push it (dry run)
#
# What would go to the hub, and a last look for secrets in it. With `push = True`, your name and a token (`hf auth login`) it
# goes. Is the teacher's licence with you? Many forbid training on their text.

# %%
from huggingface_hub import HfApi

from minigad.checks import prompt_classes

push, repository = False, "YOUR_NAME/student"
for file in sorted(Path("run-gad/student").iterdir()):
    assert file.suffix == ".safetensors" or "secrets" not in prompt_classes(file.read_text()), file
    print(f"would send {file.name:28s} {file.stat().st_size / 1e3:9.1f} kB")
if push:
    HfApi().create_repo(repository, private=True, exist_ok=True)
    HfApi().upload_folder(repo_id=repository, folder_path="run-gad/student")

# %% [markdown]
# ## Recap
#
# 1. Everything that costs money is dry-run first, stored as it comes, and never paid for twice.
# 2. Checks before, a held-out set of whole prompts, a control beside the game.
# 3. A judge is asked in both orders; a win rate without its interval, and without length control, is no result.

# %% [markdown]
# ## Exercise 1
#
# 50,000 prompts of 120 tokens, answers of 400, at 1.25 and 10 dollars a million: what does it cost? Replace the dots and run the
# cell: it says `right`, or stops at an `assert`.

# %%
dollars = ...

assert dollars is ... or abs(dollars - Price(1.25, 10.0).cost(50_000 * 120, 50_000 * 400)) < 0.01
print("not answered yet" if dollars is ... else "right")

# %% [markdown]
# ## Exercise 2
#
# A judge always prefers the first text, whatever it says. What is the win rate that both orders give, and what is `first_share`,
# both in percent?

# %%
win_rate, first_share = ..., ...

assert win_rate is ... or win_rate == 50
assert first_share is ... or first_share == 100
print("not answered yet" if win_rate is ... or first_share is ... else "right")

# %% [markdown]
# ## Exercise 3
#
# How many held-out prompts does an interval of ± 5 points around 50% need, if a verdict is a fair coin? *Hint:* 1.96 standard
# errors.

# %%
needed = ...

assert needed is ... or abs(needed - 384) < 2
print("not answered yet" if needed is ... else "right")
