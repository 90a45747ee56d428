"""The gradients of temporal_conv, `y = act(z) + residual` with `z[t] = sum_j W_j h[t + j - k//2] + bias`.

From the end to the beginning, each step only where a gradient that is wanted passes through it:

    g_y    = dy + slope * y + offset            y's statistics may have gradients too; these are linear in y
    g_z    = g_y * act'(z)                      z is computed again; over the pixels g_z sums to the gradient of bias
    g_W_j  = sum_t g_z[t]^T h[t + j - k//2]     a product over all pixels, in splits whose sums are added in order
    g_h[t] = sum_j W_j^T g_z[t - j + k//2]      the forward kernel, its taps turned round and its channels swapped

and from g_h, where `h` is a norm of x, `normalize_backward`. `h`, `z`, `g_y`, `g_z` and `g_h` are kept in the dtype of
x, as operands of products must be; every sum is in fp32 and in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, launch, traced
from .group_norm import _before_silu, _silu, normalize, normalize_backward
from .temporal_conv import VECTOR_BYTES, _is_dense, _pixel_strides, temporal_conv

Gradients = tuple[Tensor | None, ...]
Norm = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

MULTIPROCESSORS = 132  # that splits are to fill: fixed, so that a result does not depend on the card
FEWEST_STEPS = 8  # of a split, where there are as many


def temporal_conv_backward(
    gradients: Sequence[Tensor | None],
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
) -> Gradients:
    """The gradient of each argument of `temporal_conv_reference`, None for those that want none.

    Args:
        gradients: of y (B, C_out, T, H, W) and, with `stats_groups`, of mean and rstd (B, T, stats_groups); None for 0.
        others: as for `temporal_conv_reference`, fp16, bf16 or fp32, any strides. Those whose gradient is wanted have
            `requires_grad`.

    Returns:
        14 gradients, each in the shape and dtype of its argument; the same bits in every run.
    """
    rest = (norm_weight, norm_bias, norm_scale, norm_shift)
    norm = None if norm_mean is None or norm_rstd is None else (norm_mean, norm_rstd, *rest)
    arguments = (x, weight, bias, padding_mode, act, residual, stats_groups, norm_mean, norm_rstd, *rest, norm_act)
    wanted = tuple(isinstance(value, Tensor) and value.requires_grad for value in arguments)
    with torch.no_grad():
        if x.numel() == 0:
            pairs = zip(arguments, wanted, strict=True)
            return tuple(torch.zeros_like(value) if want else None for value, want in pairs)  # type: ignore[arg-type]
        layer = Layer(x, norm, norm_act, weight, bias, padding_mode, act, residual, stats_groups)
        return _backward(layer, gradients, wanted)


class Layer(NamedTuple):
    """The arguments of a call."""

    x: Tensor
    norm: Norm | None
    norm_act: str | None
    weight: Tensor
    bias: Tensor | None
    padding_mode: str
    act: str | None
    residual: Tensor | None
    stats_groups: int | None


def _backward(layer: Layer, gradients: Sequence[Tensor | None], wanted: Sequence[bool]) -> Gradients:
    x, weight = layer.x, layer.weight
    want_x, want_weight, want_bias, _, _, want_residual, _, *want_norm, _ = wanted
    of_h = want_x or any(want_norm)
    of_stats = layer.stats_groups is not None and any(gradient is not None for gradient in gradients[1:])
    silu = layer.act is not None and (of_h or want_weight or want_bias)
    h = x
    if layer.norm is not None and (want_weight or silu or of_stats):
        h = _rows(x, x.shape[1])
        normalize(x, *layer.norm, layer.norm_act, out=h)
    g_y, g_z, g_bias = _through_epilogue(layer, h, gradients, silu, of_stats, want_bias)
    g_weight = _weight_gradient(g_z, h, weight, layer.padding_mode) if want_weight else None
    g_x: Tensor | None = None
    g_norm: Gradients = (None,) * 6
    if of_h:
        g_h = torch.empty_like(x) if layer.norm is None else _rows(x, x.shape[1])
        _input_gradient(g_z, weight, layer.padding_mode, out=g_h)
        if layer.norm is None:
            g_x = g_h
        else:
            g_x, *rest = normalize_backward(g_h, x, *layer.norm, layer.norm_act, (want_x, *want_norm))
            g_norm = tuple(rest)
    return g_x, g_weight, g_bias, None, None, g_y if want_residual else None, None, *g_norm, None


def _rows(x: Tensor, channels: int) -> Tensor:
    """Room for an activation of as many frames as x has, in channels_last_3d memory."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding_mode: str = "zeros",
    act: str | None = None,
    residual: Tensor | None = None,
    stats_groups: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward kernel without a norm: (y, mean, rstd)."""
    y = _rows(x, weight.shape[0]) if out is None else out
    shape = (0,) if stats_groups is None else (x.shape[0], x.shape[2], stats_groups)
    mean, rstd = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    temporal_conv(x, weight, bias, padding_mode, act, residual, stats_groups, *[None] * 7, out=(y, mean, rstd))
    return y, mean, rstd


# How activations lie in memory, for kernels that walk the pixels of a frame in tiles.


def _vector(*clips: Tensor) -> int:
    """Elements of a 16-byte vector where every access to these activations can be one; else 1."""
    vector = VECTOR_BYTES // clips[0].element_size()
    recording = traced(clips[0])
    return vector if all([_is_dense(clip, vector, recording) for clip in clips]) else 1


@triton.jit
def _places(frame, first, lane, column, width, step_c, step_h, step_w, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to the channels `column` of a frame's pixels `first + lane`; `frame` is where both begin."""
    if VECTOR > 1:
        frame = tl.multiple_of(frame + first * step_w, 16)
        row = tl.multiple_of(lane.to(tl.int64) * step_w, VECTOR)
        return frame + row[:, None] + column.to(tl.int64)[None, :]
    within = (first % width).to(tl.int32) + lane
    row = (first // width + within // width) * step_h + (within % width).to(tl.int64) * step_w
    return frame + row[:, None] + (column.to(tl.int64) * step_c)[None, :]


# Back through statistics, residual and SiLU.


def _through_epilogue(
    layer: Layer, h: Tensor, gradients: Sequence[Tensor | None], silu: bool, of_stats: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of a residual, of z, and of bias if wanted."""
    *_, weight, bias, padding_mode, act, residual, groups = layer
    dy = gradients[0]
    if dy is None:
        B, _, T, H, W = h.shape
        dy = torch.zeros((), dtype=h.dtype, device=h.device).expand(B, weight.shape[0], T, H, W)
    values, linear, added = None, None, None
    if of_stats:
        values, mean, rstd = _convolve(h, weight, bias, padding_mode, act, residual, groups)
        linear = _through_statistics(values, mean, rstd, *gradients[1:])
    if silu:
        # Where statistics have gradients, it is convolved twice: of an inflation block no convolution has both.
        values, *_ = _convolve(h, weight, bias, padding_mode)
        added = residual if of_stats else None
    if values is None and not want_bias:
        return dy, dy, None
    g_y, g_z, sums = _pointwise(dy, values, added, silu, linear)
    if bias is None or not want_bias:
        return g_y, g_z, None
    frames = sums.sum(1)
    g_bias = frames if bias.dim() == 3 else frames.sum(0)
    return g_y, g_z, g_bias.reshape(bias.shape).to(bias.dtype)


def _through_statistics(y: Tensor, mean: Tensor, rstd: Tensor, g_mean: Tensor | None, g_rstd: Tensor | None) -> Tensor:
    """(2, B, T, C): the gradient that reaches y through its statistics is `y * first + second`."""
    repeats = y.shape[1] // mean.shape[2]
    size = repeats * y.shape[3] * y.shape[4]
    slope = torch.zeros_like(rstd) if g_rstd is None else g_rstd * rstd**3 / -size
    offset = -slope * mean if g_mean is None else g_mean / size - slope * mean
    return torch.stack((slope, offset)).repeat_interleave(repeats, dim=-1)


def _pointwise(
    dy: Tensor, values: Tensor | None, residual: Tensor | None, silu: bool, linear: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y (what a residual gets) and of z, and the sums of this over tiles of pixels (B*T, tiles, C).

    Args:
        values: z with `silu`; else y, or None where no statistics have gradients.
        residual: what makes y of silu(z), where statistics have gradients.
        linear: from `_through_statistics`.
    """
    B, C, T, H, W = map(int, dy.shape)
    tiles = triton.cdiv(H * W, POINTWISE_PIXELS)
    sums = torch.empty((B * T, tiles, C), dtype=torch.float32, device=dy.device)
    g_z = dy if values is None else _rows(dy, C)
    g_y = g_z if not silu else dy if residual is None else _rows(dy, C)
    vector = _vector(*[clip for clip in (dy, values, residual, g_z) if clip is not None])
    own = _pixel_strides(g_z if values is None else values)
    launch(
        _pointwise_kernel,
        B * T * tiles * triton.cdiv(C, POINTWISE_CHANNELS),
        sums,
        *(dy, values, residual, linear),
        *(None if g_z is dy else g_z, None if g_y is dy or g_y is g_z else g_y, sums),
        *(B * T, C, T, W, H * W, tiles),
        *_pixel_strides(dy),
        *_pixel_strides(dy if residual is None else residual),
        *own,
        SILU=silu,
        PIXELS=POINTWISE_PIXELS,
        CHANNELS=POINTWISE_CHANNELS,
        VECTOR=vector,
        num_warps=POINTWISE_WARPS if vector > 1 else 2 * POINTWISE_WARPS,
        num_stages=1,
    )
    return g_y, g_z, sums


POINTWISE_PIXELS, POINTWISE_CHANNELS, POINTWISE_WARPS = 64, 64, 4
POINTWISE_TENSORS = ("dy", "values", "residual", "linear", "g_z", "g_y", "sums")
POINTWISE_SCALARS = (
    *("frames", "channels", "T", "width", "pixels", "tiles"),
    *(f"{clip}_{axis}" for clip in ("dy", "residual", "own") for axis in "bcthw"),
)


# fmt: off
@triton.jit(do_not_specialize=[*POINTWISE_TENSORS, *POINTWISE_SCALARS])
def _pointwise_kernel(  # type: ignore[no-untyped-def]
    dy, values, residual, linear, g_z, g_y, sums,
    frames, channels, T, width, pixels, tiles,
    dy_b, dy_c, dy_t, dy_h, dy_w,  # strides
    residual_b, residual_c, residual_t, residual_h, residual_w,
    own_b, own_c, own_t, own_h, own_w,  # of values, g_z and g_y
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
):
    """A tile of pixels and channels of one frame."""
    WORD: tl.constexpr = 16 if VECTOR > 1 else 4
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS)
    c = (program % blocks).to(tl.int64) * CHANNELS
    program = program // blocks
    tile = (program % tiles).to(tl.int64)
    frame = (program // tiles).to(tl.int64)
    b, t = frame // T, frame % T
    first = tile * PIXELS
    lane = tl.arange(0, PIXELS)
    column = tl.arange(0, CHANNELS)
    here = column < tl.multiple_of(channels - c, VECTOR)
    inside = (lane < pixels - first)[:, None] & here[None, :]
    source = dy + (b * dy_b + t * dy_t + c * dy_c)
    source = _places(source, first, lane, column, width, dy_c, dy_h, dy_w, VECTOR)
    own = b * own_b + t * own_t + c * own_c

    gradient = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if values is not None:
        place = _places(values + own, first, lane, column, width, own_c, own_h, own_w, VECTOR)
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        z = value
        if SILU:
            value = _silu(z)
        if linear is not None:
            if residual is not None:
                place = residual + (b * residual_b + t * residual_t + c * residual_c)
                place = _places(place, first, lane, column, width, residual_c, residual_h, residual_w, VECTOR)
                value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            of_frame = linear + (frame * channels + c)
            slopes = tl.multiple_of(of_frame, WORD) + column.to(tl.int64)
            offsets = tl.multiple_of(of_frame + tl.cast(frames, tl.int64) * channels, WORD) + column.to(tl.int64)
            slope = tl.load(slopes, mask=here, other=0.0)
            offset = tl.load(offsets, mask=here, other=0.0)
            gradient += value * slope[None, :] + offset[None, :]
            if g_y is not None:
                place = _places(g_y + own, first, lane, column, width, own_c, own_h, own_w, VECTOR)
                tl.store(place, gradient.to(g_y.dtype.element_ty), mask=inside)
        if SILU:
            gradient = _before_silu(z, gradient)
        place = _places(g_z + own, first, lane, column, width, own_c, own_h, own_w, VECTOR)
        tl.store(place, gradient.to(g_z.dtype.element_ty), mask=inside)
    gradient = tl.where(inside, gradient, 0.0)
    target = sums + ((frame * tiles + tile) * channels + c) + column.to(tl.int64)
    tl.store(target, tl.sum(gradient, axis=0), mask=here)
# fmt: on


# The gradient of the input.


def _input_gradient(g_z: Tensor, weight: Tensor, padding_mode: str, out: Tensor) -> None:
    """The convolution of g_z with the taps in the other order; replicated frames give theirs to the one they copy."""
    pad, last = weight.shape[2] // 2, g_z.shape[2] - 1
    turned = torch.stack(weight.transpose(0, 1).unbind(2)[::-1])  # in memory as the forward kernel reads it best
    _convolve(g_z, turned.permute(1, 2, 0), out=out)
    if padding_mode == "replicate":
        for distance in range(min(pad, last + 1)):
            _add_frame(g_z, distance, turned[pad + 1 + distance :], out[:, :, :1])
            _add_frame(g_z, last - distance, turned[: pad - distance], out[:, :, last:])


def _add_frame(g_z: Tensor, t: int, taps: Tensor, out: Tensor) -> None:
    """Add to a frame what frame t of g_z gives it through the sum of some taps (n, C_in, C_out)."""
    # In place: each element of the result is read, as the residual, by the program that writes it.
    _convolve(g_z[:, :, t : t + 1], taps.sum(0)[..., None], residual=out, out=out)


# The gradient of the weights.


class Tile(NamedTuple):
    """How the product is cut: output channels by input channels of one tap, summed over so many pixels in a step.

    Args:
        resident: blocks that are meant to run on a multiprocessor at once.
    """

    out: int
    into: int
    pixels: int
    num_warps: int
    num_stages: int
    resident: int


NARROW = Tile(64, 64, 64, 4, 3, 4)
MIDDLE = Tile(128, 128, 64, 8, 3, 2)
WIDE = Tile(128, 256, 64, 8, 3, 1)
FULL = Tile(64, 64, 32, 4, 2, 2)  # fp32
SLOW = Tile(64, 64, 32, 8, 1, 2)  # element by element


def _tile(C_out: int, C_in: int, dtype: torch.dtype, vector: int) -> Tile:
    if vector == 1 or dtype == torch.float32:
        return SLOW if vector == 1 else FULL
    if min(C_out, C_in) <= NARROW.out:
        return NARROW
    return WIDE if C_in % WIDE.into == 0 else MIDDLE


def _weight_gradient(g_z: Tensor, h: Tensor, weight: Tensor, padding_mode: str) -> Tensor:
    C_out, C_in, taps = map(int, weight.shape)
    B, _, T, H, W = map(int, h.shape)
    vector = _vector(g_z, h)
    tile = _tile(C_out, C_in, h.dtype, vector)
    blocks = taps * triton.cdiv(C_out, tile.out) * triton.cdiv(C_in, tile.into)
    splits = _splits(blocks, B * T * triton.cdiv(H * W, tile.pixels), tile.resident)
    partials = torch.empty((splits, taps, C_out, C_in), dtype=torch.float32, device=h.device)
    launch(
        _weight_kernel,
        blocks * splits,
        partials,
        *(g_z, h, partials),
        *(C_out, C_in, taps, B, T, W, H * W, splits, int(padding_mode == "replicate")),
        *_pixel_strides(g_z),
        *_pixel_strides(h),
        OUT=tile.out,
        INTO=tile.into,
        PIXELS=tile.pixels,
        VECTOR=vector,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return partials.sum(0).permute(1, 2, 0).to(weight.dtype)


def _splits(blocks: int, steps: int, resident: int) -> int:
    """The fewest with which nine tenths of the card are busy to the end; at least FEWEST_STEPS in each, if possible."""
    slots = MULTIPROCESSORS * resident
    most = max(1, min(steps // FEWEST_STEPS, 2 * slots // blocks))

    def busy(splits: int) -> float:
        programs = blocks * splits
        return programs / (triton.cdiv(programs, slots) * slots)

    return next((n for n in range(1, most + 1) if busy(n) >= 0.9), max(range(1, most + 1), key=busy))


WEIGHT_TENSORS = ("g_z", "h", "partials")
WEIGHT_SCALARS = (
    *("channels_out", "channels_in", "taps", "clips", "T", "width", "pixels", "splits", "replicate"),
    *(f"{clip}_{axis}" for clip in ("g", "h") for axis in "bcthw"),
)


# fmt: off
@triton.jit(do_not_specialize=[*WEIGHT_TENSORS, *WEIGHT_SCALARS])
def _weight_kernel(  # type: ignore[no-untyped-def]
    g_z, h, partials,
    channels_out, channels_in, taps, clips, T, width, pixels, splits,
    replicate,  # whether frames outside the clip are its first and last; else they are not visited
    g_b, g_c, g_t, g_h, g_w, h_b, h_c, h_t, h_h, h_w,  # strides
    OUT: tl.constexpr, INTO: tl.constexpr, PIXELS: tl.constexpr, VECTOR: tl.constexpr,
):
    """A tile of one tap's gradient from a part of the pixels; each step takes its pixels from one frame."""
    program = tl.program_id(0)
    tap = program % taps  # the taps of a tile run side by side, since they read the same pixels
    program = program // taps
    blocks_in = tl.cdiv(channels_in, INTO)
    c_in = (program % blocks_in).to(tl.int64) * INTO
    program = program // blocks_in
    blocks_out = tl.cdiv(channels_out, OUT)
    c_out = (program % blocks_out).to(tl.int64) * OUT
    split = program // blocks_out

    shift = tap - taps // 2
    first_t = tl.where(replicate != 0, 0, tl.maximum(-shift, 0))
    met = tl.where(replicate != 0, T, T - tl.abs(shift))  # frames that this tap meets others in
    count_t = tl.maximum(met, 1)  # never divide by 0, also where loads are issued ahead of a loop without steps
    tiles = tl.cdiv(pixels, PIXELS)
    steps = tl.where(met > 0, clips * count_t * tiles, 0)
    each = tl.cdiv(steps, splits)

    lane = tl.arange(0, PIXELS)
    row = tl.arange(0, OUT)
    column = tl.arange(0, INTO)
    here_out = row < tl.multiple_of(channels_out - c_out, VECTOR)
    here_in = column < tl.multiple_of(channels_in - c_in, VECTOR)
    total = tl.zeros((OUT, INTO), tl.float32)
    for step in range(split * each, tl.minimum(split * each + each, steps)):
        tile = step % tiles
        frame = step // tiles
        b = (frame // count_t).to(tl.int64)
        t = first_t + frame % count_t
        source_t = tl.minimum(tl.maximum(t + shift, 0), T - 1).to(tl.int64)
        first = tile.to(tl.int64) * PIXELS
        inside = (lane < pixels - tile * PIXELS)[:, None]
        place = g_z + (b * g_b + t.to(tl.int64) * g_t + c_out * g_c)
        place = _places(place, first, lane, row, width, g_c, g_h, g_w, VECTOR)
        gradient = tl.load(place, mask=inside & here_out[None, :], other=0.0)
        place = h + (b * h_b + source_t * h_t + c_in * h_c)
        place = _places(place, first, lane, column, width, h_c, h_h, h_w, VECTOR)
        source = tl.load(place, mask=inside & here_in[None, :], other=0.0)
        total = tl.dot(tl.trans(gradient), source, total, input_precision="tf32x3")
    target = partials + (((split.to(tl.int64) * taps + tap) * channels_out + c_out) * channels_in + c_in)
    steps_out = tl.multiple_of(row.to(tl.int64) * channels_in, VECTOR)
    target = tl.multiple_of(target, 16 if VECTOR > 1 else 4) + steps_out[:, None] + column.to(tl.int64)[None, :]
    tl.store(target, total, mask=here_out[:, None] & here_in[None, :])
# fmt: on


# What ships: every compiled form that a launch can ask for.

DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}
POINTWISE_FORMS = {
    "sums": ("values", "residual", "linear", "g_z", "g_y"),  # by the tensors it goes without
    "SiLU": ("residual", "linear", "g_y"),
    "statistics": ("residual", "g_y"),
    "SiLU, statistics": ("residual", "g_y"),
    "SiLU, residual, statistics": (),
}


def _pointwise_variant(dtype: str, form: str, dense: bool) -> Variant:
    absent = dict.fromkeys(POINTWISE_FORMS[form])
    kinds = {name: f"*{dtype}" for name in POINTWISE_TENSORS} | {"linear": "*fp32", "sums": "*fp32"}
    vector = VECTOR_BYTES // DTYPES[dtype] if dense else 1
    constants = {"SILU": "SiLU" in form, "PIXELS": POINTWISE_PIXELS, "CHANNELS": POINTWISE_CHANNELS, "VECTOR": vector}
    signature = kinds | dict.fromkeys(POINTWISE_SCALARS, "i32") | dict.fromkeys([*constants, *absent], "constexpr")
    clips = len({"dy", "values", "residual"} - set(absent))
    vectors = clips * POINTWISE_PIXELS * POINTWISE_CHANNELS // (32 * POINTWISE_WARPS * vector)
    name = f"{dtype} {form}, {'dense' if dense else 'strided'}"
    warps = POINTWISE_WARPS if dense else 2 * POINTWISE_WARPS
    return Variant(name, "_pointwise_kernel", signature, constants | absent, warps, 1, vectors * dense)


def _weight_variant(dtype: str, tile: Tile) -> Variant:
    vector = 1 if tile is SLOW else VECTOR_BYTES // DTYPES[dtype]
    constants = {"OUT": tile.out, "INTO": tile.into, "PIXELS": tile.pixels, "VECTOR": vector}
    signature = {"g_z": f"*{dtype}", "h": f"*{dtype}", "partials": "*fp32"}
    signature |= dict.fromkeys(WEIGHT_SCALARS, "i32") | dict.fromkeys(constants, "constexpr")
    name = f"{dtype} weights, {tile.out}x{tile.into}, {'strided' if tile is SLOW else 'dense'}"
    vectors = tile.pixels * (tile.out + tile.into) // (32 * tile.num_warps * vector) if vector > 1 else 0
    options = (tile.num_warps, tile.num_stages)
    return Variant(name, "_weight_kernel", signature, constants, *options, vectors, wgmma=dtype != "fp32")


VARIANTS = (
    *(_pointwise_variant(dtype, form, dense) for dtype, form, dense in product(DTYPES, POINTWISE_FORMS, (True, False))),
    *(_weight_variant(dtype, tile) for dtype, tile in product(("fp16", "bf16"), (NARROW, MIDDLE, WIDE, SLOW))),
    *(_weight_variant("fp32", tile) for tile in (FULL, SLOW)),
)
