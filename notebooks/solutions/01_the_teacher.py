# %% [markdown]
# # Solutions to 01 · The teacher you may only read
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
# `ab.` cut at three tokens: finished, and how long?

# %%
from minigad.chat import decode, encode
from minigad.toy.letters import letters_tokenizer

tokenizer = letters_tokenizer()
answer = encode(tokenizer, "ab", "ab.", max_completion_length=3).completion_ids
text, is_finished = decode(tokenizer, answer)
number_of_ids = len(answer)
print(repr(text), is_finished, number_of_ids)

assert is_finished is ... or is_finished == decode(tokenizer, answer)[1]
assert number_of_ids is ... or number_of_ids == len(answer)

# %% [markdown]
# The words are all there, the end token is not. A judge must see that, on both sides alike: the teacher's text is cut by the same
# rule as the student's.

# %% [markdown]
# ## Exercise 2
#
# The log-probability of `bac!` for the prompt `cab`.

# %%
import math

from minigad.toy.letters import LettersTeacher

teacher = LettersTeacher()
log_probability = math.log(0.999 / 16 + 0.001 * 12**-5)
print(f"{log_probability:.4f} nats, and with no noise {-math.log(16):.4f}")

assert log_probability is ... or abs(log_probability - teacher.logprob("cab", "bac!")) < 6e-4

# %% [markdown]
# One of sixteen ways in 999 of 1000 texts, plus the chance that noise spells it: five tokens, the end included, of twelve symbols.
# The noise moves the third decimal, and keeps every KL finite.
