"""Slices of plain weights, looked up by the identity of the run-time weight.

A weight that was swapped, loaded or edited in place is seen at the next call: the entry remembers the tensor's
version, storage and address. Only edits through ``.data`` of the same storage, and of tensors made under
inference_mode, leave no trace; `refresh` is for those.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from mobiquant_compiler.linear import MobiLinear, Router, TokenMask, plain_name
from mobiquant_compiler.runtime.budget import BudgetState
from mobiquant_compiler.spec import SliceSpec

Source = Callable[[Tensor, SliceSpec, str], MobiLinear | None]


@dataclass(slots=True)
class Bound:
    """The slices of one weight and what tells that they are current.

    Attributes:
        linear: The slices.
        stamp: Version, address and storage of the weight they were made from.
        storage: Keeps the storage's identity from being used again after it died.
    """

    linear: MobiLinear
    stamp: tuple[int, int, int]
    storage: StorageWeakRef


def _stamp(weight: Tensor) -> tuple[int, int, int]:
    version = 0 if weight.is_inference() else weight._version
    # The address alone is not enough: memory of an old `.data` is soon given to a new one.
    return version, weight.data_ptr(), weight.untyped_storage()._cdata


class WeightTable:
    """Weak table from weight tensors to their slices; entries die with their weights."""

    def __init__(self) -> None:
        # weight -> {(transposed, spec, source): slices}
        self._entries = WeakIdKeyDictionary()
        self._masks: dict[torch.device, TokenMask] = {}
        self._lock = threading.RLock()

    def mask(self, device: torch.device) -> TokenMask:
        """Return the token mask that all bound linears of a device share."""
        with self._lock:
            return self._masks.setdefault(device, TokenMask().to(device))

    def lookup(
        self, weight: Tensor, transposed: bool, spec: SliceSpec, name: str, source: Source | None
    ) -> tuple[MobiLinear, bool]:
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
        stamp = _stamp(weight)
        with self._lock:
            variants: dict[object, Bound] = self._entries.setdefault(weight, {})
            entry = variants.get((transposed, spec, source))
            if entry is not None and entry.stamp == stamp:
                return entry.linear, False
            linear = self._make(weight.t() if transposed else weight, spec, name, source)
            storage = StorageWeakRef(weight.untyped_storage())
            if entry is not None and _alike(entry.linear, linear):
                _overwrite(entry.linear, linear)  # same addresses: recorded CUDA graphs stay right
                entry.stamp, entry.storage = stamp, storage
                return entry.linear, False
            variants[transposed, spec, source] = Bound(linear, stamp, storage)
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
        """Return the bound linears of a model's parameters, by layer name (with a number where one has several)."""
        found = {}
        for name, parameter in model.named_parameters():
            layer = plain_name(name).removesuffix(".weight")
            for number, entry in zip(count(), self._entries.get(parameter, {}).values()):
                found[f"{layer}#{number}" if number else layer] = entry.linear
        return found

    def forget(self, model: nn.Module) -> int:
        """Drop the slices of a model's weights, so that the next call packs them anew; returns how many there were."""
        known = [p for p in model.parameters() if p in self._entries]
        for parameter in known:
            del self._entries[parameter]
        return len(known)


def _alike(old: MobiLinear, new: MobiLinear) -> bool:
    """Say whether the slices of `new` fit into the tensors of `old`."""
    pairs = ((old.slices, new.slices), (old.scale, new.scale))
    return all((a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) for a, b in pairs)


def _overwrite(old: MobiLinear, new: MobiLinear) -> None:
    with torch.inference_mode(False), torch.no_grad():
        old.slices.copy_(new.slices)
        old.scale.copy_(new.scale)
        old.zero.copy_(new.zero)
        old.router.energy.copy_(new.router.energy)
        old.router.gain.copy_(new.router.gain)


BOUND = WeightTable()


@dataclass(slots=True)
class Slot:
    """Where a graph reads one bound weight; `limits` are the floor and ceiling of its slice count."""

    name: str
    index: int
    transposed: bool
    spec: SliceSpec
    limits: tuple[int, int]


class BoundGraph:
    """A compiled graph whose last inputs are the slices of weights among its first.

    Attributes:
        compiled: What runs, set once it exists.
    """

    compiled: Callable[..., object]

    def __init__(self, slots: Sequence[Slot], budget: float | None, source: Source | None = None) -> None:
        self.slots, self.budget, self.source = list(slots), budget, source
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __call__(self, *args: Tensor) -> object:
        """Look the slices up by the weights of this very call, and run."""
        return self.compiled(*args, *self.inputs(args))

    def inputs(self, args: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors for the inputs that bind-slices appended."""
        return self._inputs_of(self.resolve(args))

    def begin(self, args: Sequence[Tensor]) -> list[Tensor]:
        """Return `inputs` while the graph is compiled, at the budget that was asked for."""
        linears = self.resolve(args)
        if self.budget is not None:
            for state in {id(s): s for s in (linear.router.state for linear in linears)}.values():
                state.start(self.budget)
        return self._inputs_of(linears)

    def _inputs_of(self, linears: Sequence[MobiLinear]) -> list[Tensor]:
        inputs = [linears[0].router.token_mask.tokens]
        routers = set[int]()
        for number, linear in enumerate(linears):
            router = linear.router
            inputs += [linear.slices, linear.scale, linear.zero]
            inputs += self._again(number, router) if id(router) in routers else _tensors_of(router)
            routers.add(id(router))
        return inputs

    def _again(self, number: int, router: Router) -> list[Tensor]:
        """Return the tensors of a router that another linear of the graph has: AOTAutograd wants no input twice.

        Its tokens are counted by the other linear.
        """
        seen, tensors = self._views.get(number, (None, []))
        if seen is not router.thresholds:  # another router, or moved
            *read, hist = _tensors_of(router)
            with torch.inference_mode(False):
                tensors = [*(tensor.detach() for tensor in read), torch.zeros_like(hist)]
            self._views[number] = router.thresholds, tensors
        return tensors

    def resolve(self, args: Sequence[Tensor]) -> list[MobiLinear]:
        """Return the slices of this call's weights; new ones join one budget."""
        fresh: list[MobiLinear] = []
        linears = []
        for slot in self.slots:
            linear, new = BOUND.lookup(args[slot.index], slot.transposed, slot.spec, slot.name, self.source)
            linears.append(linear)
            if new:
                fresh.append(linear)
                if linear.router.state is None:
                    linear.router.floor, linear.router.ceiling = slot.limits
        if fresh:
            known = next((linear.router.state for linear in linears if linear not in fresh), None)
            self._join(fresh, known)
        return linears

    def _join(self, fresh: Sequence[MobiLinear], known: BudgetState | None) -> None:
        """Give new slices a budget: the one in force for the others of the graph, else the one asked for."""
        loose = [linear.router for linear in fresh if linear.router.state is None]
        states = {id(s): s for s in (linear.router.state for linear in fresh) if s is not None}  # a checkpoint's
        if loose:
            states[0] = BudgetState(loose)
        for state in states.values():
            if known is not None:
                state.set(known.budget)
                state.started = known.started
            elif self.budget is not None:
                state.start(self.budget)
            else:
                state.set(state.budget)


def _tensors_of(router: Router) -> list[Tensor]:
    return [router.energy, router.gain, router.thresholds, router.hist]
