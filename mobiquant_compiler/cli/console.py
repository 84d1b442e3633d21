"""What all commands share: output, progress bars, number parsing, and which errors are a user's."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mobiquant_compiler.errors import BadOption, BudgetOutOfRange, MobiQuantError

SAID_EVERY = 60.0  # seconds between two lines of one stage where no terminal is
PIPE_WIDTH = 160  # columns of a table that no terminal limits
DEFAULT_BUDGETS = (8.0, 6.0, 5.0, 4.0, 3.0)
Report = Callable[[str, int, int], None]


def out() -> Console:
    """Return the console of results (stdout); made anew, so that redirection is seen."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def err() -> Console:
    """Return the console of everything else (stderr)."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Say something on stderr."""
    err().print(text, markup=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Report]:
    """Show bars on stderr, or a line a finished stage where no terminal is; yields ``report(stage, done, total)``."""
    if not err().is_terminal:
        yield _line_reporter()
        return
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=err()) as display:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = display.add_task(stage, total=total)
            display.update(bars[stage], completed=done, total=total)

        yield report


def _line_reporter(clock: Callable[[], float] = time.monotonic) -> Report:
    started: dict[str, tuple[float, int]] = {}  # when, and how much was done by then (a run that goes on)
    said: dict[str, float] = {}
    last = clock()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        since, skipped = started.setdefault(stage, (last, done - 1))
        last = clock()
        if done == total:
            note(f"{stage}: {done}/{total} in {last - started.pop(stage)[0]:.0f} s")
        elif last - said.setdefault(stage, since) >= SAID_EVERY:
            said[stage] = last
            left = (last - since) / (done - skipped) * (total - done)
            note(f"{stage}: {done}/{total}, {left:.0f} s left")

    return report


def show(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, as_json: bool, title: str = "") -> None:
    """Print rows as JSON, whole, or as a table of chosen columns.

    Args:
        rows: Plain data.
        columns: Heading by key; other keys appear in JSON alone.
        as_json: Which.
        title: Of the table.
    """
    if as_json:
        show_json(list(rows))
        return
    table = Table(title=title or None, title_justify="left")
    for number, (key, heading) in enumerate(columns.items()):
        text = any(isinstance(row.get(key), str) for row in rows)
        table.add_column(heading, justify="left" if text else "right", overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    out().print(table)


def show_json(value: Any) -> None:
    """Print plain data as JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


def numbers(text: str, option: str) -> list[float]:
    """Read numbers separated by commas.

    Raises:
        BadOption: names the option.
    """
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values:
        raise BadOption(
            where="command line", name=option, got=text, wanted="numbers separated by commas, as in 8,4.5,3"
        )
    return values


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers separated by commas.

    Raises:
        BadOption: names the option.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        wanted = "whole numbers separated by commas, as in 2,2,2,2"
        raise BadOption(where="command line", name=option, got=text, wanted=wanted) from None


def names(text: str) -> list[str]:
    """Read names separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def positive(value: int, option: str, least: int = 1, most: int | None = None) -> int:
    """Return a count that must be at least 1, or more: windows have two tokens, as the first is not predicted.

    Raises:
        BadOption: names the option.
    """
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise BadOption(where="command line", name=option, got=value, wanted=wanted)
    return value


def check_budgets(model: Any, budgets: Sequence[float], option: str = "--budgets") -> None:
    """Refuse a budget that the model cannot give before the first long computation.

    Raises:
        BudgetOutOfRange: names the range.
        NotElastic: the model has no slices.
    """
    from mobiquant_compiler.budgets import get_budget, set_budget

    before = get_budget(model)
    try:
        for bits in budgets:
            set_budget(model, bits)
    except BudgetOutOfRange as error:
        raise BudgetOutOfRange(**error.fields | {"where": option}) from None
    finally:
        set_budget(model, before)


def pick_budgets(model: Any, wanted: Sequence[float]) -> list[float]:
    """Return the budgets to measure: those asked for, else of 8, 6, 5, 4 and 3 those that an elastic model can give.

    Raises:
        BudgetOutOfRange: one was asked for that cannot be.
        NotElastic: the model has no slices.
    """
    from mobiquant_compiler.budgets import linears_of
    from mobiquant_compiler.runtime.budget import budget_range
    from mobiquant_compiler.runtime.telemetry import routers_of

    if wanted:
        check_budgets(model, wanted)
        return list(wanted)
    low, high = budget_range(routers_of(linears_of(model, "budgets")))
    return [bits for bits in DEFAULT_BUDGETS if low <= bits <= high] or [high]


def user_error(error: BaseException) -> str | None:
    """Return the one line that tells a user what to do, None for a fault of ours.

    Compilers wrap what a backend raises: the cause counts.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MobiQuantError):
            return " ".join(str(seen).split())
        if isinstance(seen, OSError) and seen.filename is not None:
            return f"{seen.filename}: {seen.strerror}"
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
    return None
