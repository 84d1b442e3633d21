"""Kernels in Triton's interpreter: only in a process that was started for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, where kernels would be compiled for a device."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    reason = pytest.mark.skip(reason="needs a process of its own with TRITON_INTERPRET=1 (make test-interpret)")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(reason)


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory):
    """Emit kernels into a directory of this run."""
    previous = os.environ.get("MOBIQUANT_CACHE")
    os.environ["MOBIQUANT_CACHE"] = str(tmp_path_factory.mktemp("kernels"))
    yield
    if previous is None:
        del os.environ["MOBIQUANT_CACHE"]
    else:
        os.environ["MOBIQUANT_CACHE"] = previous


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what `torch.empty` returns with NaN or the largest integer: what no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
