# %% [markdown]
# # Solutions to 02 · Imitation first
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


# %% [markdown]
# ## Exercise 1
#
# A teacher with two texts; student A says one, student B wastes half of its mass.

# %%
import math

kl_a = 1.0 * math.log(1.0 / 0.5)
kl_b, preferred = float("inf"), "B"
print(f"KL(A||T) {kl_a:.4f}, KL(B||T) {kl_b}; KL(T||A) inf, KL(T||B) {math.log(0.5 / 0.25):.4f}")

assert kl_a is ... or abs(math.exp(kl_a) - 2) < 2e-3
assert kl_b is ... or math.isinf(kl_b)
assert preferred is ... or preferred == ("A" if math.inf < math.log(2) else "B")  # KL(T‖A), KL(T‖B)

# %% [markdown]
# B says what the teacher never says: KL(B‖T) is infinite. A misses what the teacher says half of the time: KL(T‖A) is infinite, and
# so the direction of SeqKD prefers B, the one that is wrong half of the time. The game prefers A, the one that is always right.

# %% [markdown]
# ## Exercise 2
#
# The NLL of the best student of the letters teacher.

# %%
best_nll = math.log(16)
print(f"{best_nll:.4f} nats a completion")

assert best_nll is ... or abs(math.exp(best_nll) - 16) < 0.2

# %% [markdown]
# Nobody's NLL is below the teacher's entropy. It is the floor of the left curve in the notebook, once divided by the tokens of a
# completion.
