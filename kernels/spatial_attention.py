"""spatial_attention as flash attention: scores of a tile of pixels and a tile of keys never leave the processor.

A program has a tile of pixels of one frame and head, and streams over the keys with a running maximum and sum of each
row (online softmax). Full tiles of keys are computed without a mask; what is left of the keys, or all of them where
text is masked, goes through a second loop of the same code with one. Programs that run side by side have the same frame
and head, whose keys and values are then in L2.

The keys of a text mostly fit one tile. Then they stay where they are: a program loads them once and walks over tiles of
the clip's pixels, so that the op reads q, writes y, and little else. There all heads of the same pixels run side by
side, because their rows are neighbours in memory.

Heads of 80 or 96 channels are computed as 64 and the rest and not padded to 128: up to three eighths less arithmetic.

All this is for fp16 and bf16 whose heads lie in whole 16-byte vectors, under a positive scale. The rest, fp32 and any
strides, is for one plain kernel that takes channels a few at a time, for want of registers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import cases, chosen, shipped
from ._launch import Variant, aligned, launch, traced

OP = "spatial_attention"
VECTOR_BYTES = 16
# By class, the two blocks in which the channels of a head are computed; the widest head has as many as both.
HEADS = {"d32": (32, 0), "d64": (64, 0), "d80": (64, 16), "d96": (64, 32), "d128": (128, 0)}
TEXT_KEYS = 128  # that stay where they are, at most
FEW_TILES = 264  # of TILE pixels: two for each multiprocessor of the cards aimed at
TILE = 128
MOST_REGISTERS = 255  # that a thread can have
HOPPER = (9, 0)


class Config(NamedTuple):
    """How a case is run.

    Args:
        block_m, block_n: pixels and keys of a tile; keys that stay where they are are one of TEXT_KEYS.
        maxnreg: the most registers of a thread, from sm_90 on; MOST_REGISTERS for no cap.
    """

    block_m: int
    num_warps: int
    num_stages: int
    maxnreg: int
    block_n: int = TEXT_KEYS

    def launch_options(self) -> dict[str, Any]:
        cap = {"maxnreg": self.maxnreg} if self.maxnreg < MOST_REGISTERS else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **cap}


def _config(fields: Mapping[str, int]) -> Config:
    return Config(**fields)


# Of the plain kernel, for vectors and for any strides, whose elements have their addresses in registers each.
PLAIN_TILES = {
    True: {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 32},
    False: {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_D": 16},
}
PLAIN_OPTIONS: dict[bool, dict[str, Any]] = {
    True: {"num_warps": 4, "num_stages": 2},
    False: {"num_warps": 4, "num_stages": 1},
}
OLDER_N = 64  # keys of a tile that leave registers for the operands of products, before sm_90
WALKS = 2112  # of the text kernel: walks are as long as leaves that many, some rounds of what runs at once
LONGEST_WALK = 16  # tiles
MASK_BLOCK: tl.constexpr = tl.constexpr(1024)  # keys whose mask is looked through at once


def spatial_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None, *, out: Tensor
) -> None:
    """Write what `spatial_attention_reference` returns into `out`. fp16, bf16 or fp32; any strides, any D.

    Fast are fp16 and bf16 of up to 128 channels a head, and views such as those of a fused projection: channels dense,
    no gaps between the rows of a frame, all heads at multiples of 16 bytes. Keys that `key_mask` leaves out are not
    read.

    Raises:
        ValueError: a result that a grid cannot hold (2^31 tiles), or a table of configurations that is damaged.
    """
    if out.numel() == 0:
        return
    gain = (int(q.shape[5]) ** -0.5 if scale is None else scale) * math.log2(math.e)
    plan = _planned(q, k, v, out, key_mask is not None, gain > 0)
    if key_mask is None:
        key_mask = q.new_empty((1, 1), dtype=torch.bool)  # stands in, and is never read
    scalars = (gain, *plan.scalars, *map(int, key_mask.stride()))
    launch(plan.kernel, plan.programs, out, q, k, v, key_mask, out, *scalars, **plan.constants, **plan.options)


def case_of(D: int, sequences: int, pixels: int, text_keys: int | None) -> str:
    """The name under which the configuration of a call that takes vectors is found.

    Args:
        sequences: of `pixels` queries each: frames times heads, or clips times heads before a text.
        text_keys: L of cross-attention; None for self-attention.
    """
    channels = next(name for name, blocks in HEADS.items() if sum(blocks) >= D)
    if text_keys is not None and text_keys <= TEXT_KEYS:
        return f"{channels}-text"
    few = 2 * pixels <= TILE or sequences * _cdiv(pixels, TILE) < FEW_TILES
    return f"{channels}-{'few' if few else 'many'}"


# fmt: off
@triton.jit
def _block(source, row, inside, columns, step, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of rows, zero where a row is not `inside`, unless that is None, and beyond the `columns` there are."""
    d = tl.arange(0, COLUMNS)
    taken = (d < columns)[None, :]
    if inside is not None:
        taken = taken & inside[:, None]
    return tl.load(source + ((row.to(tl.int64) * step * VECTOR)[:, None] + d[None, :]), mask=taken, other=0.0)


@triton.jit
def _blocks(  # type: ignore[no-untyped-def]
    source, row, inside, columns, columns_rest, step,
    BLOCK_D: tl.constexpr, REST_D: tl.constexpr, VECTOR: tl.constexpr,
):
    """Both blocks of a tile's channels; where there is no second, the first stands in."""
    block = _block(source, row, inside, columns, step, BLOCK_D, VECTOR)
    rest = block
    if REST_D > 0:
        rest = _block(tl.multiple_of(source + BLOCK_D, 16), row, inside, columns_rest, step, REST_D, VECTOR)
    return block, rest


@triton.jit
def _store(target, row, inside, columns, step, z, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, z.shape[1])
    at = (row.to(tl.int64) * step * VECTOR)[:, None] + d[None, :]
    tl.store(target + at, z.to(target.dtype.element_ty), inside[:, None] & (d < columns)[None, :])


@triton.jit
def _scores(q, q_rest, k, k_rest, REST_D: tl.constexpr):  # type: ignore[no-untyped-def]
    s = tl.dot(q, tl.trans(k))
    if REST_D > 0:
        s = tl.dot(q_rest, tl.trans(k_rest), s)
    return s


@triton.jit
def _weights(s, gain, top):  # type: ignore[no-untyped-def]
    """Scores as weights that are 1 at each row's largest score so far, which is `top` before; and that, after.

    The last of all is what was taken off: 0 where no key was left so far, whose scores are all -inf.
    """
    risen = tl.maximum(top, tl.max(s, 1) * gain)
    held = tl.where(risen == float("-inf"), 0.0, risen)
    return tl.exp2(s * gain - held[:, None]), risen, held


@triton.jit
def _shares(total):  # type: ignore[no-untyped-def]
    """What sums of weighted values are multiplied by; they are 0 where no key was left."""
    return (1.0 / tl.where(total == 0, 1.0, total))[:, None]


@triton.jit
def _left(key_mask, mask_l, key, keys, has_mask):  # type: ignore[no-untyped-def]
    """Which of these keys there are and the mask leaves."""
    there = key < keys
    return there & tl.load(key_mask + key.to(tl.int64) * mask_l, mask=there & (has_mask == 1), other=True)


@triton.jit
def _after_last(key_mask, mask_l, keys):  # type: ignore[no-untyped-def]
    """How many keys there are up to the last one that the mask leaves."""
    last = 0
    for first in tl.range(0, keys, MASK_BLOCK):
        key = first + tl.arange(0, MASK_BLOCK)
        last = tl.maximum(last, tl.max(tl.where(_left(key_mask, mask_l, key, keys, 1), key + 1, 0), 0))
    return last


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, q_rest, z, z_rest, total, top, k, v, key_mask, first, keys, has_mask, mask_l, gain, columns, columns_rest,
    k_w, v_w, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, VECTOR: tl.constexpr,
):
    """Add the keys of a tile to the sums of values and of weights, which are scaled as the top of their row rises."""
    lane = tl.arange(0, BLOCK_N)
    first = tl.cast(first, tl.int64)
    inside = None
    if MASKED:
        inside = _left(key_mask, mask_l, first + lane, keys, has_mask)
    k_from = tl.multiple_of(k + first * k_w * VECTOR, 16)
    key, key_rest = _blocks(k_from, lane, inside, columns, columns_rest, k_w, BLOCK_D, REST_D, VECTOR)
    s = _scores(q, q_rest, key, key_rest, REST_D)
    if MASKED:
        s = tl.where(inside[None, :], s, float("-inf"))  # type: ignore[index]
    p, risen, held = _weights(s, gain, top)
    fade = tl.exp2(top - held)
    weights = p.to(q.dtype)
    v_from = tl.multiple_of(v + first * v_w * VECTOR, 16)
    value, value_rest = _blocks(v_from, lane, inside, columns, columns_rest, v_w, BLOCK_D, REST_D, VECTOR)
    z = tl.dot(weights, value, z * fade[:, None])
    if REST_D > 0:
        z_rest = tl.dot(weights, value_rest, z_rest * fade[:, None])
    return z, z_rest, total * fade + tl.sum(p, 1), risen


TENSORS = ("q", "k", "v", "key_mask", "y")
SCALARS = (
    *("gain", "frames", "heads", "pixels", "keys", "channels", "has_mask", "width", "key_width", "walk"),
    *(f"{tensor}_{axis}" for tensor in ("q", "k", "v", "y") for axis in ("b", "t", "h", "w", "head", "d")),
    *("mask_b", "mask_l"),
)


@triton.jit(do_not_specialize=[*TENSORS, *SCALARS])
def _flash_kernel(  # type: ignore[no-untyped-def]
    q, k, v,
    key_mask,  # (clips, keys), where has_mask is 1
    y, gain, frames, heads, pixels, keys, channels, has_mask, width, key_width, walk,
    q_b, q_t, q_h, q_w, q_head, q_d, k_b, k_t, k_h, k_w, k_head, k_d,
    v_b, v_t, v_h, v_w, v_head, v_d, y_b, y_t, y_h, y_w, y_head, y_d, mask_b, mask_l,
    VECTOR: tl.constexpr,  # elements in 16 bytes, in which steps are counted
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
):
    """A tile of pixels of one head, over all keys of its frame or clip."""
    program = tl.program_id(0)
    tiles = tl.cdiv(pixels, BLOCK_M)
    from_p = (program % tiles).to(tl.int64) * BLOCK_M
    program = program // tiles
    head = (program % heads).to(tl.int64)
    t = (program // heads % frames).to(tl.int64)
    b = (program // heads // frames).to(tl.int64)
    columns = tl.multiple_of(tl.cast(channels, tl.int64), VECTOR)
    columns_rest = tl.multiple_of(tl.cast(channels, tl.int64) - BLOCK_D, VECTOR)
    lane = tl.arange(0, BLOCK_M)
    inside = lane < pixels - from_p
    q_from = tl.multiple_of(q + (b * q_b + t * q_t + head * q_head + from_p * q_w) * VECTOR, 16)
    query, query_rest = _blocks(q_from, lane, inside, columns, columns_rest, q_w, BLOCK_D, REST_D, VECTOR)
    k_from = k + (b * k_b + t * k_t + head * k_head) * VECTOR
    v_from = v + (b * v_b + t * v_t + head * v_head) * VECTOR
    mask_from = key_mask + b * mask_b
    keys = tl.cast(keys, tl.int32)  # where it is 1, torch.compile makes a constant of it
    whole = keys // BLOCK_N * BLOCK_N
    if has_mask == 1:
        keys = _after_last(mask_from, mask_l, keys)
        whole = 0

    z = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    z_rest = tl.zeros((BLOCK_M, REST_D if REST_D > 0 else 1), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for first in tl.range(0, whole, BLOCK_N):
        z, z_rest, total, top = _attend(
            query, query_rest, z, z_rest, total, top, k_from, v_from, mask_from, first, keys, has_mask, mask_l, gain,
            columns, columns_rest, k_w, v_w, False, BLOCK_N, BLOCK_D, REST_D, VECTOR,
        )
    for first in tl.range(whole, keys, BLOCK_N):
        z, z_rest, total, top = _attend(
            query, query_rest, z, z_rest, total, top, k_from, v_from, mask_from, first, keys, has_mask, mask_l, gain,
            columns, columns_rest, k_w, v_w, True, BLOCK_N, BLOCK_D, REST_D, VECTOR,
        )
    share = _shares(total)
    y_from = tl.multiple_of(y + (b * y_b + t * y_t + head * y_head + from_p * y_w) * VECTOR, 16)
    _store(y_from, lane, inside, columns, y_w, z * share, VECTOR)
    if REST_D > 0:
        _store(tl.multiple_of(y_from + BLOCK_D, 16), lane, inside, columns_rest, y_w, z_rest * share, VECTOR)


@triton.jit(do_not_specialize=[*TENSORS, *SCALARS])
def _text_kernel(  # type: ignore[no-untyped-def]
    q, k, v, key_mask, y, gain, frames, heads, pixels, keys, channels, has_mask, width, key_width,
    walk,  # tiles
    q_b, q_t, q_h, q_w, q_head, q_d, k_b, k_t, k_h, k_w, k_head, k_d,
    v_b, v_t, v_h, v_w, v_head, v_d, y_b, y_t, y_h, y_w, y_head, y_d, mask_b, mask_l,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
):
    """A walk over tiles of pixels of one head, before the same keys, which are all in one tile."""
    program = tl.program_id(0)
    tiles = tl.cdiv(pixels, BLOCK_M)
    walks = tl.cdiv(tiles, walk)
    head = (program % heads).to(tl.int64)
    from_tile = program // heads % walks * walk
    t = (program // heads // walks % frames).to(tl.int64)
    b = (program // heads // walks // frames).to(tl.int64)
    columns = tl.multiple_of(tl.cast(channels, tl.int64), VECTOR)
    columns_rest = tl.multiple_of(tl.cast(channels, tl.int64) - BLOCK_D, VECTOR)
    key = tl.arange(0, BLOCK_N)
    left = _left(key_mask + b * mask_b, mask_l, key, keys, has_mask)
    k_from = tl.multiple_of(k + (b * k_b + t * k_t + head * k_head) * VECTOR, 16)
    held, held_rest = _blocks(k_from, key, left, columns, columns_rest, k_w, BLOCK_D, REST_D, VECTOR)
    v_from = tl.multiple_of(v + (b * v_b + t * v_t + head * v_head) * VECTOR, 16)
    value, value_rest = _blocks(v_from, key, left, columns, columns_rest, v_w, BLOCK_D, REST_D, VECTOR)
    q_frame = q + (b * q_b + t * q_t + head * q_head) * VECTOR
    y_frame = y + (b * y_b + t * y_t + head * y_head) * VECTOR
    lane = tl.arange(0, BLOCK_M)
    for tile in tl.range(from_tile, tl.minimum(from_tile + walk, tiles)):
        from_p = tl.cast(tile, tl.int64) * BLOCK_M
        inside = lane < pixels - from_p
        q_from = tl.multiple_of(q_frame + from_p * q_w * VECTOR, 16)
        query, query_rest = _blocks(q_from, lane, inside, columns, columns_rest, q_w, BLOCK_D, REST_D, VECTOR)
        s = tl.where(left[None, :], _scores(query, query_rest, held, held_rest, REST_D), float("-inf"))
        p, _, _ = _weights(s, gain, tl.full((BLOCK_M,), float("-inf"), tl.float32))
        weights = p.to(query.dtype)
        share = _shares(tl.sum(p, 1))
        y_from = tl.multiple_of(y_frame + from_p * y_w * VECTOR, 16)
        _store(y_from, lane, inside, columns, y_w, tl.dot(weights, value) * share, VECTOR)
        if REST_D > 0:
            beyond = tl.multiple_of(y_from + BLOCK_D, 16)
            _store(beyond, lane, inside, columns_rest, y_w, tl.dot(weights, value_rest) * share, VECTOR)


@triton.jit
def _rows(p, width, step_h, step_w, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    return (p // width * step_h + p % width * step_w) * VECTOR


@triton.jit
def _columns(source, row, first, step_d, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where channels from `first` on lie in some rows; VECTOR above 1: they are dense."""
    lane = tl.arange(0, COLUMNS)
    if VECTOR > 1:
        at = tl.multiple_of(source + first, 16) + (row[:, None] + lane[None, :])
    else:
        at = source + (row[:, None] + ((first + lane) * step_d)[None, :])
    return at


@triton.jit(do_not_specialize=[*TENSORS, *SCALARS])
def _plain_kernel(  # type: ignore[no-untyped-def]
    q, k, v, key_mask, y, gain, frames, heads, pixels, keys, channels, has_mask, width, key_width, walk,
    q_b, q_t, q_h, q_w, q_head, q_d, k_b, k_t, k_h, k_w, k_head, k_d,
    v_b, v_t, v_h, v_w, v_head, v_d, y_b, y_t, y_h, y_w, y_head, y_d, mask_b, mask_l,
    VECTOR: tl.constexpr,  # elements in 16 bytes, in which steps are counted; 1 for any strides
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """BLOCK_D channels of a tile of pixels of one head; scores are summed over as many at a time."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_D)
    from_d = (program % blocks).to(tl.int64) * BLOCK_D
    program = program // blocks
    tiles = tl.cdiv(pixels, BLOCK_M)
    p = (program % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    program = program // tiles
    head = (program % heads).to(tl.int64)
    t = (program // heads % frames).to(tl.int64)
    b = (program // heads // frames).to(tl.int64)
    inside = (p < pixels)[:, None]
    lane = tl.arange(0, BLOCK_D)
    taken = (lane < tl.multiple_of(channels - from_d, VECTOR))[None, :]
    q_from = q + (b * q_b + t * q_t + head * q_head) * VECTOR
    k_from = k + (b * k_b + t * k_t + head * k_head) * VECTOR
    v_from = v + (b * v_b + t * v_t + head * v_head) * VECTOR
    y_from = y + (b * y_b + t * y_t + head * y_head) * VECTOR
    mask_from = key_mask + b * mask_b
    keys = tl.cast(keys, tl.int32)  # where it is 1, torch.compile makes a constant of it
    if has_mask == 1:
        keys = _after_last(mask_from, mask_l, keys)

    q_row = _rows(p, width, q_h, q_w, VECTOR)
    z = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for first in tl.range(0, keys, BLOCK_N):
        key = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_N)
        left = _left(mask_from, mask_l, key, keys, has_mask)
        k_row = _rows(key, key_width, k_h, k_w, VECTOR)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in tl.range(0, blocks):
            from_c = tl.cast(c, tl.int64) * BLOCK_D
            part_in = (lane < tl.multiple_of(channels - from_c, VECTOR))[None, :]
            query = tl.load(_columns(q_from, q_row, from_c, q_d, BLOCK_D, VECTOR), inside & part_in, 0.0)
            other = tl.load(_columns(k_from, k_row, from_c, k_d, BLOCK_D, VECTOR), left[:, None] & part_in, 0.0)
            s = tl.dot(query, tl.trans(other), s, input_precision="tf32x3")
        weights, risen, held = _weights(tl.where(left[None, :], s * gain, float("-inf")), 1.0, top)
        fade = tl.exp2(top - held)
        total = total * fade + tl.sum(weights, 1)
        top = risen
        v_row = _rows(key, key_width, v_h, v_w, VECTOR)
        value = tl.load(_columns(v_from, v_row, from_d, v_d, BLOCK_D, VECTOR), left[:, None] & taken, 0.0)
        z = tl.dot(weights.to(value.dtype), value, z * fade[:, None], input_precision="tf32x3")
    y_row = _rows(p, width, y_h, y_w, VECTOR)
    target = _columns(y_from, y_row, from_d, y_d, BLOCK_D, VECTOR)
    tl.store(target, (z * _shares(total)).to(y.dtype.element_ty), inside & taken)
# fmt: on


# The host's part: how the tensors lie, and what is launched over them. It is cached by geometry and configuration.


def _cdiv(a: int, b: int) -> int:
    """That of Triton takes a microsecond or two on the host."""
    return -(-a // b)


Strides = tuple[int, int, int, int, int, int]
Integers = tuple[int, ...]


class Geometry(NamedTuple):
    """All that decides a launch, but for the configuration and the GPU.

    Args:
        shape: of q and the result.
        text_keys: L of cross-attention; None for self-attention.
        strides: of q, k, v and the result.
        vectors: whether all four begin at multiples of 16 bytes.
        upright: whether the scale is positive.
    """

    shape: Integers
    text_keys: int | None
    strides: tuple[Integers, ...]
    itemsize: int
    vectors: bool
    masked: bool
    upright: bool


class Plan(NamedTuple):
    """One launch.

    Args:
        scalars: from frames on, up to the strides of the mask.
    """

    kernel: Any
    programs: int
    scalars: Integers
    constants: Mapping[str, int]
    options: Mapping[str, Any]


def _planned(q: Tensor, k: Tensor, v: Tensor, y: Tensor, masked: bool, upright: bool) -> Plan:
    clips, recording = (q, k, v, y), traced(y)
    geometry = Geometry(
        q.shape,
        k.shape[1] if k.dim() == 4 else None,
        tuple([each.stride() for each in clips]),
        q.element_size(),
        all([aligned(each, VECTOR_BYTES, recording) for each in clips]),
        masked,
        upright,
    )
    find, plan = (_fast_case, _plan) if recording else (_cached_case, _cached_plan)
    case = find(geometry)
    if case is None:
        return plan(geometry)
    return plan(geometry, _config(chosen(OP, case, y.device)), _hopper(y.device))


def _fast_case(geometry: Geometry) -> str | None:
    """The case of a call that is not left to the plain kernel."""
    B, T, H, W, heads, D = map(int, geometry.shape)
    settled, text_keys = _settled(geometry), geometry.text_keys
    fast = geometry.itemsize == 2 and geometry.upright and D <= TILE
    if not (fast and _in_vectors(geometry, settled) and all(_dense(*each) for each in settled)):
        return None
    return case_of(D, *((B * T * heads, H * W) if text_keys is None else (B * heads, T * H * W)), text_keys)


def _plan(geometry: Geometry, config: Config | None = None, hopper: bool = True) -> Plan:
    """`config`: as it was chosen for the case, where there is one."""
    case = _fast_case(geometry)
    if case is not None and config is not None:
        return _flash_plan(geometry, case, config if hopper else _older(config, case))
    B, T, H, W, heads, D = map(int, geometry.shape)
    settled = _settled(geometry)
    vectors = _in_vectors(geometry, settled)
    constants = {"VECTOR": VECTOR_BYTES // geometry.itemsize if vectors else 1, **PLAIN_TILES[vectors]}
    tiles = _cdiv(H * W, constants["BLOCK_M"]) * _cdiv(D, constants["BLOCK_D"])
    scalars = _scalars(geometry, T, H * W, 1, [strides for _, strides in settled], constants["VECTOR"])
    return Plan(_plain_kernel, B * T * heads * tiles, scalars, constants, PLAIN_OPTIONS[vectors])


_cached_case = functools.lru_cache(maxsize=1024)(_fast_case)
_cached_plan = functools.lru_cache(maxsize=1024)(_plan)


def _flash_plan(geometry: Geometry, case: str, config: Config) -> Plan:
    B, T, H, W, heads, _ = map(int, geometry.shape)
    frames, pixels = T, H * W
    strides = [_along_pixels(*each) for each in _settled(geometry)]
    # Before a text, all pixels of a clip are those of one frame where they lie so.
    if geometry.text_keys is not None and all(
        T == 1 or t == H * W * w for _, t, _, w, _, _ in (strides[0], strides[3])
    ):
        frames, pixels = 1, T * H * W
    tiles, walk = _cdiv(pixels, config.block_m), 1
    stays = case.endswith("-text")
    if stays:
        walk = max(1, min(LONGEST_WALK, B * frames * heads * tiles // WALKS))
    constants = _constants(config, case)
    return Plan(
        kernel=_text_kernel if stays else _flash_kernel,
        programs=B * frames * heads * _cdiv(tiles, walk),
        scalars=_scalars(geometry, frames, pixels, walk, strides, constants["VECTOR"]),
        constants=constants,
        options=config.launch_options(),
    )


def _scalars(
    geometry: Geometry, frames: int, pixels: int, walk: int, strides: Sequence[Strides], vector: int
) -> Integers:
    """Steps are counted in vectors, of which all are whole but that of 1."""
    _, _, H, W, heads, D = map(int, geometry.shape)
    keys, key_width = (H * W, W) if geometry.text_keys is None else (int(geometry.text_keys),) * 2
    sizes = (frames, heads, pixels, keys, D, int(geometry.masked), W, key_width, walk)
    return (*sizes, *(step // vector for each in strides for step in each))


def _constants(config: Config, case: str) -> dict[str, int]:
    block_d, rest_d = HEADS[case.partition("-")[0]]
    return {"VECTOR": 8, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": block_d, "REST_D": rest_d}


@functools.cache
def _hopper(device: torch.device) -> bool:
    """Whether operands of products need no registers. Interpreted and traced calls are taken for such."""
    return device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= HOPPER


def _older(config: Config, case: str) -> Config:
    """As cards before sm_90 run it."""
    block_n = TEXT_KEYS if case.endswith("-text") else min(config.block_n, OLDER_N)
    return config._replace(block_n=block_n, maxnreg=MOST_REGISTERS)


Places = tuple[int, int, int]


def _settled(geometry: Geometry) -> list[tuple[Places, Strides]]:
    """Of q, k, v and the result: (T, H, W), where a text is one row of keys, and (b, t, h, w, head, d).

    Plain integers, also in a trace with symbolic shapes; 0 where there is no step.
    """
    B, T, H, W, heads, D = map(int, geometry.shape)
    settled = []
    for steps in geometry.strides:
        places = T, H, W
        if len(steps) == 4:
            steps, places = (steps[0], 0, 0, *steps[1:]), (1, 1, int(geometry.text_keys or 0))
        sizes = (B, *places, heads, D)
        b, t, h, w, head, d = (int(step) if n > 1 else 0 for n, step in zip(sizes, steps, strict=True))
        settled.append((places, (b, t, h, w, head, d)))
    return settled


def _in_vectors(geometry: Geometry, settled: Sequence[tuple[Places, Strides]]) -> bool:
    """Whether channels are dense, and all heads begin at whole 16-byte vectors."""
    vector = VECTOR_BYTES // geometry.itemsize
    whole = all(step % vector == 0 for _, (*outer, _) in settled for step in (int(geometry.shape[5]), *outer))
    return geometry.vectors and whole and all(strides[5] == 1 for _, strides in settled)


def _dense(places: Places, strides: Strides) -> bool:
    """Whether the rows of a frame follow each other without gaps."""
    _, H, W = places
    return 1 in (H, W) or strides[2] == W * strides[3]


def _along_pixels(places: Places, strides: Strides) -> Strides:
    """`w` as the step from pixel to pixel also where rows have one, or frames; of expanded views it is 0."""
    (_, H, W), (b, t, h, w, head, d) = places, strides
    return b, t, h, w if W > 1 else h if H > 1 else t, head, d


# What ships: every compiled form that a launch can ask for.

DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}


def _flash_variant(dtype: str, case: str, config: Config, least_arch: int) -> Variant:
    constants, options = _constants(config, case), config.launch_options()
    channels, _, kind = case.partition("-")
    tile = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
    limit = f" r{options['maxnreg']}" if "maxnreg" in options else ""
    return Variant(
        f"{dtype} {channels} {tile}{limit}",
        "_text_kernel" if kind == "text" else "_flash_kernel",
        _signature(dtype, constants),
        constants,
        **options,
        wide_loads=3,
        wgmma=True,
        least_arch=least_arch,
    )


def _plain_variant(dtype: str, vectors: bool) -> Variant:
    constants = {"VECTOR": VECTOR_BYTES // DTYPES[dtype] if vectors else 1, **PLAIN_TILES[vectors]}
    name, signature = f"{dtype} {'vectors' if vectors else 'any strides'}", _signature(dtype, constants)
    wide_loads = 3 if vectors else 0
    return Variant(name, "_plain_kernel", signature, constants, **PLAIN_OPTIONS[vectors], wide_loads=wide_loads)


def _signature(dtype: str, constants: Mapping[str, int]) -> dict[str, str]:
    signature = dict.fromkeys(TENSORS, f"*{dtype}") | {"key_mask": "*i1"} | dict.fromkeys(SCALARS, "i32")
    return signature | {"gain": "fp32"} | dict.fromkeys(constants, "constexpr")


def _variants() -> Iterator[Variant]:
    for dtype, itemsize in DTYPES.items():
        for case, table in shipped(OP).items() if itemsize == 2 else ():
            for config in map(_config, table):
                older = _older(config, case)
                yield _flash_variant(dtype, case, older, 80)
                if config != older:
                    yield _flash_variant(dtype, case, config, HOPPER[0] * 10)
        yield from (_plain_variant(dtype, vectors) for vectors in (False, True))


VARIANTS = tuple({(variant.kernel, variant.name): variant for variant in _variants()}.values())


def _candidates(case: str) -> tuple[dict[str, int], ...]:
    """What is worth a try for a case, the default left aside."""
    channels, kind = case.split("-")
    if kind == "text":
        walks = ((64, 4, 1, 255), (64, 4, 3, 255), (64, 4, 2, 168), (128, 8, 2, 255), (128, 4, 2, 255))
        return tuple(dict(zip(Config._fields, walk, strict=False)) for walk in walks)
    tiles = product(((64, 4), (128, 8)), (2, 3), (64, 128))
    found = [Config(block_m, warps, stages, MOST_REGISTERS, block_n) for (block_m, warps), stages, block_n in tiles]
    found += [Config(128, 8, 4, 255, 32), Config(128, 8, 4, 255, 64), Config(128, 4, 3, 255, 64)]
    if channels == "d128":
        found.append(Config(128, 8, 4, 128, 32))
    else:
        found += [Config(128, 8, 3, 128, 64), Config(128, 8, 2, 128, 128)]
    return tuple(each._asdict() for each in found)


CANDIDATES = {case: _candidates(case) for case in cases(OP)}
"""Configurations by case, for a search on a GPU."""
