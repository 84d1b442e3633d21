"""Save an elastic language model, load it straight into packed buffers, and generate at a budget that moves.

    python examples/checkpoint_and_generate.py [smollm2 | DIRECTORY]

Without an argument it makes a tiny random Llama, so that it runs anywhere in seconds (and speaks nonsense).
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch

import mobiquant_compiler as mq
from mobiquant_compiler.generation import Schedule, stream
from mobiquant_compiler.models import load_model


def random_llama() -> Any:
    """Return a Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=512, **sizes)).eval()


def main() -> None:
    """Quantize, save, load, generate."""
    if len(sys.argv) > 1:
        model, tokenizer = load_model(sys.argv[1])
        prompt = torch.tensor([tokenizer("The capital of France is").input_ids])
    else:
        model, tokenizer, prompt = random_llama(), None, torch.arange(8).unsqueeze(0)
    print(mq.quantize_(model, calibration=prompt))
    with tempfile.TemporaryDirectory() as folder:
        mq.save(model, f"{folder}/elastic", tokenizer=tokenizer)
        loaded = mq.load(f"{folder}/elastic")
    tokens = list(stream(loaded, prompt, max_new_tokens=16, schedule=Schedule.parse("0:8,8:4")))
    print(tokenizer.decode(tokens) if tokenizer else tokens)
    print(f"{mq.achieved_bits(loaded):.2f} bits a weight on average")


if __name__ == "__main__":
    main()
