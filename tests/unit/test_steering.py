"""The control loop of `follow_budget`, by numbers alone."""

from __future__ import annotations

import math

import pytest

from mobiquant_compiler.runtime.steering import MEMORY, Steering


@pytest.mark.parametrize("bits", [2.0, 8.0, math.nan])
def test_stays_inside_whatever_it_sees(bits: float) -> None:
    loop = Steering(4.0, 2.0, 8.0, 10, 4.0)
    for number in range(1, 50):
        aim = loop.update(2.0 if math.isnan(bits) and number % 2 else 8.0 if math.isnan(bits) else bits, 10, 5, 10)
        assert 2 < aim < 8
    assert loop.weight == MEMORY


def test_a_right_table_is_left_where_it_is() -> None:
    loop = Steering(4.0, 2.0, 8.0, 10, 4.0)
    for number in range(1, 20):
        assert loop.update(loop.aim, 10, 4.0, 10 * number) == pytest.approx(4.0)


def test_a_long_call_weighs_more_than_a_short_one() -> None:
    short, long = Steering(4.0, 2.0, 8.0, 10, 4.0), Steering(4.0, 2.0, 8.0, 10, 4.0)
    for loop, count in ((short, 10), (long, 40)):
        loop.update(4.0, 10, 4.0, 10)
        loop.update(4.5, count, 4.0, 1)
    assert long.aim < short.aim < 4
