"""The control loop behind `follow_budget`: from bits that tokens really got to what the table is asked for next."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 4  # updates that the drift is averaged over: one interval of text says little about the next
REPAID_IN = 4  # updates after which what was used too much or too little shall be made good, and
REPAID_AT_MOST = 0.025  # bits by which that may move the thresholds: it must not show as an oscillation
FURTHEST = 3.0  # greatest drift: odds wrong by a factor of 20 mean that the scores are not what the table measured
_EDGE = 1e-4  # least distance from the ends of the range, as a share of it: there the odds are infinite


@dataclass(slots=True)
class Steering:
    """Integral control of the budget that a table is asked for, so that tokens get another one on average.

    The loop works on log odds, ``log((b - low) / (high - b))``. Scores that are greater by a factor move the odds
    of a slice by a factor; both ends of the range are out of reach, as they are for tokens; and the loop has about
    the same gain everywhere, while in bits it would be too strong near the ends.

    What is estimated is the *drift*: log odds of the bits that tokens got, less those that the table was asked for.
    It is measured against what was written, not against what was wished: at an end nothing winds up.

    Attributes:
        wanted: Average bits that tokens shall get.
        low: Least bits that floors allow.
        high: Greatest bits that ceilings allow.
        every: Tokens that one update is expected to have seen.
        aim: What the table is asked for at present.
        drift: See above.
        weight: Updates that `drift` is an average of, at most `MEMORY`.
    """

    wanted: float
    low: float
    high: float
    every: int
    aim: float
    drift: float = 0.0
    weight: float = 0.0

    def update(self, bits: float, tokens: int, overall: float, total: int) -> float:
        """Return what to ask the table for next.

        Args:
            bits: Average of the tokens since the last update, all of which were routed at `aim`.
            tokens: How many they were.
            overall: Average of all tokens since the start.
            total: How many they were.
        """
        if not self.low + 1e-9 < self.wanted < self.high - 1e-9:
            return self.aim  # an end of the range is exact
        seen = self._odds(bits) - self._odds(self.aim)
        seen = min(max(seen, -FURTHEST), FURTHEST)
        share = max(tokens / self.every, 1.0)
        self.weight = min(self.weight + share, max(MEMORY, share))
        self.drift += (seen - self.drift) * share / self.weight
        owed = (overall - self.wanted) * total / (REPAID_IN * max(tokens, self.every))
        target = self.wanted - min(max(owed, -REPAID_AT_MOST), REPAID_AT_MOST)
        self.aim = self._bits(self._odds(target) - self.drift)
        return self.aim

    def _odds(self, bits: float) -> float:
        place = (bits - self.low) / (self.high - self.low)
        place = min(max(place, _EDGE), 1 - _EDGE)
        return math.log(place / (1 - place))

    def _bits(self, odds: float) -> float:
        place = 1 / (1 + math.exp(-odds))
        return self.low + min(max(place, _EDGE), 1 - _EDGE) * (self.high - self.low)
