"""Torch's own attention kernels as backends of `spatial_attention`: cuDNN's, flash and efficient attention.

Each is called by the operator that `F.scaled_dot_product_attention` would come to. That function pads heads and copies
what a kernel does not take, and leaves the choice of a kernel to a context that an exported program does not carry.
Here the choice is in the graph, and what a kernel does not take is told by `limits`, on any machine: frames fold into
the batch, or, before text, into their clip's queries, as views, and results come back in the layout of an activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast import dispatch
from lumiere_fast.dispatch import Backend, Needs

aten = torch.ops.aten

ALIGNMENT = 16  # bytes that the kernels of a GPU read at a time
HALF = (torch.float16, torch.bfloat16)
MOST_BLOCKS = 65535  # of a grid along its second and third axis
INT32_MAX = 2**31 - 1
QUERIES_A_BLOCK = 128
CUDNN_VERSION = 91501  # earlier ones could go wrong at lengths that 128 does not divide; torch asks for it too


def cudnn(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Tensor:
    bias, k, v = _without_masked(q, k, v, key_mask)
    saved = dispatch.needs_gradient((q, k, v))
    folded = _folded(q, k, v)
    return _unfolded(aten._scaled_dot_product_cudnn_attention(*folded, bias, saved, scale=scale)[0], q)


def flash(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Tensor:
    if q.device.type == "cuda":
        return _unfolded(aten._scaled_dot_product_flash_attention(*_folded(q, k, v), scale=scale)[0], q)
    bias, k, v = _without_masked(q, k, v, key_mask)
    folded = _folded(q, k, v)
    return _unfolded(aten._scaled_dot_product_flash_attention_for_cpu(*folded, attn_mask=bias, scale=scale)[0], q)


def efficient(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Tensor:
    bias, k, v = _without_masked(q, k, v, key_mask)
    saved = dispatch.needs_gradient((q, k, v))
    queries, keys, values = _folded(q, k, v)
    bias = None if bias is None else bias.expand(*queries.shape[:3], -1)
    y = aten._scaled_dot_product_efficient_attention(queries, keys, values, bias, saved, scale=scale)[0]
    return _unfolded(y, q)


def _folded(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Each as (batch, heads, length, D)."""
    if k.dim() == 6:
        return [x.flatten(2, 3).flatten(0, 1).transpose(1, 2) for x in (q, k, v)]
    return [x.transpose(1, 2) for x in (q.flatten(1, 3), k, v)]


def _unfolded(y: Tensor, q: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(q.shape).contiguous()


def _without_masked(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """What is added to the scores, (B, 1, 1, L), -inf where a key is left out; keys and values, 0 where they are.

    No softmax is that of -inf alone. So a clip without keys sees them all, and its values are 0: a pass over a few
    keys, where the result would take one over all pixels. Kernels read the row 16 elements at a time.
    """
    if key_mask is None:
        return None, k, v
    length = key_mask.shape[1]
    left_out = ~key_mask[:, :, None, None]
    seen = key_mask | ~key_mask.any(-1, keepdim=True)
    if padding := -length % 16:
        seen = F.pad(seen, (0, padding))
    bias = seen.to(q.dtype).log().unsqueeze(1).unsqueeze(1)  # of 1 and 0
    bias = bias[..., :length] if padding else bias
    return bias, k.masked_fill(left_out, 0.0), v.masked_fill(left_out, 0.0)


# ---------------------------------------------------------------- what they do not take


def _cudnn_limits(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Iterator[str]:
    yield from _limits_of_a_gpu(q, k, v)
    queries, keys = _lengths(q, k)
    if 1 in (queries, keys):
        yield f"there are {queries} queries and {keys} keys, cuDNN takes no fewer than 2"
    if q.shape[-1] > 128:
        yield f"D is {q.shape[-1]}, cuDNN takes 128"
    if key_mask is not None and dispatch.needs_gradient((q, k, v)):
        yield "key_mask is given and a gradient is needed: cuDNN gives NaN at some lengths"
    if torch.are_deterministic_algorithms_enabled() and dispatch.needs_gradient((q, k, v)):
        yield "a gradient is needed, and torch.use_deterministic_algorithms is on: cuDNN's is not deterministic"
    if _cudnn_version() < CUDNN_VERSION:
        yield f"torch has cuDNN {_cudnn_version() or '(none)'}, it needs {CUDNN_VERSION}"


def _flash_limits(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Iterator[str]:
    if q.device.type == "cpu":
        yield from _copies(q, k, v)
        if q.dtype in HALF:
            yield f"q is {q.dtype} on a CPU, where the reference, which computes in float32, is faster"
        return
    yield from _limits_of_a_gpu(q, k, v)
    if q.dtype not in HALF:
        yield f"q is {q.dtype} on a GPU, where flash attention needs half precision"
    if q.shape[-1] > 192:
        yield f"D is {q.shape[-1]}, flash attention takes 192 on every GPU"
    if key_mask is not None:
        yield "key_mask is given, flash attention takes none on a GPU"


def _efficient_limits(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Iterator[str]:
    yield from _limits_of_a_gpu(q, k, v)


def _limits_of_a_gpu(q: Tensor, k: Tensor, v: Tensor) -> Iterator[str]:
    yield from _copies(q, k, v)
    yield from _misaligned(q, k, v)
    batch, heads, D = q.shape[0] * (q.shape[1] if k.dim() == 6 else 1), *q.shape[4:]
    if batch * heads > MOST_BLOCKS:
        yield f"there are {batch * heads} sequences, torch's kernel takes {MOST_BLOCKS}"
    spans = [size * stride for x in (q, k, v) for size, stride in zip(x.shape, x.stride(), strict=True)]
    if max(q.numel(), *spans) > INT32_MAX:
        yield "the result or an argument spans 2^31 elements, which torch's kernel counts in 32 bits"
    queries = _lengths(q, k)[0] + QUERIES_A_BLOCK  # what the backward keeps is padded
    if dispatch.needs_gradient((q, k, v)) and batch * heads * queries * max(D, 32) > INT32_MAX:
        yield "a gradient of 2^31 elements is needed, which torch's kernel counts in 32 bits"


def _copies(q: Tensor, k: Tensor, v: Tensor) -> Iterator[str]:
    """Axes that fold only in a copy, and a result, ordered in memory as q is, that would have to be put in order."""
    fold = _frames_fold if k.dim() == 6 else _clips_fold
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() == 6 and not fold(x):
            yield f"{name} has strides {tuple(x.stride())}: its axes cannot be folded without a copy"
    strides = [stride for size, stride in zip(q.shape, q.stride(), strict=True) if size > 1]
    if any(outer < inner for outer, inner in pairwise(strides)):
        yield f"q has strides {tuple(q.stride())}: the result would be ordered like it, not contiguous"


def _frames_fold(x: Tensor) -> bool:
    """Whether B and T, and H and W, can be seen as one axis each."""
    (B, T, H, W, _, _), (b, t, h, w, _, _) = x.shape, x.stride()
    return (B == 1 or T == 1 or b == T * t) and (H == 1 or W == 1 or h == W * w)


def _clips_fold(x: Tensor) -> bool:
    """Whether T, H and W can be seen as one axis."""
    (_, T, H, W, _, _), (_, t, h, w, _, _) = x.shape, x.stride()
    return (H == 1 or W == 1 or h == W * w) and (T == 1 or H * W == 1 or t == H * W * (w if W > 1 else h))


def _misaligned(q: Tensor, k: Tensor, v: Tensor) -> Iterator[str]:
    size, D = q.element_size(), q.shape[-1]
    if D * size % ALIGNMENT:
        yield f"D is {D}, it needs a multiple of {ALIGNMENT // size}"
        return
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = [stride for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if length > 1]
        offset = 0 if torch.compiler.is_compiling() else x.storage_offset()  # which Dynamo does not know
        if any(each * size % ALIGNMENT for each in (offset, *strides)):
            yield f"{name} has rows that do not begin at a multiple of {ALIGNMENT} bytes"


def _lengths(q: Tensor, k: Tensor) -> tuple[int, int]:
    """The numbers of queries and keys of one sequence."""
    _, T, H, W, *_ = q.shape
    return (H * W, H * W) if k.dim() == 6 else (T * H * W, k.shape[1])


@dispatch.constant_when_traced
def _cudnn_version() -> int:
    """9.15.1 is 91501; 0 where torch has none."""
    return torch.backends.cudnn.version() or 0


def _backend(
    function: Callable[..., Tensor],
    limits: Callable[..., Iterator[str]],
    devices: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
) -> Backend:
    dense = (("q", -1), ("k", -1), ("v", -1))
    needs = Needs(devices, {"q": dtypes}, dense=dense, capability=(8, 0), gradient=True, limits=limits)
    return Backend(function.__name__, function, needs)


BACKENDS: tuple[Backend, ...] = (
    _backend(cudnn, _cudnn_limits, ("cuda",), HALF),
    _backend(flash, _flash_limits, ("cuda", "cpu"), (*HALF, torch.float32, torch.float64)),
    _backend(efficient, _efficient_limits, ("cuda",), (*HALF, torch.float32)),
)
