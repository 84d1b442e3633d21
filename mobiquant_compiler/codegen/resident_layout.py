"""What lies where in the shared memory of resident_mma; plain numbers, for the kernel and for those that choose it."""

from __future__ import annotations

from dataclasses import dataclass

TEAMS = 2
MOST_BYTES = 227 << 10  # of a program, on sm_90
BOXES = 8 * 1024  # bytes of a slice's boxes, one a warp of a team
SUMS = 8 * 128 * 4  # bytes of the sums that eight warps exchange of a tile: 16 rows by eight tokens each
TAKEN_AT = 8 * 8  # bytes of the barriers of activations, one a step or place; those of who has read them follow
RINGS_AT = 8 * 16  # and those of rings
BARRIERS = RINGS_AT + 8 * 2 * 8 * TEAMS  # bytes of all: two for each warp's ring
MARK = 128  # bytes behind it all, the only ones that Triton sees written: they have it reserve the rest
_UNIT = 512  # bytes after which the copy engine's order of a box repeats
_CHOICES = ((2, 2), (2, 1), (1, 2), (1, 1))  # steps in a ring and tiles' sums, best first
_WHOLE = 64  # groups up to which all activations stay
_PLACES = (3, 2)  # steps that have a place where not all do, best first


@dataclass(frozen=True, slots=True)
class ResidentLayout:
    """Shared memory of a program.

    Activations of eight tokens stand first: high halves by group, low ones, steps and shifts; of all groups, or of the
    steps that come next. Scales and zero points of two tiles follow for each of two teams of eight warps; up to here
    nothing depends on slice counts, and is asked for before they are known. Then come, a team, rings of words, and sums
    of chains; barriers last. A slot of a team's rings has slice after slice, in each a box a warp: where the base slice
    of the first step comes depends on no count either.

    Attributes:
        groups: Groups of 128 columns.
        size: Bytes of a scale.
        halves: Bytes of an activation.
    """

    groups: int
    size: int
    halves: int

    @property
    def steps(self) -> int:
        """How many steps a tile has: a pair of groups for each of eight chains."""
        return (self.groups + 15) // 16

    @property
    def places(self) -> int:
        """How many steps of activations have a place: all, or of more groups as many as fit beside four slices."""
        if self.groups <= _WHOLE and self._fit(self.groups):
            return self.steps
        return next((places for places in _PLACES if self._fit(16 * places)), _PLACES[-1])

    def _fit(self, groups: int) -> bool:
        """Say whether activations of so many groups fit beside the shortest rings of four slices."""
        before = self._teams_behind(groups)
        return before + TEAMS * self._team_bytes(4, 1, 1) + BARRIERS + MARK <= MOST_BYTES

    @property
    def held_groups(self) -> int:
        """Of how many groups activations are there at a time."""
        return min(16 * self.places, self.groups)

    @property
    def acts_bytes(self) -> int:
        """How many bytes eight tokens take, of groups that are there: 128 in each half, and a step and a shift."""
        return self._acts_bytes(self.held_groups)

    def _acts_bytes(self, groups: int) -> int:
        return groups * (1024 * self.halves + 64)

    @property
    def facts_bytes(self) -> int:
        """How many bytes a row's scales take: an odd number of 16, so that rows begin in different banks."""
        own = self.groups * self.size
        return own if own // 16 % 2 else own + 16

    @property
    def teams_at(self) -> int:
        """Where the memory of the first team begins, behind activations and the scales of both."""
        return self._teams_behind(self.held_groups)

    def _teams_behind(self, groups: int) -> int:
        used = self._acts_bytes(groups) + TEAMS * 2 * 32 * self.facts_bytes
        return -(-used // _UNIT) * _UNIT

    def _team_bytes(self, count: int, depth: int, sides: int) -> int:
        return BOXES * count * depth + SUMS * sides

    def choice(self, count: int) -> tuple[int, int]:
        """Return how many steps a ring holds where `count` slices are used, and for how many tiles' sums there is room.

        Measured on an H100: a second step pays with up to two slices; with more, 48 KB and more are under way without.

        Raises:
            ValueError: nothing fits.
        """
        left = MOST_BYTES - MARK - BARRIERS - self.teams_at
        for depth, sides in _CHOICES:
            if (depth == 1 or count <= 2) and TEAMS * self._team_bytes(count, depth, sides) <= left:
                return depth, sides
        raise ValueError(f"{count} slices of {self.groups} groups do not fit {MOST_BYTES} bytes")

    def depth(self, count: int) -> int:
        """Return how many steps a ring holds."""
        return self.choice(count)[0]

    def sides(self, count: int) -> int:
        """Return for how many tiles' sums there is room."""
        return self.choice(count)[1]

    def sums_at(self, count: int) -> int:
        """Return where in a team's memory sums begin, behind the rings."""
        return BOXES * count * self.depth(count)

    def team_bytes(self, slices: int) -> int:
        """Return how many bytes a team has, whichever count up to `slices` takes most.

        Raises:
            ValueError: that is more than there is.
        """
        return max(self._team_bytes(count, *self.choice(count)) for count in range(1, slices + 1))

    def barriers_at(self, slices: int) -> int:
        """Return where barriers begin, behind the teams.

        Raises:
            ValueError: that is more than there is.
        """
        return self.teams_at + TEAMS * self.team_bytes(slices)

    def total_bytes(self, slices: int) -> int:
        """Return what a program takes.

        Raises:
            ValueError: that is more than there is.
        """
        return self.barriers_at(slices) + BARRIERS + MARK

    def fits(self, slices: int) -> bool:
        """Say whether every count has room."""
        try:
            return self.total_bytes(slices) <= MOST_BYTES
        except ValueError:
            return False
