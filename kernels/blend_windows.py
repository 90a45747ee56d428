"""blend_windows as a gather: a program makes a tile of the result from the windows that cover it, in registers.

With the windows p_0, p_1, ... that cover a position, and their weights w_k there,

    J = p_0 + (sum_k w_k (p_k - p_0)) / sum_k w_k

so that a position in one window is that window's exactly, and where all agree so does J, exactly. Sums are in fp32
(fp64 for fp64), in the order of the windows, without atomics.

A launch takes the windows as separate pointers, so their number is fixed: 8 of one shape and layout, or 4 that differ.
The host cuts the result into boxes that so few windows reach. Where even a single position lies in more, launches
follow one another over its box and hand on the sums.
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

from ._cover import (
    VECTOR_BYTES,
    Box,
    Geometry,
    Integers,
    Walk,
    blended,
    boxes,
    place,
    region_of,
    settled,
    table_of,
    take,
    takes_vectors,
    walk_of,
)
from ._launch import Variant, aligned, launch, traced

ALIKE_SLOTS, MIXED_SLOTS = 8, 4
VECTORS_EACH = 2  # of a thread
NUM_WARPS, NUM_STAGES = 4, 1
OPTIONS = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
ALIKE_TILE_BYTES = 32 * NUM_WARPS * VECTORS_EACH * VECTOR_BYTES
MIXED_TILE = 256


def blend_windows(
    windows: Sequence[Tensor],
    starts: Sequence[int],
    extent: Sequence[int],
    weights: Sequence[float] | None,
    *,
    out: Tensor,
) -> None:
    """Write what `blend_windows_reference` returns into `out`. Any strides, of the windows and of `out`.

    The first call with new weights copies them to the device and waits: make one before a CUDA graph is captured.

    Raises:
        ValueError: a result that a grid cannot hold (2^31 tiles, or 2^31 pixels in a row).
    """
    if out.numel() == 0:
        return
    recording = traced(out)
    table = table_of(weights, windows[0], len(extent), out.dtype, recording)
    double = out.dtype == torch.float64 or (table is not None and table.dtype == torch.float64)
    wide = double == (out.dtype == torch.float64)  # the kernel of wide loads has no sums more precise than its data's
    layout = _layout(windows, starts, extent, out, wide, recording)
    sums = None
    if layout.sums:
        sums = torch.empty(layout.sums, dtype=torch.float64 if double else torch.float32, device=out.device)
    for step in layout.steps:
        pointers = [windows[i] for i in step.windows]
        pointers += [pointers[0]] * (step.slots - len(pointers))  # empty slots: they cover nothing
        if step.slots == ALIKE_SLOTS:
            kernel, tensors = _alike_kernel, (*pointers, out, table)
        else:
            kernel, tensors = _mixed_kernel, (*pointers, out, table, sums)
        launch(kernel, step.programs, out, *tensors, *step.scalars, DOUBLE=double, **step.constants, **OPTIONS)


ALIKE_TENSORS = (*(f"w{k}" for k in range(ALIKE_SLOTS)), "out", "weights")
ALIKE_SCALARS = (
    *(f"{name}{k}" for name in "thx" for k in range(ALIKE_SLOTS)),
    *("size_t", "size_h", "size_x", "window_b", "window_c", "window_t", "window_h", "out_b", "out_c", "out_t", "out_h"),
    *("channels", "from_t", "from_h", "from_x", "count_t", "count_h", "count_x", "unit"),
)


# fmt: off
@triton.jit(do_not_specialize=[*ALIKE_TENSORS, *ALIKE_SCALARS])
def _alike_kernel(  # type: ignore[no-untyped-def]
    w0, w1, w2, w3, w4, w5, w6, w7,  # windows of one shape and strides, all runs contiguous
    out, weights,
    t0, t1, t2, t3, t4, t5, t6, t7,  # where each begins: frame,
    h0, h1, h2, h3, h4, h5, h6, h7,  # row,
    x0, x1, x2, x3, x4, x5, x6, x7,  # and element of the run; an empty slot begins after the end
    size_t, size_h, size_x,  # of a window
    window_b, window_c, window_t, window_h, out_b, out_c, out_t, out_h,  # strides
    channels, from_t, from_h, from_x, count_t, count_h, count_x,  # the box of the result, with how many channels
    unit,  # elements of the run for a step in W
    SPACE: tl.constexpr, DOUBLE: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
):
    """A tile of a run from windows alike, in 16-byte loads: addresses and sizes are multiples of VECTOR elements."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    windows = (w0, w1, w2, w3, w4, w5, w6, w7)
    begin_t = (t0, t1, t2, t3, t4, t5, t6, t7)
    begin_h = (h0, h1, h2, h3, h4, h5, h6, h7)
    begin_x = (x0, x1, x2, x3, x4, x5, x6, x7)

    b, c, t, h, tile = place(channels, from_t, from_h, count_t, count_h, tl.cdiv(count_x, TILE))
    x = tl.multiple_of(from_x + tile * TILE, VECTOR)  # the tile's first element in its run
    lane = tl.arange(0, TILE)
    inside = lane < tl.multiple_of(from_x + count_x - x, VECTOR)
    first = tl.zeros((TILE,), SUM)
    pull = tl.zeros((TILE,), SUM)
    mass = tl.zeros((TILE,) if SPACE else (), SUM)
    for k in tl.static_range(8):
        frame = t - begin_t[k]
        hit = (frame >= 0) & (frame < size_t)
        row = h - begin_h[k]
        if SPACE:
            hit = hit & (row >= 0) & (row < size_h)
        if hit:
            left = tl.multiple_of(x - begin_x[k], VECTOR)  # the tile's first element in the window's run
            here = hit
            mask = inside
            if SPACE:
                here = (lane >= -left) & (lane < tl.multiple_of(size_x - left, VECTOR))
                mask = inside & here
            at = b * window_b + c * window_c + frame * window_t + row * window_h + left
            source = tl.multiple_of(windows[k] + at, 16)
            part = tl.load(source + lane, mask=mask, other=0.0).to(SUM)
            weight = tl.full((), 1.0, SUM)
            if weights is not None:
                weight = tl.load(weights + frame)
                if SPACE:
                    weight *= tl.load(weights + (size_t + row))
                    column = ((left + lane).to(tl.int32) // unit).to(tl.int64)
                    weight *= tl.load(weights + (tl.cast(size_t, tl.int64) + size_h) + column, mask=mask, other=0.0)
            first, pull, mass = take(part, weight, here, first, pull, mass)
    at = b * out_b + c * out_c + t * out_t + h * out_h + x
    target = tl.multiple_of(out + at, 16)
    tl.store(target + lane, blended(first, pull, mass).to(out.dtype.element_ty), mask=inside)
# fmt: on


MIXED_TENSORS = (*(f"w{k}" for k in range(MIXED_SLOTS)), "out", "weights", "sums")
MIXED_SLOT_SCALARS = ("t", "h", "x", "size_t", "size_h", "size_x", "base", "b", "c", "dt", "dh", "dp", "dq")
MIXED_SCALARS = (
    *(f"{name}{k}" for name in MIXED_SLOT_SCALARS for k in range(MIXED_SLOTS)),
    *("out_b", "out_c", "out_t", "out_h", "out_p", "out_q", "inner", "channels"),
    *("from_t", "from_h", "from_x", "count_t", "count_h", "count_x", "unit", "space", "resume", "hold"),
)


# fmt: off
@triton.jit(do_not_specialize=[*MIXED_TENSORS, *MIXED_SCALARS])
def _mixed_kernel(  # type: ignore[no-untyped-def]
    w0, w1, w2, w3,  # windows of any shapes and strides
    out, weights, sums,
    t0, t1, t2, t3,  # where each begins: frame,
    h0, h1, h2, h3,  # row,
    x0, x1, x2, x3,  # and element of the run
    size_t0, size_t1, size_t2, size_t3,  # an empty slot has none
    size_h0, size_h1, size_h2, size_h3,
    size_x0, size_x1, size_x2, size_x3,
    base0, base1, base2, base3,  # where the position (0, 0, 0) of the result would be in each
    b0, b1, b2, b3, c0, c1, c2, c3,  # strides
    dt0, dt1, dt2, dt3, dh0, dh1, dh2, dh3,
    dp0, dp1, dp2, dp3, dq0, dq1, dq2, dq3,  # of the outer and the inner part of a run
    out_b, out_c, out_t, out_h, out_p, out_q,
    inner,  # elements of the run's inner part
    channels, from_t, from_h, from_x, count_t, count_h, count_x,  # the box of the result, with how many channels
    unit, space,  # elements of the run for a step in W; whether H and W have weights
    resume, hold,  # whether the sums come from the launch before, and go to the one after
    DOUBLE: tl.constexpr, TILE: tl.constexpr,
):
    """A tile of a run from windows that need have nothing in common, element by element."""
    SUM: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    windows = (w0, w1, w2, w3)
    begin_t, begin_h, begin_x = (t0, t1, t2, t3), (h0, h1, h2, h3), (x0, x1, x2, x3)
    end_t, end_h = (size_t0, size_t1, size_t2, size_t3), (size_h0, size_h1, size_h2, size_h3)
    end_x = (size_x0, size_x1, size_x2, size_x3)
    bases, step_b, step_c = (base0, base1, base2, base3), (b0, b1, b2, b3), (c0, c1, c2, c3)
    step_t, step_h = (dt0, dt1, dt2, dt3), (dh0, dh1, dh2, dh3)
    step_p, step_q = (dp0, dp1, dp2, dp3), (dq0, dq1, dq2, dq3)

    b, c, t, h, tile = place(channels, from_t, from_h, count_t, count_h, tl.cdiv(count_x, TILE))
    x = from_x + tile * TILE  # the tile's first element in its run
    lane = tl.arange(0, TILE)
    inside = lane < from_x + count_x - x
    within = (x % inner).to(tl.int32) + lane
    p = x // inner + within // inner
    q = (within % inner).to(tl.int64)
    first = tl.zeros((TILE,), SUM)
    pull = tl.zeros((TILE,), SUM)
    mass = tl.zeros((TILE,), SUM)
    held = sums  # this program's tile of each of the three
    if sums is not None:
        held += tl.program_id(0).to(tl.int64) * (3 * TILE)
        if resume:
            first = tl.load(held + lane)
            pull = tl.load(held + TILE + lane)
            mass = tl.load(held + 2 * TILE + lane)
    for k in tl.static_range(4):
        frame, row, left = t - begin_t[k], h - begin_h[k], x - begin_x[k]
        if (frame >= 0) & (frame < end_t[k]) & (row >= 0) & (row < end_h[k]):
            here = inside & (lane >= -left) & (lane < end_x[k] - left)
            source = windows[k] + (bases[k] + b * step_b[k] + c * step_c[k] + t * step_t[k] + h * step_h[k])
            part = tl.load(source + p * step_p[k] + q * step_q[k], mask=here, other=0.0).to(SUM)
            weight = tl.full((), 1.0, SUM)
            if weights is not None:
                over_h = weights + end_t[k].to(tl.int64)
                over_w = over_h + 1 + (end_h[k] - 1).to(tl.int64) * space
                column = ((left + lane).to(tl.int32) // unit).to(tl.int64)
                weight = tl.load(weights + frame) * tl.load(over_h + row * space)
                weight *= tl.load(over_w + column * space, mask=here, other=0.0)
            first, pull, mass = take(part, weight, here, first, pull, mass)
    if sums is not None:  # noqa: SIM102  (known when compiled; the inner one is not)
        if hold:
            tl.store(held + lane, first)
            tl.store(held + TILE + lane, pull)
            tl.store(held + 2 * TILE + lane, mass)
            return
    target = out + (b * out_b + c * out_c + t * out_t + h * out_h)
    tl.store(target + p * out_p + q * out_q, blended(first, pull, mass).to(out.dtype.element_ty), mask=inside)
# fmt: on


# The host's part: which launches there are, and the integers each is given. It is cached by geometry.


class Step(NamedTuple):
    """One launch: which windows in how many slots, and what the kernel is given besides tensors."""

    windows: Integers
    slots: int
    programs: int
    scalars: Integers
    constants: dict[str, Any]


class Layout(NamedTuple):
    steps: tuple[Step, ...]
    sums: int  # elements that launches hand on to one another; mostly none


def _layout(
    windows: Sequence[Tensor], starts: Sequence[int], extent: Sequence[int], out: Tensor, wide: bool, recording: bool
) -> Layout:
    vectors = wide and all([aligned(tensor, VECTOR_BYTES, recording) for tensor in (*windows, out)])
    geometry = Geometry(
        tuple(starts),
        tuple(extent),
        tuple([window.shape for window in windows]),
        tuple([window.stride() for window in windows]),
        (out.stride(),),
        (out.element_size(),) * 2 if vectors else None,
    )
    return _plan(geometry) if recording else _cached_plan(geometry)


def _plan(geometry: Geometry) -> Layout:
    geometry = settled(geometry)
    walk = walk_of(geometry)
    slots = ALIKE_SLOTS if takes_vectors(geometry, walk) else MIXED_SLOTS
    steps: list[Step] = []
    sums = 0
    for box, reach in boxes(geometry.whole, tuple(range(len(geometry.spans))), geometry.spans, slots):
        if len(reach) <= slots:
            make = _alike_step if slots == ALIKE_SLOTS else _mixed_step
            steps.append(make(geometry, walk, box, reach))
            continue
        for i in range(0, len(reach), MIXED_SLOTS):
            rest = reach[i : i + MIXED_SLOTS]
            steps.append(_mixed_step(geometry, walk, box, rest, resume=i > 0, hold=i + MIXED_SLOTS < len(reach)))
        sums = max(sums, 3 * MIXED_TILE * steps[-1].programs)
    return Layout(tuple(steps), sums)


_cached_plan = functools.lru_cache(maxsize=256)(_plan)


def _alike_step(geometry: Geometry, walk: Walk, box: Box, reach: Integers) -> Step:
    tile = ALIKE_TILE_BYTES * geometry.vector // VECTOR_BYTES
    region = region_of(geometry, walk, box)
    corners = [geometry.corners[i] for i in reach]
    corners += [(box[0][1], 0, 0)] * (ALIKE_SLOTS - len(corners))
    size_t, size_h, size_w = geometry.shapes[0][2:]
    scalars = (
        *(t for t, _, _ in corners),
        *(h for _, h, _ in corners),
        *(w * walk.unit for _, _, w in corners),
        *(size_t, size_h, size_w * walk.unit),
        *walk.strides(geometry.strides[0])[:4],
        *walk.strides(geometry.others[0])[:4],
        *(*region, walk.unit),
    )
    constants = {"SPACE": geometry.space, "TILE": tile, "VECTOR": geometry.vector}
    return Step(reach, ALIKE_SLOTS, region.programs(geometry, tile), scalars, constants)


def _mixed_step(
    geometry: Geometry, walk: Walk, box: Box, reach: Integers, resume: bool = False, hold: bool = False
) -> Step:
    region = region_of(geometry, walk, box)
    slots = [_mixed_slot(geometry, walk, i) for i in reach]
    slots += [(0,) * len(MIXED_SLOT_SCALARS)] * (MIXED_SLOTS - len(slots))
    scalars = (
        *(value for values in zip(*slots, strict=True) for value in values),
        *walk.strides(geometry.others[0]),
        *(walk.inner, *region, walk.unit, int(geometry.space), int(resume), int(hold)),
    )
    return Step(reach, MIXED_SLOTS, region.programs(geometry, MIXED_TILE), scalars, {"TILE": MIXED_TILE})


def _mixed_slot(geometry: Geometry, walk: Walk, i: int) -> Integers:
    """The values of MIXED_SLOT_SCALARS for one window."""
    t, h, w = geometry.corners[i]
    _, _, size_t, size_h, size_w = geometry.shapes[i]
    b, c, dt, dh, dp, dq = walk.strides(geometry.strides[i])
    x, size_x = (w * walk.unit, size_w * walk.unit) if walk.rows else (0, walk.inner)
    to_w = x if walk.dense else w * (dp if walk.channels else dq)
    return (t, h, x, size_t, size_h, size_x, -(t * dt + h * dh + to_w), b, c, dt, dh, dp, dq)


# What ships: every compiled form that a launch can ask for.

DTYPES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}


def _alike_variant(dtype: str, space: bool, weighted: bool) -> Variant:
    tile, vector = ALIKE_TILE_BYTES // DTYPES[dtype], VECTOR_BYTES // DTYPES[dtype]
    constants = {"SPACE": space, "DOUBLE": dtype == "fp64", "TILE": tile, "VECTOR": vector}
    table = "fp64" if dtype == "fp64" else "fp32"
    return _variant("_alike_kernel", dtype, constants, ["time", "space"][space], weights=table if weighted else None)


def _mixed_variant(dtype: str, table: str | None, chained: bool) -> Variant:
    double = "fp64" in (dtype, table)
    sums = ("fp64" if double else "fp32") if chained else None
    constants = {"DOUBLE": double, "TILE": MIXED_TILE}
    return _variant("_mixed_kernel", dtype, constants, "mixed", weights=table, sums=sums)


def _variant(kernel: str, dtype: str, constants: dict[str, Any], form: str, **pointers: str | None) -> Variant:
    """`pointers`: the element type of each optional tensor, or None where the kernel goes without."""
    alike = kernel == "_alike_kernel"
    tensors, scalars = (ALIKE_TENSORS, ALIKE_SCALARS) if alike else (MIXED_TENSORS, MIXED_SCALARS)
    absent = {name: None for name, element in pointers.items() if element is None}
    signature = {name: f"*{pointers.get(name, dtype)}" for name in tensors} | dict.fromkeys(scalars, "i32")
    signature |= dict.fromkeys((*constants, *absent), "constexpr")
    details = [f"{name} {element}" for name, element in pointers.items() if element is not None]
    name = ", ".join([f"{dtype} {form}", *details])
    wide = ALIKE_SLOTS * VECTORS_EACH if alike else 0
    return Variant(name, kernel, signature, {**constants, **absent}, NUM_WARPS, NUM_STAGES, wide)


VARIANTS = (
    *(
        _alike_variant(dtype, space, weighted)
        for dtype, space, weighted in product(DTYPES, (False, True), (False, True))
    ),
    *(
        _mixed_variant(dtype, table, chained)
        for dtype, table, chained in product(DTYPES, (None, "fp32", "fp64"), (False, True))
        if (dtype, table) != ("fp64", "fp32")
    ),
)
