"""Descriptors of what kernels copy by boxes: made of a launch's tensors, by what is looked up once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mobiquant_compiler.codegen import boxes, cache, toolchain
from mobiquant_compiler.codegen.configs import Target, TokenClass
from mobiquant_compiler.codegen.resident_configs import multiply_spec
from mobiquant_compiler.spec import Family, SliceSpec

ROWS, COLUMNS = 14336, 4096


class Launched:
    """Stands for a jitted function: notes what a grid was launched with."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **given: self.given.append(given)


@pytest.fixture
def kernel() -> cache.Kernel:
    """Return a kernel of two weights that are described, whose launches are noted, or skip."""
    if reason := toolchain.gluon_refusal():
        pytest.skip(reason)
    spec = multiply_spec(SliceSpec(), COLUMNS, TokenClass.FEW, Target.of(90), n=ROWS, parts=2)
    assert spec.family is Family.RESIDENT_MMA
    loaded = cache.load(spec)
    return cache.Kernel(spec, loaded.path, Launched(), loaded.parameters, {}, loaded.descriptions)


def test_descriptors_are_of_the_tensors_of_a_launch(kernel: cache.Kernel) -> None:
    assert set(kernel.descriptions) == {"slices_desc", "slices1_desc"}
    words = [torch.zeros(4 * rows, COLUMNS // 16, dtype=torch.int32) for rows in (32, 48)]
    arguments: dict[str, Any] = dict.fromkeys(kernel.parameters) | {"slices_ptr": words[0], "slices1_ptr": words[1]}
    kernel.launch((1, 1), **arguments)
    (given,) = kernel.function.given
    assert list(given) == list(kernel.parameters)
    for name, tensor in (("slices_desc", words[0]), ("slices1_desc", words[1])):
        assert given[name].base is tensor
        assert list(given[name].shape) == list(tensor.shape)
        assert given[name].block_shape == [16, 16]
        assert given[name].layout.swizzle_byte_width == 64
    assert given["slices_ptr"] is words[0]


def test_a_launch_looks_nothing_up(kernel: cache.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a launch without a graph the time on the host counts."""

    def never(*_: Any) -> Any:
        raise AssertionError("looked up anew")

    for name in ("box_of", "source_of", "description"):
        monkeypatch.setattr(boxes, name, never)
    words = torch.zeros(64, COLUMNS // 16, dtype=torch.int32)
    kernel.launch((1, 1), **dict.fromkeys(kernel.parameters) | {"slices_ptr": words, "slices1_ptr": words})
    assert len(kernel.function.given) == 1


def test_a_tensor_that_no_descriptor_can_be_of(kernel: cache.Kernel) -> None:
    words = torch.zeros(64, COLUMNS // 16 + 1, dtype=torch.int32)[:, 1:]
    with pytest.raises(AssertionError, match="aligned"):
        kernel.descriptions["slices_desc"].of(words)
