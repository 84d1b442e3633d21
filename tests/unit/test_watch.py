"""What is seen of elastic linears while a model runs, and that looking changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler.analysis.watch import Call, watch_linears
from mobiquant_compiler.errors import NotElastic
from mobiquant_compiler.linear import elastic_linears
from tests.models_tiny import tiny_lm, tokens


@pytest.fixture(scope="module")
def elastic() -> nn.Module:
    model = tiny_lm()
    mq.quantize_(model, calibration=tokens(4, 32), budget=4.5)
    return model


def run(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)


def test_a_watched_model_gives_the_same_and_counts_the_same(elastic: nn.Module) -> None:
    ids = tokens(2, 16)
    mq.reset_telemetry(elastic)
    plain, bits = run(elastic, ids), mq.achieved_bits(elastic).layers
    mq.reset_telemetry(elastic)
    with watch_linears(elastic, lambda call: None):
        watched = run(elastic, ids)
    assert torch.equal(plain, watched)
    assert mq.achieved_bits(elastic).layers == bits


def test_counts_are_those_that_telemetry_records(elastic: nn.Module) -> None:
    seen: dict[str, Tensor] = {}
    mq.reset_telemetry(elastic)
    with watch_linears(elastic, lambda call: seen.__setitem__(call.name, call.counts)):
        run(elastic, tokens(2, 16))
    assert set(seen) == set(elastic_linears(elastic))
    assert all(counts.shape == (2, 16) for counts in seen.values())
    for name, bits in mq.achieved_bits(elastic).layers.items():
        assert float(seen[name].double().mean()) * 2 == pytest.approx(bits)
    assert len({tuple(counts.flatten().tolist()) for counts in seen.values()}) > 1, "the router had a choice"


def test_an_observer_can_choose_the_counts(elastic: nn.Module) -> None:
    ids = tokens(1, 8)
    with watch_linears(elastic, lambda call: call.multiply(4)):
        forced = run(elastic, ids)
    with mq.budget(elastic, 8):
        assert torch.equal(forced, run(elastic, ids))


def test_routing_under_other_thresholds_records_nothing(elastic: nn.Module) -> None:
    found: list[tuple[bool, bool]] = []

    def observe(call: Call) -> None:
        none, all_ = (torch.full_like(call.arguments["thresholds"], v) for v in (torch.inf, -torch.inf))
        found.append((bool((call.route(none) == 1).all()), bool((call.route(all_) == 4).all())))

    mq.reset_telemetry(elastic)
    with watch_linears(elastic, observe):
        run(elastic, tokens(1, 8))
    assert len(found) == 14
    assert all(low and high for low, high in found)
    assert mq.achieved_bits(elastic).tokens == 8


def test_linears_of_other_models_are_left_alone(elastic: nn.Module) -> None:
    other = tiny_lm(seed=3)
    mq.quantize_(other, calibration=tokens(2, 16))
    with watch_linears(elastic, lambda call: pytest.fail("not this model's")):
        assert run(other, tokens(1, 4)).isfinite().all()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_models_are_seen_too(elastic: nn.Module) -> None:
    ids, seen = tokens(1, 8), []
    whole = torch.compile(elastic, backend="eager")
    run(whole, ids)
    with watch_linears(whole, lambda call: seen.append(call.name)):
        run(whole, ids)
    assert seen == list(elastic_linears(elastic))
    with torch.no_grad():
        layer = torch.compile(elastic.layers[0], backend="eager")
        x = elastic.embed(ids)
        layer(x)
        seen.clear()
        with watch_linears(elastic, lambda call: seen.append(call.name)):
            layer(x)
    assert len(seen) == 7


def test_a_plain_model() -> None:
    with pytest.raises(NotElastic, match="TinyLM has no elastic linear"), watch_linears(tiny_lm(), lambda call: None):
        pass
