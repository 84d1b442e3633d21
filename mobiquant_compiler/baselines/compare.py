"""Static methods on a model: weights quantized in place, perplexity measured, weights put back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobiquant_compiler.baselines.gptq import gptq
from mobiquant_compiler.baselines.hqq import INSTALL, hqq_library, hqq_own, library_version
from mobiquant_compiler.baselines.rtn import round_to_nearest
from mobiquant_compiler.baselines.stages import stages
from mobiquant_compiler.config import SliceConfig
from mobiquant_compiler.errors import BadOption, NothingToQuantize
from mobiquant_compiler.evaluation import perplexity
from mobiquant_compiler.hessians import gathered
from mobiquant_compiler.linear import elastic_linears
from mobiquant_compiler.quantize import select, weight_of

METHODS = ("rtn", "hqq", "gptq")
OURS = "mobiquant_compiler"
BITS = (1, 8)  # least and greatest width
Progress = Callable[[str, int, int], None]
Put = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class StaticRow:
    """One static method at one width.

    Attributes:
        method: Of `METHODS`.
        bits: Width of every weight; scales and zero points, one a group, come on top as they do for slices.
        implementation: Who computed it: a package with its version, or "mobiquant_compiler".
        perplexity: Of the next token.
        tokens: How many were scored.
        quantize_seconds: Wall clock of the method.
        seconds: Wall clock of the evaluation.
    """

    method: str
    bits: int
    implementation: str
    perplexity: float
    tokens: int
    quantize_seconds: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


def check_methods(methods: Sequence[str], bits: Sequence[int], where: str = "static methods") -> None:
    """Refuse what no method can do, before anything is loaded.

    Raises:
        BadOption: unknown method, or a width out of range.
    """
    for method in methods:
        if method not in METHODS:
            raise BadOption(where=where, name="method", got=method, wanted=f"some of {', '.join(METHODS)}")
    for width in bits:
        if not BITS[0] <= width <= BITS[1]:
            raise BadOption(where=where, name="bits", got=width, wanted=f"{BITS[0]} to {BITS[1]}")


def implementation_of(method: str) -> str:
    """Return who computes a method here: its own library where that is installed and runs anywhere, else we do."""
    library = library_version() if method == "hqq" else None
    return f"hqq {library}" if library else OURS


def missing_library(method: str) -> str | None:
    """Say how to install a method's own library where it has one that is not installed; None otherwise."""
    return INSTALL if method == "hqq" and library_version() is None else None


def measure_static(
    model: nn.Module,
    windows: Tensor,
    methods: Sequence[str] = METHODS,
    bits: Sequence[int] = (2, 3, 4),
    *,
    config: SliceConfig | None = None,
    calibration: Tensor | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Iterator[StaticRow]:
    """Yield the perplexity of each method at each width; the model has its own weights again between and after.

    Args:
        model: Plain model; as much memory again as its linears take holds their weights meanwhile.
        windows: Evaluation ids [count, length].
        methods: Some of `METHODS`.
        bits: Widths.
        config: Which linears, and their groups: as `quantize_` would take them.
        calibration: Ids [count, length] for gptq.
        batch: Windows a call of the evaluation.
        progress: Called with stage, done, total.

    Raises:
        BadOption: unknown method, width out of range, or gptq without calibration tokens.
        NothingToQuantize: no plain linear in the model.
    """
    check_methods(methods, bits)
    if "gptq" in methods and calibration is None:
        raise BadOption(where="static methods", name="calibration", got=None, wanted="token ids for gptq")
    report = progress or (lambda stage, done, total: None)
    config = config or SliceConfig()
    scored = windows.shape[0] * (windows.shape[1] - 1)
    for method in methods:
        for width in bits:
            start = time.perf_counter()
            with static_weights(model, method, width, config=config, calibration=calibration, progress=report):
                ready = time.perf_counter()
                stage = f"perplexity of {method} at {width} bits"
                value = perplexity(model, windows, batch=batch, progress=lambda d, t, s=stage: report(s, d, t))
            spent = ready - start, time.perf_counter() - ready
            yield StaticRow(method, width, implementation_of(method), value, scored, *spent)


@contextmanager
def static_weights(
    model: nn.Module,
    method: str,
    bits: int,
    *,
    config: SliceConfig | None = None,
    calibration: Tensor | None = None,
    progress: Progress | None = None,
) -> Iterator[None]:
    """Give a model the weights of a static method within the block.

    Arguments and errors as of `measure_static`.
    """
    config, report = config or SliceConfig(), progress or (lambda stage, done, total: None)
    linears, _ = select(model, config)
    if elastic_linears(model) or not linears:
        what = "its linears are slices already" if elastic_linears(model) else "no nn.Linear or Conv1D in it"
        raise NothingToQuantize(model=type(model).__name__, skipped=what)
    originals = {name: weight_of(module).detach().clone() for name, module in linears.items()}

    def put(name: str, weight: Tensor) -> None:
        target = weight_of(linears[name]).detach()
        target.copy_(weight)

    try:
        with torch.no_grad():
            _quantize(model, linears, method, bits, config, calibration, put, report)
        yield
    finally:
        for name, weight in originals.items():
            put(name, weight)


def _quantize(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    method: str,
    bits: int,
    config: SliceConfig,
    calibration: Tensor | None,
    put: Put,
    report: Progress,
) -> None:
    stage = f"{method} at {bits} bits"
    groups = {name: config.spec_for(weight_of(module).shape[1]).group for name, module in linears.items()}
    if method == "gptq":
        assert calibration is not None, "checked by measure_static"
        _gptq(model, linears, bits, groups, calibration, put, lambda done: report(stage, done, len(linears)))
        return
    quantizer = {"rtn": round_to_nearest, "hqq": hqq_library if library_version() else hqq_own}[method]
    for done, (name, module) in enumerate(linears.items(), 1):
        put(name, quantizer(weight_of(module).detach(), bits, groups[name]))
        report(stage, done, len(linears))


def _gptq(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    bits: int,
    groups: Mapping[str, int],
    calibration: Tensor,
    put: Put,
    report: Callable[[int], None],
) -> None:
    windows = calibration.to(next(model.parameters()).device)
    done = 0
    for names, run in stages(model, linears, windows):
        with gathered({name: linears[name] for name in names}) as hessians:
            run()
        for name in names:
            weight = weight_of(linears[name]).detach()
            if name in hessians:
                put(name, gptq(weight, hessians.pop(name), bits, groups[name], where=name))
            else:  # a branch that no calibration token took: nothing is known but the weight
                put(name, round_to_nearest(weight, bits, groups[name]))
            done += 1
            report(done)
