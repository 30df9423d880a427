"""Many processes, one run: `accelerate launch -m minigad distill ...`, the base replicated, a process a GPU.

Every process has prompts of its own; gradients are added up over all of them before each update, and since a loss is
divided by what the whole step holds (tokens, pairs), the update is that of one process with the whole batch. Weights stay
equal to the bit on all processes: they start equal, and every one applies the same sum. Process 0 alone writes.

Against one process the sums are only rounded otherwise. Adam can make more of it: where a gradient is nothing but rounding,
about 1e-9, it divides that by its own size and makes a step of up to the learning rate. With an epsilon above that size (1e-4
in tests/test_parallel.py) weights agree to 1e-5.

A base that is too large to replicate is sharded where accelerate's configuration says FSDP (configs/fsdp.yaml): every process
keeps its part of each frozen layer, and a layer is gathered for the moment of its work. Adapters stay whole. A pass then takes
all processes, so that each makes as many as the one with the most to do: see in_step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from minigad.config import UserError

__all__ = [
    "World",
    "add_gradients",
    "anyone",
    "combine",
    "in_step",
    "my_part",
    "shard",
    "sharded",
    "start",
    "total",
    "wait",
    "world",
]

Item = TypeVar("Item")
# A process that waits so long for another gives up. A dead one is noticed at once (gloo) or by the launcher.
PATIENCE = timedelta(minutes=30)
# Metrics that are shares of a sum over all processes, means over tokens, or extremes; of any other the plain mean.
SUMS = ("loss", "discriminator/loss", "sft_loss", "num_tokens", "tokens_per_second")
TOKEN_MEANS = ("entropy", "kl", "sampling/logp_difference", "sampling/importance_weight")
EXTREMES = {
    "completions/min_length": min,
    "completions/max_length": max,
    "discriminator/identical_text_gap": max,
    "step_time": max,
}


class World(NamedTuple):
    """Which process this is, of how many."""

    rank: int
    size: int


def start() -> World:
    """Join the other processes if a launcher started several (it sets WORLD_SIZE); return where this one stands."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        # Where it is on, as accelerate has it, transformers reads the weights in process 0 and leaves the others' empty.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return world()


def world() -> World:
    """Return this process's place; (0, 1) if it is alone."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World(0, 1)


def my_part(items: Sequence[Item]) -> Sequence[Item]:
    """Return this process's share of a step's batch: the r-th of equal slices."""
    rank, size = world()
    share, rest = divmod(len(items), size)
    assert rest == 0, f"{len(items)} items do not divide among {size} processes"
    return items[rank * share : (rank + 1) * share]


def wait() -> None:
    """Wait until all processes are here."""
    if world().size > 1:
        total(0.0)


def total(count: float) -> float:
    """Return the sum of a number over all processes, exact up to 2^53."""
    if world().size == 1:
        return count
    return _all_reduce(torch.tensor([float(count)], dtype=torch.float64)).item()


def sharded() -> bool:
    """Say whether the base is spread over the processes: accelerate's own configuration asks for FSDP by this variable."""
    return world().size > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(model: Any, device: torch.device) -> None:
    """Leave on each process its part of every decoder layer's frozen weights (torch's fully_shard), on `device`.

    Before any adapter is added: those stay whole. Embeddings, norm and LM head are replicated.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world().size,))
    model.requires_grad_(False)
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    model.to(device)


def anyone(mine: bool) -> bool:
    """Say whether a pass over the base is still to be made: by this process or, where the base is sharded, by any."""
    return total(float(mine)) > 0 if sharded() else mine


def in_step(items: Sequence[Item]) -> Iterator[tuple[Item, float]]:
    """Yield each item with weight 1 and, where the base is sharded, the first again with weight 0 until no process has more.

    What is made of an item of weight 0 must be made, and count for nothing.
    """
    left = [*items]
    while anyone(bool(left)):
        yield (left.pop(0), 1.0) if left else (items[0], 0.0)


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes; a weight without one on this process counts as zero."""
    if world().size == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = _all_reduce(torch.cat([grad.flatten().float() for grad in grads]))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def combine(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return a step's metrics over all processes: sums, extremes and means. Texts and phases are this process's."""
    if world().size == 1:
        return metrics
    everyone: list[Any] = [None] * world().size
    _guarded(lambda: dist.all_gather_object(everyone, {k: v for k, v in metrics.items() if k != "samples"}))

    def over_all(name: str) -> Any:
        values = [one[name] for one in everyone]
        if name in EXTREMES:
            return EXTREMES[name](values)
        if name in TOKEN_MEANS:
            weights = [one["num_tokens"] for one in everyone]
            return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
        return sum(values) if name in SUMS else sum(values) / len(values)

    numbers = {k for k, v in metrics.items() if isinstance(v, (int, float)) and k != "step"}
    return metrics | {name: over_all(name) for name in metrics if name in numbers}


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    device = torch.device("cuda") if dist.get_backend() == "nccl" else tensor.device
    tensor = tensor.to(device)
    _guarded(lambda: dist.all_reduce(tensor))
    return tensor


def _guarded(work: Any) -> None:
    """Say in one sentence that another process is gone; what it died of is in its own output."""
    try:
        work()
    except RuntimeError as error:
        rank, size = world()
        raise UserError(
            f"process {rank} of {size} lost another process of this run ({str(error).splitlines()[0][:120]}); look above for "
            "what that one died of, then run the same command with --resume"
        ) from error
