"""temporal_conv against torch's ways to convolve over time, each with the norm and the residual as eager layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops import NormArgs
from lumiere_fast.ops.temporal_conv import SPEC

Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


def rearrange_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(b h w) c t, and a Conv1d: how lumiere-pytorch and most inflated models do it."""
    B, C, T, H, W = x.shape
    y = F.conv1d(x.permute(0, 3, 4, 1, 2).reshape(B * H * W, C, T), weight, bias, padding=weight.shape[2] // 2)
    return y.reshape(B, H, W, -1, T).permute(0, 3, 4, 1, 2)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(x, weight[..., None, None], bias, padding=(weight.shape[2] // 2, 0, 0))


def conv3d_channels_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    kernel = weight[..., None, None].contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, kernel, bias, padding=(weight.shape[2] // 2, 0, 0))


def layers(
    convolve: Convolution,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: NormArgs | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Norm with the statistics that the op is given too, SiLU, convolution, residual: a layer each."""
    if norm is not None:
        mean, rstd = (s.repeat_interleave(x.shape[1] // norm.num_groups, -1) for s in (norm.mean, norm.rstd))
        multiplier = rstd if norm.weight is None else rstd * norm.weight
        offset = -mean * multiplier if norm.bias is None else norm.bias - mean * multiplier
        offset, multiplier = (a.transpose(1, 2)[..., None, None].to(x.dtype) for a in (offset, multiplier))
        x = F.silu(torch.addcmul(offset, x, multiplier))
    y = convolve(x, weight, bias)
    return y if residual is None else y + residual


def equal_matrix_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """torch.mm with the M, N, K of the convolution, into a held result."""
    rows = x.numel() // x.shape[1]
    a, b = x.new_empty(rows, weight[0].numel()).normal_(), x.new_empty(weight[0].numel(), weight.shape[0]).normal_()
    held = x.new_empty(rows, weight.shape[0])
    return lambda: torch.mm(a, b, out=held)


@each_scenario(SPEC)
def test_temporal_conv(case: Case) -> None:
    contiguous = {name: t.contiguous() if isinstance(t, Tensor) else t for name, t in case.inputs.items()}
    case.compare(
        {
            "conv1d": partial(layers, rearrange_conv1d, **case.inputs),
            "conv3d NDHWC": partial(layers, conv3d_channels_last, **case.inputs),
            "conv3d NCDHW": partial(layers, conv3d, **contiguous),
        },
        limits={"mm": equal_matrix_product(case.inputs["x"], case.inputs["weight"]), **case.copy()},
        compiled=partial(layers, conv3d_channels_last),
    )
