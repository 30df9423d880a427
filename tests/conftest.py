"""Shared by all tests: one thread, since several test processes on two cores would otherwise fight for them."""

import signal

import torch

torch.set_num_threads(1)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores Ctrl-C, and so would its children


def tiny_config(**changes):
    """Return a configuration of a LoRA player on a tiny Llama."""
    from minigad.config import GADConfig

    settings = {
        "lora_r": 4,
        "lora_alpha": 16,
        "max_prompt_length": 64,
        "max_completion_length": 12,
        "token_budget": 4096,
    }
    return GADConfig(**(settings | changes))


def tiny_folder(folder, layers=2, seed=0):
    """Write a tiny Llama of random weights, with a tokenizer of bytes, as a folder that transformers can load."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from minigad.toy.model import toy_tokenizer

    tokenizer = toy_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_reader(folder):
    """Write a tiny BERT with a tokenizer of bytes, as a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(symbols), max_position_embeddings=160, hidden_dropout_prob=0.0, **shape)
    config.attention_probs_dropout_prob = 0.0
    BertModel(config).save_pretrained(folder)
    return folder


def shake(model, scale=0.05):
    """Give an adapter weights that matter: a fresh one has B = 0 and is the base."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.device))
