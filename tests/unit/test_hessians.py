"""Hessians of linears: gathered with and without weights, damped, inverted in an order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mobiquant_compiler.baselines.gptq import gptq
from mobiquant_compiler.calibration.codes import factorize
from mobiquant_compiler.errors import NonFiniteActivations
from mobiquant_compiler.hessians import damped, gathered, inverse_factor


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))


def test_the_mean_over_all_tokens_of_all_calls() -> None:
    linears, x = {"a": nn.Linear(8, 4), "idle": nn.Linear(8, 4)}, inputs()
    with gathered(linears) as found:
        for part in x:
            linears["a"](part.unsqueeze(0))
        assert not found, "it is no mean yet"
    rows = x.view(-1, 8)
    assert list(found) == ["a"]
    torch.testing.assert_close(found["a"], rows.t() @ rows / 15)
    linears["a"](10 * x)
    torch.testing.assert_close(found["a"], rows.t() @ rows / 15)


def test_weights_go_to_tokens_in_the_order_of_their_coming() -> None:
    linear, x = nn.Linear(8, 4), inputs()
    weight = torch.linspace(0, 2, 15)
    with gathered({"a": linear}, {"a": weight, "other": torch.ones(1)}) as found:
        for part in x:
            linear(part.unsqueeze(0))
    wanted = torch.stack([w * row.outer(row) for w, row in zip(weight, x.view(-1, 8), strict=True)]).mean(0)
    torch.testing.assert_close(found["a"], wanted)


def test_half_precision_is_summed_in_float32() -> None:
    linear, x = nn.Linear(8, 4, dtype=torch.bfloat16), inputs().bfloat16()
    with gathered({"a": linear}) as found:
        linear(x)
    rows = x.float().view(-1, 8)
    torch.testing.assert_close(found["a"], rows.t() @ rows / 15)


def test_damping_leaves_the_original_and_frees_columns_that_were_always_zero() -> None:
    hessian = torch.diag(torch.tensor([1.0, 0.0, 4.0])).double()
    before = hessian.clone()
    assert damped(hessian, 0.5, "w").diagonal().tolist() == [2.0, 2.0, 5.0]
    assert torch.equal(hessian, before)


def test_the_factor_is_that_of_the_inverse_in_the_order_given() -> None:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    hessian, order = damped(rows.t() @ rows, 0.01, "w"), torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    upper = inverse_factor(hessian, order).double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.t() @ upper, hessian.inverse()[order][:, order], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("invert", [factorize, lambda h, damping, where: gptq(torch.ones(2, 4), h, 4, 4, where=where)])
def test_what_is_not_finite_is_refused_by_all(invert) -> None:
    hessian = torch.eye(4)
    hessian[2, 2] = torch.inf
    with pytest.raises(NonFiniteActivations, match=r"inputs of layer\.q gave 1 non-finite sums"):
        invert(hessian, 0.01, "layer.q")
