# %% [markdown]
# # Solutions to 08 · A real student with QLoRA
#
# Each stands alone, with the check of its exercise. Seconds of computing.

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
from minigad import PRESETS
from minigad.fit import architecture, bill_of

# %% [markdown]
# ## Exercise 1
#
# What one token of one row takes in the cache.

# %%
cache_bytes = 2 * 24 * 2 * 64 * 2  # keys and values, layers, heads, width, bytes
print(f"{cache_bytes:,} bytes a token, {cache_bytes * 3584 / 1e6:.0f} MB a row of the paper's lengths")

assert cache_bytes is ... or cache_bytes == architecture("qwen2.5-0.5b").kv_bytes()

# %% [markdown]
# Two key-value heads instead of fourteen make it a seventh of what it was: grouped queries are why so many rows can be sampled at
# a time.

# %% [markdown]
# ## Exercise 2
#
# A 7B student on 11 GB.

# %%
fits = PRESETS["qwen2.5-7b"].replace(token_budget=1024)
print(f"{bill_of(fits).on_gpu / 1e9:.1f} GB at its peak")

assert fits is ... or (
    fits.student == "qwen2.5-7b"
    and (fits.max_prompt_length, fits.max_completion_length) == (2048, 1536)
    and bill_of(fits).on_gpu <= 11e9
)

# %% [markdown]
# A budget of 1,024 tokens a pass: a row of full length goes alone, and fewer are sampled at a time. Slower, and the same gradients.
# `minigad fit --gpu 11GB` finds it too.

# %% [markdown]
# ## Exercise 3
#
# Whose likelihood to ask for.

# %%
ask_for = "both"

assert ask_for is ... or ask_for == "both"

# %% [markdown]
# At one KL(S‖T), the better student is the one that misses less of the teacher, and NLL of teacher text at temperature 1 (or
# KL(T‖S)) says so; sampling colder raises KL(T‖S) without touching that NLL. One number of each is half a picture.
