"""What launches hand to kernels: grids, memory, alignment; with kernels that only take notes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.errors import TooManyRows
from mobiquant_compiler.packing import unit_views
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Prepared, Weight
from mobiquant_compiler.spec import Activation, Family, KernelSpec, SliceSpec
from tests.kernel_cases import integer_case

SPEC = SliceSpec((2, 2), 32)
K = 70


class Notes:
    """A kernel that launches nothing."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Take note."""
        self.launches.append((grid, arguments))


def kernel(family: Family, tokens: int = 1, **options: Any) -> Notes:
    """Return the kernel of a table, without its code."""
    return Notes(kernel_spec(family, SPEC, K, TokenClass.of(tokens), Target.of(90), **options))


def prepared(tokens: int, activation: Activation = Activation.A16) -> Prepared:
    """Return tokens as if they had been quantized."""
    first = kernel(Family.ROUTE_QUANTIZE, route=False, activation=activation)
    return launch.prepare(first, torch.ones(tokens, K), counts=torch.ones(tokens, dtype=torch.int32))


def weight(n: int, bias: bool = False) -> Weight:
    """Return a weight of n rows."""
    case = integer_case(SPEC, 1, n, K, bias=bias)
    return Weight(case.slices, case.scale, case.zero, case.bias)


@pytest.mark.parametrize("tokens", [1, 8, 9, 17])
@pytest.mark.parametrize("activation", list(Activation))
def test_quantized_tokens_have_memory_for_whole_blocks(tokens: int, activation: Activation) -> None:
    found, blocks = prepared(tokens, activation), -(-tokens // 8)
    assert found.high.shape == (3, blocks, 32, 8)
    assert found.low.numel() == (found.high.numel() if activation is Activation.A16 else 0)
    assert found.affine.shape == (3, 8 * blocks, 2)
    assert (found.tokens, found.columns, found.dtype) == (tokens, K, torch.float32)
    for part in (found.high, found.low, found.affine):
        assert part.is_contiguous()
        assert part.data_ptr() % 16 == 0


@pytest.mark.parametrize(("columns", "programs"), [(None, 2), (64, 3), (32, 4)])
def test_programs_route_a_token_or_quantize_some_columns(columns: int | None, programs: int) -> None:
    first = kernel(Family.ROUTE_QUANTIZE)
    if columns:
        first.spec = replace(first.spec, block_w=columns)
    router, thresholds = (torch.ones(K), torch.ones(1)), torch.zeros(1)
    hist, mask = torch.zeros(2, dtype=torch.int64), torch.zeros(7, dtype=torch.int32)
    x = torch.randn(3, 2 * K)[:, ::2]
    found = launch.prepare(first, x.view(3, 1, K), router, thresholds, hist, mask)
    ((grid, arguments),) = first.launches
    assert grid == (3, programs), "one routes"
    assert (arguments["tokens"], arguments["capacity"]) == (3, 7)
    assert torch.equal(arguments["x_ptr"], x)
    assert arguments["x_ptr"].is_contiguous()
    assert arguments["hist_ptr"] is hist, "added to in place"
    assert arguments["counts_ptr"].data_ptr() == found.counts.data_ptr()
    assert found.shape == (3, 1)


@pytest.mark.parametrize(("long", "quantize", "grid"), [(0, 0, (9, 1)), (0, 1, (9, 2)), (1, 0, (3, 1)), (1, 1, (9, 2))])
def test_programs_that_route_by_a_network(long: int, quantize: int, grid: tuple[int, int]) -> None:
    first = kernel(Family.ROUTE_QUANTIZE, hidden=5, long=bool(long), quantize=bool(quantize))
    first_layer = torch.ones(5, K + 4).half()[:, 2:]
    router = (torch.ones(K), torch.ones(1), first_layer, *(torch.ones(5).half(), torch.ones(1, 5).half()))
    mask = torch.zeros(1, dtype=torch.int32)
    launch.prepare(first, torch.ones(9, K), (*router, torch.ones(1).half()), torch.ones(1), mask.long(), mask)
    ((found, arguments),) = first.launches
    assert found == grid, "one routes four tokens of a long call"
    assert torch.equal(arguments["hidden_ptr"], first_layer)
    assert arguments["hidden_ptr"].is_contiguous()
    assert arguments["hidden_ptr"].data_ptr() % 16 == 0
    assert arguments["out_bias_ptr"].shape == (1,)


def test_routing_alone_takes_no_memory_for_activations() -> None:
    first = kernel(Family.ROUTE_QUANTIZE, quantize=False)
    mask = torch.zeros(1, dtype=torch.int32)
    found = launch.prepare(first, torch.ones(5, K), (torch.ones(K), torch.ones(1)), torch.ones(1), mask, mask)
    assert found.high.numel() == found.low.numel() == found.affine.numel() == 0
    assert found.counts.shape == (5,)


@pytest.mark.parametrize(
    ("tokens", "rows", "grid"),
    [(1, (40,), (1, 3)), (9, (16, 17, 1), (1, 4)), (17, (33, 1), (1, 3)), (65, (5,), (3, 1))],
)
def test_a_program_for_each_block_of_tokens_and_of_rows(
    tokens: int, rows: tuple[int, ...], grid: tuple[int, int]
) -> None:
    many = kernel(Family.SLICED_MMA, tokens, parts=len(rows))
    ys = launch.multiply(many, prepared(tokens), [weight(n) for n in rows])
    ((found, arguments),) = many.launches
    assert found == grid
    assert [y.shape for y in ys] == [(tokens, n) for n in rows]
    for number, n in enumerate(rows):
        assert arguments[f"n{number or ''}_rows"] == n
        assert arguments[f"y{number or ''}_ptr"] is ys[number]


def test_more_rows_than_a_grid_has_programs() -> None:
    many = kernel(Family.SLICED_MMA)
    large = Weight(torch.empty(4, 1_048_561, 3, dtype=torch.int32, device="meta"), torch.empty(0), torch.empty(0), None)
    with pytest.raises(TooManyRows, match=r"got 1048561 output rows in one launch; wanted at most 1048560"):
        launch.multiply(many, prepared(1), [large])
    assert not many.launches


def test_nothing_is_launched_for_no_tokens() -> None:
    first, many = kernel(Family.ROUTE_QUANTIZE, route=False), kernel(Family.SLICED_MMA)
    found = launch.prepare(first, torch.ones(2, 0, K), counts=torch.ones(2, 0, dtype=torch.int32))
    (y,) = launch.multiply(many, found, [weight(3)])
    assert y.shape == (2, 0, 3)
    assert not first.launches
    assert not many.launches


def moved(tensor: Tensor) -> Tensor:
    """Return a copy one element off 16 bytes."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    memory[1:] = tensor.flatten()
    return memory[1:].view_as(tensor)


def test_what_vector_loads_read_is_packed_and_aligned() -> None:
    given, many = weight(17, bias=True), kernel(Family.SLICED_MMA, has_bias=True)
    strided = given.zero.repeat_interleave(2, 1)[:, ::2]
    odd = Weight(moved(given.slices), moved(given.scale), strided, given.bias)
    launch.multiply(many, prepared(1), [odd])
    ((_, arguments),) = many.launches
    for name, tensor in (("slices_ptr", given.slices), ("scale_ptr", given.scale), ("zero_ptr", given.zero)):
        assert torch.equal(arguments[name], tensor)
        assert arguments[name].is_contiguous()
        assert arguments[name].data_ptr() % 16 == 0, name
    launch.multiply(many, prepared(1), [given])
    assert many.launches[1][1]["slices_ptr"] is given.slices, "no copy where none is needed"


def test_one_token_meets_a_program_of_rows_at_least() -> None:
    """Programs of one token compare no row with the last: a weight of fewer has rows of zeros, which nobody sees."""
    given, one = weight(5, bias=True), kernel(Family.SLICED_MMA, has_bias=True)
    (y,) = launch.multiply(one, prepared(1), [given])
    assert y.shape[-1] == 5
    assert y.is_contiguous()
    ((grid, arguments),) = one.launches
    assert grid == (1, 1)
    assert arguments["n_rows"] == 16
    views = unit_views(arguments["slices_ptr"], SPEC, SPEC.num_slices)
    for view, own in zip(views, unit_views(given.slices, SPEC, SPEC.num_slices), strict=True):
        assert torch.equal(view[:5], own)
        assert not view[5:].any()
    for name, own in (("scale_ptr", given.scale), ("zero_ptr", given.zero), ("bias_ptr", given.bias)):
        assert torch.equal(arguments[name][:5], own)
        assert not arguments[name][5:].any()
    few = kernel(Family.SLICED_MMA, 2, has_bias=True)
    launch.multiply(few, prepared(2), [given])
    assert few.launches[0][1]["n_rows"] == 5, "blocks of tokens compare"


def test_counts_follow_from_offsets() -> None:
    offsets = torch.tensor([0, 2, 2, 3, 6], dtype=torch.int32)
    found = launch.counts_of_offsets(offsets, 6)
    assert found.dtype is torch.int32
    assert found.tolist() == [1, 1, 3, 4, 4, 4]
    assert launch.counts_of_offsets(torch.zeros(3, dtype=torch.int32), 0).tolist() == []
