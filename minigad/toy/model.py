"""The toy student: a tokenizer of characters and a tiny Llama, built in code, no download.

They are the same transformers classes that a real student has, so that every line of the library that runs on a
real model runs on the toy.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["TOY_SIZES", "toy_model", "toy_tokenizer"]

# name -> (layers, width)
TOY_SIZES = {"toy": (1, 32), "toy-large": (2, 48)}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTROL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def toy_tokenizer(alphabet: str = "") -> Any:
    """Build a character tokenizer over `alphabet`; with none given, one over bytes, which can spell any text.

    Returns a PreTrainedTokenizerFast with a chat template, `<|pad|>` and the end token `<|end|>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(set(alphabet)) or sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    if not alphabet:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=CONTROL_TOKENS[2:],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def toy_model(name: str, tokenizer: Any, seed: int) -> Any:
    """Build the LlamaForCausalLM of that name ("toy" or "toy-large") with random weights that depend on `seed` alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width = TOY_SIZES[name]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()
