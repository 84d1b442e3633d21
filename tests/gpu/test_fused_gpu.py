"""Weights made in registers on the device: products by group in float64, places, capture, no wait for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mobiquant_compiler import warming, wiring
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.kernels import fused_is_split, fused_kernel, gather_kernel
from mobiquant_compiler.runtime import fused
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import Prefill, SliceSpec, most_parts
from tests import waiting
from tests.kernel_cases import Case, random_case, spec_id
from tests.rounded_weights import unpacked_weights
from tests.tolerances import FUSED_RMS, WORKSPACE_TOLERANCES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPECS = (SliceSpec((2, 2, 2, 2), 128), SliceSpec((2, 2, 2, 2), 64), SliceSpec((2, 2, 2), 32), SliceSpec((2,), 64))
TOKENS = (65, 100, 256, 1000)
# Small tiles or large ones, and programs that run at a time: waves that are always full, that are not, and a single
# one. Programs of 1024 columns and more are split in the last two.
TILES = ((False, 1), (True, 1), (False, 7), (True, 7), (False, 400), (True, 400))
NAN = float("nan")


@pytest.fixture(autouse=True)
def supported() -> None:
    """Skip, with the reason, where there is no such kernel."""
    reason = wiring.fused_refusal(torch.empty(1, dtype=torch.bfloat16, device="cuda"), SPECS[0])
    if reason is not None:
        pytest.skip(reason)


def with_rounded_weights(case: Case) -> Tensor:
    """Return the products in float64 of activations and weights rounded to their dtype, with bias."""
    y = torch.empty(case.x.shape[0], case.scale.shape[0], dtype=torch.float64, device="cuda")
    for count in range(1, case.spec.num_slices + 1):
        packed = (case.slices.cpu(), case.scale.cpu(), case.zero.cpu())
        weight = unpacked_weights(*packed, case.spec, count, case.x).cuda()
        here = case.counts == count
        y[here] = case.x[here].double() @ weight[:, : case.x.shape[1]].t()
    return y if case.bias is None else y + case.bias.double()


def run(case: Case, small: bool | None = None, at_once: int | None = None, split: bool | None = None) -> Tensor:
    """Run the fused linear of a case with memory that is NaN before, in one of `TILES` or those that calls take."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        weight, target = Weight(*case.arguments[2:]), wiring.target_of(case.x.device)
        if small is None:
            return wiring.by_fused(case.x, case.counts, [weight], case.spec)[0]
        k = case.x.shape[1]
        kernel = fused_kernel(
            case.spec,
            k,
            target,
            small=small,
            split=most_parts(case.spec.padded(k)) > 1 if split is None else split,
            row_unit=fused.row_unit(weight.rows),
            has_bias=weight.bias is not None,
        )
        tokens = fused.gather(gather_kernel(case.spec, k, target), case.x, case.counts, at_once=at_once)
        y = fused.multiply(kernel, tokens, weight)
        assert not tokens.marks.any(), "marks are as they were before"
        return y
    finally:
        torch.use_deterministic_algorithms(False)


def check(y: Tensor, case: Case) -> None:
    """Compare with weights rounded alike: what is left is the order of sums and one rounding of the output."""
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[case.x.dtype]
    torch.testing.assert_close(y.double(), with_rounded_weights(case), rtol=1.01 * rounding, atol=2e-4)


@pytest.mark.parametrize(("small", "at_once"), TILES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_products_are_those_of_rounded_weights(spec: SliceSpec, tokens: int, small: bool, at_once: int) -> None:
    """Rows that are no multiple of a tile, of eight or even; a last step of less than 128 columns; parts of columns."""
    case = random_case(spec, tokens, 203, 704, dtype=torch.bfloat16, device="cuda", seed=tokens)
    check(run(case, small, at_once), case)
    case = random_case(spec, tokens, 203, 1088, dtype=torch.bfloat16, device="cuda", seed=tokens)
    check(run(case, small, at_once), case)
    case = replace(random_case(spec, tokens, 512, 4160, dtype=torch.bfloat16, device="cuda", seed=tokens), bias=None)
    check(run(case, small, at_once), case)


@pytest.mark.parametrize("k", [33, 64, 128, 190, 1000])
def test_columns(k: int) -> None:
    case = random_case(SliceSpec((2, 2, 2, 2), 32), 130, 136, k, dtype=torch.bfloat16, device="cuda", seed=k)
    for small, at_once in TILES:
        check(run(case, small, at_once), case)


@pytest.mark.parametrize(("small", "at_once"), TILES)
def test_every_number_of_tokens_in_a_group(small: bool, at_once: int) -> None:
    """Tiles of every width, full and nearly empty, at the beginning and at the end."""
    case = random_case(SPECS[0], 1200, 130, 256, dtype=torch.bfloat16, device="cuda")
    for sizes in ((1, 63, 64, 65), (127, 128, 129, 1), (255, 256, 257, 32), (33, 0, 513, 511), (0, 0, 0, 66)):
        counts = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(sizes)).int()
        counts = counts[torch.randperm(len(counts))].cuda()
        part = replace(case, x=case.x[: len(counts)], counts=counts)
        check(run(part, small, at_once), part)


@pytest.mark.parametrize("counts", [(1,), (4,), (1, 4), (2, 3), (3,), (1, 2, 3, 4)], ids=str)
def test_counts_that_no_token_has(counts: tuple[int, ...]) -> None:
    for tokens in TOKENS:
        case = random_case(SPECS[0], tokens, 520, 1024, dtype=torch.bfloat16, device="cuda", seed=len(counts))
        case.counts.copy_(torch.tensor(counts).repeat(tokens)[:tokens])
        for small, at_once in TILES:
            check(run(case, small, at_once), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [512, 1024])
def test_dtypes(dtype: torch.dtype, scale_dtype: torch.dtype, k: int) -> None:
    case = random_case(SPECS[0], 1000, 264, k, dtype=dtype, scale_dtype=scale_dtype, device="cuda")
    wanted = case.expected()
    atol, rtol, _ = WORKSPACE_TOLERANCES[dtype]
    for small, at_once in TILES:
        y = run(case, small, at_once)
        assert y.dtype is dtype
        torch.testing.assert_close(y.double(), wanted, atol=atol, rtol=rtol)
        assert (y.double() - wanted).norm() <= FUSED_RMS[dtype] * wanted.norm()


@pytest.mark.parametrize(("n", "split"), [(4088, True), (4090, True), (4104, False)])
@pytest.mark.parametrize("tokens", [2000, 500, 250])
def test_large_products_in_the_tiles_that_calls_take(tokens: int, n: int, split: bool) -> None:
    """On 132 multiprocessors 2000 tokens of two counts are full waves and a rest in parts, 500 alike ones two parts."""
    assert fused_is_split(n, 4096) is split
    case = random_case(SPECS[0], tokens, n, 4096, dtype=torch.bfloat16, device="cuda")
    for counts in ((1, 2, 3, 4), (1, 4, 4), (3,)):
        case.counts.copy_(torch.tensor(counts).repeat(tokens)[:tokens])
        check(run(case), case)


@pytest.mark.parametrize(("small", "at_once"), TILES)
def test_a_call_gives_the_same_bits_every_time(small: bool, at_once: int) -> None:
    """In all tiles. Stages overwritten while products still read them would show as differences now and then.

    So would parts that are added before they are there.
    """
    case = random_case(SPECS[0], 1000, 1032, 4096, dtype=torch.bfloat16, device="cuda")
    first = run(case, small, at_once)
    check(first, case)
    for _ in range(50):
        assert torch.equal(run(case, small, at_once), first)


@pytest.mark.parametrize("k", [256, 4096])
def test_linears_that_share_their_tokens(k: int) -> None:
    """And marks, one after the other, of 4096 columns: 1, 2 and 32 blocks of rows in up to eight parts, 33 whole."""
    rows = (64, 203, 4096, 4104, 64)
    cases = [random_case(SPECS[0], 130, n, k, dtype=torch.bfloat16, seed=n, device="cuda") for n in rows]
    cases = [replace(case, x=cases[0].x, counts=cases[0].counts) for case in cases]
    weights = [Weight(*case.arguments[2:]) for case in cases]
    for y, case in zip(wiring.by_fused(cases[0].x, cases[0].counts, weights, SPECS[0]), cases, strict=True):
        check(y, case)


@pytest.mark.parametrize("k", [512, 2048])
def test_values_that_are_not_finite_reach_their_token_only(k: int) -> None:
    case = random_case(SPECS[0], 200, 256, k, dtype=torch.bfloat16, device="cuda")
    case.x[17, 5] = NAN
    y = run(case)
    assert y[17].isnan().all()
    y[17] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (1, 1), (2, 65)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    tokens = torch.Size(shape).numel()
    case = random_case(SPECS[0], max(tokens, 1), 40, 256, dtype=torch.bfloat16, device="cuda")
    x, counts = case.x[:tokens].view(*shape, 256), case.counts[:tokens].view(shape)
    (y,) = wiring.by_fused(x, counts, [Weight(*case.arguments[2:])], case.spec)
    assert y.shape == (*shape, 40)
    torch.testing.assert_close(y.view(tokens, 40).double(), with_rounded_weights(case)[:tokens], rtol=2**-7, atol=2e-4)


def test_activations_that_are_not_contiguous() -> None:
    case = random_case(SPECS[0], 130, 64, 256, dtype=torch.bfloat16, device="cuda")
    wide = torch.full((130, 300), NAN, dtype=torch.bfloat16, device="cuda")
    wide[:, 3:259] = case.x
    check(run(replace(case, x=wide[:, 3:259])), case)


@pytest.mark.parametrize("k", [256, 2048])
@pytest.mark.parametrize("tokens", [65, 1000])
def test_nothing_waits_for_the_device(tokens: int, k: int) -> None:
    case = random_case(SPECS[0], tokens, 513, k, dtype=torch.bfloat16, device="cuda")
    weights = [Weight(*case.arguments[2:])]
    wiring.by_fused(case.x, case.counts, weights, case.spec)  # what is compiled or loaded once may wait
    with waiting.is_an_error():
        wiring.by_fused(case.x, case.counts, weights, case.spec)


@pytest.mark.parametrize("k", [512, 4096])
@pytest.mark.parametrize(("tokens", "n"), [(65, 520), (1000, 520), (250, 4088), (500, 4088), (500, 4104)])
def test_a_captured_graph_follows_counts(tokens: int, n: int, k: int) -> None:
    """So many programs, of 4096 columns, that some counts have their last wave split, in parts that counts decide."""
    assert fused_is_split(n, k) is (n <= 4096 and k == 4096)
    case = random_case(SPECS[0], tokens, n, k, dtype=torch.bfloat16, device="cuda")
    weights = [Weight(*case.arguments[2:])]
    wiring.by_fused(case.x, case.counts, weights, case.spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = wiring.by_fused(case.x, case.counts, weights, case.spec)
    for counts in ((1,), (1, 4, 4), (4,), (2, 4), (1, 2, 3, 4)):
        case.counts.copy_(torch.tensor(counts).repeat(tokens)[:tokens])
        for _ in range(2):
            y.fill_(NAN)
            graph.replay()
            check(y, case)


def test_two_calls_in_one_graph() -> None:
    """Each has marks of its own, whose zeros the graph writes; 32 by 1 to 4 tiles are split into four to one parts."""
    assert fused_is_split(4088, 4096)
    cases = [random_case(SPECS[0], 250, 4088, 4096, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (1, 2)]
    weights = [[Weight(*case.arguments[2:])] for case in cases]
    for case, weight in zip(cases, weights, strict=True):
        wiring.by_fused(case.x, case.counts, weight, case.spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = [wiring.by_fused(c.x, c.counts, weight, c.spec)[0] for c, weight in zip(cases, weights, strict=True)]
    for counts in ((4,), (1, 4), (2,), (1, 2, 3, 4)):
        found = []
        for case in cases:
            case.counts.copy_(torch.tensor(counts).repeat(250)[:250])
        for _ in range(3):
            graph.replay()
            found.append([y.clone() for y in ys])
        for y, case in zip(ys, cases, strict=True):
            check(y, case)
        assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_two_streams() -> None:
    """Programs of two calls share the multiprocessors, so parts of either wait longer; none gets in the other's way."""
    assert fused_is_split(2048, 4096)
    cases = [random_case(SPECS[0], 250, 2048, 4096, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (1, 2)]
    alone, streams = [run(case) for case in cases], [torch.cuda.Stream(), torch.cuda.Stream()]
    for case, y in zip(cases, alone, strict=True):
        check(y, case)
    weights = [[Weight(*case.arguments[2:])] for case in cases]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                case = cases[number]
                found[number] += wiring.by_fused(case.x, case.counts, weights[number], case.spec)
    torch.cuda.synchronize()
    assert all(torch.equal(y, alone[number]) for number in (0, 1) for y in found[number])


def test_rows_that_cannot_be_copied_take_another_way() -> None:
    """An odd number of groups of 32 columns; nothing is compiled that cannot run, and nothing after warming."""
    spec, k = SPECS[2], 96
    case = random_case(spec, 300, 264, k, dtype=torch.bfloat16, device="cuda")
    assert "a multiple of 64" in str(wiring.fused_refusal(case.x, spec))
    warming.warm_kernels(spec, 264, k, torch.bfloat16, "cuda", bias_dtype=torch.bfloat16)
    before = cache.compiled_kernels()
    for prefill in (Prefill.ROUTED, Prefill.FULL):
        if prefill is Prefill.FULL:
            case.counts.fill_(spec.num_slices)
        y = wiring.routed_linear(*case.arguments, spec, prefill=prefill)
        torch.testing.assert_close(y.double(), case.expected(), atol=3e-2, rtol=3e-2)
    assert cache.compiled_kernels() == before


@pytest.mark.parametrize(("n", "k"), [(264, 384), (264, 1024), (4104, 1024)])
def test_calls_take_this_way_and_warmed_ones_compile_nothing(n: int, k: int) -> None:
    case = random_case(SPECS[0], 300, n, k, dtype=torch.bfloat16, device="cuda")
    warming.warm_kernels(SPECS[0], n, k, torch.bfloat16, "cuda", bias_dtype=torch.bfloat16)
    before = cache.compiled_kernels()
    for tokens in (65, 300):
        part = replace(case, x=case.x[:tokens], counts=case.counts[:tokens])
        check(wiring.by_fused(part.x, part.counts, [Weight(*part.arguments[2:])], SPECS[0])[0], part)
        y = wiring.routed_linear(*part.arguments, SPECS[0], prefill=Prefill.ROUTED)
        torch.testing.assert_close(y.double(), part.expected(), atol=3e-2, rtol=3e-2)
    assert cache.compiled_kernels() == before
