"""Routing on CUDA: the op `route`, and tokens that are routed and quantized; for any kind of router."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mobiquant_compiler import reference
from mobiquant_compiler.kernels import prepare_kernel, router_spec, target_of
from mobiquant_compiler.linear import SCORE_TENSORS
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Prepared
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Prefill, SliceSpec


def routes(x: Tensor, kind: str, prefill: Prefill) -> bool:
    """Say whether a kernel routes; otherwise the reference does, which waits for nothing either where it is short."""
    return kind in SCORE_TENSORS and not reference.uses_all_slices(x, prefill) and launch.takes(x)


def route(
    x: Tensor,
    router: Sequence[Tensor],
    thresholds: Tensor,
    hist: Tensor,
    mask: Tensor,
    kind: str,
    prefill: Prefill = Prefill.ROUTED,
) -> Tensor:
    """`reference.route` as one kernel; the reference where no token is looked at."""
    if not routes(x, kind, prefill):
        return reference.route(x, router, thresholds, hist, mask, kind, prefill)
    facts = {"route": True, "quantize": False, "hidden": hidden_units(router), "long": _is_long(x)}
    kernel = prepare_kernel(router_spec(hist.numel()), x.shape[-1], target_of(x.device), Activation.A16, **facts)
    return launch.prepare(kernel, x, router, thresholds, hist, mask).counts.view(x.shape[:-1])


def prepare(
    x: Tensor,
    router: Sequence[Tensor],
    thresholds: Tensor,
    hist: Tensor,
    mask: Tensor,
    spec: SliceSpec,
    activation: Activation = Activation.A16,
    *,
    token_rows: bool = False,
) -> Prepared:
    """Route and quantize tokens in one launch, for any number of linears that read them; rows keep their order.

    Shapes: x [..., K]; router energy float32 [K] and gain float32 [E - 1], and its network where it was trained
        (`reference.mlp_scores`); thresholds float32 [E - 1]; hist int64 [E].
    """
    facts = {"route": True, "quantize": True, "hidden": hidden_units(router), "long": _is_long(x)}
    facts["token_rows"] = token_rows
    kernel = prepare_kernel(spec, x.shape[-1], target_of(x.device), activation, **facts)
    return launch.prepare(kernel, x, router, thresholds, hist, mask)


def quantize(
    x: Tensor, counts: Tensor, spec: SliceSpec, activation: Activation, *, token_rows: bool = False
) -> Prepared:
    """Quantize tokens [..., K] of known slice counts int32 [...]; as rows they are placed by their counts."""
    facts = {"route": False, "quantize": True, "token_rows": token_rows}
    kernel = prepare_kernel(spec, x.shape[-1], target_of(x.device), activation, **facts)
    return launch.prepare(kernel, x, counts=counts)


def hidden_units(router: Sequence[Tensor]) -> int:
    """Return how many hidden units the network of a router has, 0 where there is none."""
    return router[2].shape[0] if len(router) > 2 else 0


def idle_router(k: int, num_slices: int, hidden: int, device: torch.device) -> tuple[list[Tensor], str]:
    """Return a router whose scores are all zero, with `hidden` units or data-free, and its kind."""
    shapes = {"energy": (k,), "gain": (num_slices - 1,)}
    dtypes = dict.fromkeys(shapes, torch.float32)
    kind = "mlp" if hidden else "energy"
    shapes |= {"hidden": (hidden, k + 2), "hidden_bias": (hidden,)}
    shapes |= {"out": (num_slices - 1, hidden), "out_bias": (num_slices - 1,)}
    tensors = [
        torch.zeros(shapes[name], dtype=dtypes.get(name, torch.float16), device=device) for name in SCORE_TENSORS[kind]
    ]
    return tensors, kind


def _is_long(x: Tensor) -> bool:
    return launch.token_count(x) > PREFILL_TOKENS
