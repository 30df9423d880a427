# %% [markdown]
# # Solutions to 03 · Teaching a judge
#
# Each stands alone, with the check of its exercise. A second of computing.

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

torch.set_num_threads(1)  # models this small only lose time to a second thread

# %% [markdown]
# ## Exercise 1
#
# The margin at which the teacher wins nine of ten.

# %%
margin_for_nine_of_ten = torch.logit(torch.tensor(0.9)).item()
print(f"{margin_for_nine_of_ten:.3f}")

assert margin_for_nine_of_ten is ... or abs(torch.sigmoid(torch.tensor(float(margin_for_nine_of_ten))) - 0.9) < 1e-3

# %% [markdown]
# $\sigma(m) = 0.9$ gives $m = \log(0.9 / 0.1) = \log 9$. Scores are log-odds: a margin of 2.2 is 9 to 1, one of 4.6 is 99 to 1.

# %% [markdown]
# ## Exercise 2
#
# The toy group under cross-entropy (Eq 4).

# %%
from torch.nn.functional import logsigmoid

teacher_scores = torch.tensor([1.2])
student_scores = torch.tensor([[0.3, -0.5, 1.9, 0.8]])


def both(shift: float) -> float:
    """Cross-entropy with `shift` added to every score."""
    return (-logsigmoid(teacher_scores + shift).mean() - logsigmoid(-student_scores - shift).mean()).item()


cross_entropy = both(0.0)
print(f"{cross_entropy:.4f}, with 100 added to all scores {both(100.0):.1f}")

truth = [(teacher_scores, torch.ones(1)), (student_scores, torch.zeros(1, 4))]
expected = sum(torch.nn.functional.binary_cross_entropy_with_logits(*pair) for pair in truth)
assert cross_entropy is ... or abs(cross_entropy - expected) < 1e-3

# %% [markdown]
# It changes. Cross-entropy asks for an absolute scale that is the same for all prompts, and spends the judge's weights on it.
# Bradley-Terry asks for the ranking within a prompt, all that the advantage uses. The paper measured it to be better (Table 4).
