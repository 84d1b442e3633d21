"""Build models without memory for their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class WeightsOnMeta(TorchFunctionMode):
    """Give parameters made by ``torch.empty`` no memory, and leave computed buffers (rotary tables) as they are.

    A meta default device would take both, and what a constructor computed could not be had again.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Redirect ``torch.empty`` calls that name no device."""
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
