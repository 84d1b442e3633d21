"""What users may set of a calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mobiquant_compiler.config import check_keys, is_number
from mobiquant_compiler.errors import BadOption
from mobiquant_compiler.reference import SCORES

ZERO_RATE = 3  # steps of a zero point over those of a scale


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """How codes are chosen on calibration tokens.

    Attributes:
        weight_growth: What a squared error counts with one slice more, over what it counts with one less. The error
            itself falls about 16-fold with each 2-bit slice, so 16 holds all slice counts equally important and a
            smaller number favours few slices. Per 2 bits; other widths in proportion.
        narrowest: Share of a group's range that the base may be narrowed to, in (0, 1]; 1 never clips.
        guided: Weigh tokens by how much the loss depends on them at each linear (GuidedQuant, arXiv 2505.07004).
        damping: Share of the mean that is added to the diagonal of each Hessian.
        propagate: Slices with which the finished blocks feed the next; None is all.
        tune_steps: Gradient steps on scales and zero points through the whole model, after the codes; 0 is none.
        tune_rate: Largest relative step of a scale; zero points move `ZERO_RATE` times as far, in base steps.
        tune_decay: Share of the way back to where they started that scales and zero points go at each step, over the
            step's rate: what moves them without pause ends at most 1 / tune_decay away, noise ends much nearer.
        tune_windows: Windows a step.
        router: "energy" (data-free prediction with measured gains) or "mlp" (a trained network on top of it).
        router_width: Hidden units of a trained router.
        router_steps: Gradient steps on each.
        router_windows: Windows that they are trained on.
        seed: Of everything that is drawn.
    """

    weight_growth: float = 4.0
    narrowest: float = 0.5
    guided: bool = True
    damping: float = 0.01
    propagate: int | None = None
    tune_steps: int = 160
    tune_rate: float = 3e-3
    tune_decay: float = 3.0
    tune_windows: int = 2
    router: str = "energy"
    router_width: int = 12
    router_steps: int = 300
    router_windows: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("weight_growth", _is_positive(self.weight_growth), "a finite number above 0"),
            ("narrowest", _is_positive(self.narrowest) and self.narrowest <= 1, "a number above 0, at most 1"),
            ("guided", isinstance(self.guided, bool), "True or False"),
            ("damping", _is_positive(self.damping), "a finite number above 0"),
            ("propagate", self.propagate is None or _is_count(self.propagate, 1), "None or a slice count from 1"),
            ("tune_steps", _is_count(self.tune_steps, 0), "a whole number from 0"),
            ("tune_rate", _is_positive(self.tune_rate), "a finite number above 0"),
            ("tune_decay", self._decays(), f"from 0 to {self._most_decay():g}, 1 / ({ZERO_RATE} tune_rate)"),
            ("tune_windows", _is_count(self.tune_windows, 1), "a whole number from 1"),
            ("router", self.router in SCORES, f"one of {tuple(SCORES)}"),
            ("router_width", _is_count(self.router_width, 1), "a whole number from 1"),
            ("router_steps", _is_count(self.router_steps, 1), "a whole number from 1"),
            ("router_windows", _is_count(self.router_windows, 1), "a whole number from 1"),
            ("seed", _is_count(self.seed, 0), "a whole number from 0"),
        )
        for name, fine, wanted in checks:
            if not fine:
                raise BadOption(where="CalibrationConfig", name=name, got=getattr(self, name), wanted=wanted)

    def _most_decay(self) -> float:
        return 1 / (ZERO_RATE * self.tune_rate) if _is_positive(self.tune_rate) else math.inf

    def _decays(self) -> bool:
        return is_number(self.tune_decay) and 0 <= self.tune_decay <= self._most_decay()

    def weights(self, bits: list[int]) -> list[float]:
        """Return what a squared error counts at each slice count, given the bits of each."""
        return [self.weight_growth ** ((b - bits[0]) / 2) for b in bits]

    def of_slices(self) -> dict[str, Any]:
        """Return the options that slices depend on, as plain JSON data; routers may be trained anew."""
        return {name: value for name, value in self.to_dict().items() if not name.startswith("router")}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "CalibrationConfig") -> CalibrationConfig:
        """Build from plain data.

        Raises:
            UnknownOption: a key that is not a field.
        """
        check_keys(values, cls, where)
        return cls(**values)


def _is_positive(value: object) -> bool:
    return is_number(value) and math.isfinite(value) and value > 0  # type: ignore[operator,arg-type]


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
