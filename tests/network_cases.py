"""Trained routers for kernel tests, their scores in float64, and the scores of a kernel found by its decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mobiquant_compiler import wiring
from mobiquant_compiler.spec import Activation, SliceSpec

INF = float("inf")
Decide = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]


def random_network(k: int, slices: int, hidden: int, *, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    """Return a router of normal weights, whose hidden units and corrections have variance about one."""
    g = torch.Generator().manual_seed(seed)
    scores = slices - 1
    energy = 0.5 + torch.rand(k, generator=g)
    gain = 4.0 ** -torch.arange(scores, dtype=torch.float32)
    shapes = ((hidden, k + 2), (hidden,), (scores, hidden), (scores,))
    sizes = (k**-0.5, 1.0, hidden**-0.5, 0.5)
    network = [(torch.randn(shape, generator=g) * size).half() for shape, size in zip(shapes, sizes, strict=True)]
    return [tensor.to(device) for tensor in (energy, gain, *network)]


def integer_network(k: int, slices: int, hidden: int, *, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    """Return a router of integers whose network says nothing, in spite of its first layer: scores are exact."""
    g = torch.Generator().manual_seed(seed)
    scores = slices - 1
    energy = torch.randint(0, 3, (k,), generator=g).float()
    gain = 4.0 ** -torch.arange(scores, dtype=torch.float32)
    first = torch.randint(-2, 3, (hidden, k + 2), generator=g)
    network = (first, first[:, 0], torch.zeros(scores, hidden), torch.zeros(scores))
    return [tensor.to(device) for tensor in (energy, gain, *(tensor.half() for tensor in network))]


def scores64(x: Tensor, router: Sequence[Tensor]) -> Tensor:
    """Return the scores of `reference.mlp_scores` in float64, written anew: float64 [T, E - 1]."""
    x = x.double()
    energy, gain, hidden, hidden_bias, out, out_bias = (tensor.double() for tensor in router)
    rms = ((x * x).mean(1) + 1e-12).sqrt()
    peak = x.abs().amax(1) / rms + 1e-12
    ends = torch.outer(rms.log(), hidden[:, -2]) + torch.outer(peak.log(), hidden[:, -1])
    z = (x @ hidden[:, :-2].t()) / rms[:, None] + ends + hidden_bias
    correction = (z / (1 + (-z).exp())) @ out.t() + out_bias
    return (x * x * energy).sum(1)[:, None] * gain * correction.clamp(-10, 10).exp()


def apart(scores: Tensor) -> Tensor:
    """Return thresholds between scores of tokens [T, E - 1], as far from any as can be; float32 [E - 1]."""
    ordered = scores.double().sort(0).values
    if len(ordered) < 2:
        return (1.5 * ordered[0]).float()
    ratios = ordered[1:] / ordered[:-1].clamp_min(1e-300)
    widest = ratios.argmax(0)
    each = torch.arange(scores.shape[1], device=scores.device)
    return (ordered[widest, each] * ratios[widest, each].sqrt()).float()


@dataclass(frozen=True)
class Way:
    """A way to route tokens by kernels.

    Attributes:
        name: For messages.
        decide: Takes x, router and thresholds, returns counts [T].
    """

    name: str
    decide: Decide


def _memory(x: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    hist = torch.zeros(len(thresholds) + 1, dtype=torch.int64, device=x.device)
    return hist, torch.zeros(1, dtype=torch.int32, device=x.device)


def _alone(x: Tensor, router: Sequence[Tensor], thresholds: Tensor) -> Tensor:
    return wiring.route(x, router, thresholds, *_memory(x, thresholds), "mlp")


def _beside(group: int, activation: Activation) -> Decide:
    def decide(x: Tensor, router: Sequence[Tensor], thresholds: Tensor) -> Tensor:
        spec = SliceSpec((1,) * (len(thresholds) + 1), group)
        return wiring.prepare(x, router, thresholds, *_memory(x, thresholds), spec, activation).counts

    return decide


WAYS = (
    Way("alone", _alone),
    Way("beside quantizing, groups of 128", _beside(128, Activation.A16)),
    Way("beside quantizing, groups of 32, a8", _beside(32, Activation.A8)),
)


def score_of(way: Way, x: Tensor, router: Sequence[Tensor], index: int) -> float:
    """Return the positive float32 score `index` that a kernel gives one token [1, K]: where its decision turns."""
    low, high = 0, 0x7F800000  # bits of zero and of infinity; a score is at least the one and below the other
    while high - low > 1:
        middle = (low + high) // 2
        if _uses(way, x, router, index, _float(middle))[0]:
            low = middle
        else:
            high = middle
    return _float(low)


def turns_at(way: Way, x: Tensor, router: Sequence[Tensor], index: int, token: int, score: float) -> bool:
    """Say whether a token's score in this batch has the very bits of `score`."""
    above = float(torch.nextafter(torch.tensor(score), torch.tensor(INF)))
    at = _uses(way, x, router, index, score)[token]
    return bool(at) and not bool(_uses(way, x, router, index, above)[token])


def _float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _uses(way: Way, x: Tensor, router: Sequence[Tensor], index: int, threshold: float) -> Tensor:
    """Say which tokens use slice ``index + 2``: those before are forced, those after forbidden."""
    thresholds = torch.full((len(router[1]),), INF, device=x.device)
    thresholds[:index] = -INF
    thresholds[index] = threshold
    return way.decide(x, router, thresholds) == index + 2
