"""minigad: Generative Adversarial Distillation, from a toy on a CPU to a real student.

The method is in three modules: `minigad.losses` (the maths), `minigad.train` (the loop) and `minigad.step` (its updates).
Names below load on first use, so that `import minigad` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it
_EXPORTS = {
    "PRESETS": "config",
    "CollectSettings": "collect",
    "Discriminator": "discriminator",
    "GADConfig": "config",
    "OpenAITeacher": "teacher",
    "Sampling": "teacher",
    "ScriptedTeacher": "teacher",
    "Store": "store",
    "Student": "student",
    "UserError": "config",
    "as_reward_function": "reward",
    "attribute": "attribution",
    "best_of_n": "reward",
    "distill": "run",
    "evaluate": "evaluate",
    "filter_pairs": "reward",
    "gad": "train",
    "load_players": "players",
    "load_pairs": "data",
    "seqkd": "train",
    "soda": "train",
    "split_by_prompt": "data",
    "warmup": "train",
    "which_is_the_teacher": "guess",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
