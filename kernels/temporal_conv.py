"""temporal_conv as a GEMM: rows are pixels of frames, and the A tile of a tap is the same pixels some frames away.

Nothing is unrolled in memory. A program makes a tile of y, of rows of one frame where frames are large enough; its loop
runs over taps and blocks of input channels alike, so that loads are in flight throughout. Frames outside the clip add
nothing to zero padding and are left out; to replicate padding they are its first or last. Programs that run side by
side make the same pixels in neighbouring frames, so what the taps read again is still in L2.

A norm before the convolution is a multiplier and an offset of each frame and channel, computed once, and SiLU, if it is
not left out; it is applied to the A tile in registers, or where that has been found slower written out before
(`fused_norm`). Whether SiLU is left out is compiled in: a flag between tile and product, branch or operand, costs a way
through shared memory, and SiLU as many cycles as a product. Bias, SiLU, residual and the next norm's statistics follow
on the accumulator, or where tiles are few and their loops are shared out (`split_k`) in a second pass over fp32 partial
sums, in fixed order.

Where channels are few (`walk`), weights stay in shared memory and a program walks a tile of pixels through the frames:
each is read, normed and activated once for all three taps.

Statistics leave as mean and squared deviations of each channel over a tile's rows, for `finish_stats` to combine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import cases, chosen, shipped
from ._launch import Variant, aligned, launch, traced
from .group_norm import _frame_strides, _silu, finish_stats, normalize

OP = "temporal_conv"
EPS = 1e-5
VECTOR_BYTES = 16
FEW_TILES = 264  # of 128 by 128: two for each multiprocessor of the cards aimed at
CHANNEL_CLASSES = (("c64", 64), ("c128", 128), ("c256", 256))
MOST_REGISTERS = 255  # that a thread can have


class Config(NamedTuple):
    """How a case is run.

    Args:
        block_m, block_n, block_k: the tile: rows, output channels, input channels at a time.
        split_k: among how many programs a tile's sum is shared out at most, where tiles are few.
        walk: whether three taps of narrow clips are run by `_walk_kernel`, whose tiles are its own; from sm_90 on.
        fused_norm: whether a norm is applied to the tiles as they are read; else in a pass of its own before.
        maxnreg: the most registers of a thread, in the forms of `_capped`; MOST_REGISTERS for no cap.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    walk: bool = False
    fused_norm: bool = False
    maxnreg: int = MOST_REGISTERS

    def launch_options(self, capped: bool) -> dict[str, int]:
        cap = {"maxnreg": self.maxnreg} if capped and self.maxnreg < MOST_REGISTERS else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **cap}


def _config(fields: Mapping[str, int]) -> Config:
    return Config(**fields)  # type: ignore[arg-type]


# Any strides, element by element, by the bytes of one: tiles are small, since each has its address in registers.
STRIDED = {2: Config(64, 32, 32, 1, 4, 2, fused_norm=True), 4: Config(64, 32, 16, 1, 4, 2, fused_norm=True)}
WALK_M, WALK_N, WALK_K = 128, 64, 64
WALK_OPTIONS = {"num_warps": 8, "num_stages": 3}
HOPPER = (9, 0)
WALK_FRAMES = 4  # that a part has at least, where there are as many
REDUCE_M, REDUCE_N = 32, 64
FINISH_COLUMNS: tl.constexpr = tl.constexpr(32)  # of a tile that are finished at once: more would raise its registers
SMALL_N = 128  # columns of a tile that leave registers for the addresses of spanning rows, or of weights dense in C_out
# How many rows of tiles within frames may be computed for each that there is, before tiles go on from frame to frame:
# where sums are handed on anyway, and where that costs a pass.
SHARED_WASTE, WASTE = 1.125, 1.5
PASS_OPTIONS = {"num_warps": 4, "num_stages": 1}
AFFINE_TILE = 256


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    act: str | None,
    residual: Tensor | None,
    stats_groups: int | None,
    norm_mean: Tensor | None,
    norm_rstd: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_scale: Tensor | None,
    norm_shift: Tensor | None,
    norm_act: str | None,
    *,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write what `temporal_conv_reference` returns into `out`. fp16, bf16 or fp32; any strides.

    Fast are clips in channels_last_3d memory, or slices of it, whose pixels begin at multiples of 16 bytes. One of the
    weight's axes of channels should be dense, with whole vectors between taps, as of memory (k, C_out, C_in): where
    neither is, the weight is copied.

    Raises:
        ValueError: a result that a grid cannot hold (2^31 tiles), or a table of configurations that is damaged.
    """
    y, mean, rstd = out
    if y.numel() == 0:
        return
    case = case_of(x.dtype, y.shape[1], weight.shape[2], y.numel() // y.shape[1], norm_mean is not None)
    config = _config(chosen(OP, case, x.device))
    folded = None
    if norm_mean is not None and norm_rstd is not None:
        norm = (norm_mean, norm_rstd, norm_weight, norm_bias, norm_scale, norm_shift)
        if config.fused_norm:
            folded = (*_affine(x, *norm), norm_act == "silu")
        else:
            h = torch.empty_like(x.permute(0, 2, 3, 4, 1), memory_format=torch.contiguous_format).permute(0, 4, 1, 2, 3)
            normalize(x, *norm, norm_act, out=h)
            x = h
    weight, plan = _plan(x, weight, residual, y, config, folded is not None)
    B, _, T, H, W = map(int, x.shape)
    partials = None
    if stats_groups is not None:
        tiles = (2, B, T, _cdiv(H * W, plan.rows), int(y.shape[1]))
        partials = torch.empty(tiles, dtype=torch.float32, device=y.device)
    _convolve(plan, x, weight, bias, padding_mode, act, residual, folded, y, mean if partials is None else partials)
    if stats_groups is not None and partials is not None:
        means, squares = partials
        finish_stats(means, squares, plan.rows, H * W, stats_groups, EPS, True, out=(mean, rstd))


def _convolve(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    act: str | None,
    residual: Tensor | None,
    folded: tuple[Tensor, Tensor, bool] | None,
    y: Tensor,
    statistics: Tensor,
) -> None:
    """Launch what is planned.

    Args:
        folded: multiplier and offset of the norm before, and whether SiLU follows it.
        statistics: where both partials go; a tensor of another rank if there are none.
    """
    B, C_in, T, H, W = map(int, x.shape)
    C_out = int(y.shape[1])
    means, squares = statistics if statistics.dim() == 5 else (statistics, statistics)
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.clone(memory_format=torch.contiguous_format)
    kind = 0 if bias is None else 1 if bias.dtype == x.dtype else 2
    added = y if residual is None else residual  # for what there is not, a tensor of the right dtype stands in
    tensors = (bias if kind == 1 else y, bias if kind == 2 else means, added, y, means, squares)
    flags = (int(act == "silu"), kind, int(residual is not None), int(statistics.dim() == 5))
    of_x, of_added, of_y = map(plan.steps, plan.strides)
    steps = (*_frame_strides(bias)[:2], *of_added, *of_y)
    scalars = (T, H * W, W, C_out, plan.splits, *flags, *steps)
    sums = None
    if plan.second:
        sums = torch.empty((plan.splits, B * T * H * W, C_out), dtype=torch.float32, device=y.device)
    kernel, handed = (_walk_kernel, ()) if plan.walk else (_conv_kernel, (sums,))
    multiplier, offset, norm_silu = folded or (None, None, True)
    sources = (x, weight, multiplier, offset, *handed)
    sides = (*of_x, *plan.steps(_weight_strides(weight)))
    shape = (B, C_in, int(weight.shape[2]), int(padding_mode == "zeros"))
    options = {"NORM_SILU": norm_silu, **plan.constants, **plan.options}
    launch(kernel, plan.programs, y, *sources, *tensors, *shape, *sides, *scalars, **options)
    if sums is not None:
        constants = _reduce_constants(plan.constants["VECTOR"])
        launch(_reduce_kernel, plan.reducers, y, sums, *tensors, B, *scalars, **constants, **PASS_OPTIONS)


def case_of(dtype: torch.dtype, c_out: int, taps: int, rows: int, normed: bool) -> str:
    """The name under which a call's configuration is found: `rows` is B * T * H * W, `normed` that a norm comes before.

    It has the width of the dtype, the class of C_out, whether there is one tap, and whether the tiles are few. As
    often as an element of x is read, once for each tap and block of columns, a fused norm computes its SiLU again.
    """
    channels = next((name for name, most in CHANNEL_CLASSES if c_out <= most), "wide")
    width = "single" if dtype == torch.float32 else "half"
    kind = f"{'k1' if taps == 1 else 'kn'}-{'norm' if normed else 'plain'}"
    few = _cdiv(int(rows), 128) * _cdiv(int(c_out), 128) < FEW_TILES
    return f"{width}-{channels}-{kind}-{'few' if few else 'many'}"


@triton.jit
def _starts(b, t, p, width, step_b, step_t, step_h, step_w, DENSE: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the pixels `p` of frames `t` of clips `b` begin; DENSE: without gaps between rows, steps in vectors."""
    if DENSE:
        return (b * step_b + t * step_t) * VECTOR + p * step_w * VECTOR
    return b * step_b + t * step_t + p // width * step_h + p % width * step_w


@triton.jit
def _halves(z):  # type: ignore[no-untyped-def]
    """The columns of a tile as two tiles."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _hand_on(z, partials, row, row_in, from_n, c_out, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a tile's sums in rows `row`, in parts as `_finish` does."""
    COLUMNS: tl.constexpr = z.shape[1]
    if COLUMNS > FINISH_COLUMNS:
        left, right = _halves(z)
        _hand_on(left, partials, row, row_in, from_n, c_out, VECTOR)
        _hand_on(right, partials, row, row_in, from_n + COLUMNS // 2, c_out, VECTOR)
    else:
        lane = tl.arange(0, COLUMNS)
        inside = row_in[:, None] & (lane < tl.multiple_of(c_out - from_n, VECTOR))[None, :]
        at = tl.multiple_of(row * c_out, VECTOR)[:, None] + lane[None, :]
        tl.store(tl.multiple_of(partials + from_n, 16) + at, z, inside)


# fmt: off
@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    z, b, t, p, row_in, from_n, tile, tiles, bias, bias_wide, residual, y, mean, m2,
    num_frames, width, c_out, act, bias_kind, has_residual, has_stats,
    bias_b, bias_t, r_b, r_c, r_t, r_h, r_w, y_b, y_c, y_t, y_h, y_w,
    DENSE: tl.constexpr, VECTOR: tl.constexpr,
):
    """From sums of pixels `p` of a frame, by columns from `from_n`, to y: bias, SiLU, residual; and their statistics.

    No more than FINISH_COLUMNS are in hand with their addresses and residual, which would not fit beside them.
    """
    COLUMNS: tl.constexpr = z.shape[1]
    if COLUMNS > FINISH_COLUMNS:
        left, right = _halves(z)
        _finish(
            left, b, t, p, row_in, from_n, tile, tiles, bias, bias_wide, residual, y, mean, m2,
            num_frames, width, c_out, act, bias_kind, has_residual, has_stats,
            bias_b, bias_t, r_b, r_c, r_t, r_h, r_w, y_b, y_c, y_t, y_h, y_w, DENSE, VECTOR,
        )
        _finish(
            right, b, t, p, row_in, from_n + COLUMNS // 2, tile, tiles, bias, bias_wide, residual, y, mean, m2,
            num_frames, width, c_out, act, bias_kind, has_residual, has_stats,
            bias_b, bias_t, r_b, r_c, r_t, r_h, r_w, y_b, y_c, y_t, y_h, y_w, DENSE, VECTOR,
        )
    else:
        lane = tl.arange(0, COLUMNS)
        n = from_n + lane
        column_in = lane < tl.multiple_of(c_out - from_n, VECTOR)
        inside = row_in[:, None] & column_in[None, :]
        if bias_kind > 0:
            bias_at = b * bias_b + t * bias_t + from_n
            if bias_kind == 1:
                z += tl.load(bias + bias_at + lane, mask=column_in, other=0.0).to(tl.float32)[None, :]
            else:
                z += tl.load(bias_wide + bias_at + lane, mask=column_in, other=0.0)[None, :]
        if act == 1:
            z = _silu(z)
        if has_residual == 1:
            r_at = _starts(b, t, p, width, r_b, r_t, r_h, r_w, DENSE, VECTOR)
            if DENSE:
                part = tl.load(tl.multiple_of(residual + from_n, 16) + (r_at[:, None] + lane[None, :]), inside, 0.0)
            else:
                part = tl.load(residual + (r_at[:, None] + (n * r_c)[None, :]), inside, 0.0)
            z += part.to(tl.float32)
        if has_stats == 1:
            count = tl.sum(row_in.to(tl.float32), 0)
            center = tl.sum(tl.where(inside, z, 0.0), 0) / count
            spread = tl.where(inside, z - center[None, :], 0.0)
            rest = tl.sum(spread, 0) / count  # what rounding left of a large sum
            stats_at = ((b * num_frames + t) * tiles + tile) * c_out + from_n
            tl.store(mean + stats_at + lane, center + rest, mask=column_in)
            tl.store(m2 + stats_at + lane, tl.sum(spread * spread, 0), mask=column_in)
        y_at = _starts(b, t, p, width, y_b, y_t, y_h, y_w, DENSE, VECTOR)
        rounded = z.to(y.dtype.element_ty)
        if DENSE:
            tl.store(tl.multiple_of(y + from_n, 16) + (y_at[:, None] + lane[None, :]), rounded, inside)
        else:
            tl.store(y + (y_at[:, None] + (n * y_c)[None, :]), rounded, inside)
# fmt: on


FINISH_TENSORS = ("bias", "bias_wide", "residual", "y", "mean", "m2")
FINISH_SCALARS = (
    *("num_frames", "pixels", "width", "c_out", "splits", "act", "bias_kind", "has_residual", "has_stats"),
    *("bias_b", "bias_t", "r_b", "r_c", "r_t", "r_h", "r_w", "y_b", "y_c", "y_t", "y_h", "y_w"),
)
CONV_TENSORS = ("x", "weight", "multiplier", "offset", "partials", *FINISH_TENSORS)
CONV_SCALARS = (
    *("clips", "c_in", "taps", "zeros", "x_b", "x_c", "x_t", "x_h", "x_w", "w_out", "w_in", "w_tap"),
    *FINISH_SCALARS,
)


# fmt: off
@triton.jit(do_not_specialize=[*CONV_TENSORS, *CONV_SCALARS])
def _conv_kernel(  # type: ignore[no-untyped-def]
    x, weight,
    multiplier, offset,  # (B * T, C_in) of the norm before, or None
    partials,  # (splits, B * T * H * W, C_out) for the second pass, or None where there is none
    bias, bias_wide,  # in the dtype of x, and in fp32: bias_kind says which there is
    residual, y,
    mean, m2,  # (B * T, tiles of a frame, C_out)
    clips, c_in, taps,
    zeros,  # 1: frames outside the clip are zero; 0: they are its first or last
    x_b, x_c, x_t, x_h, x_w, w_out, w_in, w_tap,
    num_frames, pixels, width, c_out, splits, act, bias_kind, has_residual, has_stats,
    bias_b, bias_t, r_b, r_c, r_t, r_h, r_w, y_b, y_c, y_t, y_h, y_w,
    NORM_SILU: tl.constexpr,  # whether SiLU follows the norm before
    SPAN: tl.constexpr,  # whether tiles of rows go on from frame to frame; then sums are handed on
    LAYOUT: tl.constexpr,  # "in", "out": dense, and this axis of the weight; "any"
    VECTOR: tl.constexpr,  # elements in 16 bytes: dense steps are counted in them; else 1
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A tile of y, or its share of the sum: BLOCK_M pixels by BLOCK_N channels."""
    DENSE: tl.constexpr = LAYOUT != "any"
    program = tl.program_id(0)
    blocks = tl.cdiv(c_out, BLOCK_N)
    from_n = (program % blocks).to(tl.int64) * BLOCK_N
    n = from_n + tl.arange(0, BLOCK_N)
    column_in = tl.arange(0, BLOCK_N) < tl.multiple_of(c_out - from_n, VECTOR)
    program = program // blocks
    split = program % splits
    program = program // splits
    tiles = tl.cdiv(pixels, BLOCK_M)
    tile = (program // num_frames % tiles).to(tl.int64)
    if SPAN:
        m = program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        count = tl.cast(clips, tl.int64) * num_frames * pixels
        row_in = m < count
        row = tl.minimum(m, count - 1)
        p = row % pixels
        t = row // pixels % num_frames
        b = row // pixels // num_frames
    else:
        t = (program % num_frames).to(tl.int64)
        b = (program // num_frames // tiles).to(tl.int64)
        p = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_in = p < pixels
        p = tl.minimum(p, pixels - 1)  # loaded and never stored

    # The loop runs over the taps, and for each over all input channels. A frame leaves out the taps that see zeros.
    chunks = tl.cdiv(c_in, BLOCK_K)
    first, last = 0, taps
    if not SPAN:
        first = tl.where(zeros == 1, tl.maximum(taps // 2 - t, 0), 0).to(tl.int32)
        last = tl.where(zeros == 1, tl.minimum(num_frames + taps // 2 - t, taps), taps).to(tl.int32)
    steps = (last - first) * chunks
    begin = first * chunks + steps * split // splits
    end = first * chunks + steps * (split + 1) // splits

    k = tl.arange(0, BLOCK_K)
    pixel = _starts(b, t, p, width, x_b, x_t, x_h, x_w, DENSE, VECTOR)
    if LAYOUT == "in":
        a_tile = pixel[:, None] + k[None, :]
        b_tile = k[:, None] + (tl.minimum(n, c_out - 1) * w_out * VECTOR)[None, :]
    elif LAYOUT == "out":
        a_tile = pixel[:, None] + k[None, :]
        b_tile = (k.to(tl.int64) * w_in * VECTOR)[:, None] + n[None, :]
    else:
        a_tile = pixel[:, None] + (k.to(tl.int64) * x_c)[None, :]
        b_tile = (k.to(tl.int64) * w_in)[:, None] + (tl.minimum(n, c_out - 1) * w_out)[None, :]

    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(begin, end):
        tap = step // chunks
        c = (step % chunks).to(tl.int64) * BLOCK_K
        left = tl.multiple_of(c_in - c, VECTOR)
        frame = t + (tap - taps // 2)
        source = tl.minimum(tl.maximum(frame, 0), num_frames - 1)
        away = (source - t) * x_t * VECTOR
        a_from = x + (c if DENSE else c * x_c)
        b_from = weight + (tap.to(tl.int64) * w_tap * VECTOR + (c if LAYOUT == "in" else c * w_in * VECTOR))
        a_in = (k < left)[None, :]
        b_in = (k < left)[:, None]
        if SPAN:
            a_in = a_in & ((zeros == 0) | (source == frame))[:, None]
            away = away[:, None]
        if LAYOUT == "out":
            b_in = b_in & column_in[None, :]
        if DENSE:
            a_from = tl.multiple_of(a_from, 16)
            b_from = tl.multiple_of(b_from, 16)
        values = tl.load(a_from + (a_tile + away), mask=a_in, other=0.0)
        weights = tl.load(b_from + b_tile, mask=b_in, other=0.0)
        if multiplier is not None:
            at = (b * num_frames + source) * c_in + c + k
            gain = tl.load(multiplier + at, mask=k < left, other=0.0)
            shift = tl.load(offset + at, mask=k < left, other=0.0)
            h = values.to(tl.float32) * gain[None, :] + shift[None, :]
            values = (_silu(h) if NORM_SILU else h).to(x.dtype.element_ty)
        z = tl.dot(values, weights, z, input_precision="tf32x3")

    if partials is not None:
        row = m if SPAN else (b * num_frames + t) * pixels + p
        row += split.to(tl.int64) * clips * num_frames * pixels
        _hand_on(z, partials, row, row_in, from_n, c_out, VECTOR)
    else:
        _finish(
            z, b, t, p, row_in, from_n, tile, tiles, bias, bias_wide, residual, y, mean, m2,
            num_frames, width, c_out, act, bias_kind, has_residual, has_stats,
            bias_b, bias_t, r_b, r_c, r_t, r_h, r_w, y_b, y_c, y_t, y_h, y_w,
            DENSE, VECTOR,
        )


WALK_TENSORS = ("x", "weight", "multiplier", "offset", *FINISH_TENSORS)


@triton.jit
def _three_taps(b_from, b_tile, k_in, step):  # type: ignore[no-untyped-def]
    """A block of the weights that a frame's channels meet in the sums of the frame after, its own, the one before."""
    first = tl.load(tl.multiple_of(b_from, 16) + b_tile, mask=k_in[:, None], other=0.0)
    second = tl.load(tl.multiple_of(b_from + step, 16) + b_tile, mask=k_in[:, None], other=0.0)
    third = tl.load(tl.multiple_of(b_from + 2 * step, 16) + b_tile, mask=k_in[:, None], other=0.0)
    return first, second, third


@triton.jit
def _activated(values, multiplier, offset, at, k_in, seen, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of a frame's channels after the norm, if there is one; zero where the frame is not `seen`."""
    if multiplier is not None:
        k = tl.arange(0, values.shape[1])
        gain = tl.load(multiplier + at + k, mask=k_in, other=0.0)
        shift = tl.load(offset + at + k, mask=k_in, other=0.0)
        h = values.to(tl.float32) * gain[None, :] + shift[None, :]
        values = tl.where(seen, _silu(h) if SILU else h, 0.0).to(values.dtype)
    return values


@triton.jit(do_not_specialize=[*WALK_TENSORS, *CONV_SCALARS])
def _walk_kernel(  # type: ignore[no-untyped-def]
    x, weight, multiplier, offset, bias, bias_wide, residual, y, mean, m2,
    clips, c_in, taps, zeros, x_b, x_c, x_t, x_h, x_w, w_out, w_in, w_tap,
    num_frames, pixels, width, c_out, splits, act, bias_kind, has_residual, has_stats,
    bias_b, bias_t, r_b, r_c, r_t, r_h, r_w, y_b, y_c, y_t, y_h, y_w,
    NORM_SILU: tl.constexpr,  # whether SiLU follows the norm before
    WIDE: tl.constexpr,  # whether there are two blocks of BLOCK_K channels, not one
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Three taps of few channels: a tile of pixels is walked through the frames of one of `splits` parts.

    Weights stay where they are, and each frame is read, normed and activated once: it adds to the sums of the frame
    before, of its own and of the one after, which are all in registers.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(c_out, BLOCK_N)
    from_n = (program % blocks).to(tl.int64) * BLOCK_N
    program = program // blocks
    part = program % splits
    program = program // splits
    tiles = tl.cdiv(pixels, BLOCK_M)
    tile = (program % tiles).to(tl.int64)
    b = (program // tiles).to(tl.int64)
    each = tl.cdiv(num_frames, splits)
    first = part.to(tl.int64) * each
    last = tl.minimum(first + each, num_frames)

    p = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = p < pixels
    p = tl.minimum(p, pixels - 1)
    k = tl.arange(0, BLOCK_K)
    a_tile = (p * x_w * VECTOR)[:, None] + k[None, :]
    lane = tl.minimum(tl.arange(0, BLOCK_N), c_out - 1 - from_n)
    b_tile = k[:, None] + (lane * w_out * VECTOR)[None, :]
    b_from = weight + from_n * w_out * VECTOR
    step_tap = tl.cast(w_tap, tl.int64) * VECTOR
    k_in = k < tl.multiple_of(tl.cast(c_in, tl.int64), VECTOR)
    before_0, here_0, after_0 = _three_taps(tl.multiple_of(b_from, 16), b_tile, k_in, step_tap)
    if WIDE:
        more_in = k < tl.multiple_of(tl.cast(c_in, tl.int64) - BLOCK_K, VECTOR)
        before_1, here_1, after_1 = _three_taps(tl.multiple_of(b_from + BLOCK_K, 16), b_tile, more_in, step_tap)

    before = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    here = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, last - first + 2):
        t = first - 1 + step
        source = tl.minimum(tl.maximum(t, 0), num_frames - 1)
        seen = (zeros == 0) | (source == t)
        a_from = x + (b * x_b + source * x_t) * VECTOR
        at = (b * num_frames + source) * c_in
        values = tl.load(tl.multiple_of(a_from, 16) + a_tile, mask=k_in[None, :] & seen, other=0.0)
        h = _activated(values, multiplier, offset, at, k_in, seen, NORM_SILU)
        before = tl.dot(h, after_0, before, input_precision="tf32x3")
        here = tl.dot(h, here_0, here, input_precision="tf32x3")
        after = tl.dot(h, before_0, input_precision="tf32x3")
        if WIDE:
            values = tl.load(tl.multiple_of(a_from + BLOCK_K, 16) + a_tile, mask=more_in[None, :] & seen, other=0.0)
            h = _activated(values, multiplier, offset, at + BLOCK_K, more_in, seen, NORM_SILU)
            before = tl.dot(h, after_1, before, input_precision="tf32x3")
            here = tl.dot(h, here_1, here, input_precision="tf32x3")
            after = tl.dot(h, before_1, after, input_precision="tf32x3")
        if step >= 2:
            _finish(
                before, b, t - 1, p, row_in, from_n, tile, tiles, bias, bias_wide, residual, y, mean, m2,
                num_frames, width, c_out, act, bias_kind, has_residual, has_stats,
                bias_b, bias_t, r_b, r_c, r_t, r_h, r_w, y_b, y_c, y_t, y_h, y_w,
                True, VECTOR,
            )
        before = here
        here = after


REDUCE_TENSORS = ("partials", *FINISH_TENSORS)
REDUCE_SCALARS = ("clips", *FINISH_SCALARS)


@triton.jit(do_not_specialize=[*REDUCE_TENSORS, *REDUCE_SCALARS])
def _reduce_kernel(  # type: ignore[no-untyped-def]
    partials, bias, bias_wide, residual, y, mean, m2,
    clips, num_frames, pixels, width, c_out, splits, act, bias_kind, has_residual, has_stats,
    bias_b, bias_t, r_b, r_c, r_t, r_h, r_w, y_b, y_c, y_t, y_h, y_w,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The second pass: the partial sums of a tile in order, and what follows the convolution."""
    program = tl.program_id(0)
    blocks = tl.cdiv(c_out, BLOCK_N)
    from_n = (program % blocks).to(tl.int64) * BLOCK_N
    column_in = tl.arange(0, BLOCK_N) < tl.multiple_of(c_out - from_n, VECTOR)
    program = program // blocks
    tiles = tl.cdiv(pixels, BLOCK_M)
    tile = (program % tiles).to(tl.int64)
    t = (program // tiles % num_frames).to(tl.int64)
    b = (program // tiles // num_frames).to(tl.int64)
    p = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = p < pixels
    inside = row_in[:, None] & column_in[None, :]
    rows = (b * num_frames + t) * pixels + p
    size = tl.cast(clips, tl.int64) * num_frames * pixels * c_out
    held = tl.multiple_of(rows * c_out, VECTOR)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.range(0, splits):
        sums = tl.multiple_of(partials + (split * size + from_n), 16)
        z += tl.load(sums + held, mask=inside, other=0.0)
    _finish(
        z, b, t, p, row_in, from_n, tile, tiles, bias, bias_wide, residual, y, mean, m2,
        num_frames, width, c_out, act, bias_kind, has_residual, has_stats,
        bias_b, bias_t, r_b, r_c, r_t, r_h, r_w, y_b, y_c, y_t, y_h, y_w,
        True, VECTOR,
    )


AFFINE_TENSORS = ("mean", "rstd", "weight", "bias", "scale", "shift", "multiplier", "offset")
AFFINE_SCALARS = (
    *("num_frames", "channels", "groups", "mean_b", "mean_t", "mean_g", "rstd_b", "rstd_t", "rstd_g"),
    *("weight_c", "bias_c", "scale_b", "scale_t", "scale_c", "shift_b", "shift_t", "shift_c"),
    *("has_weight", "has_bias", "has_scale", "has_shift"),
)


@triton.jit(do_not_specialize=[*AFFINE_TENSORS, *AFFINE_SCALARS])
def _affine_kernel(  # type: ignore[no-untyped-def]
    mean, rstd, weight, bias, scale, shift, multiplier, offset,
    num_frames, channels, groups, mean_b, mean_t, mean_g, rstd_b, rstd_t, rstd_g,
    weight_c, bias_c, scale_b, scale_t, scale_c, shift_b, shift_t, shift_c,
    has_weight, has_bias, has_scale, has_shift,
    TILE: tl.constexpr,
):
    """A norm with FiLM, of channels of a frame, as `x * multiplier + offset`."""
    blocks = tl.cdiv(channels, TILE)
    program = tl.program_id(0)
    frame = (program // blocks).to(tl.int64)
    b, t = frame // num_frames, frame % num_frames
    c = (program % blocks).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = c < channels
    g = c // (channels // groups)
    center = tl.load(mean + (b * mean_b + t * mean_t + g * mean_g), mask=inside, other=0.0)
    gain = tl.load(rstd + (b * rstd_b + t * rstd_t + g * rstd_g), mask=inside, other=0.0)
    if has_weight == 1:
        gain *= tl.load(weight + c * weight_c, mask=inside, other=0.0).to(tl.float32)
    added = -center * gain
    if has_bias == 1:
        added += tl.load(bias + c * bias_c, mask=inside, other=0.0).to(tl.float32)
    if has_scale == 1:
        factor = 1.0 + tl.load(scale + (b * scale_b + t * scale_t + c * scale_c), mask=inside, other=0.0).to(tl.float32)
        gain *= factor
        added *= factor
    if has_shift == 1:
        added += tl.load(shift + (b * shift_b + t * shift_t + c * shift_c), mask=inside, other=0.0).to(tl.float32)
    at = frame * channels + c
    tl.store(multiplier + at, gain, mask=inside)
    tl.store(offset + at, added, mask=inside)
# fmt: on


# The host's part: how the tensors lie, and what is launched over them.


def _cdiv(a: int, b: int) -> int:
    """That of Triton takes a microsecond or two on the host."""
    return -(-a // b)


Strides = tuple[int, int, int, int, int]


class Plan(NamedTuple):
    """One call's launches.

    Args:
        walk: whether the convolution is done by `_walk_kernel`.
        programs: of the convolution.
        splits: programs that share a tile's sum, or its frames.
        second: whether sums go to a second pass, which has `reducers` programs.
        rows: of the tiles that statistics are taken of.
        constants, options: what the convolution is compiled with.
        strides: of the pixels of x, of the residual or for want of one y, and of y.
    """

    walk: bool
    programs: int
    splits: int
    second: bool
    reducers: int
    rows: int
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    strides: tuple[Strides, Strides, Strides]

    def steps(self, strides: tuple[int, ...]) -> list[int]:
        """Strides as kernels take them: in vectors, where all but that of 1 are made of whole ones."""
        return [step // self.constants["VECTOR"] for step in strides]


def _plan(
    x: Tensor, weight: Tensor, residual: Tensor | None, y: Tensor, config: Config, normed: bool
) -> tuple[Tensor, Plan]:
    """The weight as it is to be read, and how the call is run."""
    recording, vector = traced(y), VECTOR_BYTES // x.element_size()
    clips = (x, y) if residual is None else (x, y, residual)
    strides = tuple(_pixel_strides(clip) for clip in clips)
    dense = all(_dense(clip, steps, vector, recording) for clip, steps in zip(clips, strides, strict=True))
    sides = (strides[0], strides[-1], strides[1])
    config = config if dense else STRIDED[x.element_size()]
    B, C_out, T, H, W = map(int, y.shape)
    c_in, taps = int(weight.shape[1]), int(weight.shape[2])
    pixels, steps = H * W, taps * _cdiv(c_in, config.block_k)
    tiles = _cdiv(pixels, config.block_m)
    splits = _splits(config, B * T * tiles, C_out, steps)
    # Tiles that go on from frame to frame need the second pass. A fused norm is one frame's, in all of a tile.
    span = dense and not normed and tiles * config.block_m > (SHARED_WASTE if splits > 1 else WASTE) * pixels
    newer = _hopper(y.device)
    walk = config.walk and newer
    only_in = normed or span or walk or config.block_n > SMALL_N
    layout, of_rows = "any", B * T * tiles
    if span:
        config, of_rows = _spanning(config), _cdiv(B * T * pixels, config.block_m)
        splits = _splits(config, of_rows, C_out, steps)
    if dense:
        weight, layout = _dense_weight(weight, vector, recording, only_in=only_in)
    if walk and dense and not span and taps == 3 and c_in <= 2 * WALK_K:
        return weight, _walk_plan(B, c_in, C_out, T, pixels, vector, sides)
    second = splits > 1 or span
    plan = Plan(
        walk=False,
        programs=of_rows * splits * _cdiv(C_out, config.block_n),
        splits=splits,
        second=second,
        reducers=B * T * _cdiv(pixels, REDUCE_M) * _cdiv(C_out, REDUCE_N),
        rows=REDUCE_M if second else config.block_m,
        constants=_constants(config, span, layout, vector if dense else 1),
        options=config.launch_options(_capped(span, normed, second, newer)),
        strides=sides,
    )
    return weight, plan


def _splits(config: Config, of_rows: int, c_out: int, steps: int) -> int:
    """The most programs for each tile that still run at once, two on a multiprocessor, each with steps of its own."""
    tiles = of_rows * _cdiv(c_out, config.block_n)
    return max(1, min(config.split_k, FEW_TILES // tiles, steps))


def _capped(span: bool, normed: bool, second: bool, newer: bool) -> bool:
    """Whether the cap on registers costs no stack: what is done beside the plain product takes some of its own.

    Of rows that span frames, a norm, and sums that are handed on, cards from sm_90 on afford one, older ones none.
    """
    return span + normed + second <= newer


@functools.cache
def _hopper(device: torch.device) -> bool:
    """Whether operands of products need no registers. Interpreted and traced calls are taken for such."""
    return device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= HOPPER


def _walk_plan(
    clips: int,
    c_in: int,
    c_out: int,
    num_frames: int,
    pixels: int,
    vector: int,
    strides: tuple[Strides, Strides, Strides],
) -> Plan:
    """Clips are cut into as many parts as it takes to fill a GPU, but not shorter ones than pay."""
    programs = clips * _cdiv(pixels, WALK_M) * _cdiv(c_out, WALK_N)
    parts = max(1, min(_cdiv(FEW_TILES, programs), num_frames // WALK_FRAMES))
    parts = _cdiv(num_frames, _cdiv(num_frames, parts))  # none is empty
    return Plan(
        walk=True,
        programs=programs * parts,
        splits=parts,
        second=False,
        reducers=0,
        rows=WALK_M,
        constants=_walk_constants(c_in > WALK_K, vector),
        options=WALK_OPTIONS,
        strides=strides,
    )


def _walk_constants(wide: bool, vector: int) -> dict[str, Any]:
    return {"WIDE": wide, "VECTOR": vector, "BLOCK_M": WALK_M, "BLOCK_N": WALK_N, "BLOCK_K": WALK_K}


def _spanning(config: Config) -> Config:
    return config._replace(block_n=min(config.block_n, SMALL_N))


def _constants(config: Config, span: bool, layout: str, vector: int) -> dict[str, Any]:
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return {"SPAN": span, "LAYOUT": layout, "VECTOR": vector, **tile}


def _reduce_constants(vector: int) -> dict[str, int]:
    return {"VECTOR": vector, "BLOCK_M": REDUCE_M, "BLOCK_N": REDUCE_N}


def _is_dense(clip: Tensor, vector: int, recording: bool) -> bool:
    """Whether channels are dense, frames have no gaps between rows, and all pixels begin at whole 16-byte vectors."""
    return _dense(clip, _pixel_strides(clip), vector, recording)


def _dense(clip: Tensor, strides: Strides, vector: int, recording: bool) -> bool:
    _, C, _, H, W = map(int, clip.shape)
    b, c, t, h, w = strides
    folded = H == 1 or W == 1 or h == W * w
    whole = all(step % vector == 0 for step in (C, b, t, w))
    return c == 1 and folded and whole and aligned(clip, VECTOR_BYTES, recording)


def _dense_weight(weight: Tensor, vector: int, recording: bool, only_in: bool) -> tuple[Tensor, str]:
    """The weight with an axis of channels in whole vectors, copied where it has none, and which axis that is."""
    w_out, w_in, w_tap = _weight_strides(weight)
    if aligned(weight, VECTOR_BYTES, recording) and w_tap % vector == 0:
        if w_in == 1 and w_out % vector == 0:
            return weight, "in"
        if w_out == 1 and w_in % vector == 0 and not only_in:
            return weight, "out"
    return weight.permute(2, 0, 1).clone(memory_format=torch.contiguous_format).permute(1, 2, 0), "in"


def _pixel_strides(clip: Tensor) -> Strides:
    """(b, c, t, h, w) of a clip; w is the step from pixel to pixel also where rows have one. 0 if there is no step."""
    b, c, t, h, w = (int(step) if n > 1 else 0 for n, step in zip(clip.shape, clip.stride(), strict=True))
    return b, c if clip.shape[1] > 1 else 1, t, h, w if clip.shape[4] > 1 else h


def _weight_strides(weight: Tensor) -> tuple[int, int, int]:
    w_out, w_in, w_tap = (int(step) if n > 1 else 0 for n, step in zip(weight.shape, weight.stride(), strict=True))
    return w_out, w_in if weight.shape[1] > 1 else 1, w_tap


def _affine(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A norm as multiplier and offset, each (B * T, C_in) in fp32."""
    B, C, T = map(int, x.shape[:3])
    parameters = (weight, bias, scale, shift)
    given = {each.dtype for each in parameters if each is not None}
    if len(given) > 1:
        parameters = tuple(None if each is None else each.float() for each in parameters)  # type: ignore[assignment]
    absent = mean if len(given) > 1 or mean.dtype in given else x
    multiplier, offset = torch.empty((2, B * T, C), dtype=torch.float32, device=x.device)
    scalars = (
        *(T, C, int(mean.shape[-1])),
        *(step for each in (mean, rstd) for step in _frame_strides(each)),
        *(_frame_strides(each)[2] for each in parameters[:2]),
        *(step for each in parameters[2:] for step in _frame_strides(each)),
        *(int(each is not None) for each in parameters),
    )
    tensors = (mean, rstd, *(absent if each is None else each for each in parameters), multiplier, offset)
    programs = B * T * _cdiv(C, AFFINE_TILE)
    launch(_affine_kernel, programs, multiplier, *tensors, *scalars, TILE=AFFINE_TILE, **PASS_OPTIONS)
    return multiplier, offset


# What ships: every compiled form that a launch can ask for.

DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}
NORMS = ("norm", "linear norm")  # with SiLU and without


def _conv_variant(
    dtype: str, config: Config, span: bool, layout: str, norm: str | None, second: bool, capped: bool
) -> Variant:
    dense, options = layout != "any", config.launch_options(capped)
    constants = _constants(config, span, layout, VECTOR_BYTES // DTYPES[dtype] if dense else 1)
    absent: dict[str, Any] = {} if second else {"partials": None}
    absent |= _norm_constants(norm)
    form = ["spanning" if span else "framed", *([norm] if norm else []), *(["sums"] if second else [])]
    limit = [f"r{options['maxnreg']}"] if "maxnreg" in options else []
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
    return Variant(
        " ".join([dtype, tile, *limit, *form]) + f", {layout}",
        "_conv_kernel",
        _signature(CONV_TENSORS, CONV_SCALARS, dtype, constants | absent),
        constants | absent,
        **options,
        wide_loads=2 if dense else 0,
        wgmma=dense and dtype != "fp32",
        least_arch=90 if limit and not _capped(span, norm is not None, second, newer=False) else 80,
    )


def _norm_constants(norm: str | None) -> dict[str, Any]:
    return {"NORM_SILU": norm != "linear norm", **({} if norm else {"multiplier": None, "offset": None})}


def _signature(
    tensors: tuple[str, ...], scalars: tuple[str, ...], dtype: str, constants: Mapping[str, Any]
) -> dict[str, str]:
    signature = {name: f"*{'fp32' if name in FP32_TENSORS else dtype}" for name in tensors}
    return signature | dict.fromkeys(scalars, "i32") | dict.fromkeys(constants, "constexpr")


FP32_TENSORS = ("multiplier", "offset", "partials", "bias_wide", "mean", "rstd", "m2")


def _conv_variants() -> Iterator[Variant]:
    for dtype in DTYPES:
        width = "single" if dtype == "fp32" else "half"
        for case, table in shipped(OP).items():
            for config in map(_config, table if case.startswith(width) else ()):
                for norm in NORMS if "-norm-" in case and config.fused_norm else (None,):
                    yield from _forms(dtype, config, norm)
        for norm in (None, *NORMS):
            yield _conv_variant(dtype, STRIDED[DTYPES[dtype]], False, "any", norm, second=False, capped=False)


def _forms(dtype: str, config: Config, norm: str | None) -> Iterator[Variant]:
    """What a configuration is compiled to for clips that lie dense: with and without sums to hand on, old and new."""
    layouts = ("in",) if norm or config.block_n > SMALL_N else ("in", "out")
    for second, layout in product((False, True) if config.split_k > 1 else (False,), layouts):
        for capped in {_capped(False, norm is not None, second, newer) for newer in (False, True)}:
            yield _conv_variant(dtype, config, False, layout, norm, second, capped)
    if norm is None:
        yield _conv_variant(dtype, _spanning(config), True, "in", norm, second=True, capped=False)


def _walk_variant(dtype: str, wide: bool, norm: str | None) -> Variant:
    constants = _walk_constants(wide, VECTOR_BYTES // DTYPES[dtype])
    absent = _norm_constants(norm)
    return Variant(
        f"{dtype} {2 * WALK_K if wide else WALK_K} channels{f' {norm}' if norm else ''}",
        "_walk_kernel",
        _signature(WALK_TENSORS, CONV_SCALARS, dtype, constants | absent),
        constants | absent,
        **WALK_OPTIONS,
        wide_loads=2,
        wgmma=True,
        least_arch=HOPPER[0] * 10,
    )


def _walk_variants() -> Iterator[Variant]:
    tables = shipped(OP).items()
    walked = {"-norm-" in case and config["fused_norm"] for case, table in tables for config in table if config["walk"]}
    for wide, norm in product((False, True), (None, *NORMS)):
        if (norm is not None) in walked:
            yield from (_walk_variant(dtype, wide, norm) for dtype in ("fp16", "bf16"))


def _reduce_variant(dtype: str) -> Variant:
    constants = _reduce_constants(VECTOR_BYTES // DTYPES[dtype])
    signature = _signature(REDUCE_TENSORS, REDUCE_SCALARS, dtype, constants)
    return Variant(f"{dtype} second pass", "_reduce_kernel", signature, constants, 4, 1, wide_loads=2)


def _affine_variant(dtype: str) -> Variant:
    constants = {"TILE": AFFINE_TILE}
    signature = _signature(AFFINE_TENSORS, AFFINE_SCALARS, dtype, constants)
    return Variant(f"{dtype} parameters", "_affine_kernel", signature, constants, 4, 1)


VARIANTS = (
    *{variant.name: variant for variant in _conv_variants()}.values(),
    *map(_reduce_variant, DTYPES),
    *map(_affine_variant, DTYPES),
    *_walk_variants(),
)


def _candidates(case: str) -> tuple[dict[str, Any], ...]:
    """What is worth a try for a case, the default left aside."""
    width, channels, taps, form, amount = case.split("-")
    tiles: tuple[tuple[int, ...], ...]  # block_m, block_n, block_k, num_warps, num_stages
    if width == "single":
        tiles = ((64, 64, 32, 4, 2), (64, 64, 32, 4, 4), (128, 64, 32, 4, 3), (128, 64, 32, 8, 3), (128, 128, 32, 8, 3))
    elif channels == "c64":
        tiles = ((128, 64, 64, 4, 2), (128, 64, 32, 4, 4), (128, 64, 64, 8, 3), (256, 64, 64, 8, 3), (64, 64, 64, 4, 3))
    elif channels == "c128":
        tiles = ((128, 128, 64, 4, 3), (128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (256, 128, 64, 8, 3))
    else:
        tiles = ((128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4))
    splits = (1, 2, 3, 4, 6) if channels in ("c256", "wide") and amount == "few" else (1,)
    found = [Config(m, n, k, split_k, warps, stages) for (m, n, k, warps, stages), split_k in product(tiles, splits)]
    if width == "half":
        found += [each._replace(maxnreg=128) for each in found if each[:3] == (128, 128, 64) and each.num_warps == 8]
    if width == "half" and taps == "kn" and channels in ("c64", "c128"):
        found.append(found[0]._replace(walk=True))
    if form == "norm":
        return tuple(each._replace(fused_norm=fused)._asdict() for each in found for fused in (False, True))
    return tuple({name: value for name, value in each._asdict().items() if name != "fused_norm"} for each in found)


CANDIDATES = {case: _candidates(case) for case in cases(OP)}
"""Configurations by case, for a search on a GPU."""
