"""Errors: every class fills its template, survives pickling with notes, and names none of our files."""

from __future__ import annotations

import pickle
import re
import string

import pytest
import torch

from mobiquant_compiler import errors
from mobiquant_compiler.errors import MobiQuantError, PassFailed, VerifyError


def all_classes(base: type[MobiQuantError] = MobiQuantError) -> list[type[MobiQuantError]]:
    """Return every error class of the package."""
    found = [base]
    for cls in base.__subclasses__():
        found += all_classes(cls)
    return [cls for cls in found if cls.__module__ == errors.__name__]


CLASSES = all_classes()


def fields_of(cls: type[MobiQuantError]) -> dict[str, object]:
    """Return a value for each field of the template; numbers where it formats numbers."""
    found = [(name, spec) for _, name, spec, _ in string.Formatter().parse(cls.message) if name]
    return {name: 7 if spec else f"<{name}>" for name, spec in found}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_templates_fill_and_round_trip_with_notes(cls):
    fields = fields_of(cls)
    error = cls(**fields)
    assert str(error)
    assert "{" not in str(error)
    for value in fields.values():
        assert str(value) in str(error)
    error.add_note("graph around the node")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert str(back) == str(error)
    assert back.fields == fields
    assert back.__notes__ == ["graph around the node"]


@pytest.mark.parametrize("cls", [c for c in CLASSES if "message" in vars(c)], ids=lambda c: c.__name__)
def test_messages_say_what_and_what_to_do(cls):
    assert cls.__doc__ is None or cls.__doc__
    assert not re.search(r"\w+\.py\b", cls.message), "a message names none of our files"
    if cls is not MobiQuantError:
        assert len(fields_of(cls)) >= 1
        assert cls.message.rstrip().endswith((".", "}", "`", "'")), "a whole sentence"


def test_a_missing_field_is_noticed_where_the_error_is_raised():
    with pytest.raises(KeyError, match="got"):
        errors.BadOption(where="x", name="y", wanted="z")


def test_families():
    for family in ("Config", "Weight", "Budget", "Graph", "Codegen", "Checkpoint", "Model"):
        assert issubclass(getattr(errors, f"{family}Error"), MobiQuantError)


def test_errors_around_other_objects_pickle():
    class Local(Exception):
        """Cannot be pickled: its class has no importable name."""

    op = torch.ops.mobiquant.scatter.default
    for error in (
        PassFailed(name="p", graph="g", where="w", reason=str(Local("why")), dump=""),
        VerifyError(name="p", what="w", node="n", got=torch.float32, wanted=[str(op)]),
    ):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
