"""Jitted functions shared by the kernel templates. What packed layouts are only this knows, and how they are read.

Two modules read them in ways of their own: `slice_steps` at places that slices share, `rings` by boxes.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import fragments


@triton.constexpr_function
def bits_before(widths, index):
    """Return the bits of the slices before slice `index`, which is also their number of rows in the packed tensor."""
    return sum(widths[:index])


@triton.constexpr_function
def residual_bits(widths, count):
    """Return how many bits the slices after the base add when `count` slices are used."""
    return sum(widths[1:count])


@triton.constexpr_function
def unit_bits(widths, layout, index):
    """Return the width of the packed units of slice `index`: whole codes, or single planes in bit_major."""
    return 1 if layout == "bit_major" else widths[index]


@triton.constexpr_function
def field_mask(width, bytes_kept):
    """Return the word that keeps one `width`-bit code in each of the low bytes."""
    return ((1 << width) - 1) * (0x01010101 & ((1 << (8 * bytes_kept)) - 1))


@triton.jit
def octets_over(PER: tl.constexpr, RUN: tl.constexpr, OCTETS: tl.constexpr):
    """Return ``o // PER`` for o in 0..OCTETS - 1, int32 [OCTETS].

    Spelled out over runs: the octets of a thread are RUN apart, and the compiler sees that what it returns for them
    differs by a constant, so that one address serves all of a thread's loads.
    """
    runs = tl.arange(0, OCTETS // RUN) * (RUN // PER)
    return tl.reshape(runs[:, None] + (tl.arange(0, RUN) // PER)[None, :], [OCTETS])


@triton.jit
def append_octets(
    octets,
    slices_ptr,
    first,
    mask,
    n_rows,
    INDEX: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    RUN: tl.constexpr,
    OCTETS: tl.constexpr,
    K_PADDED: tl.constexpr,
):
    """Append slice INDEX to the combined codes of the slices before it, eight columns a lane in column order.

    Rows are whole words in every unit and follow one another, so octets (eight columns) are counted through the whole
    weight: lane o holds octet ``first + o``, of which word i has the codes of columns ``4 i .. 4 i + 3``, one per byte.
    Neighbours that share a word both load it, at one address.

    Shapes: octets int32 [OCTETS, 2]; first int64, a multiple of four; mask [OCTETS]; returns the shape of octets.
    """
    UNIT: tl.constexpr = unit_bits(WIDTHS, LAYOUT, INDEX)
    offs_word = octets_over(4 // UNIT, RUN, OCTETS)
    place = (tl.arange(0, OCTETS) * 2) % (8 // UNIT)
    unit_ptr = slices_ptr + first // 4 * UNIT
    for part in tl.static_range(WIDTHS[INDEX] // UNIT):
        base = unit_ptr + tl.cast(n_rows, tl.int64) * ((bits_before(WIDTHS, INDEX) + part * UNIT) * (K_PADDED // 32))
        words = tl.load(base + offs_word, mask=mask, other=0) >> (UNIT * place)
        fields = (words[:, None] >> (UNIT * tl.arange(0, 2))[None, :]) & field_mask(UNIT, 4)
        # Codes of all slices have at most 8 bits together, so no byte runs over into the next.
        octets = (octets << UNIT) | fields
    return octets


@triton.constexpr_function
def width_of(widths, index):
    """Return the width of slice `index`, as the widths of a weight that has no other."""
    return (widths[index],)


@triton.constexpr_function
def unit_count(widths, layout, index):
    """Return how many packed units slice `index` has: one, or a plane a bit."""
    return widths[index] if layout == "bit_major" else 1


@triton.constexpr_function
def units_before(widths, layout, index):
    """Return how many packed units the slices before slice `index` have."""
    return sum(widths[:index]) if layout == "bit_major" else index


@triton.constexpr_function
def words_per_lane(unit, group):
    """Return how many words of one packed unit hold a quarter of a group, 0 where one word holds more than that."""
    return group * unit // 128


@triton.constexpr_function
def aligned_words(widths, index, part, unit, k_padded, wanted):
    """Return how many of `wanted` consecutive words one load may take, given where the unit begins in any weight."""
    first = (sum(widths[:index]) + part * unit) * (k_padded // 32)
    while wanted > 1 and (first % wanted or (k_padded * unit // 32) % wanted):
        wanted //= 2
    return wanted


@triton.constexpr_function
def max_int(a, b):
    """Return the greater of two numbers."""
    return max(a, b)


@triton.constexpr_function
def is_shared_run(widths, layout, index, group):
    """Say whether a quad's lanes read a pair of groups of slice `index` in one run, to be shared out afterwards."""
    return words_per_lane(unit_bits(widths, layout, index), group) in (1, 2)


@triton.jit
def load_run(ptr, mask, COUNT: tl.constexpr, STEP: tl.constexpr, CHECKED: tl.constexpr, EMULATE: tl.constexpr):
    """Load COUNT consecutive words a thread, STEP at a time; returns a tuple. Without CHECKED all lanes load."""
    words = ()
    for start in tl.static_range(0, COUNT, STEP):
        if CHECKED:
            words = words + fragments.load_words(ptr + start, mask, STEP, EMULATE)
        else:
            words = words + fragments.stream_words(ptr + start, STEP, EMULATE)
    return words


@triton.jit
def load_pair(
    slices_ptr,
    row,
    pair,
    t,
    mask,
    n_rows,
    INDEX: tl.constexpr,
    PART: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    CHECKED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Load a lane's words of one packed unit for a pair of groups, as `split_words` takes them.

    The four lanes of a quad read both groups of their row in one run, so that a load is as wide as can be.

    Shapes: row, pair, t and mask [THREADS]; without CHECKED every lane's share exists; returns a tuple of int32
        [THREADS].
    """
    UNIT: tl.constexpr = unit_bits(WIDTHS, LAYOUT, INDEX)
    WORDS: tl.constexpr = words_per_lane(UNIT, GROUP)
    IN_GROUP: tl.constexpr = GROUP * UNIT // 32
    GROUPS: tl.constexpr = K_PADDED // GROUP
    # The packed tensor of a large layer has more than 2**31 words: its bases are computed in 64 bits.
    base = slices_ptr + tl.cast(n_rows, tl.int64) * ((bits_before(WIDTHS, INDEX) + PART * UNIT) * (K_PADDED // 32))
    at = base + row.to(tl.int64) * (K_PADDED * UNIT // 32) + pair * (2 * IN_GROUP)
    words = ()
    if is_shared_run(WIDTHS, LAYOUT, INDEX, GROUP):
        STEP: tl.constexpr = aligned_words(WIDTHS, INDEX, PART, UNIT, K_PADDED, 2 * WORDS)
        here = mask & (2 * pair + (t >> 1) < GROUPS)
        words = load_run(at + t * (2 * WORDS), here, 2 * WORDS, STEP, CHECKED, EMULATE)
    else:
        LANE: tl.constexpr = max_int(WORDS, 1)
        QUAD: tl.constexpr = aligned_words(WIDTHS, INDEX, PART, UNIT, K_PADDED, LANE)
        # Several lanes share a word where a quarter of a group is less than one.
        first = (fragments.quarter_of_lane(t) * IN_GROUP) // 4
        for which in tl.static_range(2):
            here = mask & (2 * pair + which < GROUPS)
            words = words + load_run(at + which * IN_GROUP + first, here, LANE, QUAD, CHECKED, EMULATE)
    return words


@triton.jit
def split_words(
    words,
    t,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Turn what `load_pair` gave for ROWS rows of every unit into words of the first and of the second group.

    Returns a tuple, by row and unit, of two tuples of int32 [THREADS].
    """
    split = ()
    UNITS: tl.constexpr = units_before(WIDTHS, LAYOUT, COUNT)
    for row in tl.static_range(ROWS):
        for index in tl.static_range(COUNT):
            for part in tl.static_range(unit_count(WIDTHS, LAYOUT, index)):
                both = words[row * UNITS + units_before(WIDTHS, LAYOUT, index) + part]
                if is_shared_run(WIDTHS, LAYOUT, index, GROUP):
                    first, second = fragments.split_between_groups(both, t >= 2, len(both) // 2, EMULATE)
                else:
                    first, second = both[: len(both) // 2], both[len(both) // 2 :]
                split = split + ((first, second),)
    return split


@triton.constexpr_function
def same_width(widths, layout, count):
    """Return the width of the packed units of the first `count` slices, 0 where they differ."""
    units = {1} if layout == "bit_major" else set(widths[:count])
    return units.pop() if len(units) == 1 else 0


@triton.constexpr_function
def units_joined(units):
    """Return how many units are joined: all, made a power of two by empty ones. Eight bits hold them, as codes."""
    return 1 << (units - 1).bit_length()


@triton.constexpr_function
def spare_bits(widths, layout, count):
    """Return how many bits empty units leave below the codes that `combined_codes` makes of `count` slices."""
    width, units = same_width(widths, layout, count), units_before(widths, layout, count)
    return width * (units_joined(units) - units)


@triton.constexpr_function
def even_fields(width):
    """Return the word whose bytes keep every other field of `width` bits, the lowest first."""
    byte = sum(((1 << width) - 1) << place for place in range(0, 8, 2 * width))
    return byte * 0x01010101


@triton.jit
def interleave_fields(above, below, WIDTH: tl.constexpr, EMULATE: tl.constexpr):
    """Join fields of WIDTH bits of two words to fields twice as wide; returns even places and odd places.

    Four instructions for all fields of both words, where joining one after the other would take three a field.
    """
    KEEP: tl.constexpr = even_fields(WIDTH)
    even = fragments.select_bits(above << WIDTH, below, KEEP, EMULATE)
    odd = fragments.select_bits(above, below >> WIDTH, KEEP, EMULATE)
    return even, odd


@triton.jit
def join_units(words, WIDTH: tl.constexpr, COUNT: tl.constexpr, EMULATE: tl.constexpr):
    """Join COUNT (a power of two) words of fields of WIDTH bits, most significant first, field by field.

    Returns a tuple of COUNT words of fields of COUNT WIDTH bits: place j of the fields is in word ``j % COUNT``, there
    at place ``j // COUNT``.
    """
    if COUNT == 1:
        joined = words
    else:
        above = join_units(words[: COUNT // 2], WIDTH, COUNT // 2, EMULATE)
        below = join_units(words[COUNT // 2 :], WIDTH, COUNT // 2, EMULATE)
        joined = ()
        odds = ()
        for index in tl.static_range(COUNT // 2):
            even, odd = interleave_fields(above[index], below[index], WIDTH * COUNT // 2, EMULATE)
            joined = joined + (even,)
            odds = odds + (odd,)
        joined = joined + odds
    return joined


@triton.jit
def lane_words(unit, t, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a lane's words of one unit, its own columns from the lowest place on."""
    words = unit
    if words_per_lane(WIDTH, COLUMNS) == 0:
        # Several lanes' quarters are in one word: a lane's own begins at a place that depends on the lane.
        first = (fragments.quarter_of_lane(t) * (COLUMNS // 16)) % (8 // WIDTH)
        words = (unit[0] >> (WIDTH * first),)
    return words


@triton.jit
def combined_codes(
    words,
    t,
    FIRST: tl.constexpr,
    WHICH: tl.constexpr,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Combine the codes of COUNT slices of one row: COLUMNS / 4 columns a lane, four a register, one a byte.

    Args: words holds, from FIRST on, a tuple for each packed unit; WHICH is the group of a pair whose words they are,
        as `split_words` gives them, or -1 where the tuple is the words themselves.

    Returns COLUMNS / 16 int32 [THREADS], codes times two to the power of `spare_bits`: joining three units as four of
        which one is empty takes fewer instructions than joining two and appending the third.
    """
    UNITS: tl.constexpr = units_before(WIDTHS, LAYOUT, COUNT)
    WIDTH: tl.constexpr = same_width(WIDTHS, LAYOUT, COUNT)
    codes = ()
    if WIDTH > 0:
        JOINED: tl.constexpr = units_joined(UNITS)
        FIELD: tl.constexpr = WIDTH * JOINED
        places = ()  # for each word of a lane, the joined words
        for word in tl.static_range(max_int(words_per_lane(WIDTH, COLUMNS), 1)):
            column = ()
            for unit in tl.static_range(JOINED):
                if unit < UNITS:
                    column = column + (lane_words(unit_of(words, FIRST + unit, WHICH), t, WIDTH, COLUMNS)[word],)
                else:
                    column = column + (fragments.filled(t, 0),)
            places = places + (join_units(column, WIDTH, JOINED, EMULATE),)
        for j in tl.static_range(COLUMNS // 16):
            code = places[j // (8 // WIDTH)][(j % (8 // WIDTH)) % JOINED]
            if FIELD < 8:
                code = (code >> (FIELD * ((j % (8 // WIDTH)) // JOINED))) & field_mask(FIELD, 4)
            codes = codes + (code,)
    else:
        for j in tl.static_range(COLUMNS // 16):
            code = fragments.filled(t, 0)
            for index in tl.static_range(COUNT):
                unit = lane_words(unit_of(words, FIRST + index, WHICH), t, WIDTHS[index], COLUMNS)
                field = unit[j // (8 // WIDTHS[index])] >> (WIDTHS[index] * (j % (8 // WIDTHS[index])))
                code = (code << WIDTHS[index]) | (field & field_mask(WIDTHS[index], 4))
            codes = codes + (code,)
    return codes


@triton.jit
def unit_of(words, INDEX: tl.constexpr, WHICH: tl.constexpr):
    """Return a unit's words of one group of a pair, or all it has where WHICH is -1."""
    unit = words[INDEX]
    if WHICH >= 0:
        unit = unit[WHICH]
    return unit


@triton.constexpr_function
def all_shared(widths, layout, group):
    """Say whether a quad's lanes read a pair of groups in one run in every slice (`is_shared_run`)."""
    units = (1,) if layout == "bit_major" else widths
    return all(group * unit // 128 in (1, 2) for unit in units)


@triton.jit
def prefetch_base(
    slices_ptr,
    first_row,
    tid,
    n_rows,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Ask for the first COLUMNS of ROWS rows of the base slice (its first plane) to come into the L2 cache."""
    UNIT: tl.constexpr = unit_bits(WIDTHS, LAYOUT, 0)
    THREADS: tl.constexpr = tid.shape[0]
    ROW_WORDS: tl.constexpr = K_PADDED * UNIT // 32
    # Whole rows follow one another without gaps: one row of all words. Lines of 128 bytes have 32 words.
    WORDS: tl.constexpr = ROWS * ROW_WORDS if COLUMNS == K_PADDED else COLUMNS * UNIT // 32
    RUNS: tl.constexpr = 1 if COLUMNS == K_PADDED else ROWS
    LINES: tl.constexpr = (WORDS + 31) // 32
    for start in tl.static_range(0, RUNS * LINES, THREADS):
        line = start + tid
        word = line // LINES * ROW_WORDS + line % LINES * 32
        inside = (line < RUNS * LINES) & (first_row + word // ROW_WORDS < n_rows)
        fragments.prefetch_line(slices_ptr + first_row.to(tl.int64) * ROW_WORDS + word, inside, EMULATE)
