"""Plain frozen data that every part agrees on: slice widths, groups, layouts, kernels.

No torch.fx, no triton, no tensors: what is here can be hashed, printed and compared.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from numbers import Integral
from typing import Self

from mobiquant_compiler.errors import BadKernelSpec, BadOption, BadSliceSpec

GROUPS = (128, 64, 32)
WORD_CODES = 32  # one plane word holds one bit of 32 consecutive columns
MULTIPROCESSORS = 132  # of an H100, on which tiles were measured
REGISTERS = 65536  # of a multiprocessor, for every target
PREFILL_TOKENS = 64  # calls of more tokens are done as `Prefill` says
BATCH_TOKENS = 9  # calls of fewer are never multiplied by batch_wgmma
MAX_SIBLINGS = 4  # linears of one launch
_MOST_PARTS = 8  # of a program of sliced_wgmma: more take longer to add up than they save
_PART_COLUMNS = 4 * 128  # that a part has at least: four steps


def most_parts(columns: int) -> int:
    """Return into how many parts programs of sliced_wgmma may cut padded columns; 1 where they are too few."""
    return max(1, min(_MOST_PARTS, -(-columns // 128) * 128 // _PART_COLUMNS))


def split_programs(programs: int, at_once: int, columns: int) -> tuple[int, int, int]:
    """Return how programs of sliced_wgmma run, `at_once` at a time: as `split_columns.share_of` says.

    Returns:
        How many are whole, how many are the rest, which fills no wave, and into how many parts each of these is cut.
    """
    rest, most = programs % at_once, most_parts(columns)
    parts = min(at_once // max(rest, 1), most)
    if parts == 1 and most >= 3 and 3 * rest <= 2 * at_once:
        parts = 3
    return programs - rest, rest, parts


class Layout(StrEnum):
    """How the codes of a slice lie in memory; `packing` has the places."""

    SLICE_MAJOR = "slice_major"
    BIT_MAJOR = "bit_major"


class _Choice(StrEnum):
    """What users and op arguments name by a string."""

    @classmethod
    def of(cls, value: object, where: str, name: str | None = None) -> Self:
        """Return the member of this value.

        Raises:
            BadOption: there is none; the message starts with `where`, and calls the option `name` or by the class.
        """
        if value not in tuple(cls):
            raise BadOption(where=where, name=name or cls.__name__.lower(), got=value, wanted=cls.wanted())
        return cls(value)

    @classmethod
    def wanted(cls) -> str:
        """Name the members, for messages."""
        return f"one of {[str(member) for member in cls]}"


class Activation(_Choice):
    """Fixed-point width of activations in the integer kernels."""

    A16 = "a16"
    A8 = "a8"


class Prefill(_Choice):
    """How calls of more than `PREFILL_TOKENS` tokens are done; smaller ones are always routed, on the integer path."""

    ROUTED = "routed"  # every token its own slice count, by whatever path is fastest
    FULL = "full"  # every token all slices that the layer's ceiling allows, whatever the budget
    EXACT = "exact"  # routed on the integer path: no bit of a token's result depends on its batch


class Path(StrEnum):
    """How a call on a GPU was done; `runtime.paths` counts them. On a CPU there is one way, which nobody counts."""

    INTEGER = "integer"  # exact integer products per group; no bit depends on the batch
    FUSED = "fused"  # tokens grouped by count, weights made in registers (sm_90)
    WORKSPACE = "workspace"  # slices dequantized once, then a library's GEMM
    REFERENCE = "reference"  # plain torch: no kernel takes these activations, or this GPU


SLICE_WIDTHS = {Layout.SLICE_MAJOR: (1, 2, 4), Layout.BIT_MAJOR: (1, 2, 3, 4)}
MAX_BITS = 8  # a combined code of all slices is one unsigned byte


def _checked_widths(widths: object, layout: Layout) -> tuple[int, ...]:
    """Return slice widths as plain numbers; NumPy's are taken, booleans are not.

    Raises:
        BadSliceSpec: no whole numbers, none at all, or one that the layout does not have.
    """
    try:
        given = tuple(widths)  # type: ignore[arg-type]  # what is no sequence is refused below
    except TypeError:
        given = ()
    legal = SLICE_WIDTHS[layout]
    if not given or any(not isinstance(b, Integral) or isinstance(b, bool) or b not in legal for b in given):
        wanted = f"one or more of {legal}, whole numbers in a tuple"
        raise BadSliceSpec(name=f"widths ({layout})", got=widths, wanted=wanted)
    return tuple(int(b) for b in given)


@dataclass(frozen=True, slots=True)
class SliceSpec:
    """Widths, group and layout of one sliced weight.

    Attributes:
        widths: Bits of each slice, the base first; at most 8 in all.
        group: Consecutive input columns that share one scale and zero point.
        layout: Where the codes lie.

    Raises:
        BadSliceSpec: names the field that has another value.
    """

    widths: tuple[int, ...] = (2, 2, 2, 2)
    group: int = 128
    layout: Layout = Layout.SLICE_MAJOR

    def __post_init__(self) -> None:
        if self.layout not in tuple(Layout):
            raise BadSliceSpec(name="layout", got=self.layout, wanted=f"one of {[str(v) for v in Layout]}")
        object.__setattr__(self, "layout", Layout(self.layout))
        object.__setattr__(self, "widths", _checked_widths(self.widths, self.layout))
        if sum(self.widths) > MAX_BITS:
            raise BadSliceSpec(name="widths", got=self.widths, wanted=f"at most {MAX_BITS} bits in all")
        if self.group not in GROUPS:
            raise BadSliceSpec(name="group", got=self.group, wanted=f"one of {GROUPS}")

    @property
    def num_slices(self) -> int:
        """E, the number of slices."""
        return len(self.widths)

    @property
    def total_bits(self) -> int:
        """Bits of a weight with every slice."""
        return sum(self.widths)

    @property
    def in_bit_pairs(self) -> bool:
        """Whether there are up to four slices of two bits, packed whole: what kernels of warpgroups know."""
        return self.layout is Layout.SLICE_MAJOR and set(self.widths) == {2} and self.num_slices <= 4

    @property
    def unit(self) -> int:
        """Bits that one packed unit of the layout holds, 0 where slices differ in width.

        Units of one width share their code positions, so that codes of several slices can be combined
        four at a time inside a word.
        """
        if self.layout is Layout.BIT_MAJOR:
            return 1
        return self.widths[0] if len(set(self.widths)) == 1 else 0

    def bits(self, count: int) -> int:
        """Weight bits of a token that uses ``count`` slices."""
        return sum(self.widths[:count])

    def padded(self, k: int) -> int:
        """K rounded up to a multiple of the group."""
        return -(-k // self.group) * self.group

    def packed_shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the packed ``slices`` tensor, int32 ``[total_bits, N, K_padded / 32]``."""
        return (self.total_bits, n, self.padded(k) // WORD_CODES)

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of ``scale`` and ``zero``, ``[N, K_padded / group]``."""
        return (n, self.padded(k) // self.group)


def choose_group(k: int) -> int:
    """Return the group for ``k`` input columns: the largest that divides it, else the one that pads least.

    Example:
        >>> choose_group(1536), choose_group(576), choose_group(100)
        (128, 64, 128)
    """
    return min(GROUPS, key=lambda group: (-k % group, -group))


class Family(StrEnum):
    """Kernel families, one template file each."""

    ROUTE_QUANTIZE = "route_quantize"
    SLICED_MMA = "sliced_mma"
    DEQUANTIZE = "dequantize"
    GATHER_TOKENS = "gather_tokens"
    SLICED_WGMMA = "sliced_wgmma"
    BATCH_WGMMA = "batch_wgmma"
    RESIDENT_MMA = "resident_mma"


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """All that the text of one emitted kernel depends on; every field binds a constexpr of that name.

    Attributes:
        family: Template the kernel is made from.
        widths: Slice widths, base first (NUM_SLICES and the shifts follow from them).
        group: GROUP, columns per scale.
        layout: LAYOUT of the packed codes.
        k: K_PADDED, padded input columns (a compile-time loop bound).
        activation: ACTIVATION fixed-point width.
        has_bias: HAS_BIAS.
        parts: PARTS, weights that one launch multiplies by.
        route: ROUTE, choose slice counts (route_quantize).
        quantize: QUANTIZE, write activations in fixed point (route_quantize).
        hidden: HIDDEN, hidden units of a trained router, 0 for a data-free one (route_quantize).
        block_m: BLOCK_M, tokens per tile: 1, blocks of eight, or at most 256 (sliced_wgmma); tokens that a program
            routes (route_quantize).
        block_n: BLOCK_N, output rows per tile.
        row_tiles: ROW_TILES, tiles of 16 rows that a warp multiplies by the activations it has loaded (sliced_mma).
        block_w: BLOCK_W, columns per step; tiles of tokens that share their activations in the L2 cache (sliced_wgmma).
        block_r: BLOCK_R, columns that a routing program scores at a time (route_quantize).
        num_warps: NUM_WARPS, warps per program, or of a consumer where there are such.
        columns: COLUMNS of activations, at most K_PADDED (route_quantize).
        num_stages: NUM_STAGES, of the pipeline of the loop over columns; of activations, where words have their own
            (sliced_wgmma).
        consumers: CONSUMERS, warpgroups that multiply while one warp copies (batch_wgmma, sliced_wgmma).
        row_unit: ROW_UNIT, what the number of output rows is a multiple of (sliced_wgmma, batch_wgmma).
        token_rows: TOKEN_ROWS, write tokens as rows of bytes, for batch_wgmma, and not as lanes load them
            (route_quantize).
        overlap: OVERLAP, begin while the kernel before still runs (programmatic dependent launch, sm_90 and later).
        prefetch: PREFETCH, columns of the base slice, or of a trained router, to bring into the L2 cache while waiting
            for the kernel before.
        max_registers: Registers a thread may use, 0 for as many as the compiler likes.
        split: MOST_PARTS above 1, programs of a last wave are split along the columns (sliced_wgmma).
        sorted_rows: SORTED_ROWS, tokens are grouped by slice count: every count in use is written (dequantize).
        emulate: EMULATE, spell out in tensors what is inline assembly elsewhere (the interpreter runs none).
    """

    family: Family
    widths: tuple[int, ...]
    group: int
    layout: Layout
    k: int
    activation: Activation = Activation.A16
    has_bias: bool = False
    parts: int = 1
    route: bool = False
    quantize: bool = False
    hidden: int = 0
    block_m: int = 1
    block_n: int = 1
    row_tiles: int = 1
    block_w: int = 32
    block_r: int = 1
    num_warps: int = 4
    columns: int = 0
    num_stages: int = 1
    consumers: int = 1
    row_unit: int = 1
    token_rows: bool = False
    overlap: bool = False
    prefetch: int = 0
    max_registers: int = 0
    split: bool = False
    sorted_rows: bool = False
    emulate: bool = False

    def __post_init__(self) -> None:
        SliceSpec(self.widths, self.group, self.layout)
        if self.k % self.group:
            raise BadKernelSpec(family=self.family, name="k", got=self.k, wanted=f"a multiple of group {self.group}")
        for name in ("block_m", "block_n", "row_tiles", "block_w", "block_r", "num_warps", "consumers", "row_unit"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise BadKernelSpec(family=self.family, name=name, got=value, wanted="a power of two")
        if self.hidden < 0:
            raise BadKernelSpec(family=self.family, name="hidden", got=self.hidden, wanted="at least 0")
        if self.num_stages < 1:
            raise BadKernelSpec(family=self.family, name="num_stages", got=self.num_stages, wanted="at least 1")
        if self.split and most_parts(self.k) == 1:
            wanted = f"no split of fewer than {2 * _PART_COLUMNS} columns"
            raise BadKernelSpec(family=self.family, name="split", got=self.k, wanted=wanted)
        if not 1 <= self.parts <= MAX_SIBLINGS:
            wanted = f"1 to {MAX_SIBLINGS}"
            raise BadKernelSpec(family=self.family, name="parts", got=self.parts, wanted=wanted)

    @property
    def name(self) -> str:
        """Stable file and symbol name of the kernel."""
        widths = "".join(str(b) for b in self.widths)
        flags = ("route", "quantize", "token_rows", "overlap", "split", "sorted_rows", "has_bias", "emulate")
        marks = "".join(f"_{flag}" for flag in flags if getattr(self, flag))
        parts = f"_x{self.parts}" if self.parts > 1 else ""
        network = f"_h{self.hidden}" if self.hidden else ""
        early = f"_prefetch{self.prefetch}" if self.prefetch else ""
        limit = f"max{self.max_registers}" if self.max_registers else ""
        limit += f"u{self.row_unit}" if self.row_unit > 1 else ""
        stages = f"p{self.num_stages}" if self.num_stages > 1 else ""
        stages += f"c{self.consumers}" if self.consumers > 1 else ""
        scored = f"r{self.block_r}" if self.block_r > 1 else ""
        rows = f"n{self.block_n}" + (f"t{self.row_tiles}" if self.row_tiles > 1 else "")
        tile = f"m{self.block_m}{rows}w{self.block_w}{scored}x{self.num_warps}{stages}{limit}"
        columns = f"of{self.columns}" if self.columns not in (0, self.k) else ""
        weight = f"s{widths}_g{self.group}_k{self.k}{columns}_{self.layout}"
        return f"{self.family}__{weight}_{self.activation}{parts}{network}{marks}{early}_{tile}"

    def describe(self) -> dict[str, str]:
        """Return the fields as text, for headers and reports."""
        return {f.name: str(getattr(self, f.name)) for f in fields(self)}
