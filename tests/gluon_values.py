"""What a Gluon kernel computes with, on CPU tensors: values, addresses, shared memory, straight PTX."""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def run_ptx(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Run straight PTX on registers of many threads at once; operands $i are outputs first, then inputs."""
    registers: dict[str, np.ndarray] = {f"${outputs + number}": value for number, value in enumerate(inputs)}
    for statement in re.sub(r"[{}]", "", text).split(";"):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        name, rest = statement.strip().split(" ", 1)
        target, *sources = (part.strip() for part in rest.split(","))
        values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
        assert name in ("prmt.b32", "mov.b32"), f"{name} is not known here"
        result = values[0] if name == "mov.b32" else _permuted(values[0], values[1], int(sources[2], 0))
        registers[target] = np.asarray(result, dtype=np.uint32)
    return [registers[f"${number}"] for number in range(outputs)]


def _permuted(low: np.ndarray, high: np.ndarray, selector: int) -> np.ndarray:
    """Put bytes of two registers where the selector says, four bits a byte."""
    both = low.astype(np.uint32).astype(np.uint64) | high.astype(np.uint32).astype(np.uint64) << np.uint64(32)
    chosen = (selector >> 4 * place & 7 for place in range(4))
    parts = (
        (both >> np.uint64(8 * byte) & np.uint64(255)) << np.uint64(8 * place) for place, byte in enumerate(chosen)
    )
    return sum(parts, np.zeros_like(both)).astype(np.uint32)


def raw(value: Any) -> Any:
    """Return what a stand-in holds."""
    return value.data if isinstance(value, Value) else value


class Value:
    """A tensor or a scalar of a kernel."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.type = SimpleNamespace(layout=None)

    @property
    def shape(self) -> list[int]:
        """Extents."""
        return list(self.data.shape)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        """Convert, or take the bits as another type."""
        return Value(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def __getitem__(self, key: Any) -> Value:
        return Value(self.data[key])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)


def _binary(name: str, function: Callable[[Any, Any], Any]) -> None:
    def forward(a: Value, b: Any) -> Any:
        return NotImplemented if isinstance(b, Pointer) else Value(function(a.data, raw(b)))

    setattr(Value, f"__{name}__", forward)
    setattr(Value, f"__r{name}__", lambda a, b: Value(function(torch.as_tensor(b), a.data)))


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    _binary(_name, getattr(operator, f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _binary(_name, getattr(operator, _name))


class Pointer:
    """Addresses inside one allocation."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def to(self, dtype: torch.dtype) -> Pointer:
        """Return it: an address is a number."""
        return self

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + torch.as_tensor(raw(offset)).long())


class AnyLayout:
    """Any layout."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> AnyLayout:
        return self

    get_default_for = __call__


reads = threading.local()  # of a thread: whether it has read shared memory since it fenced


def fence() -> None:
    """Let copies that are asked for from now on come after this thread's reads."""
    reads.unfenced = False


class Memory:
    """A piece of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        """Extents."""
        return list(self.data.shape)

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        """Return a part."""
        return Memory(self.data.narrow(dim, start, length))

    def index(self, number: int) -> Memory:
        """Return one of the first dimension."""
        return Memory(self.data[int(raw(number))])

    def reshape(self, shape: list[int]) -> Memory:
        """Return it in another shape."""
        return Memory(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Memory:
        """Return it with its dimensions in another order."""
        return Memory(self.data.permute(order))

    def load(self, layout: Any) -> Value:
        """Read all of it; a copy that is asked for later may still be faster, until there is a fence."""
        reads.unfenced = True
        return Value(self.data.clone())

    def _keep_alive(self) -> None:
        """Nothing is reused here."""

    def store(self, value: Value) -> None:
        """Write all of it."""
        assert value.data.dtype is self.data.dtype
        self.data.copy_(value.data)
