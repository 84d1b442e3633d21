"""Directories as users have them, made on the spot: a tiny Llama with a byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models_tiny import seeded

END = "<|end|>"


def byte_tokenizer() -> Any:
    """Return a tokenizer of 256 byte tokens and an end token: any text can be written in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0} | {char: i for i, char in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def byte_llama(layers: int = 1) -> Any:
    """Return a tiny Llama for `byte_tokenizer`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return seeded(LlamaForCausalLM(config))


def save_plain(directory: Path, layers: int = 1) -> Path:
    """Write model and tokenizer as transformers does."""
    byte_llama(layers).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory
