"""Kernels that route by a network, compiled: how they load, and that a token's sums have one order in all of them."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

from mobiquant_compiler.codegen import cache as kernels
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.codegen.signature import Dtypes
from mobiquant_compiler.kernels import router_spec
from mobiquant_compiler.spec import Family, SliceSpec

K, HIDDEN = 4096, 12
LOAD = re.compile(r"ld\.global(?:\.(?!v\d|b\d)\w+)*\.(?:v(\d)\.)?b(16|32)\b")


@cache
def compiled(
    k: int = K, hidden: int = HIDDEN, long: bool = False, group: int = 0, cc: int = 90, x: str = "bf16"
) -> Any:
    """Compile a kernel that routes, and quantizes in groups where one is named."""
    weight = SliceSpec(group=group) if group else router_spec(4)
    options = {"quantize": group > 0, "hidden": hidden, "long": long}
    spec = kernel_spec(Family.ROUTE_QUANTIZE, weight, k, TokenClass.ONE, Target.of(cc), **options)
    return kernels.compile_for(spec, cc, Dtypes(x=x))


def reductions(text: str) -> set[str]:
    """Return the types of what is summed over threads, layouts spelled out."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", text, re.MULTILINE))
    found = re.findall(r'"tt\.reduce"\(.*?\}\) : \((.*?)\) ->', text, re.DOTALL)
    return {re.sub(r"#\w+\b(?!\.)", lambda name: layouts.get(name[0], name[0]), types) for types in found}


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("k", [40, 577, K])
def test_tokens_are_summed_over_threads_in_one_order(k: int, cc: int) -> None:
    """Alone, four a program and beside quantizing: the same shapes on the same layouts, whose order Triton follows."""
    alone = reductions(compiled(k, cc=cc).asm["ttgir"])
    assert len(alone) >= 4, "statistics, hidden units over lanes and warps, scores"
    assert reductions(compiled(k, long=True, cc=cc).asm["ttgir"]) == alone
    for group in (32, 128):
        assert alone <= reductions(compiled(k, group=group, cc=cc).asm["ttgir"])


def test_weights_are_loaded_in_words_and_once_for_four_tokens() -> None:
    """Of two columns a step and thread: a word of each hidden unit and token, two energies as one vector."""
    for long, tokens, steps in ((False, 1, 8), (True, 4, 2)):
        loads = LOAD.findall(compiled(long=long).asm["ptx"])
        assert loads.count(("2", "32")) == steps, "energies"
        few = loads.count(("", "32")) - steps * (HIDDEN + tokens)
        assert 0 <= few <= 6 + tokens, "what does not grow with columns: gain, thresholds, the mask"


@pytest.mark.parametrize("long", [False, True])
def test_products_are_fused_where_it_is_written_and_nowhere_else(long: bool) -> None:
    ptx, tokens, steps = compiled(long=long).asm["ptx"], 4 if long else 1, 2 if long else 8
    assert ptx.count("fma.rn.f32") == tokens * steps * 2 * (HIDDEN + 1)


def test_lanes_halve_what_they_have_left_to_sum() -> None:
    """Sixteen sums take fifteen exchanges and the last one; one at a time they would take eighty."""
    ptx = compiled().asm["ptx"]
    folded = re.findall(r"shfl\.sync\.bfly\.b32 [^,]+, [^,]+, (\d+), 31, 0xffffffff", ptx)
    assert [folded.count(distance) for distance in ("16", "8", "4", "2")] == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("k", "hidden", "x"), [(577, 12, "bf16"), (K, 1, "fp16"), (K, 12, "fp32"), (K, 100, "bf16")], ids=str
)
def test_other_shapes_and_dtypes_compile(k: int, hidden: int, x: str) -> None:
    for long in (False, True):
        assert compiled(k, hidden, long, 128, x=x).asm["cubin"]
