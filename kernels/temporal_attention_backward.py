"""The gradients of temporal_attention, in the tiles of its forward.

With `P = softmax(S)`, of the scores S that are computed again, and `g_y` the gradient of the result,

    g_v = P^T g_y,   g_P = g_y v^T,   g_S = P * (g_P - rowsum(P * g_P)),   g_q = scale * g_S k,   g_k = scale * g_S^T q

where q and k are those turned by `rotary`, and their gradients are turned back. The gradient of a bias is the sum of
g_S over pixels and along diagonals.

Nothing is kept of the forward. The usual formula takes the row's sum from the result and its normaliser from a
log-sum-exp; but a tile that has all frames of its pixels has both at hand. So q, k, v and g_y are read and three
gradients written, seven tensors moved, where keeping those two would move eight and more.

The bias takes a launch of its own, which reads the four again and writes no more than partials: its programs walk over
tiles and keep the sum of their g_S in registers, which those of the others are too full for. Partials are few: one for
each head and diagonal of tiles at least, and beyond that no more than the result takes. They are summed in a fixed
order: nothing is added atomically, results are the same in every run.

Where a pixel's frames are more than a tile has rows, one pass takes queries in tiles, leaves normalisers and sums of
rows in fp32, and gives g_q; another takes keys in tiles and gives g_k and g_v. A third gives the partials of the bias:
pairs of tiles as many tiles apart have the same lags, so that their number grows with the frames and not their square.

A weight of zero does not undo a number that is not finite. Of pixels that share a tile, one that has such a number, of
q, k, v or g_y, gets gradients of NaN throughout, as it might by the formula, and the others are computed without it.
Products of finite numbers may overflow too, so what is left out is set to zero in P, g_P and g_S wherever it
would meet another pixel.

A row's normaliser is kept as one exponent, which takes in its largest score: with biases of millions in all of a row's
frames, and more frames than a tile has rows, that number has no room for their sum, and gradients are wrong.

Kernels read 16-byte vectors. What does not lie in such is copied first, D filled up with zeros, which change nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ._launch import Variant, launch, traced
from .temporal_attention import (
    BLOCKS,
    VECTOR_BYTES,
    Geometry,
    Integers,
    _angles,
    _bias_of,
    _cdiv,
    _contained,
    _exist,
    _finite,
    _geometry,
    _head_of,
    _in_vectors,
    _layout,
    _rows,
    _scores,
    _table,
    _tile_at,
    _turned,
)

Gradients = tuple[Tensor | None, ...]

PARTIAL_BYTES = 8 << 20  # of all partials, about
LAG_OPTIONS = {"BLOCK": 512, "num_warps": 4, "num_stages": 1}


@torch.no_grad()
def temporal_attention_backward(
    gradients: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rotary: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Gradients:
    """The gradient of each argument of `temporal_attention_reference`, None for those that want none.

    Args:
        gradients: one, of the result; any strides.
        others: as for `temporal_attention_reference`, fp16, bf16 or fp32, any strides, D up to 128. Of q, k, v and
            bias, those whose gradient is wanted have `requires_grad`.

    Returns:
        8 gradients, contiguous, each in the shape and dtype of its argument; the same bits in every run.

    Raises:
        ValueError: a result that a grid cannot hold (2^31 tiles).
    """
    (g_y,) = gradients
    arguments = (q, k, v, bias)
    wanted = [each is not None and each.requires_grad for each in arguments]
    if g_y is None or q.numel() == 0 or not any(wanted):
        pairs = zip(arguments, wanted, strict=True)
        return (*(torch.zeros_like(each) if want and each is not None else None for each, want in pairs), *[None] * 4)
    recording, D = traced(q), int(q.shape[5])
    tensors = [_wide(each, recording) for each in (q, k, v, g_y)]
    plan = _planned(tensors, rotary is not None, recording)
    T = plan.scalars[0]
    window = T if window is None else min(int(window), T)
    scalars = (*plan.scalars, int(causal), window, float(D**-0.5 if scale is None else scale), int(bias is not None))
    inputs = (*tensors, _table(bias, q), _angles_for(rotary, plan, recording))
    nothing = q.new_empty(0)
    results = [
        torch.empty(tensors[0].shape, dtype=q.dtype, device=q.device) if want else nothing for want in wanted[:3]
    ]
    run = _packed if plan.packed else _streamed
    partials = run(plan, inputs, scalars, results, wanted)
    g_bias = None if partials is None or bias is None else _along_lags(partials, T, bias)
    found = (each[..., :D].contiguous() if want else None for each, want in zip(results, wanted, strict=False))
    return (*found, g_bias, *[None] * 4)


def _wide(x: Tensor, recording: bool) -> Tensor:
    """A tensor that can be read in 16-byte vectors: a copy if this one cannot, D filled up with zeros."""
    if _layout(_geometry([x], recording)).vector > 1:
        return x
    lacking = -int(x.shape[5]) % (VECTOR_BYTES // x.element_size())
    return F.pad(x, (0, lacking)) if lacking else x.clone(memory_format=torch.contiguous_format)


def _angles_for(rotary: Tensor | None, plan: Plan, recording: bool) -> Tensor | None:
    """The angles as kernels take them, of as many channels."""
    if rotary is None:
        return None
    lacking = plan.scalars[4] // 2 - int(rotary.shape[1])
    return _in_vectors(F.pad(rotary, (0, 0, 0, lacking)) if lacking else rotary, recording)


def _packed(
    plan: Plan, inputs: Sequence[Any], scalars: Sequence[float], results: Sequence[Tensor], wanted: Sequence[bool]
) -> Tensor | None:
    """A launch for q, k and v, and one for the bias, as wanted. Returns the partials of the bias."""
    heads = plan.scalars[3]
    if any(wanted[:3]):
        counts = map(int, wanted[:3])
        launch(_tile_kernel, plan.tiles * heads, results[0], *inputs, *results, *scalars, *counts, **plan.options)
    if not wanted[3]:
        return None
    partials = _partials(plan, plan.tiles, diagonals=1, device=results[0].device)
    programs = partials.shape[:2].numel()
    launch(_table_kernel, programs, partials, *inputs, partials, *scalars, plan.tiles, **plan.options)
    return partials


def _streamed(
    plan: Plan, inputs: Sequence[Any], scalars: Sequence[float], results: Sequence[Tensor], wanted: Sequence[bool]
) -> Tensor | None:
    """A launch for queries and, as wanted, one for keys and one for the bias, whose partials it returns."""
    T, heads, tiles = plan.scalars[0], plan.scalars[3], plan.tiles
    want_q, want_k, want_v, want_bias = map(int, wanted)
    sums = torch.empty((2, plan.pixels * heads, T), dtype=torch.float32, device=results[0].device)
    *tensors, rotary = inputs
    inputs = (*tensors, sums if rotary is None else rotary)
    shared = (*scalars, int(rotary is not None), plan.pixels, tiles)
    programs = plan.pixels * heads * tiles
    launch(_query_kernel, programs, sums, *inputs, sums, results[0], *shared, want_q, **plan.options)
    if want_k or want_v:
        launch(_key_kernel, programs, sums, *inputs, sums, *results[1:], *shared, want_k, want_v, **plan.options)
    if not want_bias:
        return None
    partials = _partials(plan, plan.pixels, diagonals=2 * tiles - 1, device=sums.device)
    programs = partials.shape[:3].numel()
    launch(_diagonal_kernel, programs, partials, *inputs, sums, partials, *shared, **plan.options)
    return partials


def _partials(plan: Plan, most: int, diagonals: int, device: torch.device) -> Tensor:
    """Room for one to so many for each head and diagonal: enough to fill a card; no more than a result, or one.

    Their number is the same on every card, and so are results.
    """
    heads, rows = plan.scalars[3], plan.options["ROWS"]
    slots = min(PARTIAL_BYTES, plan.nbytes) // (4 * heads * diagonals * rows * rows)
    return torch.empty((max(1, min(most, slots)), heads, diagonals, rows, rows), dtype=torch.float32, device=device)


def _along_lags(partials: Tensor, T: int, bias: Tensor) -> Tensor:
    """The gradient of the bias."""
    slots, heads, diagonals, rows, _ = map(int, partials.shape)
    g_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    arguments = (partials, g_bias, slots, heads, diagonals, T)
    launch(_lag_kernel, heads * (2 * T - 1), g_bias, *arguments, ROWS=rows, **LAG_OPTIONS)
    return g_bias


# The device's part. A head of a pixel is `at` (clip, row, column, head), all int64; `steps` are a tensor's strides.


# fmt: off
@triton.jit
def _loaded(  # type: ignore[no-untyped-def]
    x, steps, at, frame, pixel, exists, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr
):
    """The rows of these frames and of pixels so far from `at`; 0 where there are none."""
    b, h, w, n = at
    step_b, step_t, step_h, step_w, step_n, step_d = steps
    step_t = tl.multiple_of(tl.cast(step_t, tl.int64), VECTOR)  # what is said of a sum is lost where pixel is 0
    first = _head_of(x, b, h, w, n, step_b, step_h, step_w, step_n, VECTOR)
    return tl.load(_tile_at(first, frame, pixel, step_t, step_w, step_d, BLOCK_D, VECTOR), mask=exists, other=0.0)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    x, sizes, at, frame, pixel, exists, values, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr
):
    """Write such rows into a contiguous (B, T, H, W, heads, D)."""
    b, h, w, n = at
    num_frames, height, width, heads, head_dim = sizes
    step_w = tl.cast(heads, tl.int64) * head_dim
    step_t = step_w * width * height
    first = _head_of(x, b, h, w, n, step_t * num_frames, step_w * width, step_w, head_dim, VECTOR)
    place = _tile_at(first, frame, pixel, step_t, step_w, 1, BLOCK_D, VECTOR)
    tl.store(place, values.to(x.dtype.element_ty), mask=exists)


@triton.jit
def _store_turned(  # type: ignore[no-untyped-def]
    x, sizes, at, frame, pixel, exists, values, rotary, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr
):
    """The same, of the gradients of turned rows, turned back."""
    if rotary is not None:
        values = _turned(values, _angles(rotary, frame, sizes[4], exists, BLOCK_D, VECTOR), BACK=True)
    _store(x, sizes, at, frame, pixel, exists, values, BLOCK_D, VECTOR)
# fmt: on


@triton.jit
def _of_pixel(spoilt, pixel):  # type: ignore[no-untyped-def]
    """The same of each row's pixel."""
    # Within `if`, since almost no tile needs it, and so that its table does not stay in registers.
    if tl.sum(spoilt, 0) != 0.0:
        spoilt = tl.sum(tl.where(pixel[:, None] == pixel[None, :], spoilt[None, :], 0.0), 1)
    return spoilt


@triton.jit
def _product(a, b):  # type: ignore[no-untyped-def]
    """`a @ b` in fp32, a taken in the dtype of b."""
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


STRIDES = tuple(f"{name}_{axis}" for name in ("q", "k", "v", "g") for axis in "bthwnd")
INPUTS = ("q", "k", "v", "g_y", "bias", "rotary")
SCALARS = (
    *("num_frames", "height", "width", "heads", "head_dim", *STRIDES),
    *("causal", "window", "scale", "has_bias"),
)
TILE_TENSORS, TILE_SCALARS = (*INPUTS, "g_q", "g_k", "g_v"), (*SCALARS, "want_q", "want_k", "want_v")
TABLE_TENSORS, TABLE_SCALARS = (*INPUTS, "partials"), (*SCALARS, "tiles")


# fmt: off
@triton.jit
def _tile_table(  # type: ignore[no-untyped-def]
    bias, n, num_frames, causal, window, has_bias, within, frame, ROWS: tl.constexpr
):
    """What is added to the scores of a tile of whole pixels, the same for all tiles of a head."""
    # Rows that are left over are of no pixel.
    seen = tl.where(within < ROWS // num_frames, within, -1)[:, None] == within[None, :]
    return _bias_of(bias, n, num_frames, causal, window, has_bias, frame[:, None] - frame[None, :], seen)


@triton.jit
def _tile_at_row(tile, n, num_frames, height, width, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """`at` of the first pixel of a tile, of all counted."""
    pixels = ROWS // num_frames
    of_row = tl.cdiv(width, pixels)
    row = tile // of_row
    at = ((row // height).to(tl.int64), (row % height).to(tl.int64), (tile % of_row).to(tl.int64) * pixels, n)
    return at


@triton.jit
def _weights(scores, table):  # type: ignore[no-untyped-def]
    """The softmax of rows, 0 for those that see nothing. What is left out has a weight too in a row that is NaN."""
    weights = tl.exp2(scores - _finite(tl.max(scores, 1))[:, None])
    empty = tl.max(table, 1) == float("-inf")
    return weights * (1.0 / tl.where(empty, 1.0, tl.sum(weights, 1)))[:, None]


@triton.jit
def _scores_gradient(weights, gradient, values):  # type: ignore[no-untyped-def]
    """From that of the result. What is left out has one too in a row where they are not finite."""
    g_weights = tl.dot(gradient, tl.trans(values), input_precision="ieee")
    g_weights = tl.where(weights == 0.0, 0.0, g_weights)  # a weight of zero does not undo what overflows
    return weights * (g_weights - tl.sum(weights * g_weights, 1)[:, None])


@triton.jit(do_not_specialize=[*TILE_TENSORS, *TILE_SCALARS])
def _tile_kernel(  # type: ignore[no-untyped-def]
    q, k, v, g_y,
    bias,  # (heads, 2 * num_frames - 1), or anything without has_bias
    rotary,  # (num_frames, head_dim), or None
    g_q, g_k, g_v,  # contiguous, or anything where it is not wanted
    num_frames,
    height, width,  # of the images; all pixels are one row where they can
    heads, head_dim,
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d,
    v_b, v_t, v_h, v_w, v_n, v_d, g_b, g_t, g_h, g_w, g_n, g_d,
    causal, window, scale, has_bias,
    want_q, want_k, want_v,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):
    """One head of a tile of whole pixels. Programs side by side have the heads of the same pixels."""
    program = tl.program_id(0)
    n = (program % heads).to(tl.int64)
    at = _tile_at_row(program // heads, n, num_frames, height, width, ROWS)
    sizes = (num_frames, height, width, heads, head_dim)
    within, t = _rows(num_frames, ROWS)
    pixel = within.to(tl.int64)
    exists = _exist((within < ROWS // num_frames) & (pixel < width - at[2]), head_dim, BLOCK_D, VECTOR)
    queries = _loaded(q, (q_b, q_t, q_h, q_w, q_n, q_d), at, t, pixel, exists, BLOCK_D, VECTOR)
    keys = _loaded(k, (k_b, k_t, k_h, k_w, k_n, k_d), at, t, pixel, exists, BLOCK_D, VECTOR)
    values = _loaded(v, (v_b, v_t, v_h, v_w, v_n, v_d), at, t, pixel, exists, BLOCK_D, VECTOR)
    gradient = _loaded(g_y, (g_b, g_t, g_h, g_w, g_n, g_d), at, t, pixel, exists, BLOCK_D, VECTOR)
    if rotary is not None:
        angles = _angles(rotary, t, head_dim, exists, BLOCK_D, VECTOR)
        queries, keys = _turned(queries, angles), _turned(keys, angles)
    queries, spoilt_q = _contained(queries)
    keys, spoilt_k = _contained(keys)
    values, spoilt_v = _contained(values)
    gradient, spoilt_g = _contained(gradient)
    spoilt = _of_pixel((spoilt_q + spoilt_k) + (spoilt_v + spoilt_g), within)

    table = _tile_table(bias, n, num_frames, causal, window, has_bias, within, t, ROWS)
    weights = _weights(_scores(queries, keys, scale, table, 0.0), table)
    weights = tl.where(table == float("-inf"), 0.0, weights)
    if want_v != 0:
        found = _product(tl.trans(weights.to(gradient.dtype)), gradient) + spoilt[:, None]
        _store(g_v, sizes, at, t, pixel, exists, found, BLOCK_D, VECTOR)
    g_scores = _scores_gradient(weights, gradient, values)
    g_scores = tl.where(table == float("-inf"), 0.0, g_scores).to(queries.dtype)
    if want_q != 0:
        found = _product(g_scores, keys) * scale + spoilt[:, None]
        _store_turned(g_q, sizes, at, t, pixel, exists, found, rotary, BLOCK_D, VECTOR)
    if want_k != 0:
        found = _product(tl.trans(g_scores), queries) * scale + spoilt[:, None]
        _store_turned(g_k, sizes, at, t, pixel, exists, found, rotary, BLOCK_D, VECTOR)


@triton.jit(do_not_specialize=[*TABLE_TENSORS, *TABLE_SCALARS])
def _table_kernel(  # type: ignore[no-untyped-def]
    q, k, v, g_y, bias, rotary,
    partials,  # (slots, heads, 1, ROWS, ROWS)
    num_frames,
    height, width,  # of the images; all pixels are one row where they can
    heads, head_dim,
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d,
    v_b, v_t, v_h, v_w, v_n, v_d, g_b, g_t, g_h, g_w, g_n, g_d,
    causal, window, scale, has_bias,
    tiles,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):
    """The gradient of the table of one head, from every so many-th tile."""
    program = tl.program_id(0)
    slot, slots = program // heads, tl.num_programs(0) // heads
    n = (program % heads).to(tl.int64)
    within, frame = _rows(num_frames, ROWS)
    table = _tile_table(bias, n, num_frames, causal, window, has_bias, within, frame, ROWS)
    g_table = tl.zeros((ROWS, ROWS), tl.float32)
    for tile in range(slot, tiles, slots):
        # Zero, which the compiler cannot know: else it keeps the offsets of all rows from tile to tile, and spills.
        zero = tl.minimum(tile, 0)
        t, pixel = frame + zero, (within + zero).to(tl.int64)
        at = _tile_at_row(tile, n, num_frames, height, width, ROWS)
        exists = _exist((pixel < ROWS // num_frames) & (pixel < width - at[2]), head_dim, BLOCK_D, VECTOR)
        queries = _loaded(q, (q_b, q_t, q_h, q_w, q_n, q_d), at, t, pixel, exists, BLOCK_D, VECTOR)
        keys = _loaded(k, (k_b, k_t, k_h, k_w, k_n, k_d), at, t, pixel, exists, BLOCK_D, VECTOR)
        if rotary is not None:
            angles = _angles(rotary, t, head_dim, exists, BLOCK_D, VECTOR)
            queries, keys = _turned(queries, angles), _turned(keys, angles)
        queries, spoilt_q = _contained(queries)
        keys, spoilt_k = _contained(keys)
        weights = _weights(_scores(queries, keys, scale, table, 0.0), table)
        values = _loaded(v, (v_b, v_t, v_h, v_w, v_n, v_d), at, t, pixel, exists, BLOCK_D, VECTOR)
        gradient = _loaded(g_y, (g_b, g_t, g_h, g_w, g_n, g_d), at, t, pixel, exists, BLOCK_D, VECTOR)
        values, spoilt_v = _contained(values)
        gradient, spoilt_g = _contained(gradient)
        spoilt = _of_pixel((spoilt_q + spoilt_k) + (spoilt_v + spoilt_g), within)
        g_table += _scores_gradient(weights, gradient, values) + spoilt[:, None]
    line = tl.arange(0, ROWS)
    target = partials + program.to(tl.int64) * (ROWS * ROWS)
    tl.store(target + (line[:, None] * ROWS + line[None, :]).to(tl.int64), g_table)


LAG_TENSORS = ("partials", "g_bias")
LAG_SCALARS = ("slots", "heads", "diagonals", "num_frames")


@triton.jit(do_not_specialize=[*LAG_TENSORS, *LAG_SCALARS])
def _lag_kernel(  # type: ignore[no-untyped-def]
    partials,  # (slots, heads, diagonals, ROWS, ROWS)
    g_bias,  # (heads, 2 * num_frames - 1)
    slots, heads, diagonals, num_frames,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """The sum over one lag of one head. A diagonal of tiles has the lags around a multiple of ROWS: two have this."""
    program = tl.program_id(0).to(tl.int64)
    lags = num_frames + num_frames - 1
    n = program // lags
    lag = program % lags - (num_frames - 1) + tl.cast(diagonals, tl.int64) // 2 * ROWS  # from the first of them
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, slots * (2 * ROWS), BLOCK):
        item = start + tl.arange(0, BLOCK)
        slot, item = item // (2 * ROWS), item % (2 * ROWS)
        query = item % ROWS
        diagonal = (lag + ROWS) // ROWS - 1 + item // ROWS
        key = query - (lag - diagonal * ROWS)
        there = (slot < slots) & (diagonal >= 0) & (diagonal < diagonals) & (key >= 0) & (key < ROWS)
        there &= query // num_frames == key // num_frames  # of one pixel
        tile = ((slot.to(tl.int64) * heads) + n) * diagonals + diagonal
        total += tl.load(partials + (tile * (ROWS * ROWS) + query.to(tl.int64) * ROWS + key), mask=there, other=0.0)
    tl.store(g_bias + program, tl.sum(total, 0).to(g_bias.dtype.element_ty))
# fmt: on


# More frames than rows: tiles of one pixel's frames.


STREAM_SCALARS = (*SCALARS, "has_rotary", "pixels", "tiles")
QUERY_TENSORS, QUERY_SCALARS = (*INPUTS, "sums", "g_q"), (*STREAM_SCALARS, "want_q")
KEY_TENSORS, KEY_SCALARS = (*INPUTS, "sums", "g_k", "g_v"), (*STREAM_SCALARS, "want_k", "want_v")
DIAGONAL_TENSORS, DIAGONAL_SCALARS = (*INPUTS, "sums", "partials"), STREAM_SCALARS


@triton.jit
def _pixel(index, n, height, width):  # type: ignore[no-untyped-def]
    """`at` of a head of a pixel, of all counted."""
    row = index // width
    at = ((row // height).to(tl.int64), (row % height).to(tl.int64), (index % width).to(tl.int64), n)
    return at


# fmt: off
@triton.jit
def _frames(  # type: ignore[no-untyped-def]
    x, steps, at, frame, num_frames, head_dim, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr
):
    """The rows of these frames of one pixel; 0 where there are none."""
    exists = _exist(frame < num_frames, head_dim, BLOCK_D, VECTOR)
    return _loaded(x, steps, at, frame, 0, exists, BLOCK_D, VECTOR)


@triton.jit
def _turns(  # type: ignore[no-untyped-def]
    turns, frame, num_frames, head_dim, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr
):
    """The angles of these frames; those that turn nothing if there are none: one form serves both."""
    rotary, has_rotary = turns
    exists = _exist(frame < num_frames, head_dim, BLOCK_D, VECTOR) & (has_rotary != 0)
    still = tl.where(tl.arange(0, BLOCK_D) % 2 == 0, 1.0, 0.0)[None, :]
    return tl.where(has_rotary != 0, _angles(rotary, frame, head_dim, exists, BLOCK_D, VECTOR), still)


@triton.jit
def _turned_frames(  # type: ignore[no-untyped-def]
    x, steps, at, frame, num_frames, head_dim, turns, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr
):
    """Rows of queries or keys."""
    rows = _frames(x, steps, at, frame, num_frames, head_dim, BLOCK_D, VECTOR)
    return _turned(rows, _turns(turns, frame, num_frames, head_dim, BLOCK_D, VECTOR))


@triton.jit
def _pair_table(bias, n, num_frames, causal, window, has_bias, query, key):  # type: ignore[no-untyped-def]
    """What is added to the scores of these frames."""
    seen = (query < num_frames)[:, None] & (key < num_frames)[None, :]
    return _bias_of(bias, n, num_frames, causal, window, has_bias, query[:, None] - key[None, :], seen)


@triton.jit
def _pair(queries, keys, values, gradient, normaliser, balance, scale, table):  # type: ignore[no-untyped-def]
    """The weights of a tile of queries and one of keys, and the gradient of their scores."""
    out = table == float("-inf")
    weights = tl.exp2(_scores(queries, keys, scale, table, 0.0) - normaliser[:, None])
    g_weights = tl.dot(gradient, tl.trans(values), input_precision="ieee")
    return tl.where(out, 0.0, weights), tl.where(out, 0.0, weights * (g_weights - balance[:, None]))


@triton.jit(do_not_specialize=[*QUERY_TENSORS, *QUERY_SCALARS])
def _query_kernel(  # type: ignore[no-untyped-def]
    q, k, v, g_y, bias, rotary,
    sums,  # (2, pixels * heads, num_frames): of each row the exponent of its normaliser, and its sum of P * g_P
    g_q,
    num_frames, height, width, heads, head_dim,
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d,
    v_b, v_t, v_h, v_w, v_n, v_d, g_b, g_t, g_h, g_w, g_n, g_d,
    causal, window, scale, has_bias, has_rotary,
    pixels, tiles,  # tiles: of queries or keys that a pixel has
    want_q,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):
    """A tile of queries of one head of one pixel."""
    program = tl.program_id(0)
    head = program // tiles  # of a pixel
    n = (head % heads).to(tl.int64)
    at = _pixel(head // heads, n, height, width)
    turns = (rotary, has_rotary)
    k_steps, v_steps = (k_b, k_t, k_h, k_w, k_n, k_d), (v_b, v_t, v_h, v_w, v_n, v_d)
    first = (program % tiles).to(tl.int64) * ROWS
    t = first + tl.arange(0, ROWS)
    queries = _turned_frames(q, (q_b, q_t, q_h, q_w, q_n, q_d), at, t, num_frames, head_dim, turns, BLOCK_D, VECTOR)
    gradient = _frames(g_y, (g_b, g_t, g_h, g_w, g_n, g_d), at, t, num_frames, head_dim, BLOCK_D, VECTOR)
    begin = tl.maximum(first - window, 0) // ROWS * ROWS
    end = tl.minimum(first + ROWS + tl.where(causal != 0, 0, window), num_frames)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    allowed = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    balance = tl.zeros((ROWS,), tl.float32)
    for start in range(begin, end, ROWS):
        s = start + tl.arange(0, ROWS)
        keys = _turned_frames(k, k_steps, at, s, num_frames, head_dim, turns, BLOCK_D, VECTOR)
        values = _frames(v, v_steps, at, s, num_frames, head_dim, BLOCK_D, VECTOR)
        table = _pair_table(bias, n, num_frames, causal, window, has_bias, t, s)
        allowed = tl.maximum(allowed, tl.max(table, 1))
        scores = _scores(queries, keys, scale, table, 0.0)
        higher = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp2(top - _finite(higher))
        weights = tl.exp2(scores - _finite(higher)[:, None])
        g_weights = tl.dot(gradient, tl.trans(values), input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        balance = balance * fade + tl.sum(tl.where(table == float("-inf"), 0.0, weights * g_weights), 1)
        top = higher
    total = tl.where(allowed == float("-inf"), 1.0, total)
    normaliser, balance = _finite(top) + tl.log2(total), balance / total
    place = sums + (head.to(tl.int64) * num_frames + t)
    tl.store(place, normaliser, mask=t < num_frames)
    tl.store(place + tl.cast(pixels, tl.int64) * heads * num_frames, balance, mask=t < num_frames)
    if want_q == 0:
        return

    found = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(begin, end, ROWS):
        s = start + tl.arange(0, ROWS)
        keys = _turned_frames(k, k_steps, at, s, num_frames, head_dim, turns, BLOCK_D, VECTOR)
        values = _frames(v, v_steps, at, s, num_frames, head_dim, BLOCK_D, VECTOR)
        table = _pair_table(bias, n, num_frames, causal, window, has_bias, t, s)
        _, g_scores = _pair(queries, keys, values, gradient, normaliser, balance, scale, table)
        found += _product(g_scores, keys)
    sizes = (num_frames, height, width, heads, head_dim)
    exists = _exist(t < num_frames, head_dim, BLOCK_D, VECTOR)
    angles = _turns(turns, t, num_frames, head_dim, BLOCK_D, VECTOR)
    _store(g_q, sizes, at, t, 0, exists, _turned(found * scale, angles, BACK=True), BLOCK_D, VECTOR)


@triton.jit(do_not_specialize=[*KEY_TENSORS, *KEY_SCALARS])
def _key_kernel(  # type: ignore[no-untyped-def]
    q, k, v, g_y, bias, rotary, sums, g_k, g_v,
    num_frames, height, width, heads, head_dim,
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d,
    v_b, v_t, v_h, v_w, v_n, v_d, g_b, g_t, g_h, g_w, g_n, g_d,
    causal, window, scale, has_bias, has_rotary,
    pixels, tiles, want_k, want_v,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):
    """A tile of keys of one head of one pixel."""
    program = tl.program_id(0)
    head = program // tiles
    n = (head % heads).to(tl.int64)
    at = _pixel(head // heads, n, height, width)
    turns = (rotary, has_rotary)
    q_steps, g_steps = (q_b, q_t, q_h, q_w, q_n, q_d), (g_b, g_t, g_h, g_w, g_n, g_d)
    first = (program % tiles).to(tl.int64) * ROWS
    s = first + tl.arange(0, ROWS)
    keys = _turned_frames(k, (k_b, k_t, k_h, k_w, k_n, k_d), at, s, num_frames, head_dim, turns, BLOCK_D, VECTOR)
    values = _frames(v, (v_b, v_t, v_h, v_w, v_n, v_d), at, s, num_frames, head_dim, BLOCK_D, VECTOR)
    begin = tl.maximum(first - tl.where(causal != 0, 0, window), 0) // ROWS * ROWS
    end = tl.minimum(first + ROWS + window, num_frames)
    of_keys = tl.zeros((ROWS, BLOCK_D), tl.float32)
    of_values = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(begin, end, ROWS):
        t = start + tl.arange(0, ROWS)
        queries = _turned_frames(q, q_steps, at, t, num_frames, head_dim, turns, BLOCK_D, VECTOR)
        gradient = _frames(g_y, g_steps, at, t, num_frames, head_dim, BLOCK_D, VECTOR)
        place = sums + (head.to(tl.int64) * num_frames + t)
        normaliser = tl.load(place, mask=t < num_frames, other=0.0)
        balance = tl.load(place + tl.cast(pixels, tl.int64) * heads * num_frames, mask=t < num_frames, other=0.0)
        table = _pair_table(bias, n, num_frames, causal, window, has_bias, t, s)
        weights, g_scores = _pair(queries, keys, values, gradient, normaliser, balance, scale, table)
        of_values += _product(tl.trans(weights.to(gradient.dtype)), gradient)
        of_keys += _product(tl.trans(g_scores.to(queries.dtype)), queries)
    sizes = (num_frames, height, width, heads, head_dim)
    exists = _exist(s < num_frames, head_dim, BLOCK_D, VECTOR)
    if want_v != 0:
        _store(g_v, sizes, at, s, 0, exists, of_values, BLOCK_D, VECTOR)
    if want_k != 0:
        angles = _turns(turns, s, num_frames, head_dim, BLOCK_D, VECTOR)
        _store(g_k, sizes, at, s, 0, exists, _turned(of_keys * scale, angles, BACK=True), BLOCK_D, VECTOR)


@triton.jit(do_not_specialize=[*DIAGONAL_TENSORS, *DIAGONAL_SCALARS])
def _diagonal_kernel(  # type: ignore[no-untyped-def]
    q, k, v, g_y, bias, rotary, sums,
    partials,  # (slots, heads, 2 * tiles - 1, ROWS, ROWS)
    num_frames, height, width, heads, head_dim,
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d,
    v_b, v_t, v_h, v_w, v_n, v_d, g_b, g_t, g_h, g_w, g_n, g_d,
    causal, window, scale, has_bias, has_rotary,
    pixels, tiles,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):
    """Of one head of every so many-th pixel, all tiles of queries with the tiles of keys that lie so far from them."""
    program = tl.program_id(0)
    diagonals = tiles + tiles - 1
    far = program % diagonals - (tiles - 1)
    slot = program // diagonals // heads
    slots = tl.num_programs(0) // diagonals // heads
    n = (program // diagonals % heads).to(tl.int64)
    turns, q_steps, k_steps = (rotary, has_rotary), (q_b, q_t, q_h, q_w, q_n, q_d), (k_b, k_t, k_h, k_w, k_n, k_d)
    count = tiles - tl.abs(far)  # of tiles on the diagonal
    lane = tl.arange(0, ROWS)
    g_table = tl.zeros((ROWS, ROWS), tl.float32)
    for pixel in range(slot, pixels, slots):
        at = _pixel(pixel, n, height, width)
        head = tl.cast(pixel, tl.int64) * heads + n
        for tile in range(count):
            t = tl.cast(tl.maximum(far, 0) + tile, tl.int64) * ROWS + lane
            s = t - far.to(tl.int64) * ROWS
            values = _frames(v, (v_b, v_t, v_h, v_w, v_n, v_d), at, s, num_frames, head_dim, BLOCK_D, VECTOR)
            gradient = _frames(g_y, (g_b, g_t, g_h, g_w, g_n, g_d), at, t, num_frames, head_dim, BLOCK_D, VECTOR)
            queries = _turned_frames(q, q_steps, at, t, num_frames, head_dim, turns, BLOCK_D, VECTOR)
            keys = _turned_frames(k, k_steps, at, s, num_frames, head_dim, turns, BLOCK_D, VECTOR)
            place = sums + (head * num_frames + t)
            normaliser = tl.load(place, mask=t < num_frames, other=0.0)
            balance = tl.load(place + tl.cast(pixels, tl.int64) * heads * num_frames, mask=t < num_frames, other=0.0)
            table = _pair_table(bias, n, num_frames, causal, window, has_bias, t, s)
            g_table += _pair(queries, keys, values, gradient, normaliser, balance, scale, table)[1]
    target = partials + program.to(tl.int64) * (ROWS * ROWS)
    tl.store(target + (lane[:, None] * ROWS + lane[None, :]).to(tl.int64), g_table)
# fmt: on


# The host's part: which form serves which tensors, and the integers it is given. It is cached by geometry.


class Plan(NamedTuple):
    """How the gradients are computed.

    Args:
        packed: whether tiles hold all frames of their pixels.
        pixels: of the batch.
        tiles: of the batch where they are packed, else of a pixel.
        nbytes: of a result.
        scalars: from num_frames on, up to the strides.
        options: of launches.
    """

    packed: bool
    pixels: int
    tiles: int
    nbytes: int
    scalars: Integers
    options: dict[str, int]


def _planned(tensors: Sequence[Tensor], rotated: bool, recording: bool) -> Plan:
    geometry = _geometry(tensors, recording)
    return _plan(geometry, rotated) if recording else _cached_plan(geometry, rotated)


def _plan(geometry: Geometry, rotated: bool) -> Plan:
    (B, T, H, W, heads, D), strides, _ = _layout(geometry)
    packed = geometry.itemsize == 2 and T <= PACKED_ROWS
    options = _options(packed, geometry.itemsize, next(block for block in BLOCKS if block >= D))
    tiles = B * H * _cdiv(W, options["ROWS"] // T) if packed else _cdiv(T, options["ROWS"])
    scalars = (T, H, W, heads, D, *(step for each in strides for step in each))
    nbytes = B * T * H * W * heads * D * geometry.itemsize
    return Plan(packed, B * H * W, tiles, nbytes, scalars, options)


_cached_plan = functools.lru_cache(maxsize=1024)(_plan)


PACKED_ROWS = 64  # of 2-byte types: fp32 products run on plain registers, which so many rows do not fit in
STREAM_ROWS = {2: 32, 4: 16}
STREAM_WARPS = {(2, 64): 4, (2, 128): 8, (4, 64): 8, (4, 128): 4}  # by bytes and block of D: nothing spills so


def _options(packed: bool, itemsize: int, block_d: int) -> dict[str, int]:
    """Of a launch."""
    vector = VECTOR_BYTES // itemsize
    if packed:
        return {"ROWS": PACKED_ROWS, "BLOCK_D": block_d, "VECTOR": vector, "num_warps": 8, "num_stages": 1}
    rows, block_d = STREAM_ROWS[itemsize], max(block_d, 64)
    num_warps = STREAM_WARPS[itemsize, block_d]
    return {"ROWS": rows, "BLOCK_D": block_d, "VECTOR": vector, "num_warps": num_warps, "num_stages": 1}


# What ships: every compiled form that a launch can ask for.

DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}
FP32 = {"bias", "rotary", "sums", "partials"}
PACKED = {
    "tile": ("_tile_kernel", TILE_TENSORS, TILE_SCALARS),
    "table": ("_table_kernel", TABLE_TENSORS, TABLE_SCALARS),
}
STREAMED = {
    "queries": ("_query_kernel", QUERY_TENSORS, QUERY_SCALARS),
    "keys": ("_key_kernel", KEY_TENSORS, KEY_SCALARS),
    "diagonal": ("_diagonal_kernel", DIAGONAL_TENSORS, DIAGONAL_SCALARS),
}


def _variant(form: str, dtype: str, options: dict[str, int], rotary: bool) -> Variant:
    kernel, tensors, scalars = (PACKED | STREAMED)[form]
    constants: dict[str, Any] = {name: value for name, value in options.items() if name.isupper()}
    constants |= {"rotary": None} if form in PACKED and not rotary else {}
    signature = {name: "*fp32" if name in FP32 else f"*{dtype}" for name in tensors}
    signature |= dict.fromkeys(scalars, "i32") | {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    name = f"{dtype} {form} {options['BLOCK_D']}{' rotary' * rotary}"
    return Variant(name, kernel, signature, constants, options["num_warps"], options["num_stages"], wide_loads=4)


def _lag_variant(dtype: str, rows: int) -> Variant:
    constants = {"ROWS": rows, "BLOCK": LAG_OPTIONS["BLOCK"]}
    signature = {"partials": "*fp32", "g_bias": f"*{dtype}"} | dict.fromkeys(LAG_SCALARS, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    return Variant(f"{dtype} lags of {rows}", "_lag_kernel", signature, constants, LAG_OPTIONS["num_warps"], 1)


VARIANTS = (
    *(
        _variant(form, dtype, _options(True, 2, block_d), rotary)
        for dtype, form, block_d, rotary in product(("fp16", "bf16"), PACKED, BLOCKS, (False, True))
    ),
    *(
        _variant(form, dtype, _options(False, DTYPES[dtype], block_d), False)
        for dtype, form, block_d in product(DTYPES, STREAMED, (64, 128))
    ),
    *(_lag_variant(dtype, rows) for dtype, rows in (("fp16", PACKED_ROWS), ("bf16", PACKED_ROWS))),
    *(_lag_variant(dtype, STREAM_ROWS[itemsize]) for dtype, itemsize in DTYPES.items()),
)
