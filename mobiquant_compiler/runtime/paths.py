"""Which path calls took: counted where they are launched, so that a user can see what ran."""

from __future__ import annotations

import threading
from collections import Counter

from mobiquant_compiler.spec import Path

_LOCK = threading.Lock()
_CALLS: Counter[tuple[str, int]] = Counter()  # registry: ops know tensors, not models
_BOUNDS = (1, 8, 64, 512, 4096)  # greatest number of tokens of each line of the report


def note(path: Path, tokens: int, linears: int) -> None:
    """Count a call of `linears` linears."""
    bound = next((b for b in _BOUNDS if tokens <= b), 0)
    with _LOCK:
        _CALLS[str(path), bound] += linears


def execution_paths() -> list[dict[str, object]]:
    """Return how many linears ran by which path, by number of tokens, since `reset_execution_paths`.

    Calls on a GPU are counted where Python launches them: a captured CUDA graph counts once, however often it is
    replayed. On a CPU there is one way, and nothing is counted.

    Returns:
        Rows with "path" (`spec.Path`), "tokens" (as "9..64") and "calls"; none where no call was on a GPU.
    """
    with _LOCK:
        calls = sorted(_CALLS.items(), key=lambda item: (item[0][1] or 1 << 62, item[0][0]))
    return [{"path": path, "tokens": _range(bound), "calls": count} for (path, bound), count in calls]


def reset_execution_paths() -> None:
    """Start counting anew."""
    with _LOCK:
        _CALLS.clear()


def _range(bound: int) -> str:
    """Return the numbers of tokens that a bound stands for."""
    if bound == 0:
        return f"{_BOUNDS[-1] + 1}.."
    place = _BOUNDS.index(bound)
    return f"{_BOUNDS[place - 1] + 1}..{bound}" if place else str(bound)
