"""Hooks that are gone when what they watched is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def removing(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks, given the handles that registering them returned, however the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input [tokens, K])`` at each forward of the modules within the block."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0].reshape(-1, args[0].shape[-1]))

    with removing([m.register_forward_pre_hook(hook(n)) for n, m in modules.items()]):
        yield
