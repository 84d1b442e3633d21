"""The kernel of few tokens in shared memory, as calls of many rows take it."""

from __future__ import annotations

from typing import Any

import pytest

from mobiquant_compiler.codegen import toolchain
from mobiquant_compiler.codegen.configs import Target, TokenClass
from mobiquant_compiler.codegen.resident_configs import multiply_spec
from mobiquant_compiler.spec import Family, KernelSpec, SliceSpec


def resident(k: int, **options: Any) -> KernelSpec:
    """Return the kernel of few tokens and many rows, or skip."""
    if reason := toolchain.gluon_refusal():
        pytest.skip(reason)
    spec = multiply_spec(SliceSpec(), k, TokenClass.FEW, Target.of(90), n=14336, **options)
    assert spec.family is Family.RESIDENT_MMA
    return spec
