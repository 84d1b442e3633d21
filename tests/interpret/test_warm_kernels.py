"""What `warm_kernels` runs is what `kernels_of` says that a launch needs, and neither more nor less."""

from __future__ import annotations

import pytest
import torch

from mobiquant_compiler import kernels, wiring
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.codegen.configs import TokenClass
from mobiquant_compiler.launches import Launch, kernels_of
from mobiquant_compiler.spec import Activation, SliceSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("activation", list(Activation))
def test_the_kernels_of_a_launch(parts: int, activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LOADED", {})
    chosen = (kernels.prepare_kernel, kernels.multiply_kernel, kernels.dequantize_kernel)
    for choice in chosen:
        choice.cache_clear()
    spec = SliceSpec((2, 2), 32)
    launch = Launch(spec, 8, 40, CPU, torch.float32, bias_dtype=torch.float32, parts=parts, activation=activation)
    options = {"bias_dtype": launch.bias_dtype, "parts": parts, "activation": activation}
    wiring.warm_kernels(spec, launch.n, launch.k, launch.x_dtype, CPU, max_tokens=8, **options)
    short = [tokens for tokens in TokenClass if tokens.sample <= 8]
    wanted = kernels_of(launch, kernels.target_of(CPU), short, workspace=False, emulate=True)
    found = {kernel.spec for kernel in cache.loaded_kernels()}
    for choice in chosen:
        choice.cache_clear()
    assert found == set(wanted)
