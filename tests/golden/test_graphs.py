"""Rendered graphs of one block before and after every pass; MOBIQUANT_ACCEPT=1 writes what is seen now.

The text is what `mobiquant dump` shows: review a change to it as code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler.dump import render
from mobiquant_compiler.passes import DEFAULT_PIPELINE
from tests.graphs import capture, run_passes
from tests.models_tiny import Block, seeded

GRAPHS = Path(__file__).parent / "graphs"
ACCEPT = any(os.environ.get(name) == "1" for name in ("MOBIQUANT_ACCEPT", "EXPECTTEST_ACCEPT"))
STEPS = ["input", *DEFAULT_PIPELINE]


def quantized(block: Block) -> Block:
    """Return the block with elastic linears; q, k and v share a router, gate and up another."""
    mq.quantize_(block)
    block.k_proj.router = block.v_proj.router = block.q_proj.router
    block.up_proj.router = block.gate_proj.router
    return block


MODELS = {"plain": lambda block: block, "quantized": quantized}


@pytest.fixture(scope="module", params=MODELS)
def rendered(request) -> tuple[str, dict[str, str]]:
    """The text of the graph after each step of the default pipeline, batch and length symbolic."""
    model = MODELS[request.param](seeded(Block()))
    texts: dict[str, str] = {}
    x = torch.randn(2, 9, 64)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    run_passes(model, [x], DEFAULT_PIPELINE, observe=lambda step, name, gm: texts.update({name: render(gm)}))
    return request.param, texts


@pytest.mark.parametrize("step", STEPS)
def test_graph_is_as_reviewed(rendered, step):
    kind, texts = rendered
    file = GRAPHS / kind / f"{STEPS.index(step):02d}-{step}.fx"
    if ACCEPT:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(texts[step], encoding="utf-8")
    assert texts[step] == file.read_text(encoding="utf-8"), f"{file.name}: `make golden`, review the diff"


def test_no_graph_is_left_over():
    assert {f.relative_to(GRAPHS).as_posix() for f in GRAPHS.rglob("*.fx")} == {
        f"{kind}/{number:02d}-{step}.fx" for kind in MODELS for number, step in enumerate(STEPS)
    }


def test_two_captures_render_the_same():
    texts = [render(capture(seeded(Block()), torch.randn(2, 9, 64), dynamic=True)[0]) for _ in range(2)]
    assert texts[0] == texts[1]


def test_symbols_do_not_depend_on_the_names_of_variables():
    class First(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    class Second(nn.Module):
        def forward(self, tokens: Tensor, another_name: Tensor) -> Tensor:
            return tokens @ another_name

    texts = []
    for model, names in ((First(), ("x", "y")), (Second(), ("tokens", "another_name"))):
        gm, _ = capture(model, torch.randn(4, 5), torch.randn(5, 6), dynamic=True)
        text = render(gm)
        for number, name in enumerate(names):
            text = re.sub(rf"\bl_{name}_", f"l_{number}_", text)
        texts.append(text)
    assert texts[0] == texts[1]
    assert "s_0" in texts[0]
    assert not re.search(r"\bs\d", texts[0])
