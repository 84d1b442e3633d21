"""Every family compiled to PTX and cubin for three targets, without a GPU: which instructions, in what order."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from mobiquant_compiler.codegen import cache as kernels
from mobiquant_compiler.codegen.chains import loads_ahead
from mobiquant_compiler.codegen.configs import Target, TokenClass, fits, kernel_spec, shared_bytes
from mobiquant_compiler.codegen.device import all_shared
from mobiquant_compiler.codegen.one_token import is_rolled
from mobiquant_compiler.codegen.signature import Dtypes, parameter_type
from mobiquant_compiler.codegen.specialise import bindings, template_path
from mobiquant_compiler.spec import Activation, Family, KernelSpec, Layout, SliceSpec
from tests.kernel_cases import shares_runs, spec_id

TARGETS = (80, 90, 100)
TWO = SliceSpec((2, 2), 64)
K = 4096
MMA, FIRST = Family.SLICED_MMA, Family.ROUTE_QUANTIZE
ONE, MANY = TokenClass.of(1), TokenClass.of(8)
KERNELS: dict[str, tuple[Family, TokenClass, dict[str, Any]]] = {
    "route": (FIRST, ONE, {"quantize": False}),
    "quantize": (FIRST, ONE, {"route": False}),
    "route_and_quantize": (FIRST, ONE, {}),
    "route_and_quantize_a8": (FIRST, ONE, {"activation": Activation.A8}),
    "route_and_quantize_rows": (FIRST, ONE, {"token_rows": True}),
    "route_and_quantize_rows_by_network": (FIRST, ONE, {"token_rows": True, "hidden": 12}),
    "route_by_network": (FIRST, ONE, {"quantize": False, "hidden": 12}),
    "route_by_network_and_quantize": (FIRST, ONE, {"hidden": 12}),
    "route_four_by_network": (FIRST, ONE, {"quantize": False, "hidden": 12, "long": True}),
    "route_by_wide_network": (FIRST, ONE, {"hidden": 40}),
    "one_token": (MMA, ONE, {"has_bias": True}),
    "one_token_a8": (MMA, ONE, {"activation": Activation.A8}),
    "one_token_siblings": (MMA, ONE, {"parts": 3}),
    "many_tokens": (MMA, MANY, {}),
    "many_tokens_siblings": (MMA, MANY, {"parts": 4, "has_bias": True}),
    "two_blocks": (MMA, TokenClass.SOME, {}),
    "two_tiles_of_rows": (MMA, TokenClass.MANY, {"has_bias": True}),
}
WORDS = re.compile(r"ld\.global\.nc\.L1::no_allocate\.(?:v(\d)\.)?b32")  # what reads weights, once
MULTIPLY = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"


def chosen(name: str, cc: int = 90, weight: SliceSpec = TWO) -> KernelSpec:
    """Return the kernel of a name."""
    family, tokens, options = KERNELS[name]
    return kernel_spec(family, weight, K, tokens, Target.of(cc), **options)


@cache
def compiled(spec: KernelSpec, cc: int = 90, dtypes: Dtypes | None = None) -> Any:
    """Compile once per session."""
    return kernels.compile_for(spec, cc, dtypes)


def ptx_of(spec: KernelSpec, cc: int = 90) -> str:
    """Return the instructions of a kernel, without lines that say where they come from."""
    lines = compiled(spec, cc).asm["ptx"].splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith((".loc", ".file", "//")))


def multiply_spec(weight: SliceSpec, tokens: TokenClass, **options: Any) -> KernelSpec:
    """Choose the kernel that multiplies by a weight of K columns."""
    return kernel_spec(MMA, weight, K, tokens, Target.of(90), **options)


@pytest.mark.parametrize("cc", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_and_fits(name: str, cc: int) -> None:
    spec, target = chosen(name, cc), Target.of(cc)
    binary = compiled(spec, cc)
    assert f".target sm_{cc}" in binary.asm["ptx"]
    assert len(binary.asm["cubin"]) > 1000
    assert fits(spec, target)
    assert binary.metadata.shared <= shared_bytes(spec) <= target.shared_bytes
    products = re.findall(r"mma\.sync\S*", ptx_of(spec, cc))
    assert set(products) == ({MULTIPLY} if spec.family is MMA else set())


@pytest.mark.parametrize("cc", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_overlap_where_devices_can_and_read_nothing_before_their_turn(name: str, cc: int) -> None:
    spec = chosen(name, cc)
    assert spec.overlap == (cc >= 90)
    ptx = ptx_of(spec, cc)
    signals = re.findall(r"griddepcontrol\.(\w+)", ptx)
    if not spec.overlap:
        assert not signals
        assert "prefetch." not in ptx
        return
    late = spec.family is MMA and spec.block_m > 8
    assert signals[:2] == (["wait", "launch_dependents"] if late else ["launch_dependents", "wait"])
    assert set(signals[2:]) <= ({"launch_dependents"} if late else set())
    before, after = ptx.split("griddepcontrol.wait")
    assert not re.search(r"\b(ld|st|red|atom)\.global", before), "the kernel before may still be writing"
    assert "ld.global" in after
    assert ("prefetch.global.L2" in before) == bool(spec.prefetch)
    assert "prefetch." not in after


@pytest.mark.parametrize("tokens", [TokenClass.SOME, TokenClass.MANY], ids=str)
def test_the_next_kernel_begins_when_products_of_many_tokens_are_done(tokens: TokenClass) -> None:
    """What it would do by then would take turns with the products. A body for tokens that are alike, one for others."""
    order = re.findall(r"mma\.sync|st\.global|launch_dependents", ptx_of(multiply_spec(TWO, tokens)))
    signals = [at for at, name in enumerate(order) if name == "launch_dependents"]
    assert len(signals) == 3
    for at in signals:
        assert (order[at - 1], order[at + 1]) == ("mma.sync", "st.global")


def test_without_overlap_nothing_waits() -> None:
    for name in ("route_and_quantize", "one_token"):
        spec = replace(chosen(name), overlap=False, prefetch=0)
        assert "griddepcontrol" not in ptx_of(spec)
        assert "launch_pdl" not in kernels.options(spec)
    assert kernels.options(chosen("one_token"))["launch_pdl"] is True


def word_bytes(spec: KernelSpec) -> int:
    """Return the bytes that a lane's loads of packed words ask for in all."""
    return sum(4 * int(lanes or 1) for lanes in WORDS.findall(ptx_of(spec)))


def copies(spec: KernelSpec, count: int, *, alike: bool = True) -> int:
    """Return how often a step stands in the body of a count: twice where its first or last is not one of a loop's."""
    steps, bits = (spec.k // spec.group + 15) // 16, sum(spec.widths[:count])
    if spec.block_m == 1 and all_shared(spec.widths, str(spec.layout), spec.group):
        return 1 if steps == 1 or is_rolled(bits, steps) else 2
    return 1 + loads_ahead(spec.row_tiles, (spec.block_m + 7) // 8, alike, bits, steps)


@pytest.mark.parametrize("k", [2048, 4096, 8192])
@pytest.mark.parametrize("layout", list(Layout))
def test_one_token_asks_for_the_base_slice_before_it_knows_the_count(layout: Layout, k: int) -> None:
    """Once for all bodies; what a body asks for besides are the other slices of a first step, and all of a loop's."""
    spec = kernel_spec(MMA, SliceSpec((2,) * 4, 128, layout), k, ONE, Target.of(90))
    before, bodies = re.split(r"\bbrx?\b|\bbra\b", ptx_of(spec), maxsplit=1)
    own = 2 * 16  # bytes that a lane loads of a slice of a pair of groups, for two rows
    in_bodies = 0
    for count in range(1, 5):
        looped, apart = k > 2048, copies(spec, count) == 2 or k == 2048
        in_bodies += looped * count + apart * (count - 1)
    loaded = [sum(4 * int(lanes or 1) for lanes in WORDS.findall(text)) for text in (before, bodies)]
    assert loaded == [own, in_bodies * own]


@pytest.mark.parametrize("slices", [1, 2])
def test_one_token_asks_for_all_of_a_step_before_it_multiplies_the_one_before(slices: int) -> None:
    """Loads share the counters that a warp waits by: what is asked for late comes with the words of the next step."""
    ptx = ptx_of(kernel_spec(MMA, SliceSpec((2,) * slices, 128), 8192, ONE, Target.of(90)))
    blocks = re.split(r"^(\$L__BB\d+_\d+):", ptx, flags=re.MULTILINE)
    after = zip(blocks[1::2], blocks[2::2], strict=True)
    cut = (re.split(rf"bra\s+{re.escape(label)};", text) for label, text in after)
    loops = [parts[0] for parts in cut if len(parts) > 1]
    assert len(loops) == slices
    asked = {body.count("ld.global") for body in loops}
    assert asked == {10 + 2 * count for count in range(1, slices + 1)}
    for body in loops:
        order = re.findall(r"ld\.global|mma\.sync", body)
        assert order.index("mma.sync") == order.count("ld.global")


@pytest.mark.parametrize("layout", list(Layout))
def test_loads_of_words_grow_linearly_with_the_slices_used(layout: Layout) -> None:
    """A kernel has bodies by slice count; what a further slice adds grows by one slice's words a time."""
    specs = [multiply_spec(SliceSpec((2,) * slices, 128, layout), MANY) for slices in range(1, 5)]
    bodies = [b - a for a, b in pairwise([0, *map(word_bytes, specs)])]
    times = [copies(specs[-1], count) for count in range(1, 5)]
    assert not any(body % often for body, often in zip(bodies, times, strict=True))
    steps = [body // often for body, often in zip(bodies, times, strict=True)]
    assert steps[1] > 0
    assert [2 * step for step in steps[1:]] == [count * steps[1] for count in (2, 3, 4)]


@pytest.mark.parametrize("weight", [SliceSpec((2,), 128), SliceSpec((2,), 64), SliceSpec((4,), 64)], ids=spec_id)
def test_no_word_is_loaded_twice(weight: SliceSpec) -> None:
    spec = multiply_spec(weight, ONE)
    tile = spec.block_n * 2 * weight.group  # weights of a pair of groups, shared by the lanes of a warp
    assert word_bytes(spec) == copies(spec, weight.num_slices) * tile * weight.total_bits // 8 // 32


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (SliceSpec((2, 2), 128), 4),
        (SliceSpec((4,), 64), 4),
        (SliceSpec((2, 2), 64), 2),
        (SliceSpec((2, 2), 128, Layout.BIT_MAJOR), 2),
        (SliceSpec((4, 4), 128), 4),
    ],
    ids=str,
)
def test_words_are_loaded_in_vectors(weight: SliceSpec, words: int) -> None:
    for tokens in (ONE, MANY):
        found = WORDS.findall(ptx_of(multiply_spec(weight, tokens)))
        assert {int(lanes or 1) for lanes in found} == {words}


def test_loads_are_predicated_where_chains_do_not_come_out_even() -> None:
    """Of 17 groups, seven chains have none in their second step: no lane may read past the end."""
    spec = kernel_spec(MMA, SliceSpec((2, 2), 128), 17 * 128, ONE, Target.of(90))
    assert not WORDS.findall(ptx_of(spec))
    assert re.search(r"@p ld\.global\.v4\.b32", ptx_of(spec))


def products_by_activation(tokens: TokenClass) -> dict[Activation, int]:
    """Return how many products stand in the kernels of both widths of activations."""
    return {a: ptx_of(multiply_spec(TWO, tokens, activation=a)).count(MULTIPLY) for a in Activation}


def test_eight_bit_activations_halve_the_products_of_many_tokens() -> None:
    counts = products_by_activation(MANY)
    assert counts[Activation.A16] == 2 * counts[Activation.A8] > 0


def test_both_halves_of_one_token_are_columns_of_one_product() -> None:
    counts = products_by_activation(ONE)
    assert counts[Activation.A16] == counts[Activation.A8] > 0


@pytest.mark.parametrize("tokens", [ONE, MANY])
def test_one_body_serves_all_weights_of_a_launch(tokens: TokenClass) -> None:
    alone, together = (ptx_of(multiply_spec(TWO, tokens, parts=parts)) for parts in (1, 4))
    assert together.count(MULTIPLY) == alone.count(MULTIPLY)
    assert len(WORDS.findall(together)) == len(WORDS.findall(alone))


@pytest.mark.parametrize(
    ("weight", "dtypes"),
    [
        (SliceSpec((4, 2, 2), 64), Dtypes("fp32", "fp32")),
        (SliceSpec((3, 3, 2), 32, Layout.BIT_MAJOR), Dtypes("fp16", "bf16")),
        (SliceSpec((1,) * 3, 32), Dtypes("fp32", "fp16")),
        (SliceSpec((1,) * 8, 64), Dtypes("bf16", "fp32")),
        (SliceSpec((4, 1, 2), 128), Dtypes("bf16", "bf16")),
        (SliceSpec((2, 2), 64), Dtypes("bf16", "fp64")),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [ONE, MANY])
def test_other_widths_layouts_and_dtypes_compile(weight: SliceSpec, dtypes: Dtypes, tokens: TokenClass) -> None:
    spec = kernel_spec(MMA, weight, 4000, tokens, Target.of(90), has_bias=True)
    assert compiled(spec, 90, dtypes).asm["cubin"]


@pytest.mark.parametrize(
    ("name", "constexpr", "value", "message"),
    [
        ("route", "NUM_SLICES", 9, "a code has 1 to 8 slices"),
        ("quantize", "ACTIVATION", "a4", "activations have 16 or 8 bits"),
        ("quantize", "BLOCK_W", 32, "a program quantizes whole groups"),
        ("route", "BLOCK_M", 4, "a data-free router has a program for every token"),
        ("route_by_network", "BLOCK_R", 256, "a step gives two columns to each thread"),
        ("one_token", "GROUP", 48, "a group has 32, 64 or 128 columns"),
        ("one_token", "LAYOUT", "by_byte", "slices are packed whole or by plane"),
        ("one_token_siblings", "PARTS", 5, "one launch serves 1 to 4 weights"),
        ("many_tokens", "BLOCK_M", 4, "a program has one token, or blocks of eight"),
        ("many_tokens", "K_PADDED", 100, "columns are padded to whole groups"),
    ],
)
def test_an_illegal_constexpr_is_refused_by_the_template_itself(
    name: str, constexpr: str, value: int | str, message: str
) -> None:
    """Templates are Triton kernels of their own, also when nothing was specialised."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.errors import CompilationError

    spec = chosen(name)
    family = spec.family
    function = getattr(import_module(f"mobiquant_compiler.codegen.templates.{template_path(family).stem}"), family)
    bound = {key: v for key, v in bindings(spec).items() if key in function.arg_names}
    types = {n: "constexpr" if n in bound else parameter_type(n, family, Dtypes()) for n in function.arg_names}
    constants = {(function.arg_names.index(key),): v for key, v in {**bound, constexpr: value}.items()}
    with pytest.raises(CompilationError) as caught:
        triton.compile(ASTSource(function, types, constexprs=constants), target=GPUTarget("cuda", 90, 32))
    assert message in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("weight", [SliceSpec((2, 2), 128), SliceSpec((1, 2, 1), 64, Layout.BIT_MAJOR)], ids=spec_id)
def test_contraction_is_only_where_it_is_written(weight: SliceSpec) -> None:
    """Bodies for different counts round alike: no float fma but those of `add_group` and `grid_at`."""
    for tokens in (ONE, MANY):
        for activation in Activation:
            spec = multiply_spec(weight, tokens, activation=activation)
            assert kernels.options(spec)["enable_fp_fusion"] is False
            ptx = ptx_of(spec)
            counts = range(1, weight.num_slices + 1)
            alike = [copies(spec, count) for count in counts]  # steps that stand in the bodies of the kernel
            mixed = [copies(spec, count, alike=False) for count in counts[1:]] if tokens is MANY else []
            sums = 4 if tokens is ONE and shares_runs(weight) else 8  # a lane's additions to them in a pair of groups
            steps = sum(alike) + sum(mixed)
            assert len(re.findall(r"cvt\.rn\.f32\.s32", ptx)) == steps * sums
            grids = 4 * sum(alike[1:]) + 8 * sum(mixed)  # of two rows and groups, and tokens; one slice has the base's
            fused = ptx.count("fma.rn.f32")  # LLVM computes a grid once for a loop's end and the step behind it
            assert 2 * steps * sums < fused <= 2 * steps * sums + grids
            assert "fma.rn.ftz" not in ptx


@pytest.mark.parametrize("name", KERNELS)
def test_small_numbers_are_not_flushed(name: str) -> None:
    spec = chosen(name)
    flushed = set(re.findall(r"\S+\.ftz\S*", ptx_of(spec)))
    # Triton's logarithm flushes; what networks take it of is not below 1e-12.
    assert flushed <= ({"fma.rn.ftz.f32"} if spec.hidden else set())


def test_quantizing_rounds_once() -> None:
    """No contraction and, in a16, no division: the step is a power of two."""
    assert not re.search(r"\bfma\.|\bdiv\.", ptx_of(chosen("quantize")))
    assert re.search(r"\bdiv\.(full|rn)\.f32", ptx_of(chosen("route_and_quantize_a8")))


def test_slice_counts_are_counted_by_one_addition_a_token() -> None:
    numbers = {"route": 1, "quantize": 0, "route_and_quantize": 1, "route_by_network": 1, "route_four_by_network": 4}
    for name, number in numbers.items():
        assert len(re.findall(r"(?:atom|red)\.\S*add\S*\.u64", ptx_of(chosen(name)))) == number


@pytest.mark.parametrize("dtypes", [None, Dtypes("fp32", "fp32")], ids=["", "scales of 32 bits"])
@pytest.mark.parametrize("groups", [32, 35])
def test_triton_has_few_loads_to_arrange(groups: int, dtypes: Dtypes | None) -> None:
    """One of its passes takes time that grows with the square of their number: two minutes, of 35 groups."""
    spec = kernel_spec(MMA, TWO, 64 * groups, MANY, Target.of(90))
    assert compiled(spec, 90, dtypes).asm["ttir"].count("tt.load") <= 2
