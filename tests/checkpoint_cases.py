"""Checkpoints to test with: a model small enough to save in every test, and ways to damage what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = torch.arange(64).view(4, 16) * 7 % 97
Q_PROJ = "model.layers.0.self_attn.q_proj"


def tiny_llama(layers: int = 2, hidden: int = 64, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def edit_config(directory: Path, change: dict) -> None:
    """Change fields of quantization_config, by dotted path."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for dotted, value in change.items():
        *parents, last = dotted.split("/")
        target = config["quantization_config"]
        for key in parents:
            target = target[int(key) if isinstance(target, list) else key]
        target[last] = value
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of the one shard; None takes one out."""
    path = directory / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()} | change
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, path, {"format": "pt"})


def stored(directory: Path, name: str) -> torch.Tensor:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return file.get_tensor(name)
