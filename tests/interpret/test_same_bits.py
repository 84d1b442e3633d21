"""No bit of a token's result depends on its batch, on its kernel or on how weights are packed: random data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mobiquant_compiler import wiring
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.kernels import prepare_kernel
from mobiquant_compiler.packing import pack, unpack
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import Activation, Family, Prefill, SliceSpec
from tests.kernel_cases import BIT, SLICE, SPECS, Case, random_case, spec_id

# One token is multiplied by two groups at once (the first), or not; a body a count (all but the last), or one for all.
SOME_SPECS = (SliceSpec((4, 2), 64, SLICE), SPECS[2], SliceSpec((1,) * 5, 32, BIT))
STEPS = 19  # groups: two steps of eight chains, of which the second is cut off
TARGET = Target.of(80)


def many(spec: SliceSpec, tokens: int, n: int = 5) -> Case:
    """Return a case of `STEPS` groups, the last of them padded."""
    return random_case(spec, tokens, n, STEPS * spec.group - 9, seed=tokens)


def rows_of(case: Case, rows: slice | Tensor, counts: Tensor | None = None) -> Case:
    """Return some tokens of a case, in another order or with other counts."""
    return replace(case, x=case.x[rows], counts=case.counts[rows] if counts is None else counts)


def run(case: Case, activation: Activation = Activation.A16, prefill: Prefill = Prefill.ROUTED) -> Tensor:
    """Run the routed linear of a case."""
    return wiring.routed_linear(*case.arguments, case.spec, activation, prefill)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("spec", SOME_SPECS, ids=spec_id)
def test_a_token_does_not_depend_on_its_batch(spec: SliceSpec, activation: Activation) -> None:
    case = many(spec, 64, n=2)
    whole = run(case, activation)
    for token in (0, 13, 63):
        alone = slice(token, token + 1)
        assert torch.equal(run(rows_of(case, alone), activation), whole[alone]), f"token {token} alone"
    for start, stop in ((0, 2), (3, 10), (40, 56), (47, 64)):
        part = run(rows_of(case, slice(start, stop)), activation)
        assert torch.equal(part, whole[start:stop]), f"tokens {start} to {stop}"


@pytest.mark.parametrize("spec", SOME_SPECS, ids=spec_id)
def test_neighbours_and_their_counts_do_not_matter(spec: SliceSpec) -> None:
    case = many(spec, 20)
    alone = run(rows_of(case, slice(4, 5)))[0]
    own = case.counts[4]
    for tokens, place in ((2, 0), (2, 1), (7, 6), (9, 8), (16, 3), (17, 16)):
        g = torch.Generator().manual_seed(tokens + place)
        others = torch.randint(0, 20, (tokens,), generator=g)
        others[place] = 4
        for counts in (torch.full((tokens,), int(own)), torch.randint(1, spec.num_slices + 1, (tokens,), generator=g)):
            counts[place] = own
            found = run(rows_of(case, others, counts.int()))[place]
            assert torch.equal(found, alone), f"token {place} of {tokens}, counts {counts.tolist()}"


def test_a_neighbour_that_is_not_finite_does_not_matter() -> None:
    case = many(SPECS[2], 9)
    whole = run(case)
    case.x[2, 3] = float("nan")
    case.x[5] = float("inf")
    kept = [token for token in range(9) if token not in (2, 5)]
    assert torch.equal(run(case)[kept], whole[kept])


@pytest.mark.parametrize("spec", SOME_SPECS[:2], ids=spec_id)
def test_exact_prefill_has_the_bits_of_small_batches(spec: SliceSpec) -> None:
    case = many(spec, 70, n=2)
    whole = run(case, prefill=Prefill.EXACT)
    for start, stop in ((0, 1), (30, 37), (53, 70)):
        assert torch.equal(run(rows_of(case, slice(start, stop))), whole[start:stop]), f"tokens {start} to {stop}"


@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (4, 2, 2), (1,) * 8, (4, 4), (2,), (1, 1, 2, 4)], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_both_layouts_give_the_same_bits(widths: tuple[int, ...], group: int) -> None:
    whole, planes = SliceSpec(widths, group, SLICE), SliceSpec(widths, group, BIT)
    for tokens in (1, 3):
        case = random_case(whole, tokens, 5, 3 * group - 7, seed=tokens)
        codes = unpack(case.slices, whole, whole.num_slices)
        other = replace(case, spec=planes, slices=pack(codes, planes))
        for count in {1, whole.num_slices - 1, whole.num_slices} - {0}:
            case.counts.fill_(count)
            assert torch.equal(run(case), run(other)), f"{tokens} tokens, {count} slices"


@pytest.mark.parametrize(
    ("spec", "activation"),
    [(SOME_SPECS[0], Activation.A8), *((s, Activation.A16) for s in (*SOME_SPECS, SliceSpec((1,) * 5, 128, BIT)))],
    ids=str,
)
def test_every_tile_gives_one_token_the_same_bits(spec: SliceSpec, activation: Activation) -> None:
    case = many(spec, 1, n=18)
    quantizer = prepare_kernel(spec, case.x.shape[-1], TARGET, activation, route=False, quantize=True)
    prepared = launch.prepare(quantizer, case.x, counts=case.counts)
    weight = Weight(case.slices, case.scale, case.zero, case.bias)
    options = {"activation": activation, "has_bias": True, "emulate": True}
    shipped = kernel_spec(Family.SLICED_MMA, spec, STEPS * spec.group, TokenClass.of(1), TARGET, **options)
    for count in (1, spec.num_slices):
        case.counts.fill_(count)
        wanted = run(case, activation)
        # 8, 4 and 2 warps share the chains of a row, which have 1, 2 and 4 each.
        for tokens, rows in ((1, 16), (8, 32), (16, 64)):
            kernel = cache.load(replace(shipped, block_m=tokens, block_n=rows))
            found = launch.multiply(kernel, wiring.with_counts(prepared, case.counts), [weight])[0]
            assert torch.equal(found, wanted), f"{count} slices by a kernel for {tokens} tokens and {rows} rows"


@pytest.mark.parametrize("spec", SOME_SPECS[1:], ids=spec_id)
@pytest.mark.parametrize(("tokens", "rows", "warps"), [(16, 32, 4), (8, 64, 4)])
def test_warps_of_two_tiles_of_rows_give_the_same_bits(spec: SliceSpec, tokens: int, rows: int, warps: int) -> None:
    case = many(spec, 19, n=37)
    quantizer = prepare_kernel(spec, case.x.shape[-1], TARGET, Activation.A16, route=False, quantize=True)
    prepared = launch.prepare(quantizer, case.x, counts=case.counts)
    weight = Weight(case.slices, case.scale, case.zero, case.bias)
    many_tokens = TokenClass.of(tokens)
    shipped = kernel_spec(Family.SLICED_MMA, spec, STEPS * spec.group, many_tokens, TARGET, has_bias=True, emulate=True)
    kernel = cache.load(replace(shipped, block_m=tokens, block_n=rows, row_tiles=2, num_warps=warps))
    for counts in (case.counts.clone(), torch.full_like(case.counts, spec.num_slices)):
        case.counts.copy_(counts)
        found = launch.multiply(kernel, wiring.with_counts(prepared, counts), [weight])[0]
        assert torch.equal(found, run(case)), f"counts {counts.tolist()}"


@pytest.mark.parametrize("counts", ["alike", "mixed"])
def test_loads_that_run_ahead_change_no_bits(counts: str) -> None:
    """Three steps, the last cut off, in kernels that load a step ahead and in those that do not."""
    spec = SliceSpec((2, 2), 32, SLICE)
    case = random_case(spec, 20, 18, 33 * spec.group - 5)
    if counts == "alike":
        case.counts.fill_(2)
    whole = run(case)
    assert torch.allclose(whole.double(), case.expected(), rtol=1e-4, atol=1e-4)
    for rows in (slice(4, 5), slice(3, 9), slice(2, 14)):
        assert torch.equal(run(rows_of(case, rows)), whole[rows]), f"tokens {rows.start} to {rows.stop}"


def test_the_order_of_sums_is_that_of_chains() -> None:
    """What bits are, not only that they agree: pairs of groups dealt to eight chains, chains summed in fixed order."""
    spec = SliceSpec((2, 2), 32, SLICE)
    groups = 35
    case = random_case(spec, 1, 4, groups * 32, scale_dtype=torch.float32)
    case = replace(case, bias=None)
    case.x.copy_((case.x * 64).round() / 64)  # exact in fixed point: what is left are sums of group results
    case.counts.fill_(1)
    codes = unpack(case.slices, spec, 1).double().view(4, groups, 32)
    x = case.x.double().view(1, groups, 32)
    dots, totals = (codes * x).sum(-1).float(), x.sum(-1).float()

    chains = [torch.zeros(4) for _ in range(8)]
    for pair in range((groups + 1) // 2):
        for group in (2 * pair, 2 * pair + 1):
            if group < groups:
                inner = dots[:, group] - totals[:, group] * case.zero[:, group]
                # The interpreter rounds the product first, devices do not (`tests/gpu`).
                chains[pair % 8] = case.scale[:, group] * inner + chains[pair % 8]
    c = chains
    wanted = ((c[0] + c[1]) + (c[2] + c[3])) + ((c[4] + c[5]) + (c[6] + c[7]))
    assert torch.equal(run(case)[0], wanted)
