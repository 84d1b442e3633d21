"""How tokens lie that are routed for batch_wgmma, and in how many launches: the tiles of a GPU, kernels interpreted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mobiquant_compiler import kernels, reference, wiring
from mobiquant_compiler.codegen.batch_configs import ROWS
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import Activation, Prefill, SliceSpec
from mobiquant_compiler.wiring import Order
from tests.kernel_cases import integer_case
from tests.network_cases import integer_network

SPEC = SliceSpec(group=64)
MANY_ROWS, SOME_ROWS, FEW_ROWS = 220 * ROWS, 64 * ROWS, 100


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have tiles chosen as for a Hopper GPU."""
    monkeypatch.setattr(kernels, "_has_batch_kernel", lambda spec, target: True)
    kernels.batch_tile.cache_clear()
    yield
    kernels.batch_tile.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of kernels that prepare tokens, as they are launched."""
    found: list[str] = []
    prepare = launch.prepare

    def counted(kernel, *args, **options):
        found.append(kernel.spec.name)
        return prepare(kernel, *args, **options)

    monkeypatch.setattr(launch, "prepare", counted)
    return found


@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize(
    ("tokens", "n", "order"),
    [
        (8, MANY_ROWS, Order.LANES),
        (9, FEW_ROWS, Order.LANES),
        (9, MANY_ROWS, Order.ROWS),
        (32, MANY_ROWS, Order.ROWS),
        (33, MANY_ROWS, Order.SORTED),
        (40, SOME_ROWS, Order.ROWS),
        (65, SOME_ROWS, Order.SORTED),
    ],
)
def test_tokens_are_sorted_where_tiles_would_have_many_counts(
    tokens: int, n: int, order: Order, hidden: int, launches: list[str]
) -> None:
    k = 200
    x = torch.randint(-9, 10, (tokens, k)).float()
    router = integer_network(k, 4, max(hidden, 1))
    router, kind = (router, "mlp") if hidden else (router[:2], "energy")
    scores = reference.SCORES[kind](x, router)
    limits = torch.quantile(scores, torch.tensor([0.3, 0.5, 0.8]), dim=0).diagonal()
    mask, wanted_hist, hist = torch.zeros(1, dtype=torch.int32), *torch.zeros(2, 4, dtype=torch.int64)
    wanted = reference.route(x, router, limits, wanted_hist, mask, kind)
    scale = torch.empty(n, 4, dtype=torch.float16)
    weights = [Weight(torch.empty(8, n, 0, dtype=torch.int32), scale, scale, None)]
    assert wiring.order_of(x, weights, SPEC) is order
    found = wiring.prepare_for(weights, x, router, limits, hist, mask, kind, SPEC)
    assert torch.equal(found.counts, wanted)
    assert torch.equal(hist, wanted_hist), "counted once"
    assert len(launches) == (2 if order is Order.SORTED else 1)
    if order is Order.LANES:
        assert found.placed is None
        return
    assert found.placed is not None
    counts, tokens_at = found.placed
    assert torch.equal(counts, wanted[tokens_at.long()])
    kept = tokens_at.tolist() == list(range(tokens))
    assert kept == (order is Order.ROWS)
    assert kept or counts[:64].tolist() == sorted(counts[:64].tolist(), reverse=True)


@pytest.mark.parametrize("tokens", [8, 9])
def test_weights_that_share_no_launch_are_multiplied_as_if_each_were_alone(
    tokens: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has many rows, and as rows its tokens would be of no use to the other; both are routed once."""
    cases = [integer_case(SPEC, tokens, n, 64, bias=True, seed=n) for n in (MANY_ROWS, 5)]
    asked: list[tuple[tuple[int, ...], bool]] = []

    def multiplied(kernel, prepared, weights):
        asked.append((tuple(weight.rows for weight in weights), prepared.placed is not None))
        return [torch.zeros(tokens, weight.rows) for weight in weights]

    monkeypatch.setattr(launch, "multiply", multiplied)
    monkeypatch.setattr(wiring, "_batch_kernel", lambda *args: None)
    monkeypatch.setattr(wiring, "multiply_kernel_for", lambda *args: None)
    router, thresholds = (torch.ones(64), torch.ones(3)), torch.zeros(3)
    hist, mask = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    weights = [list(column) for column in zip(*(case.arguments[2:] for case in cases), strict=True)]
    weights[3][1] = None  # a bias has the first alone
    facts = (SPEC, Activation.A16, Prefill.ROUTED)
    wiring.elastic_linears(cases[0].x, router, thresholds, hist, mask, "energy", *weights, *facts)
    assert asked == [((MANY_ROWS,), tokens == 9), ((5,), False)]
    assert int(hist.sum()) == tokens
    assert len(launches) == (1 if tokens == 8 else 3), "routed, and quantized for each"
