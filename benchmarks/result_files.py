"""Result files: where a run may write one, and what one holds; what is wrong is said in one line. Needs no torch."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

NO_LISTS: Mapping[str, Sequence[str]] = MappingProxyType({})


class BadResult(ValueError):
    """A file is no result file, or another one than is wanted."""


def output(text: str, example: str = "results.json") -> Path:
    """Return where a run is asked to write, for a command line: before anything is measured. Makes its folder.

    Raises:
        ArgumentTypeError: it is a folder or a device, or nothing can be written there.
    """
    path = Path(text)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder; wanted the name of a file, as {path / example}")
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"{text} is no file that can be replaced; wanted one, as {example}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # permissions do not tell: some file systems take no files
    except OSError as error:
        reason = f"{text}: {path.parent} cannot be made or written to: {os.strerror(error.errno or 0)}"
        raise argparse.ArgumentTypeError(f"{reason}; wanted a file in a folder of yours, as {example}") from error
    return path


def read(
    path: Path, measured_by: str, facts: Iterable[str] = (), lists: Mapping[str, Sequence[str]] = NO_LISTS
) -> dict[str, Any]:
    """Return what a result file holds.

    Args:
        path: The file.
        measured_by: What writes such files.
        facts: Names that it must have.
        lists: Names of lists that it must have, with the columns that each of their entries must have.

    Raises:
        BadResult: it cannot be read, is no JSON, or lacks some of that.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadResult(f"{path}: {os.strerror(error.errno or 0)}; measure first: {measured_by}") from error
    except ValueError as error:
        raise BadResult(f"{path} is no JSON ({error}); wanted a result file of {measured_by}") from error
    try:
        _check(content, facts, lists)
    except BadResult as error:
        raise BadResult(f"{path}: {error}; wanted a result file of {measured_by}") from error
    return content


def _check(content: Any, facts: Iterable[str], lists: Mapping[str, Sequence[str]]) -> None:
    if not isinstance(content, dict):
        raise BadResult(f"it holds no facts by name but a {type(content).__name__}")
    missing = [fact for fact in facts if fact not in content]
    if missing:
        raise BadResult(f"it has no {', '.join(missing)}; there are {', '.join(content)}")
    for name, columns in lists.items():
        entries(content, name, columns)


def entries(content: Mapping[str, Any], name: str, columns: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Return a list of a result file.

    Raises:
        BadResult: there is none, or one of its entries lacks a column.
    """
    found = content.get(name)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        lists = [key for key, value in content.items() if isinstance(value, list)]
        raise BadResult(f"it has no list named {name} of entries with columns; lists are {', '.join(lists) or 'none'}")
    missing = [column for column in columns if not all(column in entry for entry in found)]
    if missing:
        there = ", ".join(columns_of(found))
        raise BadResult(f"{name}: not every entry has {', '.join(missing)}; there are {there}")
    return found


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns, in the order in which rows have them."""
    return list(dict.fromkeys(column for row in rows for column in row))
