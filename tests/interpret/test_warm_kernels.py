"""What `warm_kernels` runs is what `kernels_of` says that a launch needs, and neither more nor less."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mobiquant_compiler import kernels, warming, wiring
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.codegen.configs import TokenClass
from mobiquant_compiler.launches import Launch, kernels_of, launches_of
from mobiquant_compiler.linear import MobiLinear, Router
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


@pytest.mark.parametrize("rows", [(5,), (8,), (16,), (16, 24), (12, 16), (8, 16)], ids=str)
def test_one_token_runs_kernels_that_are_listed(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """For rows by eights, or for any: whichever is chosen for a launch is what warmup compiles."""
    monkeypatch.setattr(cache, "_LOADED", {})
    kernels.multiply_kernel.cache_clear()
    spec = SliceSpec((2, 2), 32)
    router = Router(torch.ones(64), spec.widths)
    model = nn.ModuleList(MobiLinear.from_weight(torch.randn(n, 64), None, spec, router=router) for n in rows)
    weights = [[m.slices for m in model], [m.scale for m in model], [m.zero for m in model], [None] * len(rows)]
    counts = torch.full((1,), 2, dtype=torch.int32)
    ys = wiring.routed_linears(torch.randn(1, 64), counts, *weights, spec)
    assert all(bool(y.isfinite().all()) for y in ys)
    found = {kernel.spec for kernel in cache.loaded_kernels() if kernel.spec.family is Family.SLICED_MMA}
    (launch,) = (launch for launch in launches_of(model, "test") if launch.n == sum(rows))
    listed = kernels_of(launch, kernels.target_of(CPU), [TokenClass.ONE], workspace=False, emulate=True)
    kernels.multiply_kernel.cache_clear()
    assert found == {spec for spec in listed if spec.family is Family.SLICED_MMA}
    assert {spec.row_unit for spec in found} == {8 if all(n % 8 == 0 and n >= 16 for n in rows) else 1}
