"""Blocks of a model on the computing device one at a time, so that memory there does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_ABSENT = object()


class Residency:
    """Which block is on the computing device.

    Attributes:
        home: Where the blocks are otherwise.
        device: Where they compute.
        here: The block that is on the device.
    """

    def __init__(self, home: torch.device, device: torch.device) -> None:
        self.home, self.device = home, device
        self.here: nn.Module | None = None

    def bring(self, block: nn.Module) -> None:
        """Put a block onto the device, and the one that is there back home before: they may share modules."""
        if self.here is not block:
            self.leave()
        block.to(self.device)  # all of it, also what was put into it while it was there
        self.here = block

    def leave(self) -> None:
        """Put the block that is on the device back home."""
        if self.here is not None:
            self.here.to(self.home)
        self.here = None


@contextmanager
def one_at_a_time(model: nn.Module, blocks: Sequence[str], device: torch.device | str | None) -> Iterator[Residency]:
    """Let a model compute on a device on which only one of its blocks is at a time, and what lies outside of them.

    A block comes when it is called. With gradients its activations are not kept but computed again, which brings it
    back: a graph would keep the weights of all blocks on the device. At the end everything is where it was.

    Args:
        model: On one device.
        blocks: Names of its blocks.
        device: Where to compute; None, or where the model is: nothing moves.

    Yields:
        The residency, for what is done with a block between its calls.
    """
    home = next(model.parameters()).device
    residency = Residency(home, home if device is None else torch.device(device))
    if residency.device == home:
        yield residency
        return
    held = [model.get_submodule(name) for name in blocks]
    inside = {id(module) for block in held for module in block.modules()}
    rest = [module for module in model.modules() if id(module) not in inside]
    before = [block.__dict__.get("forward", _ABSENT) for block in held]
    for block in held:
        block.forward = _coming(block, residency)
    try:
        _move(rest, residency.device)
        yield residency
    finally:
        for block, forward in zip(held, before, strict=True):
            del block.forward
            if forward is not _ABSENT:
                block.forward = forward
        residency.leave()
        for name in blocks:  # what took the place of a block has never left the device
            model.get_submodule(name).to(home)
        _move(rest, home)


def _coming(block: nn.Module, residency: Residency) -> Any:
    """Return the forward of a block that comes to the device for it."""
    forward = block.forward

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        residency.bring(block)
        return forward(*args, **kwargs)

    @wraps(forward)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return outer


def _move(modules: Sequence[nn.Module], device: torch.device) -> None:
    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    for module in modules:
        module._apply(there, recurse=False)
