"""The quick check of `mobiquant quantize`: what budgets cost, on a few windows, before anybody relies on them."""

from __future__ import annotations

from typing import Any

from mobiquant_compiler.cli.console import Report, note, pick_budgets
from mobiquant_compiler.cli.evaluate import warn
from mobiquant_compiler.cli.loading import Loaded, text_windows
from mobiquant_compiler.errors import BadOption

TEXT = "pydoc"  # never the text of the calibration


class QuickCheck:
    """Measures the plain model when made, and its budgets after it was quantized."""

    def __init__(
        self, loaded: Loaded, source: str, windows: int, length: int, warn_ratio: float, report: Report
    ) -> None:
        from mobiquant_compiler.analysis import quality

        self.loaded, self.warn_ratio, self.report = loaded, warn_ratio, report
        self.tokens = self.reference = None
        if windows == 0:
            return
        if loaded.tokenizer is None:
            note("the budgets are not checked: the directory has no tokenizer (--check-windows 0 says so)")
            return
        self.tokens = text_windows(loaded, source, TEXT, windows, length)
        self.reference = next(iter(quality.plain_rows(loaded.model, self.tokens, progress=report)))

    @staticmethod
    def refuse(windows: int, warn_ratio: float) -> None:
        """Refuse wrong options before anything is loaded.

        Raises:
            BadOption: names the option.
        """
        for value, name in ((windows, "--check-windows"), (warn_ratio, "--warn-ratio")):
            if value < 0:
                raise BadOption(where="command line", name=name, got=value, wanted="0 or more")

    def run(self, budget: float | None) -> dict[str, Any] | None:
        """Measure the usual budgets and the one to start with; warn; return what was found, None if nothing was."""
        from mobiquant_compiler.analysis import quality

        if self.tokens is None:
            return None
        budgets = pick_budgets(self.loaded.model, [])
        if budget is not None and budget not in budgets:
            budgets = sorted([*budgets, budget], reverse=True)
        rows = quality.quick_check(self.loaded.model, self.tokens, budgets, self.reference, progress=self.report)
        warn(rows, self.warn_ratio)
        count, length = self.tokens.shape
        return {"text": TEXT, "windows": count, "length": length, "rows": [row.to_dict() for row in rows]}
