"""`warmup`: everything a model will launch is compiled before it is needed; nothing compiles later, or in a graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobiquant_compiler import warming
from mobiquant_compiler.errors import BadOption
from mobiquant_compiler.kernels import gluon_refusal, target_of
from mobiquant_compiler.launches import Launch, binaries_of, launches_of
from mobiquant_compiler.runtime import launch as runtime
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What `warmup` did.

    Attributes:
        launches: Distinct kinds of launches that the model has; 0 where it runs no kernels.
        kernels: Kernels that were not loaded before.
        binaries: Binaries that were not loaded before, compiled or read from Triton's cache: a kernel has one for each
            device and combination of dtypes.
        seconds: How long it took.
        workers: Processes that compiled beside one another; 0 where there were none, or nothing to compile.
        files: Source of the new kernels, as emitted.
        reason: Why there was nothing to do, "" where there was.
    """

    launches: int = 0
    kernels: int = 0
    binaries: int = 0
    seconds: float = 0.0
    workers: int = 0
    files: tuple[Path, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"nothing to warm up: {self.reason}"
        what = f"{self.launches} kinds of launches, {self.kernels} new kernels, {self.binaries} new binaries"
        by = f" by {self.workers} processes" if self.workers else ""
        return f"{what} in {self.seconds:.1f} s{by}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self) | {"files": [str(file) for file in self.files]}


def warmup(
    model: nn.Module,
    *,
    max_tokens: int | None = None,
    activation: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> WarmupReport:
    """Compile and load every kernel that a model's linears can need, each alone and siblings together.

    Call it before CUDA graphs are captured and before the first request. Budgets, `prefill`, the number of tokens up to
    `max_tokens` and the modes of torch.compile need no other kernels; another dtype, device or `activation` does.

    Args:
        model: Quantized model, or a plain one that ran once compiled with backend="mobiquant"; compiled or not.
        max_tokens: Leave out what only calls of more tokens need; all by default.
        activation: As given to torch.compile in `options`; the linears' own by default (see `set_execution`).
        workers: Processes that compile beside one another, each with about a gigabyte of memory; one a core but one by
            default, at most 32. With 1 or 0 this process compiles. Ranks that share a host should share it out.
        progress: Called with stage ("compile", then "kernels"), done, total.

    Returns:
        What was done. On a CPU, which runs no kernels, it says so.

    Raises:
        NotAModule: `model` is none.
        NotElastic: the model has no elastic linear.
        BadOption: `max_tokens`, `activation` or `workers`.
        TritonMissing: the model is on a GPU, and triton cannot be imported.
    """
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        wanted = "a whole number of at least 1, or None"
        raise BadOption(where="warmup", name="max_tokens", got=max_tokens, wanted=wanted)
    if workers is not None and (type(workers) is not int or workers < 0):
        raise BadOption(where="warmup", name="workers", got=workers, wanted="a whole number of at least 0, or None")
    width = None if activation is None else Activation.of(activation, "warmup")
    launches = launches_of(model, "warmup", activation=width)
    todo = [launch for launch in launches if _why_not(launch) is None]
    if not todo:
        return WarmupReport(reason="; ".join(sorted({str(_why_not(launch)) for launch in launches})))
    return _run(todo, max_tokens, workers, progress or (lambda stage, done, total: None))


def _why_not(launch: Launch) -> str | None:
    """Return why a launch runs no kernels, None where it does."""
    if launch.device.type != "cuda":
        return f"the model is on {launch.device}, which runs no kernels"
    return runtime.refusal(launch.x_dtype, launch.device)


def _compile(launches: Sequence[Launch], max_tokens: int | None, workers: int | None, progress: Progress) -> int:
    """Compile what launches will ask for, side by side; returns by how many processes."""
    from mobiquant_compiler.codegen import compiling
    from mobiquant_compiler.codegen.configs import Target, TokenClass

    classes = [kind for kind in TokenClass if max_tokens is None or kind.sample <= max_tokens]
    long = max_tokens is None or max_tokens > PREFILL_TOKENS
    by_target: dict[Target, list[Launch]] = {}  # binaries are of a kind of GPU, not of one
    for launch in launches:
        by_target.setdefault(target_of(launch.device), []).append(launch)
    jobs: list[compiling.Job] = [
        (spec, target.cc, dtypes)
        for target, own in by_target.items()
        for spec, dtypes in binaries_of(own, target, classes, workspace=long, gluon=gluon_refusal() is None)
    ]
    return compiling.compile_all(jobs, workers, lambda done: progress("compile", done, len(jobs)))


def _run(launches: Sequence[Launch], max_tokens: int | None, workers: int | None, progress: Progress) -> WarmupReport:
    from mobiquant_compiler.codegen import cache

    start, before, binaries = time.perf_counter(), len(cache.loaded_kernels()), cache.compiled_kernels()
    processes = _compile(launches, max_tokens, workers, progress)
    with torch.inference_mode(False), torch.no_grad():
        for done, launch in enumerate(launches, 1):
            warming.warm_kernels(
                launch.spec,
                launch.n,
                launch.k,
                launch.x_dtype,
                launch.device,
                scale_dtype=launch.scale_dtype,
                bias_dtype=launch.bias_dtype,
                parts=launch.parts,
                max_tokens=max_tokens,
                activation=launch.activation,
                hidden=launch.hidden,
                units=launch.row_units,
                splits=launch.splits,
            )
            progress("kernels", done, len(launches))
    new = cache.loaded_kernels()[before:]
    return WarmupReport(
        launches=len(launches),
        kernels=len(new),
        binaries=cache.compiled_kernels() - binaries,
        seconds=time.perf_counter() - start,
        workers=processes,
        files=tuple(kernel.path for kernel in new),
    )
