"""`mobiquant generate`: text as it comes, at a budget that may move."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from mobiquant_compiler.cli.console import note, positive, show_json
from mobiquant_compiler.cli.loading import MODEL_HELP, compiled, load
from mobiquant_compiler.errors import BadOption, EmptyBatch


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(generate)


def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    prompt: Annotated[str, typer.Argument(help="What to continue; '-' reads standard input.")],
    budget: Annotated[float | None, typer.Option(help="Average weight bits; the checkpoint's own by default.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Budgets by new token, as in '0:8,64:3'.")] = None,
    max_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    compile_: Annotated[bool, typer.Option("--compile/--eager", help="Compile the one-token step.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record at the end, no stream.")] = False,
) -> None:
    """Stream text from a model; the budget may change between two tokens, without recompiling."""
    from mobiquant_compiler.generation import Schedule, stream

    plan = Schedule.parse(schedule) if schedule else None
    positive(max_tokens, "--max-tokens")
    if temperature < 0:
        raise BadOption(where="command line", name="--temperature", got=temperature, wanted="0 or more")
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt:
        raise EmptyBatch(where="generate: prompt", got=(1, 0))
    loaded = load(model, device, dtype)
    tokenizer = loaded.need_tokenizer(model)
    _set_budgets(loaded.model, budget, plan)
    tokens = stream(
        loaded.model,
        _encode(tokenizer, prompt, chat),
        step_model=compiled(loaded.model) if compile_ else None,
        max_new_tokens=max_tokens,
        stop=_stops(loaded.model, tokenizer),
        temperature=temperature,
        seed=seed,
        schedule=plan,
    )
    start = time.perf_counter()
    ids = _print_stream(tokens, tokenizer, quiet=as_json)
    seconds = time.perf_counter() - start
    bits = _achieved(loaded.model)
    if as_json:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        show_json({"model": model, "text": text, "tokens": len(ids), "seconds": seconds, "achieved_bits": bits})
        return
    shown = "" if bits is None else f", {bits:.2f} bits a weight on average"
    note(f"{len(ids)} tokens in {seconds:.1f} s ({len(ids) / seconds:.1f} tokens/s){shown}")


def _set_budgets(model: Any, budget: float | None, plan: Any) -> None:
    """Check every budget that will be needed, then set the first and start counting bits anew."""
    from mobiquant_compiler.budgets import reset_telemetry, set_budget
    from mobiquant_compiler.cli.console import check_budgets
    from mobiquant_compiler.linear import elastic_linears

    if plan:
        check_budgets(model, [bits for _, bits in plan.entries], "--schedule")
    if budget is not None:
        set_budget(model, budget)
    if elastic_linears(model):
        reset_telemetry(model)


def _achieved(model: Any) -> float | None:
    from mobiquant_compiler.budgets import achieved_bits
    from mobiquant_compiler.linear import elastic_linears

    return achieved_bits(model).total if elastic_linears(model) else None


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    import torch

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise BadOption(
                where="command line", name="--chat", got=True, wanted="a model whose tokenizer has a template"
            )
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    return torch.tensor([tokenizer(prompt, add_special_tokens=not chat)["input_ids"]])


def _stops(model: Any, tokenizer: Any) -> list[int]:
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _print_stream(tokens: Iterator[int], tokenizer: Any, quiet: bool) -> list[int]:
    """Print text as soon as it is whole: a character may be spread over several tokens."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if quiet or text.endswith("\ufffd"):
            continue
        sys.stdout.write(text[len(shown) :])
        sys.stdout.flush()
        shown = text
    if not quiet:
        sys.stdout.write(tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :] + "\n")
    return ids
