"""Blocks as a chain: found, fed as the model feeds them, and refused where they are no chain."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler.blocks import Chain, blocks_of_all, find_blocks, members, without_cache
from mobiquant_compiler.calibrate import next_token_loss
from mobiquant_compiler.config import SliceConfig
from mobiquant_compiler.errors import NoBlocks
from mobiquant_compiler.evaluation import logits_of
from mobiquant_compiler.hooks import watched
from mobiquant_compiler.linear import elastic_linears
from mobiquant_compiler.quantize import select
from tests.models_tiny import VOCABULARY, TinyLM, seeded, tiny_gpt2, tiny_llama, tiny_lm, tiny_mlp, tokens


def linears_of(model: nn.Module) -> list[str]:
    return list(select(model, SliceConfig())[0])


class Odd(nn.Module):
    """Three linears as blocks, that a model may do more with than call one after the other."""

    STEPS: ClassVar = {
        "plain": lambda block, x: block(x),
        "in place": lambda block, x: block(x),
        "keyword": lambda block, x: block(x=x),
        "residual outside": lambda block, x: x + block(x),
        "added in place": lambda block, x: block(x).add_(1),
        "twice": lambda block, x: block(block(x)),
        "no tensor": lambda block, x: block([x]),
        "counting": lambda block, x: block(x),
        "once": lambda block, x: block(x),
        "pair": lambda block, x: block(x)["x"],
    }

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.step = self.STEPS[kind]
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(OddBlock(kind) for _ in range(3))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = self.step(block, x)
        return self.head(x)


class OddBlock(nn.Linear):
    """A linear that may take a list, write to its input, or know how often it ran."""

    def __init__(self, kind: str) -> None:
        super().__init__(32, 32)
        self.kind, self.calls = kind, 0

    def forward(self, x: Tensor | list[Tensor]) -> Any:
        x = x[0] if isinstance(x, list) else x
        self.calls += 1
        if self.kind == "in place":
            x += 1
        if self.kind == "once" and self.calls > 1:
            raise RuntimeError("no state left")
        y = super().forward(x)
        return y * self.calls if self.kind == "counting" else {"x": y} if self.kind == "pair" else y


ODD_BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
CHAINS = ("plain", "in place", "keyword")
REFUSED = {
    "residual outside": "block 1 is not fed the output of the block before",
    "added in place": "block 1 is not fed the output of the block before",
    "twice": "6 calls of 3 blocks in a forward pass",
    "no tensor": "block 0 is fed no tensor",
    "counting": "block 0 run alone does not give what it gives inside the model",
    "once": r"block 0 cannot be run alone \(RuntimeError: no state left\)",
    "pair": "block 1 is not fed the output of the block before",
}


class TestFind:
    @pytest.mark.parametrize(("make", "name"), [(tiny_lm, "layers"), (tiny_llama, "model.layers")])
    def test_the_entries_of_the_list_that_holds_most_linears(self, make, name: str) -> None:
        model = make(3)
        assert find_blocks(model, linears_of(model)) == [f"{name}.{i}" for i in range(3)]
        assert blocks_of_all(model, linears_of(model)) == find_blocks(model, linears_of(model))

    def test_a_longer_list_inside_a_block_is_not_it(self) -> None:
        model = tiny_lm(2)
        model.layers[0].experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))
        assert find_blocks(model, linears_of(model)) == ["layers.0", "layers.1"]

    def test_members_are_told_by_whole_names(self) -> None:
        assert members("blocks.1", ["blocks.1", "blocks.1.q", "blocks.11.q", "q"]) == ["blocks.1", "blocks.1.q"]

    def test_models_without_blocks(self) -> None:
        model = tiny_mlp()
        assert find_blocks(model, linears_of(model)) == []
        with pytest.raises(NoBlocks, match="Sequential: no ModuleList holds a linear"):
            blocks_of_all(model, linears_of(model))

    def test_linears_outside_the_blocks_are_named(self) -> None:
        model = tiny_lm(1)
        linears = list(select(model, SliceConfig(exclude=()))[0])
        assert find_blocks(model, linears) == ["layers.0"]
        with pytest.raises(NoBlocks, match="lm_head lies outside layers; exclude it"):
            blocks_of_all(model, linears)


class TestChain:
    @pytest.mark.parametrize("forward", [next_token_loss, logits_of])
    @pytest.mark.parametrize("make", [tiny_lm, tiny_llama, lambda layers: tiny_gpt2()])
    def test_gives_each_block_what_the_model_gives_it(self, make, forward) -> None:
        model, ids = make(3), tokens(2, 16)
        blocks = find_blocks(model, linears_of(model))
        seen: list[list[Tensor]] = [[] for _ in blocks]
        for i, block in enumerate(blocks):
            model.get_submodule(block).register_forward_pre_hook(lambda m, a, i=i: seen[i].append(a[0]))
        with torch.no_grad(), without_cache(model):
            for window in ids:
                forward(model, window.unsqueeze(0))
        wanted = [list(inputs) for inputs in seen]  # the chain's own runs follow
        chain = Chain(model, blocks, ids, forward)
        for i in range(len(blocks)):
            assert all(torch.equal(a, b) for a, b in zip(chain.states, wanted[i], strict=True))
            before = list(chain.states)
            chain.run(i, advance=False)
            assert all(a is b for a, b in zip(chain.states, before, strict=True))
            chain.run(i, advance=True)

    @pytest.mark.parametrize("kind", CHAINS)
    def test_inputs_are_kept_as_they_were(self, kind: str) -> None:
        torch.manual_seed(0)
        model, ids = Odd(kind).eval(), tokens(2, 8)
        chain = Chain(model, ODD_BLOCKS, ids, logits_of)
        assert torch.equal(torch.cat(chain.states), model.embed(ids))
        for i in range(3):
            before = [state.clone() for state in chain.states]
            chain.run(i, advance=False)
            assert all(torch.equal(a, b) for a, b in zip(chain.states, before, strict=True))
            chain.run(i, advance=True)
        assert torch.allclose(model.head(torch.cat(chain.states)), model(ids), atol=1e-5)

    def test_each_window_brings_its_own_arguments(self) -> None:
        """A block may get more than hidden states, and other values in each window."""
        model, ids = seeded(Shifted(2)), tokens(3, 8)
        chain = Chain(model, ["layers.0", "layers.1"], ids, logits_of)
        for i in range(2):
            chain.run(i, advance=True)
        assert torch.allclose(model.lm_head(torch.cat(chain.states)), model(ids), atol=1e-4)
        first, others = chain._calls[0], chain._calls[1:]
        assert all(calls[1].kwargs["same"] is first[1].kwargs["same"] for calls in others), "equal ones are kept once"
        assert all(calls[1].kwargs["shift"] is not first[1].kwargs["shift"] for calls in others)

    def test_a_module_in_the_place_of_a_block_is_what_runs(self) -> None:
        model, ids = Odd("plain").eval(), tokens(1, 8)
        chain = Chain(model, ODD_BLOCKS, ids, logits_of)
        model.blocks[0] = nn.Identity()
        before = chain.states[0]
        chain.run(0, advance=True)
        assert torch.equal(chain.states[0], before)

    def test_what_is_not_finite_goes_through(self) -> None:
        """Such a model has a message of its own, which names the linear."""
        model = tiny_lm(2)
        with torch.no_grad():
            model.layers[0].down_proj.bias.fill_(float("nan"))
        chain = Chain(model, ["layers.0", "layers.1"], tokens(1, 8), next_token_loss)
        chain.run(0, advance=True)
        assert chain.states[0].isnan().all()

    def test_half_precision_may_round(self) -> None:
        model = tiny_lm(2).to(torch.bfloat16)
        assert Chain(model, ["layers.0", "layers.1"], tokens(1, 8), logits_of).states[0].dtype == torch.bfloat16

    @pytest.mark.parametrize(("kind", "words"), REFUSED.items(), ids=REFUSED)
    def test_odd_blocks_are_refused(self, kind: str, words: str) -> None:
        with pytest.raises(NoBlocks, match=f"Odd: {words}"):
            Chain(Odd(kind).eval(), ODD_BLOCKS, tokens(1, 8), next_token_loss)

    @pytest.mark.parametrize("kind", ["branched", "half", "backwards", "nothing at the end"])
    def test_models_that_are_no_chain_are_refused(self, kind: str) -> None:
        words = {
            "branched": "block 1 is not fed the output of the block before",
            "half": "1 calls of 2 blocks in a forward pass",
            "backwards": "its blocks do not run in their order",
            "nothing at the end": "block 1 gives no tensor",
        }
        model = seeded(Wild(kind))
        with pytest.raises(NoBlocks, match=f"Wild: {words[kind]}"):
            Chain(model, find_blocks(model, linears_of(model)), tokens(1, 8), next_token_loss)


class Shifted(TinyLM):
    """Its blocks get a tensor of the window and one that is the same for all, by keyword."""

    def forward(self, ids: Tensor) -> Tensor:
        h, shift = self.embed(ids), ids[:, :1].float() / VOCABULARY
        for layer in self.layers:
            h = layer(h, shift=shift.unsqueeze(-1), same=torch.ones(1))
        return self.lm_head(h)

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        for layer in self.layers:
            inner = layer.forward
            layer.forward = lambda x, shift, same, inner=inner: inner(x + shift * same)


class Wild(TinyLM):
    """Its two blocks do not run one after the other."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "nothing at the end":
            inner = self.layers[1].forward
            self.layers[1].forward = lambda x: {"x": inner(x)}

    def forward(self, ids: Tensor) -> Tensor:
        first, second = self.layers
        h = self.embed(ids)
        if self.kind == "half":
            return self.lm_head(first(h))
        if self.kind == "branched":
            return self.lm_head(first(h) + second(h))
        if self.kind == "backwards":
            return self.lm_head(first(second(h)))
        return self.lm_head(second(first(h))["x"])


def test_linears_that_are_blocks_themselves_can_be_calibrated() -> None:
    torch.manual_seed(0)
    model, ids = Odd("plain"), tokens(4, 16)
    model.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
    with torch.no_grad():
        wanted = model.eval()(ids)
    slices = SliceConfig(exclude=("head",), group=32)
    mq.calibrate_(model, ids, mq.CalibrationConfig(tune_steps=2, router="mlp", router_steps=2), slices=slices)
    assert sorted(elastic_linears(model)) == ODD_BLOCKS
    with torch.no_grad():
        assert (model(ids) - wanted).norm() < 0.05 * wanted.norm()


def test_inputs_are_seen_flat() -> None:
    model = tiny_lm(1)
    chain = Chain(model, ["layers.0"], tokens(3, 16), next_token_loss)
    seen: dict[str, list[tuple[int, ...]]] = {"q_proj": [], "down_proj": []}
    watch = {name: model.layers[0].get_submodule(name) for name in seen}
    with watched(watch, lambda name, x: seen[name].append(tuple(x.shape))):
        chain.run(0, advance=False)
    chain.run(0, advance=False)
    assert seen == {"q_proj": [(16, 64)] * 3, "down_proj": [(16, 96)] * 3}


def test_the_cache_is_off_only_within() -> None:
    model = tiny_llama(1)
    assert model.config.use_cache
    with without_cache(model):
        assert not model.config.use_cache
    assert model.config.use_cache
