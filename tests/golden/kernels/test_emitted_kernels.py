"""Emitted kernels against files: a change of a template or of the binding shows as a diff to review.

MOBIQUANT_ACCEPT=1 writes the files anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from mobiquant_compiler.codegen.batch_configs import BatchTile, batch_spec
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec, wgmma_spec
from mobiquant_compiler.codegen.resident_configs import multiply_spec
from mobiquant_compiler.codegen.specialise import specialise
from mobiquant_compiler.spec import Activation, Family, KernelSpec, Layout, SliceSpec

EXPECTED = Path(__file__).parent / "expected"
H100 = Target.of(90)
PLANES = SliceSpec((3, 3, 2), 64, Layout.BIT_MAJOR)


def kernel(family: Family, weight: SliceSpec, tokens: int = 1, **options: Any) -> KernelSpec:
    """Choose a kernel for 4096 columns."""
    return kernel_spec(family, weight, 4096, TokenClass.of(tokens), H100, **options)


KERNELS = {
    "route": kernel(Family.ROUTE_QUANTIZE, SliceSpec(), quantize=False),
    "quantize_a8": kernel(Family.ROUTE_QUANTIZE, SliceSpec(), route=False, activation=Activation.A8),
    "route_and_quantize": kernel(Family.ROUTE_QUANTIZE, SliceSpec()),
    "route_by_network": kernel(Family.ROUTE_QUANTIZE, SliceSpec(), quantize=False, hidden=12),
    "route_by_network_and_quantize": kernel(Family.ROUTE_QUANTIZE, SliceSpec(), hidden=12, long=True),
    "one_token": kernel(Family.SLICED_MMA, SliceSpec()),
    "one_token_planes_bias": kernel(Family.SLICED_MMA, PLANES, has_bias=True),
    "many_tokens_siblings": kernel(Family.SLICED_MMA, SliceSpec(), 8, parts=3),
    "resident_siblings": multiply_spec(SliceSpec(), 4096, TokenClass.FEW, H100, n=14336, parts=2),
    "resident_two_slices_bias": multiply_spec(SliceSpec((2, 2)), 8192, TokenClass.FEW, H100, n=14336, has_bias=True),
    "many_tokens_interpreted": kernel(Family.SLICED_MMA, SliceSpec((1,) * 8), 8, emulate=True),
    "dequantize_sorted": kernel(Family.DEQUANTIZE, SliceSpec()),
    "gather_tokens": kernel(Family.GATHER_TOKENS, SliceSpec()),
    "fused": wgmma_spec(SliceSpec(), 4096, H100, small=False, row_unit=8),
    "fused_split": wgmma_spec(SliceSpec(), 4096, H100, small=False, split=True, row_unit=8),
    "fused_small_tiles_bias": wgmma_spec(SliceSpec((2, 2), 32), 4096, H100, small=True, has_bias=True),
    "quantize_rows": kernel(Family.ROUTE_QUANTIZE, SliceSpec(), route=False, token_rows=True),
    "batch": batch_spec(SliceSpec(), 4096, H100, tile=BatchTile(32, 2)),
    "batch_siblings_bias": batch_spec(SliceSpec((2, 2)), 4096, H100, tile=BatchTile(16, 1), parts=2, has_bias=True),
    "dequantize_planes_one_count": kernel(Family.DEQUANTIZE, PLANES, sorted_rows=False),
}


def normalised(source: str) -> str:
    """Take versions and hashes out: they move without the kernel."""
    source = re.sub(r"(?m)^# Emitted by .*$", "# Emitted by <version>", source)
    return re.sub(r"sha256 \w+", "sha256 <hash>", source)


@pytest.mark.parametrize("name", KERNELS)
def test_emitted_source(name: str) -> None:
    spec: KernelSpec = KERNELS[name]
    source = normalised(specialise(spec))
    path = EXPECTED / f"{name}.py.txt"
    if any(os.environ.get(name) == "1" for name in ("MOBIQUANT_ACCEPT", "EXPECTTEST_ACCEPT")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    assert path.is_file(), f"{path} is missing; MOBIQUANT_ACCEPT=1 writes it"
    assert source == path.read_text(encoding="utf-8"), "review the diff, then MOBIQUANT_ACCEPT=1 accepts it"


def test_no_file_is_left_over() -> None:
    assert {path.name for path in EXPECTED.iterdir()} == {f"{name}.py.txt" for name in KERNELS}
