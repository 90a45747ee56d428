"""Attention within each frame: over its own pixels, or over the words of the prompt.

The self- and cross-attention of the text-to-image model that Lumiere inflates, unchanged: frames do not see each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast import dispatch
from lumiere_fast.dispatch import Backend, Needs
from lumiere_fast.ops import _layout, _sdpa
from lumiere_fast.ops._checks import (
    check_device,
    check_heads,
    check_is_tensor,
    check_like,
    check_same_dtype,
    check_scale,
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
    of which those with `key_mask` False are left out, whatever is in them; where all are, the result is 0. The
    arithmetic is fp32 (fp64 for fp64), rounded once at the end. Differentiable in q, k, v, but no second time: torch's
    fused kernels, which the reference comes to as well, have no second derivative.

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
    mask = None
    if key_mask is not None:
        left_out = ~key_mask[:, :, None, None]
        keys, values = keys.masked_fill(left_out, 0.0), values.masked_fill(left_out, 0.0)  # 0 * NaN would be NaN
        mask = (key_mask | ~key_mask.any(-1, keepdim=True))[:, None, None]  # a clip without keys sees all: values of 0
    queries, keys, values = (a.transpose(1, 2) for a in (queries, keys, values))
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
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
    return q, k, v, key_mask, check_scale(op, scale)


def _check_keys(op: str, q: Tensor, k: Tensor) -> None:
    L = k.shape[1]
    if L < 1:
        raise ValueError(f"{op}: k must hold at least one key, got {tuple(k.shape)}")
    check_tensor(op, "k", k, q, (q.shape[0], L, *q.shape[4:]))
    check_same_dtype(op, "k", k, "q", q)


def _describe(q: Tensor, *_: object) -> Result:
    return Result(tuple(q.shape), q.dtype, q.device)


def _case(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> str:
    """What the fastest backend depends on, by which the table of their order is kept.

    On a CPU the reference comes to torch's flash kernel too, in fp32.
    """
    if q.device.type == "cpu":
        return "cpu"
    D = q.shape[-1]
    width = "half" if q.dtype.itemsize == 2 else "single"
    heads = "d32" if D <= 32 else "d64" if D <= 64 else "d128"
    if k.dim() == 6:
        keys = q.shape[2] * q.shape[3]
        kind = "self-few" if keys <= 256 else "self-some" if keys <= 1024 else "self-many"
    else:
        kind = "text" if key_mask is None else "text-masked"
    return f"{width}-{heads}-{kind}-{'gradient' if dispatch.needs_gradient((q, k, v)) else 'forward'}"


_TRITON = Needs(
    devices=("cuda",),
    dtypes={"q": (torch.float16, torch.bfloat16, torch.float32)},
    capability=(8, 0),
    gradient=True,  # by the best of torch's own kernels, run again
    modules=("triton",),
)

_SPATIAL_ATTENTION = register(
    spatial_attention,
    spatial_attention_reference,
    _flatten,
    _describe,
    backends=(
        Backend("triton", "lumiere_fast.kernels.spatial_attention:spatial_attention", _TRITON),
        *_sdpa.BACKENDS,
    ),
    case=_case,
)


_PAPER = tuple(level for level in LEVELS if level[0] in ("base1", "base2", "base3", "ssr3"))
_DEMO = tuple(level for level in LEVELS if level[0] in ("demo1", "demo2"))


def _video(
    name: str,
    T: int,
    H: int,
    W: int,
    heads: int,
    D: int,
    *,
    B: int = 1,
    L: int | None = None,
    cpu: bool = False,
    **options: Any,
) -> Scenario:
    """Attention of each frame to itself, or with L to so many words."""
    sizes = {"B": B, "C": heads * D, "T": T, "H": H, "W": W, "D": D, **({} if L is None else {"L": L})}
    return Scenario(name, sizes, {"text": L is not None, **options}, cpu)


SCENARIOS = (
    *at_levels({"text": False}, _PAPER, D=64),
    *at_levels({"text": True}, _PAPER, suffix="_text", D=64, L=128),
    # AnimateDiff's levels (512x512), the text-to-image model's heads of 40 and 80 channels; Stable Video Diffusion's.
    _video("animatediff0", 16, 64, 64, 8, 40),
    _video("animatediff0_text", 16, 64, 64, 8, 40, L=77),
    _video("animatediff1", 16, 32, 32, 8, 80),
    _video("svd0", 14, 72, 128, 5, 64),
    _video("svd1", 14, 36, 64, 10, 64),
    _video("heads_of_128", 16, 64, 64, 8, 128),
    *at_levels({"text": False}, _DEMO, D=32),
    *at_levels({"text": True}, _DEMO, suffix="_text", D=32, L=32),
    _video("host", 4, 32, 32, 4, 32, cpu=True),
    _video("host_text", 4, 32, 32, 4, 32, L=77, cpu=True),
)


def _check(name: str, H: int, W: int, D: int = 32, *, L: int | None = None, **options: Any) -> Scenario:
    """Two clips of two frames, three heads."""
    return _video(name, 2, H, W, 3, D, B=2, L=L, **options)


CHECKS = (
    _check("one_pixel", 1, 1, 64),
    _check("prime_pixels", 1, 17, 40),
    _check("beyond_a_tile", 1, 129, 80),
    _check("heads_of_96", 9, 7, 96, scale=0.3),
    _check("heads_of_128", 10, 10, 128),
    _check("odd_heads", 3, 3, 5),
    _check("one_word", 3, 5, 64, L=1),
    _check("words", 3, 5, 40, L=77),
    _check("words_without_a_mask", 3, 5, 64, L=77, masked=False),
    _check("words_beyond_a_tile", 8, 8, 64, L=257),
    _check("clip_without_words", 3, 5, 32, L=20, empty=True),
    _check("layouts_of_their_own", 5, 5, 64, strided=True),
)

# Frames times heads past what a grid's second axis counts to.
GPU_CHECKS = (_video("many_sequences", 8200, 4, 4, 8, 16),)


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
    """Views of one fused projection; before text, half of each prompt's keys are padding.

    Options, of checks alone: "scale"; "masked", False for keys without a mask; "empty", where all keys of the first
    prompt are padding; "strided", of layouts that are unlike.
    """
    options = scenario.options
    draw = Draw(device, dtype, generator)
    heads, D = scenario.sizes["C"] // scenario.sizes["D"], scenario.sizes["D"]
    call: dict[str, object] = {"scale": options["scale"]} if "scale" in options else {}
    if not options["text"]:
        q, k, v = draw(*scenario.shape("BTHW"), 3, heads, D).unbind(4)
        if options.get("strided"):
            k, v = k.transpose(2, 3).contiguous().transpose(2, 3), v.transpose(1, 4).contiguous().transpose(1, 4)
        return {**call, "q": q, "k": k, "v": v}
    B, L = scenario.shape("BL")
    k, v = draw(B, L, 2, heads, D).unbind(2)
    call |= {"q": draw(*scenario.shape("BTHW"), heads, D), "k": k, "v": v}
    if not options.get("masked", True):
        return call
    mask = (torch.arange(L, device=device) < (L + 1) // 2).repeat(B, 1)
    if options.get("empty"):
        mask[0] = False
    return {**call, "key_mask": mask}


SPEC = OpSpec("spatial_attention", SCENARIOS, _flops, _bytes, _make_inputs, CHECKS, GPU_CHECKS, rounds_operands=True)
