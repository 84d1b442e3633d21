"""Zeros by which the programs of a launch hear of one another, and which they leave as they found them.

Two launches that may run at the same time must not share them: each stream has its own, and so has each launch that is
captured into a CUDA graph, which runs on whatever stream it is replayed. Zeroing memory for each launch would be
another launch.

A stream is known by its handle. Work that is still pending on a stream that was destroyed, whose handle another one
got, and streams that share one handle (that of the default stream of each thread) are not told apart.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
from torch import Tensor

log = logging.getLogger(__name__)
MOST_TOKENS = 64  # of a launch whose programs wait for counts: a mark each
MARKS = MOST_TOKENS + 1  # and how many programs have read them
_ROOM = 72  # int32 from one launch's marks to those of the next: lines of 32 bytes of their own
_LAUNCHES = 4096  # whose marks are allocated at a time, 1.2 MB


class _Store:
    """The marks of one device: rows of zeros, handed out one by one and never taken back.

    Nobody says when a captured graph is gone. Calls outside of captures see to it that there are rows for the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: list[Tensor] = []  # kept, whoever still has rows of it: graphs only know addresses
        self._rows: list[Tensor] = []
        self._of_stream: dict[int, Tensor] = {}
        self._lock = Lock()
        self._grow()

    def take(self) -> Tensor | None:
        """Return marks that nobody has, None where none are left."""
        with self._lock:
            return self._rows.pop() if self._rows else None

    def of_stream(self) -> Tensor:
        """Return the marks of the current stream."""
        if len(self._rows) < _LAUNCHES // 2:
            self._grow()
        stream = torch.cuda.current_stream(self._device).cuda_stream
        marks = self._of_stream.get(stream)
        if marks is None:
            with self._lock:
                marks = self._of_stream.setdefault(stream, self._rows.pop())
        return marks

    def _grow(self) -> None:
        # A thread may be told to allocate from the pool of some graphs, as torch tells it in calls before a capture,
        # and such memory is given to others later. What a new thread allocates is its own.
        with ThreadPoolExecutor(1) as another:
            another.submit(self._allocate).result()

    def _allocate(self) -> None:
        zeros = torch.zeros(_LAUNCHES, _ROOM, dtype=torch.int32, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()  # other streams read them too
        with self._lock:
            self._memory.append(zeros)
            self._rows.extend(zeros[:, :MARKS].unbind())


_STORES: dict[torch.device, _Store] = {}


def marks_for(device: torch.device) -> Tensor:
    """Return zeros for a launch on the current stream, int32 [65]; it must leave zeros.

    While a CUDA graph is captured they are for this launch alone. Where there are none left, or no call was made before
    the capture, the graph zeroes memory of its own.
    """
    marks = _kept(device) if device.type == "cuda" else None
    return torch.zeros(MARKS, dtype=torch.int32, device=device) if marks is None else marks


def _kept(device: torch.device) -> Tensor | None:
    """Return the marks that the current stream of a CUDA device, or its capture, may have; None where none are left."""
    store = _STORES.get(device)
    if not torch.cuda.is_current_stream_capturing():
        return (store or _STORES.setdefault(device, _Store(device))).of_stream()
    marks = None if store is None else store.take()
    if marks is None:
        log.debug("no marks are left for a launch that is captured: the graph zeroes its own")
    return marks
