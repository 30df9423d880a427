# %% [markdown]
# # Solutions to 05 · The policy gradient on a page
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
import math

import torch

torch.set_num_threads(1)  # models this small only lose time to a second thread

# %% [markdown]
# ## Exercise 1
#
# A ratio of 1.5, epsilon 0.2.

# %%
from minigad.losses import grpo_loss

ratio, clipped = 1.5, 1.2
adds_plus, adds_minus = min(ratio * 1, clipped * 1), min(ratio * -1, clipped * -1)
print(adds_plus, adds_minus)

one, logprob, old = torch.ones(1, 1), torch.tensor([[1.5]]).log(), torch.zeros(1, 1)
plus, minus = [-grpo_loss(logprob, a * one, one, old_logprobs=old) for a in (1, -1)]
assert adds_plus is ... or abs(adds_plus - plus) < 1e-4
assert adds_minus is ... or abs(adds_minus - minus) < 1e-4

# %% [markdown]
# The minimum is pessimistic: gains are capped at 1.2, losses are not. A token that became likelier and turned out bad still pulls,
# with all of 1.5.

# %% [markdown]
# ## Exercise 2
#
# The temperature that was forgotten.

# %%
logits = torch.tensor([2.0, 0.0])
wrong_by = (torch.log_softmax(logits, 0) - torch.log_softmax(logits / 0.5, 0))[0].item()
print(f"{wrong_by:.4f} nats")

assert wrong_by is ... or abs(abs(wrong_by) - math.log1p(math.exp(-2)) + math.log1p(math.exp(-4))) < 1e-3

# %% [markdown]
# A tenth of a nat for one token; over a hundred tokens, a ratio of $e^{11}$. With one update per rollout the ratio hides it, for both
# sides forget alike, and the gradient is that of another policy than the one that was sampled.
