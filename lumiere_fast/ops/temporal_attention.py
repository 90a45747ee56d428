"""Self-attention over time, at each pixel by itself.

This is the temporal self-attention that Lumiere stacks in its attention inflation block, at the coarsest level only
(paper, section 3.1 and figure 4c). The paper does not say how attention knows the order of frames; a relative bias and
a rotation by the frame's position (RoFormer, arXiv 2104.09864, section 3.2) are the means offered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lumiere_fast import native
from lumiere_fast.dispatch import Backend, Needs
from lumiere_fast.ops import _layout
from lumiere_fast.ops._checks import check_choice, check_heads, check_integer, check_like, check_tensor
from lumiere_fast.ops._registry import Result, register, traced
from lumiere_fast.ops._spec import LEVELS, Draw, OpSpec, Scenario, at_levels


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    rotary: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`y[t] = sum_s softmax_s(scale * r_t(q[t]) . r_s(k[s]) + bias[head, t - s + T - 1]) v[s]`, each pixel and head.

    `r_t` turns each pair of channels by an angle of the frame's, `(cos, sin) = rotary[t, i]`:
    `x[2i], x[2i + 1] -> x[2i] cos - x[2i + 1] sin, x[2i] sin + x[2i + 1] cos`; without `rotary` it is the identity.

    A frame s is left out where `causal` and s > t, and where `window` is given and |t - s| > window. A row with no
    frame left (a bias of -inf) gives 0. The arithmetic is fp32 (fp64 for fp64), rounded once at the end.
    Differentiable in q, k, v and bias.

    Args:
        q, k, v: (B, T, H, W, heads, D), floating, of one dtype. Views of a fused projection are welcome: any strides,
            and kernels want D dense. B may be 0.
        bias: (heads, 2T - 1), indexed by the lag t - s + T - 1: column T - 1 is a frame's own.
        rotary: (T, D / 2, 2), fp32 (fp64 for fp64), D even. A constant: no gradient is taken of it.
        causal: a frame sees itself and the past.
        window: a frame sees those at most so many frames away; >= 0, None for all.
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
    result: Tensor = _TEMPORAL_ATTENTION(_flatten(q, k, v, bias, rotary, causal, window, scale), backend, out)
    return result


def temporal_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    rotary: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`temporal_attention` in plain torch, by explicit scores: no limit on B*H*W, which torch's fused attention has."""
    dtype = _layout.accumulation_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = (_rotated(each.to(dtype), rotary) for each in (q, k))
    scores = torch.einsum("bthwnd,bshwnd->bhwnts", queries * scale, keys)
    table = _table(q.shape[1], q.device, dtype, bias, causal, window)
    if table is None:
        weights = scores.softmax(-1)
    else:
        empty = (table == float("-inf")).all(-1)  # (heads, T): softmax would be 0/0, and its gradient NaN
        weights = (scores + table.masked_fill(empty[..., None], 0.0)).softmax(-1)
    y = torch.einsum("bhwnts,bshwnd->bthwnd", weights, v.to(dtype))
    if bias is not None and table is not None:  # without a bias a frame sees at least itself
        y = y.masked_fill(empty.T[:, None, None, :, None], 0.0)
    return y.to(q.dtype).contiguous()


def _rotated(x: Tensor, rotary: Tensor | None) -> Tensor:
    """The pairs of channels of (B, T, H, W, heads, D) turned by each frame's angles."""
    if rotary is None:
        return x
    cos, sin = rotary[:, None, None, None].unbind(-1)  # (T, 1, 1, 1, D / 2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _table(
    T: int, device: torch.device, dtype: torch.dtype, bias: Tensor | None, causal: bool, window: int | None
) -> Tensor | None:
    """What is added to the scores (heads or 1, T, T), -inf where a frame is left out; None for nothing."""
    if bias is None and not causal and window is None:
        return None
    frames = torch.arange(T, device=device)
    lag = frames[:, None] - frames
    table = torch.zeros(1, T, T, dtype=dtype, device=device) if bias is None else bias.to(dtype)[:, lag + T - 1]
    if causal:
        table = table.masked_fill(lag < 0, float("-inf"))
    if window is not None:
        table = table.masked_fill(lag.abs() > window, float("-inf"))
    return table


def _flatten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rotary: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[object, ...]:
    op = "temporal_attention"
    check_heads(op, q)
    check_like(op, "k", k, "q", q)
    check_like(op, "v", v, "q", q)
    check_tensor(op, "bias", bias, q, (q.shape[4], 2 * q.shape[1] - 1))
    _check_rotary(op, q, rotary)
    check_choice(op, "causal", causal, (True, False))
    if window is not None and check_integer(op, "window", window) < 0:
        raise ValueError(f"{op}: window must be None or >= 0 frames, got {window}")
    return q, k, v, bias, None if rotary is None else rotary.detach(), causal, window, scale


def _check_rotary(op: str, q: Tensor, rotary: Tensor | None) -> None:
    T, D = q.shape[1], q.shape[5]
    if rotary is not None and D % 2 != 0:
        raise ValueError(f"{op}: rotary turns pairs of channels, so D must be even, got {D}")
    check_tensor(op, "rotary", rotary, q, (T, D // 2, 2))
    precise = _layout.accumulation_dtype(q.dtype)
    if rotary is not None and rotary.dtype != precise:
        raise ValueError(f"{op}: rotary must be {precise} beside q in {q.dtype}, got {rotary.dtype}")


def _describe(q: Tensor, *_: object) -> Result:
    return Result(tuple(q.shape), q.dtype, q.device)


def temporal_attention_backward_cpu(
    gradients: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rotary: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Any, ...]:
    """By the native core, which computes the scores again."""
    tensors = (q, k, v, bias)
    wanted = [each is not None and each.requires_grad for each in tensors]
    arguments: tuple[Any, ...] = (
        gradients[0],
        *(None if each is None else each.detach() for each in tensors),
        rotary,
        causal,
        window,
        scale,
        wanted,
    )
    *found, of_bias = (_NATIVE_BACKWARD if traced() else _native_backward)(*arguments)
    if bias is not None:
        found.append(of_bias.to(bias.dtype))
    results = [each if is_wanted else None for each, is_wanted in zip(found, wanted, strict=False)]
    return (*results, *[None] * (8 - len(results)))


def _native_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rotary: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and bias, each empty where it is not `wanted`."""
    found = _backward_results(gradient, q, k, v, bias, rotary, causal, window, scale, wanted)
    out = tuple(each if is_wanted else None for each, is_wanted in zip(found, wanted, strict=True))
    native.temporal_attention_backward(gradient, q, k, v, bias, rotary, causal, window, scale, out=out)
    return found


def _backward_results(gradient: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted, lags = rest[-1], (q.shape[4], 2 * q.shape[1] - 1)
    of_q, of_k, of_v = (q.new_empty(q.shape if is_wanted else 0) for is_wanted in wanted[:3])
    return of_q, of_k, of_v, q.new_empty(lags if wanted[3] else 0, dtype=torch.float32)


# Only traces, which cannot see a call into the native core, take this way round.
_NATIVE_BACKWARD = torch.library.custom_op(
    "lumiere_fast::temporal_attention_backward_cpu",
    _native_backward,
    mutates_args=(),
    schema="(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? rotary, bool causal, int? window, "
    "float? scale, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)
_NATIVE_BACKWARD.register_fake(_backward_results)


_BACKWARD_CPU = f"{__name__}:temporal_attention_backward_cpu"
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CPU = Needs(devices=("cpu",), dtypes={"q": _NARROW}, gradient=True, native="cpu")

_TEMPORAL_ATTENTION = register(
    temporal_attention,
    temporal_attention_reference,
    _flatten,
    _describe,
    backends=(Backend("cpu", "lumiere_fast.native:temporal_attention", _CPU, backward=_BACKWARD_CPU),),
)


PAPER_ATTENTION = tuple(level for level in LEVELS if level[0] in ("base3", "ssr3"))
DEMO_ATTENTION = tuple(level for level in LEVELS if level[0] == "demo2")
LONG = (
    ("long_t80", {"B": 1, "C": 256, "T": 80, "H": 32, "W": 32}, False),
    ("cpu_t16", {"B": 2, "C": 128, "T": 16, "H": 8, "W": 8}, True),
    ("cpu_t80", {"B": 1, "C": 64, "T": 80, "H": 8, "W": 8}, True),
)
SCENARIOS = (
    *at_levels({}, PAPER_ATTENTION, D=64),
    *at_levels({}, DEMO_ATTENTION, D=32),
    *at_levels({}, LONG, D=64),
)


def _flops(scenario: Scenario) -> int:
    return 2 * 2 * scenario.count("BTTHWC")


def _bytes(scenario: Scenario, dtype: torch.dtype) -> int:
    return 4 * scenario.count("BTHWC") * dtype.itemsize


def _make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, object]:
    """q, k, v are views of one fused projection, with a relative bias, as the model has them."""
    draw = Draw(device, dtype, generator)
    heads = scenario.sizes["C"] // scenario.sizes["D"]
    fused = draw(*scenario.shape("BTHW"), 3, heads, scenario.sizes["D"])
    q, k, v = fused.unbind(4)
    return {"q": q, "k": k, "v": v, "bias": draw(heads, 2 * scenario.sizes["T"] - 1)}


SPEC = OpSpec("temporal_attention", SCENARIOS, _flops, _bytes, _make_inputs)
