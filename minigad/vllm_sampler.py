"""vLLM as the sampler: rollouts by an engine made for them, with the student's adapter loaded natively every step.

    student.sampler = VLLMSampler(config)

The engine holds its own copy of the base (a dequantised one where it cannot read the student's 4 bits: minigad.plain_base);
before each rollout the adapter is written to a folder and named to the engine (no merging). The engine's arithmetic is not the trainer's: its log-probabilities are kept, the mismatch is a metric
(sampling/logp_difference), and truncated importance weights correct for it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from minigad import parallel
from minigad.config import GADConfig, UserError
from minigad.model import LanguageModel
from minigad.plain_base import plain_base
from minigad.precision import settled
from minigad.rollout import Sampled, SamplingParams, up_to_end

__all__ = ["VLLMEngine", "VLLMSampler"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for the largest rank
PULSE = 0.2  # seconds between two looks at whether the engine's processes live


class VLLMSampler:
    """Samples with vLLM. A sampler for `Student.sampler`; close it, or use it as a context manager, to free the engine."""

    def __init__(
        self,
        config: GADConfig,
        engine: Callable[[GADConfig], Any] | None = None,
        student: LanguageModel | None = None,
    ) -> None:
        """Start the engine. `engine` replaces vLLM's own (tests); `student` has the base, of which one in 4 bits may need a copy.

        Raises UserError without vLLM, without an adapter, and where that copy is needed and cannot be made.
        """
        if config.lora_r == 0:
            raise UserError(
                "config field 'sampler' is 'vllm' but lora_r is 0: the engine is told of a step's weights by an adapter; "
                "set lora_r, say 16, or sample with 'transformers'"
            )
        if config.lora_r > RANKS[-1]:
            raise UserError(
                f"config field 'lora_r' is {config.lora_r} but vLLM's adapters end at rank {RANKS[-1]}; lower it, or sample with "
                "'transformers'"
            )
        self._start = engine or VLLMEngine
        with ExitStack() as stack:
            self.config = _readable(config, student, stack)
            self._engine: Any = self._first()
            folder = tempfile.TemporaryDirectory(prefix="minigad-vllm-", ignore_cleanup_errors=True)
            self._folder = Path(stack.enter_context(folder))
            self._delete = weakref.finalize(self, stack.pop_all().close)  # at exit, if not closed
        self._count = 0

    def _first(self) -> Any:
        try:
            return self._start(self.config)
        except UserError:
            raise
        except Exception as error:  # of whatever kind: not enough memory, a model or a dtype that it does not have
            raise UserError(
                f"the vLLM engine did not start ({_line(error)}); change its --vllm-gpu-memory-utilization, now "
                f"{self.config.vllm_gpu_memory_utilization:g}, if it is memory, or sample with --sampler transformers"
            ) from error

    def __call__(
        self, model: LanguageModel, prompt_ids: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Sampled]:
        """Sample with the model's adapter as it is now. An engine that dies is started again, once, for the same step."""
        adapter = self._write(model)
        try:
            return self._sample(model, prompt_ids, params, adapter)
        except Exception as error:
            if isinstance(error, UserError):
                raise
            print(f"minigad: the vLLM engine failed ({_line(error)}); starting it again", file=sys.stderr)
        try:
            self._engine = None  # the dead one goes first: two do not fit beside each other
            self._engine = self._start(self.config)
            return self._sample(model, prompt_ids, params, adapter)
        except Exception as error:
            raise UserError(
                f"the vLLM engine failed twice in one step ({_line(error)}); nothing of the step was used: run again with "
                "--resume, with less memory for the engine, or with --sampler transformers"
            ) from error

    def close(self) -> None:
        """Forget the engine and delete what was written for it: adapters, and the copy of a base."""
        self._engine = None
        self._delete()

    def __enter__(self) -> VLLMSampler:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close."""
        self.close()

    def _write(self, model: LanguageModel) -> Path:
        """Write the adapter under a name the engine has not seen: it caches by name. The one before is deleted."""
        shutil.rmtree(self._folder / str(self._count), ignore_errors=True)
        self._count += 1
        folder = self._folder / str(self._count)
        model.save_adapter(folder)
        return folder

    def _sample(
        self, model: LanguageModel, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, adapter: Path
    ) -> list[Sampled]:
        greedy, end = params.temperature == 0, model.tokenizer.eos_token_id
        num, copies = (
            (1, params.num_generations) if greedy else (params.num_generations, 1)
        )  # greedy ones are all the same
        wanted = {
            "n": num,
            "temperature": params.temperature,
            "top_p": 1.0,
            "top_k": 0,  # all
            "repetition_penalty": 1.0,
            "max_tokens": params.max_completion_length,
            "stop_token_ids": [end],
            "ignore_eos": True,  # or every end token of the model's generation settings would stop it too
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }
        # The engine gives completion k of a request the seed + k: N apart, no two completions of a step share their noise.
        first = params.seed + num * params.first_prompt
        requests = [wanted | {"seed": (first + num * i) % 2**31} for i in range(len(prompt_ids))]
        outputs = self._engine.generate([list(ids) for ids in prompt_ids], requests, str(adapter), self._count)
        assert len(outputs) == len(prompt_ids), (len(outputs), len(prompt_ids))
        return [up_to_end(ids, logprobs, end) for group in outputs for ids, logprobs in group * copies]


class VLLMEngine:
    """vLLM's offline engine on the student's base."""

    def __init__(self, config: GADConfig) -> None:
        """Load the base. Raises UserError without vLLM."""
        from minigad import hub

        LLM = _vllm().LLM
        room = config.max_prompt_length + config.max_completion_length
        before = set(multiprocessing.active_children())
        with _on_own_gpu():
            self._llm = LLM(
                model=str(hub.resolve(config.student)),
                dtype=settled(config).dtype,
                quantization=None if config.quantization == "none" else "bitsandbytes",
                enable_lora=True,
                max_lora_rank=next(rank for rank in RANKS if rank >= config.lora_r),
                max_model_len=room,
                gpu_memory_utilization=config.vllm_gpu_memory_utilization,
                enforce_eager=True,
                enable_prefix_caching=True,  # a prompt is read once for its N completions
                logprobs_mode="processed_logprobs",  # at the sampling temperature, as the loss needs them
                seed=config.seed,
                trust_remote_code=False,
            )
        self._processes = [one for one in multiprocessing.active_children() if one not in before]

    def generate(
        self, prompt_ids: list[list[int]], requests: list[dict[str, Any]], adapter: str, number: int
    ) -> list[list[tuple[list[int], list[float]]]]:
        """Return for each prompt its completions as (ids, log-probabilities). Raises RuntimeError if the engine's process dies."""
        from vllm import SamplingParams as Params
        from vllm.lora.request import LoRARequest

        outputs = self._while_alive(
            lambda: self._llm.generate(
                [{"prompt_token_ids": ids} for ids in prompt_ids],
                [Params(**request) for request in requests],
                lora_request=LoRARequest(f"student-{number}", number, adapter),
                use_tqdm=False,
            )
        )
        return [
            [
                (
                    list(one.token_ids),
                    [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)],
                )
                for one in output.outputs
            ]
            for output in outputs
        ]

    def _while_alive(self, work: Callable[[], Any]) -> Any:
        """Return work(), done in a thread: vLLM 0.32 waits for ever for an engine whose process was killed in the middle."""
        done: list[Any] = []
        failed: list[Exception] = []

        def run() -> None:
            try:
                done.append(work())
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True, name="minigad-vllm")
        thread.start()
        while thread.is_alive():
            thread.join(PULSE)
            dead = [f"{one.name}: exit code {one.exitcode}" for one in self._processes if not one.is_alive()]
            if dead and not done and not failed:
                raise RuntimeError(f"a process of the engine died ({', '.join(dead)})")
        if failed:
            raise failed[0]
        return done[0]


def _readable(config: GADConfig, student: LanguageModel | None, stack: ExitStack) -> GADConfig:
    """Return the configuration for the engine: where it reads no 4 bits, that of a dequantised copy, kept until `stack` closes."""
    if config.quantization == "none" or _reads_four_bits():
        return config
    if student is None:
        raise UserError("this vLLM reads no 4 bits and needs a copy of the base: VLLMSampler(config, student=student)")
    return config.replace(student=str(stack.enter_context(plain_base(student, config.output_dir))), quantization="none")


def _reads_four_bits() -> bool:
    """Say whether this vLLM has bitsandbytes' 4 bits still (0.32 has not)."""
    _vllm()
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return "bitsandbytes" in QUANTIZATION_METHODS


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise UserError("config field 'sampler' is 'vllm', which needs vLLM: pip install 'minigad[vllm]'") from error
    return vllm


@contextmanager
def _on_own_gpu() -> Iterator[None]:
    """Start this process's engine on this process's GPU: an engine takes the first that its environment shows it."""
    if parallel.world().size == 1 or not torch.cuda.is_available():
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible, mine = before.split(",") if before else None, torch.cuda.current_device()
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[mine] if visible else str(mine)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
