"""Every family compiled to PTX and cubin for three targets, without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from mobiquant_compiler.codegen import cache as kernels
from mobiquant_compiler.codegen.configs import Target, TokenClass, fits, kernel_spec, shared_bytes
from mobiquant_compiler.codegen.signature import Dtypes, parameter_type
from mobiquant_compiler.codegen.specialise import bindings, template_path
from mobiquant_compiler.spec import Activation, Family, KernelSpec, Layout, SliceSpec
from tests.kernel_cases import spec_id

TARGETS = (80, 90, 100)
TWO = SliceSpec((2, 2), 64)
BF16 = Dtypes()
FAMILIES = (
    (Family.ROUTE, TokenClass.ONE),
    (Family.QUANTIZE, TokenClass.ONE),
    (Family.QUANTIZE, TokenClass.MANY),
    (Family.DECODE, TokenClass.ONE),
    (Family.GROUPED, TokenClass.UP_TO_16),
    (Family.GROUPED, TokenClass.MANY),
)
LOADS = re.compile(r"\bld\.global\S*\.(?:v(\d)\.)?b(\d+)")


@cache
def compiled(spec: KernelSpec, cc: int, dtypes: Dtypes = BF16) -> Any:
    """Compile once per session."""
    return kernels.compile_for(spec, cc, dtypes)


@pytest.mark.parametrize("cc", TARGETS)
@pytest.mark.parametrize(("family", "tokens"), FAMILIES, ids=str)
def test_every_family_compiles_and_fits(family: Family, tokens: TokenClass, cc: int) -> None:
    target = Target.of(cc)
    spec = kernel_spec(family, TWO, 4096, tokens, target, has_bias=True)
    binary = compiled(spec, cc)
    assert f".target sm_{cc}" in binary.asm["ptx"]
    assert len(binary.asm["cubin"]) > 1000
    assert fits(spec, target)
    assert binary.metadata.shared <= shared_bytes(spec) <= target.shared_bytes
    if family is Family.GROUPED:
        assert re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", binary.asm["ptx"])
    if family is Family.DECODE:
        assert "dp4a.u32.s32" in binary.asm["ptx"]


def load_bytes(spec: KernelSpec) -> int:
    """Return the bytes a thread's load instructions ask for in all."""
    ptx = compiled(spec, 90).asm["ptx"]
    return sum(int(lanes or 1) * int(bits) // 8 for lanes, bits in LOADS.findall(ptx))


@pytest.mark.parametrize("layout", list(Layout))
def test_decode_loads_grow_linearly_with_the_slices_used(layout: Layout) -> None:
    """A kernel has a body per slice count; the body that a further slice adds grows by one slice's words a time."""
    loads = []
    for slices in range(1, 5):
        spec = SliceSpec((2,) * slices, 128, layout)
        loads.append(load_bytes(kernel_spec(Family.DECODE, spec, 4096, TokenClass.ONE, Target.of(90))))
    bodies = [b - a for a, b in pairwise([0, *loads])]
    growth = [b - a for a, b in pairwise(bodies[1:])]
    # One warp reads 2 rows of 128 positions of one 2-bit word (or two planes' words of 1/32 as many columns) a step.
    assert growth[0] > 0
    assert len(set(growth)) == 1


def test_words_are_loaded_once_for_all_their_places() -> None:
    spec = kernel_spec(Family.DECODE, SliceSpec((2,), 128), 4096, TokenClass.ONE, Target.of(90))
    words = spec.block_n * spec.block_w // 32  # a lane's share of a step: one word a position
    scales = 2 * 2 * spec.block_n * spec.block_w // 8 // 32 * 2  # at most: fp16 scale and zero of each group
    quantized = 2 * 4 * spec.block_w // 32 * 4  # two halves of four places
    groups = 2 * 4 * spec.block_w // 8  # at most: step and total
    assert load_bytes(spec) <= 4 + 4 * words + scales + quantized + groups


@pytest.mark.parametrize("activation", list(Activation))
def test_eight_bit_activations_halve_the_dot_products(activation: Activation) -> None:
    spec = kernel_spec(Family.DECODE, SliceSpec((2,), 128), 4096, TokenClass.ONE, Target.of(90), activation=activation)
    lanes = spec.block_n * spec.block_w // 32
    halves = 2 if activation is Activation.A16 else 1
    assert compiled(spec, 90).asm["ptx"].count("dp4a") == halves * 4 * lanes


@pytest.mark.parametrize(
    "spec",
    [
        SliceSpec((4, 2, 2), 64),
        SliceSpec((3, 3, 2), 32, Layout.BIT_MAJOR),
        SliceSpec((1,) * 3, 32),
        SliceSpec((4,), 32),
    ],
    ids=spec_id,
)
@pytest.mark.parametrize(("family", "tokens"), [(Family.DECODE, TokenClass.ONE), (Family.GROUPED, TokenClass.UP_TO_16)])
def test_other_widths_and_layouts_compile(spec: SliceSpec, family: Family, tokens: TokenClass) -> None:
    chosen = kernel_spec(family, spec, 4000, tokens, Target.of(90))
    assert compiled(chosen, 90, Dtypes("fp32", "fp32")).asm["cubin"]


@pytest.mark.parametrize(
    ("family", "name", "value", "message"),
    [
        (Family.ROUTE, "NUM_SLICES", 9, "a code has 1 to 8 slices"),
        (Family.QUANTIZE, "ACTIVATION", "a4", "activations have 16 or 8 bits"),
        (Family.DECODE, "GROUP", 48, "a group has 32, 64 or 128 columns"),
        (Family.GROUPED, "BLOCK_M", 8, "tiles of 16 to 256 tokens"),
    ],
)
def test_an_illegal_constexpr_is_refused_by_the_template_itself(
    family: Family, name: str, value: int | str, message: str
) -> None:
    """Templates are Triton kernels of their own, also when nothing was specialised."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.errors import CompilationError

    tokens = TokenClass.UP_TO_16 if family is Family.GROUPED else TokenClass.ONE
    spec = kernel_spec(family, TWO, 256, tokens, Target.of(90))
    function = getattr(import_module(f"mobiquant_compiler.codegen.templates.{template_path(family).stem}"), family)
    bound = {key: v for key, v in bindings(replace(spec)).items() if key in function.arg_names}
    types = {n: "constexpr" if n in bound else parameter_type(n, family, Dtypes()) for n in function.arg_names}
    constants = {(function.arg_names.index(key),): v for key, v in {**bound, name: value}.items()}
    with pytest.raises(CompilationError) as caught:
        triton.compile(ASTSource(function, types, constexprs=constants), target=GPUTarget("cuda", 90, 32))
    assert message in f"{caught.value} {caught.value.__cause__}"


def test_contraction_is_only_where_it_is_written() -> None:
    """Bodies for different counts round alike: their float fma are those of `add_group` and no others."""
    spec = kernel_spec(Family.DECODE, SliceSpec((2, 2), 128), 4096, TokenClass.ONE, Target.of(90))
    assert kernels.options(spec)["enable_fp_fusion"] is False
    lanes = max(1, spec.block_n * spec.block_w // 8 // 32)
    # Two a group; with one slice nothing shrinks, and the first of them is a plain difference.
    assert compiled(spec, 90).asm["ptx"].count("fma.rn.f32") == (1 + 2) * lanes
