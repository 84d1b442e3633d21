"""What ptxas makes of the kernels that are shipped: registers, and what did not fit into them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mobiquant_compiler.codegen import cache as kernels
from mobiquant_compiler.codegen import toolchain
from mobiquant_compiler.codegen.batch_configs import BatchTile, batch_spec
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.codegen.resident_configs import multiply_spec
from mobiquant_compiler.spec import Activation, Family, KernelSpec, Layout, SliceSpec
from tests.kernel_cases import spec_id
from tests.resident_cases import resident

ADDRESS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
WIDE_LOAD = re.compile(r"\bLDG\.\S*128")
BRANCH = re.compile(r"^@.*\bBRA\b.*?(0x[0-9a-f]+)")  # without a predicate: back from where code was put aside
DEFAULTS = (SliceSpec(), SliceSpec(layout=Layout.BIT_MAJOR), SliceSpec(group=64))


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """Return the program that comes with triton, or skip."""
    import triton

    tool = getattr(triton.knobs.nvidia, "cuobjdump", None)
    if tool is None or not Path(tool.path).is_file():
        pytest.skip("triton came without cuobjdump")
    return tool.path


@cache
def disassembled(spec: KernelSpec, cc: int, cuobjdump: str, what: str) -> str:
    """Return what cuobjdump says of a kernel's binary."""
    path = kernels.load(spec).path.with_suffix(f".{cc}.cubin")
    path.write_bytes(kernels.compile_for(spec, cc).asm["cubin"])
    return subprocess.run([cuobjdump, what, str(path)], capture_output=True, text=True, check=True).stdout


def shipped(weight: SliceSpec, tokens: int, cc: int, k: int = 8192, **options: Any) -> KernelSpec:
    """Return the kernel that the table names, with a bias; of so many columns that each chain is a loop."""
    token_class, target = TokenClass.of(tokens), Target.of(cc)
    return kernel_spec(Family.SLICED_MMA, weight, k, token_class, target, n=4096, has_bias=True, **options)


def loops(sass: str, holding: str = "") -> Iterator[list[str]]:
    """Yield the instructions of each loop that has one called `holding`, and in it no other loop that has one."""
    found = [match.groups() for line in sass.splitlines() if (match := ADDRESS.match(line))]
    places = [int(address, 16) for address, _ in found]
    spans = {}
    for place, (_, instruction) in zip(places, found, strict=True):
        target = BRANCH.search(instruction)
        if target and int(target[1], 16) < place:
            span = (int(target[1], 16), place)
            spans[span] = [text for at, (_, text) in zip(places, found, strict=True) if span[0] <= at <= span[1]]
    spans = {span: body for span, body in spans.items() if any(holding in text for text in body)}
    for (start, stop), body in spans.items():
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in spans):
            yield body


def spills(instructions: list[str]) -> tuple[int, int]:
    """Return how many values are stored to and loaded from local memory."""
    return sum("STL" in i for i in instructions), sum("LDL" in i for i in instructions)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("weight", DEFAULTS, ids=spec_id)
def test_loops_keep_their_work_in_registers(weight: SliceSpec, tokens: int, cuobjdump: str) -> None:
    """What few values of a loop are kept in local memory cost next to nothing."""
    sass = disassembled(shipped(weight, tokens, 90), 90, cuobjdump, "-sass")
    bodies = [loop for loop in loops(sass) if any("IMMA" in i for i in loop)]
    assert len(bodies) >= weight.num_slices, "a body per count"
    for body in bodies:
        stored, loaded = spills(body)
        assert stored <= 0.01 * len(body), f"{stored} stores of {len(body)} instructions"
        assert loaded <= 0.02 * len(body), f"{loaded} loads of {len(body)} instructions"


@pytest.mark.parametrize("k", [4096, 8192, 14336, 28672])
def test_one_token_has_nothing_in_local_memory(k: int, cuobjdump: str) -> None:
    sass = disassembled(shipped(SliceSpec(), 1, 90, k), 90, cuobjdump, "-sass")
    assert "IMMA" in sass
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize(
    ("k", "options"),
    [
        (3000, {"parts": 3, "has_bias": True}),
        (4096, {}),
        (8192, {"parts": 4, "activation": Activation.A8}),
        (9216, {"parts": 3, "has_bias": True}),
        (28672, {}),
    ],
    ids=str,
)
def test_words_ahead_take_no_exchange_of_lanes(k: int, options: dict, cuobjdump: str) -> None:
    """Lanes read their share of words and activations from shared memory, and wait for nothing that they load."""
    spec = resident(k, **options)
    sass = disassembled(spec, 90, cuobjdump, "-sass")
    bodies = list(loops(sass, "IMMA"))
    assert len(bodies) >= 7, "a body for every count, and one more where tokens differ"
    for body in bodies:
        assert any("LDS.128" in i for i in body), "activations are there"
        assert not any(re.search(r"SHFL|\bLDG\.", i) for i in body)
        assert sum(spills(body)) == 0, f"{spills(body)} of {len(body)} instructions"
    steps = [loop for loop in loops(sass, "TRYWAIT") if len(loop) > 50]  # not those that only wait
    assert len(steps) >= 7
    assert all(not any(re.search(r"\b(LDL|LDG|SHFL)\b", i) for i in step) for step in steps)
    assert not any("BRA.U.ANY" in i for step in steps for i in step), "one thread asks: no loop over those that do"
    # What is read once a tile comes from far away: the L1 cache is small beside so much shared memory.
    assert sum(spills(sass.splitlines())) <= 32
    usage = disassembled(spec, 90, cuobjdump, "-res-usage")
    assert int(re.search(r"REG:(\d+)", usage)[1]) <= 128


@pytest.mark.parametrize(("k", "layout"), [(4096, "slice_major"), (4096, "bit_major"), (14336, "slice_major")])
def test_activations_are_loaded_while_words_are_under_way(k: int, layout: str, cuobjdump: str) -> None:
    """A warp of eight unlike tokens waits for both at once: loads stand before the first exchange of words."""
    spec = multiply_spec(SliceSpec(layout=Layout(layout)), k, TokenClass.FEW, Target.of(90), n=256)
    assert spec.family is Family.SLICED_MMA
    found = loops(disassembled(spec, 90, cuobjdump, "-sass"))
    bodies = [body for body in found if any("SHFL" in i for i in body)]
    for slices in (2, 3, 4):
        (body,) = (body for body in bodies if sum("IMMA" in i for i in body) == 16 * slices)
        before = body[: next(place for place, text in enumerate(body) if "SHFL" in text)]
        wide = sum(WIDE_LOAD.search(i) is not None for i in before)
        words = 2 * slices if layout == "slice_major" else 0  # of planes loads are narrower
        assert wide >= words + 8, f"{slices} slices: words of two rows, halves of two groups' activations"
        after = [text for text in body[len(before) :] if "LDG" in text]
        assert len(after) <= 2, "steps and shifts of both groups, which are asked for last"


@pytest.mark.parametrize("k", [4096, 14336])
def test_alike_tokens_ask_for_activations_as_early(k: int, cuobjdump: str) -> None:
    spec = multiply_spec(SliceSpec(), k, TokenClass.FEW, Target.of(90), n=256)
    found = loops(disassembled(spec, 90, cuobjdump, "-sass"))
    bodies = [body for body in found if sum("IMMA" in i for i in body) == 16]
    assert len(bodies) == 4, "a body for every count of all tokens"
    for slices, body in enumerate(bodies, 1):
        before = body[: next(place for place, text in enumerate(body) if "SHFL" in text)]
        groups = 2 if slices <= 2 else 1
        assert sum("LDG.E.128 " in i for i in before) >= 5 * groups, f"{slices} slices: halves, steps and shifts"


@pytest.mark.parametrize(("n", "k", "most"), [(4096, 4096, 0), (8192, 28672, 4)])
def test_bodies_of_short_and_long_chains_are_told_apart_in_registers(n: int, k: int, most: int, cuobjdump: str) -> None:
    """Local memory comes from far away at first, whoever wrote it."""
    spec = multiply_spec(SliceSpec(), k, TokenClass.FEW, Target.of(90), n=n, gluon=False)
    sass = disassembled(spec, 90, cuobjdump, "-sass")
    ends = re.split(r"\bEXIT\b", "\n".join(match[2] for line in sass.splitlines() if (match := ADDRESS.match(line))))
    bodies = [part.splitlines() for part in ends if "IMMA" in part]
    assert len(bodies) == 7, "each ends the program"
    assert max(sum(spills(body)) for body in bodies) <= most


@pytest.mark.parametrize(("k", "most"), [(4096, 2), (5120, 5), (8192, 5), (14336, 3), (28672, 3)])
def test_what_copies_are_told_is_known_to_be_the_same_in_a_warp(k: int, most: int, cuobjdump: str) -> None:
    """It is in uniform registers; what is in registers of lanes is brought from there before each copy and barrier."""
    steps = [loop for loop in loops(disassembled(resident(k), 90, cuobjdump, "-sass"), "UTMALDG") if len(loop) > 50]
    assert len(steps) >= 7
    assert max(sum("R2UR" in i for i in step) for step in steps) <= most


@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_loops_over_tokens_that_are_alike_keep_their_work_in_registers(tokens: int, cuobjdump: str) -> None:
    """A body a count; those for unlike tokens need more than there is."""
    spec = shipped(SliceSpec(), tokens, 90)
    # A pair of groups of 128 columns: 8 products a group, for each block of tokens and tile of rows.
    products = spec.block_m // 8 * spec.row_tiles * 16
    alike = [
        loop for loop in loops(disassembled(spec, 90, cuobjdump, "-sass")) if sum("IMMA" in i for i in loop) == products
    ]
    assert len(alike) >= 4
    for body in alike:
        assert sum(spills(body)) <= 0.05 * len(body), f"{spills(body)} of {len(body)} instructions"


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("tokens", [1, 8, 32, 64])
def test_registers_stay_within_the_limit_of_the_table(tokens: int, cc: int, cuobjdump: str) -> None:
    spec = shipped(SliceSpec(), tokens, cc)
    usage = disassembled(spec, cc, cuobjdump, "-res-usage")
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    assert registers <= (spec.max_registers or 255)
    warps = 8 if spec.row_tiles == 2 else 16
    assert 65536 // (registers * 32) >= warps, "so many warps share a multiprocessor"
    assert int(re.search(r"STACK:(\d+)", usage)[1]) <= (128 if tokens <= 8 else 512)


@pytest.mark.parametrize("cc", [80, 90, 100])
@pytest.mark.parametrize("k", [576, 4096, 14336])
@pytest.mark.parametrize(("hidden", "long"), [(12, False), (12, True), (16, False)])
def test_networks_keep_their_sums_in_registers(hidden: int, long: bool, k: int, cc: int, cuobjdump: str) -> None:
    options = {"hidden": hidden, "long": long}
    spec = kernel_spec(Family.ROUTE_QUANTIZE, SliceSpec(), k, TokenClass.of(1), Target.of(cc), **options)
    usage = disassembled(spec, cc, cuobjdump, "-res-usage")
    assert int(re.search(r"REG:(\d+)", usage)[1]) <= spec.max_registers
    assert 65536 // (spec.max_registers * 32 * spec.num_warps) >= 2, "two programs share a multiprocessor"
    spilled = int(re.search(r"STACK:(\d+)", usage)[1])
    assert spilled <= (32 if long and cc == 100 else 0), "eight values of pairs that sm_100 adds together"


@pytest.mark.parametrize("k", [576, 4096, 8192])
@pytest.mark.parametrize("family", [Family.ROUTE_QUANTIZE, Family.DEQUANTIZE])
def test_kernels_that_only_move_data_spill_nothing(family: Family, k: int, cuobjdump: str) -> None:
    spec = kernel_spec(family, SliceSpec(), k, TokenClass.of(1), Target.of(90))
    assert re.search(r"STACK:0\b", disassembled(spec, 90, cuobjdump, "-res-usage"))


@pytest.mark.parametrize(
    ("tile", "activation"),
    [(BatchTile(size, both), Activation.A16) for size in (16, 32) for both in (1, 2)]
    + [(BatchTile(32, 1), Activation.A8)],
    ids=str,
)
def test_every_slice_is_read(tile: BatchTile, activation: Activation, cuobjdump: str) -> None:
    """Sums of a slice, to which the next one is added, are not taken for those after it (`kept_sums`)."""
    if reason := toolchain.gluon_refusal():
        pytest.skip(reason)
    spec = batch_spec(SliceSpec(), 4096, Target.of(90), tile=tile, activation=activation, row_unit=8)
    seen = []
    for body in loops(disassembled(spec, 90, cuobjdump, "-sass"), "IGMMA"):
        products = sum("IGMMA" in instruction for instruction in body) // 4
        kept = sum(bool(re.match(r"@!?P\d+ IMAD R", instruction)) for instruction in body)
        # Both groups' first products are for all tokens; a thread has a sum for half of them, in two rows each.
        assert kept == (products - 2) * tile.tokens // 2
        assert spills(body) == (0, 0)
        seen.append(products // 2)
    # Products a group: of alike tokens, of two counts side by side, of three and four slices.
    assert sorted(seen) == sorted([1, 1, 1, 1, 2, 2, 2, 3, 4] * tile.consumers)
