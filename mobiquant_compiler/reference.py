"""The meaning of every op, in plain torch on any device: slow, short, and what each kernel is checked against.

Linears take `activation` and `prefill` like kernels do and give the same result for any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mobiquant_compiler.packing import unpack
from mobiquant_compiler.slices import reconstruct
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Prefill, SliceSpec

_TINY = 1e-12  # keeps a token of zeros finite
_LIMIT = 10.0  # of what a network may add to the logarithm of a score


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that dot products of `x` are summed in: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def energy_scores(x: Tensor, router: Sequence[Tensor]) -> Tensor:
    """Score tokens by the output error that each further slice is predicted to remove, per bit and parameter.

    Args:
        x: [T, K].
        router: ``energy`` float32 [K], the expected growth of the loss per squared activation of a column when
            only the base slice is used, and ``gain`` float32 [E - 1], the share of it that slice e removes per bit.

    Returns:
        Scores [T, E - 1] float32, falling in e.

    Source: docs/architecture.md, "Router and budget": ``N sum_g s_g^2 ||x_g||^2 / 12`` times the linear's sensitivity
        over its parameters.
    """
    energy, gain = router
    return (x.float().square() @ energy).unsqueeze(-1) * gain


def mlp_features(x: Tensor) -> Tensor:
    """Return what a trained router looks at: the token over its root mean square, and the logs of that and of its peak.

    Shapes: x [T, K]; returns float32 [T, K + 2].
    """
    x = x.float()
    rms = x.square().mean(-1, keepdim=True).add(_TINY).sqrt()
    normal = x / rms
    peak = normal.abs().amax(-1, keepdim=True).add(_TINY)
    return torch.cat([normal, rms.log(), peak.log()], -1)


def mlp_scores(x: Tensor, router: Sequence[Tensor]) -> Tensor:
    """Score tokens by the predicted error of `energy_scores` times the exponential of a two-layer network's output.

    Args:
        x: [T, K].
        router: ``energy`` and ``gain`` as in `energy_scores`; ``hidden`` [H, K + 2] and ``hidden_bias`` [H] of the
            first layer, ``out`` [E - 1, H] and ``out_bias`` [E - 1] of the second; any floating-point dtype.

    Returns:
        Scores [T, E - 1] float32. Zero second layers give those of `energy_scores`.

    Source: MoBiRoute, arXiv 2602.20191: a two-layer network per linear with a score per further slice; here it learns
    what the prediction of section 5 of the design leaves open.
    """
    energy, gain, hidden, hidden_bias, out, out_bias = router
    inner = torch.nn.functional.silu(mlp_features(x) @ hidden.float().t() + hidden_bias.float())
    correction = inner @ out.float().t() + out_bias.float()
    return energy_scores(x, (energy, gain)) * correction.clamp(-_LIMIT, _LIMIT).exp()


SCORES: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {"energy": energy_scores, "mlp": mlp_scores}


def record(counts: Tensor, hist: Tensor, mask: Tensor) -> None:
    """Add the slice counts [T] to ``hist`` int64 [E], leaving out padding tokens.

    ``mask`` int32 [1 + capacity]: its first entry is the number of tokens that the rest describes (1 = counted,
    0 = padding). A call with another number of tokens is counted whole.
    """
    tokens = counts.numel()
    real = torch.ones(tokens, dtype=torch.int64, device=counts.device)
    if tokens < mask.numel():
        real = torch.where(mask[0] == tokens, mask[1 : tokens + 1].long(), real)
    hist.scatter_add_(0, counts.reshape(-1).long() - 1, real)


def uses_all_slices(x: Tensor, prefill: Prefill) -> bool:
    """Say whether a call gives each token [..., K] of `x` all slices, whatever its score and the budget."""
    return prefill is Prefill.FULL and x.shape[:-1].numel() > PREFILL_TOKENS


def route(
    x: Tensor,
    router: Sequence[Tensor],
    thresholds: Tensor,
    hist: Tensor,
    mask: Tensor,
    kind: str,
    prefill: Prefill = Prefill.ROUTED,
) -> Tensor:
    """Choose a slice count per token: slice e is used iff slice e - 1 is and ``score_e >= threshold_e``.

    A call that `uses_all_slices` asks for no scores: slice e is used iff slice e - 1 is and ``threshold_e`` is not
    ``inf``. Budgets write finite thresholds and ``-inf`` only, ``inf`` is a layer's ceiling.

    Shapes: x [..., K]; thresholds float32 [E - 1]; returns int32 [...] in 1..E. `hist` is updated (`record`).
    """
    if uses_all_slices(x, prefill):
        used = (thresholds != torch.inf).expand(x.shape[:-1].numel(), -1)
    else:
        used = SCORES[kind](x.reshape(-1, x.shape[-1]), router) >= thresholds
    counts = 1 + used.to(torch.int32).cumprod(-1).sum(-1, dtype=torch.int32)
    record(counts, hist, mask)
    return counts.to(torch.int32).view(x.shape[:-1])


def gather(x: Tensor, counts: Tensor, num_slices: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bring tokens of equal slice count together.

    Shapes: x [..., K]; counts int32 [...]. Returns rows int32 [T], the stable permutation; offsets int32 [E + 1],
    where tokens of count k are ``offsets[k - 1] : offsets[k]``; and x in that order, [T, K].
    """
    flat = counts.reshape(-1)
    rows = torch.sort(flat, stable=True).indices
    limits = torch.arange(num_slices + 1, dtype=flat.dtype, device=flat.device)
    offsets = (flat.unsqueeze(0) <= limits.unsqueeze(1)).sum(1, dtype=torch.int32)
    return rows.to(torch.int32), offsets, x.reshape(-1, x.shape[-1])[rows]


def slice_gemm(
    x: Tensor,
    offsets: Tensor,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    spec: SliceSpec,
    activation: Activation = Activation.A16,
    prefill: Prefill = Prefill.ROUTED,
) -> Tensor:
    """Multiply grouped tokens by the weight of their slice count.

    Shapes: x [T, K] in the order of `gather`; offsets int32 [E + 1]; slices int32 [total_bits, N, K_padded / 32];
    scale, zero [N, K_padded / group]; bias [N]; returns [T, N] in the dtype of x.
    Numerics: products and sums in float32 (float64 for float64 input), one rounding at the end.
    """
    dtype = accumulate_dtype(x)
    y = torch.zeros(x.shape[0], scale.shape[0], dtype=dtype, device=x.device)
    limits = offsets.tolist()
    for count in range(1, spec.num_slices + 1):
        start, stop = limits[count - 1], limits[count]
        if start == stop:
            continue
        codes = unpack(slices, spec, count)
        weight = reconstruct(codes, scale, zero, spec, count, dtype)[:, : x.shape[1]]
        y[start:stop] = x[start:stop].to(dtype) @ weight.t()
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


def scatter(y: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Undo `gather`: row i of y goes to token ``rows[i]``.

    Shapes: y [T, N]; rows int32 [T]; counts [...] gives the leading shape; returns [..., N].
    """
    out = torch.empty_like(y)
    out[rows.long()] = y
    return out.view(*counts.shape, y.shape[-1])


def routed_linear(
    x: Tensor,
    counts: Tensor,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    spec: SliceSpec,
    activation: Activation = Activation.A16,
    prefill: Prefill = Prefill.ROUTED,
) -> Tensor:
    """Gather, multiply and scatter in one: `slice_gemm` for tokens in their own order.

    Shapes: x [..., K]; counts int32 [...]; returns [..., N] in the dtype of x.
    """
    rows, offsets, grouped = gather(x, counts, spec.num_slices)
    return scatter(slice_gemm(grouped, offsets, slices, scale, zero, bias, spec), rows, counts)


def routed_linears(
    x: Tensor,
    counts: Tensor,
    slices: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    spec: SliceSpec,
    activation: Activation = Activation.A16,
    prefill: Prefill = Prefill.ROUTED,
) -> list[Tensor]:
    """Multiply tokens by several weights of one spec: a `routed_linear` each, of the same tokens and counts.

    Shapes: x [..., K]; counts int32 [...]; of weight i as in `slice_gemm`, with its own N_i; returns [..., N_i] each.
    """
    weights = zip(slices, scale, zero, bias, strict=True)
    return [routed_linear(x, counts, *weight, spec, activation, prefill) for weight in weights]
