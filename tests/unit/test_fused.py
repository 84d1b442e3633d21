"""The fused way of long calls without a GPU: when it is taken, why not, and what it hands to kernels."""

from __future__ import annotations

import re
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mobiquant_compiler import kernels, wiring
from mobiquant_compiler.codegen import configs, toolchain
from mobiquant_compiler.codegen.crossover import NEVER, Crossover, Row
from mobiquant_compiler.launches import Launch, kernels_of
from mobiquant_compiler.runtime import fused, launch
from mobiquant_compiler.runtime import prefill as workspace
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import PREFILL_TOKENS, Family, KernelSpec, Layout, Path, Prefill, SliceSpec
from tests.kernel_cases import integer_case

SPEC = SliceSpec()
H100 = configs.Target.of(90)
MANY = PREFILL_TOKENS + 1


def tokens_on(device: str, tokens: int, dtype: torch.dtype = torch.bfloat16, k: int = 4096) -> SimpleNamespace:
    """Return what a choice of path may look at, of activations on a device that need not be there."""
    shape = torch.Size((tokens, k))
    return SimpleNamespace(
        is_cuda=device == "cuda", device=torch.device(device), dtype=dtype, shape=shape, numel=shape.numel
    )


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch):
    """Let there be a GPU, of a compute capability that tests may change, where every crossing is elsewhere."""
    found = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: tuple(found))
    monkeypatch.setattr(wiring, "gluon_refusal", lambda: None)
    table = Crossover("test", (Row(4096, 4096, tokens=500, fused=100, routed=1000, full=200),))
    monkeypatch.setattr(wiring, "_crossover", lambda device: table)
    monkeypatch.setattr(workspace, "supports", lambda x, n, k: None if x.dtype is torch.bfloat16 else "no")
    for cached in (launch.refusal, launch.capability):
        cached.cache_clear()
    yield found
    for cached in (launch.refusal, launch.capability):
        cached.cache_clear()


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize(
    ("tokens", "prefill", "dtype", "path"),
    [
        (99, Prefill.ROUTED, torch.bfloat16, Path.INTEGER),
        (100, Prefill.ROUTED, torch.bfloat16, Path.FUSED),
        (999, Prefill.ROUTED, torch.bfloat16, Path.FUSED),
        (1000, Prefill.ROUTED, torch.bfloat16, Path.WORKSPACE),
        (1000, Prefill.ROUTED, torch.float16, Path.FUSED),
        (1000, Prefill.ROUTED, torch.float32, Path.INTEGER),
        (1000, Prefill.EXACT, torch.bfloat16, Path.INTEGER),
        (MANY, Prefill.FULL, torch.bfloat16, Path.FUSED),
        (200, Prefill.FULL, torch.bfloat16, Path.WORKSPACE),
        (MANY, Prefill.FULL, torch.float32, Path.WORKSPACE),
        (PREFILL_TOKENS, Prefill.FULL, torch.bfloat16, Path.INTEGER),
    ],
    ids=str,
)
def test_the_table_decides_between_ways_that_can_be_taken(
    tokens: int, prefill: Prefill, dtype: torch.dtype, path: Path
) -> None:
    assert wiring.path_of(tokens_on("cuda", tokens, dtype), 4096, SPEC, prefill) is path


@pytest.mark.parametrize(
    ("spec", "device", "dtype", "cc", "k", "words"),
    [
        (SPEC, "cpu", torch.bfloat16, (9, 0), 4096, "activations are on cpu"),
        (SPEC, "cuda", torch.float32, (9, 0), 4096, "float32, not bfloat16 or float16"),
        (SliceSpec((4, 2, 2)), "cuda", torch.bfloat16, (9, 0), 4096, r"slices are \(4, 2, 2\) in slice_major"),
        (SliceSpec((2, 2), 64, Layout.BIT_MAJOR), "cuda", torch.bfloat16, (9, 0), 4096, "in bit_major"),
        (SliceSpec((2, 2), 32), "cuda", torch.bfloat16, (9, 0), 96, "rows of 96 columns .* a multiple of 64"),
        (SPEC, "cuda", torch.bfloat16, (8, 9), 4096, "the GPU is sm_89, not sm_90"),
        (SPEC, "cuda", torch.bfloat16, (10, 0), 4096, "the GPU is sm_100, not sm_90"),
    ],
)
def test_refusals_say_why_and_calls_go_another_way(
    spec: SliceSpec, device: str, dtype: torch.dtype, cc: tuple[int, int], k: int, words: str, capability: list[int]
) -> None:
    capability[:] = cc
    x = tokens_on(device, 500, dtype, k)
    assert re.search(words, str(wiring.fused_refusal(x, spec)))
    for prefill in Prefill:
        assert wiring.path_of(x, 4096, spec, prefill) is not Path.FUSED


@pytest.mark.usefixtures("capability")
def test_a_triton_without_gluon_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(toolchain, "import_module", find)
    toolchain.gluon_refusal.cache_clear()
    kernels.gluon_refusal.cache_clear()
    try:
        assert "has no Gluon (No module named 'triton.experimental.gluon')" in str(kernels.gluon_refusal())
        monkeypatch.setattr(wiring, "gluon_refusal", kernels.gluon_refusal)
        assert wiring.path_of(tokens_on("cuda", 500), 4096, SPEC, Prefill.ROUTED) is Path.WORKSPACE
        monkeypatch.setattr(toolchain, "import_module", lambda name: ModuleType(name))
        toolchain.gluon_refusal.cache_clear()
        assert "lacks jit, constexpr_function, DistributedLinearLayout" in str(toolchain.gluon_refusal())
    finally:
        toolchain.gluon_refusal.cache_clear()
        kernels.gluon_refusal.cache_clear()


class Notes:
    """A kernel that launches nothing."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Take note."""
        self.launches.append((grid, arguments))


def gathered(
    tokens: int, k: int, dtype: torch.dtype = torch.float16, at_once: int = 132, room: tuple[int, int] | None = None
) -> fused.GatheredTokens:
    """Return what is gathered of tokens for kernels that launch nothing."""
    kernel = Notes(configs.kernel_spec(Family.GATHER_TOKENS, SPEC, k, configs.TokenClass.MANY, H100))
    x, counts = torch.zeros(tokens, k, dtype=dtype), torch.ones(tokens, dtype=torch.int32)
    return fused.gather(kernel, x, counts, at_once=at_once, room=room)


def weight(n: int, k: int, bias: bool = False) -> Weight:
    """Return a weight of n rows."""
    case = integer_case(SPEC, 1, n, k, bias=bias)
    return Weight(case.slices, case.scale, case.zero, case.bias)


def noted(n: int, k: int, small: bool, bias: bool = False, split: bool = False) -> Notes:
    """Return the kernel for a weight, without its code."""
    facts = {"split": split, "row_unit": fused.row_unit(n), "has_bias": bias}
    return Notes(configs.wgmma_spec(SPEC, k, H100, small=small, **facts))


@pytest.mark.parametrize(
    ("tokens", "n", "small", "tiles"),
    [
        (256, 16896, False, 4),
        (257, 16896, False, 5),
        (65, 16896, True, 4),
        (129, 17000, True, 5),
        (65, 128, True, 5),  # narrow: two and three more
        (65, 128, False, 4),
        (257, 128, False, 6),
        (512, 4096, True, 7),  # four run at a time, of narrow ones as well
        (250, 4096, True, 5),  # seven of narrow ones are too many at a time
        (200, 2816, True, 6),  # and all but one
    ],
)
def test_programs_cover_every_group_that_can_be(tokens: int, n: int, small: bool, tiles: int) -> None:
    """Tiles of tokens, one more for each further count, times tiles of rows; narrow ones where they run at a time."""
    k = 200
    kernel = noted(n, k, small)
    y = fused.multiply(kernel, gathered(tokens, k), weight(n, k))
    assert (y.shape, y.dtype) == ((tokens, n), torch.float16)
    ((found, arguments),) = kernel.launches
    assert found == (tiles * -(-n // 128),)
    assert (arguments["tiles"], arguments["at_once"]) == (tiles, 132)
    assert arguments["row_units"] * kernel.spec.row_unit == n
    assert arguments["bias_ptr"] is None


@pytest.mark.parametrize(
    ("k", "at_once", "programs", "slots", "split"),
    [
        (960, 132, 96, 66, 66),  # two parts of four tiles of 12 blocks of rows
        (1600, 132, 108, 176, 88),  # three parts of three tiles, which are more than two of four
        (4096, 132, 120, 176, 88),  # five of two
        (4096, 30, 84, 40, 20),  # a full wave, and thirds of 18
        (4096, 80, 144, 106, 53),  # thirds of 48
        (4096, 1000, 384, 1332, 666),  # eight parts of each program
    ],
)
def test_programs_and_scratch_are_enough_for_parts(k: int, at_once: int, programs: int, slots: int, split: int) -> None:
    n, tokens = 1536, gathered(65, k, at_once=at_once)
    kernel = noted(n, k, True, split=k > 896)
    fused.multiply(kernel, tokens, weight(n, k))
    ((found, arguments),) = kernel.launches
    assert found == (programs,)
    assert (arguments["partial_ptr"].numel(), arguments["partial_ptr"].dtype) == (slots * 256 * 128, torch.float32)
    assert (arguments["marks_ptr"].numel(), arguments["marks_ptr"].dtype) == (split * 256, torch.int32)


@pytest.mark.parametrize(
    ("tokens", "n", "k", "room"),
    [
        (65, 4096, 4096, (96, 64)),  # 32 programs in four parts, 64 in two; 96 and more are whole
        (1000, 4096, 4096, (84, 60)),  # behind a wave 28 programs in four parts, 60 in two
        (1000, 40, 4096, (49, 7)),  # seven programs in eight parts
    ],
)
def test_calls_make_room_for_as_many_parts_as_there_can_be(
    tokens: int, n: int, k: int, room: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever counts their tokens have, of the linear that needs most; never more than any call does."""
    monkeypatch.setattr(fused, "multiprocessors", lambda device: 132)
    gather = Notes(configs.kernel_spec(Family.GATHER_TOKENS, SPEC, k, configs.TokenClass.MANY, H100))
    made = [noted(128, k, False), noted(n, k, False, split=True), noted(64, k, False, split=True)]
    kernels = iter(made)
    x, counts = torch.zeros(tokens, k, dtype=torch.float16), torch.ones(tokens, dtype=torch.int32)
    fused.fused_linears(gather, lambda weight, tokens: next(kernels), x, counts, [weight(m, k) for m in (128, n, 64)])
    ((_, arguments),) = made[1].launches
    assert (arguments["partial_ptr"].numel(), arguments["marks_ptr"].numel()) == (room[0] * 256 * 128, room[1] * 256)
    assert all(mine <= most for mine, most in zip(room, fused.most_room(k, 132), strict=True))


def test_room_for_parts_is_there_where_a_wave_may_not_be_full() -> None:
    kernel = noted(1536, 4096, True, split=True)
    fused.multiply(kernel, gathered(65, 4096, at_once=1), weight(1536, 4096))
    ((found, arguments),) = kernel.launches
    assert (found, arguments["marks_ptr"].numel()) == ((4 * 12,), 0), "a program at a time fills every wave"
    with pytest.raises(AssertionError, match="gathered for kernels that split less, or nothing"):
        fused.multiply(kernel, gathered(65, 4096, room=(0, 0)), weight(1536, 4096))


def test_room_for_a_part_is_that_of_the_largest_tile() -> None:
    split_columns = pytest.importorskip("mobiquant_compiler.codegen.split_columns")
    kernel = noted(128, 4096, False)
    assert split_columns.SLOT.value == fused._SLOT == kernel.spec.block_m * kernel.spec.block_n
    assert kernel.spec.consumers * 128 == fused._THREADS, "a mark for each thread of each warpgroup that multiplies"


def test_words_that_are_not_aligned_are_copied() -> None:
    one, k = weight(16, 128), 128
    memory = torch.zeros(one.slices.numel() + 1, dtype=torch.int32)
    memory[1:] = one.slices.view(-1)
    moved = Weight(memory[1:].view(one.slices.shape), one.scale, one.zero, None)
    assert moved.slices.data_ptr() % 16
    kernel = noted(16, k, True)
    fused.multiply(kernel, gathered(1, k), moved)
    handed = kernel.launches[0][1]["slices_ptr"]
    assert handed.data_ptr() % 16 == 0
    assert torch.equal(handed, one.slices.view(-1, k // 16)), "a row of words for each of a slice"


def test_no_tokens_launch_nothing() -> None:
    (y,) = fused.fused_linears(
        Notes(configs.kernel_spec(Family.GATHER_TOKENS, SPEC, 128, configs.TokenClass.MANY, H100)),
        lambda one, tokens: pytest.fail("no kernel is asked for"),
        torch.zeros(2, 0, 128),
        torch.zeros(2, 0, dtype=torch.int32),
        [weight(16, 128)],
    )
    assert y.shape == (2, 0, 16)


@pytest.mark.parametrize(
    ("spec", "dtype", "cc", "parts", "k", "families"),
    [
        (SPEC, torch.bfloat16, 90, 1, 4096, {Family.GATHER_TOKENS: 1, Family.SLICED_WGMMA: 2}),
        (SPEC, torch.float16, 90, 3, 4096, {Family.GATHER_TOKENS: 1, Family.SLICED_WGMMA: 4}),
        (SPEC, torch.float32, 90, 1, 4096, {}),
        (SPEC, torch.bfloat16, 100, 1, 4096, {}),
        (SliceSpec((4, 2)), torch.bfloat16, 90, 1, 4096, {}),
        (SliceSpec((2, 2), 32), torch.bfloat16, 90, 1, 96, {}),
    ],
    ids=str,
)
def test_launches_list_their_kernels(
    spec: SliceSpec, dtype: torch.dtype, cc: int, parts: int, k: int, families: dict[Family, int]
) -> None:
    one = Launch(spec, 4096, k, torch.device("cuda"), dtype, parts=parts)
    target, many = configs.Target.of(cc), [configs.TokenClass.MANY]
    found = [kernel.family for kernel in kernels_of(one, target, many, workspace=True)]
    for family in (Family.GATHER_TOKENS, Family.SLICED_WGMMA):
        assert found.count(family) == families.get(family, 0)
    assert Family.SLICED_WGMMA not in {kernel.family for kernel in kernels_of(one, target, many, workspace=False)}


@pytest.mark.parametrize(
    ("n", "k", "parts", "facts", "splits"),
    [
        (4096, 4096, 1, {}, (True,)),
        (4104, 4096, 1, {}, (False,)),
        (4096, 896, 1, {}, (False,)),
        (4096, 4096, 3, {}, (True,)),
        (8192, 4096, 3, {}, (False, True)),
        (8192, 4096, 3, {"split": True}, (True,)),
        (8192, 4096, 3, {"split": False}, (False,)),
        (8192, 896, 3, {}, (False,)),
    ],
)
def test_a_launch_knows_whether_its_kernels_are_split(
    n: int, k: int, parts: int, facts: dict[str, bool], splits: tuple[bool, ...]
) -> None:
    """As wiring will choose for each weight; of some of unknown rows, some may be and some not."""
    one = Launch(SPEC, n, k, torch.device("cuda"), torch.bfloat16, parts=parts, row_unit=8, **facts)
    assert one.splits == splits
    found = kernels_of(one, H100, [configs.TokenClass.MANY], workspace=True)
    assert {kernel.split for kernel in found if kernel.family is Family.SLICED_WGMMA} == set(splits)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize(("prefill", "groups"), [(Prefill.ROUTED, 4), (Prefill.FULL, 1)], ids=str)
def test_tiles_are_chosen_for_as_many_counts_as_tokens_can_have(
    prefill: Prefill, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    k, tokens = 4096, MANY
    gather = Notes(configs.kernel_spec(Family.GATHER_TOKENS, SPEC, k, configs.TokenClass.MANY, H100))
    monkeypatch.setattr(wiring, "target_of", lambda device: H100)
    monkeypatch.setattr(wiring, "gather_kernel", lambda *args: gather)
    monkeypatch.setattr(wiring, "path_of", lambda *args: Path.FUSED)
    monkeypatch.setattr(wiring, "fused_kernel", lambda *args, small, split, **facts: noted(16, k, small, split=split))
    monkeypatch.setattr(wiring, "fused_is_small", lambda *args: asked.append(args) or True)
    one, x = weight(16, k), torch.zeros(tokens, k, dtype=torch.bfloat16)
    counts = torch.full((tokens,), 4, dtype=torch.int32)
    wiring.routed_linears(x, counts, [one.slices], [one.scale], [one.zero], [None], SPEC, prefill=prefill)
    assert asked == [(tokens, 16, k, groups)]


def test_rows_that_a_table_leaves_out_never_take_it() -> None:
    table = Crossover("test", (Row(4096, 4096, 300),))
    assert table.rows[0].fused == NEVER
    assert table.path(1 << 20, 4096, 4096, fused=True) is Path.WORKSPACE
