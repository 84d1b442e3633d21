"""Going through a model stage by stage, each stage's inputs coming from the stages that were already changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from mobiquant_compiler.blocks import Chain, find_blocks, members
from mobiquant_compiler.errors import NoBlocks
from mobiquant_compiler.evaluation import logits_of

Run = Callable[[], None]  # runs the calibration windows through the stage at hand


def stages(model: nn.Module, linears: Mapping[str, nn.Module], windows: Tensor) -> Iterator[tuple[list[str], Run]]:
    """Yield the linears of one stage after the other, and what runs the calibration windows through that stage.

    A stage is a block. Where the blocks are no chain the whole model runs for each of them instead: slower, and the
    same result. Linears outside the blocks come first or last, in one stage of the whole model: by their place in the
    model.

    Args:
        model: In eval mode.
        linears: Wanted linears by name.
        windows: Ids [count, length], on the model's device.
    """
    blocks = find_blocks(model, linears)
    inside = [members(block, linears) for block in blocks]
    held = {name for names in inside for name in names}
    first = next((i for i, name in enumerate(linears) if name in held), len(linears))
    before = list(linears)[:first]
    after = [name for name in list(linears)[first:] if name not in held]
    whole = partial(_run_model, model, windows)
    if before:
        yield before, whole
    if blocks:
        yield from _block_stages(model, blocks, inside, windows, whole)
    if after:
        yield after, whole


def _block_stages(
    model: nn.Module, blocks: list[str], inside: list[list[str]], windows: Tensor, whole: Run
) -> Iterator[tuple[list[str], Run]]:
    chain = _chain(model, blocks, windows)
    for index, names in enumerate(inside):
        if names:
            yield names, whole if chain is None else partial(chain.run, index, advance=False)
        if chain is not None:
            chain.run(index, advance=True)


def _chain(model: nn.Module, blocks: list[str], windows: Tensor) -> Chain | None:
    try:
        return Chain(model, blocks, windows, logits_of)
    except NoBlocks:
        return None


def _run_model(model: nn.Module, windows: Tensor) -> None:
    for window in windows:
        logits_of(model, window.unsqueeze(0))
