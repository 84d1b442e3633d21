"""How far results of float32 activations are from the reference: every kernel and tile, for bench_linear.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from linear_ours import GROUP, WIDTHS, Case, Weights, calls_of, counts_of
from linear_timing import Sample, check

from mobiquant_compiler.codegen import compiling
from mobiquant_compiler.codegen.configs import TokenClass
from mobiquant_compiler.launches import Launch, binaries_of
from mobiquant_compiler.spec import Activation, Layout, SliceSpec
from mobiquant_compiler.wiring import target_of

# Each is another tile: of 4096 rows three of sliced_mma, then batch_wgmma with two warpgroups and 16 or 32 tokens; of
# more rows with one.
SHAPES = {(4096, 4096): (1, 8, 16, 32, 64), (14336, 4096): (16, 32)}
BIT_MAJOR = (1, 8)
KINDS = (*(("uniform", slices) for slices in range(1, len(WIDTHS) + 1)), ("mixed", len(WIDTHS)))


def accuracies(device: torch.device) -> list[dict[str, Any]]:
    """Return a row per shape, number of tokens, layout, activation and slice counts: the relative error in norm.

    Raises:
        WrongResult: an element of a result is not finite.
    """
    if device.type == "cuda":
        _compile(device)
    return list(_rows(device))


def _compile(device: torch.device) -> None:
    launches = [
        Launch(SliceSpec(WIDTHS, GROUP, layout), n, k, device, torch.float32, activation=activation)
        for (n, k), layout, activation in product(SHAPES, Layout, Activation)
    ]
    target = target_of(device)
    binaries = binaries_of(launches, target, TokenClass, workspace=False)
    compiling.compile_all([(spec, target.cc, dtypes) for spec, dtypes in binaries], None)


def _rows(device: torch.device) -> Iterator[dict[str, Any]]:
    for ((n, k), tokens), layout in product(SHAPES.items(), Layout):
        weights = Weights(n, k, layout, device, copies=1)
        for count in tokens if layout is Layout.SLICE_MAJOR else set(tokens) & set(BIT_MAJOR):
            x = torch.randn(count, k, device=device)
            kinds = [kind for kind in KINDS if kind[0] == "uniform" or kind[1] <= count]  # as many counts as are said
            for activation, (kind, slices) in product(Activation, kinds):
                case = Case(slices, kind, activation, layout)
                counts = counts_of(case, count, device)
                sample = Sample.of(count, n, device)
                call = calls_of(weights, case, x, counts)[0][0]
                error = check(call, weights.expected(x, counts, sample), sample, math.inf)
                where = {"n": n, "k": k, "tokens": count, "slices": slices, "counts": kind}
                yield where | {"activation": activation, "layout": layout, "relative_error": float(f"{error:.3g}")}
