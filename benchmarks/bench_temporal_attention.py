"""temporal_attention against pixels rearranged into the batch of torch's own attention."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops.temporal_attention import SPEC


def by_lag(bias: Tensor) -> Tensor:
    """(heads, 2T - 1) -> (heads, T, T)."""
    T = (bias.shape[1] + 1) // 2
    frames = torch.arange(T, device=bias.device)
    return bias[:, frames[:, None] - frames + T - 1]


def rearrange(x: Tensor) -> Tensor:
    """b t h w n d -> (b h w) n t d, copied."""
    B, T, H, W, heads, D = x.shape
    return x.permute(0, 2, 3, 4, 1, 5).reshape(B * H * W, heads, T, D).contiguous()


def back(y: Tensor, like: Tensor) -> Tensor:
    B, T, H, W, heads, D = like.shape
    return y.reshape(B, H, W, heads, T, D).permute(0, 4, 1, 2, 3, 5).contiguous()


def rearrange_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return back(F.scaled_dot_product_attention(*map(rearrange, (q, k, v)), attn_mask=by_lag(bias)), q)


def rearrange_matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    a, b, c = map(rearrange, (q, k, v))
    return back((a @ b.mT * q.shape[-1] ** -0.5 + by_lag(bias)).softmax(-1) @ c, q)


@each_scenario(SPEC)
def test_temporal_attention(case: Case) -> None:
    case.compare(
        {
            "rearrange + SDPA": partial(rearrange_sdpa, **case.inputs),
            "rearrange + matmul": partial(rearrange_matmul, **case.inputs),
        },
        limits=case.copy(),
        compiled=rearrange_sdpa,
    )
