"""Count the bytes of live tensor storages while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Watches every op of a block: storages that appear are added, storages that died are taken off.

    Storages that ops read and that were not made in the block (the model's own) count as zero when they appear and
    as minus their size when they die: all figures are above what was held before.

    Attributes:
        peak: Most bytes above the start at any op.
        live: Bytes above the start now.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int, bool]] = {}
        self._freed = 0
        self.peak = 0

    def _storages_of(self, value: Any) -> Iterator[torch.UntypedStorage]:
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                yield leaf.untyped_storage()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in self._storages_of((args, kwargs)):
            self._note(storage, own=False)
        result = func(*args, **(kwargs or {}))
        for storage in self._storages_of(result):
            self._note(storage, own=True)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, storage: torch.UntypedStorage, own: bool) -> None:
        reference = StorageWeakRef(storage)
        # The weak reference keeps the storage's address from being used again: the key is unique while it is here.
        self._storages.setdefault(reference.cdata, (reference, storage.nbytes(), own))

    @property
    def live(self) -> int:
        for key, (reference, size, own) in list(self._storages.items()):
            if reference.expired():
                del self._storages[key]
                self._freed += 0 if own else size
        return sum(size for _, size, own in self._storages.values() if own) - self._freed


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared storages once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
