"""The optimizer of a player: torch's AdamW, or bitsandbytes' with 8-bit moments, paged or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minigad.config import GADConfig, UserError
from minigad.quiet import without_notes

__all__ = ["check_optimizer", "make_optimizer", "require_bitsandbytes"]


def make_optimizer(
    parameters: Sequence[nn.Parameter], learning_rate: float, config: GADConfig
) -> torch.optim.Optimizer:
    """Return the optimizer that `config.optim` names, without weight decay: an adapter has no size to decay to.

    The 8-bit ones keep two bytes of state a weight instead of eight; tensors below 4,096 elements stay in 32 bits. Paged
    moments move to the host while the card is full. Both need a GPU. Raises UserError without bitsandbytes or without a GPU.
    """
    check_optimizer(config, parameters[0].device)
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(
        parameters, lr=learning_rate, weight_decay=0.0, is_paged=config.optim.startswith("paged")
    )


def check_optimizer(config: GADConfig, device: torch.device) -> None:
    """Raise UserError if `config.optim` cannot run there; for a caller who wants to know before anything is written."""
    if config.optim == "adamw_torch":
        return
    require_bitsandbytes(f"config field 'optim' is {config.optim!r}")
    if device.type != "cuda":
        raise UserError(
            f"config field 'optim' is {config.optim!r}, which needs a CUDA GPU; use 'adamw_torch' on {device.type}"
        )


def require_bitsandbytes(reason: str) -> Any:
    """Import bitsandbytes; UserError, starting with `reason`, if it is not installed."""
    try:
        with without_notes():
            import bitsandbytes
    except ImportError as error:
        raise UserError(f"{reason}, which needs bitsandbytes: pip install 'minigad[qlora]'") from error
    return bitsandbytes
