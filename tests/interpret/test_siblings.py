"""Several weights in one launch, and routing and multiplying as one op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mobiquant_compiler import reference, warming, wiring
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Prepared, Weight
from mobiquant_compiler.runtime.paths import execution_paths, reset_execution_paths
from mobiquant_compiler.spec import Activation, Prefill, SliceSpec
from tests.kernel_cases import SPECS, Case, integer_case, random_case, spec_id

K = 70
ROUTED = Prefill.ROUTED
ALL = float("-inf")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that each launch of sliced_mma adds its number of weights to."""
    seen: list[int] = []
    multiply = launch.multiply

    def watched(kernel: launch.LaunchableKernel, prepared: Prepared, weights: Sequence[Weight]) -> list[Tensor]:
        seen.append(len(weights))
        return multiply(kernel, prepared, weights)

    monkeypatch.setattr(launch, "multiply", watched)
    return seen


def siblings(spec: SliceSpec, tokens: int, rows: Sequence[int], *, bias: bool = False) -> list[Case]:
    """Return cases of several weights that share activations and counts."""
    cases = [integer_case(spec, tokens, n, K, bias=bias, seed=number) for number, n in enumerate(rows)]
    return [replace(case, x=cases[0].x, counts=cases[0].counts) for case in cases]


def weights_of(cases: Sequence[Case]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor | None]]:
    """Return the tensors of all weights as the op takes them."""
    return (
        [c.slices for c in cases],
        [c.scale for c in cases],
        [c.zero for c in cases],
        [c.bias for c in cases],
    )


def run(cases: Sequence[Case], activation: Activation = Activation.A16) -> list[Tensor]:
    """Run all weights of the cases in one op."""
    return wiring.routed_linears(cases[0].x, cases[0].counts, *weights_of(cases), cases[0].spec, activation, ROUTED)


@pytest.mark.parametrize("rows", [(17, 5), (1, 33, 16), (16, 3, 40, 1), (5, 5, 5, 5), (16, 24, 40, 31)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_weights_of_any_rows_in_one_launch(rows: tuple[int, ...], tokens: int, launches: list[int]) -> None:
    cases = siblings(SPECS[2], tokens, rows, bias=len(rows) % 2 == 0)
    for y, case in zip(run(cases), cases, strict=True):
        assert torch.equal(y, case.expected(torch.float32))
    assert launches == [len(rows)]


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[5], SPECS[7]], ids=spec_id)
@pytest.mark.parametrize("tokens", [1, 2])
def test_siblings_of_other_widths(spec: SliceSpec, tokens: int) -> None:
    for case, y in zip(cases := siblings(spec, tokens, (18, 2), bias=True), run(cases), strict=True):
        assert torch.equal(y, case.expected(torch.float32))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_weight_has_the_same_bits_among_siblings(activation: Activation, tokens: int) -> None:
    first, second, third = (random_case(SPECS[2], tokens, n, 600, seed=n) for n in (3, 17, 20))
    cases = [first, replace(second, x=first.x, counts=first.counts), replace(third, x=first.x, counts=first.counts)]
    for case, y in zip(cases, run(cases, activation), strict=True):
        assert torch.equal(y, wiring.routed_linear(*case.arguments, case.spec, activation))


@pytest.mark.parametrize("tokens", [1, 3])
def test_siblings_of_different_dtypes_are_launched_apart(tokens: int, launches: list[int]) -> None:
    first, second, third = siblings(SPECS[2], tokens, (17, 5, 3), bias=True)
    other_scale = replace(second, scale=second.scale.float(), zero=second.zero.float())
    other_bias = replace(third, bias=None if third.bias is None else third.bias.half())
    no_bias = replace(third, bias=None)
    for cases in ([first, other_scale], [first, other_bias], [first, no_bias, third]):
        launches.clear()
        for case, y in zip(cases, run(cases), strict=True):
            assert torch.equal(y, case.expected(torch.float32))
        assert launches == [1] * len(cases)


def test_no_tokens_and_leading_dimensions() -> None:
    cases = siblings(SPECS[2], 6, (5, 20))
    for shape in ((0,), (2, 3), (2, 0, 3)):
        tokens = torch.Size(shape).numel()
        x, counts = cases[0].x[:tokens].view(*shape, K), cases[0].counts[:tokens].view(shape)
        ys = wiring.routed_linears(x, counts, *weights_of(cases), SPECS[2])
        for y, case in zip(ys, cases, strict=True):
            assert y.shape == (*shape, case.slices.shape[1])
            assert torch.equal(y.flatten(0, -2), case.expected(torch.float32)[:tokens])


def test_float64_goes_to_the_reference() -> None:
    first, second = siblings(SPECS[2], 2, (5, 3))
    cases = [replace(c, x=first.x.double()) for c in (first, second)]
    for case, y in zip(cases, run(cases), strict=True):
        assert torch.equal(y, case.expected())


# --- one op that routes and multiplies ---------------------------------------------------------------


def router_of(spec: SliceSpec) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return router, thresholds that part small integers, a histogram that is not empty, and a mask of padding."""
    g = torch.Generator().manual_seed(1)
    energy = torch.randint(0, 3, (K,), generator=g).float()
    gain = 4.0 ** -torch.arange(spec.num_slices - 1, dtype=torch.float32)
    thresholds = gain * torch.linspace(6.0 * K, 7.0 * K, spec.num_slices - 1).round()
    mask = torch.ones(9, dtype=torch.int32)
    mask[0], mask[2] = 4, 0
    return [energy, gain], thresholds, torch.arange(spec.num_slices), mask


@pytest.mark.parametrize("tokens", [1, 4, 11])
@pytest.mark.parametrize("rows", [(18,), (5, 17, 3)], ids=str)
@pytest.mark.parametrize("spec", [SPECS[2], SPECS[3]], ids=spec_id)
def test_elastic_linears_are_the_reference(
    spec: SliceSpec, rows: tuple[int, ...], tokens: int, launches: list[int]
) -> None:
    cases = siblings(spec, tokens, rows, bias=True)
    router, thresholds, hist, mask = router_of(spec)
    wanted_hist = hist.clone()
    weights = weights_of(cases)
    ys = wiring.elastic_linears(
        cases[0].x, router, thresholds, hist, mask, "energy", *weights, spec, Activation.A16, ROUTED
    )
    counts = reference.route(cases[0].x, router, thresholds, wanted_hist, mask, "energy")
    assert tokens == 1 or len(counts.unique()) > 1, "a test of one count is none of routing"
    assert torch.equal(hist, wanted_hist)
    for case, y in zip(cases, ys, strict=True):
        assert torch.equal(y, replace(case, counts=counts).expected(torch.float32))
    assert launches == [len(rows)]


@pytest.mark.parametrize("kind_and_dtype", [("magic", torch.float32), ("energy", torch.float64)], ids=str)
def test_what_no_kernel_routes_is_routed_by_the_reference(
    kind_and_dtype: tuple[str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, dtype = kind_and_dtype
    monkeypatch.setitem(reference.SCORES, "magic", lambda x, router: x.float().sum(1, keepdim=True) * router[1])
    cases = siblings(SPECS[2], 4, (5, 3))
    x = cases[0].x.to(dtype)
    router, thresholds, hist, mask = router_of(SPECS[2])
    wanted_hist = hist.clone()
    counts = reference.route(x, router, thresholds, wanted_hist, mask, kind)
    ys = wiring.elastic_linears(
        x, router, thresholds, hist, mask, kind, *weights_of(cases), SPECS[2], Activation.A16, ROUTED
    )
    assert torch.equal(hist, wanted_hist)
    for case, y in zip(cases, ys, strict=True):
        assert torch.equal(y, replace(case, x=x, counts=counts).expected(dtype))


def test_full_prefill_takes_all_slices_that_thresholds_allow() -> None:
    spec = SPECS[2]
    cases = siblings(spec, 65, (2, 3))
    router, thresholds, hist, mask = router_of(spec)
    thresholds[:] = torch.tensor([ALL, 1e30, float("inf")])
    ys = wiring.elastic_linears(
        cases[0].x, router, thresholds, hist, mask, "energy", *weights_of(cases), spec, Activation.A16, Prefill.FULL
    )
    for case, y in zip(cases, ys, strict=True):
        full = replace(case, counts=torch.full((65,), 3, dtype=torch.int32))
        assert torch.equal(y, full.expected(torch.float32))
    assert hist.tolist() == [0, 1, 2 + 65, 3]


# --- its two halves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("tokens", [1, 4])
def test_tokens_prepared_once_serve_any_weight_and_count(tokens: int, activation: Activation) -> None:
    spec = SPECS[2]
    cases = [random_case(spec, tokens, n, K, seed=n) for n in (3, 20)]
    router, thresholds, hist, mask = router_of(spec)
    x = cases[0].x
    prepared = wiring.prepare(x, router, thresholds, hist, mask, spec, activation)
    wanted = wiring.route(x, router, thresholds, torch.zeros_like(hist), mask, "energy")
    assert torch.equal(prepared.counts, wanted)
    for counts in (wanted, torch.full_like(wanted, 4), torch.ones_like(wanted)):
        for case in cases:
            again = wiring.with_counts(prepared, counts)
            y = wiring.multiply(again, case.slices, case.scale, case.zero, case.bias, spec, activation)
            same = replace(case, x=x, counts=counts)
            assert torch.equal(y, wiring.routed_linear(*same.arguments, spec, activation))
    assert torch.equal(prepared.counts, wanted), "other counts are another object"


def test_every_call_is_counted_by_its_path() -> None:
    cases = siblings(SPECS[2], 2, (3, 5))
    router, thresholds, hist, mask = router_of(SPECS[2])
    reset_execution_paths()
    run(cases)
    run(cases[:1])
    wiring.routed_linear(cases[0].x.double(), *cases[0].arguments[1:], SPECS[2])
    weights = weights_of(cases)
    wiring.elastic_linears(
        cases[0].x, router, thresholds, hist, mask, "energy", *weights, SPECS[2], Activation.A16, ROUTED
    )
    assert execution_paths() == [
        {"path": "integer", "tokens": "2..8", "calls": 5},
        {"path": "reference", "tokens": "2..8", "calls": 1},
    ]
    reset_execution_paths()
    assert execution_paths() == []


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("parts", [1, 3])
def test_warming_up_loads_every_kernel_that_calls_need(
    parts: int, activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobiquant_compiler.codegen import cache

    half, spec = torch.float16, SliceSpec((2, 1), 32)
    launched = warming.warm_kernels(
        spec, 20, K, half, "cpu", bias_dtype=half, parts=parts, max_tokens=2, activation=activation
    )
    assert launched >= 3, "one that routes and quantizes, one that multiplies one token, one that multiplies two"
    known = {kernel.spec for kernel in cache.loaded_kernels()}
    monkeypatch.setattr(cache, "emit", lambda spec: pytest.fail(f"{spec.name} was not warmed up"))
    router, thresholds, hist, mask = router_of(spec)
    for tokens in (1, 2):
        cases = siblings(spec, tokens, (20,) * parts, bias=True)
        cases = [replace(c, x=c.x.half(), bias=None if c.bias is None else c.bias.half()) for c in cases]
        routing = (cases[0].x, router, thresholds, hist, mask, "energy")
        wiring.elastic_linears(*routing, *weights_of(cases), spec, activation, ROUTED)
        run(cases, activation)
        wiring.route(*routing)
    assert {kernel.spec for kernel in cache.loaded_kernels()} == known
