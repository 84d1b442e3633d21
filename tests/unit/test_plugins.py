"""Passes by name, as the command line meets them: none at all, and plugins that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint

import pytest

from mobiquant_compiler.errors import BrokenPass
from mobiquant_compiler.passes import DEFAULT_PIPELINE, registry

Run = Callable[..., tuple[int, str, str]]


class Undressed:
    """A pass by its parts, without the fields of a dataclass."""

    name, after = "undressed", frozenset[str]()

    def run(self) -> None: ...


def test_no_pass_at_all(fails: Callable[..., str], elastic: str) -> None:
    assert "option 'passes' got ''; wanted names of passes" in fails("explain", elastic, "-p", "")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:Polish", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("mobiquant_compiler.spec:Polish", "AttributeError: module 'mobiquant_compiler.spec' has no attribute"),
        ("mobiquant_compiler.spec:SliceSpec", "it has no name, after, run"),
        ("tests.unit.test_plugins:Undressed", "it is no dataclass"),
    ],
)
def test_a_plugin_that_cannot_be_used_costs_its_own_row(
    target: str, reason: str, run: Run, fails: Callable[..., str], elastic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = EntryPoint("polish", target, registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [plugin])
    monkeypatch.setattr(registry, "all_passes", registry.all_passes.__wrapped__)
    *others, row = json.loads(run("passes", "--json")[1])
    assert [other["name"] for other in others] == list(DEFAULT_PIPELINE)
    assert row["name"] == "polish"
    assert reason in row["about"]
    with pytest.raises(BrokenPass):
        registry.load_pass("polish")
    said = fails("explain", elastic, "-p", "polish")
    assert f"'polish' is registered as {target!r}, which cannot be used: {reason}" in said
