"""The linears we are measured against: cuBLAS bf16, tinygemm int4, GemLite at 4 and 2 bits; packed, copied, checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from linear_timing import Call, Sample, Timing, check, copies_for, l2_bytes, measure
from torch import Tensor
from torch.nn.functional import linear

GROUP = 128
TINYGEMM_TILES = 8
# GemLite adds partial sums in bf16, hundreds of them for one token; its error is recorded beside its time.
TOLERANCES = {"bf16": 1e-2, "tinygemm4": 2e-2, "gemlite4": 1e-1, "gemlite2": 1e-1}


@dataclass(frozen=True, slots=True)
class Rival:
    """One competing linear, ready to be called.

    Attributes:
        copies: Functions of activations bf16 [T, K], each over its own copy of the same weight.
        weight: float64 weight of the given output rows, [rows, K].
        setups: Names of settings and what turns each on; all are timed, the fastest counts.
    """

    copies: Sequence[Callable[[Tensor], Tensor]]
    weight: Callable[[Tensor], Tensor]
    setups: Callable[[int], dict[str, Callable[[], None]]]


def _as_is(tokens: int) -> dict[str, Callable[[], None]]:
    return {"default": lambda: None}


def bf16(n: int, k: int, device: torch.device, copies: int | None = None) -> Rival:
    """`torch.nn.functional.linear`, cuBLAS."""
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5
    count = copies or copies_for(2 * n * k, l2_bytes(device))
    weights = [weight, *(weight.clone() for _ in range(count - 1))]
    return Rival([partial(linear, weight=w) for w in weights], lambda rows: weight[rows].double(), _as_is)


def _affine(n: int, k: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return random codes uint8 [N, K] and bf16 scale and zero point [N, K / GROUP], for outputs of variance one."""
    codes = torch.randint(0, 1 << bits, (n, k), device=device, dtype=torch.uint8)
    cells = 1 << bits
    scale = (0.5 + torch.rand(n, k // GROUP, device=device)) * 12**0.5 / cells / k**0.5
    zero = torch.randint(cells // 2 - 1, cells // 2 + 1, (n, k // GROUP), device=device)
    return codes, scale.bfloat16(), zero.bfloat16()


def _dequantize(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``codes * scale + shift`` in float64, one scale and shift a group."""
    grouped = codes.view(codes.shape[0], -1, GROUP).double()
    return (grouped * scale.double().unsqueeze(-1) + shift.double().unsqueeze(-1)).view(codes.shape[0], -1)


def tinygemm4(n: int, k: int, device: torch.device, copies: int | None = None) -> Rival:
    """torch's own int4 kernel: values are ``(code - 8) * scale + zero``."""
    codes, scale, zero = _affine(n, k, 4, device)
    zero = ((8 - zero.float()) * scale.float()).bfloat16()
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, TINYGEMM_TILES)
    both = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()
    count = copies or copies_for(n * k / 2 + both.nbytes, l2_bytes(device))
    weights = [(packed, both), *((packed.clone(), both.clone()) for _ in range(count - 1))]

    def multiply(packed: Tensor, both: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, both)

    def weight(rows: Tensor) -> Tensor:
        shift = zero[rows].double() - 8 * scale[rows].double()
        return _dequantize(codes[rows], scale[rows], shift)

    return Rival([partial(multiply, *w) for w in weights], weight, _as_is)


def gemlite(bits: int, n: int, k: int, device: torch.device, copies: int | None = None) -> Rival:
    """GemLite, weights of `bits` bits, bf16 activations, bf16 scale and zero point."""
    from gemlite.core import DType, GemLiteLinearTriton  # pyrefly: ignore[missing-import]

    codes, scale, zero = _affine(n, k, bits, device)
    layer = GemLiteLinearTriton(
        bits, group_size=GROUP, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16
    )
    layer.pack(codes, scale.reshape(-1, 1), zero.reshape(-1, 1), None)
    count = copies or copies_for(n * k * bits / 8 + 2 * scale.nbytes, l2_bytes(device))
    layers = [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]
    shift = (-zero.float() * scale.float()).bfloat16()  # as `pack` rounds it

    def weight(rows: Tensor) -> Tensor:
        return _dequantize(codes[rows], scale[rows], shift[rows])

    return Rival([layer.forward for layer in layers], weight, _gemlite_setups)


def _gemlite_setups(tokens: int) -> dict[str, Callable[[], None]]:
    """For one token GemLite can keep outputs that it zeroes 256 at a time, instead of one before each launch."""
    from gemlite import set_kernel_caching  # pyrefly: ignore[missing-import]

    setups = {"default": lambda: set_kernel_caching(False)}
    if tokens == 1:
        setups["kernel caching"] = lambda: set_kernel_caching(True)
    return setups


def tune_gemlite(bench: Callable[..., Any] | None = None) -> None:
    """Make GemLite's tuner spend milliseconds on a candidate.

    Its candidates ("fast") and its shipped table stay as they are. By default a GEMV is timed together with the copies
    that restore its operands, which last longer than itself; here the kernel is timed alone, with a cold cache.

    Args:
        bench: ``(call, quantiles) -> times``; None measures.
    """
    from gemlite.core import GEMLITE_TRITON_KERNELS  # pyrefly: ignore[missing-import]
    from triton.testing import do_bench

    for family in GEMLITE_TRITON_KERNELS:
        for tuner in family.kernel:
            tuner._do_bench = bench or partial(do_bench, warmup=3, rep=12)
            tuner.pre_hook = lambda kwargs, reset_only=False: None
            tuner.post_hook = lambda kwargs, exception: None


def run_once(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
    """Stand in for a measurement where a kernel only has to be compiled."""
    call()
    return [1.0 for _ in quantiles]


BUILDERS: dict[str, Callable[..., Rival]] = {
    "bf16": bf16,
    "tinygemm4": tinygemm4,
    "gemlite4": partial(gemlite, 4),
    "gemlite2": partial(gemlite, 2),
}


def measure_rival(name: str, rival: Rival, x: Tensor) -> dict[str, Any]:
    """Check and time a rival on activations [T, K], with the setup that is fastest.

    Returns:
        What is recorded: ``time_us``, ``spread_us``, ``relative_error``, ``setup``.

    Raises:
        WrongResult: it computes something else.
    """
    best: tuple[Timing, float, str] | None = None
    for setup, turn_on in rival.setups(x.shape[0]).items():
        turn_on()
        calls: list[Call] = [partial(copy_, x) for copy_ in rival.copies]
        sample = Sample.of(x.shape[0], calls[0]().shape[-1], x.device)
        expected = x[sample.tokens].double() @ rival.weight(sample.rows).t()
        error = check(calls[0], expected, sample, TOLERANCES[name])
        timing = measure(calls, x.device)
        if best is None or timing.median_us < best[0].median_us:
            best = (timing, error, setup)
    assert best is not None, "there is a default setup"
    return {
        "time_us": round(best[0].median_us, 3),
        "spread_us": round(best[0].spread_us, 3),
        "relative_error": float(f"{best[1]:.3g}"),
        "setup": best[2],
    }
