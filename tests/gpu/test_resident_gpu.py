"""Few tokens in shared memory, from tile to tile of rows: the bits of a program for each tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mobiquant_compiler import warming, wiring
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.codegen.configs import TokenClass
from mobiquant_compiler.codegen.resident_configs import multiply_spec
from mobiquant_compiler.kernels import gluon_refusal, prepare_kernel, target_of
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Prepared, Weight
from mobiquant_compiler.spec import Activation, Family, KernelSpec, SliceSpec
from tests.kernel_cases import Case, random_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WHERE, SPEC = "cuda", SliceSpec((2, 2, 2, 2), 128)
FULL_CHAINS, UNEVEN_CHAINS = 4096, 3000  # the last step of 24 groups is one of four chains
# Activations pass through: seven steps; five, the last of 8 groups; and 13, with room for the sums of one tile.
PASSING, PASSING_UNEVEN, PASSING_NARROW = 14336, 9216, 25600
ENOUGH_ROWS = 8192  # that resident_mma is chosen; tests have fewer


def chosen(spec: SliceSpec, k: int, rows: int, **options: object) -> KernelSpec:
    """Return the kernel for eight tokens and so many rows."""
    return multiply_spec(spec, k, TokenClass.of(8), target_of(torch.device(WHERE)), n=rows, **options)


@pytest.fixture(autouse=True)
def resident_is_there() -> None:
    """Skip where no kernel keeps activations in shared memory."""
    if chosen(SPEC, FULL_CHAINS, ENOUGH_ROWS).family is not Family.RESIDENT_MMA or gluon_refusal() is not None:
        pytest.skip(f"no resident_mma here: {gluon_refusal() or 'not sm_90'}")


def quantized(case: Case, activation: Activation = Activation.A16) -> Prepared:
    """Return a case's tokens in fixed point."""
    target = target_of(case.x.device)
    kernel = prepare_kernel(case.spec, case.x.shape[1], target, activation, route=False, quantize=True)
    return launch.prepare(kernel, case.x, counts=case.counts)


def compare(spec: SliceSpec, k: int, prepared: Prepared, weights: Sequence[Weight], **options: object) -> list[Tensor]:
    """Multiply by resident_mma, of few programs and of as many as there are, and by sliced_mma; return the results."""
    facts = {"scale_bytes": weights[0].scale.element_size(), "parts": len(weights)} | options
    facts["has_bias"] = weights[0].bias is not None
    resident, sliced = chosen(spec, k, ENOUGH_ROWS, **facts), chosen(spec, k, 0, **facts)
    assert (resident.family, sliced.family) == (Family.RESIDENT_MMA, Family.SLICED_MMA)
    wanted = launch.multiply(cache.load(sliced), prepared, weights)
    for at_once in (1, 2, 3, None):
        found = launch.multiply(cache.load(resident), prepared, weights, at_once=at_once)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), f"{at_once} programs"
    return wanted


def weight_of(case: Case) -> Weight:
    """Return the weight of a case."""
    return Weight(case.slices, case.scale, case.zero, case.bias)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("k", [FULL_CHAINS, UNEVEN_CHAINS, PASSING, PASSING_UNEVEN, PASSING_NARROW])
def test_counts_alike_and_mixed(k: int, activation: Activation) -> None:
    for tokens, rows in ((2, 16), (5, 150), (8, 1003)):
        case = random_case(SPEC, tokens, rows, k, dtype=torch.bfloat16, device=WHERE, seed=tokens)
        prepared = quantized(case, activation)
        for counts in (case.counts, *(torch.full_like(case.counts, count) for count in (1, 2, 3, 4))):
            compare(SPEC, k, wiring.with_counts(prepared, counts), [weight_of(case)], activation=activation)
        case.counts.fill_(2)[0] = 1
        compare(SPEC, k, wiring.with_counts(prepared, case.counts), [weight_of(case)], activation=activation)


@pytest.mark.parametrize("widths", [(2,), (2, 2), (2, 2, 2)], ids=str)
def test_fewer_slices(widths: tuple[int, ...]) -> None:
    spec = SliceSpec(widths, 128)
    for k in (8192, 5120, FULL_CHAINS, PASSING):  # rings of two steps; not all chains have the last of 5120 columns
        case = random_case(spec, 7, 333, k, device=WHERE)
        compare(spec, k, quantized(case), [replace(weight_of(case), bias=None)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_other_dtypes(dtype: torch.dtype) -> None:
    for k in (FULL_CHAINS, UNEVEN_CHAINS, 7168, PASSING):  # scales of 32 bits of 7168: more copies than threads
        case = random_case(SPEC, 6, 200, k, dtype=torch.float16, scale_dtype=dtype, device=WHERE)
        compare(SPEC, k, quantized(case), [weight_of(case)])


@pytest.mark.parametrize("k", [7680, 22016])
def test_scales_of_32_bits_of_the_most_columns_that_stay_and_that_fit(k: int) -> None:
    """Rings of two steps, the last of which not all chains have, with room for the sums of one tile."""
    case = random_case(SPEC, 8, 300, k, scale_dtype=torch.float32, device=WHERE)
    prepared = quantized(case)
    for counts in (case.counts, *(torch.full_like(case.counts, count) for count in (1, 2, 4))):
        compare(SPEC, k, wiring.with_counts(prepared, counts), [weight_of(case)])


def test_scales_of_32_bits_have_activations_pass_through_earlier() -> None:
    """Beside three slices all have room; four slices say what is there."""
    spec = SliceSpec((2, 2, 2), 128)
    case = random_case(spec, 8, 300, 8192, scale_dtype=torch.float32, device=WHERE)
    prepared = quantized(case)
    for counts in (case.counts, torch.full_like(case.counts, 2)):
        compare(spec, 8192, wiring.with_counts(prepared, counts), [weight_of(case)])


def test_words_that_begin_anywhere_are_copied() -> None:
    """Descriptors want 16 bytes: words that are a view from the second on are moved."""
    case = random_case(SPEC, 8, 200, FULL_CHAINS, device=WHERE)
    words = torch.empty(case.slices.numel() + 1, dtype=torch.int32, device=WHERE)
    words[1:] = case.slices.flatten()
    view = words[1:].view(case.slices.shape)
    assert view.data_ptr() % 16 != 0
    prepared = quantized(case)
    wanted = compare(SPEC, FULL_CHAINS, prepared, [weight_of(case)])
    found = compare(SPEC, FULL_CHAINS, prepared, [replace(weight_of(case), slices=view)])
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("k", [8192, PASSING_UNEVEN])
def test_a_token_that_is_not_finite_is_alone(k: int) -> None:
    """Whatever lies in shared memory where a chain has no groups: what was there before is another step's."""
    case = random_case(SPEC, 8, 200, k, device=WHERE)
    (wanted,) = compare(SPEC, k, quantized(case), [weight_of(case)])
    case.x[3, -1], case.x[5, 0] = torch.inf, torch.nan
    kernel = cache.load(chosen(SPEC, k, ENOUGH_ROWS, has_bias=True))
    for at_once in (1, 3):
        (found,) = launch.multiply(kernel, quantized(case), [weight_of(case)], at_once=at_once)
        others = [0, 1, 2, 4, 6, 7]
        assert torch.equal(found[others], wanted[others])
        assert not found[[3, 5]].isfinite().any()


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_siblings_of_any_rows(parts: int) -> None:
    for k in (FULL_CHAINS, UNEVEN_CHAINS, 8192, PASSING_UNEVEN, 28672):
        cases = [random_case(SPEC, 8, rows, k, device=WHERE, seed=rows) for rows in (40, 333, 16, 1000)[:parts]]
        compare(SPEC, k, quantized(cases[0]), [weight_of(case) for case in cases])


@pytest.mark.parametrize("k", [FULL_CHAINS, 8192, PASSING, 28672])
def test_again_and_again(k: int) -> None:
    """What is written over too early differs now and then; sums of 8192 columns take turns in one place."""
    case = random_case(SPEC, 8, 5000, k, dtype=torch.bfloat16, device=WHERE)
    prepared = quantized(case)
    (wanted,) = compare(SPEC, k, prepared, [weight_of(case)])
    kernel = cache.load(chosen(SPEC, k, ENOUGH_ROWS, has_bias=True))
    for _ in range(50):
        assert torch.equal(launch.multiply(kernel, prepared, [weight_of(case)])[0], wanted)


def test_a_linear_takes_them_under_a_graph_whatever_the_counts() -> None:
    case = random_case(SPEC, 8, 6000, FULL_CHAINS, dtype=torch.bfloat16, device=WHERE)
    tokens = [replace(case, x=case.x[i : i + 1], counts=case.counts[i : i + 1].clone()) for i in range(8)]
    alone = [wiring.routed_linear(*token.arguments, SPEC) for token in tokens]
    counts = case.counts.clone()
    chosen_for = wiring.multiply_kernel_for([weight_of(case)], 8, 6000, FULL_CHAINS, SPEC, Activation.A16)
    assert chosen_for.spec.family is Family.RESIDENT_MMA
    wiring.routed_linear(*case.arguments, SPEC)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = wiring.routed_linear(*case.arguments, SPEC)
    for fill in (1, 4, 2, None):
        case.counts.copy_(counts if fill is None else torch.full_like(counts, fill))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.isfinite(y).all()
    assert torch.equal(y, torch.cat(alone)), "as each token alone"


def test_nothing_compiles_after_warming_up() -> None:
    rows, columns = 512, 7168  # as few as it serves
    case = random_case(SPEC, 8, rows, columns, dtype=torch.bfloat16, device=WHERE)
    warming.warm_kernels(SPEC, rows, columns, torch.bfloat16, WHERE, bias_dtype=torch.bfloat16)
    compiled = cache.compiled_kernels()
    assert compiled > 0
    taken = wiring.multiply_kernel_for([weight_of(case)], 8, rows, columns, SPEC, Activation.A16)
    assert taken.spec.family is Family.RESIDENT_MMA
    for tokens in range(1, 9):
        few = replace(case, x=case.x[:tokens], counts=case.counts[:tokens])
        wiring.routed_linear(*few.arguments, SPEC)
        assert cache.compiled_kernels() == compiled, f"{tokens} tokens"
