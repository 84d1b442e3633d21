"""Static quantizers: grids, round to nearest, GPTQ, HQQ, and the walk from stage to stage."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mobiquant_compiler.baselines import compare
from mobiquant_compiler.baselines.compare import METHODS, measure_static, static_weights
from mobiquant_compiler.baselines.gptq import column_order, gptq
from mobiquant_compiler.baselines.grids import (
    join_groups,
    least_squares_grid,
    min_max_grid,
    rounded,
    split_groups,
)
from mobiquant_compiler.baselines.hqq import hqq_library, hqq_own, library_version
from mobiquant_compiler.baselines.rtn import round_to_nearest
from mobiquant_compiler.baselines.stages import stages
from mobiquant_compiler.config import SliceConfig
from mobiquant_compiler.errors import BadOption, NothingToQuantize
from mobiquant_compiler.quantize import quantize_, select, weight_of
from tests.models_tiny import tiny_gpt2, tiny_llama, tiny_lm, tiny_mlp, tokens
from tests.unit.test_blocks import CHAINS, Odd


def weight(n: int = 24, k: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def inputs(k: int = 128, seed: int = 1) -> Tensor:
    """Correlated inputs of unequal size: without correlation GPTQ has nothing to make up for."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(512, k // 4, generator=generator) @ torch.randn(k // 4, k, generator=generator)
    return (mixed + 0.3 * torch.randn(512, k, generator=generator)) * torch.linspace(0.2, 3, k)


class TestGrids:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_min_max_keeps_zero_and_every_weight_within_a_step(self, bits: int) -> None:
        x = weight(16, 64)
        x[:, 0] = 0
        scale, low = min_max_grid(x, bits)
        error = (rounded(x, scale, low, bits) - x).abs()
        assert (error[:, 0] < 1e-6).all()
        assert (error <= scale * (1 + 1e-5)).all()

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_least_squares_is_never_worse_than_the_whole_range(self, bits: int) -> None:
        x = weight(32, 64)
        x[:, 5] *= 6  # an outlier: shrinking pays
        centre, span = (x.amax(-1, True) + x.amin(-1, True)) / 2, x.amax(-1, True) - x.amin(-1, True)
        step = span / (2**bits - 1)
        whole = (rounded(x, step, centre - span / 2, bits) - x).square().sum(-1)
        found = (rounded(x, *least_squares_grid(x, bits), bits) - x).square().sum(-1)
        assert (found <= whole + 1e-5).all()
        assert found.sum() < 0.85 * whole.sum()

    def test_constant_groups(self) -> None:
        for value in (0.0, 1.5):
            x = torch.full((2, 32), value)
            for grid in (min_max_grid, least_squares_grid):
                assert torch.allclose(rounded(x, *grid(x, 2), 2), x, atol=1e-5)

    @pytest.mark.parametrize("k", [128, 100])
    def test_groups_come_apart_and_together(self, k: int) -> None:
        w = weight(6, k)
        groups = split_groups(w, 64)
        assert groups.shape == (12, 64)
        assert torch.equal(join_groups(groups, 6, k), w)
        assert groups.max() == w.max()


class TestRoundToNearest:
    def test_by_hand(self) -> None:
        w = torch.tensor([[0.0, 1.0, 2.0, 3.0, 2.4, 0.6]])
        assert torch.allclose(round_to_nearest(w, 2, 6), torch.tensor([[0.0, 1.0, 2.0, 3.0, 2.0, 1.0]]))

    def test_more_bits_less_error(self) -> None:
        w = weight(8, 100)
        errors = [float((round_to_nearest(w, bits, 32) - w).norm()) for bits in (2, 3, 4, 8)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.01 * w.norm()


class TestGptq:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_gives_less_output_error_than_its_own_grid(self, bits: int) -> None:
        w, x = weight(), inputs()
        found = gptq(w, x.t() @ x, bits, 64)
        groups = split_groups(w, 64)
        nearest = join_groups(rounded(groups, *least_squares_grid(groups, bits), bits), *w.shape)

        def error(v: Tensor) -> float:
            return float((x @ (v - w).t()).square().sum())

        assert error(found) < 0.7 * error(nearest)
        assert (found - w).norm() > (nearest - w).norm(), "it trades weight error for output error"

    def test_uses_a_grid_of_2_to_the_bits_values_a_group(self) -> None:
        w, x = weight(4, 100), inputs(100)
        found = gptq(w, x.t() @ x, 2, 32)
        for row in found:
            assert all(len(part.unique()) <= 4 for part in row.split(32))

    def test_without_correlation_it_rounds(self) -> None:
        w = weight(4, 64)
        groups = split_groups(w, 64)
        nearest = join_groups(rounded(groups, *least_squares_grid(groups, 3), 3), *w.shape)
        assert torch.allclose(gptq(w, torch.eye(64), 3, 64), nearest, atol=1e-5)

    def test_columns_never_used(self) -> None:
        w, x = weight(4, 64), inputs(64)
        x[:, 7] = 0
        found = gptq(w, x.t() @ x, 4, 32)
        assert found.isfinite().all()

    def test_order_keeps_groups_together(self) -> None:
        diagonal = torch.tensor([1.0, 2.0, 9.0, 8.0, 3.0])
        assert [part.tolist() for part in column_order(diagonal, 2)] == [[2, 3], [4], [1, 0]]


class TestHqq:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_is_better_than_what_it_starts_from(self, bits: int) -> None:
        w = weight(16, 128)
        w[:, ::17] *= 5
        x = split_groups(w, 64)
        least, span = x.amin(-1, True), x.amax(-1, True) - x.amin(-1, True)
        start = join_groups(rounded(x, span / (2**bits - 1), least, bits), *w.shape)
        found = hqq_own(w, bits, 64)
        assert (found - w).abs().mean() < 0.99 * (start - w).abs().mean()
        assert all(len(part.unique()) <= 2**bits for row in found for part in row.split(64))

    def test_constant_and_short_groups(self) -> None:
        w = weight(4, 100)
        w[0] = 0
        found = hqq_own(w, 4, 64)
        assert found.shape == w.shape
        assert (found[0].abs() < 1e-6).all()

    def test_agrees_with_the_package(self) -> None:
        pytest.importorskip("hqq.core.quantize", reason="the package hqq is not installed")
        for bits in (2, 3, 4):
            w = weight(16, 128)
            ours, theirs = hqq_own(w, bits, 64), hqq_library(w, bits, 64)
            assert float((ours - w).norm()) == pytest.approx(float((theirs - w).norm()), rel=0.01)

    def test_the_package_is_asked_for_groups_along_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = {}

        class Quantizer:
            @staticmethod
            def quantize(x: Tensor, **options: object) -> tuple[Tensor, dict[str, object]]:
                seen.update(options, shape=tuple(x.shape))
                return x, {}

            @staticmethod
            def dequantize(codes: Tensor, meta: dict[str, object]) -> Tensor:
                return codes + 1

        module = ModuleType("hqq.core.quantize")
        module.Quantizer = Quantizer
        for name in ("hqq", "hqq.core"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "hqq.core.quantize", module)
        w = weight(4, 100)
        assert torch.equal(hqq_library(w, 3, 64), w + 1)
        assert seen["shape"] == (8, 64)
        assert (seen["nbits"], seen["group_size"], seen["axis"], seen["device"]) == (3, 64, 1, "cpu")

    def test_a_package_that_cannot_be_imported_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
        assert library_version() is None


class TestStages:
    @pytest.mark.parametrize("make", [tiny_llama, tiny_lm, tiny_gpt2])
    def test_every_linear_has_its_true_inputs(self, make) -> None:
        """Changed weights of earlier blocks reach later ones: each linear sees what it sees in the whole model."""
        model, ids = make(), tokens(3, 12)
        linears, _ = select(model, SliceConfig())
        seen: dict[str, list[Tensor]] = {}
        handles = [
            m.register_forward_pre_hook(lambda mod, args, n=n: seen.setdefault(n, []).append(args[0].clone()))
            for n, m in linears.items()
        ]
        with torch.no_grad():
            walked: dict[str, list[Tensor]] = {}
            for names, run in stages(model, linears, ids):
                seen.clear()
                run()
                walked.update({name: list(seen[name]) for name in names})
                for name in names:
                    weight_of(linears[name]).mul_(1.1)
            assert set(walked) == set(linears)
            last = list(linears)[-1]
            block = last.rpartition(".")[0].split(".")[:3]
            members = [n for n in linears if n.split(".")[:3] == block]
            for name in members:  # the last stage was seen before its own weights changed
                weight_of(linears[name]).div_(1.1)
            seen.clear()
            for window in ids:
                output = model(window.unsqueeze(0))
                assert getattr(output, "logits", output).isfinite().all()
        for handle in handles:
            handle.remove()
        for name in members:
            for there, here in zip(seen[name], walked[name], strict=True):
                assert torch.allclose(there.reshape(-1), here.reshape(-1), rtol=1e-3, atol=1e-4), name

    @pytest.mark.parametrize("kind", [*CHAINS, "residual outside", "added in place", "twice", "no tensor", "pair"])
    def test_odd_blocks_see_their_true_inputs_too(self, kind: str) -> None:
        """What a block gives alone may not be what the model makes of it: then the whole model runs."""
        torch.manual_seed(0)
        model, ids = Odd(kind).eval(), tokens(2, 8)
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        seen: dict[str, list[Tensor]] = {}
        for name, module in linears.items():
            module.register_forward_pre_hook(
                lambda mod, args, kwargs, n=name: seen.setdefault(n, []).append(_first([*args, *kwargs.values()])),
                with_kwargs=True,
            )
        calls: list[int] = []
        model.embed.register_forward_pre_hook(lambda module, args: calls.append(1))
        order, whole_runs = [], []
        with torch.no_grad():
            for names, run in stages(model, linears, ids):
                seen.clear()
                calls.clear()
                run()
                whole_runs.append(len(calls))
                walked = {name: seen[name] for name in names}
                seen.clear()
                for window in ids:
                    model(window.unsqueeze(0))
                for name in names:
                    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(walked[name], seen[name], strict=True))
                    linears[name].weight.mul_(1.5)
                order += names
        assert order == ["blocks.0", "blocks.1", "blocks.2", "head"]
        assert whole_runs == ([0, 0, 0, 2] if kind in CHAINS else [2] * 4)

    def test_models_without_blocks_are_one_stage(self) -> None:
        model, ids = tiny_lm(1), tokens(2, 8)
        seen: list[int] = []
        model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        ((names, run),) = stages(model, {"lm_head": model.lm_head}, ids)
        run()
        assert (names, seen) == (["lm_head"], [8, 8])


def _first(values: list[Tensor | list[Tensor]]) -> Tensor:
    value = values[0]
    return (value[0] if isinstance(value, list) else value).clone()


class TestMeasure:
    @pytest.mark.parametrize("make", [tiny_lm, tiny_gpt2])
    def test_rows_and_the_weights_come_back(self, make) -> None:
        model, windows = make(), tokens(2, 16)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        stages_seen = set()
        rows = list(
            measure_static(
                model,
                windows,
                bits=(2, 4),
                calibration=tokens(3, 16, seed=5),
                progress=lambda stage, done, total: stages_seen.add(stage),
            )
        )
        assert [(row.method, row.bits) for row in rows] == [(m, b) for m in METHODS for b in (2, 4)]
        assert all(row.implementation == "mobiquant_compiler" or row.method == "hqq" for row in rows)
        assert all(row.perplexity > 1 and row.tokens == 30 for row in rows)
        assert {"gptq at 4 bits", "perplexity of rtn at 2 bits"} <= stages_seen
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_eight_bits_are_nearly_the_model_itself(self) -> None:
        model, ids = tiny_lm(), tokens(2, 16)
        with torch.no_grad():
            whole = model(ids)
            for method in METHODS:
                with static_weights(model, method, 8, calibration=ids):
                    assert (model(ids) - whole).norm() < 0.05 * whole.norm(), method

    def test_gptq_keeps_more_of_the_outputs_than_rounding(self) -> None:
        model, ids = tiny_lm(), tokens(8, 32)
        with torch.no_grad():
            whole = model(ids)
            errors = {}
            for method in ("rtn", "gptq"):
                with static_weights(model, method, 3, calibration=ids):
                    errors[method] = float((model(ids) - whole).norm())
        assert errors["gptq"] < 0.9 * errors["rtn"]

    def test_weights_come_back_after_an_error(self) -> None:
        model = tiny_lm()
        before = model.layers[0].q_proj.weight.clone()
        changed = []

        def fail() -> None:
            with static_weights(model, "rtn", 2):
                changed.append(not torch.equal(model.layers[0].q_proj.weight, before))
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert changed == [True]
        assert torch.equal(model.layers[0].q_proj.weight, before)

    def test_linears_are_those_that_quantize_would_take(self) -> None:
        model = tiny_lm()
        config = SliceConfig(exclude=("*.q_proj", "lm_head"), group=32)
        before = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        with static_weights(model, "rtn", 2, config=config):
            changed = {n for n, w in before.items() if not torch.equal(model.get_submodule(n).weight, w)}
        assert changed == set(select(model, config)[0])

    def test_an_installed_package_is_named_and_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compare, "library_version", lambda: "9.9")
        monkeypatch.setattr(compare, "hqq_library", lambda w, bits, group: torch.zeros_like(w))
        assert compare.implementation_of("hqq") == "hqq 9.9"
        assert compare.missing_library("hqq") is None
        model = tiny_mlp()
        with static_weights(model, "hqq", 2):
            assert not model[0].weight.any()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"methods": ["awq"]}, "'method' got 'awq'; wanted some of rtn, hqq, gptq"),
            ({"bits": [0]}, "'bits' got 0; wanted 1 to 8"),
            ({"methods": ["gptq"]}, "'calibration' got None"),
        ],
    )
    def test_bad_options(self, options: dict[str, object], words: str) -> None:
        with pytest.raises(BadOption, match=words):
            list(measure_static(tiny_lm(), tokens(1, 8), **options))

    def test_models_without_plain_linears(self) -> None:
        model = tiny_lm()
        quantize_(model)
        with pytest.raises(NothingToQuantize, match="its linears are slices already"):
            list(measure_static(model, tokens(1, 8), ["rtn"]))
        with pytest.raises(NothingToQuantize, match=r"no nn\.Linear"):
            list(measure_static(nn.Sequential(nn.Embedding(4, 4)), tokens(1, 8), ["rtn"]))
