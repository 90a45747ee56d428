"""The model's ops as eager layers over rearranged tensors: an inflated U-Net as it is written without this package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_space_time_downsample import conv1d_then_stride
from benchmarks.bench_space_time_upsample import duplicate_then_conv1d, interpolate
from benchmarks.bench_spatial_attention import sdpa
from benchmarks.bench_temporal_attention import back, lag_table, rearrange, turned
from benchmarks.bench_temporal_conv import rearrange_conv1d
from lumiere_fast import ops
from lumiere_fast.ops._layout import each_frame, over_pixels


@contextmanager
def eager_ops() -> Iterator[None]:
    """Within the block the models run on the functions of this file."""
    layers: dict[str, Any] = {
        "group_norm": group_norm,
        "group_norm_stats": no_stats,
        "temporal_conv": temporal_conv,
        "temporal_attention": temporal_attention,
        "spatial_attention": sdpa,
        "space_time_downsample": space_time_downsample,
        "space_time_upsample": space_time_upsample,
    }
    with mock.patch.multiple(ops, **layers):
        yield


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    frames = F.group_norm(x.transpose(1, 2).flatten(0, 1), num_groups, weight, bias)
    y = frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    if scale is not None:
        y = y * (1 + over_pixels(each_frame(scale)))
    if shift is not None:
        y = y + over_pixels(each_frame(shift)).to(y.dtype)
    return F.silu(y) if act == "silu" else y


def no_stats(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Layers make their statistics themselves, each time."""
    return x.new_empty(0), x.new_empty(0)


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm: ops.NormArgs | None = None,
    residual: Tensor | None = None,
    stats_groups: int | None = None,
) -> Any:
    if norm is not None:
        x = group_norm(x, norm.num_groups, norm.weight, norm.bias, scale=norm.scale, shift=norm.shift, act=norm.act)
    y = rearrange_conv1d(x, weight, bias)
    y = y if residual is None else y + residual
    return y if stats_groups is None else (y, no_stats(y, stats_groups))


def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, rotary: Tensor | None = None
) -> Tensor:
    mask = None if bias is None else lag_table(q.shape[1], bias, False, None, q)
    queries, keys, values = map(rearrange, (turned(q, rotary), turned(k, rotary), v))
    return back(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask), q)


def space_time_downsample(x: Tensor, factor: Sequence[int], *, weight: Tensor, bias: Tensor) -> Tensor:
    return conv1d_then_stride(x, factor, "nearest", weight, bias)


def space_time_upsample(
    x: Tensor, factor: Sequence[int], *, mode: str = "nearest", weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    if weight is None or bias is None:
        return interpolate(x, factor, mode)
    return duplicate_then_conv1d(x, factor, mode, weight, bias)
