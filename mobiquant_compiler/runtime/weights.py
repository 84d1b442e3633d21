"""Slices of plain weights, looked up by the identity of the run-time weight (design section 6.2).

A weight that was swapped, loaded or edited in place is seen at the next call: the entry remembers the tensor's
version and address. Only an edit through ``.data`` of the same storage leaves no trace; `WeightTable.forget` is
for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mobiquant_compiler.linear import MobiLinear, TokenMask
from mobiquant_compiler.runtime.budget import BudgetState
from mobiquant_compiler.spec import SliceSpec

Source = Callable[[Tensor, SliceSpec, str], MobiLinear | None]


@dataclass(slots=True)
class Bound:
    """The slices of one weight and what tells that they are current."""

    linear: MobiLinear
    name: str
    version: int
    address: int


def _stamp(weight: Tensor) -> tuple[int, int]:
    version = 0 if weight.is_inference() else weight._version
    return version, weight.data_ptr()


class WeightTable:
    """Weak table from weight tensors to their slices; entries die with their weights."""

    def __init__(self) -> None:
        self._entries = WeakIdKeyDictionary()
        self._masks: dict[torch.device, TokenMask] = {}
        self._lock = threading.RLock()

    def mask(self, device: torch.device) -> TokenMask:
        """Return the token mask that all bound linears of a device share."""
        with self._lock:
            return self._masks.setdefault(device, TokenMask().to(device))

    def lookup(self, weight: Tensor, transposed: bool, spec: SliceSpec, name: str, source: Source | None) -> tuple[MobiLinear, bool]:
        """Return the slices of a weight and whether they are new, packing on first use or after a change.

        Args:
            weight: Run-time parameter, [N, K] or, transposed, [K, N].
            transposed: See above.
            spec: Wanted slices.
            name: Layer, for messages.
            source: Where slices may come from instead of the weight itself (a checkpoint).

        Raises:
            WeightError: the weight cannot become slices.
        """
        version, address = _stamp(weight)
        with self._lock:
            entry: Bound | None = self._entries.get(weight)
            if entry is not None and (entry.version, entry.address) == (version, address) and entry.linear.spec == spec:
                return entry.linear, False
            linear = self._make(weight.t() if transposed else weight, spec, name, source)
            if entry is not None and entry.linear.spec == spec and entry.linear.slices.shape == linear.slices.shape:
                _overwrite(entry.linear, linear)  # same addresses: recorded CUDA graphs stay right
                entry.version, entry.address = version, address
                return entry.linear, False
            self._entries[weight] = Bound(linear, name, version, address)
            return linear, True

    def _make(self, weight: Tensor, spec: SliceSpec, name: str, source: Source | None) -> MobiLinear:
        # Ordinary tensors, even when the first call comes under inference_mode: they are updated later.
        with torch.inference_mode(False), torch.no_grad():
            weight = weight.detach().clone() if weight.is_inference() else weight.detach()
            found = source(weight, spec, name) if source else None
            if found is not None:
                return found
            return MobiLinear.from_weight(
                weight, None, spec, token_mask=self.mask(weight.device), scale_dtype=torch.float32, where=name
            )

    def of_model(self, model: nn.Module) -> dict[str, MobiLinear]:
        """Return the bound linears of a model's parameters, by layer name."""
        found = {}
        for name, parameter in model.named_parameters():
            entry = self._entries.get(parameter)
            if entry is not None:
                found[name.replace("_orig_mod.", "").removesuffix(".weight")] = entry.linear
        return found

    def forget(self, model: nn.Module) -> int:
        """Drop the slices of a model's weights, so that the next call packs them anew; returns how many there were."""
        known = [p for p in model.parameters() if p in self._entries]
        for parameter in known:
            del self._entries[parameter]
        return len(known)


def _overwrite(old: MobiLinear, new: MobiLinear) -> None:
    with torch.inference_mode(False), torch.no_grad():
        old.slices.copy_(new.slices)
        old.scale.copy_(new.scale)
        old.zero.copy_(new.zero)
        old.router.energy.copy_(new.router.energy)


BOUND = WeightTable()


@dataclass(slots=True)
class Slot:
    """Where a graph reads one bound weight."""

    name: str
    index: int
    transposed: bool
    spec: SliceSpec


class BoundGraph:
    """A compiled graph whose last inputs are the slices of weights among its first.

    Attributes:
        compiled: What runs, set once it exists.
    """

    compiled: Callable[..., object]

    def __init__(self, slots: Sequence[Slot], budget: float | None, source: Source | None = None) -> None:
        self.slots, self.budget, self.source = list(slots), budget, source

    def __call__(self, *args: Tensor) -> object:
        """Look the slices up by the weights of this very call, and run."""
        return self.compiled(*args, *self.inputs(args))

    def inputs(self, args: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors for the inputs that bind-slices appended."""
        return bound_inputs(self.resolve(args))

    def resolve(self, args: Sequence[Tensor]) -> list[MobiLinear]:
        """Return the slices of this call's weights; new ones join one budget."""
        fresh, linears = [], []
        for slot in self.slots:
            linear, new = BOUND.lookup(args[slot.index], slot.transposed, slot.spec, slot.name, self.source)
            linears.append(linear)
            if new:
                fresh.append(linear.router)
        if fresh:
            state = BudgetState(fresh)
            if self.budget is not None:
                state.set(self.budget)
        return linears


def bound_inputs(linears: Sequence[MobiLinear]) -> list[Tensor]:
    """Return the tensors that bind-slices appended inputs for, in its order."""
    shared = [linears[0].router.gain, linears[0].router.token_mask.tokens]
    for linear in linears:
        router = linear.router
        shared += [linear.slices, linear.scale, linear.zero, router.energy, router.thresholds, router.hist]
    return shared
