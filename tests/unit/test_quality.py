"""Quality against budget, and the warning when a budget costs too much."""

from __future__ import annotations

import math

import pytest
from torch import nn

import mobiquant_compiler as mq
from mobiquant_compiler.analysis import quality
from mobiquant_compiler.analysis.quality import QualityRow
from mobiquant_compiler.evaluation import perplexity
from tests.models_tiny import tiny_lm, tokens

WINDOWS = tokens(3, 16)


@pytest.fixture(scope="module")
def elastic() -> nn.Module:
    model = tiny_lm()
    mq.quantize_(model, mq.SliceConfig(ceiling={"*.o_proj": 3}), calibration=tokens(4, 32))
    return model


def row(ratio: float | None, method: str = "mobiquant") -> QualityRow:
    return QualityRow(method, 4.0, 4.0, 40.0, 10, 1.0, ratio=ratio, reference="unquantized")


class TestRows:
    def test_plain_model_and_static_methods(self) -> None:
        model = tiny_lm()
        rows = list(quality.plain_rows(model, WINDOWS, ["rtn"], [3, 4]))
        assert [(r.method, r.budget, r.implementation) for r in rows] == [
            ("unquantized", None, None),
            ("rtn", 3.0, "mobiquant_compiler"),
            ("rtn", 4.0, "mobiquant_compiler"),
        ]
        assert rows[0].perplexity == pytest.approx(perplexity(model, WINDOWS))

    def test_elastic_model_and_ratios(self, elastic: nn.Module) -> None:
        plain = next(iter(quality.plain_rows(tiny_lm(), WINDOWS)))
        rows = quality.with_ratios(list(quality.elastic_rows(elastic, WINDOWS, [6, 3])), plain)
        assert [r.budget for r in rows] == [6, 3]
        assert all(r.ratio == pytest.approx(r.perplexity / plain.perplexity) for r in rows)
        assert all(r.reference == "unquantized" for r in rows)
        assert rows[0].to_dict()["method"] == "mobiquant"

    def test_all_slices_stand_in_for_the_unquantized_model(self, elastic: nn.Module) -> None:
        greatest = quality.greatest_budget(elastic)
        assert 7 < greatest < 8, "a ceiling is in the way"
        reference = quality.reference_row(elastic, WINDOWS)
        assert reference.budget == greatest
        (found,) = quality.quick_check(elastic, WINDOWS, [4])
        assert found.reference == "all slices"
        assert found.ratio == pytest.approx(found.perplexity / reference.perplexity)

    def test_quick_check_against_the_unquantized_model(self, elastic: nn.Module) -> None:
        plain = next(iter(quality.plain_rows(tiny_lm(), WINDOWS)))
        assert [r.reference for r in quality.quick_check(elastic, WINDOWS, [4, 3], plain)] == ["unquantized"] * 2


class TestWarning:
    @pytest.mark.parametrize(
        ("found", "worse"),
        [
            (row(1.2), False),
            (row(1.25), False),
            (row(1.26), True),
            (row(math.nan), True),
            (row(math.inf), True),
            (row(None), False),
            (row(9.0, "rtn"), False),
        ],
    )
    def test_ours_above_the_ratio(self, found: QualityRow, worse: bool) -> None:
        assert quality.WORSE_THAN == 1.25
        assert quality.is_worse(found) is worse

    def test_other_ratios(self) -> None:
        assert quality.is_worse(row(1.2), 1.1)
        assert not quality.is_worse(row(3.0), 4)
        assert not quality.is_worse(row(99.0), 0), "0 never warns"

    def test_says_what_and_how_much(self) -> None:
        text = quality.warning(row(1.5), 1.25)
        assert text.startswith("warning: budget 4 makes perplexity 1.50 times that of the unquantized model (40 on")
        assert "above 1.25 times" in text
