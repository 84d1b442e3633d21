"""Blocks as a chain: found, fed as the model feeds them, and refused where they are no chain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mobiquant_compiler.calibrate import next_token_loss
from mobiquant_compiler.calibration.blocks import Chain, find_blocks, watched, without_cache
from mobiquant_compiler.config import SliceConfig
from mobiquant_compiler.errors import NoBlocks
from mobiquant_compiler.quantize import select
from tests.models_tiny import TinyLM, seeded, tiny_llama, tiny_lm, tiny_mlp, tokens


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    return select(model, SliceConfig())[0]


@pytest.mark.parametrize(("make", "name"), [(tiny_lm, "layers"), (tiny_llama, "model.layers")])
def test_a_chain_gives_each_block_what_the_model_gives_it(make, name):
    model, ids = make(3), tokens(2, 16)
    blocks = find_blocks(model, linears_of(model))
    assert blocks == [f"{name}.{i}" for i in range(3)]
    wanted: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    for i, block in enumerate(blocks):
        model.get_submodule(block).register_forward_pre_hook(lambda m, a, i=i: wanted[i].append(a[0]))
    with torch.no_grad(), without_cache(model):
        for window in ids:
            next_token_loss(model, window.unsqueeze(0))
    wanted = {i: list(seen) for i, seen in wanted.items()}  # the chain's own runs follow
    chain = Chain(model, blocks, ids, next_token_loss)
    for i in range(3):
        assert all(torch.equal(a, b) for a, b in zip(chain.states, wanted[i], strict=False))
        before = list(chain.states)
        chain.run(i, advance=False)
        assert all(a is b for a, b in zip(chain.states, before, strict=True))
        chain.run(i, advance=True)


def test_inputs_are_seen_flat():
    model = tiny_lm(1)
    chain = Chain(model, ["layers.0"], tokens(3, 16), next_token_loss)
    seen: dict[str, list[tuple[int, ...]]] = {"q_proj": [], "down_proj": []}
    watch = {name: model.layers[0].get_submodule(name) for name in seen}
    with watched(watch, lambda name, x: seen[name].append(tuple(x.shape))):
        chain.run(0, advance=False)
    chain.run(0, advance=False)
    assert seen == {"q_proj": [(16, 64)] * 3, "down_proj": [(16, 96)] * 3}


def test_models_without_blocks_are_refused():
    model = tiny_mlp()
    with pytest.raises(NoBlocks, match="Sequential: no ModuleList holds a linear"):
        find_blocks(model, linears_of(model))


def test_linears_outside_the_blocks_are_named():
    model = tiny_lm(1)
    linears = select(model, SliceConfig(exclude=()))[0]
    with pytest.raises(NoBlocks, match="lm_head lies outside layers; exclude it"):
        find_blocks(model, linears)


class Branched(TinyLM):
    """Its second block does not read the output of the first."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.lm_head(self.layers[0](h) + self.layers[1](h))


class Half(TinyLM):
    """Its second block is not run."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.layers[0](self.embed(ids)))


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Branched, "block 1 is not fed the output of the block before"), (Half, "1 calls of 2 blocks in a forward pass")],
)
def test_blocks_that_are_no_chain_are_refused(kind, words):
    model = seeded(kind())
    with pytest.raises(NoBlocks, match=words):
        Chain(model, find_blocks(model, linears_of(model)), tokens(1, 8), next_token_loss)


def test_the_cache_is_off_only_within():
    model = tiny_llama(1)
    assert model.config.use_cache
    with without_cache(model):
        assert not model.config.use_cache
    assert model.config.use_cache
