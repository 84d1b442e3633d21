"""Kernels that route, alone or beside quantizing, are one piece of code: a token gets the same count from each."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest

from mobiquant_compiler.codegen.configs import Target, TokenClass, fits, kernel_spec
from mobiquant_compiler.codegen.specialise import specialise
from mobiquant_compiler.errors import BadKernelSpec
from mobiquant_compiler.kernels import router_spec
from mobiquant_compiler.spec import Family, KernelSpec, SliceSpec

H100 = Target.of(90)
FIRST = Family.ROUTE_QUANTIZE


@pytest.mark.parametrize("k", [40, 576, 4096, 14336])
def test_scores_do_not_depend_on_what_else_a_kernel_does(k: int) -> None:
    weights = [(router_spec(4), False), *((SliceSpec(group=group), True) for group in (32, 64, 128))]
    specs = [kernel_spec(FIRST, weight, k, TokenClass.ONE, H100, quantize=quantize) for weight, quantize in weights]
    found = [re.search(r"def route_token\(.*?(?=\n\n\n)", specialise(spec), re.DOTALL) for spec in specs]
    assert all(found)
    assert len({match[0] for match in found if match}) == 1, "the same text"
    assert len({(spec.num_warps, spec.block_r, spec.columns) for spec in specs}) == 1, "on as many warps and columns"


@pytest.mark.parametrize("k", [40, 577, 4096, 14336])
@pytest.mark.parametrize("hidden", [5, 12, 40])
def test_networks_score_alike_for_one_token_and_for_many(k: int, hidden: int) -> None:
    """What may differ are tokens and steps of a program: neither changes the order of a token's sums."""
    weights = [(router_spec(4), False), *((SliceSpec(group=group), True) for group in (32, 64, 128))]
    facts = set()
    for weight, quantize in weights:
        texts = set()
        for long in (False, True):
            options = {"quantize": quantize, "hidden": hidden, "long": long}
            spec = kernel_spec(FIRST, weight, k, TokenClass.ONE, H100, **options)
            match = re.search(r"def route_by_network\(.*?(?=\n\n\n)", specialise(spec), re.DOTALL)
            assert match
            call = f"{hidden}, 3, {spec.block_m}, {spec.block_r}, {spec.num_warps}, False)"
            assert call in match[0]
            texts.add(match[0].replace(call, "").replace(f"static_range({spec.block_m})", ""))
            facts.add((spec.num_warps, spec.columns))
        assert len(texts) == 1, "the same text"
    assert len(facts) == 1, "on as many warps and columns"


@pytest.mark.parametrize("k", [32, 100, 577, 1536, 4096, 11008, 40000])
@pytest.mark.parametrize("hidden", [1, 12, 100])
@pytest.mark.parametrize("long", [False, True])
def test_networks_have_a_tile_for_any_number_of_columns(k: int, hidden: int, long: bool) -> None:
    for target in map(Target.of, (80, 90, 120)):
        spec = kernel_spec(FIRST, SliceSpec(), k, TokenClass.ONE, target, hidden=hidden, long=long)
        assert fits(spec, target)
        assert (spec.hidden, spec.columns, spec.block_m) == (hidden, k, 4 if long else 1)
        assert spec.block_r % (64 * spec.num_warps) == 0
        assert spec.block_r < 2 * max(k, 64 * spec.num_warps), "no step without columns"
        assert spec.prefetch == (k if target.cc >= 90 else 0), "a network is read from memory, a token from caches"
        specialise(spec)


def test_only_networks_route_tokens_together() -> None:
    def found(family: Family, **options: Any) -> KernelSpec:
        return kernel_spec(family, SliceSpec(), 4096, TokenClass.ONE, H100, **options)

    assert found(FIRST, long=True) == found(FIRST)
    assert found(FIRST, route=False, hidden=12, long=True) == found(FIRST, route=False)
    assert found(Family.SLICED_MMA, hidden=12, long=True) == found(Family.SLICED_MMA)


def test_a_network_has_no_less_than_no_units() -> None:
    with pytest.raises(BadKernelSpec, match="kernel route_quantize: hidden got -1; wanted at least 0"):
        kernel_spec(FIRST, SliceSpec(), 4096, TokenClass.ONE, H100, hidden=-1)


def test_functions_that_nothing_calls_are_gone() -> None:
    def found(**options) -> set[str]:
        tree = ast.parse(specialise(kernel_spec(FIRST, SliceSpec(), 4096, TokenClass.ONE, H100, **options)))
        return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}

    quantizing = {"quantize_columns", "begin", "route_quantize"}
    assert found(route=False) == quantizing
    assert found() == quantizing | {"record", "route_token"}
    assert found(hidden=12) == quantizing | {"record", "route_by_network"}
    assert found(hidden=12, quantize=False) == {"record", "route_by_network", "begin", "route_quantize"}
