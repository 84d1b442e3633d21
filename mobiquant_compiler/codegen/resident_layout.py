"""What lies where in the shared memory of resident_mma; plain numbers, for the kernel and for those that choose it."""

from __future__ import annotations

from dataclasses import dataclass

TEAMS = 2
MOST_BYTES = 227 << 10  # of a program, on sm_90
SUMS = 8 * 128 * 4  # bytes of the sums that eight warps exchange of a tile: 16 rows by eight tokens each
RINGS_AT = 8 * 16  # bytes of the barriers of activations, one a step; those of rings follow
BARRIERS = RINGS_AT + 8 * 2 * 8 * TEAMS  # bytes of all: two for each warp's ring
MARK = 128  # bytes behind it all, the only ones that Triton sees written: they have it reserve the rest
_UNIT = 512  # bytes after which the copy engine's order of a box repeats
_CHOICES = ((2, 2), (2, 1), (1, 2), (1, 1))  # steps in a ring and tiles' sums, best first


@dataclass(frozen=True, slots=True)
class ResidentLayout:
    """Shared memory of a program.

    Activations of eight tokens stand first: high halves by group, low ones, steps and shifts. Scales and zero points of
    two tiles follow for each of two teams of eight warps; up to here nothing depends on slice counts, and is asked for
    before they are known. Then come, a team, rings of words, a slot a step of every warp, and sums of chains; barriers
    last.

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
    def acts_bytes(self) -> int:
        """How many bytes eight tokens take: 128 of a group in each half, and a step and a shift."""
        return self.groups * (1024 * self.halves + 64)

    @property
    def facts_bytes(self) -> int:
        """How many bytes a row's scales take: an odd number of 16, so that rows begin in different banks."""
        own = self.groups * self.size
        return own if own // 16 % 2 else own + 16

    @property
    def teams_at(self) -> int:
        """Where the memory of the first team begins, behind activations and the scales of both."""
        return -(-(self.acts_bytes + TEAMS * 2 * 32 * self.facts_bytes) // _UNIT) * _UNIT

    def _team_bytes(self, count: int, depth: int, sides: int) -> int:
        return 8 * 1024 * count * depth + SUMS * sides

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
        return 8 * 1024 * count * self.depth(count)

    def team_bytes(self, count: int) -> int:
        """Return how many bytes a team has."""
        return self._team_bytes(count, *self.choice(count))

    def barriers_at(self, slices: int) -> int:
        """Return where barriers begin: behind the teams, whichever count takes most.

        Raises:
            ValueError: that is more than there is.
        """
        return self.teams_at + TEAMS * max(self.team_bytes(count) for count in range(1, slices + 1))

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
