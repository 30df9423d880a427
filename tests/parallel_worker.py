"""One process of tests/test_parallel.py: trains on its share and writes the weights that came out.

python tests/parallel_worker.py FOLDER KIND METHOD live|die|fsdp
"""

import os
import sys

import torch
from safetensors.torch import save_file

from minigad import parallel, rollout, train
from minigad.config import PRESETS
from minigad.discriminator import Discriminator
from minigad.student import Student
from minigad.toy.letters import letters_dataset, letters_tokenizer
from minigad.train import gad, soda, warmup

CONFIG = PRESETS["toy"].replace(
    max_completion_length=16,
    warmup_epochs=0.25,
    discriminator_sft_epochs=0.25,
    discriminator_warmup_steps=2,
    max_steps=3,
    num_generations=4,
    beta=0.01,
    sft_weight=0.1,
    dpo_epochs=0.25,
    # Adam divides by a gradient's own size: where that is nothing but rounding, the rate is what two sums may differ by.
    # A wrong factor would show in the metrics' gradient norms.
    warmup_learning_rate=1e-3,
    discriminator_sft_learning_rate=1e-3,
    max_grad_norm=1e6,
)


def on_a_base(base):
    """Return the changes with which the players are adapters on a real base, and whose rows need several passes."""
    shared = {"student": str(base), "discriminator_model": "", "discriminator_sft_epochs": 0.0, "lora_r": 4}
    return shared | {"token_budget": 44, "gradient_checkpointing": True, "warmup_epochs": 0.5, "max_prompt_length": 64}


def play(kind, batch, data, method="gad", **changes):
    """Return the weights after a short run, by player, and the last step's metrics."""
    config = CONFIG.replace(
        discriminator=kind, per_device_train_batch_size=batch, warmup_batch_size=8 * batch, **changes
    )
    student = Student.load(config, tokenizer=letters_tokenizer())
    if method == "soda":
        metrics = list(soda(student, data, config))[-1]
        return {f"student/{n}": p.detach() for n, p in student.parameters().items()}, metrics
    discriminator = Discriminator.load(config, student)
    list(warmup(student, discriminator, data, config))
    metrics = list(gad(student, discriminator, data, config))[-1]
    weights = {f"student/{n}": p.detach() for n, p in student.parameters().items()}
    return weights | {f"discriminator/{i}": p.detach() for i, p in enumerate(discriminator.parameters())}, metrics


def coarse_adam(parameters, learning_rate, config):
    """Take the place of make_optimizer: Adam for which a gradient of rounding's size is none.

    With its own epsilon, 1e-8, one weight of 8192 had gradients of -1.5e-9 (one process) and 2.8e-9 (two) beside a largest of
    2.8, made a third of a step of each, and ended 3.5e-4 from where it was; its layer followed by 2e-5.
    """
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, eps=1e-4)


def counted_passes():
    """Return counts that grow: passes that counted, that kept others company, and tokens sampled for nobody.

    Also see that half of a layer is kept here.
    """
    honest_steps, honest_shard, honest_advance = parallel.in_step, parallel.shard, rollout._Batch.advance
    seen = {"counted": 0, "company": 0, "silent": 0}

    def in_step(items):
        for item, weight in honest_steps(items):
            seen["counted" if weight else "company"] += 1
            yield item, weight

    def advance(self, tokens):
        seen["silent"] += len(tokens) == 0
        honest_advance(self, tokens)

    def shard(model, device):
        honest_shard(model, device)
        weight = model.base_model.layers[0].mlp.up_proj.weight
        assert weight.to_local().numel() * 2 == weight.numel(), weight

    parallel.in_step, parallel.shard, rollout._Batch.advance = in_step, shard, advance
    return seen


def die_after_a_step():
    """End this process, as a kill would, once its first step is done: the other has nothing left to load by then."""
    honest = parallel.combine

    def combine(metrics):
        honest(metrics)
        os._exit(1)

    parallel.combine = combine


def main():
    """Run as one of several processes; rank 1 may be told to die in the middle."""
    torch.set_num_threads(1)
    folder, kind, method, die = sys.argv[1:5]
    rank, size = parallel.start()
    if die == "die" and rank == 1:
        die_after_a_step()
    changes = on_a_base(f"{folder}/base") if die == "fsdp" else {}
    passes = counted_passes()
    if changes:
        train.make_optimizer = coarse_adam
    weights, metrics = play(kind, 4 // size, letters_dataset(128, 0), method, **changes)
    save_file({k: v.clone().contiguous() for k, v in weights.items()}, f"{folder}/{rank}.safetensors")
    with open(f"{folder}/{rank}.passes", "w") as file:
        file.write(repr(passes))
    if rank == 0:
        with open(f"{folder}/metrics.txt", "w") as file:
            file.write(repr({k: v for k, v in metrics.items() if isinstance(v, (int, float))}))


if __name__ == "__main__":
    main()
