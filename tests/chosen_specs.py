"""Specs of kernels as their choosers give them, one call for all families."""

from __future__ import annotations

from typing import Any

from mobiquant_compiler.codegen.batch_configs import BatchTile, batch_spec
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec, wgmma_spec
from mobiquant_compiler.codegen.resident_configs import multiply_spec
from mobiquant_compiler.spec import Family, KernelSpec, SliceSpec

H100 = Target.of(90)


def spec_of(family: Family, spec: SliceSpec | None = None, tokens: int = 1, **options: Any) -> KernelSpec:
    """Choose a kernel of `family` for 4096 columns."""
    if family is Family.SLICED_WGMMA:
        return wgmma_spec(spec or SliceSpec(), 4096, H100, small=tokens < 2, **options)
    if family is Family.BATCH_WGMMA:
        return batch_spec(spec or SliceSpec(), 4096, H100, tile=BatchTile(32, 1), **options)
    if family is Family.RESIDENT_MMA:
        return multiply_spec(spec or SliceSpec(), 4096, TokenClass.FEW, H100, **{"n": 14336} | options)
    return kernel_spec(family, spec or SliceSpec(), 4096, TokenClass.of(tokens), H100, **options)
