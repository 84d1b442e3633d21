"""The blocks of a model as a chain: what goes into the first, and one block run at a time.

What changes the weights of one block after the other needs each block's inputs behind the blocks already changed. They
are caught in one pass over the calibration windows; after that only the block at hand runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mobiquant_compiler.errors import NoBlocks
from mobiquant_compiler.hooks import removing

Forward = Callable[[nn.Module, Tensor], Any]  # runs a model on ids [1, length]
_TOLERANCE = 1e-3  # relative error of a token's hidden states; and twice the rounding of narrower dtypes


# --- which blocks ------------------------------------------------------------------------------------


def find_blocks(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """Return the names of the entries of the ModuleList that holds most of the linears, in order; none without."""
    linears = list(linears)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    held = {name: len(members(name, linears)) for name in lists}
    best = max(held, key=lambda name: held[name], default="")  # of nested ones with as many, the outermost
    if not held.get(best):
        return []
    return [f"{best}.{i}" for i in range(len(model.get_submodule(best)))]  # type: ignore[arg-type]


def blocks_of_all(model: nn.Module, linears: Sequence[str]) -> list[str]:
    """Return the names of the blocks as `find_blocks` does, where they hold every linear.

    Raises:
        NoBlocks: no ModuleList holds a linear, or linears lie outside the one that holds most of them.
    """
    where, blocks = type(model).__name__, find_blocks(model, linears)
    if not blocks:
        raise NoBlocks(model=where, what="no ModuleList holds a linear")
    home = blocks[0].rpartition(".")[0]
    inside = set(members(home, linears))
    outside = [name for name in linears if name not in inside]
    if outside:
        raise NoBlocks(model=where, what=f"{outside[0]} lies outside {home}; exclude it, or it cannot be calibrated")
    return blocks


def members(block: str, linears: Iterable[str]) -> list[str]:
    """Return those of the linears that a block holds, or that it is itself."""
    return [name for name in linears if name == block or name.startswith(f"{block}.")]


# --- the chain ---------------------------------------------------------------------------------------


class Chain:
    """Hidden states on their way through the blocks, one block after the other.

    Attributes:
        blocks: Names of the blocks. A module that takes the place of one of them is what runs from then on.
        states: Hidden states [1, length, hidden] of each window, at the input of the next block.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], windows: Tensor, forward: Forward) -> None:
        """Run all windows through the model and keep what the first block got, and what each got besides.

        Args:
            model: In eval mode.
            blocks: As of `find_blocks`.
            windows: Ids [count, length], on the model's device.
            forward: How a window is run.

        Raises:
            NoBlocks: the blocks are no chain: one is not fed the output of the one before, runs more than once or not
                at all, or run alone does not give what it gave inside the model.
        """
        self.model, self.blocks = model, list(blocks)
        self.states: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        with torch.no_grad(), without_cache(model):
            for window in windows:
                seen = self._seen(window.unsqueeze(0), forward)
                if not self._calls:
                    self._check_alone(seen)
                self.states.append(seen.inputs)
                like = self._calls[0] if self._calls else seen.calls
                self._calls.append([call.sharing(first) for call, first in zip(seen.calls, like, strict=True)])

    def run(self, index: int, *, advance: bool) -> None:
        """Run one block over all windows, and keep its outputs as the next block's inputs if `advance`."""
        block = self.model.get_submodule(self.blocks[index])
        with torch.no_grad():
            for i, (state, calls) in enumerate(zip(self.states, self._calls, strict=True)):
                output = first_output(calls[index].repeat(block, state))
                if advance:
                    self.states[i] = output

    def _seen(self, window: Tensor, forward: Forward) -> _Seen:
        modules = [self.model.get_submodule(name) for name in self.blocks]
        seen = _Seen()
        handles: list[Any] = [b.register_forward_pre_hook(seen.enter, with_kwargs=True) for b in modules]
        handles += [b.register_forward_hook(seen.leave) for b in modules]
        with removing(handles):
            forward(self.model, window)
        if len(seen.calls) != len(modules):
            self._refuse(f"{len(seen.calls)} calls of {len(modules)} blocks in a forward pass")
        if any(called is not module for called, module in zip(seen.order, modules, strict=True)):
            self._refuse("its blocks do not run in their order")
        if seen.first is None:
            self._refuse("block 0 is fed no tensor")
        if seen.strangers:
            self._refuse(f"block {seen.strangers[0]} is not fed the output of the block before")
        if len(seen.outputs) != len(modules):
            self._refuse(f"block {len(modules) - 1} gives no tensor")
        return seen

    def _check_alone(self, seen: _Seen) -> None:
        """Make sure that each block, run alone on what it was seen to get, gives what it gave in the model."""
        state = seen.inputs
        for index, (module, call, expected) in enumerate(zip(seen.order, seen.calls, seen.outputs, strict=True)):
            try:
                found = first_output(call.repeat(module, state))
            except (TypeError, ValueError, RuntimeError) as err:  # it needs more than it was seen to get
                self._refuse(f"block {index} cannot be run alone ({type(err).__name__}: {err})", err)
            if not _reproduced(found, expected):
                self._refuse(f"block {index} run alone does not give what it gives inside the model")
            state = expected

    def _refuse(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise NoBlocks(model=type(self.model).__name__, what=what) from cause


@dataclass(frozen=True, slots=True)
class _Call:
    """What a block is called with beside hidden states: those come first, or as the keyword `name`."""

    name: str | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def repeat(self, block: nn.Module, state: Tensor) -> Any:
        """Call a block on hidden states."""
        state = state.clone()  # some blocks write to their input, and it is needed again
        if self.name is None:
            return block(state, *self.args, **self.kwargs)
        return block(**{self.name: state}, **self.kwargs)

    def sharing(self, other: _Call) -> _Call:
        """Return an equal call that holds the tensors of `other` where its own are the same: masks are large."""
        return _Call(self.name, _sharing(self.args, other.args), _sharing(self.kwargs, other.kwargs))


def _sharing(value: Any, other: Any) -> Any:
    if isinstance(value, Tensor):
        return other if _same(value, other) else value
    if type(value) is tuple and type(other) is tuple and len(value) == len(other):
        return tuple(_sharing(a, b) for a, b in zip(value, other, strict=True))
    if type(value) is dict and type(other) is dict:
        return {key: _sharing(part, other.get(key)) for key, part in value.items()}
    return value


class _Seen:
    """The calls of the blocks in one pass through the model."""

    def __init__(self) -> None:
        self.order: list[nn.Module] = []
        self.calls: list[_Call] = []
        self.first: Tensor | None = None  # hidden states at the first block
        self.outputs: list[Tensor] = []
        self.strangers: list[int] = []  # calls on something else than the output of the call before

    @property
    def inputs(self) -> Tensor:
        """Hidden states at the first block."""
        assert self.first is not None, "refused without"
        return self.first

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call, before the block can write to its arguments."""
        name = None if args else next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
        state = kwargs[name] if name is not None else args[0] if args else None
        if not self.calls:
            self.first = state.detach().clone() if isinstance(state, Tensor) else None
        elif len(self.outputs) != len(self.calls) or not _same(self.outputs[-1], state):
            self.strangers.append(len(self.calls))
        self.order.append(module)
        self.calls.append(_Call(name, args[1:], {key: value for key, value in kwargs.items() if key != name}))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note what it gave, before the model can write to it."""
        output = first_output(output)
        if isinstance(output, Tensor):
            self.outputs.append(output.detach().clone())


def first_output(output: Any) -> Any:
    """Return the hidden states of what a block returned: itself, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def _same(a: Tensor, b: Any) -> bool:
    """Say whether two tensors hold the very same values; NaN is one."""
    if a is b:
        return True
    alike = isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _reproduced(found: Any, expected: Tensor) -> bool:
    """Say whether each token's hidden states came out as expected; what is not finite is not compared."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    wanted = expected.float().norm(dim=-1)
    tolerance = max(_TOLERANCE, 2 * torch.finfo(expected.dtype).eps)
    close = (found - expected).float().norm(dim=-1) <= tolerance * wanted
    return bool((close | ~wanted.isfinite()).all())


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
