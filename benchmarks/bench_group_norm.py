"""group_norm against nn.GroupNorm, FiLM and SiLU as three eager layers, in both layouts."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops.group_norm import SPEC


def layers(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str | None,
    per_frame: bool,
) -> Tensor:
    """GroupNorm, of each frame or of the clip, then FiLM, then SiLU, as diffusers' residual blocks have them."""
    if per_frame:
        frames = F.group_norm(x.transpose(1, 2).flatten(0, 1), num_groups, weight, bias)
        y = frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    else:
        y = F.group_norm(x, num_groups, weight, bias)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None, None]) + shift[:, :, None, None, None]
    return F.silu(y) if act == "silu" else y


def contiguous(x: Tensor, per_frame: bool) -> Tensor:
    """The layout in which GroupNorm copies nothing: frames that are contiguous images, or a contiguous clip."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if per_frame else x.contiguous()


@each_scenario(SPEC)
def test_group_norm(case: Case) -> None:
    channels_first = {**case.inputs, "x": contiguous(case.inputs["x"], case.inputs["per_frame"])}
    case.compare(
        {"layers": partial(layers, **case.inputs), "layers, NCHW": partial(layers, **channels_first)},
        limits=case.copy(),
        compiled=layers,
    )
