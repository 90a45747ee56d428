"""spatial_attention against torch's own attention, of views and of contiguous copies, and against explicit scores."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, Side, each_scenario
from lumiere_fast.ops.spatial_attention import SPEC


def heads_first(x: Tensor, copied: bool = True) -> Tensor:
    """b t h w n d or b l n d -> frames n pixels d."""
    folded = x.flatten(2, 3).flatten(0, 1) if x.dim() == 6 else x
    return folded.transpose(1, 2).contiguous() if copied else folded.transpose(1, 2)


def each_frame(keys: Tensor, q: Tensor) -> Tensor:
    """Keys of the text repeated to each frame; those of a frame as they are."""
    return keys.repeat_interleave(q.shape[1], dim=0) if keys.dim() == 4 else keys


def sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, *, copied: bool = False) -> Tensor:
    mask = None if key_mask is None else key_mask.repeat_interleave(q.shape[1], dim=0)[:, None, None]
    y = F.scaled_dot_product_attention(*(heads_first(each_frame(a, q), copied) for a in (q, k, v)), attn_mask=mask)
    return y.transpose(1, 2).reshape(q.shape)


def matmul(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    a, b, c = (heads_first(each_frame(t, q)) for t in (q, k, v))
    scores = a @ b.mT * q.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask.repeat_interleave(q.shape[1], dim=0)[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ c).transpose(1, 2).reshape(q.shape)


def forced_sdpa(backend: SDPBackend, **inputs: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(**inputs)


def fused_on_a_gpu(case: Case) -> dict[str, Side]:
    """The two fused kernels of torch; flash takes no mask, and neither runs in fp32."""
    kernels = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    if case.device != "cuda" or case.dtype.itemsize != 2:
        return {}
    if "key_mask" in case.inputs:
        del kernels["SDPA flash"]
    return {name: partial(forced_sdpa, kernel, **case.inputs) for name, kernel in kernels.items()}


@each_scenario(SPEC)
def test_spatial_attention(case: Case) -> None:
    case.compare(
        {
            "SDPA of views": partial(sdpa, **case.inputs),
            "SDPA of copies": partial(sdpa, **case.inputs, copied=True),
            "matmul": partial(matmul, **case.inputs),
            **fused_on_a_gpu(case),
        }
    )
