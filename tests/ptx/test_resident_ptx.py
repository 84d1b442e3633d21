"""In what order the kernel of few tokens in shared memory asks, waits, reads and multiplies: all that its text says."""

from __future__ import annotations

import re
from itertools import groupby

import pytest

from mobiquant_compiler.codegen import cache as kernels
from mobiquant_compiler.codegen.configs import shared_bytes
from mobiquant_compiler.codegen.resident_layout import ResidentLayout
from mobiquant_compiler.codegen.resources import measure
from mobiquant_compiler.spec import Activation
from tests.resident_cases import resident

NAMES = {
    "word": r"ld\.shared\.v2",
    "fence": r"fence\.proxy\.async\.shared::cta; bar\.warp\.sync",
    "elect": r"elect\.sync",
    "announce": r"mbarrier\.arrive\.expect_tx",
    "box": r"cp\.async\.bulk\.tensor",
    "activations": r"cp\.async\.bulk\.shared",
    "product": r"mma\.sync",
    "end": r"; exit;",
}
ORDER = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in NAMES.items()))


def order_of(ptx: str) -> list[tuple[str, int]]:
    """Return what of `NAMES` a kernel's text says, with how many follow one another."""
    names = [match.lastgroup or "" for match in ORDER.finditer(ptx)]
    return [(name, len(list(same))) for name, same in groupby(names)]


def steps_of(ptx: str) -> list[list[tuple[str, int]]]:
    """Return for each body what it says from a step's first word on."""
    order, found = order_of(ptx), []
    for at, (name, _) in enumerate(order):
        if name == "word":
            found.append(order[at : order.index(("end", 1), at)])
    return found


def step(count: int, products: int, between: int = 0) -> list[tuple[str, int]]:
    """Return what a step says: words that are asked for behind all reads, and `between` products before that."""
    asked = [("fence", 1), ("elect", 1), ("announce", 1), ("box", count)]
    return [("word", 4 * count), *([("product", between)] * (between > 0)), *asked, ("product", products)]


# Bodies in the order of the text: those of unlike tokens before those of alike ones.
SHORT = [step(1, 16), step(2, 16, 16), step(2, 8, 8), step(3, 24), step(3, 8), step(4, 32), step(4, 8)]
LONG = [step(1, 16), step(2, 16, 16), step(2, 8, 8), step(3, 24, 24), step(3, 8), step(4, 32, 32), step(4, 8)]


@pytest.mark.parametrize(("k", "wanted"), [(4096, SHORT), (5120, LONG), (8192, LONG), (14336, LONG)])
def test_words_are_asked_for_when_all_lanes_have_read_those_before(k: int, wanted: list) -> None:
    """Behind a fence, since the copy engine waits for no read; of several slices with products in between."""
    found = steps_of(kernels.compile_for(resident(k), 90).asm["ptx"])
    activations = [("elect", 1), ("announce", 1), ("activations", 3)]  # what passes through comes at the end of a step
    assert [body[: len(own)] for body, own in zip(found, wanted, strict=True)] == wanted
    assert all(body[len(own) :] in ([], activations) for body, own in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("k", "early", "late", "anew"),
    [(3000, 2, 0, 0), (4096, 2, 0, 0), (5120, 1, 2, 0), (8192, 1, 3, 0), (9216, 3, 0, 1), (14336, 3, 0, 1)],
)
def test_activations_of_each_step_are_asked_for_once(k: int, early: int, late: int, anew: int) -> None:
    """Some before the counts are known, the rest in each of seven bodies; those that pass through place by place."""
    order = order_of(kernels.compile_for(resident(k), 90).asm["ptx"])
    asked = [number for name, number in order if name == "activations"]
    assert asked == [3] * (early + 7 * (late + anew)), "high halves, low ones, steps and shifts"
    first_box = order.index(("box", 1))
    assert sum(name == "activations" for name, _ in order[:first_box]) == early


@pytest.mark.parametrize(("k", "barriers"), [(4096, 2 + 2), (14336, 2 * 3 + 2)])
def test_copies_begin_behind_the_barriers_that_they_name(k: int, barriers: int) -> None:
    """The copy engine sees barriers behind one fence; all threads meet behind it, then wait for the kernel before."""
    ptx = kernels.compile_for(resident(k), 90).asm["ptx"]
    steps = re.findall(r"mbarrier\.init|fence\.mbarrier_init|bar\.sync \S+, 512|griddepcontrol\.wait", ptx)
    begun = steps.index("fence.mbarrier_init")
    assert steps[:begun] == ["mbarrier.init"] * barriers
    assert (steps[begun + 1][:8], steps[begun + 2]) == ("bar.sync", "griddepcontrol.wait")
    assert not {"mbarrier.init", "fence.mbarrier_init"} & {*steps[begun + 1 :]}


def test_each_body_ends_the_program() -> None:
    """In its loop where no tile is left, and behind it: then ptxas knows that nothing follows."""
    ptx = kernels.compile_for(resident(4096), 90).asm["ptx"]
    assert len(re.findall(r"\bexit;", ptx)) == 2 * 7


@pytest.mark.parametrize(("k", "in_loops"), [(4096, {3, 4, 5, 6}), (14336, {4, 6})])
def test_programs_let_the_next_kernel_begin_before_they_write_a_last_tile(k: int, in_loops: set[int]) -> None:
    """Behind products, but a loop over groups stands in the text behind all that is in the loop around it."""
    ptx = kernels.compile_for(resident(k), 90).asm["ptx"]
    order = re.findall(r"mma\.sync|st\.global|; exit;|(?:@p )?griddepcontrol\.\w+", ptx)
    assert order.pop(0) == "griddepcontrol.wait"
    *bodies, _ = " ".join(name for name, _ in groupby(order)).split("; exit;")
    found = [body.replace("@p griddepcontrol.launch_dependents", "signal").split() for body in bodies]
    looped, written_out = ["signal", "st.global", "mma.sync"], ["mma.sync", "signal", "st.global"]
    assert found == [looped if body in in_loops else written_out for body in range(7)]


@pytest.mark.parametrize("parts", [1, 3])
def test_descriptors_are_the_first_parameters(parts: int) -> None:
    """Copies find a descriptor by the number of its parameter: each is one of 128 bytes, two sizes and two strides."""
    ptx = kernels.compile_for(resident(4096, parts=parts), 90).asm["ptx"]
    wanted = [str(5 * number) for number in range(parts)]
    assert re.findall(r"\.param \.align 64 \.b8 resident_mma_param_(\d+)\[128\]", ptx) == wanted
    assert {*re.findall(r"mov\.b64 a, resident_mma_param_(\d+);", ptx)} == {*wanted}


@pytest.mark.parametrize(
    ("k", "activation"), [(3000, "a16"), (4096, "a8"), (8192, "a16"), (14336, "a16"), (28672, "a8")]
)
def test_memory_is_reserved_from_its_beginning(k: int, activation: str) -> None:
    """Addresses are counted from the symbol of all shared memory: nothing else may be there, and all must be."""
    spec = resident(k, activation=Activation(activation))
    wanted = ResidentLayout(spec.k // 128, 2, 2 if activation == "a16" else 1).total_bytes(4)
    compiled = kernels.compile_for(spec, 90)
    assert compiled.metadata.shared == wanted, "Triton takes none beside it"
    ptx = compiled.asm["ptx"]
    assert ptx.count(".shared .align") == 1, "one symbol"
    assert re.search(r"\.extern \.shared \.align \d+ \.b8 global_smem\[\];", ptx)
    assert f"+{wanted - 128}], " in ptx, "the mark is written behind all else: the allocation begins at the symbol"
    assert measure(spec, 90).shared_bytes == wanted <= shared_bytes(spec)


@pytest.mark.parametrize("k", [8192, 14336])
def test_the_last_warp_asks_for_activations_that_pass_through(k: int) -> None:
    """Who finds that no other is missing, behind the reads of its own lanes and then of all warps."""
    ptx = kernels.compile_for(resident(k), 90).asm["ptx"]
    found = r"pending_count|fence\.\w+|cp\.async\.bulk\.shared|bar\.warp|elect|mbarrier\.arrive\.\w+"
    order = re.findall(found, ptx)
    passed = [at for at, name in enumerate(order) if name == "pending_count"]
    assert len(passed) == (7 if k > 8192 else 0), "one a body"
    for at in passed:
        assert order[at - 3 : at] == ["bar.warp", "elect", "mbarrier.arrive.shared"]
        asked = ["fence.acq_rel", "fence.proxy", "mbarrier.arrive.expect_tx", *["cp.async.bulk.shared"] * 3]
        assert order[at + 1 : at + 1 + len(asked)] == asked
