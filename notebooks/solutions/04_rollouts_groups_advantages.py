# %% [markdown]
# # Solutions to 04 · One prompt, N completions
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
# Two right and two wrong.

# %%
from minigad.losses import group_advantages

advantage_of_a_right_one = group_advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))[0, 0].item()
print(f"{advantage_of_a_right_one:.4f}")

expected = group_advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))[0, 0]
assert advantage_of_a_right_one is ... or abs(advantage_of_a_right_one - expected) < 5e-3

# %% [markdown]
# $0.5 / \sqrt{4 \cdot 0.25 / 3} = 0.866$. With $N$ in place of $N - 1$ it would be 1.

# %% [markdown]
# ## Exercise 2
#
# A clear winner and one by a hair.

# %%
times_as_hard, times_as_hard_unscaled = 1.0, 1000.0

clear, close = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.001, 0.0, 0.0, 0.0]])
scaled, unscaled = [(group_advantages(clear, how) / group_advantages(close, how))[0, 0] for how in ("group", "none")]
assert times_as_hard is ... or abs(times_as_hard / scaled - 1) < 0.01
assert times_as_hard_unscaled is ... or abs(times_as_hard_unscaled / unscaled - 1) < 0.01
print(f"divided by the std {scaled:.2f}, only centred {unscaled:.0f}")
print(f"both winners' advantage {group_advantages(close)[0, 0]:.2f}; of two winners it was {expected:.2f}")

# %% [markdown]
# Equally hard: 1.5 for both, since the std takes the size of the differences away. Rare success counts for more than common
# success (1.5 against 0.87), and a judge that hardly prefers one text speaks as loudly as one that is sure. `scale_rewards="none"`
# only centres: there the size of a difference counts.
