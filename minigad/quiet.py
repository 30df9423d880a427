"""What the libraries say while they load and save that a run's reader cannot use: bars in log files, and two notes.

A note is hidden by its own words, and only while minigad calls the library. Everything else they say stays, and so do the
user's settings.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interactive", "progress_bars", "without_notes"]

# bitsandbytes on a CPU with avx512_bf16, at its first import: minigad keeps that kernel off, since it has no gradients
# (hub.keep_gradients).
KERNEL_LOGGER, KERNEL_NOTE = "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"
# peft reads, wherever it wraps a model, an attribute that transformers has renamed.
RENAMED_NOTE = "`is_gradient_checkpointing` is deprecated"


@contextmanager
def without_notes() -> Iterator[None]:
    """Hide the two notes that come with loading a model or its adapter; put filters and warnings back, whatever happens."""

    def wanted(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(KERNEL_NOTE)

    logger = logging.getLogger(KERNEL_LOGGER)
    logger.addFilter(wanted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", RENAMED_NOTE, FutureWarning)
            yield
    finally:
        logger.removeFilter(wanted)


@contextmanager
def progress_bars(wanted: bool = True) -> Iterator[None]:
    """Hide the libraries' bars where they are not wanted or would fill a log file; a choice made in the environment stands.

    transformers' bar of the GGUF conversion is not under its own switch and stays: one line, once a machine.
    """
    from huggingface_hub import constants
    from transformers.utils import logging as switches

    chosen = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None  # the client warns if told otherwise
    hide = switches.is_progress_bar_enabled() and not chosen and not (wanted and interactive())
    if hide:
        switches.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            switches.enable_progress_bar()


def interactive() -> bool:
    """Say whether somebody watches: stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()
