"""Going through a model block by block, each block's inputs coming from the blocks that were already changed.

The blocks are the model's longest list of modules that hold wanted linears. Their inputs are caught in one pass over
the calibration windows; after that only the block at hand runs. Where a block cannot be run from what was caught (it
does not give what it gave inside the model), the whole model runs for each block instead: slower, and the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mobiquant_compiler.evaluation import logits_of
from mobiquant_compiler.hooks import removing

Run = Callable[[], None]  # runs the calibration windows through the block at hand


def find_blocks(model: nn.Module, linears: Mapping[str, nn.Module]) -> tuple[str, list[nn.Module]]:
    """Return the name and the members of the longest module list that holds any of `linears`; "" and none without."""
    found: tuple[str, list[nn.Module]] = ("", [])
    for name, module in model.named_modules():
        holds = any(key.startswith(f"{name}.") for key in linears)
        if isinstance(module, nn.ModuleList) and holds and len(module) > len(found[1]):
            found = name, list(module)
    return found


def stages(model: nn.Module, linears: Mapping[str, nn.Module], windows: Tensor) -> Iterator[tuple[list[str], Run]]:
    """Yield the linears of one stage after the other, and what runs the calibration windows through that stage.

    Linears outside the blocks come first or last, in one stage of the whole model: by their place in the model.

    Args:
        model: In eval mode.
        linears: Wanted linears by name.
        windows: Ids [count, length], on the model's device.
    """
    prefix, blocks = find_blocks(model, linears)
    inside: dict[int, list[str]] = {index: [] for index in range(len(blocks))}
    before: list[str] = []
    after: list[str] = []
    for name in linears:
        if prefix and name.startswith(f"{prefix}."):
            inside[int(name.removeprefix(f"{prefix}.").partition(".")[0])].append(name)
        else:
            (after if any(inside.values()) else before).append(name)
    whole = partial(_run_model, model, windows)
    if before:
        yield before, whole
    yield from _block_stages(model, blocks, list(inside.values()), windows)
    if after:
        yield after, whole


def _run_model(model: nn.Module, windows: Tensor) -> None:
    for window in windows:
        logits_of(model, window.unsqueeze(0))


def _block_stages(
    model: nn.Module, blocks: Sequence[nn.Module], names: Sequence[list[str]], windows: Tensor
) -> Iterator[tuple[list[str], Run]]:
    if not blocks:
        return
    walk = _Walk(model, blocks, windows)
    for index, members in enumerate(names):
        if members:
            yield members, partial(walk.run, index)
        walk.advance(index)


class _Walk:
    """The hidden states before the block at hand, one tensor a window."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], windows: Tensor) -> None:
        self.model, self.blocks, self.windows = model, blocks, windows
        self.hidden: list[Tensor] = []
        self.others: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # by window and block
        self.alone = True
        for window in windows:
            outputs = self._catch(window)
            if len(self.others[-1]) != len(blocks) or len(self.hidden) != len(self.others):
                self.alone = False  # a block that ran twice, not at all, or on no tensor
            elif len(self.hidden) == 1:
                self.alone = self._reproduces(outputs)
            if not self.alone:
                break

    def _catch(self, window: Tensor) -> list[Tensor]:
        """Run one window through the model; keep what the first block got, and what each got besides.

        Returns:
            What each block gave, of the first window only.
        """
        others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[Tensor] = []
        first = not self.others

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs = _with_hidden_first(args, kwargs)
            if not others and args and isinstance(args[0], Tensor):
                self.hidden.append(args[0].detach().clone())  # the block may write to it
            others.append((args[1:], kwargs))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if first:  # a copy, as above
                outputs.append(_hidden_of(output).clone())

        handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in self.blocks]
        handles += [b.register_forward_hook(after) for b in self.blocks]
        with removing(handles):
            logits_of(self.model, window.unsqueeze(0))
        self.others.append(others)
        return outputs

    def _reproduces(self, outputs: Sequence[Tensor]) -> bool:
        """Say whether the blocks, run one after the other on the first window, give what they gave in the model."""
        hidden = self.hidden[0]
        for index, expected in enumerate(outputs):
            try:
                hidden = self._through(index, 0, hidden)
            except (TypeError, ValueError, RuntimeError):
                return False  # it needs more than it was seen to get
            if hidden.shape != expected.shape or not torch.allclose(hidden, expected, rtol=1e-3, atol=1e-4):
                return False
        return True

    def _through(self, index: int, window: int, hidden: Tensor) -> Tensor:
        args, kwargs = self.others[window][index]
        # A copy, as some blocks add to their input in place, and it is needed again.
        return _hidden_of(self.blocks[index](hidden.clone(), *args, **kwargs))

    def run(self, index: int) -> None:
        """Run all windows through one block, for what hooks see of it."""
        if not self.alone:
            _run_model(self.model, self.windows)
            return
        for window, hidden in enumerate(self.hidden):
            self._through(index, window, hidden)

    def advance(self, index: int) -> None:
        """Let the hidden states pass one block as it is now."""
        if self.alone:
            self.hidden = [self._through(index, window, hidden) for window, hidden in enumerate(self.hidden)]


def _with_hidden_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return args, kwargs
    name = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
    if name is None:
        return args, kwargs
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def _hidden_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
