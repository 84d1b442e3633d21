"""Models by what a user writes on the command line: a directory of transformers, a checkpoint of ours, 'smollm2'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mobiquant_compiler import checkpoint, smollm2
from mobiquant_compiler.errors import BadOption, ModelMissing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Progress = Callable[[str, int, int], None]


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype that option ``--dtype`` names: "float32", "bfloat16" or "float16".

    Raises:
        BadOption: another name.
    """
    if name not in DTYPES:
        raise BadOption(where="command line", name="--dtype", got=name, wanted=f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, from this machine only.

    Args:
        source: A Hugging Face directory, a mobiquant checkpoint, or "smollm2" (see `smollm2`).
        dtype: Of what is not packed; as stored by default (float32 for smollm2).
        device: Where to.
        progress: Called with stage, done, total.

    Returns:
        The model in eval mode, and the tokenizer, None where the directory holds none.

    Raises:
        ModelError: nothing usable is there.
        CheckpointError: a damaged checkpoint.
    """
    device = torch.device(device or "cpu")
    if str(source) == "smollm2":
        model, tokenizer = smollm2.load(dtype or torch.float32, progress)
        return model.to(device), tokenizer
    path = Path(source)
    if not path.is_dir():
        raise ModelMissing(path=source, what="no such directory")
    if not (path / "config.json").is_file():
        raise ModelMissing(path=source, what="the directory has no config.json")
    if checkpoint.is_checkpoint(path):
        return checkpoint.load(path, device=device, dtype=dtype), _tokenizer(path)
    return _transformers(path, dtype).to(device), _tokenizer(path)


def _transformers(path: Path, dtype: torch.dtype | None) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as err:
        raise ModelMissing(path=path, what=f"transformers cannot load it ({_first_line(err)})") from err
    return model.eval()


def _tokenizer(path: Path) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as err:
        raise ModelMissing(path=path, what=f"its tokenizer cannot be loaded ({_first_line(err)})") from err


def _first_line(err: BaseException) -> str:
    return next((line.strip() for line in str(err).splitlines() if line.strip()), type(err).__name__)
