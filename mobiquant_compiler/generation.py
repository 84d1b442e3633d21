"""Token-by-token generation whose budget may change between tokens, and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mobiquant_compiler.budgets import set_budget
from mobiquant_compiler.errors import BadSchedule, EmptyBatch

CACHE_STEP = 256  # cache lengths are multiples: prompts of different lengths then share one compiled step


@dataclass(frozen=True, slots=True)
class Schedule:
    """Budgets by step of generation, as in ``0:8,64:3``: 8 bits from the first new token on, 3 from the 65th.

    Attributes:
        entries: Steps, rising, with their bits.
    """

    entries: tuple[tuple[int, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read ``STEP:BITS,STEP:BITS``.

        Raises:
            BadSchedule: says which part is wrong.
        """
        entries: list[tuple[int, float]] = []
        for part in text.split(","):
            step, colon, bits = part.partition(":")
            try:
                entry = (int(step), float(bits))
            except ValueError:
                reason = f"{part.strip()!r} is not STEP:BITS" if colon else f"{part.strip()!r} has no colon"
                raise BadSchedule(got=text, reason=reason) from None
            if entry[0] < 0 or (entries and entry[0] <= entries[-1][0]):
                raise BadSchedule(got=text, reason=f"step {entry[0]} does not rise")
            entries.append(entry)
        return cls(tuple(entries))

    def at(self, step: int) -> float | None:
        """Return the budget that begins at `step`, None where nothing changes."""
        return dict(self.entries).get(step)


def stream(
    model: Any,
    prompt: Tensor,
    *,
    step_model: Callable[..., Any] | None = None,
    max_new_tokens: int = 64,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
    schedule: Schedule | None = None,
    cache_length: int | None = None,
) -> Iterator[int]:
    """Yield new tokens one at a time.

    The prompt runs through `model` as it is; each further token through `step_model`. Only the one-token step is
    worth compiling: its shapes never change.

    Args:
        model: Causal language model of transformers.
        prompt: Ids [1, S].
        step_model: The compiled model; `model` itself by default.
        max_new_tokens: At most this many.
        stop: Ids that end the text (not yielded).
        temperature: 0 takes the likeliest token.
        seed: For temperatures above 0.
        schedule: Budgets by step; the model must be elastic.
        cache_length: Tokens the cache holds; the next multiple of `CACHE_STEP` that suffices by default.

    Raises:
        EmptyBatch: an empty prompt.
    """
    from transformers import StaticCache

    if prompt.dim() != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0:
        raise EmptyBatch(where="prompt (one row of ids)", got=tuple(prompt.shape))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    needed = prompt.shape[1] + max_new_tokens
    length = max(cache_length or 0, -(-needed // CACHE_STEP) * CACHE_STEP)
    cache = StaticCache(config=model.config, max_cache_len=length)
    ids, run = prompt.to(device), model
    later = model if step_model is None else step_model  # no `or`: a compiled wrapper has no truth value
    for step in range(max_new_tokens):
        bits = schedule.at(step) if schedule else None
        if bits is not None:
            set_budget(model, bits)
        with torch.no_grad():
            output = run(ids, past_key_values=cache, use_cache=True)
        token = _choose(output.logits[0, -1], temperature, generator)
        if token in stop:
            return
        yield token
        ids, run = torch.tensor([[token]], device=device), later


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    shares = torch.softmax(logits.float().cpu() / temperature, -1)
    return int(torch.multinomial(shares, 1, generator=generator))


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast tokens came.

    Attributes:
        prompt_s: Seconds until the first token.
        step_s: Median seconds between tokens after that.
        spread_s: Half the distance between the quartiles of the same.
        tokens: New tokens.
    """

    prompt_s: float
    step_s: float
    spread_s: float
    tokens: int

    @property
    def per_second(self) -> float:
        """Tokens a second in the steady state."""
        return 1 / self.step_s if self.step_s else float("nan")


def timed(tokens: Iterator[int], skip: int = 2) -> tuple[list[int], Speed]:
    """Run a `stream` to its end and time its tokens; the first `skip` steps after the prompt may compile."""
    found: list[int] = []
    marks = [time.perf_counter()]
    for token in tokens:
        found.append(token)
        marks.append(time.perf_counter())
    gaps = sorted(b - a for a, b in zip(marks[1 + skip :], marks[2 + skip :], strict=False))
    if not gaps:
        gaps = [float("nan")]
    spread = (gaps[len(gaps) * 3 // 4] - gaps[len(gaps) // 4]) / 2
    first = marks[1] - marks[0] if len(marks) > 1 else float("nan")
    return found, Speed(first, gaps[len(gaps) // 2], spread, len(found))
