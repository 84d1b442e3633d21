"""Kernels that route, alone or beside quantizing, are one piece of code: a token gets the same count from each."""

from __future__ import annotations

import re

import pytest

from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.codegen.specialise import specialise
from mobiquant_compiler.kernels import router_spec
from mobiquant_compiler.spec import Family, SliceSpec

H100 = Target.of(90)


@pytest.mark.parametrize("k", [40, 576, 4096, 14336])
def test_scores_do_not_depend_on_what_else_a_kernel_does(k: int) -> None:
    weights = [(router_spec(4), False), *((SliceSpec(group=group), True) for group in (32, 64, 128))]
    specs = [
        kernel_spec(Family.ROUTE_QUANTIZE, weight, k, TokenClass.ONE, H100, quantize=quantize)
        for weight, quantize in weights
    ]
    found = [re.search(r"def route_token\(.*?(?=\n\n\n)", specialise(spec), re.DOTALL) for spec in specs]
    assert all(found)
    assert len({match[0] for match in found if match}) == 1, "the same text"
    assert len({(spec.num_warps, spec.block_r, spec.columns) for spec in specs}) == 1, "on as many warps and columns"
