"""Memory that programs share, as weakly ordered as a GPU may have it: what is stored is seen by who waited for it.

A store spoils what it writes to. What was stored comes to be there when it is acquired, by way of a number that the
thread that stored it released afterwards, and at the latest when the launch ends. So programs that run one after the
other find nothing that they would not find if they ran at once.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

POISON = 0x5A5A5A5A
Write = tuple[Tensor, Tensor, Tensor]  # memory, places and values


class _Own(threading.local):
    """What a thread has stored."""

    def __init__(self) -> None:
        self.writes: list[Write] = []


class GlobalMemory:
    """Stores of a launch that others may not see yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own = _Own()
        self._all: list[Write] = []
        self._released: dict[tuple[int, int], list[Write]] = {}

    def begin_program(self) -> None:
        """Let this thread be another program's."""
        self._own.writes = []

    def store(self, memory: Tensor, at: Tensor, data: Tensor) -> None:
        """Store; nobody sees it."""
        one = (memory, at.clone(), data.to(memory.dtype).clone())
        with self._lock:
            memory[at] = float("nan") if memory.is_floating_point() else POISON & torch.iinfo(memory.dtype).max
            self._own.writes.append(one)
            self._all.append(one)

    def release(self, memory: Tensor, at: Tensor, amount: int) -> None:
        """Add to numbers, by which who reads them sees all that this thread has stored."""
        with self._lock:
            memory[at] += amount
            for place in at.flatten().tolist():
                self._released.setdefault((memory.data_ptr(), place), []).extend(self._own.writes)

    def acquire(self, memory: Tensor, at: Tensor) -> np.ndarray:
        """Read numbers, and see what was stored before they came to be."""
        with self._lock:
            found = memory[at].clone()
            seen = [one for p in at.flatten().tolist() for one in self._released.get((memory.data_ptr(), p), [])]
            for written, places, data in {id(one): one for one in seen}.values():
                written[places] = data
        return found.numpy().view(np.uint32)

    def end_launch(self) -> None:
        """Let everybody see everything."""
        for memory, at, data in self._all:
            memory[at] = data
        self._all, self._released = [], {}


global_memory = GlobalMemory()
