"""Shapes, numbers of tokens and cases of one linear, as command lines name them."""

from __future__ import annotations

import argparse


def shape(text: str) -> tuple[int, int]:
    """Read ``NxK``."""
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; wanted NxK, as 4096x4096")
    return int(n), int(k)


def token_count(text: str) -> int:
    """Read a number of tokens."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; wanted 1 or more")
    return int(text)


def case(text: str) -> tuple[int, int, str]:
    """Read ``tokens:slices``, whose counts are uniform, or ``tokens:slices:counts``."""
    parts = text.split(":")
    tokens, slices, counts = [*parts, "uniform"] if len(parts) == 2 else parts if len(parts) == 3 else ("", "", "")
    known = tokens.isdecimal() and int(tokens) and slices in ("1", "2", "3", "4") and counts in ("uniform", "mixed")
    # Many unlike tokens always have up to four slices, in the shares of the benchmark.
    if not known or (counts == "mixed" and int(tokens) > 64 and slices != "4"):
        wanted = "tokens:slices[:mixed] as 8:2:mixed, of 1 to 4 slices (4 of more than 64 mixed tokens)"
        raise argparse.ArgumentTypeError(f"{text!r} is no case; wanted {wanted}")
    return int(tokens), int(slices), counts
