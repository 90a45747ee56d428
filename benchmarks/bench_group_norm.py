"""group_norm against nn.GroupNorm, FiLM and SiLU as three eager layers, in both layouts."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops.group_norm import SPEC


def layers(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, act: str
) -> Tensor:
    """GroupNorm of each frame, then FiLM, then SiLU, as diffusers' ResnetBlock2D has them."""
    frames = x.transpose(1, 2).flatten(0, 1)
    y = F.group_norm(frames, num_groups, weight, bias).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None, None]) + shift[:, :, None, None, None]
    return F.silu(y)


@each_scenario(SPEC)
def test_group_norm(case: Case) -> None:
    x = case.inputs["x"]
    frames_first = x.transpose(1, 2).contiguous().transpose(1, 2)  # frames are contiguous images: nothing to copy
    case.compare(
        {
            "layers": partial(layers, **case.inputs),
            "layers, NCHW": partial(layers, **{**case.inputs, "x": frames_first}),
        },
        limits=case.copy(),
        compiled=layers,
    )
