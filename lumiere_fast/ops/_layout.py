"""How an activation `(B, C, T, H, W)` lies in memory, and the views every op is written in.

In channels_last_3d memory the bytes are ordered B, T, H, W, C, so frames, pixels and matrix rows are views. Any other
layout is accepted by paying one conversion on the way in and one on the way out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def video_format(x: Tensor) -> torch.memory_format:
    """The memory format an op's result takes from `x`: channels_last_3d or contiguous.

    A slice is contiguous in neither format; it takes the format of the tensor it was cut from, told by which of C and W
    is the denser axis. Where both formats describe the same bytes (C = 1, or one pixel), channels_last_3d is meant.
    """
    if x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    if x.is_contiguous() or x.stride(1) > x.stride(4):
        return torch.contiguous_format
    return torch.channels_last_3d


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: at least fp32, and fp64 where the tensor is fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_rows(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, T, H, W, C); a view in every layout."""
    return x.permute(0, 2, 3, 4, 1)


def from_rows(rows: Tensor) -> Tensor:
    """(B, T, H, W, C) -> (B, C, T, H, W), the view back."""
    return rows.permute(0, 4, 1, 2, 3)


def fold_pixels(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T, H*W) in channels_last memory: a clip seen as an image of T by H*W pixels."""
    return to_rows(x).flatten(2, 3).permute(0, 3, 1, 2)


def fold_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W) in channels_last memory: a clip seen as a batch of images."""
    return to_rows(x).flatten(0, 1).permute(0, 3, 1, 2)


def over_pixels(values: Tensor) -> Tensor:
    """(C,), (B, 1, C) or (B, T, C) -> broadcastable to (B, C, T, H, W)."""
    return values[:, None, None, None] if values.dim() == 1 else values.transpose(1, 2)[..., None, None]


def each_frame(film: Tensor) -> Tensor:
    """(B, C) -> (B, 1, C); (B, T, C) stays."""
    return film[:, None] if film.dim() == 2 else film
