"""Hooks that are gone when what they watched is over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def removing(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks, given the handles that registering them returned, however the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
