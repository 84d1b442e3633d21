"""What tests of the command line share: two small models on disk, and ways to run a command."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint
from mobiquant_compiler.cli import main
from tests.model_dirs import byte_llama, byte_tokenizer, save_plain

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_plain(tmp_path_factory.mktemp("plain") / "m"))


@pytest.fixture(scope="session")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = byte_llama()
    ids = torch.arange(128).view(4, 32) * 7 % 257
    mq.quantize_(model, mq.SliceConfig(floor={"*.down_proj": 2}), calibration=ids, budget=5)
    return str(checkpoint.save(model, tmp_path_factory.mktemp("elastic") / "c", tokenizer=byte_tokenizer()))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as info:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return int(info.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """Run something wrong; returns its one line."""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("mobiquant: ")]
        assert (code, len(lines)) == (2, 1), (code, out, err)
        assert "Traceback" not in err
        return lines[0]

    return call
