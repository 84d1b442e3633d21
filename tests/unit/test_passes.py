"""Each pass: a hit, near-misses that stay, a second run that changes nothing, and the graph run for its numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import mobiquant_compiler as mq
from mobiquant_compiler import CompileConfig, SliceConfig, SliceSpec
from mobiquant_compiler.errors import TrainingGraph
from mobiquant_compiler.linear import MobiLinear
from mobiquant_compiler.passes.edit import own_graph
from mobiquant_compiler.report import SkipReason
from tests.graphs import capture, run_passes
from tests.models_tiny import Block, seeded, tiny_gpt2, tokens
from tests.tolerances import COMPILED, assert_near

NORMALISE, BIND, SHARE = ["normalise-linears"], ["normalise-linears", "bind-slices"], ["share-routing"]
EXPAND, FUSE = [*SHARE, "expand-elastic"], [*SHARE, "expand-elastic", "fuse-elastic"]
FULL = CompileConfig(slices=SliceConfig(scale_dtype="float32"))


class Call(nn.Module):
    """A module around a function of (module, x), with a square and an oblong matrix, vectors and a scalar."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.w, self.u = nn.Parameter(torch.randn(64, 64) / 8), nn.Parameter(torch.randn(64, 48) / 8)
        self.b, self.c = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(48))
        self.register_buffer("fixed", torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def inplace_between_product_and_sum(m: Call, x: Tensor) -> Tensor:
    x = x + 1
    y = torch.matmul(x, m.u)
    x.mul_(3)
    return (y + m.c) * x.sum()


HITS = {
    "addmm": (lambda m, x: torch.addmm(m.c, x, m.u), 1),
    "mm": (lambda m, x: torch.mm(x, m.u), 1),
    "matmul operator": (lambda m, x: x @ m.w, 1),
    "matmul method": (lambda m, x: x.matmul(m.u), 1),
    "matmul of the transpose": (lambda m, x: x @ m.w.t(), 1),
    "matmul of T": (lambda m, x: x @ m.w.T, 1),
    "matmul of transpose(0, 1)": (lambda m, x: x @ m.w.transpose(0, 1), 1),
    "matmul and sum": (lambda m, x: x @ m.u + m.c, 1),
    "sum the other way round": (lambda m, x: m.c + x @ m.u, 1),
    "matmul and sum in place": (lambda m, x: (x @ m.u).add_(m.c), 1),
    "three dimensions": (lambda m, x: x.view(1, *x.shape) @ m.u, 1),
    "input written to before the sum": (inplace_between_product_and_sum, 1),
    "product used twice": (lambda m, x: (lambda y: (y + m.c) * y)(x @ m.u), 1),
}
MISSES = {
    "scaled addmm": lambda m, x: torch.addmm(m.c, x, m.u, alpha=2),
    "weighted bias": lambda m, x: torch.addmm(m.c, x, m.u, beta=0.5),
    "full bias": lambda m, x: torch.addmm(m.w, m.w, m.w.t()) if x is None else torch.addmm(x, x, m.w),
    "product of activations": lambda m, x: x @ (x.t() @ x),
    "computed weight": lambda m, x: x @ (m.u * 2),
    "vector input": lambda m, x: x[0] @ m.u,
    "batched weight": lambda m, x: x @ m.w.view(1, 64, 64),
}


@pytest.mark.parametrize("name", HITS)
def test_normalise_linears_hits(name):
    function, hits = HITS[name]
    model, x = Call(function), torch.randn(5, 64)
    with torch.no_grad():
        wanted = model(x.clone())
    done = run_passes(model, [x], NORMALISE)
    assert done.reports[0].rewritten == hits
    assert done.targets().count("linear") == hits
    assert_near(done()[0], wanted, COMPILED)
    assert done.again("normalise-linears").rewritten == 0


@pytest.mark.parametrize("name", MISSES)
def test_normalise_linears_leaves_what_is_no_linear(name):
    model, x = Call(MISSES[name]), torch.randn(5, 64)
    gm, inputs = capture(model, x)
    before = [str(n.target) for n in own_graph(gm, inputs).graph.nodes]
    done = run_passes(model, [x], NORMALISE)
    assert done.reports[0].rewritten == 0
    assert [str(n.target) for n in done.gm.graph.nodes] == before


def quantized(block: nn.Module, **options) -> nn.Module:
    twin = copy.deepcopy(block)
    mq.quantize_(twin, SliceConfig(scale_dtype="float32", **options))
    return twin


def test_bind_slices_hits_and_equals_the_eager_modules():
    block, x = seeded(Block()), torch.randn(2, 9, 64)
    done = run_passes(block, [x], BIND, FULL)
    assert done.reports[1].rewritten == 7
    assert done.targets().count("elastic_linear") == 7
    assert "linear" not in done.targets()
    assert [b.name for b in done.ctx.bindings] == [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    with torch.no_grad():
        assert_near(done()[0], quantized(block)(x), COMPILED)
    again = done.again("bind-slices")
    assert (again.rewritten, again.skipped) == (0, ())


def test_bind_slices_appends_inputs_and_keeps_the_originals_first():
    model = Call(lambda m, x: linear(x, m.w) + linear(x, m.w, m.b))
    done = run_passes(model, [torch.randn(3, 64)], BIND)
    names = [n.name for n in done.gm.graph.nodes if n.op == "placeholder"]
    assert names[-8:] == [
        "mq_mask",
        *(f"mq0_{k}" for k in ["slices", "scale", "zero", "energy", "gain", "thresholds", "hist"]),
    ]
    assert len(names) == len(done.inputs) + 8, "one weight used twice is bound once"
    for node in list(done.gm.graph.nodes)[len(done.inputs) : len(names)]:
        # CUDA graphs then read the buffer itself: a copy would never see a new budget.
        assert node.meta["tensor_dict"]["_dynamo_static_input_type"] == "unguarded"


def test_bind_slices_binds_both_orientations_of_one_weight():
    model, x = Call(lambda m, x: linear(x, m.w) + x @ m.w), torch.randn(5, 64)
    done = run_passes(model, [x], BIND)
    assert [b.transposed for b in done.ctx.bindings] == [False, True]
    with torch.no_grad():
        spec = SliceSpec((2, 2, 2, 2), 64)
        parts = [MobiLinear.from_weight(w, None, spec, scale_dtype=torch.float32)(x) for w in (model.w, model.w.t())]
        assert_near(done()[0], parts[0] + parts[1], COMPILED)


def test_bind_slices_knows_conv1d_as_the_transpose():
    done = run_passes(tiny_gpt2(), [tokens(1, 5)], BIND)
    assert [b.transposed for b in done.ctx.bindings] == [True] * 4
    assert [b.name.rsplit(".", 1)[-1] for b in done.ctx.bindings] == ["c_attn", "c_proj", "c_fc", "c_proj"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


SKIPS = {
    SkipReason.NOT_A_WEIGHT: (Call(lambda m, x: linear(x, m.fixed)), {}),
    SkipReason.TOO_NARROW: (nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 64)), {}),
    SkipReason.EXCLUDED: (nn.ModuleDict({"lm_head": nn.Linear(64, 8)}), {}),
    SkipReason.NOT_INCLUDED: (nn.Sequential(nn.Linear(64, 8)), {"include": ("1",)}),
    SkipReason.TIED: (Tied(), {}),
}


class Head(nn.Module):
    """Runs one named child, so that the layer has that name."""

    def __init__(self, children: nn.ModuleDict) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.parametrize("reason", SKIPS)
def test_bind_slices_skips_with_a_reason(reason):
    model, options = SKIPS[reason]
    model = Head(model) if isinstance(model, nn.ModuleDict) else model
    x = tokens(2, 3) % 50 if reason is SkipReason.TIED else torch.randn(3, 64)
    done = run_passes(model, [x], BIND, CompileConfig(slices=SliceConfig(**options)))
    assert [skip.reason for skip in done.reports[1].skipped] == [reason]
    assert done.targets().count("linear") == 1
    with torch.no_grad():
        done()


def group_limited(m: Call, x: Tensor) -> Tensor:
    """Choose among groups of experts first, then among the experts of those, as DeepSeek's do."""
    scores = linear(x, m.w).sigmoid()
    groups = (scores + m.b).view(-1, 8, 8).topk(2, dim=-1)[0].sum(-1)
    kept = torch.zeros_like(groups).scatter_(1, groups.topk(4, dim=-1)[1], 1).bool()
    chosen = scores.masked_fill(~kept.repeat_interleave(8, -1), 0.0).topk(2, dim=-1)[1]
    return scores.gather(1, chosen).sum() * linear(x, m.u.t())


RANKED = {
    "softmax, then the best": lambda m, x: linear(x, m.w).softmax(-1).topk(2)[0].sum() * linear(x, m.u.t()),
    "the best, then softmax": lambda m, x: torch.topk(linear(x, m.w), 2)[0].softmax(-1).sum() * linear(x, m.u.t()),
    "one": lambda m, x: torch.argmax(linear(x, m.w), -1).sum() * linear(x, m.u.t()),
    "sorted": lambda m, x: linear(x, m.w).sort(-1)[0][:, 0].sum() * linear(x, m.u.t()),
    "best groups": group_limited,
}


@pytest.mark.parametrize("form", RANKED)
def test_bind_slices_leaves_what_chooses_experts(form):
    """A rounded score is another expert."""
    done = run_passes(Call(RANKED[form]), [torch.randn(3, 64)], BIND)
    (skip,) = done.reports[1].skipped
    assert (skip.reason, done.targets().count("linear")) == (SkipReason.RANKED, 1)
    assert [binding.spec.padded(64) for binding in done.ctx.bindings] == [64], "the other one is elastic"
    with torch.no_grad():
        done()


NOT_RANKED = {
    "a layer between": lambda m, x: linear(linear(x, m.w), m.u.t()).topk(2)[0],
    "scores of attention": lambda m, x: (linear(x, m.w) @ linear(x, m.w).t()).topk(2)[0] @ torch.ones(2, 1),
}


@pytest.mark.parametrize(("form", "ranked"), [("a layer between", 1), ("scores of attention", 0)])
def test_bind_slices_binds_what_is_ranked_later(form, ranked):
    done = run_passes(Call(NOT_RANKED[form]), [torch.randn(3, 64)], BIND)
    assert [skip.reason for skip in done.reports[1].skipped] == [SkipReason.RANKED] * ranked
    assert len(done.ctx.bindings) == 1


def test_bind_slices_skips_other_dtypes():
    odd = Call(lambda m, x: linear(x, m.w))
    odd.w = nn.Parameter(torch.randn(64, 64, dtype=torch.complex64))
    done = run_passes(odd, [torch.randn(3, 64, dtype=torch.complex64)], BIND)
    (skip,) = done.reports[1].skipped
    assert (skip.reason, skip.detail) == (SkipReason.DTYPE, "torch.complex64")


def test_bind_slices_refuses_to_train():
    gm, inputs = capture(nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64))
    from mobiquant_compiler.passes import PassContext, load_pass

    ctx = PassContext("graph-0", CompileConfig(), inputs)
    owned = own_graph(gm, inputs)
    with torch.enable_grad(), pytest.raises(TrainingGraph, match="gradients of the weight of 0; slices cannot"):
        load_pass("bind-slices").run(owned, ctx)


def calibrated_block() -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.embed = nn.Embedding(128, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return self.block(self.embed(ids))

    model = seeded(Wrapped())
    ids = tokens(2, 16)
    mq.quantize_(model, calibration=ids, loss=lambda m, t: m(t).square().mean(), budget=5)
    return model.block


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (SHARE, {"route": 2, "routed_linear": 5, "elastic_linear": 2}),
        (EXPAND, {"route": 4, "gather": 4, "slice_gemm": 7, "scatter": 7, "elastic_linear": 0}),
        (FUSE, {"route": 2, "routed_linear": 5, "elastic_linear": 2, "gather": 0, "scatter": 0, "getitem": 0}),
    ],
    ids=["share", "expand", "fuse"],
)
def test_routing_passes_hit_and_keep_the_result(names, counts):
    block, x = calibrated_block(), torch.randn(2, 9, 64) * 3
    done = run_passes(block, [x], names)
    assert {op: done.targets().count(op) for op in counts} == counts
    with torch.no_grad():
        assert torch.equal(done()[0], block(x))
    assert done.again(names[-1]).rewritten == 0


def test_dynamic_shapes_go_through_all_passes():
    block, shape = calibrated_block(), (2, 9, 64)
    done = run_passes(block, [torch.randn(shape)], FUSE, dynamic=True)
    assert any("Sym" in type(n.meta["example_value"]).__name__ for n in done.gm.graph.nodes if n.op == "placeholder")
    x = torch.randn(shape)
    done.inputs = [x if isinstance(v, Tensor) and v.shape == shape else v for v in done.inputs]
    with torch.no_grad():
        assert torch.equal(done()[0], block(x))


def one_router(number: int = 2) -> list[MobiLinear]:
    first = MobiLinear.from_weight(torch.randn(64, 64), None, SliceSpec((2, 2), 32))
    others = [MobiLinear.from_weight(torch.randn(64, 64), None, SliceSpec((2, 2), 32)) for _ in range(number - 1)]
    for other in others:
        other.router = first.router
    first.router.thresholds.fill_(float(first.router.energy.mean() * 64 * first.router.gain[0]))
    return [first, *others]


class Chain(nn.Module):
    def __init__(self, function, linears: list[MobiLinear]) -> None:
        super().__init__()
        self.linears, self.function = nn.ModuleList(linears), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.linears)


def written_between(x: Tensor, a: MobiLinear, b: MobiLinear) -> Tensor:
    x = x + 0
    first = a(x)
    x.mul_(torch.linspace(3, 0, x.shape[0]).unsqueeze(1))
    return first + b(x)


SHARE_MISSES = {
    "other input": lambda x, a, b: a(x) + b(x * 2),
    "input written to in between": written_between,
}


@pytest.mark.parametrize("name", SHARE_MISSES)
def test_share_routing_needs_the_very_same_input(name):
    model, x = Chain(SHARE_MISSES[name], one_router()), torch.randn(30, 64)
    done = run_passes(model, [x], FUSE)
    assert done.reports[0].rewritten == 0
    with torch.no_grad():
        assert_near(done()[0], model(x), COMPILED)


def test_share_routing_needs_the_same_router_and_enough_linears():
    own = Chain(lambda x, a, b: a(x) + b(x), [one_router(1)[0], one_router(1)[0]])
    assert run_passes(own, [torch.randn(3, 64)], SHARE).reports[0].rewritten == 0
    pair = Chain(lambda x, a, b: a(x) + b(x), one_router())
    assert run_passes(pair, [torch.randn(3, 64)], ["share-routing{min-linears=3}"]).reports[0].rewritten == 0
    assert run_passes(pair, [torch.randn(3, 64)], SHARE).reports[0].rewritten == 2


def test_sharing_counts_an_input_once():
    linears = one_router(3)
    model = Chain(lambda x, a, b, c: a(x) + b(x) + c(x), linears)
    done = run_passes(model, [torch.randn(5, 64)], SHARE)
    linears[0].router.hist.zero_()
    done()
    assert int(linears[0].router.hist.sum()) == 5


def test_fuse_elastic_leaves_chains_with_other_users_alone():
    model = Chain(lambda x, a: a(x), one_router(1))
    done = run_passes(model, [torch.randn(5, 64)], ["expand-elastic"])
    graph = done.gm.graph
    product = next(n for n in graph.nodes if "slice_gemm" in str(n.target))
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((*output.args[0], product),)
    from mobiquant_compiler.passes import load_pass

    assert load_pass("fuse-elastic").run(done.gm, done.ctx).rewritten == 0
    assert product in graph.nodes


def test_new_nodes_tell_where_they_came_from_and_what_they_hold():
    done = run_passes(calibrated_block(), [torch.randn(2, 9, 64)], FUSE)
    made = [n for n in done.gm.graph.nodes if "mobiquant" in str(n.target)]
    for node in made:
        assert node.meta["val"] is not None
        assert "mq_origin" in node.meta
        assert node.meta["stack_trace"]
    assert made[-1].meta["mq_origin"][1:] == ("expand-elastic", "fuse-elastic")
