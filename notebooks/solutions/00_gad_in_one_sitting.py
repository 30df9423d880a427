# %% [markdown]
# # Solutions to 00 · GAD in one sitting
#
# Each stands alone, with the check of its exercise. Ten seconds of computing.

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
# The loss of a discriminator that gives every text the same score.

# %%
from minigad.losses import bradley_terry_loss

loss_when_equal = torch.log(torch.tensor(2.0)).item()
print(f"{loss_when_equal:.4f} nats")

assert loss_when_equal is ... or abs(loss_when_equal - bradley_terry_loss(torch.zeros(1), torch.zeros(1, 4))) < 1e-3

# %% [markdown]
# Equal scores: every margin is 0, $\sigma(0) = 1/2$, and $-\log(1/2) = \log 2$. A run whose discriminator loss sits at 0.69 has a
# judge that cannot tell, or a student that has become its teacher. The loss does not say which.

# %% [markdown]
# ## Exercise 2
#
# The one-dimensional game against a discriminator that stops learning when the game begins.

# %%
from minigad.toy.one_dimension import play, seqkd

start = seqkd(seed=0)
*_, game = play(1200, seed=0, start=start)
prediction = "smaller"
*_, frozen_game = play(1200, seed=0, start=start, frozen=True)
print(f"width with a learning judge {game['sigma']:.2f}, with a frozen one {frozen_game['sigma']:.2f}")

assert frozen_game is ... or frozen_game["step"] == 1200
assert frozen_game is ... or (prediction == "smaller") == (frozen_game["sigma"] < game["sigma"])

# %% [markdown]
# Smaller. A frozen score is a fixed reward, and the best answer to a fixed reward is its argmax: the student narrows to a point.
# A judge that learns on lowers the score of what the student says too often, and that keeps the student wide. (Notebook 07.)
