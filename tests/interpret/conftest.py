"""Kernels in Triton's interpreter: only in a process that was started for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, where kernels would be compiled for a device."""
    if INTERPRETING:
        return
    reason = pytest.mark.skip(reason="needs a process of its own with TRITON_INTERPRET=1 (make test-interpret)")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(reason)


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Emit kernels into a directory of this run."""
    previous = os.environ.get("MOBIQUANT_CACHE")
    os.environ["MOBIQUANT_CACHE"] = str(tmp_path_factory.mktemp("kernels"))
    yield
    if previous is None:
        del os.environ["MOBIQUANT_CACHE"]
    else:
        os.environ["MOBIQUANT_CACHE"] = previous


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN or the largest integer: what no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _faster_interpreter() -> Iterator[None]:
    """Leave out two thirds of what Triton's interpreter does; a Triton without these names is slower, no more.

    It patches triton.language at every call of a device function, though a launch has done so already, and computes
    every sum and product of integers twice to see whether it overflows (`checked_overflow` asks for that).
    """
    if not INTERPRETING:
        yield
        return
    from triton.runtime import interpreter

    patched = pytest.MonkeyPatch()
    patch_language = getattr(interpreter, "_patch_lang", None)
    if patch_language is not None:
        seen: set[str] = set()

        def at_launch(function: Callable[..., Any]) -> Any:
            seen.clear()
            return patch_language(function)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.fn.__module__ not in seen:
                patch_language(self.fn)
                seen.add(self.fn.__module__)
            return self.rewrite()(*args, **kwargs)

        patched.setattr(interpreter, "_patch_lang", at_launch)
        patched.setattr(interpreter.InterpretedFunction, "__call__", call)
    _check_overflow(False)
    yield
    _check_overflow(True)
    patched.undo()


@pytest.fixture
def checked_overflow() -> Iterator[None]:
    """Fail where an integer does not fit its type."""
    _check_overflow(True)
    yield
    _check_overflow(False)


def _check_overflow(check: bool) -> None:
    from triton.runtime import interpreter

    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", check)  # a frozen dataclass
