"""Fold a student's adapter into its base and write plain weights, for servers that take no adapters.

Merging is not free: the sum is rounded to the export's dtype, and a student that was trained on a 4-bit base is merged into
that base's own (dequantised) weights, since only to those does the adapter belong. `merging_loss` measures what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minigad.chat import Row
from minigad.checkpoint import whole_folder
from minigad.config import UserError
from minigad.model import LanguageModel, lora_layers, merged_linear, plain_weight
from minigad.quiet import progress_bars
from minigad.student import Student

__all__ = ["merge", "merging_loss"]


def merge(student: Student, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the student as a plain transformers folder in `dtype`. The student that is passed in is used up.

    W + scaling · B A in float32, rounded once. Raises UserError for a student without an adapter (save it as it is) and for
    a folder that is not empty.
    """
    folder = Path(folder)
    if student.adapter is None:
        raise UserError(
            "the student has no adapter to merge: all its weights were trained, and its folder is plain already"
        )
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"folder {str(folder)!r} is not empty; give another --out")
    base = student.model.get_base_model()
    for parent, name, layer in list(lora_layers(student.model)):
        setattr(parent, name, merged_linear(layer, student.adapter, dtype))
    for parent in list(base.modules()):  # 4-bit layers that had no adapter
        for name, child in list(parent.named_children()):
            if getattr(getattr(child, "weight", None), "quant_state", None) is not None:
                setattr(parent, name, _plain(child, dtype))
    _forget_quantisation(base)
    with whole_folder(folder) as work, progress_bars():
        base.to(dtype).save_pretrained(work)
        student.tokenizer.save_pretrained(work)


def merging_loss(before: torch.Tensor, merged: LanguageModel, rows: Sequence[Row]) -> dict[str, float]:
    """Compare log-probabilities (R, T) of rows before merging with the merged model's, at temperature 1, per token.

    logp_difference: mean of absolute differences; kl: mean of (before - merged), which on the student's own samples
    estimates KL(student || merged), nats a token.
    """
    tokens = sum(len(row.completion_ids) for row in rows)
    gap = before - merged.logprobs_of(rows)
    return {"logp_difference": gap.abs().sum().item() / tokens, "kl": gap.sum().item() / tokens}


def _plain(linear: Any, dtype: torch.dtype) -> torch.nn.Linear:
    weight = plain_weight(linear)
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    plain.bias = linear.bias
    return plain


def _forget_quantisation(model: Any) -> None:
    """A model that was loaded in 4 bits still calls itself quantised and refuses to be cast or saved as anything else."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = model.quantization_method = None
    model.is_loaded_in_4bit = False
