"""dequantize and what goes around it: workspaces, sorted tokens, products by group, chunks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobiquant_compiler import reference
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.codegen.cache import Kernel
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.packing import unpack
from mobiquant_compiler.runtime import prefill
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.slices import reconstruct
from mobiquant_compiler.spec import Family, SliceSpec
from tests.kernel_cases import SPECS, Case, integer_case, random_case, spec_id
from tests.prefill_calls import uniform_linear, workspace_linear

EXACT_DTYPES = (torch.float32, torch.float16)  # the interpreter truncates on the way to bfloat16, devices round
FAST = settings(max_examples=4)


def kernel_of(spec: SliceSpec, k: int, sorted_rows: bool = True) -> Kernel:
    """Return the kernel for tokens sorted by their counts, or that for tokens of one count."""
    chosen = kernel_spec(Family.DEQUANTIZE, spec, k, TokenClass.MANY, Target.of(80), sorted_rows=sorted_rows)
    return cache.load(chosen)


def packed(case: Case) -> Weight:
    """Return the weight of a case."""
    return Weight(case.slices, case.scale, case.zero, case.bias)


def weight_of(case: Case, count: int, dtype: torch.dtype) -> Tensor:
    """Return ``W_count`` as a workspace holds it: the float32 reference, rounded once."""
    codes = unpack(case.slices, case.spec, count)
    return reconstruct(codes, case.scale.float(), case.zero.float(), case.spec, count).to(dtype)


def offsets_for(counts: set[int], slices: int) -> Tensor:
    """Return offsets of groups of which those in `counts` have tokens."""
    sizes = torch.tensor([0, *(3 if c in counts else 0 for c in range(1, slices + 1))])
    return sizes.cumsum(0).to(torch.int32)


def poisoned(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a workspace of NaN and the memory it lies in, which goes on after it."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 64,), float("nan"), dtype=dtype)
    return memory[:size].view(shape), memory[size:]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@given(data=st.data())
@FAST
def test_counts_in_use_are_written_and_no_others(spec: SliceSpec, data: st.DataObject) -> None:
    k, n = data.draw(st.integers(32, 300), "k"), data.draw(st.sampled_from((1, 3, 17, 40)), "n")
    dtype = data.draw(st.sampled_from(EXACT_DTYPES), "dtype")
    scale_dtype = data.draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)), "scale dtype")
    used = data.draw(st.sets(st.integers(1, spec.num_slices)), "counts in use")
    case = random_case(spec, 1, n, k, scale_dtype=scale_dtype, seed=data.draw(st.integers(0, 99), "seed"))
    workspace, after = poisoned(spec.num_slices, n, spec.padded(k), dtype=dtype)
    prefill.dequantize(kernel_of(spec, k), packed(case), offsets_for(used, spec.num_slices), workspace)
    for count in range(1, spec.num_slices + 1):
        if count in used:
            assert torch.equal(workspace[count - 1], weight_of(case, count, dtype))
        else:
            assert workspace[count - 1].isnan().all(), f"nobody uses {count} slices"
    assert after.isnan().all()


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@given(data=st.data())
@FAST
def test_the_weight_of_one_count(spec: SliceSpec, data: st.DataObject) -> None:
    k, n = data.draw(st.integers(32, 300), "k"), data.draw(st.sampled_from((1, 3, 17, 40)), "n")
    dtype = data.draw(st.sampled_from(EXACT_DTYPES), "dtype")
    count = data.draw(st.integers(1, spec.num_slices), "count")
    case = random_case(spec, 1, n, k, seed=data.draw(st.integers(0, 99), "seed"))
    case.counts.fill_(count)
    workspace, after = poisoned(n, spec.padded(k), dtype=dtype)
    prefill.dequantize(kernel_of(spec, k, sorted_rows=False), packed(case), case.counts, workspace)
    assert torch.equal(workspace, weight_of(case, count, dtype))
    assert after.isnan().all()


@pytest.mark.parametrize(("count", "nearest"), [(0, 1), (-5, 1), (9, 4)])
def test_a_count_that_cannot_be_is_the_nearest_that_can(count: int, nearest: int) -> None:
    case = random_case(SPECS[0], 1, 3, 128)
    workspace, _ = poisoned(3, 128, dtype=torch.float32)
    counts = torch.tensor([count], dtype=torch.int32)
    prefill.dequantize(kernel_of(SPECS[0], 128, sorted_rows=False), packed(case), counts, workspace)
    assert torch.equal(workspace, weight_of(case, nearest, torch.float32))


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3], SPECS[5]], ids=spec_id)
def test_some_rows_of_the_weight(spec: SliceSpec) -> None:
    case = random_case(spec, 1, 75, 130)
    offsets = offsets_for(set(range(1, spec.num_slices + 1)), spec.num_slices)
    for start, stop in ((0, 1), (1, 42), (42, 75)):
        workspace, after = poisoned(spec.num_slices, stop - start, spec.padded(130), dtype=torch.float32)
        prefill.dequantize(kernel_of(spec, 130), packed(case), offsets, workspace, start)
        for count in range(1, spec.num_slices + 1):
            assert torch.equal(workspace[count - 1], weight_of(case, count, torch.float32)[start:stop])
        assert after.isnan().all()


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4]], ids=spec_id)
def test_slices_that_nobody_uses_need_not_be_there(spec: SliceSpec) -> None:
    case = random_case(spec, 1, 9, 128)
    present = Weight(case.slices[: spec.bits(2)].clone(), case.scale, case.zero, None)
    workspace, _ = poisoned(spec.num_slices, 9, 128, dtype=torch.float32)
    prefill.dequantize(kernel_of(spec, 128), present, offsets_for({2}, spec.num_slices), workspace)
    assert torch.equal(workspace[1], weight_of(case, 2, torch.float32))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20])
def test_scales_of_any_size(scale: float) -> None:
    case = random_case(SPECS[0], 1, 3, 128, scale_dtype=torch.float32)
    case.scale.mul_(scale)
    workspace, _ = poisoned(4, 3, 128, dtype=torch.float32)
    prefill.dequantize(kernel_of(SPECS[0], 128), packed(case), offsets_for({1, 4}, 4), workspace)
    for count in (1, 4):
        assert torch.equal(workspace[count - 1], weight_of(case, count, torch.float32))


@given(tokens=st.integers(1, 90), k=st.sampled_from((32, 100, 128)), slices=st.integers(1, 8), seed=st.integers(0, 99))
def test_sorting_is_the_reference_with_padding(tokens: int, k: int, slices: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g)
    counts = torch.randint(1, slices + 1, (tokens,), generator=g, dtype=torch.int32)
    found = prefill.sort_tokens(x, counts, slices, 128)
    rows, offsets, grouped = reference.gather(x, counts, slices)
    assert found.offsets.dtype is torch.int32
    assert torch.equal(found.offsets, offsets)
    assert torch.equal(found.x, torch.nn.functional.pad(grouped, (0, 128 - k)))
    assert torch.equal(found.places[rows.long()], torch.arange(tokens))


def test_counts_that_cannot_be_are_the_nearest_that_can() -> None:
    counts = torch.tensor([9, 0, 2, -1], dtype=torch.int32)
    found = prefill.sort_tokens(torch.eye(4), counts, 3, 4)
    assert found.offsets.tolist() == [0, 2, 3, 4]
    assert found.places.tolist() == [3, 0, 2, 1]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@given(data=st.data())
@FAST
def test_products_are_exact_on_integers(spec: SliceSpec, data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from((1, 2, 65, 130)), "tokens")
    k, n = data.draw(st.integers(32, 200), "k"), data.draw(st.sampled_from((1, 17, 33)), "n")
    bias, seed = data.draw(st.booleans(), "bias"), data.draw(st.integers(0, 99), "seed")
    case = integer_case(spec, tokens, n, k, bias=bias, seed=seed)
    used = data.draw(st.sets(st.integers(1, spec.num_slices), min_size=1), "counts in use")
    case.counts.copy_(torch.tensor(sorted(used), dtype=torch.int32).repeat(tokens)[:tokens])
    y = workspace_linear(kernel_of(spec, k), *case.arguments)
    assert torch.equal(y, case.expected(torch.float32))


@pytest.mark.parametrize("count", [1, 4])
def test_all_tokens_of_one_count(count: int) -> None:
    case = integer_case(SPECS[0], 70, 5, 128, bias=True)
    case.counts.fill_(count)
    y = workspace_linear(kernel_of(SPECS[0], 128), *case.arguments)
    assert torch.equal(y, case.expected(torch.float32))


def test_linears_that_share_their_tokens() -> None:
    first, second = (integer_case(SPECS[4], 70, n, 100, bias=n == 5, seed=n) for n in (5, 33))
    second = replace(second, x=first.x, counts=first.counts)
    found = prefill.workspace_linears(kernel_of(SPECS[4], 100), first.x, first.counts, [packed(first), packed(second)])
    for y, case in zip(found, (first, second), strict=True):
        assert torch.equal(y, case.expected(torch.float32))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("tokens", [1, 3])
def test_products_with_one_count_are_exact_on_integers(spec: SliceSpec, tokens: int) -> None:
    case = integer_case(spec, tokens, 33, 100, bias=tokens > 1)
    for count in {1, spec.num_slices - 1, spec.num_slices} - {0}:
        case.counts.fill_(count)
        y = uniform_linear(kernel_of(spec, 100, sorted_rows=False), *case.arguments)
        assert torch.equal(y, case.expected(torch.float32)), f"{count} slices"


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (1, 1), (2, 3)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    tokens = torch.Size(shape).numel()
    case = integer_case(SPECS[2], max(tokens, 1), 3, 40, bias=True)
    x, counts, weight = case.x[:tokens].view(*shape, 40), case.counts[:tokens].view(shape), case.arguments[2:]
    y = workspace_linear(kernel_of(SPECS[2], 40), x, counts, *weight)
    assert y.shape == (*shape, 3)
    assert torch.equal(y.view(tokens, 3), case.expected(torch.float32)[:tokens])
    case.counts.fill_(3)
    y = uniform_linear(kernel_of(SPECS[2], 40, sorted_rows=False), x, counts, *weight)
    assert y.shape == (*shape, 3)
    assert torch.equal(y.view(tokens, 3), case.expected(torch.float32)[:tokens])


def test_strided_activations_and_bias_of_another_dtype() -> None:
    case = integer_case(SPECS[2], 4, 3, 41, bias=True)
    wide = torch.zeros(4, 100)
    wide[:, 7:48] = case.x
    assert case.bias is not None
    weight = (*case.arguments[2:5], case.bias.bfloat16())
    y = workspace_linear(kernel_of(SPECS[2], 41), wide[:, 7:48], case.counts, *weight)
    assert y.dtype is torch.float32
    assert torch.equal(y, case.expected(torch.float32))
    case.counts.fill_(4)
    y = uniform_linear(kernel_of(SPECS[2], 41, sorted_rows=False), wide[:, 7:48], case.counts, *weight)
    assert torch.equal(y, case.expected(torch.float32))


def test_weights_larger_than_the_workspace_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "WORKSPACE_BYTES", 1)
    case = integer_case(SPECS[2], 5, 600, 40, bias=True)
    launches = []
    kernel = kernel_of(SPECS[2], 40)
    watched = SimpleNamespace(spec=kernel.spec, launch=lambda grid, **a: (launches.append(a), kernel.launch(grid, **a)))
    y = workspace_linear(watched, *case.arguments)
    assert torch.equal(y, case.expected(torch.float32))
    assert [(a["first_row"], a["rows"]) for a in launches] == [(0, 256), (256, 256), (512, 88)]
    assert len({a["workspace_ptr"].data_ptr() for a in launches}) == 1, "chunks use the same memory"
    case.counts.fill_(4)
    y = uniform_linear(kernel_of(SPECS[2], 40, sorted_rows=False), *case.arguments)
    assert torch.equal(y, case.expected(torch.float32))


@pytest.mark.parametrize(
    ("n", "row_bytes", "rows"),
    [
        (14336, 4 * 4096 * 2, 14336),  # one piece
        (28672, 4 * 8192 * 2, 14336),  # two pieces of equal size
        (128256, 8192 * 2, 64256),
        (33, 4 * 4096 * 2, 256),
        (1000, 1 << 40, 256),  # never less than a tile
    ],
)
def test_chunks_are_whole_tiles_of_equal_size(n: int, row_bytes: int, rows: int) -> None:
    assert prefill.chunk_rows(n, row_bytes) == rows
    assert rows == 256 or rows * row_bytes <= prefill.WORKSPACE_BYTES


@pytest.mark.parametrize(
    ("dtype", "capability", "k", "reason"),
    [
        (torch.bfloat16, (9, 0), 8192, None),
        (torch.bfloat16, (10, 3), 8192, None),
        (torch.float16, (9, 0), 8192, "waits for the device unless activations are bfloat16; they are torch.float16"),
        (torch.bfloat16, (8, 0), 8192, "waits for the device on sm_80"),
        (torch.bfloat16, (12, 0), 8192, "waits for the device on sm_120"),
        (torch.bfloat16, (9, 0), 1 << 20, "more than the workspace holds"),
    ],
)
def test_what_the_workspace_way_supports(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: tuple[int, int], k: int, reason: str | None
) -> None:
    monkeypatch.setattr(prefill, "capability", lambda device: capability)
    x = SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0", element_size=lambda: 2)
    found = prefill.supports(x, 28672, k)
    assert found is reason is None or (found and reason and reason in found)


def test_a_cpu_has_no_grouped_gemm_and_old_torch_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "activations are on cpu" in (prefill.supports(torch.ones(2, 3), 4, 3) or "")
    monkeypatch.setattr(prefill, "capability", lambda device: (9, 0))
    monkeypatch.delattr(torch, "_grouped_mm")
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda:0", element_size=lambda: 2)
    assert "has no _grouped_mm" in (prefill.supports(x, 4, 64) or "")


def test_a_linear_wants_the_kernel_for_its_tokens() -> None:
    case = random_case(SPECS[2], 1, 3, 32)
    with pytest.raises(AssertionError, match="tokens differ in their counts"):
        workspace_linear(kernel_of(SPECS[2], 32, sorted_rows=False), *case.arguments)
    with pytest.raises(AssertionError, match="tokens have one count"):
        uniform_linear(kernel_of(SPECS[2], 32), *case.arguments)
