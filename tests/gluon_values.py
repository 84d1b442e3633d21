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

from tests.gluon_memory import global_memory

TURNS = 1000  # of a loop of PTX: more are a wait for what never comes


def run_ptx(text: str, inputs: list[Any], outputs: int) -> list[np.ndarray]:
    """Run PTX on registers of many threads at once; operands $i are outputs first, then inputs.

    A jump is taken by all threads where one of them takes it: right for loops that wait, whose turns change nothing.
    """
    registers: dict[str, Any] = {f"${outputs + number}": value for number, value in enumerate(inputs)}
    statements = [s.strip() for s in re.sub(r"[{}]", "", text).split(";")]
    labels = {found[1]: at for at, s in enumerate(statements) if (found := re.match(r"(\w+):", s))}
    at, turns = 0, 0
    while at < len(statements):
        statement = re.sub(r"^\w+:\s*", "", statements[at])
        at += 1
        if not statement or statement.startswith(".reg"):
            continue
        if jump := re.fullmatch(r"@(\w+) bra (\w+)", statement):
            if registers[jump[1]].any():
                at, turns = labels[jump[2]], turns + 1
                assert turns < TURNS, "waits for what never comes"
            continue
        chosen = None
        if predicated := re.fullmatch(r"@(\w+) (.*)", statement):
            chosen, statement = registers[predicated[1]], predicated[2]
        name, rest = statement.split(" ", 1)
        target, *sources = (part.strip() for part in rest.split(","))
        values = [_operand(source, registers) for source in sources]
        if name == "red.release.gpu.global.add.s32":
            address = _operand(target, registers)
            global_memory.release(address.memory, address.at, int(values[0]))
        else:
            found = np.asarray(_result(name, values), dtype=np.uint32)
            registers[target] = found if chosen is None else np.where(chosen, found, registers[target])
    return [registers[f"${number}"] for number in range(outputs)]


def _operand(text: str, registers: dict[str, Any]) -> Any:
    """Return what a register holds, that of an address too, or a number."""
    name = text.strip("[]")
    return registers[name] if name in registers else np.uint32(int(name, 0))


def _result(name: str, values: list[Any]) -> np.ndarray:
    """Return what an instruction computes."""
    if name == "ld.acquire.gpu.global.s32":
        return global_memory.acquire(values[0].memory, values[0].at)
    if name in ("setp.lt.s32", "setp.ge.s32"):
        less = np.asarray(values[0]).view(np.int32) < np.asarray(values[1]).view(np.int32)
        return less if name == "setp.lt.s32" else ~less
    if name == "mov.b32":
        return values[0]
    if name == "mad.lo.s32":
        return np.asarray(values[0]) * values[1] + values[2]
    if name == "prmt.b32":
        return _permuted(values[0], values[1], int(values[2]))
    if name == "lop3.b32":
        return _looked_up(*(np.asarray(value).astype(np.uint32) for value in values[:3]), int(values[3]))
    operation, kind = re.sub(r"\.(b?f16)x2(\.f32)?", "", name), re.search(r"b?f16", name)
    assert kind is not None, f"{name} is not known here"
    bits, least = {"bf16": (8, -133), "f16": (11, -24)}[kind[0]]
    if operation == "cvt.rn":
        both = [rounded(value.astype(np.float64), bits, least) for value in values]
        return _encoded(both[1], kind[0]) | _encoded(both[0], kind[0]) << np.uint32(16)
    assert operation == "fma.rn", f"{name} is not known here"
    halves = []
    for shift in (0, 16):
        a, b, c = (_decoded(np.asarray(v).astype(np.uint32) >> np.uint32(shift), kind[0]) for v in values)
        halves.append(_encoded(rounded(a * b + c, bits, least), kind[0]))
    return halves[0] | halves[1] << np.uint32(16)


def rounded(value: np.ndarray, bits: int, least: int) -> np.ndarray:
    """Round float64 to the nearest number of so many bits, ties to even; the last bit is at least ``2**least``."""
    quantum = np.exp2(np.maximum(np.frexp(value)[1] - bits, least).astype(np.float64))
    return np.rint(value / quantum) * quantum


def _decoded(halves: np.ndarray, kind: str) -> np.ndarray:
    low = (halves & np.uint32(0xFFFF)).astype(np.uint32)
    if kind == "bf16":
        return (low << np.uint32(16)).view(np.float32).astype(np.float64)
    return low.astype(np.uint16).view(np.float16).astype(np.float64)


def _encoded(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return values.astype(np.float32).view(np.uint32) >> np.uint32(16)
    return values.astype(np.float16).view(np.uint16).astype(np.uint32)


def _looked_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Combine bits by a table of eight, as `lop3` does."""
    found = np.zeros_like(a | b | c)
    for row in range(8):
        if table >> row & 1:
            found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return found


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


class Reads(threading.local):
    """What a thread has done: the allocations that it has read since it fenced, and the barrier that it waited for."""

    def __init__(self) -> None:
        self.unfenced: set[int] = set()
        self.waited: Any = None


reads = Reads()


def fence() -> None:
    """Let copies that are asked for from now on come after this thread's reads."""
    reads.unfenced = set()


class Memory:
    """A piece of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        """Extents."""
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return self.data.dtype

    @property
    def allocation(self) -> int:
        """Which allocation it is a part of."""
        return self.data.untyped_storage().data_ptr()

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
        reads.unfenced.add(self.allocation)
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        """Write all of it."""
        assert value.data.dtype is self.data.dtype
        self.data.copy_(value.data)
