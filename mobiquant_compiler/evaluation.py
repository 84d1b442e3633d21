"""Texts, windows and perplexity: one protocol for every number in this project.

A text's first ``count * length`` tokens, without a beginning-of-text token, in windows that do not overlap; in each
window every token but the first is scored, the loss in float32.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mobiquant_compiler.budgets import achieved_bits, budget, reset_telemetry
from mobiquant_compiler.errors import BadOption, EmptyBatch, TextMissing, TextTooShort
from mobiquant_compiler.following import BudgetFollower, follow_budget
from mobiquant_compiler.linear import MobiLinear, elastic_linears, plain_name
from mobiquant_compiler.runtime.telemetry import AchievedBits

WINDOWS, LENGTH = 40, 512
CALIBRATION_WINDOWS = 64  # of `LENGTH`, spread over a text, for `calibrate_`
BUILTIN = ("pydoc", "pydoc-calibration")
Progress = Callable[[str, int, int], None]


# --- texts -------------------------------------------------------------------------------------------


def load_text(source: str | Path) -> str:
    """Read a text in the form that published perplexities use for it.

    Args:
        source: "pydoc" or "pydoc-calibration" (`builtin_text`), or a file: ``*.raw`` is WikiText's raw form,
            ``ptb*.txt`` Penn Treebank's lines, ``*.jsonl`` documents with a "text" field (C4), others plain text.

    Raises:
        TextMissing: no such file, or not readable as that form.
    """
    if str(source) in BUILTIN:
        return builtin_text(calibration=str(source) == BUILTIN[1])
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".raw":
            lines = text.split("\n")[:-1]
            return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
        if path.suffix == ".jsonl":
            return " ".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
        if path.name.startswith("ptb"):
            return " ".join(line.strip() for line in text.splitlines())
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise TextMissing(path=source, reason=err) from err
    return text


def builtin_text(calibration: bool = False) -> str:
    """Return English prose that ships with Python itself (`pydoc_data.topics`), its first half or its second.

    The halves share no paragraph: topics repeat parts of one another, and a paragraph seen in calibration must not
    be evaluated on.
    """
    from pydoc_data.topics import topics

    paragraphs = (p.strip("\n") for name in sorted(topics) for p in topics[name].split("\n\n"))
    ordered = [p for p in dict.fromkeys(paragraphs) if p.strip()]
    half = len(ordered) // 2
    return "\n\n".join(ordered[half:] if calibration else ordered[:half])


def make_windows(tokenizer: Any, text: str, count: int = WINDOWS, length: int = LENGTH, where: str = "text") -> Tensor:
    """Return the first tokens of a text as windows that do not overlap, int64 [count, length].

    Raises:
        TextTooShort: it has fewer tokens.
    """
    need = count * length
    ids: list[int] = []
    # A prefix is enough; a token is at most a few dozen characters, so twelve a token nearly always suffice.
    for characters in (need * 12, len(text)):
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > need or characters >= len(text):
            break
    if len(ids) < need or need == 0:
        raise TextTooShort(where=where, got=len(ids), wanted=max(need, 2))
    return torch.tensor(ids[:need], dtype=torch.int64).view(count, length)


def spread_windows(
    tokenizer: Any, text: str, count: int = CALIBRATION_WINDOWS, length: int = LENGTH, where: str = "text"
) -> Tensor:
    """Return windows spread evenly over a text, its first and last tokens included, for calibration.

    Windows do not overlap: a token that counted twice would say nothing new. A text of fewer than `count` windows
    therefore gives fewer, as many as it holds; compare ``len`` of the result with `count` where that matters.

    Args:
        tokenizer: Of the model; no beginning-of-text token is added.
        text: All of it is tokenized.
        count: Most windows to return.
        length: Tokens a window.
        where: Name of the text for messages.

    Returns:
        int64 [at most count, length].

    Raises:
        TextTooShort: it has fewer tokens than one window.
        BadOption: less than one window or token is asked for.
    """
    for name, value in (("count", count), ("length", length)):
        if value < 1:
            raise BadOption(where="spread_windows", name=name, got=value, wanted="at least 1")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < length:
        raise TextTooShort(where=where, got=len(ids), wanted=length)
    count = min(count, len(ids) // length)
    last = len(ids) - length
    starts = [last * i // max(1, count - 1) for i in range(count)]
    return torch.stack([torch.tensor(ids[start : start + length], dtype=torch.int64) for start in starts])


# --- perplexity --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One measurement.

    Attributes:
        budget: Wanted average weight bits; None for a model without slices.
        achieved_bits: What it really was, on the evaluated tokens.
        perplexity: Of the next token.
        tokens: How many were scored.
        seconds: Wall clock, compilation included where this row caused it.
        followed: Whether thresholds followed what tokens used (`follow_budget`).
    """

    budget: float | None
    achieved_bits: float | None
    perplexity: float
    tokens: int
    seconds: float
    followed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Run a causal language model without a cache; returns logits [B, S, V]."""
    config = getattr(model, "config", None)
    output = model(ids, use_cache=False) if hasattr(config, "use_cache") else model(ids)
    return getattr(output, "logits", output)


def perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
    follower: BudgetFollower | None = None,
) -> float:
    """Return ``exp`` of the mean negative log-likelihood of every token of every window but its first.

    Args:
        model: Causal language model, compiled or not, in eval mode.
        windows: Ids [count, length].
        batch: Windows a call; the last call may have fewer.
        progress: Called with windows done and total.
        follower: Of `model`; updated after each call.

    Raises:
        EmptyBatch: nothing to score.
    """
    if windows.dim() != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise EmptyBatch(where="perplexity", got=tuple(windows.shape))
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch].to(device)
            logits = logits_of(model, ids)
            for row, targets in zip(logits, ids, strict=True):  # one window at a time: float32 logits are large
                total += float(cross_entropy(row[:-1].float(), targets[1:], reduction="sum"))
            if follower:
                follower.update()
            if progress:
                progress(min(start + batch, len(windows)), len(windows))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def evaluate(
    model: nn.Module,
    windows: Tensor,
    budgets: Sequence[float] = (),
    *,
    batch: int = 1,
    progress: Progress | None = None,
    follow: bool = False,
) -> Iterable[EvalRow]:
    """Yield a row a budget, or one row without budgets for a model as it is.

    Args:
        model: Elastic model (or any, without budgets).
        windows: Ids [count, length].
        budgets: Average weight bits.
        batch: Windows a call.
        progress: Called with stage, done, total.
        follow: Let thresholds follow what tokens use (`follow_budget`); the rows say where they could.

    Raises:
        BudgetError: before anything is measured at that budget.
    """
    report = progress or (lambda stage, done, total: None)
    scored = windows.shape[0] * (windows.shape[1] - 1)
    if not budgets:
        start = time.perf_counter()
        value = perplexity(model, windows, batch=batch, progress=lambda d, t: report("perplexity", d, t))
        yield EvalRow(None, None, value, scored, time.perf_counter() - start)
    for bits in budgets:
        stage = f"perplexity at {bits:g} bits"
        with follow_budget(model, bits) if follow else budget(model, bits) as follower:
            reset_telemetry(model)
            start = time.perf_counter()
            said = partial(report, stage)
            value = perplexity(model, windows, batch=batch, progress=said, follower=follower)
            seconds = time.perf_counter() - start
            followed = follower is not None and follower.follows
            yield EvalRow(bits, achieved_bits(model).total, value, scored, seconds, followed)


def used_bytes(model: nn.Module, achieved: AchievedBits) -> float:
    """Return the bytes of slices, scales and zero points that a token reads on average, over all elastic linears."""
    total = 0.0
    for name, linear in elastic_linears(model).items():
        total += _linear_bytes(linear, achieved.layers[plain_name(name)])
    return total


def _linear_bytes(linear: MobiLinear, bits: float) -> float:
    padded = linear.slices.shape[2] * 32
    scales = sum(t.numel() * t.element_size() for t in (linear.scale, linear.zero))
    return linear.out_features * padded * bits / 8 + scales
