"""Seeing what elastic linears do while a model runs eagerly: the slice counts they used, their inputs and outputs.

`MobiLinear` calls one op that routes and multiplies. Here that op is taken apart while it runs: `route` first, then
`routed_linear` with the counts that came out, which is what the op means (`reference`). So the counts that are seen are
those that were used, and nothing here knows which kind of router chose them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mobiquant_compiler.budgets import linears_of
from mobiquant_compiler.linear import MobiLinear
from mobiquant_compiler.ops import OPS


@dataclass(frozen=True)
class Call:
    """One call of an elastic linear.

    Attributes:
        name: Of the linear in its model.
        linear: The module.
        x: Its input [..., K].
        counts: Slice counts that the router chose, int32 [...].
        arguments: Of `elastic_linear`, by the names of its schema.
    """

    name: str
    linear: MobiLinear
    x: Tensor
    counts: Tensor
    arguments: Mapping[str, Any]

    def multiply(self, counts: Tensor | int) -> Tensor:
        """Return what the linear gives with these slice counts, [...] or one for all tokens; [..., N]."""
        if not isinstance(counts, Tensor):
            counts = torch.full_like(self.counts, counts)
        return _call(OPS.routed_linear.default, {**self.arguments, "counts": counts})

    def route(self, thresholds: Tensor) -> Tensor:
        """Return the slice counts that the router chooses under other thresholds, int32 [...]; nothing is recorded."""
        hist = torch.zeros_like(self.arguments["hist"])
        return _call(OPS.route.default, {**self.arguments, "thresholds": thresholds, "hist": hist})


Observer = Callable[[Call], Tensor | None]


def _names(op: Any) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


def _call(op: Any, arguments: Mapping[str, Any]) -> Any:
    return op(*(arguments[name] for name in _names(op)))


class _Watch(TorchFunctionMode):
    """Replaces `elastic_linear` by its parts for the linears that are watched."""

    def __init__(self, linears: Mapping[str, MobiLinear], observer: Observer) -> None:
        super().__init__()
        self.observer = observer
        self.named = {id(linear.slices): (name, linear) for name, linear in linears.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not OPS.elastic_linear.default:
            return func(*args, **(kwargs or {}))
        arguments = dict(zip(_names(func), args, strict=True))
        found = self.named.get(id(arguments["slices"]))
        if found is None:
            return func(*args)
        counts = _call(OPS.route.default, arguments)
        call = Call(*found, arguments["x"], counts, arguments)
        y = self.observer(call)
        return call.multiply(counts) if y is None else y


@contextmanager
def watch_linears(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Within the block, show every call of an elastic linear of `model` to `observer`.

    Compiled code runs eagerly meanwhile: inside a graph there is no single linear to be seen.

    Args:
        model: Elastic model.
        observer: Called with each `Call`. What it returns becomes the linear's output; None leaves the linear to give
            what it gives with the counts that its router chose.

    Raises:
        NotElastic: the model has no elastic linear.
    """
    with _Watch(linears_of(model, "watch_linears"), observer), torch.compiler.set_stance("force_eager"):
        yield
