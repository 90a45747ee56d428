"""temporal_attention on the views it is given: the few frames of several pixels are one tile.

A tile has ROWS rows: whole pixels side by side, all frames of each, so that scores are one product of rows with rows
in which those between pixels are left out. The op moves far more than it computes, so products that are thrown away
cost nothing as long as every byte is moved once.

Where frames are more than a tile's rows, a program takes as many rows of one pixel, and walks over the pixel's frames
with a running softmax: keys and values are read once by each tile of queries. In half precision, without a
rotation or with D up to 32, that has 128 rows: up to 128 frames, every byte is still moved once. This form also serves
tensors that cannot be read in 16-byte vectors.

A weight of zero does not undo a value that is not finite: 0 * NaN is NaN. So before pixels share a product, rows of
values that are not finite are set to zero, and NaN is put into the scores that see them: a pixel is spoiled by none but
its own numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, aligned, launch, traced

VECTOR_BYTES = 16
MOST_HEAD_DIM = 128
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
MOST_BIAS: tl.constexpr = tl.constexpr(2e38)  # in the exponent of 2
BLOCKS = (32, 64, 128)  # what head_dim is padded to

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
    recording = traced(out)
    plan = _planned((q, k, v, out), rotary is not None, recording)
    window = T if window is None else min(int(window), T)
    scalars = (int(causal), window, float(D**-0.5 if scale is None else scale), int(bias is not None))
    tables = (_table(bias, q), None if rotary is None else _in_vectors(rotary, recording))
    kernel = _tile_kernel if plan.packed else _stream_kernel
    launch(kernel, plan.programs, out, q, k, v, *tables, out, *plan.scalars, *scalars, **plan.constants, **plan.options)


def _table(bias: Tensor | None, q: Tensor) -> Tensor:
    """A bias as kernels take it; of nothing if there is none."""
    return q.new_empty(0, dtype=torch.float32) if bias is None else bias.float().contiguous()


def _in_vectors(rotary: Tensor, recording: bool) -> Tensor:
    """The angles as kernels take them, copied where they do not lie so."""
    if rotary.is_contiguous() and aligned(rotary, VECTOR_BYTES, recording):
        return rotary
    return rotary.clone(memory_format=torch.contiguous_format)


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
    """The addresses of a tile of rows, by frame and pixel after `first`."""
    row = tl.multiple_of(frame.to(tl.int64) * step_t, VECTOR)
    row += tl.multiple_of(tl.cast(pixel, tl.int64) * step_w, VECTOR)
    lane = tl.arange(0, BLOCK_D)[None, :]
    if VECTOR > 1:
        return first + (row[:, None] + lane)
    return first + (row[:, None] + lane.to(tl.int64) * step_d)


@triton.jit
def _exist(inside, head_dim, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which elements of a tile there are; `inside`: which rows."""
    return inside[:, None] & (tl.arange(0, BLOCK_D) < tl.multiple_of(tl.cast(head_dim, tl.int64), VECTOR))[None, :]


@triton.jit
def _angles(rotary, frame, head_dim, exists, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each row its frame's (cos, sin), pair after pair."""
    row = rotary + (frame.to(tl.int64) * head_dim)[:, None]
    if VECTOR > 1:
        row = tl.multiple_of(row, (16, 16))
    return tl.load(row + tl.arange(0, BLOCK_D).to(tl.int64)[None, :], exists, 0.0)


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
    """What is added to scores in the exponent of 2, by lag; -inf for what is left out or not `seen`.

    Only -inf leaves a frame out: what is finite stays so, also with a score added.
    """
    seen = seen & (tl.abs(lag) <= window) & ((lag >= 0) | (causal == 0))
    row = bias + (head * (2 * tl.cast(num_frames, tl.int64) - 1) + (num_frames - 1))
    value = tl.load(row + lag.to(tl.int64), seen & (has_bias != 0), tl.where(seen, 0.0, float("-inf")))
    scaled = tl.clamp(value * LOG2E, -MOST_BIAS, MOST_BIAS, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(tl.abs(value) == float("inf"), value, scaled)


@triton.jit
def _scores(q, k, scale, table, spoil):  # type: ignore[no-untyped-def]
    """Of rows with rows, in the exponent of 2. What the table leaves out is -inf whatever is in q, k and spoil."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) + spoil
    return tl.where(table == float("-inf"), float("-inf"), scores + table)


@triton.jit
def _finite(top):  # type: ignore[no-untyped-def]
    """What to take from the scores of rows whose largest is `top`."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _contained(values):  # type: ignore[no-untyped-def]
    """The rows of values that are finite, the others zero; and of each 0, or NaN if it was not finite."""
    spoil = tl.sum(values.to(tl.float32) * 0.0, 1)
    return tl.where((spoil == 0.0)[:, None], values, 0.0).to(values.dtype), spoil


TENSORS = ("q", "k", "v", "bias", "rotary", "out")
SCALARS = (
    *("num_frames", "height", "width", "heads", "head_dim", "parts"),
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
    parts,  # tiles in a row of pixels
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d,
    v_b, v_t, v_h, v_w, v_n, v_d, out_b, out_t, out_h, out_w, out_n, out_d,
    causal, window, scale, has_bias,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):
    """One head of a tile of pixels. Programs side by side have the heads of the same pixels."""
    program = tl.program_id(0)
    n = (program % heads).to(tl.int64)
    program = program // heads
    part = (program % parts).to(tl.int64)
    program = program // parts
    h, b = (program % height).to(tl.int64), (program // height).to(tl.int64)
    w = part * (ROWS // num_frames)  # the tile's first pixel
    q = _head_of(q, b, h, w, n, q_b, q_h, q_w, q_n, VECTOR)
    k = _head_of(k, b, h, w, n, k_b, k_h, k_w, k_n, VECTOR)
    v = _head_of(v, b, h, w, n, v_b, v_h, v_w, v_n, VECTOR)
    out = _head_of(out, b, h, w, n, out_b, out_h, out_w, out_n, VECTOR)

    pixel, frame = _rows(num_frames, ROWS)
    inside = (pixel < ROWS // num_frames) & (pixel < width - w)
    exists = _exist(inside, head_dim, BLOCK_D, VECTOR)
    queries = tl.load(_tile_at(q, frame, pixel, q_t, q_w, q_d, BLOCK_D, VECTOR), exists, 0.0)
    keys = tl.load(_tile_at(k, frame, pixel, k_t, k_w, k_d, BLOCK_D, VECTOR), exists, 0.0)
    values = tl.load(_tile_at(v, frame, pixel, v_t, v_w, v_d, BLOCK_D, VECTOR), exists, 0.0)
    if rotary is not None:
        angles = _angles(rotary, frame, head_dim, exists, BLOCK_D, VECTOR)
        queries, keys = _turned(queries, angles), _turned(keys, angles)
    values, spoil = _contained(values)
    seen = pixel[:, None] == pixel[None, :]
    table = _bias_of(bias, n, num_frames, causal, window, has_bias, frame[:, None] - frame[None, :], seen)
    empty = tl.max(table, 1) == float("-inf")
    scores = _scores(queries, keys, scale, table, spoil[None, :])
    weights = tl.exp2(scores - _finite(tl.max(scores, 1))[:, None])
    total = tl.where(empty, 1.0, tl.sum(weights, 1))
    sums = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    target = _tile_at(out, frame, pixel, out_t, out_w, out_d, BLOCK_D, VECTOR)
    tl.store(target, (sums / total[:, None]).to(out.dtype.element_ty), exists)


@triton.jit(do_not_specialize=[*TENSORS, *SCALARS])
def _stream_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bias, rotary, out,
    num_frames, height, width, heads, head_dim,
    parts,  # tiles of queries that a pixel has
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d,
    v_b, v_t, v_h, v_w, v_n, v_d, out_b, out_t, out_h, out_w, out_n, out_d,
    causal, window, scale, has_bias,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):
    """Some frames of one head of one pixel, which see the others tile by tile."""
    program = tl.program_id(0)
    part = (program % parts).to(tl.int64)
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
    begin = (tl.maximum(from_t - window, 0) // KEYS * KEYS).to(tl.int32)
    end = tl.minimum(from_t + ROWS + tl.where(causal != 0, 0, window), num_frames).to(tl.int32)
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
        scores = _scores(queries, keys, scale, table, 0.0)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - _finite(higher)[:, None])
        fade = tl.exp2(top - _finite(higher))
        total = total * fade + tl.sum(weights, 1)
        sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
        top = higher
    empty = allowed == float("-inf")
    total = tl.where(empty, 1.0, total)
    target = _tile_at(out, t, 0, out_t, 0, out_d, BLOCK_D, VECTOR)
    found = tl.where(empty[:, None], 0.0, sums / total[:, None])
    tl.store(target, found.to(out.dtype.element_ty), exists)
# fmt: on


# The host's part: which form serves which tensors, and the integers it is given. It is cached by geometry.


class Form(NamedTuple):
    """A compiled form's tiles.

    Args:
        rows: of queries; of whole pixels, where keys is None.
        keys: frames that are seen at a time.
    """

    rows: int
    keys: int | None
    num_warps: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def constants(self, block_d: int, vector: int) -> dict[str, int]:
        tile = {"BLOCK_D": block_d, "VECTOR": vector}
        if self.keys is None:
            return {"ROWS": self.rows, **tile}
        return {"ROWS": self.rows, "KEYS": self.keys, **tile, "STAGES": self.num_stages}


# Of tensors in whole vectors, by the bytes of an element, whether there is a rotation, and the block of D. A rotation
# holds both operands and their angles in fp32 registers, and fp32 products run on plain registers too: smaller tiles.
PACKED = {
    (2, False): {32: Form(64, None, 4), 64: Form(64, None, 4), 128: Form(64, None, 8)},
    (2, True): {32: Form(64, None, 8), 64: Form(32, None, 4), 128: Form(32, None, 8)},
    (4, False): {32: Form(32, None, 4), 64: Form(32, None, 4), 128: Form(32, None, 8)},
    (4, True): {32: Form(32, None, 4), 64: Form(32, None, 4), 128: Form(32, None, 8)},
}
STREAMED = {
    (2, False): {32: Form(128, 32, 8, 2), 64: Form(128, 32, 8, 2), 128: Form(128, 32, 8, 1)},
    (2, True): {32: Form(128, 32, 8, 1), 64: Form(64, 32, 8, 2), 128: Form(64, 32, 8, 2)},
    (4, False): {32: Form(64, 32, 8, 1), 64: Form(64, 32, 8, 1), 128: Form(64, 32, 8, 2)},
    (4, True): {32: Form(32, 32, 4), 64: Form(32, 16, 4), 128: Form(64, 16, 8, 2)},
}
STRIDED = Form(16, 16, 4)  # any strides, element by element: tiles are small, since each has its address in registers


class Geometry(NamedTuple):
    """All that decides a launch.

    Args:
        vectors: whether every tensor begins at a multiple of 16 bytes.
    """

    shape: Integers
    strides: tuple[Integers, ...]
    itemsize: int
    vectors: bool


class Layout(NamedTuple):
    """A geometry as kernels see it, in plain integers: all pixels are one row where they can.

    Args:
        shape: (B, T, H, W, heads, D).
        vector: elements that are read at a time.
    """

    shape: Integers
    strides: tuple[Integers, ...]
    vector: int


class Plan(NamedTuple):
    """One launch.

    Args:
        packed: whether tiles hold all frames of their pixels.
        scalars: from num_frames on, up to the strides.
    """

    packed: bool
    programs: int
    scalars: Integers
    constants: dict[str, int]
    options: dict[str, int]


def _planned(tensors: Sequence[Tensor], rotated: bool, recording: bool) -> Plan:
    geometry = _geometry(tensors, recording)
    return _plan(geometry, rotated) if recording else _cached_plan(geometry, rotated)


def _geometry(tensors: Sequence[Tensor], recording: bool) -> Geometry:
    return Geometry(
        tensors[0].shape,
        tuple([tensor.stride() for tensor in tensors]),
        tensors[0].element_size(),
        all([aligned(tensor, VECTOR_BYTES, recording) for tensor in tensors]),
    )


def _plan(geometry: Geometry, rotated: bool) -> Plan:
    (B, T, H, W, heads, D), strides, vector = _layout(geometry)
    kind, wide = (geometry.itemsize, rotated), vector > 1
    block_d = next(block for block in BLOCKS if block >= D) if wide else MOST_HEAD_DIM
    packed = wide and PACKED[kind][block_d].rows >= T
    form = PACKED[kind][block_d] if packed else STREAMED[kind][block_d] if wide else STRIDED
    parts = _cdiv(W, form.rows // T) if packed else _cdiv(T, form.rows)
    programs = B * H * (1 if packed else W) * heads * parts
    scalars = (T, H, W, heads, D, parts, *(step for each in strides for step in each))
    return Plan(packed, programs, scalars, form.constants(block_d, vector), form.options)


_cached_plan = functools.lru_cache(maxsize=1024)(_plan)


def _layout(geometry: Geometry) -> Layout:
    B, T, H, W, heads, D = shape = tuple(map(int, geometry.shape))
    strides = [_settled(shape, each) for each in geometry.strides]
    if all(H == 1 or W == 1 or h == W * w for _, _, h, w, _, _ in strides):  # one row of pixels, to cut it less often
        strides = [(b, t, 0, h if W == 1 else w, n, d) for b, t, h, w, n, d in strides]
        H, W = 1, H * W
    vector = VECTOR_BYTES // geometry.itemsize
    wide = geometry.vectors and all(d == 1 and all(n % vector == 0 for n in (D, *outer)) for *outer, d in strides)
    return Layout((B, T, H, W, heads, D), tuple(strides), vector if wide else 1)


def _settled(shape: Integers, strides: Sequence[int]) -> Integers:
    """Plain integers, also in a trace with symbolic shapes: 0 where an axis has one element, but D's is then 1."""
    *outer, d = (int(stride) if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
    return (*outer, d if shape[5] > 1 else 1)


def _cdiv(count: int, size: int) -> int:
    return -(-count // size)


# What ships: every compiled form that a launch can ask for.

DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}
FP32_TENSORS = ("bias", "rotary")


def _variant(dtype: str, form: Form, block_d: int, vector: int, rotated: bool) -> Variant:
    constants = form.constants(block_d, vector)
    absent = {} if rotated else {"rotary": None}
    signature = {name: f"*{'fp32' if name in FP32_TENSORS else dtype}" for name in TENSORS}
    signature |= dict.fromkeys(SCALARS, "i32") | {"scale": "fp32"}
    signature |= dict.fromkeys((*constants, *absent), "constexpr")
    kind = "packed" if form.keys is None else "streamed" if vector > 1 else "strided"
    loads = form.rows * block_d // (vector * 32 * form.num_warps) if vector > 1 else 0  # of a tensor, by each thread
    return Variant(
        f"{dtype} {kind} d{block_d}{' rotary' if rotated else ''}",
        "_tile_kernel" if form.keys is None else "_stream_kernel",
        signature,
        {**constants, **absent},
        num_warps=form.num_warps,
        num_stages=form.num_stages,
        wide_loads=(3 if form.keys is None else 1) * loads,
    )


VARIANTS = (
    *(
        _variant(dtype, forms[itemsize, rotated][block_d], block_d, VECTOR_BYTES // itemsize, rotated)
        for (dtype, itemsize), forms, rotated, block_d in product(
            DTYPES.items(), (PACKED, STREAMED), (False, True), BLOCKS
        )
    ),
    *(_variant(dtype, STRIDED, MOST_HEAD_DIM, 1, rotated) for dtype, rotated in product(DTYPES, (False, True))),
)
