"""`mobiquant bench`: tokens a second of the elastic model beside the model as it was."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from mobiquant_compiler.cli.console import check_budgets, note, numbers, positive, progress, show
from mobiquant_compiler.cli.loading import MODEL_HELP, Loaded, compiled, load
from mobiquant_compiler.errors import BadOption

METHODS = ("eager", "bfloat16", "compile", "mobiquant-eager", "mobiquant")
COLUMNS = {
    "method": "method",
    "budget": "budget",
    "achieved_bits": "achieved bits",
    "decode_tokens_per_s": "decode tokens/s",
    "decode_spread": "+-",
    "prefill_tokens_per_s": "prefill tokens/s",
    "linear_mb": "linear weights, MB",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


@dataclass(frozen=True)
class Settings:
    """How long the measured texts are."""

    prompt: int
    tokens: int
    repeat: int


def bench(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "smollm2",
    methods: Annotated[str, typer.Option(help="Of " + ", ".join(METHODS) + ".")] = ",".join(METHODS),
    budgets: Annotated[str, typer.Option(help="Bits of the mobiquant rows.")] = "8,6,5,4,3",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, and of a prefill.")] = 128,
    tokens: Annotated[int, typer.Option(help="New tokens; the median step counts.")] = 32,
    repeat: Annotated[int, typer.Option(help="Prefills; the median counts.")] = 3,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's choice by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure decode and prefill speed. A checkpoint has no plain weights, so it gives the mobiquant rows only."""
    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    for name in chosen:
        if name not in METHODS:
            raise BadOption(where="command line", name="--methods", got=name, wanted=f"some of {', '.join(METHODS)}")
    bits = numbers(budgets, "--budgets")
    settings = Settings(positive(prompt, "--prompt"), positive(tokens, "--tokens"), positive(repeat, "--repeat"))
    import torch

    if threads is not None:
        torch.set_num_threads(positive(threads, "--threads"))
    rows = measure(model, chosen, bits, settings, device, dtype)
    facts = rows[0] if rows else {}
    title = f"{model}, {facts.get('device')}, {torch.get_num_threads()} threads: {settings.tokens} new tokens"
    show(rows, COLUMNS, as_json=as_json, title=title)


def measure(
    model: str, methods: Sequence[str], budgets: Sequence[float], settings: Settings, device: str, dtype: str | None
) -> list[dict[str, Any]]:
    """Load a model and return a row a plain method, then one a budget and elastic method."""
    import torch

    rows: list[dict[str, Any]] = []
    with progress() as report:
        loaded = load(model, device, dtype, report)
        rows += _plain_rows(loaded, methods, settings)
        rows += _elastic_rows(loaded, methods, budgets, settings, report)
    facts = {"model": model, "device": str(loaded.device), "threads": torch.get_num_threads()}
    return [facts | row for row in rows]


def _plain_rows(loaded: Loaded, chosen: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    import copy

    import torch

    from mobiquant_compiler.linear import elastic_linears

    wanted = [m for m in chosen if not m.startswith("mobiquant")]
    if elastic_linears(loaded.model):
        if wanted:
            note(f"a checkpoint has no plain weights: no rows for {', '.join(wanted)}")
        return []
    rows = []
    name = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    if "eager" in wanted:
        rows.append({"method": f"eager {name}", **_measure(loaded.model, loaded.model, settings)})
    if "compile" in wanted:
        torch._dynamo.reset()
        inductor = torch.compile(loaded.model, dynamic=True)
        rows.append({"method": f"torch.compile {name}", **_measure(loaded.model, inductor, settings)})
    if "bfloat16" in wanted and name != "bfloat16":
        half = copy.deepcopy(loaded.model).to(torch.bfloat16)
        rows.append({"method": "eager bfloat16", **_measure(half, half, settings)})
    return rows


def _elastic_rows(
    loaded: Loaded, chosen: Sequence[str], budgets: Sequence[float], settings: Settings, report: Any
) -> list[dict[str, Any]]:
    import torch

    import mobiquant_compiler as mq
    from mobiquant_compiler.linear import elastic_linears

    wanted = [m for m in chosen if m.startswith("mobiquant")]
    if not wanted:
        return []
    if not elastic_linears(loaded.model):
        mq.quantize_(loaded.model, calibration=_calibration(loaded), progress=report)
    check_budgets(loaded.model, budgets)
    torch._dynamo.reset()
    rows = []
    for method in wanted:
        runner = compiled(loaded.model) if method == "mobiquant" else loaded.model
        for done, bits in enumerate(budgets, 1):
            with mq.budget(loaded.model, bits):
                mq.reset_telemetry(loaded.model)
                speed = _measure(loaded.model, runner, settings)
                achieved = mq.achieved_bits(loaded.model)
            rows.append({"method": method, "budget": bits, "achieved_bits": achieved.total, **speed})
            rows[-1]["linear_mb"] = _used_mb(loaded.model, achieved)
            report(method, done, len(budgets))
    return rows


def _calibration(loaded: Loaded) -> Any:
    """Speed needs realistic mixtures of slice counts, no more: a few short windows."""
    from mobiquant_compiler.evaluation import builtin_text, make_windows

    if loaded.tokenizer is None:
        return None
    return make_windows(loaded.tokenizer, builtin_text(calibration=True), 4, 256)


def _used_mb(model: Any, achieved: Any) -> float:
    from mobiquant_compiler.evaluation import used_bytes

    return used_bytes(model, achieved) / 1e6


def _measure(model: Any, runner: Any, settings: Settings) -> dict[str, float]:
    """Time decoding and prefilling once everything is compiled."""
    import torch

    from mobiquant_compiler.evaluation import logits_of
    from mobiquant_compiler.generation import stream, timed
    from mobiquant_compiler.linear import elastic_linears
    from mobiquant_compiler.quantize import select, weight_of

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, settings.prompt), generator=generator).to(device)
    _, speed = timed(stream(model, ids, step_model=runner, max_new_tokens=settings.tokens + 3))
    times = []
    with torch.no_grad():
        for _ in range(settings.repeat + 1):
            start = time.perf_counter()
            float(logits_of(runner, ids)[0, -1, 0])  # waits for the device
            times.append(time.perf_counter() - start)
    result = {
        "decode_tokens_per_s": speed.per_second,
        "decode_spread": speed.per_second * speed.spread_s / speed.step_s,
        "prefill_tokens_per_s": settings.prompt / statistics.median(times[1:]),  # the first may compile
    }
    if not elastic_linears(model):
        from mobiquant_compiler.config import SliceConfig

        linears, _ = select(model, SliceConfig())
        result["linear_mb"] = sum(weight_of(m).nbytes for m in linears.values()) / 1e6
    return result
