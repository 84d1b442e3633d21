"""Gluon kernels on CPU tensors: what an emitted file computes, whatever registers and memory its layouts choose.

Triton's interpreter runs no Gluon. Here the text of a kernel is executed as plain Python with stand-ins for the
language: tensors are torch's, copies to shared memory happen when they are waited for, memory that nobody wrote is
poisoned, a read past an allocation fails, and inline PTX is run instruction by instruction. Warps that do different
things are threads. Layouts say nothing here; that conversions between them move no value is asserted by the compiler.
There is what `sliced_wgmma` and `batch_wgmma` use.
"""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobiquant_compiler.codegen import boxes, specialise
from mobiquant_compiler.spec import KernelSpec
from tests.gluon_memory import global_memory
from tests.gluon_values import AnyLayout, Memory, Pointer, Value, fence, raw, reads, run_ptx

POISON = 0x5A
HELPERS = ("operands", "batch_operands", "batch_products", "batch_copies", "batches", "split_columns", "sorted_tiles")
PATIENCE = 60.0  # seconds after which a wait is one for what never comes
DTYPES = {
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "uint32": torch.int64,  # of what is never negative
    "uint64": torch.int64,
}


def load(pointer: Pointer, mask: Value | None = None, other: Any = None) -> Value:
    """Read from an allocation; outside of it only what is masked."""
    at = torch.as_tensor(pointer.at)
    if mask is None:
        assert bool(((at >= 0) & (at < pointer.memory.numel())).all()), "a read past an allocation"
        return Value(pointer.memory[at])
    kept = mask.data.expand(torch.broadcast_shapes(at.shape, mask.data.shape))
    found = load(Pointer(pointer.memory, torch.where(kept, at, 0)))
    assert bool(((at >= 0) & (at < pointer.memory.numel()) | ~kept).all()), "a read past an allocation"
    return Value(torch.where(kept, found.data, torch.as_tensor(other or 0, dtype=found.data.dtype)))


class Description:
    """A tensor that is copied in boxes; past its end there are zeros."""

    def __init__(self, tensor: Tensor, box: list[int]) -> None:
        self.tensor, self.box, self.dtype, self.layout = tensor, box, tensor.dtype, None

    def read(self, place: list[int]) -> Tensor:
        """Return a box."""
        found = torch.zeros(self.box, dtype=self.dtype)
        part = self.tensor[tuple(slice(at, at + size) for at, size in zip(place, self.box, strict=True))]
        found[tuple(slice(0, size) for size in part.shape)] = part
        return found


class Barrier:
    """A barrier that counts bytes, or arrivals: what bytes are of lies poisoned until it is waited for."""

    def __init__(self) -> None:
        self.expected, self.phase = 0, 0
        self.count, self.arrived = 1, 0
        self.copies: list[tuple[Memory, Tensor]] = []
        self.guarded: set[int] = set()  # allocations that are copied to once a thread has waited for this
        self.changed = threading.Condition()

    def init(self, count: int) -> None:
        """Say how many arrivals end a phase."""
        self.count = count

    def expect(self, size: int, pred: Any) -> None:
        """Announce bytes."""
        if pred:
            assert not self.expected, "a stage is filled while it is full"
            self.expected = size

    def copy(self, box: Tensor, memory: Memory, pred: Any) -> None:
        """Ask for a copy, which spoils what is there at once."""
        if pred:
            assert reads.waited is not None, "a copy before anything was waited for"
            place = memory.data.storage_offset() * memory.data.element_size()
            assert place % 128 == 0, "boxes are copied to multiples of 128 bytes"
            reads.waited.guarded.add(memory.allocation)
            with self.changed:
                memory.data.copy_(torch.full_like(memory.data.view(torch.int8), POISON).view(memory.data.dtype))
                self.copies.append((memory, box))
                self.changed.notify_all()

    def arrive(self) -> None:
        """Arrive; the last one ends the phase: what was read may be copied over."""
        assert not reads.unfenced & self.guarded, "a copy may be faster than reads that are under way"
        with self.changed:
            self.arrived = (self.arrived + 1) % self.count
            if self.arrived == 0:
                self.phase = 1 - self.phase
                self.changed.notify_all()

    def full(self) -> bool:
        """Say whether all bytes that were announced have been asked for."""
        return self.expected == sum(box.numel() * box.element_size() for _, box in self.copies) > 0

    def wait(self, phase: Any, pred: Any = True) -> None:
        """Wait for the end of a phase; that of bytes ends here, where they are copied."""
        if not pred:
            return
        wanted, reads.waited = int(raw(phase)), self
        with self.changed:
            came = self.changed.wait_for(lambda: self.phase != wanted or self.full(), PATIENCE)
            assert came, "waits for what never comes"
            if self.phase != wanted:
                return
            for memory, box in self.copies:
                memory.data.copy_(box)
            self.expected, self.phase, self.copies = 0, 1 - self.phase, []

    def invalidate(self) -> None:
        """Check that nothing is under way."""
        assert not self.copies, "copies that nobody waited for"


class Barriers:
    """An allocation of barriers."""

    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, number: Any) -> Barrier:
        """Return one."""
        return self.all[int(raw(number))]


class Language:
    """Stand-in for `gluon.language`."""

    def __init__(self, program: tuple[int, ...]) -> None:
        self.program = program
        vars(self).update(DTYPES)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return AnyLayout(name)
        raise AttributeError(name)

    def constexpr(self, value: Any) -> Any:
        """Return a constant of a module."""
        return value

    def minimum(self, a: Any, b: Any) -> Value:
        """Return the smaller."""
        return Value(torch.minimum(torch.as_tensor(raw(a)), torch.as_tensor(raw(b))))

    def maximum(self, a: Any, b: Any) -> Value:
        """Return the larger."""
        return Value(torch.maximum(torch.as_tensor(raw(a)), torch.as_tensor(raw(b))))

    def max(self, value: Value, axis: int) -> Value:
        """Return the largest."""
        return Value(value.data.amax(axis))

    def min(self, value: Value, axis: int) -> Value:
        """Return the least."""
        return Value(value.data.amin(axis))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """Choose values, or one of two addresses."""
        if isinstance(a, Pointer):
            return a if condition else b
        return Value(torch.where(torch.as_tensor(raw(condition)), torch.as_tensor(raw(a)), torch.as_tensor(raw(b))))

    def fma(self, a: Any, b: Any, c: Any) -> Value:
        """Multiply and add; the product of two float32 is exact."""
        a, b, c = (torch.as_tensor(raw(value)).double() for value in (a, b, c))
        return Value((a * b + c).float())

    def warp_specialize(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]], *sizes: list[int]) -> None:
        """Run functions side by side, until all have ended."""
        with ThreadPoolExecutor(len(parts)) as pool:
            for running in [pool.submit(function, *arguments) for function, arguments in parts]:
                running.result()

    def static_assert(self, held: bool, words: str = "") -> None:
        """Check."""
        assert held, words

    def static_range(self, *bounds: int) -> range:
        """Return a loop that is unrolled."""
        return range(*bounds)

    def program_id(self, axis: int) -> Value:
        """Return the program."""
        return Value(torch.tensor(self.program[axis]))

    def to_tensor(self, value: int) -> Value:
        """Return a scalar."""
        return Value(torch.tensor(value))

    def arange(self, start: int, stop: int, layout: Any) -> Value:
        """Return whole numbers."""
        return Value(torch.arange(start, stop, dtype=torch.int32))

    def load(self, pointer: Pointer, mask: Value | None = None, other: Any = None) -> Value:
        """Read."""
        return load(pointer, mask, other)

    def store(self, pointer: Pointer, value: Value, mask: Value | None = None) -> None:
        """Write where the mask is true, for others to see once they wait for it."""
        wanted = torch.tensor(True) if mask is None else mask.data
        at, data, kept = torch.broadcast_tensors(torch.as_tensor(pointer.at), value.data, wanted)
        assert bool(((at >= 0) & (at < pointer.memory.numel()))[kept].all()), "a write past an allocation"
        global_memory.store(pointer.memory, at[kept], data[kept])

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: Any) -> Value:
        """Return zeros."""
        return Value(torch.zeros(shape, dtype=dtype))

    def full_like(self, value: Value, number: float) -> Value:
        """Return one number many times."""
        return Value(torch.full_like(value.data, number))

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Memory | Barriers:
        """Return poisoned memory, or barriers."""
        if layout == "barriers":
            return Barriers(shape[0])
        size = torch.empty(0, dtype=dtype).element_size()
        return Memory(torch.full([*shape[:-1], shape[-1] * size], POISON, dtype=torch.int8).view(dtype))

    def convert_layout(self, value: Value, layout: Any, assert_trivial: bool = False) -> Value:
        """Return the same values."""
        return value

    def split(self, value: Value) -> tuple[Value, Value]:
        """Take the last dimension apart."""
        return Value(value.data[..., 0]), Value(value.data[..., 1])

    def join(self, a: Value, b: Value) -> Value:
        """Put two side by side in a new last dimension."""
        return Value(torch.stack([a.data, b.data], -1))

    def permute(self, value: Value, order: tuple[int, ...]) -> Value:
        """Change the order of dimensions."""
        return Value(value.data.permute(order))

    def reshape(self, value: Value, shape: list[int]) -> Value:
        """Change the shape."""
        return Value(value.data.reshape(shape))

    def inline_asm_elementwise(
        self, text: str, constraints: str, values: Any, *, dtype: Any, is_pure: bool, pack: int
    ) -> Any:
        """Run PTX; a register holds `pack` values that stand side by side, four bytes or two numbers of 16 bits."""
        if "griddepcontrol" in text or "prefetch" in text:
            return None
        if dtype is torch.int8:  # four words of one register each become the four bytes of one
            words = values[0].data.reshape(-1, 4).int().numpy().view(np.uint32)
            (found,) = run_ptx(text, [words[:, place] for place in range(pack)], 1)
            return Value(torch.from_numpy(found.copy().view(np.int8)).view(values[0].data.shape))
        if dtype in (torch.float16, torch.bfloat16):  # of two words of one register each
            words = [v.data.reshape(-1, 2)[:, place].numpy() for v in values for place in range(2)]
            (found,) = run_ptx(text, words, 1)
            return Value(torch.from_numpy(found.view(np.int32).copy()).view(dtype).view(values[0].data.shape))
        several = isinstance(dtype, tuple)
        outputs = len(dtype) if several else 1
        assert len(constraints.split(",")) == outputs + len(values)
        words = [value if isinstance(value, Pointer) else _registers(value.data.contiguous(), pack) for value in values]
        found = [torch.from_numpy(w.view(np.int32).copy()) for w in run_ptx(text, words, outputs)]
        kinds = dtype if several else (dtype,)
        results = tuple(Value(w.view(kind)) for w, kind in zip(found, kinds, strict=True))
        return results if several else results[0]


def _registers(values: Tensor, pack: int) -> np.ndarray:
    """Return values as registers hold them."""
    return values.view(torch.int32).numpy().view(np.uint32) if pack == 4 else values.numpy()


def copy_box(source: Description, place: list[Any], barrier: Barrier, memory: Memory, pred: Any = True) -> None:
    """Ask for a copy of a box; a box that begins past the end is still one."""
    if pred:
        barrier.copy(source.read([int(raw(at)) for at in place]), memory, pred)


def barriers() -> SimpleNamespace:
    """Return the stand-in for `hopper.mbarrier`."""
    return SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, size, pred=True: barrier.expect(size, pred),
        wait=lambda barrier, phase, pred=True: barrier.wait(phase, pred),
        arrive=lambda barrier, count: barrier.arrive(),
        invalidate=lambda barrier: barrier.invalidate(),
    )


def product(a: Value, b: Memory, sums: Value, is_async: bool, use_acc: bool = True) -> Value:
    """Multiply in the type of the sums."""
    assert a.data.dtype is b.data.dtype
    kind = sums.data.dtype
    return Value(a.data.to(kind) @ b.data.to(kind) + sums.data * use_acc)


def _executed(text: str, names: dict[str, Any]) -> dict[str, Any]:
    """Execute a module's functions with stand-ins for what it imports."""
    scope = dict(names)
    for module, name in re.findall(r"(?m)^from mobiquant_compiler\.codegen\.(\w+) import (\w+)$", text):
        scope[name] = getattr(names[module], name)
    exec(re.sub(r"(?m)^from [^\n(]*(?:\([^)]*\))?$", "", text).replace(".primitive_bitwidth", ".itemsize * 8"), scope)
    return scope


def helpers(program: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Return what a kernel imports, as plain Python: the language, and our modules of jitted functions."""

    def jit(function: Any = None, **options: Any) -> Any:
        return function if callable(function) else lambda decorated: decorated

    names: dict[str, Any] = {
        "gl": Language(program),
        "gluon": SimpleNamespace(jit=jit, constexpr_function=jit),
        "warpgroup_mma": product,
        "warpgroup_mma_wait": lambda num_outstanding, deps: deps[0] if len(deps) == 1 else deps,
        "tma": SimpleNamespace(async_copy_global_to_shared=copy_box),
        "mbarrier": barriers(),
        "fence_async_shared": fence,
        "gdc_wait": lambda: None,
        "gdc_launch_dependents": lambda: None,
    }
    for module in HELPERS:
        text = (Path(specialise.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        names[module] = SimpleNamespace(**_executed(text, names))
    return names


def functions_of(text: str, program: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Return the functions of an emitted file as plain Python, as one program calls them."""

    def scalars(stop: Any) -> Iterator[Value]:
        return (Value(torch.tensor(number)) for number in range(int(operator.index(stop))))

    return _executed(text, helpers(program) | {"range": scalars})


def run(spec: KernelSpec, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run every program of the kernel of `spec`; tensors among the arguments are written in place."""
    text = specialise.specialise(spec)
    try:
        for program in np.ndindex(*grid):
            global_memory.begin_program()
            kernel = functions_of(text, program)[str(spec.family)]
            wanted = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
            kernel(**{name: _argument(name, spec, arguments) for name in wanted})
    finally:
        global_memory.end_launch()


def _argument(name: str, spec: KernelSpec, arguments: dict[str, Any]) -> Pointer | Value | Description:
    if boxes.is_described(name):
        return Description(arguments[boxes.source_of(name)], list(boxes.box_of(name, spec).shape))
    value = arguments[name]
    return Pointer(value.view(-1)) if isinstance(value, Tensor) else Value(torch.tensor(value, dtype=torch.int32))
