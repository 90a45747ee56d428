"""Attention within each frame: over its own pixels, or over the words of the prompt.

The self- and cross-attention of the text-to-image model that Lumiere inflates, unchanged: frames do not see each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast.dispatch import Backend, Needs
from lumiere_fast.ops import _layout
from lumiere_fast.ops._checks import (
    check_device,
    check_heads,
    check_is_tensor,
    check_like,
    check_same_dtype,
    check_tensor,
)
from lumiere_fast.ops._registry import Result, register
from lumiere_fast.ops._spec import LEVELS, Draw, OpSpec, Scenario, at_levels


def spatial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`y[p] = sum_s softmax_s(scale * q[p] . k[s]) v[s]` for each frame, pixel p and head.

    s runs over the H*W pixels of the same frame (self-attention), or over the L keys of the clip (cross-attention),
    of which those with `key_mask` False are left out; where all are, the result is 0. The arithmetic is fp32 (fp64
    for fp64), rounded once at the end. Differentiable in q, k, v.

    Args:
        q: (B, T, H, W, heads, D), floating. Views of a fused projection are welcome: any strides, and kernels want D
            dense. B may be 0.
        k, v: as q for self-attention; (B, L, heads, D) with L >= 1 for cross-attention. The dtype of q.
        key_mask: (B, L) bool, True where a key is attended to; cross-attention only.
        scale: None for D ** -0.5.
        backend: None for the current choice; see `lumiere_fast.dispatch`.
        out: receives the result; only where nothing needs a gradient. May not overlap the inputs.

    Returns:
        (B, T, H, W, heads, D), contiguous, in the dtype of q: `flatten(-2)` is a view, rows of a channels_last_3d
        activation.

    Raises:
        ValueError: an argument is not as above.
        BackendUnavailable: a backend asked for by name cannot run this call.
    """
    result: Tensor = _SPATIAL_ATTENTION(_flatten(q, k, v, key_mask, scale), backend, out)
    return result


def spatial_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`spatial_attention` in plain torch: frames fold into the batch, or, before text, into their clip's queries."""
    dtype = _layout.accumulation_dtype(q.dtype)
    if k.dim() == 6:
        queries, keys, values = (a.to(dtype).flatten(2, 3).flatten(0, 1) for a in (q, k, v))
    else:
        queries, keys, values = q.to(dtype).flatten(1, 3), k.to(dtype), v.to(dtype)
    mask = empty = None
    if key_mask is not None:
        empty = ~key_mask.any(-1)[:, None, None, None]
        mask = key_mask[:, None, None] | empty  # a row without keys is softmax(-inf): let it see all, then take it away
    queries, keys, values = (a.transpose(1, 2) for a in (queries, keys, values))
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    y = y if empty is None else y.masked_fill(empty, 0.0)
    return y.transpose(1, 2).reshape(q.shape).to(q.dtype).contiguous()


def _flatten(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> tuple[object, ...]:
    op = "spatial_attention"
    check_heads(op, q)
    check_is_tensor(op, "k", k)
    if k.dim() == 4:
        _check_keys(op, q, k)
    else:
        check_like(op, "k", k, "q", q)
    check_like(op, "v", v, "k", k)
    if key_mask is not None:
        check_is_tensor(op, "key_mask", key_mask)
        if k.dim() != 4 or key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]:
            raise ValueError(
                f"{op}: key_mask must be bool (B, L) beside k (B, L, heads, D), "
                f"got {key_mask.dtype} {tuple(key_mask.shape)} beside k {tuple(k.shape)}"
            )
        check_device(op, "key_mask", key_mask, q)
    return q, k, v, key_mask, scale


def _check_keys(op: str, q: Tensor, k: Tensor) -> None:
    L = k.shape[1]
    if L < 1:
        raise ValueError(f"{op}: k must hold at least one key, got {tuple(k.shape)}")
    check_tensor(op, "k", k, q, (q.shape[0], L, *q.shape[4:]))
    check_same_dtype(op, "k", k, "q", q)


def _describe(q: Tensor, *_: object) -> Result:
    return Result(tuple(q.shape), q.dtype, q.device)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON = Needs(devices=("cuda",), dtypes={"q": _DTYPES}, capability=(8, 0), modules=("triton",))

_SPATIAL_ATTENTION = register(
    spatial_attention,
    spatial_attention_reference,
    _flatten,
    _describe,
    backends=(Backend("triton", "lumiere_fast.kernels.spatial_attention:spatial_attention", _TRITON),),
)


PAPER_ATTENTION = tuple(level for level in LEVELS if level[0] in ("base1", "base2", "base3", "ssr3"))
DEMO_ATTENTION = tuple(level for level in LEVELS if level[0] in ("demo1", "demo2"))
SCENARIOS = (
    *at_levels({"text": False}, PAPER_ATTENTION, D=64),
    *at_levels({"text": False}, DEMO_ATTENTION, D=32),
    *at_levels({"text": True}, PAPER_ATTENTION, suffix="_text", D=64, L=128),
    *at_levels({"text": True}, DEMO_ATTENTION, suffix="_text", D=32, L=32),
)


def _keys(scenario: Scenario) -> int:
    return scenario.count("L") if scenario.options["text"] else scenario.count("HW")


def _flops(scenario: Scenario) -> int:
    return 2 * 2 * scenario.count("BTHWC") * _keys(scenario)


def _bytes(scenario: Scenario, dtype: torch.dtype) -> int:
    keys = scenario.count("BLC") if scenario.options["text"] else scenario.count("BTHWC")
    return 2 * (scenario.count("BTHWC") + keys) * dtype.itemsize


def _make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, object]:
    """Views of one fused projection; before text, half of each prompt's keys are padding."""
    draw = Draw(device, dtype, generator)
    heads, D = scenario.sizes["C"] // scenario.sizes["D"], scenario.sizes["D"]
    if not scenario.options["text"]:
        q, k, v = draw(*scenario.shape("BTHW"), 3, heads, D).unbind(4)
        return {"q": q, "k": k, "v": v}
    B, L = scenario.shape("BL")
    k, v = draw(B, L, 2, heads, D).unbind(2)
    mask = (torch.arange(L, device=device) < L // 2).expand(B, L)
    return {"q": draw(*scenario.shape("BTHW"), heads, D), "k": k, "v": v, "key_mask": mask}


SPEC = OpSpec("spatial_attention", SCENARIOS, _flops, _bytes, _make_inputs)
