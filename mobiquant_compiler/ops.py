"""The ops of namespace ``mobiquant``: schema, fake, and the CPU and any-device implementations.

`reference` is their semantics; CUDA kernels are registered by `wiring`. They are defined through
`torch.library.Library`, whose Python implementations dispatch in less than half the time of `custom_op`
(`benchmarks/bench_dispatch.py`): it counts at two hundred linears a token. No autograd: slices are not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from mobiquant_compiler import cpu, reference
from mobiquant_compiler.errors import BadInput
from mobiquant_compiler.spec import MAX_SIBLINGS, Activation, Layout, Prefill, SliceSpec

NAMESPACE = "mobiquant"
# No defaults: torch leaves trailing arguments out where they equal them, and implementations read theirs from the end.
_SPEC = "int[] widths, int group, str layout, str activation, str prefill"
_WEIGHT = f"Tensor slices, Tensor scale, Tensor zero, Tensor? bias, {_SPEC}"
_WEIGHTS = f"Tensor[] slices, Tensor[] scale, Tensor[] zero, Tensor?[] bias, {_SPEC}"
_ROUTER = "Tensor[] router, Tensor thresholds, Tensor(a!) hist, Tensor mask, str kind"
_SIBLINGS = range(2, MAX_SIBLINGS + 1)
SCHEMAS = {
    "route": f"(Tensor x, {_ROUTER}, str prefill) -> Tensor",
    "gather": "(Tensor x, Tensor counts, int num_slices) -> (Tensor, Tensor, Tensor)",
    "slice_gemm": f"(Tensor x, Tensor offsets, {_WEIGHT}) -> Tensor",
    "scatter": "(Tensor y, Tensor rows, Tensor counts) -> Tensor",
    "routed_linear": f"(Tensor x, Tensor counts, {_WEIGHT}) -> Tensor",
    "elastic_linear": f"(Tensor x, {_ROUTER}, {_WEIGHT}) -> Tensor",
    "routed_linears": f"(Tensor x, Tensor counts, {_WEIGHTS}) -> Tensor[]",
    # For calls by hand, of any number of linears. torch cannot functionalize an op that writes to an argument and
    # returns a list, so graphs have the overloads below, one a number; called by hand without this one, torch would
    # take the first of them, and crash where that has another number of results.
    "elastic_linears": f"(Tensor x, {_ROUTER}, {_WEIGHTS}) -> Tensor[]",
    **{
        f"elastic_linears.n{n}": f"(Tensor x, {_ROUTER}, {_WEIGHTS}) -> ({', '.join(n * ['Tensor'])})"
        for n in _SIBLINGS
    },
}

LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@lru_cache(maxsize=256)
def _spec(
    widths: tuple[int, ...], group: int, layout: str, activation: str, prefill: str
) -> tuple[SliceSpec, Activation, Prefill]:
    return SliceSpec(widths, group, Layout(layout)), Activation.of(activation, NAMESPACE), _prefill(prefill)


@lru_cache(maxsize=8)
def _prefill(prefill: str) -> Prefill:
    return Prefill.of(prefill, NAMESPACE)


def check_input(x: Tensor, columns: int, where: str) -> None:
    """Refuse activations that are no floating-point numbers [..., columns], by dtype and shape alone.

    Raises:
        BadInput: the message starts with `where`.
    """
    if x.is_floating_point() and x.dim() and x.shape[-1] == columns:
        return
    raise BadInput(where=where, dtype=x.dtype, got=tuple(x.shape), wanted=f"[..., {columns}]")


def check_routed(x: Tensor, router: Sequence[Tensor]) -> None:
    """Refuse activations that a router does not know: the first tensor of every kind has an entry a column.

    Raises:
        BadInput: as `check_input`.
    """
    check_input(x, router[0].shape[0], NAMESPACE)


def takes_spec(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an implementation that ends in spec, activation and prefill be called as the schemas of linears end."""

    @wraps(function)
    def call(*args: Any) -> Any:
        *rest, widths, group, layout, activation, prefill = args
        return function(*rest, *_spec(tuple(widths), group, layout, activation, prefill))

    return call


def takes_prefill(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let an implementation that ends in a `Prefill` be called with a string."""

    @wraps(function)
    def call(*args: Any) -> Tensor:
        return function(*args[:-1], _prefill(args[-1]))

    return call


def elastic_by(route: Callable[..., Tensor], multiply: Callable[..., Any]) -> Callable[..., Any]:
    """Make `elastic_linear` from a route and a routed_linear (or the plural of both), schema arguments in and out."""

    def elastic(
        x: Tensor, router: Sequence[Tensor], thresholds: Tensor, hist: Tensor, mask: Tensor, kind: str, *weight: Any
    ) -> Any:
        check_routed(x, router)
        *tensors, widths, group, layout, activation, prefill = weight
        spec = _spec(tuple(widths), group, layout, activation, prefill)
        counts = route(x, router, thresholds, hist, mask, kind, spec[-1])
        return multiply(x, counts, *tensors, *spec)

    return elastic


def _fake_route(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int32)


def _fake_gather(x: Tensor, counts: Tensor, num_slices: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = counts.numel()
    rows = counts.new_empty(tokens)
    return rows, counts.new_empty(num_slices + 1), x.new_empty(tokens, x.shape[-1])


def _fake_slice_gemm(x: Tensor, offsets: Tensor, slices: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], slices.shape[1])


def _fake_scatter(y: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    return y.new_empty(*counts.shape, y.shape[-1])


def _fake_routed_linear(x: Tensor, counts: Tensor, slices: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], slices.shape[1])


def _fake_routed_linears(x: Tensor, counts: Tensor, slices: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[1]) for weight in slices]


def _fake_elastic(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make the fake of an op with a router's five arguments in the place of `counts`."""

    def elastic(x: Tensor, router: Sequence[Tensor], *rest: Any) -> Any:
        check_routed(x, router)
        return fake(x, None, *rest[4:])

    return elastic


_FAKES: dict[str, Callable[..., Any]] = {
    "route": _fake_route,
    "gather": _fake_gather,
    "slice_gemm": _fake_slice_gemm,
    "scatter": _fake_scatter,
    "routed_linear": _fake_routed_linear,
    "elastic_linear": _fake_elastic(_fake_routed_linear),
    "routed_linears": _fake_routed_linears,
    "elastic_linears": _fake_elastic(lambda *args: tuple(_fake_routed_linears(*args))),
}
# Any device: the references themselves. CPU: the same functions where nothing can be gained.
_REFERENCES: dict[str, Callable[..., Any]] = {
    "route": takes_prefill(reference.route),
    "gather": reference.gather,
    "slice_gemm": takes_spec(reference.slice_gemm),
    "scatter": reference.scatter,
    "routed_linear": takes_spec(reference.routed_linear),
    "elastic_linear": elastic_by(reference.route, reference.routed_linear),
    "routed_linears": takes_spec(reference.routed_linears),
    "elastic_linears": elastic_by(reference.route, reference.routed_linears),
}
_CPU: dict[str, Callable[..., Any]] = {
    "route": takes_prefill(cpu.route),
    "slice_gemm": takes_spec(cpu.slice_gemm),
    "routed_linear": takes_spec(cpu.routed_linear),
    "elastic_linear": elastic_by(cpu.route, cpu.routed_linear),
    "routed_linears": takes_spec(cpu.routed_linears),
    "elastic_linears": elastic_by(cpu.route, cpu.routed_linears),
}


def implement(implementations: Mapping[str, Callable[..., Any]], key: str) -> None:
    """Register implementations of ops by name for a dispatch key; one serves all overloads of its op."""
    for name in SCHEMAS:
        function = implementations.get(_op_name(name))
        if function is not None:
            LIBRARY.impl(name, function, key)


def _op_name(name: str) -> str:
    return name.partition(".")[0]


def _register() -> None:
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Results carry no gradient: backward then says so, instead of warning and going on.
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _FAKES[_op_name(name)], lib=LIBRARY)
    implement(_REFERENCES, "CompositeExplicitAutograd")
    implement(_CPU, "CPU")


_register()
OPS = torch.ops.mobiquant
ELASTIC_LINEARS = {n: getattr(OPS.elastic_linears, f"n{n}") for n in _SIBLINGS}  # by number of linears
