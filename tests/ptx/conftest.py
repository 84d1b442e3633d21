"""Kernels compiled for targets that need not be there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, where the interpreter stands in for the compiler."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    reason = pytest.mark.skip(reason="TRITON_INTERPRET=1: nothing is compiled in this process")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(reason)


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory):
    """Emit kernels into a directory of this run."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MOBIQUANT_CACHE", str(tmp_path_factory.mktemp("kernels")))
    yield
    patch.undo()
