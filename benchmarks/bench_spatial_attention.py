"""spatial_attention against torch's own attention by each of its backends, of views and of copies; explicit scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, Side, each_scenario
from lumiere_fast import dispatch
from lumiere_fast.ops import spatial_attention
from lumiere_fast.ops.spatial_attention import SPEC

# Takes q, k, v as (frames, heads, pixels or words, D) and a mask of keys (frames, 1, 1, words) or None.
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def frames_of(x: Tensor, q: Tensor) -> Tensor:
    """b t h w n d -> (b t) n (h w) d; keys of text b l n d are repeated to each frame."""
    folded = x.flatten(2, 3).flatten(0, 1) if x.dim() == 6 else x.repeat_interleave(q.shape[1], dim=0)
    return folded.transpose(1, 2)


def layers(
    attend: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    copied: bool = False,
) -> Tensor:
    folded = [frames_of(each, q) for each in (q, k, v)]
    mask = None if key_mask is None else key_mask.repeat_interleave(q.shape[1], dim=0)[:, None, None]
    y = attend(*([each.contiguous() for each in folded] if copied else folded), mask)
    return y.transpose(1, 2).reshape(q.shape)


def sdpa_by(kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    added = None
    if mask is not None:
        added = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
        added = added.expand(*q.shape[:3], -1)
    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=added).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Torch's attention as a layer of a model calls it."""
    return layers(partial(sdpa_by, None), q, k, v, key_mask)


# By name: the kernel, None for what torch picks, and whether it is given copies.
SDPA: Mapping[str, tuple[SDPBackend | None, bool]] = {
    "SDPA of views": (None, False),
    "SDPA of copies": (None, True),
    "SDPA flash of views": (SDPBackend.FLASH_ATTENTION, False),
    "SDPA flash of copies": (SDPBackend.FLASH_ATTENTION, True),
    "SDPA efficient of views": (SDPBackend.EFFICIENT_ATTENTION, False),
    "SDPA efficient of copies": (SDPBackend.EFFICIENT_ATTENTION, True),
    "SDPA cuDNN of views": (SDPBackend.CUDNN_ATTENTION, False),
    "SDPA cuDNN of copies": (SDPBackend.CUDNN_ATTENTION, True),
    "SDPA math of views": (SDPBackend.MATH, False),
    "SDPA math of copies": (SDPBackend.MATH, True),
}
OF_GPUS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def our_kernel(case: Case) -> Mapping[str, Side]:
    """What "auto" is held against besides torch's: our own kernel, where it runs."""
    if case.backend != dispatch.AUTO or dispatch.why_not(SPEC.name, "triton", **case.inputs):
        return {}
    held = torch.empty(case.inputs["q"].shape, dtype=case.dtype, device=case.device)
    return {"triton": partial(spatial_attention, **case.inputs, backend="triton", out=held)}


@each_scenario(SPEC)
def test_spatial_attention(case: Case) -> None:
    sides: dict[str, Side] = {
        name: partial(layers, partial(sdpa_by, kernel), **case.inputs, copied=copied)
        for name, (kernel, copied) in SDPA.items()
        if case.device == "cuda" or kernel not in OF_GPUS
    }
    if case.device == "cuda" and importlib.util.find_spec("xformers"):
        sides["xFormers"] = partial(layers, xformers, **case.inputs)
    sides["matmul"] = partial(layers, matmul, **case.inputs, copied=True)
    case.compare(sides, limits={**case.copy(), **our_kernel(case)}, compiled=sdpa)
