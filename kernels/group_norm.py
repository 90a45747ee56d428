"""Group norm of a clip: statistics by a split reduction, then norm, affine, FiLM and SiLU in one pass.

A program works on a tile of a frame, some pixels by some channels, and walks over it with its accumulators in
registers. Where channels are dense and 16-byte aligned (channels_last_3d) all loads and stores are 16 bytes wide and a
tile's row is one line of the cache; any other strides take the same kernels element by element.

Partials. The split reduction leaves, for each frame, row tile and channel, the mean of the tile's pixels and the sum of
squares about it, in two tensors (B, T, tiles, C), contiguous. `finish_stats` combines them over the tiles and the
channels of a group (Chan's formula), whoever wrote them: another op's epilogue may. Here the means are fp64, since the
variance between tiles is in their last digits where the mean is large. Nothing subtracts E[x]^2 from E[x^2], and
nothing is added atomically: results are the same from run to run.

The pass that follows walks backwards: what the pass before touched last is still in the L2 cache.

Which of the parameters there are, and whether SiLU follows, are numbers and not compiled in: a launch is bound by
memory, and so few forms ship that all of them can be compiled ahead of time.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, aligned, launch, traced

Integers = tuple[int, ...]
Gradient = Tensor | None

VECTOR_BYTES = 16
LINE_BYTES = 128  # of a pixel's channels that a tile takes: a line of the cache
TILE_ROWS = 32
PIXEL_ROWS = 512  # of a tile of one channel, where pixels are denser than channels
NUM_WARPS, NUM_STAGES = 4, 3
VECTORS_EACH = TILE_ROWS * LINE_BYTES // (32 * NUM_WARPS * VECTOR_BYTES)  # of a thread, in a dense tile
OPTIONS = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
PROGRAMS = 8192  # that a launch aims at: several rounds of what fits on a large GPU at once
MOST_STEPS = 16  # tiles of TILE_ROWS that a program walks over
FINISH_BLOCK = 1024
LONGEST_FRAME = 2**30  # pixels within a frame are int32


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
    eps: float,
    per_frame: bool,
    *,
    out: Tensor,
) -> None:
    """Write what `group_norm_reference` returns into `out`. Any strides, of the inputs and of `out`.

    Raises:
        ValueError: more than 2^30 pixels in a frame, or a result that a grid cannot hold (2^31 tiles).
    """
    if out.numel() == 0:
        return
    mean, rstd = _statistics(x, num_groups, eps, per_frame)
    normalize(x, mean, rstd, weight, bias, scale, shift, act, out=out)


def group_norm_stats(x: Tensor, num_groups: int, eps: float, per_frame: bool, *, out: tuple[Tensor, Tensor]) -> None:
    """Write what `group_norm_stats_reference` returns into `out`, (mean, rstd). Any strides."""
    if x.numel() == 0:
        return
    walk = _walk([x], traced(out[0]))
    means, squares = (_partials(x, walk, dtype) for dtype in (torch.float64, _accumulation_dtype(x)))
    launch(_moments_kernel, walk.programs, means, x, means, squares, *walk.scalars, **walk.form._asdict(), **OPTIONS)
    finish_stats(means, squares, walk.rows, x.shape[3] * x.shape[4], num_groups, eps, per_frame, out=out)


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
    *,
    out: Tensor,
) -> None:
    """`out = act(n * (1 + scale) + shift)`, `n = (x - mean) * rstd * weight + bias`, the statistics given.

    Args:
        x, out: (B, C, T, H, W), any strides.
        mean, rstd: (B, T, G), or (B, G) for the whole clip; of the accumulation dtype.
        weight, bias: (C,), or None for 1 and 0.
        scale, shift: (B, C) or (B, T, C), or None for 0.
        act: None or "silu".
    """
    if out.numel() == 0:
        return
    walk = _walk([x, out], traced(out))
    tensors, scalars = _norm_arguments(x, Norm(mean, rstd, weight, bias, scale, shift), act)
    arguments = (x, out, *tensors, *walk.scalars, *scalars)
    launch(_normalize_kernel, walk.programs, out, *arguments, **walk.form._asdict(), **OPTIONS)


def finish_stats(
    means: Tensor,
    squares: Tensor,
    rows: int,
    pixels: int,
    num_groups: int,
    eps: float,
    per_frame: bool,
    *,
    out: tuple[Tensor, Tensor],
) -> None:
    """Combine the partials of tiles and channels into `out`, the (mean, rstd) of every frame, or clip, and group.

    Args:
        means, squares: (B, T, tiles, C), contiguous: of tile j, the pixels [j * rows, (j + 1) * rows) of a frame, the
            last one cut short, their mean (fp32 or fp64) and the sum of squares about it (accumulation dtype).
        rows: pixels of a tile.
        pixels: H*W of a frame; there are as many tiles as have a pixel.
        out: mean and rstd, (B, T, num_groups) or without `per_frame` (B, num_groups), any strides.
    """
    B, T, tiles, C = map(int, means.shape)
    mean, rstd = out
    stats, frames = (T, 1) if per_frame else (1, T)  # of a clip, of a statistic
    strides = [stride for each in out for stride in _frame_strides(each)]
    sizes = (C, C // num_groups, num_groups, stats, frames, tiles, int(rows), int(pixels))
    near = ctypes.c_float(eps).value  # a kernel takes floats in fp32; with the rest, fp64 has its own eps
    scalars = (*strides, *sizes, near, eps - near)
    programs = B * stats * num_groups
    launch(_finish_kernel, programs, mean, means, squares, mean, rstd, *scalars, BLOCK=FINISH_BLOCK, **OPTIONS)


@torch.no_grad()
def normalize_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
    needed: Sequence[bool],
) -> tuple[Gradient, ...]:
    """The gradients of `normalize`, its statistics inputs like the others, where `grad` is that of its result.

    Args:
        needed: which of x, mean, rstd, weight, bias, scale, shift want one.

    Returns:
        One for each of these seven, in its dtype, None where it is not needed.
    """
    norm = Norm(mean, rstd, weight, bias, scale, shift)
    sums = _gradient_sums(grad, x, norm, act) if any(needed[1:]) else None
    dx = _gradient_of_x(grad, x, norm, act) if needed[0] else None
    if sums is None:
        return (dx, *[None] * 6)
    dmean, drstd = _statistics_gradients(norm, *sums)
    statistics = [each if wanted else None for each, wanted in zip((dmean, drstd), needed[1:3], strict=True)]
    return (dx, *statistics, *_parameter_gradients(norm, *sums, needed[3:]))


@torch.no_grad()
def group_norm_backward(
    gradients: tuple[Gradient, ...],
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
    eps: float,
    per_frame: bool,
) -> tuple[Gradient, ...]:
    """One gradient for each argument of `group_norm`, of those that want one. The statistics are computed again."""
    (grad,) = gradients
    assert grad is not None
    norm = Norm(*_statistics(x, num_groups, eps, per_frame), weight, bias, scale, shift)
    sums = _gradient_sums(grad, x, norm, act)
    dx = None
    if x.requires_grad:
        dx = _gradient_of_x(grad, x, norm, act, _through_statistics(x, norm.rstd, *_statistics_gradients(norm, *sums)))
    needed = [each is not None and each.requires_grad for each in (weight, bias, scale, shift)]
    return (dx, None, *_parameter_gradients(norm, *sums, needed), None, None, None)


@torch.no_grad()
def group_norm_stats_backward(
    gradients: tuple[Gradient, ...], x: Tensor, num_groups: int, eps: float, per_frame: bool
) -> tuple[Gradient, ...]:
    """The gradient of `x`, of `group_norm_stats`; its other arguments have none."""
    mean, rstd = _statistics(x, num_groups, eps, per_frame)
    dmean, drstd = (mean.new_zeros(()) if each is None else each for each in gradients)
    slope, center = _through_statistics(x, rstd, dmean, drstd)
    dx = torch.empty_like(x)
    offset = center.expand(mean.shape).repeat_interleave(x.shape[1] // num_groups, dim=-1)
    normalize(x, mean, slope, None, None, None, offset, None, out=dx)
    return dx, None, None, None


class Norm(NamedTuple):
    """What is applied to x; see `normalize`."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


# The device's part.


@triton.jit
def _place(tiles, blocks, frames, BACKWARDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where this program's tile lies: clip, frame, tile of the frame's pixels, block of channels; all int64."""
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    block = program % blocks
    program = program // blocks
    tile = program % tiles
    frame = program // tiles
    return (frame // frames).to(tl.int64), (frame % frames).to(tl.int64), tile.to(tl.int64), block.to(tl.int64)


# fmt: off
@triton.jit
def _at(  # type: ignore[no-untyped-def]
    frame, first, stride_c, stride_h, stride_w, width, channel, ROWS: tl.constexpr, VECTOR: tl.constexpr
):
    """Pointers to a frame's pixels from `first` on: (ROWS, channels)."""
    row = tl.arange(0, ROWS)
    if VECTOR > 1:  # dense channels, and all pixels one stride apart
        start = tl.multiple_of(frame + first * stride_w, 16)
        stride = tl.multiple_of(tl.cast(stride_w, tl.int64), VECTOR)
        return start + (row.to(tl.int64)[:, None] * stride + channel[None, :])
    pixel = first.to(tl.int32) + row
    offset = (pixel // width).to(tl.int64) * stride_h + (pixel % width).to(tl.int64) * stride_w
    return frame + (offset[:, None] + (channel * stride_c)[None, :])
# fmt: on


@triton.jit
def _silu(z):  # type: ignore[no-untyped-def]
    return z / (1 + tl.exp(-z))


@triton.jit
def _before_silu(z, gradient):  # type: ignore[no-untyped-def]
    """The gradient of `z`, from that of `silu(z)`."""
    sigmoid = 1 / (1 + tl.exp(-z))
    return gradient * (sigmoid * (1 + z * (1 - sigmoid)))


def _strides_of(*tensors: str) -> tuple[str, ...]:
    return tuple(f"{tensor}_{axis}" for tensor in tensors for axis in "bcthw")


PLACE_SCALARS = ("frames", "channels", "width", "pixels", "tiles", "rows")
MOMENTS_TENSORS = ("x", "means", "squares")
MOMENTS_SCALARS = (*PLACE_SCALARS, *_strides_of("x"))


# fmt: off
@triton.jit(do_not_specialize=[*MOMENTS_TENSORS, *MOMENTS_SCALARS])
def _moments_kernel(  # type: ignore[no-untyped-def]
    x, means, squares,
    frames, channels, width, pixels, tiles, rows,
    x_b, x_c, x_t, x_h, x_w,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):
    """The partials of one tile. Every lane follows its own pixels (Welford); at the end the lanes are combined.

    Values are taken relative to the mean of the channel's first pixels, so that a large mean costs no digits.
    """
    SUM: tl.constexpr = squares.dtype.element_ty
    b, t, tile, block = _place(tiles, tl.cdiv(channels, CHANNELS), frames, False)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = (channel < tl.multiple_of(tl.cast(channels, tl.int64), VECTOR))[None, :]
    first = tile * rows
    count = tl.minimum(pixels - first, rows).to(tl.int32)
    row = tl.arange(0, ROWS)[:, None]
    frame = x + (b * x_b + t * x_t)
    source = _at(frame, first, x_c, x_h, x_w, width, channel, ROWS, VECTOR)
    begin = tl.load(source, mask=(row < count) & exists, other=0.0).to(SUM)
    origin = tl.sum(begin, 0, keep_dims=True) / tl.minimum(count, ROWS).to(SUM)

    mean = tl.zeros((ROWS, CHANNELS), SUM)
    square = tl.zeros((ROWS, CHANNELS), SUM)
    steps = tl.zeros((), SUM)
    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        inside = row < count - start
        source = _at(frame, first + start, x_c, x_h, x_w, width, channel, ROWS, VECTOR)
        value = tl.load(source, mask=inside & exists, other=0.0).to(SUM) - origin
        away = tl.where(inside, value - mean, 0.0)
        steps += 1.0
        mean += away * (1.0 / steps)
        square += away * (value - mean)

    seen = ((count - row + (ROWS - 1)) // ROWS).to(SUM)
    whole = tl.sum(seen * mean, 0, keep_dims=True) / count.to(SUM)
    apart = mean - whole
    square = tl.sum(square + seen * apart * apart, 0, keep_dims=True)
    at = ((b * frames + t) * tiles + tile) * channels + channel[None, :]
    tl.store(means + at, origin.to(tl.float64) + whole.to(tl.float64), mask=exists)
    tl.store(squares + at, square, mask=exists)
# fmt: on


FINISH_TENSORS = ("means", "squares", "mean", "rstd")
FINISH_SCALARS = (
    *("mean_b", "mean_t", "mean_g", "rstd_b", "rstd_t", "rstd_g"),
    *("channels", "per_group", "groups", "stats", "frames", "tiles", "rows", "pixels"),
    *("eps", "eps_rest"),
)


@triton.jit
def _slots(start, channels, per_group, frames, tiles, rows, pixels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the partials of a statistic from `start` on: where each lies, and how many pixels it is of."""
    index = start + tl.arange(0, BLOCK)
    slot = index // per_group  # over the frames of the statistic and their tiles
    count = tl.where(slot < frames * tiles, tl.minimum(pixels - slot % tiles * rows, rows), 0)
    return slot.to(tl.int64) * channels + index % per_group, count


# fmt: off
@triton.jit(do_not_specialize=[*FINISH_TENSORS, *FINISH_SCALARS])
def _finish_kernel(  # type: ignore[no-untyped-def]
    means, squares, mean, rstd,
    mean_b, mean_t, mean_g, rstd_b, rstd_t, rstd_g,
    channels, per_group, groups,
    stats, frames,  # of a clip, of a statistic
    tiles, rows, pixels, eps, eps_rest,
    BLOCK: tl.constexpr,
):
    """One statistic of one group, from the partials of its tiles and channels."""
    SUM: tl.constexpr = squares.dtype.element_ty
    program = tl.program_id(0)
    group = (program % groups).to(tl.int64)
    program = program // groups
    b, t = (program // stats).to(tl.int64), (program % stats).to(tl.int64)
    f = (b * stats + t) * frames  # the first frame
    partials = f * tiles * channels + group * per_group
    means += partials
    squares += partials
    size = (tl.cast(pixels, tl.int64) * frames * per_group).to(SUM)

    origin = tl.load(means)
    total = tl.zeros((BLOCK,), SUM)
    for start in range(0, frames * tiles * per_group, BLOCK):
        at, count = _slots(start, channels, per_group, frames, tiles, rows, pixels, BLOCK)
        part = (tl.load(means + at, mask=count > 0, other=0.0) - origin).to(SUM)
        total += tl.where(count > 0, count.to(SUM) * part, 0.0)
    center = tl.sum(total, 0) / size

    total = tl.zeros((BLOCK,), SUM)
    for start in range(0, frames * tiles * per_group, BLOCK):
        at, count = _slots(start, channels, per_group, frames, tiles, rows, pixels, BLOCK)
        apart = (tl.load(means + at, mask=count > 0, other=0.0) - origin).to(SUM) - center
        square = tl.load(squares + at, mask=count > 0, other=0.0)
        total += tl.where(count > 0, square + count.to(SUM) * apart * apart, 0.0)
    variance = tl.sum(total, 0) / size
    tl.store(mean + (b * mean_b + t * mean_t + group * mean_g), (origin + center.to(origin.dtype)).to(SUM))
    deviation = tl.sqrt(variance + eps + eps_rest)
    tl.store(rstd + (b * rstd_b + t * rstd_t + group * rstd_g), 1.0 / deviation)


@triton.jit
def _norm_of(  # type: ignore[no-untyped-def]
    mean, rstd, weight, bias, scale, shift, b, t, channel, exists, per_group,
    stat_b, stat_t, scale_b, scale_t, scale_c, shift_b, shift_t, shift_c, has_weight, has_bias, has_scale, has_shift,
):
    """Of each channel the mean, and the multiplier and offset of (x - mean); each (1, channels)."""
    SUM: tl.constexpr = mean.dtype.element_ty
    stat = b * stat_b + t * stat_t + channel.to(tl.int32) // per_group
    mean = tl.load(mean + stat, mask=exists, other=0.0)
    rstd = tl.load(rstd + stat, mask=exists, other=0.0)
    multiplier = tl.load(weight + channel, mask=exists & (has_weight != 0), other=1.0).to(SUM)
    offset = tl.load(bias + channel, mask=exists & (has_bias != 0), other=0.0).to(SUM)
    scale += b * scale_b + t * scale_t
    gain = 1.0 + tl.load(scale + channel * scale_c, mask=exists & (has_scale != 0), other=0.0).to(SUM)
    shift += b * shift_b + t * shift_t
    added = tl.load(shift + channel * shift_c, mask=exists & (has_shift != 0), other=0.0).to(SUM)
    return mean[None, :], (rstd * multiplier * gain)[None, :], (offset * gain + added)[None, :]


NORM_TENSORS = ("mean", "rstd", "weight", "bias", "scale", "shift")
NORM_SCALARS = (
    *("per_group", "stat_b", "stat_t", "scale_b", "scale_t", "scale_c", "shift_b", "shift_t", "shift_c"),
    *("has_weight", "has_bias", "has_scale", "has_shift", "silu"),
)
NORMALIZE_TENSORS = ("x", "out", *NORM_TENSORS)
NORMALIZE_SCALARS = (*PLACE_SCALARS, *_strides_of("x", "out"), *NORM_SCALARS)


@triton.jit(do_not_specialize=[*NORMALIZE_TENSORS, *NORMALIZE_SCALARS])
def _normalize_kernel(  # type: ignore[no-untyped-def]
    x, out, mean, rstd, weight, bias, scale, shift,
    frames, channels, width, pixels, tiles, rows,
    x_b, x_c, x_t, x_h, x_w, out_b, out_c, out_t, out_h, out_w,
    per_group, stat_b, stat_t, scale_b, scale_t, scale_c, shift_b, shift_t, shift_c,
    has_weight, has_bias, has_scale, has_shift, silu,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):
    SUM: tl.constexpr = mean.dtype.element_ty
    b, t, tile, block = _place(tiles, tl.cdiv(channels, CHANNELS), frames, True)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < tl.multiple_of(tl.cast(channels, tl.int64), VECTOR)
    center, multiplier, offset = _norm_of(
        mean, rstd, weight, bias, scale, shift, b, t, channel, exists, per_group, stat_b, stat_t,
        scale_b, scale_t, scale_c, shift_b, shift_t, shift_c, has_weight, has_bias, has_scale, has_shift,
    )
    first = tile * rows
    count = tl.minimum(pixels - first, rows).to(tl.int32)
    row = tl.arange(0, ROWS)[:, None]
    x += b * x_b + t * x_t
    out += b * out_b + t * out_t
    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        mask = (row < count - start) & exists[None, :]
        source = _at(x, first + start, x_c, x_h, x_w, width, channel, ROWS, VECTOR)
        target = _at(out, first + start, out_c, out_h, out_w, width, channel, ROWS, VECTOR)
        value = tl.load(source, mask=mask, other=0.0, eviction_policy="evict_first").to(SUM)
        y = (value - center) * multiplier + offset
        if silu != 0:
            y = _silu(y)
        tl.store(target, y.to(out.dtype.element_ty), mask=mask)


SUMS_TENSORS = ("x", "grad", "totals", "moments", *NORM_TENSORS)
SUMS_SCALARS = (*PLACE_SCALARS, *_strides_of("x", "grad"), *NORM_SCALARS)


@triton.jit(do_not_specialize=[*SUMS_TENSORS, *SUMS_SCALARS])
def _gradient_sums_kernel(  # type: ignore[no-untyped-def]
    x, grad, totals, moments, mean, rstd, weight, bias, scale, shift,
    frames, channels, width, pixels, tiles, rows,
    x_b, x_c, x_t, x_h, x_w, grad_b, grad_c, grad_t, grad_h, grad_w,
    per_group, stat_b, stat_t, scale_b, scale_t, scale_c, shift_b, shift_t, shift_c,
    has_weight, has_bias, has_scale, has_shift, silu,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):
    """Of a tile's pixels, by channel: the sum of the gradient before SiLU, and of that times (x - mean)."""
    SUM: tl.constexpr = mean.dtype.element_ty
    b, t, tile, block = _place(tiles, tl.cdiv(channels, CHANNELS), frames, True)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < tl.multiple_of(tl.cast(channels, tl.int64), VECTOR)
    center, multiplier, offset = _norm_of(
        mean, rstd, weight, bias, scale, shift, b, t, channel, exists, per_group, stat_b, stat_t,
        scale_b, scale_t, scale_c, shift_b, shift_t, shift_c, has_weight, has_bias, has_scale, has_shift,
    )
    first = tile * rows
    count = tl.minimum(pixels - first, rows).to(tl.int32)
    row = tl.arange(0, ROWS)[:, None]
    x += b * x_b + t * x_t
    grad += b * grad_b + t * grad_t
    total = tl.zeros((ROWS, CHANNELS), SUM)
    moment = tl.zeros((ROWS, CHANNELS), SUM)
    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        mask = (row < count - start) & exists[None, :]
        source = _at(x, first + start, x_c, x_h, x_w, width, channel, ROWS, VECTOR)
        above = _at(grad, first + start, grad_c, grad_h, grad_w, width, channel, ROWS, VECTOR)
        value = tl.load(source, mask=mask, other=0.0).to(SUM) - center
        gradient = tl.load(above, mask=mask, other=0.0).to(SUM)
        if silu != 0:
            gradient = _before_silu(value * multiplier + offset, gradient)
        total += gradient
        moment += gradient * value
    at = ((b * frames + t) * tiles + tile) * channels + channel
    tl.store(totals + at, tl.sum(total, 0), mask=exists)
    tl.store(moments + at, tl.sum(moment, 0), mask=exists)


GRADIENT_TENSORS = ("x", "grad", "dx", *NORM_TENSORS, "slope", "lift")
GRADIENT_SCALARS = (*PLACE_SCALARS, *_strides_of("x", "grad", "dx"), *NORM_SCALARS, "has_pull")


@triton.jit(do_not_specialize=[*GRADIENT_TENSORS, *GRADIENT_SCALARS])
def _gradient_kernel(  # type: ignore[no-untyped-def]
    x, grad, dx, mean, rstd, weight, bias, scale, shift, slope, lift,
    frames, channels, width, pixels, tiles, rows,
    x_b, x_c, x_t, x_h, x_w, grad_b, grad_c, grad_t, grad_h, grad_w, dx_b, dx_c, dx_t, dx_h, dx_w,
    per_group, stat_b, stat_t, scale_b, scale_t, scale_c, shift_b, shift_t, shift_c,
    has_weight, has_bias, has_scale, has_shift, silu, has_pull,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):
    """The gradient of x: through the norm, and `slope * (x - mean) + lift` that reaches it through the statistics."""
    SUM: tl.constexpr = mean.dtype.element_ty
    b, t, tile, block = _place(tiles, tl.cdiv(channels, CHANNELS), frames, False)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < tl.multiple_of(tl.cast(channels, tl.int64), VECTOR)
    center, multiplier, offset = _norm_of(
        mean, rstd, weight, bias, scale, shift, b, t, channel, exists, per_group, stat_b, stat_t,
        scale_b, scale_t, scale_c, shift_b, shift_t, shift_c, has_weight, has_bias, has_scale, has_shift,
    )
    stat = b * stat_b + t * stat_t + channel.to(tl.int32) // per_group
    slope_c = tl.load(slope + stat, mask=exists & (has_pull != 0), other=0.0)[None, :]
    lift_c = tl.load(lift + stat, mask=exists & (has_pull != 0), other=0.0)[None, :]

    first = tile * rows
    count = tl.minimum(pixels - first, rows).to(tl.int32)
    row = tl.arange(0, ROWS)[:, None]
    x += b * x_b + t * x_t
    grad += b * grad_b + t * grad_t
    dx += b * dx_b + t * dx_t
    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        mask = (row < count - start) & exists[None, :]
        source = _at(x, first + start, x_c, x_h, x_w, width, channel, ROWS, VECTOR)
        above = _at(grad, first + start, grad_c, grad_h, grad_w, width, channel, ROWS, VECTOR)
        target = _at(dx, first + start, dx_c, dx_h, dx_w, width, channel, ROWS, VECTOR)
        value = tl.load(source, mask=mask, other=0.0, eviction_policy="evict_first").to(SUM) - center
        gradient = tl.load(above, mask=mask, other=0.0, eviction_policy="evict_first").to(SUM)
        if silu != 0:
            gradient = _before_silu(value * multiplier + offset, gradient)
        tl.store(target, (gradient * multiplier + value * slope_c + lift_c).to(dx.dtype.element_ty), mask=mask)
# fmt: on


# The host's part: how tensors are walked, and what a kernel is given.


class Form(NamedTuple):
    """A tile: pixels by channels, and how many dense channels a load takes."""

    ROWS: int
    CHANNELS: int
    VECTOR: int
    STAGES: int = NUM_STAGES


def _forms(itemsize: int) -> dict[str, Form]:
    """Of frames whose channels lie in whole 16-byte vectors; of any strides, whatever is the denser axis."""
    line = LINE_BYTES // itemsize
    return {
        "dense": Form(TILE_ROWS, line, VECTOR_BYTES // itemsize),
        "channels": Form(TILE_ROWS, line, 1),
        "pixels": Form(PIXEL_ROWS, 1, 1),
    }


class Geometry(NamedTuple):
    """All that decides a launch.

    Args:
        vectors: whether every tensor begins at a multiple of 16 bytes.
    """

    shape: Integers
    strides: tuple[Integers, ...]
    itemsize: int
    vectors: bool


class Walk(NamedTuple):
    """How a launch walks over tensors of one shape.

    Args:
        tiles: of a frame.
        rows: pixels of a tile: those that a program walks over.
        scalars: values of PLACE_SCALARS, then the strides of each tensor.
    """

    form: Form
    programs: int
    tiles: int
    rows: int
    scalars: Integers


def _walk(tensors: Sequence[Tensor], recording: bool) -> Walk:
    geometry = Geometry(
        tensors[0].shape,
        tuple([tensor.stride() for tensor in tensors]),
        tensors[0].element_size(),
        all([aligned(tensor, VECTOR_BYTES, recording) for tensor in tensors]),
    )
    return _plan(geometry) if recording else _cached_plan(geometry)


def _plan(geometry: Geometry) -> Walk:
    B, C, T, H, W = shape = tuple(map(int, geometry.shape))
    pixels = H * W
    if pixels > LONGEST_FRAME:
        raise ValueError(f"group_norm: x has {pixels} pixels in a frame, at most {LONGEST_FRAME} are served")
    strides = [_settled(shape, found) for found in geometry.strides]
    form = _form(geometry, shape, strides)
    blocks, steps = -(-C // form.CHANNELS), -(-pixels // form.ROWS)
    rows = form.ROWS * max(1, min(MOST_STEPS, B * T * blocks * steps // PROGRAMS))
    tiles = -(-pixels // rows)
    scalars = (T, C, W, pixels, tiles, rows, *(stride for each in strides for stride in each))
    return Walk(form, B * T * tiles * blocks, tiles, rows, scalars)


_cached_plan = functools.lru_cache(maxsize=1024)(_plan)


def _settled(shape: Integers, strides: Sequence[int]) -> Integers:
    """Plain integers, also in a trace with symbolic shapes: 0 where an axis has one element, W's that of all pixels."""
    b, c, t, h, w = (int(stride) if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
    return (b, c, t, h, h if shape[4] == 1 else w)


def _form(geometry: Geometry, shape: Integers, strides: Sequence[Integers]) -> Form:
    _, C, _, H, W = shape
    forms = _forms(geometry.itemsize)

    def dense(b: int, c: int, t: int, h: int, w: int) -> bool:
        places = (C, b, t, w)
        return c == 1 and (1 in (H, W) or h == W * w) and all(n * geometry.itemsize % VECTOR_BYTES == 0 for n in places)

    if geometry.vectors and all(dense(*each) for each in strides):
        return forms["dense"]
    _, c, _, _, w = strides[-1]
    return forms["pixels" if C == 1 or 0 < w < c else "channels"]


def _partials(x: Tensor, walk: Walk, dtype: torch.dtype) -> Tensor:
    """Room for a number of every frame, tile and channel."""
    return torch.empty(x.shape[0], x.shape[2], walk.tiles, x.shape[1], dtype=dtype, device=x.device)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _statistics(x: Tensor, num_groups: int, eps: float, per_frame: bool) -> tuple[Tensor, Tensor]:
    B, _, T = x.shape[:3]
    shape = (B, T, num_groups) if per_frame else (B, num_groups)
    mean, rstd = (torch.empty(shape, dtype=_accumulation_dtype(x), device=x.device) for _ in range(2))
    group_norm_stats(x, num_groups, eps, per_frame, out=(mean, rstd))
    return mean, rstd


def _norm_arguments(x: Tensor, norm: Norm, act: str | None) -> tuple[list[Tensor], Integers]:
    """The values of NORM_TENSORS and NORM_SCALARS; in the place of what is absent another stands, not read.

    Parameters are all of the dtype of x or all of the accumulation dtype: mixed ones, which are small, are converted.
    """
    C, G = int(x.shape[1]), int(norm.mean.shape[-1])
    mean, rstd = norm.mean.contiguous(), norm.rstd.contiguous()
    given = norm[2:]
    present = [each for each in given if each is not None]
    dtype = x.dtype if all(each.dtype == x.dtype for each in present) else mean.dtype
    weight, bias, scale, shift = (None if each is None else each.to(dtype) for each in given)
    weight, bias = (None if each is None else each.contiguous() for each in (weight, bias))
    stand_in = next((each for each in (weight, bias, scale, shift) if each is not None), x)
    tensors = [mean, rstd, *(stand_in if each is None else each for each in (weight, bias, scale, shift))]
    stats = _frame_strides(mean)[:2]
    has = [int(each is not None) for each in given]
    return tensors, (C // G, *stats, *_frame_strides(scale), *_frame_strides(shift), *has, int(act == "silu"))


def _frame_strides(values: Tensor | None) -> Integers:
    """(b, t, c) of a (B, T, C), or a (B, C) or (C,) that holds for all frames, or clips."""
    if values is None:
        return (0, 0, 0)
    *lead, c = map(int, values.stride())
    return (*lead, *[0] * (2 - len(lead)), c)


def _gradient_sums(grad: Tensor, x: Tensor, norm: Norm, act: str | None) -> tuple[Tensor, Tensor]:
    """The sums over a frame's pixels, each (B, T, C): of g, the gradient before `act`, and of g * (x - mean)."""
    walk = _walk([x, grad], traced(grad))
    partials = [_partials(x, walk, _accumulation_dtype(x)) for _ in range(2)]
    tensors, scalars = _norm_arguments(x, norm, act)
    arguments = (x, grad, *partials, *tensors, *walk.scalars, *scalars)
    launch(_gradient_sums_kernel, walk.programs, partials[0], *arguments, **walk.form._asdict(), **OPTIONS)
    total, moment = (each.sum(2) for each in partials)
    return total, moment


def _gradient_of_x(
    grad: Tensor, x: Tensor, norm: Norm, act: str | None, pull: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """`pull`: slope and lift of what reaches x through the statistics, each of their shape."""
    dx = torch.empty_like(x)
    walk = _walk([x, grad, dx], traced(dx))
    tensors, scalars = _norm_arguments(x, norm, act)
    pulling = [each.contiguous() for each in pull] if pull else tensors[:2]
    arguments = (x, grad, dx, *tensors, *pulling, *walk.scalars, *scalars, int(pull is not None))
    launch(_gradient_kernel, walk.programs, dx, *arguments, **walk.form._asdict(), **OPTIONS)
    return dx


def _statistics_gradients(norm: Norm, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of mean and rstd from the sums over a frame's pixels."""
    multiplier = _gain(norm.scale, total.dtype)
    if norm.weight is not None:
        multiplier = multiplier * norm.weight.to(total.dtype)
    by_group = [(multiplier * each).unflatten(-1, (norm.mean.shape[-1], -1)).sum(-1) for each in (total, moment)]
    dmean, drstd = (each if norm.mean.dim() == 3 else each.sum(1) for each in by_group)
    return -norm.rstd * dmean, drstd


def _through_statistics(x: Tensor, rstd: Tensor, dmean: Tensor, drstd: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and lift of the gradient `slope * (x - mean) + lift` that the statistics of x give it."""
    frames = 1 if rstd.dim() == 3 else x.shape[2]
    size = x.shape[1] // rstd.shape[-1] * frames * x.shape[3] * x.shape[4]
    return -drstd * rstd**3 / size, dmean / size


def _parameter_gradients(norm: Norm, total: Tensor, moment: Tensor, needed: Sequence[bool]) -> list[Gradient]:
    """The gradients of weight, bias, scale and shift from the sums over a frame's pixels."""
    weight, bias = (None if each is None else each.to(total.dtype) for each in (norm.weight, norm.bias))
    rstd = norm.rstd if norm.rstd.dim() == 3 else norm.rstd[:, None]
    moment = moment * rstd.repeat_interleave(total.shape[-1] // rstd.shape[-1], dim=-1)  # of g * (x - mean) * rstd
    gain = _gain(norm.scale, total.dtype)
    affine = moment if weight is None else moment * weight
    affine = affine if bias is None else affine + total * bias
    found = (
        lambda: (gain * moment).sum((0, 1)),
        lambda: (gain * total).sum((0, 1)),
        lambda: _like_film(affine, norm.scale),
        lambda: _like_film(total, norm.shift),
    )
    return [
        make().to(each.dtype) if wanted and each is not None else None
        for make, each, wanted in zip(found, norm[2:], needed, strict=True)
    ]


def _gain(scale: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    """`1 + scale`, by frame."""
    if scale is None:
        return 1.0
    gain = 1 + scale.to(dtype)
    return gain if gain.dim() == 3 else gain[:, None]


def _like_film(by_frame: Tensor, film: Tensor | None) -> Tensor:
    return by_frame.sum(1) if film is not None and film.dim() == 2 else by_frame


# What ships: every compiled form that a launch can ask for.

DTYPES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}
TENSORS = {
    "_moments_kernel": MOMENTS_TENSORS,
    "_normalize_kernel": NORMALIZE_TENSORS,
    "_gradient_sums_kernel": SUMS_TENSORS,
    "_gradient_kernel": GRADIENT_TENSORS,
}
SCALARS = {
    "_moments_kernel": MOMENTS_SCALARS,
    "_normalize_kernel": NORMALIZE_SCALARS,
    "_gradient_sums_kernel": SUMS_SCALARS,
    "_gradient_kernel": GRADIENT_SCALARS,
}
ACTIVATIONS = ("x", "out", "grad", "dx")
PARAMETERS = ("weight", "bias", "scale", "shift")


def _tile_variant(kernel: str, dtype: str, form: str, parameters: str) -> Variant:
    tile = _forms(DTYPES[dtype])[form]
    total = "fp64" if dtype == "fp64" else "fp32"
    kinds = dict.fromkeys(ACTIVATIONS, dtype) | dict.fromkeys(PARAMETERS, parameters) | {"means": "fp64"}
    signature = {name: f"*{kinds.get(name, total)}" for name in TENSORS[kernel]}
    signature |= dict.fromkeys(SCALARS[kernel], "i32") | dict.fromkeys(tile._asdict(), "constexpr")
    name = f"{kernel.strip('_').removesuffix('_kernel')}, {dtype} {form}"
    name += "" if kernel == "_moments_kernel" else f", parameters {parameters}"
    read = sum(each in ("x", "grad") for each in TENSORS[kernel])
    wide = VECTORS_EACH * read if form == "dense" else 0
    return Variant(name, kernel, signature, tile._asdict(), NUM_WARPS, NUM_STAGES, wide)


def _finish_variant(means: str, total: str) -> Variant:
    signature = dict.fromkeys(FINISH_TENSORS, f"*{total}") | {"means": f"*{means}"}
    signature |= dict.fromkeys(FINISH_SCALARS, "i32") | {"eps": "fp32", "eps_rest": "fp32", "BLOCK": "constexpr"}
    constants, name = {"BLOCK": FINISH_BLOCK}, f"finish, {total}, means {means}"
    return Variant(name, "_finish_kernel", signature, constants, NUM_WARPS, NUM_STAGES)


VARIANTS = (
    *(
        _tile_variant(kernel, dtype, form, parameters)
        for kernel, dtype, form in product(TENSORS, DTYPES, _forms(4))
        for parameters in ([dtype, "fp32"] if DTYPES[dtype] == 2 and kernel != "_moments_kernel" else [dtype])
    ),
    *(_finish_variant(means, total) for means, total in (("fp64", "fp32"), ("fp32", "fp32"), ("fp64", "fp64"))),
)
