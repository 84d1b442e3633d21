"""The ops of namespace ``mobiquant``: schema, fake, and the CPU and any-device implementations.

`reference` is their semantics; CUDA kernels are registered by `wiring`. They are defined through
`torch.library.Library`, whose Python implementations dispatch in less than half the time of `custom_op`
(`benchmarks/bench_dispatch.py`): it counts at two hundred linears a token. No autograd: slices are not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from mobiquant_compiler import cpu, reference
from mobiquant_compiler.spec import Layout, SliceSpec

NAMESPACE = "mobiquant"
_WEIGHT = "Tensor slices, Tensor scale, Tensor zero, Tensor? bias, int[] widths, int group, str layout"
_ROUTER = "Tensor[] router, Tensor thresholds, Tensor(a!) hist, Tensor mask, str kind"
SCHEMAS = {
    "route": f"(Tensor x, {_ROUTER}) -> Tensor",
    "gather": "(Tensor x, Tensor counts, int num_slices) -> (Tensor, Tensor, Tensor)",
    "slice_gemm": f"(Tensor x, Tensor offsets, {_WEIGHT}) -> Tensor",
    "scatter": "(Tensor y, Tensor rows, Tensor counts) -> Tensor",
    "routed_linear": f"(Tensor x, Tensor counts, {_WEIGHT}) -> Tensor",
    "elastic_linear": f"(Tensor x, {_ROUTER}, {_WEIGHT}) -> Tensor",
}

LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@lru_cache(maxsize=256)
def _spec(widths: tuple[int, ...], group: int, layout: str) -> SliceSpec:
    return SliceSpec(widths, group, Layout(layout))


def takes_spec(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an implementation that ends in a `SliceSpec` be called with the schema's widths, group and layout."""

    @wraps(function)
    def call(*args: Any) -> Any:
        *rest, widths, group, layout = args
        return function(*rest, _spec(tuple(widths), group, layout))

    return call


def elastic_by(route: Callable[..., Tensor], routed_linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make the whole linear, schema arguments in and out, from a route and a routed_linear taking a spec."""

    def elastic_linear(
        x: Tensor, router: Sequence[Tensor], thresholds: Tensor, hist: Tensor, mask: Tensor, kind: str, *weight: Any
    ) -> Tensor:
        counts = route(x, router, thresholds, hist, mask, kind)
        *tensors, widths, group, layout = weight
        return routed_linear(x, counts, *tensors, _spec(tuple(widths), group, layout))

    return elastic_linear


def _fake_route(
    x: Tensor, router: Sequence[Tensor], thresholds: Tensor, hist: Tensor, mask: Tensor, kind: str
) -> Tensor:
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


def _fake_elastic_linear(
    x: Tensor,
    router: Sequence[Tensor],
    thresholds: Tensor,
    hist: Tensor,
    mask: Tensor,
    kind: str,
    slices: Tensor,
    *rest: Any,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], slices.shape[1])


_FAKES: dict[str, Callable[..., Any]] = {
    "route": _fake_route,
    "gather": _fake_gather,
    "slice_gemm": _fake_slice_gemm,
    "scatter": _fake_scatter,
    "routed_linear": _fake_routed_linear,
    "elastic_linear": _fake_elastic_linear,
}
# Any device: the references themselves. CPU: the same functions where nothing can be gained.
_REFERENCES: dict[str, Callable[..., Any]] = {
    "route": reference.route,
    "gather": reference.gather,
    "slice_gemm": takes_spec(reference.slice_gemm),
    "scatter": reference.scatter,
    "routed_linear": takes_spec(reference.routed_linear),
    "elastic_linear": elastic_by(reference.route, reference.routed_linear),
}
_CPU: dict[str, Callable[..., Any]] = {
    "route": cpu.route,
    "slice_gemm": takes_spec(cpu.slice_gemm),
    "routed_linear": takes_spec(cpu.routed_linear),
    "elastic_linear": elastic_by(cpu.route, cpu.routed_linear),
}


def _register() -> None:
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _REFERENCES[name], "CompositeExplicitAutograd")
        if name in _CPU:
            LIBRARY.impl(name, _CPU[name], "CPU")
        # Results carry no gradient: backward then says so, instead of warning and going on.
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _FAKES[name], lib=LIBRARY)


_register()
OPS = torch.ops.mobiquant
