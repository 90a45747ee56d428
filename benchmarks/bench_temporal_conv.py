"""temporal_conv against torch's ways to convolve over time, each with the norm and the residual as eager layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, assert_same, each_scenario
from lumiere_fast import dispatch, timing, tune
from lumiere_fast.kernels import _configs
from lumiere_fast.ops import NormArgs, temporal_conv
from lumiere_fast.ops._selfcheck import _kernel_errors
from lumiere_fast.ops.temporal_conv import SPEC
from lumiere_fast.timing import Side

Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def rearrange_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b h w) c t, and a Conv1d: how lumiere-pytorch and most inflated models do it."""
    B, C, T, H, W = x.shape
    y = F.conv1d(x.permute(0, 3, 4, 1, 2).reshape(B * H * W, C, T), weight, bias, padding=weight.shape[2] // 2)
    return y.reshape(B, H, W, -1, T).permute(0, 3, 4, 1, 2)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The clip as an image of T by H*W pixels, which channels-last memory is a view of, and a (k, 1) kernel."""
    rows = x.permute(0, 2, 3, 4, 1).flatten(2, 3)  # x.flatten(3) of one clip has strides that torch takes for NCHW
    y = F.conv2d(rows.permute(0, 3, 1, 2), weight[..., None], bias, padding=(weight.shape[2] // 2, 0))
    return y.permute(0, 2, 3, 1).unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv3d(x, weight[..., None, None], bias, padding=(weight.shape[2] // 2, 0, 0))


def conv3d_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernel = weight[..., None, None].contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, kernel, bias, padding=(weight.shape[2] // 2, 0, 0))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of one tap, on the rows that channels-last memory is: how attention blocks project."""
    return F.linear(x.permute(0, 2, 3, 4, 1), weight[..., 0], bias).permute(0, 4, 1, 2, 3)


def layers(
    convolve: Convolution,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: NormArgs | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Norm with the statistics that the op is given too, SiLU, convolution, bias of frames, residual: a layer each."""
    if norm is not None:
        mean, rstd = (s.repeat_interleave(x.shape[1] // norm.num_groups, -1) for s in (norm.mean, norm.rstd))
        multiplier = rstd if norm.weight is None else rstd * norm.weight
        offset = -mean * multiplier if norm.bias is None else norm.bias - mean * multiplier
        offset, multiplier = (a.transpose(1, 2)[..., None, None].to(x.dtype) for a in (offset, multiplier))
        x = torch.addcmul(offset, x, multiplier)
        x = F.silu(x) if norm.act == "silu" else x
    if bias.dim() == 3:
        y = convolve(x, weight, None) + bias.transpose(1, 2)[..., None, None]
    else:
        y = convolve(x, weight, bias)
    return y if residual is None else y + residual


def equal_matrix_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """torch.mm with the M, N, K of the convolution, into a held result."""
    rows = x.numel() // x.shape[1]
    a, b = x.new_empty(rows, weight[0].numel()).normal_(), x.new_empty(weight[0].numel(), weight.shape[0]).normal_()
    held = x.new_empty(rows, weight.shape[0])
    return lambda: torch.mm(a, b, out=held)


def norm_either_way(case: Case) -> dict[str, Side]:
    """Our kernel with the norm in its prologue, and in a pass before: those that run, held against the reference."""
    fused = case.scenario.options["fused"]
    ours = case.backend == "triton" or (case.backend == dispatch.AUTO and case.device == "cuda")
    if not (fused and ours) or dispatch.why_not(SPEC.name, "triton", **case.inputs):
        return {}
    expected = temporal_conv(**case.inputs, backend="reference")
    ways = {"norm in the prologue": True, "norm in a pass before": False}
    sides = {}
    for name, fused_norm in ways.items():
        side = with_config(case, fused_norm, torch.empty_like(expected))
        try:
            result = side()
        except _kernel_errors():  # the tile that is best for the one may be too large for the other
            continue
        assert_same(name, result, expected, 512 * torch.finfo(case.dtype).eps)
        sides[name] = side
    return sides


def with_config(case: Case, fused_norm: bool, held: Tensor) -> Side:
    """Our kernel as it is configured, but for where the norm is, into `held`."""
    name = tune.case_of(SPEC.name, case.scenario, case.dtype)
    config = {**_configs.chosen(SPEC.name, name, case.inputs["x"].device), "fused_norm": fused_norm}

    def side() -> Tensor:
        with _configs.override(SPEC.name, name, config):
            return temporal_conv(**case.inputs, backend="triton", out=held)

    return side


def fastest(sides: Mapping[str, Side], device: str) -> str:
    """Of those that run here, by the median of three calls after a first."""
    clock, seconds = timing.clock_for(device), {}
    for name, side in sides.items():
        try:
            side()
        except RuntimeError:
            continue
        seconds[name] = timing.median([clock(side) for _ in range(3)])
    return min(seconds, key=lambda name: seconds[name])


CONVOLUTIONS: Mapping[str, Convolution] = {
    "conv1d": rearrange_conv1d,
    "conv2d": conv2d,
    "conv3d NDHWC": conv3d_channels_last,
    "conv3d NCDHW": conv3d,
}


def convolutions(case: Case) -> Mapping[str, Convolution]:
    """For the projection of an attention block, that of its own too."""
    return {**CONVOLUTIONS, "linear": linear} if "norm_act" in case.scenario.options else CONVOLUTIONS


@each_scenario(SPEC)
@torch.no_grad()
def test_temporal_conv(case: Case) -> None:
    contiguous = {name: t.contiguous() if isinstance(t, Tensor) else t for name, t in case.inputs.items()}
    ways = convolutions(case)
    sides = {
        name: partial(layers, convolve, **(contiguous if convolve is conv3d else case.inputs))
        for name, convolve in ways.items()
    }
    best = ways[fastest(sides, case.device)] if case.compiles else None
    case.compare(
        sides,
        limits={
            "mm": equal_matrix_product(case.inputs["x"], case.inputs["weight"]),
            **case.copy(),
            **norm_either_way(case),
        },
        compiled=best and partial(layers, best),
    )
