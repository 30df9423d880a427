"""Out of GPU memory: say what took it and what helps, halve the token budget once, and do the same thing again.

A step is computed twice rather than lost: the gradients of the first try are cleared, the rollouts stay, and nothing that
other processes wait for is repeated. An optimizer's own step is never repeated, since it may be half done.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from minigad import parallel
from minigad.config import GADConfig, UserError
from minigad.fit import shortage
from minigad.model import LanguageModel

__all__ = ["explained", "with_room"]

Result = TypeVar("Result")


def with_room(
    phase: str,
    model: LanguageModel,
    config: GADConfig,
    work: Callable[[], Result],
    parameters: Sequence[nn.Parameter] = (),
) -> Result:
    """Return `work()`; where the GPU's memory runs out, halve the model's token budget, clear gradients, and return it again.

    `phase` is the bill's (minigad.fit); "reference" stands for any pass that only scores. `work` splits by `model.within(config.token_budget)`, calls no other process, and adds
    gradients to `parameters` alone, which have none before. Raises UserError where half the budget is too much as well.
    """
    if model.halved or parallel.sharded():  # the other processes would wait for passes that are not theirs
        with explained(phase, config):
            return work()
    try:
        return work()
    except torch.OutOfMemoryError:
        pass  # what it holds, in the frames of its traceback, is free once this block is left
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model.halved = True
    now = model.within(config.token_budget)
    print(f"minigad: {shortage(config, phase)}; the token budget is halved to {now}, and it goes on", file=sys.stderr)
    with explained(phase, config):
        return work()


@contextmanager
def explained(phase: str, config: GADConfig) -> Iterator[None]:
    """Turn torch's report of a GPU without memory into one sentence: the part of the bill, and three settings that help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{shortage(config, phase)}; nothing of it was kept, and a run goes on from its last checkpoint with --resume"
        ) from error
