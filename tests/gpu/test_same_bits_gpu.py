"""No bit of a token's result depends on its batch, on its kernel or on how weights are packed, on the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mobiquant_compiler import wiring
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.codegen.configs import TokenClass, kernel_spec
from mobiquant_compiler.kernels import prepare_kernel, target_of
from mobiquant_compiler.packing import pack, unpack
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import Activation, Family, Prefill, SliceSpec
from tests.kernel_cases import BIT, EVEN_K, SLICE, SPECS, UNEVEN_K, Case, random_case, spec_id

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WHERE = "cuda"
PARTS = ((0, 1), (1, 3), (10, 17), (20, 36), (50, 70), (40, 73), (100, 164))  # 1, 2, 7, 16, 20, 33 and 64 tokens


def run(case: Case, activation: Activation = Activation.A16, prefill: Prefill = Prefill.ROUTED) -> Tensor:
    """Run the routed linear of a case."""
    return wiring.routed_linear(*case.arguments, case.spec, activation, prefill)


def rows_of(case: Case, rows: slice | Tensor) -> Case:
    """Return some tokens of a case."""
    return replace(case, x=case.x[rows], counts=case.counts[rows])


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_exact_prefill_has_the_bits_of_small_batches(spec: SliceSpec, activation: Activation) -> None:
    for k in (EVEN_K, UNEVEN_K) if spec in SPECS[:4] or spec.group == 128 else (EVEN_K,):
        case = random_case(spec, 300, 150, k, device=WHERE)
        whole = run(case, activation, Prefill.EXACT)
        for start, stop in PARTS:
            part = run(rows_of(case, slice(start, stop)), activation)
            assert torch.equal(part, whole[start:stop]), f"tokens {start} to {stop} of {k} columns"


@pytest.mark.parametrize("spec", SPECS[:3], ids=spec_id)
def test_neighbours_and_their_counts_do_not_matter(spec: SliceSpec) -> None:
    case = random_case(spec, 64, 150, EVEN_K, device=WHERE)
    alone = run(rows_of(case, slice(4, 5)))[0]
    g = torch.Generator().manual_seed(0)
    for tokens in (2, 7, 8, 9, 16, 33, 64):
        for place in {0, tokens // 2, tokens - 1}:
            others = torch.randint(0, 64, (tokens,), generator=g).to(WHERE)
            others[place] = 4
            batch = rows_of(case, others)
            for counts in (int(case.counts[4]), 1, spec.num_slices):
                batch.counts.fill_(counts)
                batch.counts[place] = case.counts[4]
                assert torch.equal(run(batch)[place], alone), f"token {place} of {tokens}, others {counts}"


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_kernel_for_many_tokens_gives_one_the_same_bits(spec: SliceSpec, activation: Activation) -> None:
    k = EVEN_K
    case = random_case(spec, 1, 150, k, device=WHERE)
    target = target_of(case.x.device)
    quantizer = prepare_kernel(spec, k, target, activation, route=False, quantize=True)
    prepared = launch.prepare(quantizer, case.x, counts=case.counts)
    weight = Weight(case.slices, case.scale, case.zero, case.bias)
    options = {"activation": activation, "has_bias": True}
    many = kernel_spec(Family.SLICED_MMA, spec, k, TokenClass.of(8), target, **options)
    for count in range(1, spec.num_slices + 1):
        case.counts.fill_(count)
        found = launch.multiply(cache.load(many), wiring.with_counts(prepared, case.counts), [weight])[0]
        assert torch.equal(found, run(case, activation)), f"{count} slices"


@pytest.mark.parametrize(
    ("widths", "group"),
    [((2, 2, 2, 2), 128), ((2, 2, 2, 2), 32), ((4, 2, 2), 64), ((1,) * 8, 128), ((4, 4), 128), ((1, 1, 2, 4), 64)],
    ids=str,
)
def test_both_layouts_give_the_same_bits(widths: tuple[int, ...], group: int) -> None:
    whole, planes = SliceSpec(widths, group, SLICE), SliceSpec(widths, group, BIT)
    for tokens in (1, 3, 20):
        case = random_case(whole, tokens, 150, EVEN_K, device=WHERE)
        codes = unpack(case.slices, whole, whole.num_slices)
        other = replace(case, spec=planes, slices=pack(codes, planes))
        for count in range(1, whole.num_slices + 1):
            case.counts.fill_(count)
            assert torch.equal(run(case), run(other)), f"{tokens} tokens, {count} slices"


def test_the_order_of_sums_is_that_of_chains() -> None:
    """What bits are, not only that they agree: pairs of groups dealt to eight chains, chains summed in fixed order."""
    spec, groups, rows = SliceSpec((2, 2), 32), 35, 40
    case = replace(random_case(spec, 1, rows, groups * 32, scale_dtype=torch.float32, device=WHERE), bias=None)
    case.x.copy_((case.x * 64).round() / 64)  # exact in fixed point: what is left are sums of group results
    case.counts.fill_(1)
    codes = unpack(case.slices, spec, 1).double().view(rows, groups, 32)
    x = case.x.double().view(1, groups, 32)
    dots, totals = (codes * x).sum(-1).float(), x.sum(-1).float()

    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (a.double() * b.double() + c.double()).float()  # the product is exact, the sum almost always

    chains = [torch.zeros(rows, device=WHERE) for _ in range(8)]
    for pair in range((groups + 1) // 2):
        for group in range(2 * pair, min(2 * pair + 2, groups)):
            inner = dots[:, group] - totals[:, group] * case.zero[:, group]  # rounded twice, as the kernel does
            chains[pair % 8] = fma(case.scale[:, group], inner, chains[pair % 8])
    c = chains
    wanted = ((c[0] + c[1]) + (c[2] + c[3])) + ((c[4] + c[5]) + (c[6] + c[7]))
    assert torch.equal(run(case)[0], wanted)
    assert torch.equal(run(replace(case, x=case.x.repeat(9, 1), counts=case.counts.repeat(9))), wanted.repeat(9, 1))
