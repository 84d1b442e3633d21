"""The routing half of route_quantize against the reference: counts, nested thresholds, histogram and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobiquant_compiler import reference, wiring
from mobiquant_compiler.spec import Activation, SliceSpec

INF = float("inf")


def router_of(k: int, slices: int, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return a router of small integers, whose scores are exact, and thresholds among them."""
    g = torch.Generator().manual_seed(seed)
    energy = torch.randint(0, 3, (k,), generator=g).float()
    gain = 4.0 ** -torch.arange(slices - 1, dtype=torch.float32)
    thresholds = torch.randint(0, 8 * k, (slices - 1,), generator=g) * gain
    return (energy, gain), thresholds


def both(x: Tensor, router: tuple[Tensor, Tensor], thresholds: Tensor, mask: Tensor) -> None:
    """Check counts and histogram of the kernel, the latter on top of what was there."""
    before = torch.arange(len(thresholds) + 1) * 5
    wanted_hist, hist = before.clone(), before.clone()
    wanted = reference.route(x, router, thresholds, wanted_hist, mask, "energy")
    counts = wiring.route(x, router, thresholds, hist, mask, "energy")
    assert counts.dtype is torch.int32
    assert torch.equal(counts, wanted)
    assert torch.equal(hist, wanted_hist)
    spec = SliceSpec((1,) * len(before), 64)
    again = before.clone()
    quantized = wiring.prepare(x, router, thresholds, again, mask, spec, Activation.A8)
    assert torch.equal(quantized.counts, wanted.flatten()), "with activations in fixed point by the way"
    assert torch.equal(again, wanted_hist)
    rows = wiring.quantize(x, counts, spec, Activation.A8, token_rows=True)
    assert torch.equal(rows.counts, wanted.flatten())
    assert rows.placed is not None
    assert torch.equal(rows.placed[0], wanted.flatten()[rows.placed[1].long()])
    again = before.clone()
    at_once = wiring.prepare(x, router, thresholds, again, mask, spec, Activation.A8, token_rows=True)
    assert torch.equal(at_once.counts, wanted.flatten())
    assert torch.equal(again, wanted_hist)
    assert at_once.placed is not None
    tokens = torch.arange(rows.tokens, dtype=torch.int32)
    assert torch.equal(at_once.placed, torch.stack((wanted.flatten(), tokens))), "tokens keep their order"
    assert at_once.sums is not None
    assert rows.sums is not None
    moved = rows.placed[1].long()
    assert torch.equal(at_once.high[:, :, moved], rows.high[:, :, : rows.tokens])
    assert torch.equal(at_once.sums[:, moved], rows.sums[:, : rows.tokens])
    assert torch.allclose(at_once.affine[:, moved], rows.affine[:, : rows.tokens], rtol=0, atol=0, equal_nan=True)


@given(
    tokens=st.sampled_from((1, 2, 9, 40, 66)),
    k=st.integers(32, 1100),
    slices=st.sampled_from((1, 2, 4, 8)),
    masked=st.sampled_from(("none", "this", "other")),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_counts_and_histogram(tokens: int, k: int, slices: int, masked: str, dtype: torch.dtype, seed: int) -> None:
    router, thresholds = router_of(k, slices, seed)
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (tokens, k), generator=g).to(dtype)
    mask = torch.zeros(100, dtype=torch.int32)
    if masked != "none":
        mask[0] = tokens if masked == "this" else tokens + 1
        mask[1:] = torch.randint(0, 2, (99,), generator=g)
    both(x, router, thresholds, mask)


@pytest.mark.parametrize("capacity", [1, 5, 6])
def test_a_mask_too_short_for_the_call_is_ignored(capacity: int) -> None:
    router, thresholds = router_of(40, 3, 0)
    mask = torch.zeros(capacity, dtype=torch.int32)
    mask[0] = 5
    both(torch.ones(5, 40), router, thresholds, mask)


@pytest.mark.parametrize("thresholds", [(-INF, -INF, -INF), (INF, -INF, -INF), (-INF, INF, -INF), (-INF, -INF, INF)])
def test_infinite_thresholds_force_and_forbid(thresholds: tuple[float, ...]) -> None:
    router, _ = router_of(40, 4, 0)
    both(torch.ones(3, 40), router, torch.tensor(thresholds), torch.zeros(1, dtype=torch.int32))


def test_a_token_that_is_not_finite_gets_the_base_slice() -> None:
    router, _ = router_of(40, 4, 0)
    x = torch.ones(3, 40)
    x[1, 2] = float("nan")
    both(x, router, torch.full((3,), -INF), torch.zeros(1, dtype=torch.int32))


def test_more_columns_than_a_program_holds_at_a_time() -> None:
    router, _ = router_of(33000, 4, 0)
    x = torch.zeros(2, 33000)
    x[0, 5], x[1, 32900] = 3.0, 4.0
    scores = reference.energy_scores(x, router)
    assert scores[:, 0].tolist() == [9 * router[0][5], 16 * router[0][32900]]
    both(x, router, scores.max(0).values * 0.75, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("shape", [(0,), (), (2, 3)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    router, thresholds = router_of(40, 4, 0)
    both(torch.ones(*shape, 40), router, thresholds, torch.zeros(1, dtype=torch.int32))


def test_an_unknown_kind_is_the_references_business() -> None:
    router, thresholds = router_of(40, 4, 0)
    with pytest.raises(KeyError, match="magic"):
        wiring.route(torch.ones(2, 40), router, thresholds, torch.zeros(4, dtype=torch.int64), thresholds, "magic")
