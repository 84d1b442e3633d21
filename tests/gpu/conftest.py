"""Kernels on a device: emitted anew for each run, and memory poisoned before they write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _cache_and_poison(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Emit kernels into a directory of this run; what nothing writes is NaN or the largest integer."""
    directory: Path = tmp_path_factory.getbasetemp() / "kernels"
    monkeypatch.setenv("MOBIQUANT_CACHE", str(directory))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
