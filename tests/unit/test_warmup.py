"""`warmup`: which launches a model can need, which kernels they run, and what is said where there are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import mobiquant_compiler as mq
from mobiquant_compiler import warming
from mobiquant_compiler.codegen import cache, compiling
from mobiquant_compiler.codegen.configs import Target, TokenClass
from mobiquant_compiler.errors import BadOption, NotAModule, NotElastic
from mobiquant_compiler.launches import Launch, kernels_of, launches_of
from mobiquant_compiler.linear import MobiLinear, Router
from mobiquant_compiler.runtime import launch as runtime
from mobiquant_compiler.spec import Activation, Family, SliceSpec
from tests.models_tiny import tiny_bert, tiny_lm, tiny_mlp, tokens

SPEC = SliceSpec((2, 2, 2, 2), 64)
GPU = torch.device("cuda", 0)
H100 = Target.of(90)


def quantized(**options: Any) -> nn.Module:
    """Return a transformer whose q, k, v and gate, up share routers."""
    model = tiny_lm()
    mq.quantize_(model, calibration=tokens(2, 16), **options)
    return model


def facts(launches: tuple[Launch, ...]) -> set[tuple[int, int, int, bool]]:
    """Return (n, k, parts, bias) of each."""
    assert len(set(launches)) == len(launches)
    return {(launch.n, launch.k, launch.parts, launch.bias_dtype is not None) for launch in launches}


class TestLaunches:
    def test_each_linear_alone_and_siblings_together(self) -> None:
        found = launches_of(quantized(), "test")
        assert facts(found) == {
            (64, 64, 1, False),  # q, k, v, o
            (96, 64, 1, False),  # gate, up
            (64, 96, 1, True),  # down
            (192, 64, 3, False),
            (192, 64, 2, False),
        }
        assert {launch.x_dtype for launch in found} == {torch.float32}
        assert {launch.scale_dtype for launch in found} == {torch.float16}

    @pytest.mark.parametrize(("rows", "unit"), [((16, 24), 8), ((12, 16), 1), ((16, 12), 1)], ids=str)
    def test_siblings_have_the_row_unit_of_all(self, rows: tuple[int, ...], unit: int) -> None:
        router = Router(torch.ones(64), SPEC.widths)
        model = nn.ModuleList(
            MobiLinear.from_weight(torch.randn(n, 64), None, SPEC, router=router, where="w") for n in rows
        )
        (together,) = (launch for launch in launches_of(model, "test") if launch.parts == 2)
        assert together.row_units == (unit,)
        assert replace(together, row_unit=None).row_units == (1, 8), "where nobody knows"

    def test_dtypes_are_those_of_the_model_now(self) -> None:
        found = launches_of(quantized().to(torch.bfloat16), "test")
        assert {launch.x_dtype for launch in found} == {torch.bfloat16}
        assert {launch.bias_dtype for launch in found} == {None, torch.float32}, (
            "a linear keeps its bias as it was made"
        )
        assert {launch.scale_dtype for launch in found} == {torch.float16}

    def test_activation_is_the_linears_own_unless_told(self) -> None:
        model = quantized()
        mq.set_execution(model, activation="a8")
        assert {launch.activation for launch in launches_of(model, "test")} == {Activation.A8}
        told = launches_of(model, "test", activation=Activation.A16)
        assert {launch.activation for launch in told} == {Activation.A16}

    def test_the_width_of_a_trained_router_is_known(self) -> None:
        model = siblings(3)
        network = (torch.zeros(5, 66), torch.zeros(5), torch.zeros(3, 5), torch.zeros(3))
        model[0].router.learn(network)
        found = launches_of(model, "test")
        assert facts(found) == {(8, 64, 1, False), (24, 64, 3, False)}
        assert {launch.hidden for launch in found} == {5}
        assert {launch.hidden for launch in launches_of(siblings(3), "test")} == {0}

    def test_more_siblings_than_a_launch_takes(self) -> None:
        model = siblings(7)
        assert facts(launches_of(model, "test")) == {(8, 64, 1, False), (32, 64, 4, False), (24, 64, 3, False)}

    def test_siblings_that_differ_are_launched_alone(self) -> None:
        model = siblings(2)
        model[0].bias = nn.Parameter(torch.zeros(8), requires_grad=False)
        assert facts(launches_of(model, "test")) == {(8, 64, 1, False), (8, 64, 1, True)}
        model = siblings(3)
        mq.set_execution(model[0], prefill="full")
        assert facts(launches_of(model, "test")) == {(8, 64, 1, False), (16, 64, 2, False)}

    def test_a_compiled_model_is_the_same_model(self) -> None:
        model = quantized()
        assert launches_of(torch.compile(model, backend="mobiquant"), "test") == launches_of(model, "test")

    def test_only_the_linears_named(self) -> None:
        found = launches_of(quantized(), "test", names=["layers.0.down_proj", "layers.1.down_proj"])
        assert facts(found) == {(64, 96, 1, True)}

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_plain_weights_have_their_bias_and_scales_in_float32(self) -> None:
        model = tiny_mlp()
        with torch.no_grad():
            torch.compile(model, backend="mobiquant")(torch.randn(2, 64))
        found = launches_of(model, "test")
        assert facts(found) == {(48, 64, 1, True), (33, 48, 1, False)}
        assert {launch.scale_dtype for launch in found} == {torch.float32}

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_a_model_that_is_quantized_in_part(self) -> None:
        model = tiny_mlp()
        mq.quantize_(model, mq.SliceConfig(include=("0",)))
        assert facts(launches_of(model, "test")) == {(48, 64, 1, True)}
        with torch.no_grad():
            torch.compile(model, backend="mobiquant")(torch.randn(2, 64))
        assert facts(launches_of(model, "test")) == {(48, 64, 1, True), (33, 48, 1, False)}

    def test_every_linear_of_a_model_with_biases(self) -> None:
        model = tiny_bert()
        mq.quantize_(model)
        assert all(bias for *_, bias in facts(launches_of(model, "test")))

    def test_a_model_without_any(self) -> None:
        with pytest.raises(NotElastic, match="warmup: Sequential has no elastic linear"):
            mq.warmup(tiny_mlp())

    @pytest.mark.parametrize("model", [None, {}, nn.Linear], ids=str)
    def test_what_is_no_module(self, model: Any) -> None:
        with pytest.raises(NotAModule, match=f"warmup: the model is of type {type(model).__name__}; wanted a torch"):
            mq.warmup(model)


def siblings(count: int) -> nn.ModuleList:
    """Return linears of 8 x 64 that share one router."""
    router = Router(torch.ones(64), SPEC.widths)
    return nn.ModuleList(
        MobiLinear.from_weight(torch.randn(8, 64), None, SPEC, router=router, where="w") for _ in range(count)
    )


class TestKernels:
    LAUNCH = Launch(SPEC, 192, 200, GPU, torch.bfloat16, parts=3, bias_dtype=torch.bfloat16)

    def test_every_family_in_every_form(self) -> None:
        found = kernels_of(self.LAUNCH, H100, TokenClass, workspace=True)
        assert len(found) == len(set(found))
        first = {(s.route, s.quantize) for s in found if s.family is Family.ROUTE_QUANTIZE}
        assert first == {(True, False), (True, True), (False, True)}
        assert {s.sorted_rows for s in found if s.family is Family.DEQUANTIZE} == {True, False}
        products = [s for s in found if s.family is Family.SLICED_MMA]
        assert len(products) == len(TokenClass)
        assert all(s.parts == 3 and s.has_bias and s.k == 256 for s in products)

    def test_short_calls_need_no_workspace(self) -> None:
        found = kernels_of(self.LAUNCH, H100, [TokenClass.ONE], workspace=False)
        assert [s.family for s in found].count(Family.SLICED_MMA) == 1
        assert Family.DEQUANTIZE not in {s.family for s in found}

    def test_trained_routers_have_kernels_for_short_calls_and_for_long_ones(self) -> None:
        trained = replace(self.LAUNCH, hidden=12)
        short = kernels_of(trained, H100, [TokenClass.ONE], workspace=False)
        routing = [s for s in short if s.route]
        assert {(s.hidden, s.block_m, s.quantize) for s in routing} == {(12, 1, False), (12, 1, True)}
        assert set(short) - set(routing) <= set(kernels_of(self.LAUNCH, H100, TokenClass, workspace=True))
        long = [s for s in kernels_of(trained, H100, TokenClass, workspace=True) if s.route]
        assert {(s.hidden, s.block_m, s.quantize) for s in long} == {
            (12, m, quantize) for m in (1, 4) for quantize in (False, True)
        }

    def test_width_of_activations(self) -> None:
        found = kernels_of(replace(self.LAUNCH, activation=Activation.A8), H100, TokenClass, workspace=False)
        assert {s.activation for s in found if s.quantize or s.family is Family.SLICED_MMA} == {Activation.A8}


class TestWarmup:
    @pytest.fixture
    def warmed(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Let models be on a GPU, and record what is warmed up there in place of doing it."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        alone = mq.warmup.__globals__["launches_of"]

        def moved(*args: Any, **kwargs: Any) -> tuple[Launch, ...]:
            return tuple(replace(launch, device=GPU) for launch in alone(*args, **kwargs))

        def warm(*args: Any, **kwargs: Any) -> int:
            seen.append((args, kwargs))
            name = f"kernel{len(seen)}"
            cache._LOADED[name] = SimpleNamespace(path=Path(name), function=jitted(len(seen)))  # type: ignore[index,assignment]
            return 1

        monkeypatch.setitem(mq.warmup.__globals__, "launches_of", moved)
        monkeypatch.setattr(warming, "warm_kernels", warm)
        monkeypatch.setattr(compiling, "compile_all", compiled)
        monkeypatch.setattr(cache, "_LOADED", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        runtime.refusal.cache_clear()
        yield seen
        runtime.refusal.cache_clear()

    def test_compiles_what_the_launches_run(self, warmed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[list[compiling.Job], int]] = []
        monkeypatch.setattr(compiling, "compile_all", lambda jobs, asked, progress: seen.append((jobs, asked)) or 3)
        report = mq.warmup(quantized().to(torch.bfloat16), workers=3)
        ((jobs, workers),) = seen
        assert (report.workers, workers, len(warmed)) == (3, 3, 5)
        launches = [replace(launch, device=GPU) for launch in launches_of(quantized().to(torch.bfloat16), "test")]
        wanted = {spec for launch in launches for spec in kernels_of(launch, H100, TokenClass, workspace=True)}
        assert {spec for spec, *_ in jobs} == wanted
        assert len(jobs) == len(set(jobs))
        assert {(cc, dtypes.x, dtypes.scale) for _, cc, dtypes in jobs} == {(90, "bf16", "fp16")}
        assert " by 3 processes" in str(report)
        biased = {spec.has_bias: dtypes.bias for spec, _, dtypes in jobs}
        assert biased == {True: "fp32", False: None}, "a linear keeps its bias as it was made"
        mq.warmup(quantized(), max_tokens=1, workers=3)
        assert not any(spec.family is Family.DEQUANTIZE for spec, *_ in seen[1][0]), "short calls need no workspace"

    @pytest.mark.usefixtures("warmed")
    def test_gpus_of_a_kind_share_binaries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[compiling.Job] = []
        monkeypatch.setattr(compiling, "compile_all", lambda jobs, asked, progress: seen.extend(jobs) or 0)
        one = Launch(SPEC, 64, 64, GPU, torch.bfloat16)
        both = [one, replace(one, device=torch.device("cuda", 1))]
        mq.warmup.__globals__["_compile"](both, 8, None, lambda stage, done, total: None)
        assert len(seen) == len(set(seen)) > 0

    def test_nothing_is_to_do_on_a_cpu(self) -> None:
        told: list[tuple[str, int, int]] = []
        report = mq.warmup(quantized(), progress=lambda *news: told.append(news))
        assert str(report) == "nothing to warm up: the model is on cpu, which runs no kernels"
        assert (report.launches, report.kernels, report.binaries, report.files, told) == (0, 0, 0, (), [])

    def test_every_launch_once(self, warmed: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        told: list[tuple[str, int, int]] = []
        report = mq.warmup(quantized(), max_tokens=16, workers=2, progress=lambda *news: told.append(news))
        assert len(warmed) == report.launches == report.kernels == 5
        assert report.binaries == sum(range(6))
        assert report.files == tuple(Path(f"kernel{number}") for number in range(1, 6))
        assert told[-5:] == [("kernels", done, 5) for done in range(1, 6)]
        assert {stage for stage, *_ in told[:-5]} == {"compile"}
        args, kwargs = warmed[-1]
        assert args == (SPEC, 192, 64, torch.float32, GPU)
        wanted = {"scale_dtype": torch.float16, "bias_dtype": None, "parts": 2, "max_tokens": 16}
        assert kwargs == wanted | {"activation": Activation.A16, "hidden": 0, "units": (8,), "splits": (False,)}
        assert str(report).startswith("5 kinds of launches, 5 new kernels, 15 new binaries in ")
        assert report.to_dict()["files"][0] == "kernel1"

    def test_activation_as_the_options_of_compile_say(self, warmed: list[Any]) -> None:
        mq.warmup(quantized(), activation="a8")
        assert {kwargs["activation"] for _, kwargs in warmed} == {Activation.A8}

    def test_dtypes_that_kernels_do_not_take(self, warmed: list[Any]) -> None:
        report = mq.warmup(quantized().double())
        assert (report.reason, warmed) == ("activations are torch.float64", [])

    @pytest.mark.parametrize(
        "options", [{"max_tokens": 0}, {"max_tokens": 1.5}, {"activation": "a4"}, {"workers": -1}], ids=str
    )
    def test_bad_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(BadOption, match=f"warmup: option '{next(iter(options))}'"):
            mq.warmup(quantized(), **options)


def compiled(jobs: list[compiling.Job], asked: int | None, progress: Callable[[int], None]) -> int:
    """Only say that jobs are done."""
    for done in range(1, len(jobs) + 1):
        progress(done)
    return 0


def jitted(binaries: int) -> SimpleNamespace:
    """Return what counts as a jitted function with so many binaries on one device, and none on another."""
    return SimpleNamespace(device_caches={0: (dict.fromkeys(range(binaries)), {}), 1: ({}, {})})


def test_binaries_are_counted_over_kernels_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [SimpleNamespace(function=function) for function in (jitted(2), jitted(3), object())]
    monkeypatch.setattr(cache, "_LOADED", dict(enumerate(kernels)))
    assert cache.compiled_kernels() == 5, "the interpreter's functions have none"
    assert cache.loaded_kernels() == tuple(kernels)
