"""temporal_attention on the views it is given: the few frames of several pixels are one tile.

A tile has ROWS rows: whole pixels side by side, all frames of each, so that scores are one product of rows with rows
in which those between pixels are left out. What is left out, and the bias, is a table that all tiles of a head share:
a program makes it once and walks over pixels. The op reads and writes far more than it computes, so products that are
thrown away cost nothing as long as every byte is moved once.

Where a pixel's frames are more than a tile has rows, programs take some of its rows each and walk over its frames with
a running softmax. That form also serves tensors that cannot be read in 16-byte vectors.

A weight of zero does not undo a value that is not finite, so where a sum turns out NaN it is made again without those
of other pixels: a pixel is spoiled by none but its own numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import aligned, launch, traced

OP = "temporal_attention"
VECTOR_BYTES = 16
MOST_HEAD_DIM = 128
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
MOST_ROWS = {2: 128, 4: 64}  # of a tile, by the bytes of an element
PROGRAMS = 132 * 8  # from which on a program takes several tiles

Integers = tuple[int, ...]


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rotary: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    *,
    out: Tensor,
) -> None:
    """Write what `temporal_attention_reference` returns into `out`. fp16, bf16 or fp32; any strides, D up to 128.

    Fast are views whose D is dense and that are all made of whole 16-byte vectors.

    Raises:
        ValueError: a result that a grid cannot hold (2^31 tiles).
    """
    if out.numel() == 0:
        return
    T, D = int(q.shape[1]), int(q.shape[5])
    plan = _planned((q, k, v, out), traced(out))
    window = T if window is None else min(int(window), T)
    scalars = (int(causal), window, float(D**-0.5 if scale is None else scale), int(bias is not None))
    tables = (_table(bias, q), None if rotary is None else rotary.contiguous())
    kernel = _tile_kernel if plan.packed else _stream_kernel
    launch(kernel, plan.programs, out, q, k, v, *tables, out, *plan.scalars, *scalars, **plan.constants, **plan.options)


def _table(bias: Tensor | None, q: Tensor) -> Tensor:
    """A bias as kernels take it; of nothing if there is none."""
    return q.new_empty(0, dtype=torch.float32) if bias is None else bias.float().contiguous()


@triton.jit
def _rows(num_frames, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the rows of a tile of whole pixels: which pixel of the tile, which frame."""
    row = tl.arange(0, ROWS)
    return row // num_frames, row % num_frames


@triton.jit
def _head_of(base, b, h, w, n, step_b, step_h, step_w, step_n, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a head of a pixel begins."""
    first = base + (b * step_b + h * step_h + w * step_w + n * step_n)
    return tl.multiple_of(first, 16) if VECTOR > 1 else first


@triton.jit
def _tile_at(first, frame, pixel, step_t, step_w, step_d, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The addresses of a tile, from those of its frames and pixels relative to where a head begins."""
    row = tl.multiple_of(frame.to(tl.int64) * step_t + pixel * step_w, VECTOR)[:, None]
    lane = tl.arange(0, BLOCK_D)[None, :]
    return first + (row + (lane if VECTOR > 1 else lane.to(tl.int64) * step_d))


@triton.jit
def _exist(inside, head_dim, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which elements of a tile there are; `inside`: which rows."""
    return inside[:, None] & (tl.arange(0, BLOCK_D) < tl.multiple_of(tl.cast(head_dim, tl.int64), VECTOR))[None, :]


@triton.jit
def _angles(rotary, frame, head_dim, exists, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each row its frame's (cos, sin), pair after pair."""
    row = tl.multiple_of(frame.to(tl.int64) * head_dim, VECTOR)[:, None]
    return tl.load(rotary + (row + tl.arange(0, BLOCK_D)[None, :]), mask=exists, other=0.0)


@triton.jit
def _turned(x, angles, BACK: tl.constexpr = False):  # type: ignore[no-untyped-def]
    """The pairs of channels of each row turned by its angles, or back by them, in the dtype of x."""
    PAIRS: tl.constexpr = (x.shape[0], x.shape[1] // 2, 2)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), PAIRS))
    cos, sin = tl.split(tl.reshape(angles, PAIRS))
    if BACK:
        sin = -sin
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape).to(x.dtype)


@triton.jit
def _bias_of(bias, head, num_frames, causal, window, has_bias, lag, seen):  # type: ignore[no-untyped-def]
    """What is added to scores in the exponent of 2, by lag; -inf for what is left out or not `seen`."""
    seen = seen & (tl.abs(lag) <= window) & ((lag >= 0) | (causal == 0))
    table = tl.where(seen, 0.0, float("-inf"))
    if has_bias != 0:
        row = bias + head.to(tl.int64) * (2 * num_frames - 1).to(tl.int64)
        table = tl.load(row + (lag + num_frames - 1).to(tl.int64), mask=seen, other=float("-inf")) * LOG2E
    return table


@triton.jit
def _scores(q, k, scale, table):  # type: ignore[no-untyped-def]
    """Of rows with rows, in the exponent of 2. What the table leaves out is -inf whatever is in q and k."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) + table
    return tl.where(table == float("-inf"), float("-inf"), scores)


@triton.jit
def _finite(top):  # type: ignore[no-untyped-def]
    """What to take from the scores of rows whose largest is `top`."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _sums(weights, values, pixel):  # type: ignore[no-untyped-def]
    """`weights @ values`; weights between rows of different pixels are 0, and stay without effect whatever the values.

    A value that is not finite would spoil the sums of all pixels of the tile.
    """
    sums = tl.dot(weights, values, input_precision="ieee")
    if tl.max(tl.max((sums != sums).to(tl.int32), 1), 0) != 0:
        finite = tl.abs(values.to(tl.float32)) < float("inf")
        own = (pixel[:, None] == pixel[None, :]).to(tl.float16)
        spoiled = tl.dot(own, tl.where(finite, 0.0, 1.0).to(tl.float16)) > 0
        again = tl.dot(weights, tl.where(finite, values, 0.0).to(values.dtype), input_precision="ieee")
        sums = tl.where(spoiled, sums, again)
    return sums


TENSORS = ("q", "k", "v", "bias", "rotary", "out")
SCALARS = (
    *("num_frames", "height", "width", "heads", "head_dim", "parts", "steps"),
    *(f"{name}_{axis}" for name in ("q", "k", "v", "out") for axis in "bthwnd"),
    *("causal", "window", "scale", "has_bias"),
)


# fmt: off
@triton.jit(do_not_specialize=[*TENSORS, *SCALARS])
def _tile_kernel(  # type: ignore[no-untyped-def]
    q, k, v,
    bias,  # (heads, 2 * num_frames - 1), or anything without has_bias
    rotary,  # (num_frames, head_dim), or None
    out,
    num_frames,
    height, width,  # of the images; all pixels are one row where they can
    heads, head_dim,
    parts, steps,  # programs that a row of pixels is shared out to, tiles of each
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d,
    v_b, v_t, v_h, v_w, v_n, v_d, out_b, out_t, out_h, out_w, out_n, out_d,
    causal, window, scale, has_bias,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):
    """One head of the pixels of some tiles. Programs side by side have the heads of the same pixels."""
    program = tl.program_id(0)
    n = (program % heads).to(tl.int64)
    program = program // heads
    part = (program % parts).to(tl.int64)
    program = program // parts
    h, b = (program % height).to(tl.int64), (program // height).to(tl.int64)
    q = _head_of(q, b, h, 0, n, q_b, q_h, 0, q_n, VECTOR)
    k = _head_of(k, b, h, 0, n, k_b, k_h, 0, k_n, VECTOR)
    v = _head_of(v, b, h, 0, n, v_b, v_h, 0, v_n, VECTOR)
    out = _head_of(out, b, h, 0, n, out_b, out_h, 0, out_n, VECTOR)

    within, frame = _rows(num_frames, ROWS)
    seen = within[:, None] == within[None, :]
    table = _bias_of(bias, n, num_frames, causal, window, has_bias, frame[:, None] - frame[None, :], seen)
    empty = tl.max(table, 1) == float("-inf")
    pixels = ROWS // num_frames  # of a tile
    first = part * steps * pixels
    count = tl.minimum(width - first, tl.cast(steps, tl.int64) * pixels).to(tl.int32)
    for start in tl.range(0, count, pixels, num_stages=STAGES):
        inside = (within < pixels) & (within < count - start)
        exists = _exist(inside, head_dim, BLOCK_D, VECTOR)
        pixel = first + start + within
        queries = tl.load(_tile_at(q, frame, pixel, q_t, q_w, q_d, BLOCK_D, VECTOR), exists, 0.0)
        keys = tl.load(_tile_at(k, frame, pixel, k_t, k_w, k_d, BLOCK_D, VECTOR), exists, 0.0)
        values = tl.load(_tile_at(v, frame, pixel, v_t, v_w, v_d, BLOCK_D, VECTOR), exists, 0.0)
        if rotary is not None:
            angles = _angles(rotary, frame, head_dim, exists, BLOCK_D, VECTOR)
            queries, keys = _turned(queries, angles), _turned(keys, angles)
        scores = _scores(queries, keys, scale, table)
        weights = tl.exp2(scores - _finite(tl.max(scores, 1))[:, None])
        total = tl.where(empty, 1.0, tl.sum(weights, 1))
        if ROWS > 64:  # more frames than half the rows: a single pixel
            sums = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        else:
            sums = _sums(weights.to(values.dtype), values, within)
        target = _tile_at(out, frame, pixel, out_t, out_w, out_d, BLOCK_D, VECTOR)
        tl.store(target, (sums / total[:, None]).to(out.dtype.element_ty), exists)


@triton.jit(do_not_specialize=[*TENSORS, *SCALARS])
def _stream_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bias, rotary, out,
    num_frames, height, width, heads, head_dim,
    parts, steps,  # parts: tiles of queries that a pixel has
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d,
    v_b, v_t, v_h, v_w, v_n, v_d, out_b, out_t, out_h, out_w, out_n, out_d,
    causal, window, scale, has_bias,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):
    """Some frames of one head of one pixel, which see the others tile by tile."""
    program = tl.program_id(0)
    part = program % parts
    program = program // parts
    n = (program % heads).to(tl.int64)
    program = program // heads
    w = (program % width).to(tl.int64)
    program = program // width
    h, b = (program % height).to(tl.int64), (program // height).to(tl.int64)
    q = _head_of(q, b, h, w, n, q_b, q_h, q_w, q_n, VECTOR)
    k = _head_of(k, b, h, w, n, k_b, k_h, k_w, k_n, VECTOR)
    v = _head_of(v, b, h, w, n, v_b, v_h, v_w, v_n, VECTOR)
    out = _head_of(out, b, h, w, n, out_b, out_h, out_w, out_n, VECTOR)

    from_t = part * ROWS
    t = from_t + tl.arange(0, ROWS)
    exists = _exist(t < num_frames, head_dim, BLOCK_D, VECTOR)
    queries = tl.load(_tile_at(q, t, 0, q_t, 0, q_d, BLOCK_D, VECTOR), exists, 0.0)
    if rotary is not None:
        queries = _turned(queries, _angles(rotary, t, head_dim, exists, BLOCK_D, VECTOR))
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    allowed = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    begin = tl.maximum(from_t - window, 0) // KEYS * KEYS
    end = tl.minimum(from_t + ROWS + tl.where(causal != 0, 0, window), num_frames)
    for from_s in tl.range(begin, end, KEYS, num_stages=STAGES):
        s = from_s + tl.arange(0, KEYS)
        here = _exist(s < num_frames, head_dim, BLOCK_D, VECTOR)
        keys = tl.load(_tile_at(k, s, 0, k_t, 0, k_d, BLOCK_D, VECTOR), here, 0.0)
        values = tl.load(_tile_at(v, s, 0, v_t, 0, v_d, BLOCK_D, VECTOR), here, 0.0)
        if rotary is not None:
            keys = _turned(keys, _angles(rotary, s, head_dim, here, BLOCK_D, VECTOR))
        seen = (t < num_frames)[:, None] & (s < num_frames)[None, :]
        table = _bias_of(bias, n, num_frames, causal, window, has_bias, t[:, None] - s[None, :], seen)
        allowed = tl.maximum(allowed, tl.max(table, 1))
        scores = _scores(queries, keys, scale, table)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - _finite(higher)[:, None])
        fade = tl.exp2(top - _finite(higher))
        total = total * fade + tl.sum(weights, 1)
        sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
        top = higher
    total = tl.where(allowed == float("-inf"), 1.0, total)
    target = _tile_at(out, t, 0, out_t, 0, out_d, BLOCK_D, VECTOR)
    tl.store(target, (sums / total[:, None]).to(out.dtype.element_ty), exists)
# fmt: on


# The host's part: which form serves which tensors, and the integers it is given. It is cached by geometry.


class Geometry(NamedTuple):
    """All that decides a launch.

    Args:
        vectors: whether every tensor begins at a multiple of 16 bytes.
    """

    shape: Integers
    strides: tuple[Integers, ...]
    itemsize: int
    vectors: bool


class Plan(NamedTuple):
    """One launch.

    Args:
        packed: whether tiles hold all frames of their pixels.
        scalars: from num_frames on, up to the strides.
    """

    packed: bool
    programs: int
    scalars: Integers
    constants: dict[str, Any]
    options: dict[str, int]


def _planned(tensors: Sequence[Tensor], recording: bool) -> Plan:
    geometry = Geometry(
        tensors[0].shape,
        tuple([tensor.stride() for tensor in tensors]),
        tensors[0].element_size(),
        all([aligned(tensor, VECTOR_BYTES, recording) for tensor in tensors]),
    )
    return _plan(geometry) if recording else _cached_plan(geometry)


def _plan(geometry: Geometry) -> Plan:
    B, T, H, W, heads, D = shape = tuple(map(int, geometry.shape))
    strides = [_settled(shape, each) for each in geometry.strides]
    if all(H == 1 or W == 1 or h == W * w for _, _, h, w, _, _ in strides):
        strides = [(b, t, 0, h if W == 1 else w, n, d) for b, t, h, w, n, d in strides]
        H, W = 1, H * W
    vector = VECTOR_BYTES // geometry.itemsize
    wide = geometry.vectors and all(d == 1 and all(n % vector == 0 for n in (D, *rest)) for *rest, d in strides)
    rows = 64 if T <= 64 else 128
    packed = wide and rows <= MOST_ROWS[geometry.itemsize] and rows >= T
    block_d = next(size for size in (32, 64, 128) if size >= D)
    constants = {"BLOCK_D": block_d, "VECTOR": vector if wide else 1}
    if packed:
        tiles = _cdiv(W, rows // T)
        steps = max(1, min(8, B * H * heads * tiles // PROGRAMS))
        parts = _cdiv(tiles, steps)
        programs = B * H * heads * parts
        constants = {"ROWS": rows, **constants, "STAGES": 2}
    else:
        rows, keys = 64, 32
        parts, steps = _cdiv(T, rows), 1
        programs = B * H * W * heads * parts
        constants = {"ROWS": rows, "KEYS": keys, **constants, "STAGES": 2}
    scalars = (T, H, W, heads, D, parts, steps, *(step for each in strides for step in each))
    return Plan(packed, programs, scalars, constants, {"num_warps": 4, "num_stages": 2})


_cached_plan = functools.lru_cache(maxsize=1024)(_plan)


def _settled(shape: Integers, strides: Sequence[int]) -> Integers:
    """Plain integers, also in a trace with symbolic shapes: 0 where an axis has one element, but D's is then 1."""
    *outer, d = (int(stride) if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
    return (*outer, d if shape[5] > 1 else 1)


def _cdiv(count: int, size: int) -> int:
    return -(-count // size)
