"""The network of a trained router inside `route_quantize`: one pass over a token's columns, a few sums a thread.

Dividing a token by its root mean square is left for the end: ``hidden @ (x / rms)`` is ``(hidden @ x) / rms``, so that
one pass sums what the first layer, the data-free prediction and the normalisation need. Written for threads (see
`fragments`): thread i takes columns 2 i and 2 i + 1 of every step, in the order of the steps, whatever else a program
does. So a token scores to the same bits alone and in any batch.

The layer's rows have K + 2 columns and so lie at 4 bytes (2, where K is odd), not at 16: a warp loads words.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import fragments

_TINY = tl.constexpr(1e-12)  # as in the reference
_LIMIT = tl.constexpr(10.0)
STATISTICS = tl.constexpr(3)  # sums of a token beside those of hidden units: predicted error, squares, peak


@triton.constexpr_function
def units_at_a_time(hidden):
    """Return how many hidden units a pass over the columns sums: at most 16, as alike in all passes as can be."""
    passes = -(-hidden // 16)
    return -(-hidden // passes)


@triton.constexpr_function
def places_of(count):
    """Return the least power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()


@triton.jit
def prefetch_network(energy_ptr, hidden_ptr, COLUMNS: tl.constexpr, HIDDEN: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Ask for the energies of columns and the first layer to come into the L2 cache."""
    THREADS: tl.constexpr = 32 * NUM_WARPS
    ENERGIES: tl.constexpr = 128 // (energy_ptr.dtype.element_ty.primitive_bitwidth // 8)  # in a line of 128 bytes
    WEIGHTS: tl.constexpr = 128 // (hidden_ptr.dtype.element_ty.primitive_bitwidth // 8)
    for start in tl.static_range(0, COLUMNS, THREADS * ENERGIES):
        at = start + tl.arange(0, THREADS) * ENERGIES
        fragments.prefetch_line(energy_ptr + at, at < COLUMNS, False)
    for start in range(0, HIDDEN * (COLUMNS + 2), THREADS * WEIGHTS):
        at = start + tl.arange(0, THREADS) * WEIGHTS
        fragments.prefetch_line(hidden_ptr + at, at < HIDDEN * (COLUMNS + 2), False)


@triton.jit
def _load_pair(ptr, step, place, inside, COLUMNS: tl.constexpr, CHECKED: tl.constexpr, EMULATE: tl.constexpr):
    """Load columns 2 i and 2 i + 1 of a row, zero from COLUMNS on; returns two float32 [THREADS].

    Shapes: ptr to the row; step and place int64 add up to i; inside bool [THREADS], looked at where CHECKED.
    """
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    if COLUMNS % 2 == 1 or EMULATE:
        pair = step + place
        first = tl.load(ptr + 2 * pair, mask=2 * pair < COLUMNS, other=0.0).to(tl.float32)
        second = tl.load(ptr + 2 * pair + 1, mask=2 * pair + 1 < COLUMNS, other=0.0).to(tl.float32)
    elif DTYPE.primitive_bitwidth == 32:
        at = ptr + 2 * place + 2 * step
        if CHECKED:
            low, high = fragments.load_words(at, inside, 2, EMULATE)
        else:
            low, high = fragments.read_words(at, 2, EMULATE)
        first = low.to(tl.float32, bitcast=True)
        second = high.to(tl.float32, bitcast=True)
    else:
        at = ptr.to(tl.pointer_type(tl.int32)) + place + step
        if CHECKED:
            word = tl.load(at, mask=inside, other=0)
        else:
            word = tl.load(at)
        first = word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        second = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def column_sums(
    x_ptr,
    energy_ptr,
    hidden_ptr,
    first,
    token,
    tokens,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    WITH_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Sum over each thread's columns of BLOCK_M tokens: the statistics, and dot products with UNITS hidden units.

    Units are those from `first` on; beyond the last of all the last one is taken again. Tokens likewise.

    Returns:
        For each token in turn the predicted error, squares and peak, then a sum for each unit; float32 [THREADS].
    """
    THREADS: tl.constexpr = 32 * NUM_WARPS
    CHECKED: tl.constexpr = COLUMNS % BLOCK_R != 0
    EXTRA: tl.constexpr = STATISTICS if WITH_STATISTICS else 0
    EACH: tl.constexpr = UNITS + EXTRA
    thread = tl.arange(0, THREADS)
    sums = ()
    for _ in tl.static_range(BLOCK_M * EACH):
        sums = sums + (tl.zeros([THREADS], tl.float32),)
    for start in range(0, COLUMNS, BLOCK_R):
        place = (start // 2 + thread).to(tl.int64)
        for number in tl.static_range(BLOCK_R // (2 * THREADS)):
            inside = 2 * (place + number * THREADS) < COLUMNS
            new = ()
            weights = ()
            for unit in tl.static_range(UNITS):
                row = tl.minimum(first + unit, HIDDEN - 1).to(tl.int64) * (COLUMNS + 2)
                weights = weights + _load_pair(
                    hidden_ptr + row, number * THREADS, place, inside, COLUMNS, CHECKED, EMULATE
                )
            if WITH_STATISTICS:
                e0, e1 = _load_pair(energy_ptr, number * THREADS, place, inside, COLUMNS, CHECKED, EMULATE)
            for m in tl.static_range(BLOCK_M):
                row = tl.minimum(token + m, tokens - 1).to(tl.int64) * COLUMNS
                x0, x1 = _load_pair(x_ptr + row, number * THREADS, place, inside, COLUMNS, CHECKED, EMULATE)
                if WITH_STATISTICS:
                    squares0 = x0 * x0
                    squares1 = x1 * x1
                    error = tl.fma(squares1, e1, tl.fma(squares0, e0, sums[m * EACH]))
                    peak = tl.maximum(sums[m * EACH + 2], tl.maximum(tl.abs(x0), tl.abs(x1)))
                    new = new + (error, (sums[m * EACH + 1] + squares0) + squares1, peak)
                for unit in tl.static_range(UNITS):
                    dot = tl.fma(weights[2 * unit], x0, sums[m * EACH + EXTRA + unit])
                    new = new + (tl.fma(weights[2 * unit + 1], x1, dot),)
            sums = new
    return sums


@triton.jit
def _merge(error, squares, peak, other_error, other_squares, other_peak):
    return error + other_error, squares + other_squares, tl.maximum(peak, other_peak)


@triton.jit
def statistics(error, squares, peak, COLUMNS: tl.constexpr):
    """Finish a token's statistics over threads.

    Shapes: float32 [THREADS] each, of `column_sums`; returns float32 scalars: the predicted error, the root mean square
        and the logarithms of that and of the peak over it (`reference.mlp_features`).
    """
    error, squares, peak = tl.reduce((error, squares, peak), 0, _merge)
    rms = tl.sqrt_rn(squares / COLUMNS + _TINY)
    return error, rms, tl.log(rms), tl.log(peak / rms + _TINY)


@triton.jit
def fold(values, lane, DISTANCE: tl.constexpr, EMULATE: tl.constexpr):
    """Sum values over lanes while there is more than one, each half of the lanes going on with half of the values.

    Shapes: values, a tuple of a power of two, at most 32, of float32 [THREADS]; DISTANCE 16; returns [THREADS], where
        of P values lane l has, of value ``l // (32 / P)``, the sum over lanes that differ from l in the upper bits.
    """
    HALF: tl.constexpr = len(values) // 2
    if HALF == 0:
        total = values[0]
    else:
        upper = (lane & DISTANCE) != 0
        kept = ()
        for index in tl.static_range(HALF):
            sent = tl.where(upper, values[index], values[HALF + index])
            own = tl.where(upper, values[HALF + index], values[index])
            kept = kept + (own + fragments.from_lanes_away(sent, DISTANCE, EMULATE),)
        total = fold(kept, lane, DISTANCE // 2, EMULATE)
    return total


@triton.jit
def sum_over_threads(values, NUM_WARPS: tl.constexpr, EMULATE: tl.constexpr):
    """Sum each of some values over all threads.

    Shapes: values, a tuple of a power of two of float32 [THREADS]; returns float32 [how many].
    """
    PLACES: tl.constexpr = len(values)
    lane = tl.arange(0, 32 * NUM_WARPS) % 32
    folded = tl.reshape(fold(values, lane, 16, EMULATE), [NUM_WARPS, PLACES, 32 // PLACES])
    return tl.sum(tl.sum(folded, axis=2), axis=0)


@triton.jit
def layer_tensors(
    hidden_ptr,
    hidden_bias_ptr,
    out_ptr,
    first,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Load what the network needs of UNITS hidden units beside their weights of columns.

    Returns:
        The weights of the two logarithms and the bias, float32 [places], and those of the second layer, float32
        [places of SCORES, places]; zero where there is no unit or score.
    """
    offs_u = tl.arange(0, places_of(UNITS))
    unit = first + offs_u
    real = (offs_u < UNITS) & (unit < HIDDEN)
    ends = hidden_ptr + unit.to(tl.int64) * (COLUMNS + 2) + COLUMNS
    of_rms = tl.load(ends, mask=real, other=0.0).to(tl.float32)
    of_peak = tl.load(ends + 1, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(hidden_bias_ptr + unit, mask=real, other=0.0).to(tl.float32)
    offs_e = tl.arange(0, places_of(SCORES))
    there = (offs_e < SCORES)[:, None] & real[None, :]
    out = tl.load(out_ptr + offs_e[:, None] * HIDDEN + unit[None, :], mask=there, other=0.0).to(tl.float32)
    return of_rms, of_peak, bias, out


@triton.jit
def add_units(
    totals,
    sums,
    facts,
    layer,
    UNITS: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add to the logarithms of tokens' scores what UNITS hidden units say.

    Shapes: totals, BLOCK_M times float32 [places of scores]; sums of `column_sums`, EXTRA before those of a token's
        units; facts, four of `statistics` a token; layer of `layer_tensors`. Returns new totals.
    """
    of_rms, of_peak, bias, out = layer
    new = ()
    for m in tl.static_range(BLOCK_M):
        values = ()
        for place in tl.static_range(places_of(UNITS)):
            if place < UNITS:
                values = values + (sums[m * (UNITS + EXTRA) + EXTRA + place],)
            else:
                values = values + (tl.zeros([32 * NUM_WARPS], tl.float32),)
        dots = sum_over_threads(values, NUM_WARPS, EMULATE) / facts[4 * m + 1]
        z = dots + of_rms * facts[4 * m + 2] + of_peak * facts[4 * m + 3] + bias
        inner = z / (1.0 + tl.exp(-z))
        new = new + (totals[m] + tl.sum(out * inner[None, :], axis=1),)
    return new


@triton.jit
def further_units(
    totals,
    facts,
    x_ptr,
    energy_ptr,
    hidden_ptr,
    hidden_bias_ptr,
    out_ptr,
    first,
    token,
    tokens,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Do another pass over the columns for the units from `first` on; returns new totals (`add_units`)."""
    layer = layer_tensors(hidden_ptr, hidden_bias_ptr, out_ptr, first, COLUMNS, HIDDEN, UNITS, SCORES)
    sums = column_sums(
        x_ptr,
        energy_ptr,
        hidden_ptr,
        first,
        token,
        tokens,
        COLUMNS,
        HIDDEN,
        UNITS,
        False,
        BLOCK_M,
        BLOCK_R,
        NUM_WARPS,
        EMULATE,
    )
    return add_units(totals, sums, facts, layer, UNITS, 0, BLOCK_M, NUM_WARPS, EMULATE)


@triton.jit
def predict(
    x_ptr,
    energy_ptr,
    hidden_ptr,
    hidden_bias_ptr,
    out_ptr,
    token,
    tokens,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Run the network on BLOCK_M tokens from `token` on, the last of all tokens in place of those beyond it.

    Shapes: x [T, COLUMNS]; energy float32 [COLUMNS]; hidden [HIDDEN, COLUMNS + 2], hidden_bias [HIDDEN] and out
        [SCORES, HIDDEN], float16 or float32.

    Returns:
        Four float32 scalars a token, the predicted error first (`statistics`); and for each token the second layer's
        sums without its bias, float32 [places of SCORES].
    """
    UNITS: tl.constexpr = units_at_a_time(HIDDEN)
    EACH: tl.constexpr = UNITS + STATISTICS
    # Asked for first: what waits for the sums over columns would wait for this as well.
    layer = layer_tensors(hidden_ptr, hidden_bias_ptr, out_ptr, 0, COLUMNS, HIDDEN, UNITS, SCORES)
    sums = column_sums(
        x_ptr,
        energy_ptr,
        hidden_ptr,
        0,
        token,
        tokens,
        COLUMNS,
        HIDDEN,
        UNITS,
        True,
        BLOCK_M,
        BLOCK_R,
        NUM_WARPS,
        EMULATE,
    )
    facts = ()
    totals = ()
    for m in tl.static_range(BLOCK_M):
        facts = facts + statistics(sums[m * EACH], sums[m * EACH + 1], sums[m * EACH + 2], COLUMNS)
        totals = totals + (tl.zeros([places_of(SCORES)], tl.float32),)
    totals = add_units(totals, sums, facts, layer, UNITS, STATISTICS, BLOCK_M, NUM_WARPS, EMULATE)
    for first in range(UNITS, HIDDEN, UNITS):
        totals = further_units(
            totals,
            facts,
            x_ptr,
            energy_ptr,
            hidden_ptr,
            hidden_bias_ptr,
            out_ptr,
            first,
            token,
            tokens,
            COLUMNS,
            HIDDEN,
            UNITS,
            SCORES,
            BLOCK_M,
            BLOCK_R,
            NUM_WARPS,
            EMULATE,
        )
    return facts, totals


@triton.jit
def factors(correction):
    """Return what scores are multiplied by; NaN stays NaN, as no comparison holds for it."""
    limited = tl.where(correction > _LIMIT, _LIMIT, correction)
    return tl.exp(tl.where(limited < -_LIMIT, -_LIMIT, limited))
