"""One elastic model and its checkpoint for all tests of a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint
from tests.checkpoint_cases import TOKENS, tiny_llama


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    model = tiny_llama()
    mq.quantize_(model, mq.SliceConfig(group=32, floor={"*.down_proj": 2}), calibration=TOKENS, budget=4.5)
    return model


@pytest.fixture(scope="module")
def saved(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))
