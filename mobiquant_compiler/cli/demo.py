"""`mobiquant demo`: the main job on a real model, from loading to moving the budget."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from mobiquant_compiler.cli.console import check_budgets, note, numbers, out, positive, progress, show, show_json
from mobiquant_compiler.cli.loading import PLAIN_HELP, Loaded, compiled, load

PROMPT = "The most important thing to know about the Python language is"
COLUMNS = {
    "budget": "budget",
    "achieved_bits": "achieved bits",
    "perplexity": "perplexity",
    "tokens_per_s": "tokens/s",
    "used_mb": "weight MB used",
    "sample": "sample",
}
CALIBRATION = (4, 256)  # windows and their length


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    model: Annotated[str, typer.Option(help=PLAIN_HELP)] = "smollm2",
    budgets: Annotated[str, typer.Option(help="Bits, one row each.")] = "8,6,5,4,3",
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens for perplexity.")] = 3,
    tokens: Annotated[int, typer.Option(help="New tokens of a sample.")] = 20,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Quantize a model into slices, compile it, and turn its budget down while it runs."""
    bits = numbers(budgets, "--budgets")
    positive(windows, "--windows")
    positive(tokens, "--tokens")
    import mobiquant_compiler as mq
    from mobiquant_compiler import evaluation

    start = time.perf_counter()
    with progress() as report:
        loaded = _load(model, device, report)
        loaded.need_plain(model)
        text, learn = _texts(loaded, model, windows)
        before = evaluation.perplexity(loaded.model, text, progress=lambda d, t: report("unquantized perplexity", d, t))
        speed, sample = _sample(loaded, loaded.model, tokens)
        coverage = mq.quantize_(loaded.model, calibration=learn, progress=report)
    facts = {
        "model": model,
        "text": "pydoc",
        "device": str(loaded.device),
        "unquantized": {"perplexity": before, "tokens_per_s": speed, "sample": sample},
        "coverage": coverage.to_dict(),
    }
    if not as_json:
        _introduce(model, before, speed, sample, coverage)
    check_budgets(loaded.model, bits)
    runner, graphs_before = compiled(loaded.model), _graphs()
    with progress() as report:
        rows = [_row(loaded, runner, text, b, tokens, report) for b in bits]
    facts |= {"rows": rows, "graphs_compiled": _graphs() - graphs_before, "seconds": time.perf_counter() - start}
    if as_json:
        show_json(facts)
        return
    show(rows, COLUMNS, as_json=False, title=f"{model}, compiled with backend='mobiquant', {loaded.device}")
    graphs, seconds = facts["graphs_compiled"], facts["seconds"]
    note(
        f"{graphs} graphs compiled once each for {len(rows)} budgets; {seconds:.0f} s in all. Perplexity is on "
        "documentation that ships with Python, calibrated on other paragraphs of it."
    )


def _load(model: str, device: str, report: Any) -> Loaded:
    """Load in float32 on a CPU, where bfloat16 is slow, and in bfloat16 on a GPU."""
    from mobiquant_compiler.cli.loading import pick_device

    return load(model, device, "bfloat16" if pick_device(device).type == "cuda" else "float32", report)


def _texts(loaded: Loaded, source: str, windows: int) -> tuple[Any, Any]:
    from mobiquant_compiler.evaluation import LENGTH, builtin_text, make_windows

    tokenizer = loaded.need_tokenizer(source)
    learn = make_windows(tokenizer, builtin_text(calibration=True), *CALIBRATION, where="pydoc-calibration")
    return make_windows(tokenizer, builtin_text(), windows, LENGTH, where="pydoc"), learn


def _introduce(model: str, before: float, speed: float, sample: str, coverage: Any) -> None:
    of = " (its weights are the dequantized 4-bit GGUF ones)" if model == "smollm2" else ""
    text = f"{model} unquantized{of}: perplexity {before:.2f}, {speed:.1f} tokens/s eager\n  {sample}\n{coverage}"
    out().print(text, markup=False, soft_wrap=True)
    note("compiling the elastic model; every budget below then runs the same code")


def _row(loaded: Loaded, runner: Any, text: Any, bits: float, tokens: int, report: Any) -> dict[str, Any]:
    """Measure one budget: bits and perplexity on text, then speed and a sample."""
    import mobiquant_compiler as mq
    from mobiquant_compiler.evaluation import evaluate, used_bytes

    row = next(iter(evaluate(runner, text, [bits], progress=report))).to_dict()
    used = used_bytes(loaded.model, mq.achieved_bits(loaded.model)) / 1e6
    with mq.budget(loaded.model, bits):
        speed, sample = _sample(loaded, runner, tokens)
    report(f"sample at {bits:g} bits", 1, 1)
    return {**row, "tokens_per_s": speed, "used_mb": used, "sample": sample}


def _sample(loaded: Loaded, runner: Any, tokens: int) -> tuple[float, str]:
    """Return tokens a second and the continuation of the demo's prompt, the likeliest token each time."""
    import torch

    from mobiquant_compiler.generation import stream, timed

    ids = torch.tensor([loaded.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
    found, speed = timed(stream(loaded.model, ids, step_model=runner, max_new_tokens=tokens))
    text = loaded.tokenizer.decode(found, skip_special_tokens=True)
    return speed.per_second, "... " + " ".join(text.split())


def _graphs() -> int:
    """Return how many graphs Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
