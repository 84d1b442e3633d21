"""Emitted kernels against files: a change of a template or of the binding shows as a diff to review.

MOBIQUANT_ACCEPT=1 writes the files anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.codegen.specialise import specialise
from mobiquant_compiler.spec import Activation, Family, KernelSpec, Layout, SliceSpec

EXPECTED = Path(__file__).parent / "expected"
H100 = Target.of(90)
PLANES = SliceSpec((3, 3, 2), 64, Layout.BIT_MAJOR)
KERNELS = {
    "route": kernel_spec(Family.ROUTE, SliceSpec(), 4096, TokenClass.ONE, H100),
    "quantize_places": kernel_spec(Family.QUANTIZE, SliceSpec(), 4096, TokenClass.ONE, H100),
    "quantize_columns_a8": kernel_spec(
        Family.QUANTIZE, SliceSpec(), 4096, TokenClass.MANY, H100, activation=Activation.A8
    ),
    "decode": kernel_spec(Family.DECODE, SliceSpec(), 4096, TokenClass.ONE, H100),
    "decode_planes_bias": kernel_spec(Family.DECODE, PLANES, 4096, TokenClass.ONE, H100, has_bias=True),
    "grouped_small_batch": kernel_spec(Family.GROUPED, SliceSpec(), 4096, TokenClass.UP_TO_16, H100),
    "grouped_prefill_bias": kernel_spec(Family.GROUPED, SliceSpec(), 4096, TokenClass.MANY, H100, has_bias=True),
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
    if os.environ.get("MOBIQUANT_ACCEPT") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    assert path.is_file(), f"{path} is missing; MOBIQUANT_ACCEPT=1 writes it"
    assert source == path.read_text(encoding="utf-8"), "review the diff, then MOBIQUANT_ACCEPT=1 accepts it"


def test_no_file_is_left_over() -> None:
    assert {path.name for path in EXPECTED.iterdir()} == {f"{name}.py.txt" for name in KERNELS}
