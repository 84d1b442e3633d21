"""Models small enough for every test: a plain transformer, and the architectures whose linears differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

VOCABULARY = 128
HIDDEN = 64


class Block(nn.Module):
    """Attention and gated MLP with seven linears, as in Llama; no positions, no dropout."""

    def __init__(self, hidden: int = HIDDEN, inner: int = 96, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=True)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = self._split(self.q_proj(h)), self._split(self.k_proj(h)), self._split(self.v_proj(h))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.o_proj(mixed.reshape(x.shape))
        h = self.norm2(x)
        return x + self.down_proj(silu(self.gate_proj(h)) * self.up_proj(h))


class TinyLM(nn.Module):
    """Embedding, blocks and a head that may be tied to the embedding; returns logits."""

    def __init__(self, layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(h)


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every matrix with columns of unequal size (plain noise leaves a router no choice), in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                spread = torch.exp(0.5 * torch.randn(parameter.shape[-1], generator=generator))
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) * spread)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_lm(layers: int = 2, tied: bool = False, seed: int = 0) -> TinyLM:
    """Return a transformer of plain torch modules, 7 linears a layer and a head."""
    return seeded(TinyLM(layers, tied), seed)


def tiny_mlp(seed: int = 0) -> nn.Module:
    """Return two linears of odd shape around an activation, one with bias."""
    return seeded(nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 33, bias=False)), seed)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Return random token ids."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def tiny_llama(layers: int = 2, tied: bool = True) -> nn.Module:
    """Return transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return seeded(LlamaForCausalLM(config))


def tiny_gpt2() -> nn.Module:
    """Return transformers' GPT-2: Conv1D, weights [in, out], biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return seeded(
        GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=1, n_head=2, n_positions=64))
    )


def tiny_bert() -> nn.Module:
    """Return transformers' BERT: every linear has a bias."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    return seeded(BertModel(config))


def tiny_t5() -> nn.Module:
    """Return transformers' T5, which reads ``wo.weight.dtype`` in its forward."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=32, d_ff=96, num_layers=1, num_heads=2)
    return seeded(T5ForConditionalGeneration(config))


def tiny_mixtral() -> nn.Module:
    """Return transformers' Mixtral: experts are 3-D parameters."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        max_position_embeddings=64,
    )
    return seeded(MixtralForCausalLM(config))


def with_rebuilt_weights(model: nn.Module, elastic: nn.Module) -> nn.Module:
    """Write the weights that all slices of `elastic` stand for into the plain `model` they were made from."""
    from mobiquant_compiler.linear import elastic_linears
    from mobiquant_compiler.packing import unpack
    from mobiquant_compiler.slices import reconstruct

    for name, linear in elastic_linears(elastic).items():
        spec, count = linear.spec, linear.spec.num_slices
        codes = unpack(linear.slices, spec, count)
        weight = reconstruct(codes, linear.scale.double(), linear.zero.double(), spec, count, torch.float64)
        plain = model.get_submodule(name)
        weight = weight[:, : linear.in_features]
        with torch.no_grad():
            plain.weight.copy_(weight.t() if type(plain).__name__ == "Conv1D" else weight)
    return model
