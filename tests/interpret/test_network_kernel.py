"""Routing by a trained router's network in one kernel, against the reference and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobiquant_compiler import reference, wiring
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, SliceSpec
from tests.network_cases import INF, WAYS, apart, integer_network, random_network, score_of, scores64, turns_at
from tests.tolerances import NETWORK_SCORES

NO_MASK = torch.zeros(1, dtype=torch.int32)


def both(x: Tensor, router: list[Tensor], thresholds: Tensor, mask: Tensor = NO_MASK) -> None:
    """Check counts and histogram of the kernels, the latter on top of what was there."""
    before = torch.arange(len(thresholds) + 1) * 5
    wanted_hist = before.clone()
    wanted = reference.route(x, router, thresholds, wanted_hist, mask, "mlp")
    hist, again = before.clone(), before.clone()
    counts = wiring.route(x, router, thresholds, hist, mask, "mlp")
    assert counts.dtype is torch.int32
    assert torch.equal(counts, wanted)
    assert torch.equal(hist, wanted_hist)
    spec = SliceSpec((1,) * len(before), 64)
    quantized = wiring.prepare(x, router, thresholds, again, mask, spec, Activation.A8)
    assert torch.equal(quantized.counts, wanted.flatten()), "with activations in fixed point by the way"
    assert torch.equal(again, wanted_hist)
    rows = wiring.prepare(x, router, thresholds, again, mask, spec, Activation.A8, token_rows=True)
    assert rows.placed is not None
    assert torch.equal(rows.placed[0], wanted.flatten())
    assert rows.placed[1].tolist() == list(range(rows.tokens)), "tokens keep their order"


@given(
    tokens=st.sampled_from((1, 2, 7, PREFILL_TOKENS + 2)),
    k=st.integers(32, 700),
    slices=st.sampled_from((1, 2, 4, 8)),
    hidden=st.sampled_from((1, 3, 12, 16, 17, 40)),
    masked=st.sampled_from(("none", "this", "other")),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_counts_and_histogram_where_scores_are_exact(
    tokens: int, k: int, slices: int, hidden: int, masked: str, dtype: torch.dtype, seed: int
) -> None:
    router, g = integer_network(k, slices, hidden, seed=seed), torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (tokens, k), generator=g).to(dtype)
    mask = torch.zeros(100, dtype=torch.int32)
    if masked != "none":
        mask[0] = tokens if masked == "this" else tokens + 1
        mask[1:] = torch.randint(0, 2, (99,), generator=g)
    thresholds = torch.randint(0, 8 * k, (slices - 1,), generator=g) * router[1]
    both(x, router, thresholds, mask)


@pytest.mark.parametrize(
    ("tokens", "k", "slices", "hidden"),
    [(5, 40, 4, 12), (PREFILL_TOKENS + 1, 301, 4, 12), (9, 577, 2, 1), (3, 1100, 8, 37), (2, 4200, 4, 12)],
    ids=str,
)
def test_counts_where_thresholds_are_between_scores(tokens: int, k: int, slices: int, hidden: int) -> None:
    router, g = random_network(k, slices, hidden), torch.Generator().manual_seed(1)
    x = torch.randn(tokens, k, generator=g) * torch.rand(tokens, 1, generator=g)
    both(x, router, apart(scores64(x, router)))


@pytest.mark.parametrize(
    ("k", "hidden", "index", "dtype"), [(40, 12, 1, torch.bfloat16), (257, 20, 0, torch.float32)], ids=str
)
def test_scores_are_as_near_as_float32_allows_and_have_the_same_bits_in_any_batch(
    k: int, hidden: int, index: int, dtype: torch.dtype
) -> None:
    router, g = random_network(k, 3, hidden), torch.Generator().manual_seed(2)
    x = torch.randn(PREFILL_TOKENS + 3, k, generator=g).to(dtype)
    wanted = float(scores64(x[2:3], router)[0, index])
    found = score_of(WAYS[0], x[2:3], router, index)
    assert abs(found - wanted) <= NETWORK_SCORES.error * wanted, NETWORK_SCORES.reason
    for way, batch, token in ((WAYS[1], x[2:3], 0), (WAYS[0], x[:3], 2), (WAYS[2], x, 2)):
        assert turns_at(way, batch, router, index, token, found), f"{way.name}, {len(batch)} tokens"


def test_the_network_decides() -> None:
    """The same tokens, the same prediction; the sign of the second layer's bias makes the difference."""
    router, x = integer_network(64, 3, 12), torch.ones(2, 64)
    scores = reference.energy_scores(x, router[:2])
    for bias, count in ((4.0, 3), (-4.0, 1)):
        router[5].fill_(bias)
        both(x, router, scores[0])
        found = wiring.route(x, router, scores[0], torch.zeros(3, dtype=torch.int64), NO_MASK, "mlp")
        assert found.tolist() == [count, count]


@pytest.mark.parametrize("bias", [50.0, -50.0])
def test_the_correction_is_limited(bias: float) -> None:
    router, x = integer_network(64, 2, 12), torch.ones(1, 64)
    router[5].fill_(bias)
    wanted = float(scores64(x, router)[0, 0])
    assert score_of(WAYS[0], x, router, 0) == pytest.approx(wanted, rel=NETWORK_SCORES.error)


@pytest.mark.parametrize("thresholds", [(-INF, -INF, -INF), (INF, -INF, -INF), (-INF, INF, -INF), (-INF, -INF, INF)])
def test_infinite_thresholds_force_and_forbid(thresholds: tuple[float, ...]) -> None:
    both(torch.randn(3, 40), random_network(40, 4, 12), torch.tensor(thresholds))


@pytest.mark.parametrize("tokens", [3, PREFILL_TOKENS + 1])
@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_a_token_that_is_not_finite_gets_the_base_slice(bad: float, tokens: int) -> None:
    x = torch.ones(tokens, 40)
    x[1, 2] = bad
    both(x, random_network(40, 4, 12), torch.full((3,), -INF))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15])
def test_tokens_of_any_size(size: float) -> None:
    router, x = random_network(40, 3, 12), torch.randn(2, 40) * size
    both(x, router, torch.tensor([-1.0, INF]))
    if size > 1e-20:
        both(x, router, apart(scores64(x, router)))


@pytest.mark.parametrize("shape", [(0,), (), (2, 3)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    both(torch.ones(*shape, 40), integer_network(40, 4, 12), torch.full((3,), 20.0))
