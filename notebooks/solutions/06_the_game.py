# %% [markdown]
# # Solutions to 06 · The game
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
# The optimal score of a text.

# %%
import math

optimal_score = math.log(0.2 / 0.05)
print(f"{optimal_score:.4f} nats")

assert optimal_score is ... or abs(optimal_score - 1.3863) < 1e-2

# %% [markdown]
# The teacher says it four times as often: $\log 4$. When the student has caught up the score is 0, and no longer pulls.

# %% [markdown]
# ## Exercise 2
#
# A start that ends on the smaller mode.

# %%
from minigad.toy.one_dimension import play

start = torch.tensor([42.0, math.log(3.0)], dtype=torch.float64)
*_, other_game = play(1200, seed=0, start=start)
print(f"centre {other_game['mu']:.2f}, KL(G||T) {other_game['kl_student_teacher']:.2f} nats")

assert other_game is ... or other_game["step"] == 1200
assert other_game is ... or abs(other_game["mu"] - 40) < 2

# %% [markdown]
# A narrow student never samples the larger mode, so no judge can praise it for going there. Its KL(G‖T) is higher than at the
# larger mode, about $-\log 0.3 = 1.20$ against $-\log 0.7 = 0.36$: a local optimum. Warm-up by imitation, wide as it is, is what
# shows the student both.
