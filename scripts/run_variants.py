"""Run every kernel variant once on the GPU and compare it with the reference: short enough for compute-sanitizer.

    python scripts/run_variants.py            # all of them
    python scripts/run_variants.py --list     # the names of parts, which may run side by side: most time is compiling
    python scripts/run_variants.py fused      # one of them
    make sanitize                             # all parts, sixteen at a time; then once more under compute-sanitizer

PYTORCH_NO_CUDA_MEMORY_CACHING=1 makes every tensor an allocation of its own, so that a read past one's end is seen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mobiquant_compiler import kernels, reference, wiring
from mobiquant_compiler.codegen.configs import TokenClass
from mobiquant_compiler.runtime import fused, prefill
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Family, Prefill, SliceSpec
from tests.kernel_cases import SPECS, Case, integer_case, spec_id
from tests.network_cases import integer_network

ROWS, COLUMNS = 35, 200  # no multiple of a tile, no multiple of a group
FEW_ROWS = 3  # less than a program of one token has


def check(name: str, got: torch.Tensor, case: Case) -> list[str]:
    """Return a line if a result differs from the reference: exactly on the integer path."""
    return (
        [] if torch.equal(got, case.expected(torch.float32).to(got.dtype)) else [f"{name}: differs from the reference"]
    )


def integer_path(spec: SliceSpec, device: str) -> list[str]:
    """Run one token, every size of small batch, and siblings of one spec, 16-bit activations and 8-bit ones."""
    wrong = []
    for tokens, rows in ((1, ROWS), (1, FEW_ROWS), (5, ROWS), (9, ROWS), (20, ROWS)):
        case = integer_case(spec, tokens, rows, COLUMNS, bias=True, device=device)
        name = f"{spec_id(spec)}, {tokens} tokens, {rows} rows"
        wrong += check(name, wiring.routed_linear(*case.arguments, spec), case)
        x, counts, *weight = case.arguments
        siblings = [[part] * 3 for part in weight]
        for y in wiring.routed_linears(x, counts, *siblings, spec):
            wrong += check(f"{name}, three weights", y, case)
        y = wiring.routed_linear(*case.arguments, spec, Activation.A8)
        if not bool(y.isfinite().all()):
            wrong.append(f"{name}, a8: not finite")
    return wrong


def workspace_prefill(device: str) -> list[str]:
    """Run the route kernel alone and with quantization, as lanes and as rows, and both ways of the workspace."""
    spec = SPECS[0]
    case = integer_case(spec, 70, 40, 256, dtype=torch.bfloat16, device=device)
    router = (torch.ones(256, device=device), torch.tensor([1.0, 0.5, 0.25], device=device))
    hist, mask = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    wiring.route(case.x, router, router[1], hist, mask, "energy")
    wiring.prepare(case.x, router, router[1], hist, mask, spec)
    wiring.prepare(case.x[:40], router, router[1], hist, mask, spec, token_rows=True)
    wrong = [] if int(hist.sum()) == 180 else [f"histogram counted {int(hist.sum())} tokens, not 180"]
    if refusal := prefill.supports(case.x, 40, 256):
        print(f"workspace: only routed: {refusal}")
    else:
        weight = [wiring.Weight(*case.arguments[2:])]
        for how in (Prefill.ROUTED, Prefill.FULL):
            case.counts.fill_(3)
            (y,) = wiring.by_workspace(case.x, case.counts, weight, spec, how)
            error = (y.double() - case.expected()).norm() / case.expected().norm()
            wrong += [] if float(error) < 1e-2 else [f"workspace, {how}: relative error {float(error):.1e}"]
    return wrong


def trained_routers(device: str) -> list[str]:
    """Route by networks: even and odd columns, one pass and several, one token a program and four."""
    wrong = []
    for (k, hidden), tokens in product(((256, 12), (201, 5), (1100, 40)), (1, 9, 67)):
        router, x = integer_network(k, 4, hidden, device=device), torch.ones(tokens, k, device=device)
        mask, hist = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(4, dtype=torch.int64, device=device)
        limits = reference.mlp_scores(x, router)[0] * torch.tensor([1.0, 1.0, 1.5], device=device)
        counts = wiring.route(x, router, limits, hist, mask, "mlp")
        shapes = (False, True) if tokens <= PREFILL_TOKENS else (False,)
        beside = [wiring.prepare(x, router, limits, hist, mask, SPECS[0], token_rows=rows).counts for rows in shapes]
        if counts.tolist() != [3] * tokens or not all(torch.equal(counts, other) for other in beside):
            wrong.append(f"trained router, {k} columns, {hidden} units, {tokens} tokens: not three slices each")
    return wrong


def fused_prefill(device: str) -> list[str]:
    """Run weights made in registers, in tiles of every width, where the device can."""
    wrong = []
    for n, k in ((40, 256), (203, 160), (203, 1088)):
        case = integer_case(SPECS[0], 1100, n, k, dtype=torch.bfloat16, bias=True, device=device)
        if refusal := wiring.fused_refusal(case.x, SPECS[0]):
            print(f"fused: nothing was run: {refusal}")
            return []
        target, weight, wanted = kernels.target_of(case.x.device), wiring.Weight(*case.arguments[2:]), case.expected()
        gather = kernels.gather_kernel(SPECS[0], k, target)
        # Programs that run at a time: waves are always full, or the last one or the only one is split.
        # Where none is, never enough for all tiles to be narrow, or always.
        for small, split, at_once in product((True, False), {False, k > 1024}, (1, 7, 200)):
            tokens = fused.gather(gather, case.x, case.counts, at_once=at_once)
            facts = {"small": small, "split": split, "row_unit": fused.row_unit(n), "has_bias": True}
            kernel = kernels.fused_kernel(SPECS[0], k, target, **facts)
            y = fused.multiply(kernel, tokens, weight)
            error = (y.double() - wanted).norm() / wanted.norm()
            name = f"fused, {n}x{k}, small {small}, split {split}, {at_once} at once"
            wrong += [] if float(error) < 1e-2 else [f"{name}: relative error {float(error):.1e}"]
    return wrong


def blocks_of_tokens(device: str) -> list[str]:
    """Run products of warpgroups, in tiles of every size: of rows enough to be chosen, where the device can."""
    if not kernels.batch_tiles(SPECS[0], kernels.target_of(torch.device(device)), TokenClass.MANY, 6_400, COLUMNS, 1):
        print("blocks: this device has no products of warpgroups; the same calls go to sliced_mma")
    wrong = []
    for tokens, n in ((15, 6_400), (16, 12_840), (32, 6_400), (40, 6_205)):
        case = integer_case(SPECS[0], tokens, n, COLUMNS, bias=True, device=device)
        name = f"{tokens} tokens, {n} rows"
        wrong += check(name, wiring.routed_linear(*case.arguments, SPECS[0]), case)
        for least in (3, 4):
            case.counts.clamp_(min=least)
            wrong += check(f"{name}, {least} slices at least", wiring.routed_linear(*case.arguments, SPECS[0]), case)
        y = wiring.routed_linear(*case.arguments, SPECS[0], Activation.A8)
        wrong += [] if bool(y.isfinite().all()) else [f"{name}, a8: not finite"]
    return wrong


def resident_tokens(device: str) -> list[str]:
    """Run few tokens that stay in shared memory, from tile to tile of rows, where the device does that."""
    wrong, target = [], kernels.target_of(torch.device(device))
    chosen = kernels.multiply_kernel(SPECS[0], 4_333, 3_000, TokenClass.FEW, target, Activation.A16)
    if chosen.spec.family is not Family.RESIDENT_MMA:
        print("resident: not on this device; the same calls take a program for each tile of rows")
    for n, k in ((4_333, 3_000), (4_250, 8_192), (4_250, 9_216)):
        case = integer_case(SPECS[0], 7, n, k, bias=True, largest=1, device=device)
        for count in (None, 1, 2, 3, 4):
            if count is not None:
                case.counts.fill_(count)
            name = f"7 tokens, {n} x {k}, slices {count or 'mixed'}"
            wrong += check(name, wiring.routed_linear(*case.arguments, SPECS[0]), case)
        y = wiring.routed_linear(*case.arguments, SPECS[0], Activation.A8)
        wrong += [] if bool(y.isfinite().all()) else [f"{name}, a8: not finite"]
    return wrong


# Those that take longest first.
PARTS = {
    "blocks": blocks_of_tokens,
    "resident": resident_tokens,
    "fused": fused_prefill,
    "routers": trained_routers,
    "workspace": workspace_prefill,
    **{spec_id(spec): partial(integer_path, spec) for spec in SPECS},
}


def main(names: Sequence[str]) -> int:
    """Run the parts of these names, or all; print what went wrong."""
    if "--list" in names:
        print("\n".join(PARTS))
        return 0
    if unknown := [name for name in names if name not in PARTS]:
        print(f"no part is named {unknown[0]}; there are {', '.join(PARTS)}")
        return 2
    if not torch.cuda.is_available():
        print("torch finds no CUDA device; wanted one of sm_80 or later. On a CPU run `make test-interpret`.")
        return 2
    wrong = [line for name in names or PARTS for line in PARTS[name]("cuda")]
    torch.cuda.synchronize()
    print("\n".join(wrong) or f"all variants agree with the reference: {', '.join(names or PARTS)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
