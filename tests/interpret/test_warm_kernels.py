"""What `warm_kernels` runs is what `kernels_of` says that a launch needs, and neither more nor less."""

from __future__ import annotations

import pytest
import torch

from mobiquant_compiler import kernels, warming
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.codegen.configs import TokenClass
from mobiquant_compiler.launches import Launch, kernels_of
from mobiquant_compiler.spec import Activation, Family, SliceSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize(("parts", "hidden", "longest"), [(1, 0, 8), (2, 0, 8), (2, 3, 8), (1, 3, None)])
@pytest.mark.parametrize("activation", list(Activation))
def test_the_kernels_of_a_launch(
    parts: int, hidden: int, longest: int | None, activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_LOADED", {})
    chosen = (kernels.prepare_kernel, kernels.multiply_kernel, kernels.dequantize_kernel)
    for choice in chosen:
        choice.cache_clear()
    spec = SliceSpec((2, 2), 32)
    launch = Launch(
        spec, 8, 40, CPU, torch.float32, bias_dtype=torch.float32, parts=parts, activation=activation, hidden=hidden
    )
    options = {"bias_dtype": launch.bias_dtype, "parts": parts, "activation": activation, "hidden": hidden}
    warming.warm_kernels(spec, launch.n, launch.k, launch.x_dtype, CPU, max_tokens=longest, **options)
    classes = [tokens for tokens in TokenClass if longest is None or tokens.sample <= longest]
    wanted = set(kernels_of(launch, kernels.target_of(CPU), classes, workspace=longest is None, emulate=True))
    wanted = {spec for spec in wanted if spec.family is not Family.DEQUANTIZE}  # a CPU goes no way of a workspace
    found = {kernel.spec for kernel in cache.loaded_kernels()}
    for choice in chosen:
        choice.cache_clear()
    assert found == wanted
