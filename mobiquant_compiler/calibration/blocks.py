"""The blocks of a model as a chain: what goes into the first, and one block run at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from mobiquant_compiler.calibrate import Loss
from mobiquant_compiler.errors import NoBlocks
from mobiquant_compiler.hooks import removing


class _Reached(Exception):  # a signal, not an error
    """The first block is reached: the rest of the model need not run."""


def find_blocks(model: nn.Module, linears: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the blocks that hold the linears: the entries of one ModuleList, in order.

    Raises:
        NoBlocks: no ModuleList holds a linear, or linears lie outside the one that holds most of them.
    """
    where = type(model).__name__
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    held = {name: [n for n in linears if n.startswith(f"{name}.")] for name in lists}
    best = max(held, key=lambda name: len(held[name]), default="")
    if not held.get(best):
        raise NoBlocks(model=where, what="no ModuleList holds a linear")
    outside = [name for name in linears if name not in held[best]]
    if outside:
        raise NoBlocks(model=where, what=f"{outside[0]} lies outside {best}; exclude it, or it cannot be calibrated")
    return [f"{best}.{i}" for i in range(len(model.get_submodule(best)))]  # type: ignore[arg-type]


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Run a model of transformers without its key and value cache."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before  # type: ignore[union-attr]


class Chain:
    """Hidden states on their way through the blocks, one block after the other.

    Attributes:
        states: Hidden states [1, length, hidden] of each window, at the input of the next block.
    """

    def __init__(self, model: nn.Module, blocks: list[str], tokens: Tensor, loss: Loss) -> None:
        self.blocks = [model.get_submodule(name) for name in blocks]
        with torch.no_grad(), without_cache(model):
            self._extra = _record_calls(model, self.blocks, tokens[:1], loss)
            self.states = [_first_input(model, self.blocks[0], window.unsqueeze(0), loss) for window in tokens]

    def run(self, index: int, *, advance: bool) -> None:
        """Run one block over all windows, and keep its outputs as the next block's inputs if `advance`."""
        args, kwargs = self._extra[index]
        with torch.no_grad():
            for i, state in enumerate(self.states):
                output = first_output(self.blocks[index](state, *args, **kwargs))
                if advance:
                    self.states[i] = output


def first_output(output: Any) -> Tensor:
    """Return the hidden states of what a block returned: itself, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _record_calls(
    model: nn.Module, blocks: list[nn.Module], window: Tensor, loss: Loss
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return what each block is called with beside hidden states, and make sure that the blocks are a chain."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    before: list[Any] = []
    where = type(model).__name__

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args or not isinstance(args[0], Tensor) or (before and not torch.equal(before[0], args[0])):
            what = f"block {len(calls)} is not fed the output of the block before as its first argument"
            raise NoBlocks(model=where, what=what)
        calls.append((args[1:], kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        before[:] = [first_output(output)]

    handles: list[Any] = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(leave) for b in blocks]
    with removing(handles):
        loss(model, window)
    if len(calls) != len(blocks):
        raise NoBlocks(model=where, what=f"{len(calls)} calls of {len(blocks)} blocks in a forward pass")
    return calls


def _first_input(model: nn.Module, block: nn.Module, window: Tensor, loss: Loss) -> Tensor:
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    with removing([block.register_forward_pre_hook(stop)]), suppress(_Reached):
        loss(model, window)
    return found[0]


@contextmanager
def watched(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input [tokens, K])`` at each forward of the modules within the block."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0].reshape(-1, args[0].shape[-1]))

    with removing([m.register_forward_pre_hook(hook(n)) for n, m in modules.items()]):
        yield
