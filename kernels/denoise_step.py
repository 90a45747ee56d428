"""denoise_step in one launch: a program makes a tile of the next latent from the windows, in registers.

It blends both halves of the windows as kernels/blend_windows.py does, guides, makes x0 of the latent, bounds it, and
takes the sampler's step: every tensor of the video's size is read once and written once. The coefficients are
arguments, so that no step compiles anything; so is whether there is guidance, weights or a bound, at the price of
branches that a whole program takes. A tensor whose coefficient is 0 is not read. Nothing is written before all that
lies in its place has been read, so results may replace latent and history.

A launch takes 16 windows of one shape and layout: 13 of 8 frames cover the 80 of the paper. The host cuts the clip into
boxes that so few windows reach, a launch for each. Where windows differ, more lie over one position, or their weights
ask for fp64, kernels/blend_windows.py blends them first, into fp32: one window over everything.

A dynamic threshold takes the quantile of |x0| over each clip or frame, exactly, before the step. The bits of |x0| are
ordered as its values are, NaN last, so an order statistic is found digit by digit: each pass makes x0 anew and counts
how often each next digit follows the digits that are known, in integers, whose sum no order changes. The digits are the
exponent and 8, 8 and 7 bits of the mantissa. Both neighbours of the quantile's position are looked for; the upper one
has a histogram of its own from where it parts from the lower. Where the exponents show that the quantile is below 1,
which bounds nothing, the later passes end at once. The host never waits: ten launches in all.
"""

from __future__ import annotations

import functools
import math
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
from .blend_windows import blend_windows

SLOTS = tl.constexpr(16)
WIDE_TILE, NARROW_TILE = 1024, 256
TILES_EACH = tl.constexpr(8)  # of a program that counts, which then adds to counters that others add to
# Registers are capped so that 4 and 3 blocks fit a multiprocessor; left alone, ptxas keeps 16 windows in them.
STEP_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "maxnreg": 128}
COUNT_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
FIND_OPTIONS: dict[str, Any] = {"num_warps": 1, "num_stages": 1}  # one warp: all is read before any is written over

DIGITS = ((23, 31), (15, 23), (7, 15), (0, 7))  # the first bit of each, and the first after it
BINS = tl.constexpr(256)
# Of each clip or frame: counters of the digits after `lower`, those after `upper` where that differs, then these: both
# with their ranks among what begins alike, and the bits of the limit once it is known. STATE is how many there are.
LOWER, LOWER_RANK, UPPER, UPPER_RANK, LIMIT, STATE = (tl.constexpr(2 * 256 + i) for i in range(6))


def denoise_step(
    windows: Sequence[Tensor],
    starts: Sequence[int],
    extent: Sequence[int],
    weights: Sequence[float] | None,
    latent: Tensor,
    coefficients: Sequence[float],
    guidance_scale: float | None,
    bound: str,
    percentile: float,
    noise: Tensor | None,
    history: Tensor | None,
    *,
    out: tuple[Tensor, Tensor],
) -> None:
    """Write what `denoise_step_reference` returns into `out`, which may be `(latent, history)`. Any strides.

    The first call with new weights copies them to the device and waits: make one before a CUDA graph is captured.

    Raises:
        ValueError: a result that a grid cannot hold (2^31 tiles, or 2^31 pixels in a row).
    """
    if latent.numel() == 0:
        return
    recording = traced(out[0])
    table = table_of(weights, windows[0], len(extent), torch.float32, recording)
    linear = [float(each) for each in coefficients]
    *_, of_history, of_noise = linear
    read = ((noise, of_noise), (history, of_history))  # the latent stands for what is not: its coefficient is 0
    tensors = (latent, *(latent if each is None or scale == 0 else each for each, scale in read), *out)
    parts = None
    if table is None or table.dtype == torch.float32:
        parts = _parts(windows, starts, extent, tensors, guidance_scale is not None, recording)
    if parts is None:
        windows = [_blended_first(windows, starts, extent, weights, latent)]
        starts, extent, table = [0], extent[:1], None
        parts = _parts(windows, starts, extent, tensors, guidance_scale is not None, recording)
        assert parts is not None  # one window is like itself
    call = _Call(windows, table, tensors, linear, guidance_scale, parts)
    dynamic = bound in ("clip", "frame")
    per_clip, per_frame = {"clip": (1, 0), "frame": (int(latent.shape[2]), 1)}.get(bound, (0, 0))
    state = torch.empty(0, dtype=torch.int64, device=latent.device)
    if dynamic:
        state = _limits(call, per_clip, per_frame, percentile)
    ceiling = math.inf if bound == "none" else 1.0
    for part in parts:
        numbers = (*call.cover(part), *part.others, per_clip, per_frame, int(dynamic), *call.linear, ceiling)
        pointers = (*call.pointers(part), *tensors, state)
        launch(_step_kernel, part.programs, out[0], *pointers, *numbers, **part.constants, **STEP_OPTIONS)


def _blended_first(
    windows: Sequence[Tensor],
    starts: Sequence[int],
    extent: Sequence[int],
    weights: Sequence[float] | None,
    latent: Tensor,
) -> Tensor:
    """All windows in one, in fp32 and the memory format of the latent."""
    channels_last = latent.is_contiguous(memory_format=torch.channels_last_3d)
    memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
    shape = (windows[0].shape[0], *latent.shape[1:])
    whole = torch.empty(shape, dtype=torch.float32, device=latent.device, memory_format=memory_format)
    blend_windows([window.float() for window in windows], starts, extent, weights, out=whole)
    return whole


def _limits(call: _Call, per_clip: int, per_frame: int, percentile: float) -> Tensor:
    """The state of every clip or frame, with what |x0| is to be bounded by: its quantile, at least 1."""
    latent = call.tensors[0]
    groups = int(latent.shape[0]) * per_clip
    elements = latent.numel() // groups
    position = percentile * (elements - 1)
    below = math.floor(position)
    ranks = below, min(below + 1, elements - 1)
    x0_latent, x0_prediction, *_, guidance_scale = call.linear
    state = torch.zeros(groups, STATE.value, dtype=torch.int64, device=latent.device)
    for digit in DIGITS:
        for part in call.parts:
            numbers = (*call.cover(part), per_clip, per_frame, *digit, x0_latent, x0_prediction, guidance_scale)
            pointers = (*call.pointers(part), latent, state)
            launch(_count_kernel, part.counters, latent, *pointers, *numbers, **part.constants, **COUNT_OPTIONS)
        launch(_find_kernel, groups, latent, state, *ranks, *digit, position - below, **FIND_OPTIONS)
    return state


@triton.jit
def _along(base, x, lane, inner, outer_step, inner_step, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to the elements x + lane of a run."""
    if VECTOR > 1:
        return tl.multiple_of(base + x, 16) + lane
    within = (x % inner).to(tl.int32) + lane
    outer = (x // inner + within // inner) * outer_step
    return base + outer + (within % inner).to(tl.int64) * inner_step


@triton.jit
def _hits(frames, rows, size_t, size_h, t, h):  # type: ignore[no-untyped-def]
    """The windows that reach this frame and row, as bits."""
    hits = 0
    for k in tl.static_range(SLOTS):
        hit = (t >= frames[k]) & (t < frames[k] + size_t) & (h >= rows[k]) & (h < rows[k] + size_h)
        hits |= hit.to(tl.int32) << k
    return hits


@triton.jit
def _unbounded_x0(  # type: ignore[no-untyped-def]
    windows, frames, rows, lefts, hits, sizes, half, steps, weights, latent, latent_steps, at, x, inside,
    inner, unit, space, weighted, guided, x0_latent, x0_prediction, guidance_scale,
    TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A tile of x0 and of the latent, in fp32; `at` is the clip, channel, frame and row it lies in."""
    b, c, t, h = at
    size_t, size_h, size_x = sizes
    lane = tl.arange(0, TILE)
    latent += b * latent_steps[0] + c * latent_steps[1] + t * latent_steps[2] + h * latent_steps[3]
    latent = _along(latent, x, lane, inner, latent_steps[4], latent_steps[5], VECTOR)
    current = tl.load(latent, mask=inside, other=0.0).to(tl.float32)

    first = tl.zeros((TILE,), tl.float32)
    pull = tl.zeros((TILE,), tl.float32)
    other_first = tl.zeros((TILE,), tl.float32)
    other_pull = tl.zeros((TILE,), tl.float32)
    mass = tl.zeros((TILE,), tl.float32)
    while hits != 0:
        slot = hits & -hits  # the first of those that are left
        hits ^= slot
        window, frame, row, begin = windows[0], frames[0], rows[0], lefts[0]
        for k in tl.static_range(1, SLOTS):
            this = slot == (1 << k)
            window = tl.where(this, windows[k], window)
            frame = tl.where(this, frames[k], frame)
            row = tl.where(this, rows[k], row)
            begin = tl.where(this, lefts[k], begin)
        since, below = t - frame, h - row
        left = tl.multiple_of(x - begin, VECTOR)  # the tile's first element in the window's run
        here = inside & (lane >= -left) & (lane < tl.multiple_of(size_x - left, VECTOR))
        window += b * steps[0] + c * steps[1] + since * steps[2] + below * steps[3]
        source = _along(window, left, lane, inner, steps[4], steps[5], VECTOR)
        part = tl.load(source, mask=here, other=0.0).to(tl.float32)
        weight = tl.full((TILE,), 1.0, tl.float32)
        if weighted != 0:
            over_h = weights + tl.cast(size_t, tl.int64)
            weight *= tl.load(weights + since) * tl.load(over_h + below * space)
            if space != 0:
                column = ((left + lane).to(tl.int32) // unit).to(tl.int64)
                weight *= tl.load(over_h + size_h.to(tl.int64) + column, mask=here, other=0.0)
        if guided != 0:
            source = _along(window + tl.cast(half, tl.int64), left, lane, inner, steps[4], steps[5], VECTOR)
            other = tl.load(source, mask=here, other=0.0).to(tl.float32)
            other_first, other_pull, _ = take(other, weight, here, other_first, other_pull, mass)
        first, pull, mass = take(part, weight, here, first, pull, mass)
    prediction = blended(first, pull, mass)
    if guided != 0:
        other = blended(other_first, other_pull, mass)
        prediction = other + guidance_scale * (prediction - other)
    return x0_latent * current + x0_prediction * prediction, current


WINDOWS = tuple(f"w{k}" for k in range(SLOTS.value))
STRIDES = ("b", "c", "t", "h", "p", "q")  # of the scalars of a program, and of the outer and inner part of a run
COVER_INTEGERS = (
    *(f"{name}{k}" for name in ("frame", "row", "left") for k in range(SLOTS.value)),
    *("size_t", "size_h", "size_x", "half", "inner"),
    *("channels", "from_t", "from_h", "from_x", "count_t", "count_h", "count_x", "unit", "space"),
    *(f"{tensor}_{axis}" for tensor in ("window", "latent") for axis in STRIDES),
    *("weighted", "guided"),
)
STEP_TENSORS = (*WINDOWS, "weights", "latent", "noise", "history", "next_latent", "x0", "state")
STEP_INTEGERS = (
    *COVER_INTEGERS,
    *(f"{tensor}_{axis}" for tensor in ("noise", "history", "next", "x0") for axis in STRIDES),
    *("state_b", "state_t", "dynamic"),
)
STEP_FLOATS = (
    *("x0_latent", "x0_prediction", "from_latent", "from_x0", "from_history", "from_noise"),
    *("guidance_scale", "ceiling"),
)
COUNT_TENSORS = (*WINDOWS, "weights", "latent", "state")
COUNT_INTEGERS = (*COVER_INTEGERS, "state_b", "state_t", "shift", "above")
COUNT_FLOATS = ("x0_latent", "x0_prediction", "guidance_scale")
FIND_INTEGERS = ("lower_rank", "upper_rank", "shift", "above")


# fmt: off
@triton.jit(do_not_specialize=[*STEP_TENSORS, *STEP_INTEGERS, *STEP_FLOATS])
def _step_kernel(  # type: ignore[no-untyped-def]
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,  # windows of one shape and strides
    weights, latent, noise, history, next_latent, x0, state,
    frame0, frame1, frame2, frame3, frame4, frame5, frame6, frame7,  # where each window begins: frame,
    frame8, frame9, frame10, frame11, frame12, frame13, frame14, frame15,
    row0, row1, row2, row3, row4, row5, row6, row7, row8, row9, row10, row11, row12, row13, row14, row15,  # row,
    left0, left1, left2, left3, left4, left5, left6, left7,  # and element of the run; an empty slot after the end
    left8, left9, left10, left11, left12, left13, left14, left15,
    size_t, size_h, size_x,  # of a window
    half,  # from a window's conditional half to the other
    inner,  # elements of a run's inner part
    channels, from_t, from_h, from_x, count_t, count_h, count_x,  # the box of the result, with how many channels
    unit, space,  # elements of the run for a step in W; whether H and W are blended too
    window_b, window_c, window_t, window_h, window_p, window_q,  # strides
    latent_b, latent_c, latent_t, latent_h, latent_p, latent_q,
    weighted, guided,  # whether there are weights; whether windows have two halves
    noise_b, noise_c, noise_t, noise_h, noise_p, noise_q,
    history_b, history_c, history_t, history_h, history_p, history_q,
    next_b, next_c, next_t, next_h, next_p, next_q,
    x0_b, x0_c, x0_t, x0_h, x0_p, x0_q,
    state_b, state_t, dynamic,  # whether the limits are in `state`, and where
    x0_latent, x0_prediction, from_latent, from_x0, from_history, from_noise, guidance_scale, ceiling,
    TILE: tl.constexpr, VECTOR: tl.constexpr,
):
    """A tile of a run. Where VECTOR > 1, runs are contiguous, and places and sizes are multiples of VECTOR elements."""
    b, c, t, h, tile = place(channels, from_t, from_h, count_t, count_h, tl.cdiv(count_x, TILE))
    windows = (w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15)
    frames = (frame0, frame1, frame2, frame3, frame4, frame5, frame6, frame7,
              frame8, frame9, frame10, frame11, frame12, frame13, frame14, frame15)
    rows = (row0, row1, row2, row3, row4, row5, row6, row7, row8, row9, row10, row11, row12, row13, row14, row15)
    lefts = (left0, left1, left2, left3, left4, left5, left6, left7,
             left8, left9, left10, left11, left12, left13, left14, left15)
    hits = _hits(frames, rows, size_t, size_h, t, h)
    x = tl.multiple_of(from_x + tile * TILE, VECTOR)  # the tile's first element in its run
    lane = tl.arange(0, TILE)
    inside = lane < tl.multiple_of(from_x + count_x - x, VECTOR)

    clean, current = _unbounded_x0(
        windows, frames, rows, lefts, hits, (size_t, size_h, size_x), half,
        (window_b, window_c, window_t, window_h, window_p, window_q),
        weights, latent, (latent_b, latent_c, latent_t, latent_h, latent_p, latent_q), (b, c, t, h), x, inside,
        inner, unit, space, weighted, guided, x0_latent, x0_prediction, guidance_scale, TILE, VECTOR,
    )
    if dynamic != 0:
        bits = tl.load(state + ((b * state_b + t * state_t) * STATE + LIMIT))
        ceiling = bits.to(tl.int32).to(tl.float32, bitcast=True)
    clean = tl.where(clean > ceiling, ceiling, tl.where(clean < -ceiling, -ceiling, clean))  # NaN stays
    if dynamic != 0:
        clean = tl.div_rn(clean, tl.zeros_like(clean) + ceiling)

    past = tl.zeros((TILE,), tl.float32)
    if from_history != 0:
        source = history + (b * history_b + c * history_c + t * history_t + h * history_h)
        source = _along(source, x, lane, inner, history_p, history_q, VECTOR)
        past = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    fresh = tl.zeros((TILE,), tl.float32)
    if from_noise != 0:
        source = noise + (b * noise_b + c * noise_c + t * noise_t + h * noise_h)
        source = _along(source, x, lane, inner, noise_p, noise_q, VECTOR)
        fresh = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    following = from_latent * current + from_x0 * clean + from_history * past + from_noise * fresh
    # The next latent first: it hangs on all that was read. So x0, stored after it, may lie where history was.
    target = next_latent + (b * next_b + c * next_c + t * next_t + h * next_h)
    target = _along(target, x, lane, inner, next_p, next_q, VECTOR)
    tl.store(target, following.to(next_latent.dtype.element_ty), mask=inside)
    target = x0 + (b * x0_b + c * x0_c + t * x0_t + h * x0_h)
    target = _along(target, x, lane, inner, x0_p, x0_q, VECTOR)
    tl.store(target, clean.to(x0.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*COUNT_TENSORS, *COUNT_INTEGERS, *COUNT_FLOATS])
def _count_kernel(  # type: ignore[no-untyped-def]
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,  # as of _step_kernel
    weights, latent, state,
    frame0, frame1, frame2, frame3, frame4, frame5, frame6, frame7,
    frame8, frame9, frame10, frame11, frame12, frame13, frame14, frame15,
    row0, row1, row2, row3, row4, row5, row6, row7, row8, row9, row10, row11, row12, row13, row14, row15,
    left0, left1, left2, left3, left4, left5, left6, left7,
    left8, left9, left10, left11, left12, left13, left14, left15,
    size_t, size_h, size_x, half, inner,
    channels, from_t, from_h, from_x, count_t, count_h, count_x, unit, space,
    window_b, window_c, window_t, window_h, window_p, window_q,
    latent_b, latent_c, latent_t, latent_h, latent_p, latent_q,
    weighted, guided,
    state_b, state_t,
    shift, above,  # the digit: its first bit, and the first after it
    x0_latent, x0_prediction, guidance_scale,
    TILE: tl.constexpr, VECTOR: tl.constexpr,
):
    """Of some tiles of a run: how often each digit follows those that are known of the two that are looked for."""
    tiles = tl.cdiv(count_x, TILE)
    b, c, t, h, chunk = place(channels, from_t, from_h, count_t, count_h, tl.cdiv(tiles, TILES_EACH))
    state += (b * state_b + t * state_t) * STATE
    lower, upper = tl.load(state + LOWER).to(tl.int32), tl.load(state + UPPER).to(tl.int32)
    begin = TILES_EACH * chunk
    end = tl.minimum(begin + TILES_EACH, tiles)
    if tl.load(state + LIMIT) != 0:
        end = begin  # there is nothing left to find
    windows = (w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15)
    frames = (frame0, frame1, frame2, frame3, frame4, frame5, frame6, frame7,
              frame8, frame9, frame10, frame11, frame12, frame13, frame14, frame15)
    rows = (row0, row1, row2, row3, row4, row5, row6, row7, row8, row9, row10, row11, row12, row13, row14, row15)
    lefts = (left0, left1, left2, left3, left4, left5, left6, left7,
             left8, left9, left10, left11, left12, left13, left14, left15)
    hits = _hits(frames, rows, size_t, size_h, t, h)
    lane = tl.arange(0, TILE)
    counts = tl.zeros((BINS,), tl.int32)
    upper_counts = tl.zeros((BINS,), tl.int32)
    for tile in range(begin, end):
        x = tl.multiple_of(from_x + tile * TILE, VECTOR)
        inside = lane < tl.multiple_of(from_x + count_x - x, VECTOR)
        clean, _ = _unbounded_x0(
            windows, frames, rows, lefts, hits, (size_t, size_h, size_x), half,
            (window_b, window_c, window_t, window_h, window_p, window_q),
            weights, latent, (latent_b, latent_c, latent_t, latent_h, latent_p, latent_q), (b, c, t, h), x, inside,
            inner, unit, space, weighted, guided, x0_latent, x0_prediction, guidance_scale, TILE, VECTOR,
        )
        key = clean.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        known = key >> above
        digit = (key >> shift) & ((1 << (above - shift)) - 1)
        if tl.max((inside & (known == lower)).to(tl.int32), 0) != 0:
            counts += tl.histogram(digit, BINS, mask=inside & (known == lower))
        if lower != upper:
            upper_counts += tl.histogram(digit, BINS, mask=inside & (known == upper))
    digits = tl.arange(0, BINS)
    tl.atomic_add(state + digits, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    tl.atomic_add(state + BINS + digits, upper_counts.to(tl.int64), mask=upper_counts > 0, sem="relaxed")
# fmt: on


@triton.jit
def _next_digit(counts, rank):  # type: ignore[no-untyped-def]
    """The digit of the value with this rank among those that were counted, and its rank among those with the digit."""
    digits = tl.arange(0, BINS)
    digit = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32), 0)
    return digit, rank - tl.sum(tl.where(digits < digit, counts, 0), 0)


@triton.jit(do_not_specialize=["state", *FIND_INTEGERS, "fraction"])
def _find_kernel(state, lower_rank, upper_rank, shift, above, fraction):  # type: ignore[no-untyped-def]
    """One digit more of the two values that the quantile of a clip or frame lies between; with the last, the limit."""
    state += tl.program_id(0).to(tl.int64) * STATE
    if tl.load(state + LIMIT) == 0:
        digits = tl.arange(0, BINS)
        lower, upper = tl.load(state + LOWER), tl.load(state + UPPER)
        counts = tl.load(state + digits)
        upper_counts = tl.where(lower == upper, counts, tl.load(state + BINS + digits))
        rank, other_rank = tl.load(state + LOWER_RANK), tl.load(state + UPPER_RANK)
        if above == 31:
            rank, other_rank = tl.cast(lower_rank, tl.int64), tl.cast(upper_rank, tl.int64)
        digit, rank = _next_digit(counts, rank)
        upper_digit, other_rank = _next_digit(upper_counts, other_rank)
        lower = (lower << (above - shift)) + digit
        upper = (upper << (above - shift)) + upper_digit
        tl.store(state + digits, tl.zeros_like(counts))
        tl.store(state + BINS + digits, tl.zeros_like(counts))
        tl.store(state + LOWER, lower)
        tl.store(state + LOWER_RANK, rank)
        tl.store(state + UPPER, upper)
        tl.store(state + UPPER_RANK, other_rank)
        if (above == 31) & (upper < 127):  # the exponent of 1
            tl.store(state + LIMIT, tl.full((), 0x3F800000, tl.int64))  # the bits of 1
        if shift == 0:
            a = lower.to(tl.int32).to(tl.float32, bitcast=True)
            b = upper.to(tl.int32).to(tl.float32, bitcast=True)
            limit = tl.where(fraction < 0.5, a + fraction * (b - a), b - (b - a) * (1.0 - fraction))
            bits = tl.where(limit < 1.0, 1.0, limit).to(tl.int32, bitcast=True)  # NaN stays
            tl.store(state + LIMIT, bits.to(tl.int64))


# The host's part: which launches there are, and the integers each is given. It is cached by geometry.


class Part(NamedTuple):
    """A box of the clip: which windows reach into it, and what the kernels are given besides tensors.

    Args:
        programs, counters: how many take the step, and how many count.
        cover: the values of COVER_INTEGERS but for the last two, which are the call's.
        others: the strides of noise, history, next latent and x0.
    """

    windows: Integers
    programs: int
    counters: int
    cover: Integers
    others: Integers
    constants: dict[str, int]


class _Call(NamedTuple):
    """What all launches of a call are given."""

    windows: Sequence[Tensor]
    table: Tensor | None
    tensors: tuple[Tensor, ...]
    coefficients: list[float]
    guidance_scale: float | None
    parts: tuple[Part, ...]

    def pointers(self, part: Part) -> list[Tensor]:
        """Windows and weights; those of empty slots cover nothing, and what stands for no weights is not read."""
        found = [self.windows[i] for i in part.windows]
        table = torch.empty(0, dtype=torch.float32, device=found[0].device) if self.table is None else self.table
        return [*found, *[found[0]] * (SLOTS.value - len(found)), table]

    def cover(self, part: Part) -> Integers:
        return (*part.cover, int(self.table is not None), int(self.guidance_scale is not None))

    @property
    def linear(self) -> list[float]:
        """The coefficients and the guidance scale."""
        return [*self.coefficients, 1.0 if self.guidance_scale is None else float(self.guidance_scale)]


def _parts(
    windows: Sequence[Tensor],
    starts: Sequence[int],
    extent: Sequence[int],
    tensors: Sequence[Tensor],
    guided: bool,
    recording: bool,
) -> tuple[Part, ...] | None:
    vectors = all([aligned(tensor, VECTOR_BYTES, recording) for tensor in (*windows, *tensors)])
    geometry = Geometry(
        tuple(starts),
        tuple(extent),
        tuple([window.shape for window in windows]),
        tuple([window.stride() for window in windows]),
        tuple([tensor.stride() for tensor in tensors]),
        (windows[0].element_size(), tensors[0].element_size()) if vectors else None,
        2 if guided else 1,
    )
    return _plan(geometry) if recording else _cached_plan(geometry)


def _plan(geometry: Geometry) -> tuple[Part, ...] | None:
    """A launch for each; None where the windows are not fit for one."""
    geometry = settled(geometry)
    if not geometry.alike:
        return None
    walk = walk_of(geometry)
    wide = takes_vectors(geometry, walk)
    found = list(boxes(geometry.whole, tuple(range(len(geometry.spans))), geometry.spans, SLOTS.value))
    if any(len(reach) > SLOTS.value for _, reach in found):
        return None
    return tuple(_part(geometry, walk, wide, box, reach) for box, reach in found)


_cached_plan = functools.lru_cache(maxsize=256)(_plan)


def _part(geometry: Geometry, walk: Walk, wide: bool, box: Box, reach: Integers) -> Part:
    region = region_of(geometry, walk, box)
    corners = [geometry.corners[i] for i in reach]
    corners += [(box[0][1], 0, 0)] * (SLOTS.value - len(corners))
    size_t, size_h, size_w = geometry.shapes[0][2:]
    of_window = walk.strides(geometry.strides[0])
    latent, *others = (walk.strides(other) for other in geometry.others)
    cover = (
        *(t for t, _, _ in corners),
        *(h for _, h, _ in corners),
        *(w * walk.unit for _, _, w in corners),
        *(size_t, size_h, size_w * walk.unit if walk.rows else walk.inner),
        *(geometry.shape[0] * geometry.strides[0][0], walk.inner, *region, walk.unit, int(geometry.space)),
        *(*of_window, *latent),
    )
    tile, vector = (WIDE_TILE, geometry.vector) if wide else (NARROW_TILE, 1)
    return Part(
        reach,
        region.programs(geometry, tile),
        region.programs(geometry, tile * TILES_EACH.value),
        cover,
        tuple(stride for strides in others for stride in strides),
        {"TILE": tile, "VECTOR": vector},
    )


# What ships: every compiled form that a launch can ask for.

DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}


def _variant(kernel: str, of_windows: str, of_latent: str, wide: bool) -> Variant:
    step = kernel == "_step_kernel"
    tensors, integers, floats = (
        (STEP_TENSORS, STEP_INTEGERS, STEP_FLOATS) if step else (COUNT_TENSORS, COUNT_INTEGERS, COUNT_FLOATS)
    )
    special = dict.fromkeys(WINDOWS, of_windows) | {"weights": "fp32", "state": "i64"}
    signature = {name: f"*{special.get(name, of_latent)}" for name in tensors}
    signature |= dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32")
    vector = VECTOR_BYTES // min(DTYPES[of_windows], DTYPES[of_latent]) if wide else 1
    constants = {"TILE": WIDE_TILE if wide else NARROW_TILE, "VECTOR": vector}
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"{of_windows} windows, {of_latent} latent, {'wide' if wide else 'narrow'}"
    loads = 2 * DTYPES[of_windows] + (3 if step else 1) * DTYPES[of_latent]  # bytes of an element; windows have halves
    options = STEP_OPTIONS if step else COUNT_OPTIONS
    promised = WIDE_TILE // (32 * options["num_warps"]) * loads // VECTOR_BYTES if wide else 0
    return Variant(name, kernel, signature, constants, **options, wide_loads=promised)


VARIANTS = (
    *(
        _variant(kernel, of_windows, of_latent, wide)
        for kernel, of_windows, of_latent, wide in product(
            ("_step_kernel", "_count_kernel"), DTYPES, DTYPES, (True, False)
        )
    ),
    Variant(
        "all",
        "_find_kernel",
        {"state": "*i64", **dict.fromkeys(FIND_INTEGERS, "i32"), "fraction": "fp32"},
        {},
        **FIND_OPTIONS,
    ),
)
