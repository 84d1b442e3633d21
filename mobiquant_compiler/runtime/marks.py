"""Zeros by which the programs of a launch hear of one another, and which they leave as they found them.

Two launches that may run at the same time must not share them: each stream has its own, and so has each launch that is
captured into a CUDA graph, which runs on whatever stream it is replayed. Zeroing memory for each launch would be
another launch.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

MOST_TOKENS = 64  # of a launch whose programs wait for counts: a mark each
MARKS = MOST_TOKENS + 1  # and how many programs have read them
_ROOM = 128  # int32 from one launch's marks to those of the next
_LAUNCHES = 4096  # whose marks are allocated at a time, 2 MiB


class _Store:
    """The marks of one device: rows of zeros, handed out one by one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows = torch.zeros(_LAUNCHES, _ROOM, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # other streams read them too
        self._next = itertools.count()
        self._of_stream: dict[int, Tensor] = {}

    def take(self) -> Tensor | None:
        """Return marks that nobody has, None where none are left."""
        number = next(self._next)
        return self._rows[number, :MARKS] if number < _LAUNCHES else None

    def of_stream(self) -> Tensor:
        """Return the marks of the current stream."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        marks = self._of_stream.get(stream)
        if marks is None:
            marks = self.take()
            marks = self._zeros() if marks is None else marks
            marks = self._of_stream.setdefault(stream, marks)
        return marks

    def _zeros(self) -> Tensor:
        return torch.zeros(MARKS, dtype=torch.int32, device=self._device)


_STORES: dict[torch.device, _Store] = {}


def marks_for(device: torch.device) -> Tensor:
    """Return zeros for a launch on the current stream, int32 [65]; it must leave zeros.

    While a CUDA graph is captured they are for this launch alone. Once those of `_LAUNCHES` launches are taken, or
    before there are any, the graph zeroes memory of its own.
    """
    if device.type != "cuda":
        return torch.zeros(MARKS, dtype=torch.int32, device=device)
    store = _STORES.get(device)
    if torch.cuda.is_current_stream_capturing():
        taken = None if store is None else store.take()
        return torch.zeros(MARKS, dtype=torch.int32, device=device) if taken is None else taken
    if store is None:
        store = _STORES.setdefault(device, _Store(device))
    return store.of_stream()
