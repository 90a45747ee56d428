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
from lumiere_fast.ops._checks import (
    check_choice,
    check_heads,
    check_integer,
    check_like,
    check_parameter,
    check_scale,
    check_tensor,
)
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
    frame left (a bias of -inf) gives 0. A number that is not finite may spoil all of its pixel, even where it is left
    out. The arithmetic is fp32 (fp64 for fp64), rounded once at the end. Differentiable in q, k, v and bias.

    Args:
        q, k, v: (B, T, H, W, heads, D), floating, of one dtype. Views of a fused projection are welcome: any strides,
            and kernels want D dense. B may be 0.
        bias: (heads, 2T - 1), indexed by the lag t - s + T - 1: column T - 1 is a frame's own. In the dtype of q, or in
            fp32 (fp64 for fp64).
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
    check_parameter(op, "bias", bias, q, (q.shape[4], 2 * q.shape[1] - 1), other="q")
    _check_rotary(op, q, rotary)
    check_choice(op, "causal", causal, (True, False))
    window = None if window is None else check_integer(op, "window", window)
    if window is not None and window < 0:
        raise ValueError(f"{op}: window must be None or >= 0 frames, got {window}")
    rotary = None if rotary is None else rotary.detach()
    return q, k, v, bias, rotary, bool(causal), window, check_scale(op, scale)


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


MOST_HEAD_DIM = 128  # of the Triton kernels


def triton_limits(q: Tensor, *_: object) -> list[str]:
    """Why the Triton kernels cannot serve a call."""
    D = q.shape[5]
    return [f"D must be at most {MOST_HEAD_DIM}, got {D}"] if D > MOST_HEAD_DIM else []


_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_KERNELS = "lumiere_fast.kernels.temporal_attention"
_TRITON = Needs(
    devices=("cuda",),
    dtypes={"q": _NARROW},
    capability=(8, 0),
    gradient=True,
    modules=("triton",),
    limits=triton_limits,
)
_BACKWARD_CPU = f"{__name__}:temporal_attention_backward_cpu"
_CPU = Needs(devices=("cpu",), dtypes={"q": _NARROW}, gradient=True, native="cpu")

_TEMPORAL_ATTENTION = register(
    temporal_attention,
    temporal_attention_reference,
    _flatten,
    _describe,
    backends=(
        Backend(
            "triton",
            f"{_KERNELS}:temporal_attention",
            _TRITON,
            backward=f"{_KERNELS}_backward:temporal_attention_backward",
        ),
        Backend("cpu", "lumiere_fast.native:temporal_attention", _CPU, backward=_BACKWARD_CPU),
    ),
)


_PAPER = tuple(level for level in LEVELS if level[0] in ("base3", "ssr3"))
_DEMO = tuple(level for level in LEVELS if level[0] == "demo2")


def _video(
    name: str, T: int, H: int, W: int, heads: int, D: int, *, B: int = 1, cpu: bool = False, **options: Any
) -> Scenario:
    return Scenario(name, {"B": B, "C": heads * D, "T": T, "H": H, "W": W, "D": D}, options, cpu)


# The temporal attention of diffusers' Stable Video Diffusion (576x1024, both releases) and AnimateDiff's motion modules
# (512x512), with guidance. AnimateDiff's coarsest levels have heads of 160 channels, which no fused kernel takes.
_SVD = ((5, 72, 128), (10, 36, 64), (20, 18, 32), (20, 9, 16))
SVD = tuple(
    _video(f"{name}{i}", T, H, W, heads, 64, B=2)
    for name, T in (("svd", 14), ("svd_xt", 25))
    for i, (heads, H, W) in enumerate(_SVD)
)
ANIMATEDIFF = (
    _video("animatediff0", 16, 64, 64, 8, 40, B=2),
    _video("animatediff1", 16, 32, 32, 8, 80, B=2),
)
LONG = (80, 64, 64, 4, 64)  # T, H, W, heads, D
HOST = (16, 32, 32, 4, 32)

SCENARIOS = (
    *at_levels({}, _PAPER, D=64),
    *at_levels({"bias": True}, _PAPER, suffix="_bias", D=64),
    *at_levels({"rotary": True}, _PAPER, suffix="_rotary", D=64),
    _video("ssr_window", 8, 128, 128, 16, 64),
    *SVD,
    *ANIMATEDIFF,
    _video("heads_of_128", 16, 64, 64, 8, 128),
    _video("long", *LONG),
    _video("long_bias", *LONG, bias=True),
    _video("long_rotary", *LONG, rotary=True),
    _video("long_causal", *LONG, causal=True),
    _video("long_window", *LONG, window=8),
    *at_levels({}, _DEMO, D=32),
    _video("host_t14", 14, 32, 32, 4, 32, cpu=True),
    _video("host_t16", *HOST, cpu=True),
    _video("host_t16_bias", *HOST, cpu=True, bias=True),
    _video("host_t16_rotary", *HOST, cpu=True, rotary=True),
    _video("host_t16_causal", *HOST, cpu=True, causal=True),
    _video("host_t80", 80, 8, 8, 4, 64, cpu=True),
    _video("host_t80_bias", 80, 8, 8, 4, 64, cpu=True, bias=True),
)


def _check(name: str, T: int, D: int = 32, *, H: int = 1, W: int = 7, **options: Any) -> Scenario:
    """Two clips, three heads, and a prime number of pixels unless told otherwise."""
    return _video(name, T, H, W, 3, D, B=2, **options)


CHECKS = (
    _check("one_frame", 1, bias=True),
    _check("two_frames", 2, 40, causal=True),
    _check("prime_frames", 17, 80, bias=True, rotary=True),
    _check("many_frames", 100, 40, bias=True, window=20),
    _check("beyond_a_tile", 129, 16, rotary=True, causal=True),
    _check("heads_of_96", 5, 96, window=1, scale=0.3),
    _check("heads_of_128", 65, 128, bias=True, causal=True, window=70),
    _check("odd_heads", 6, 5, bias=True),
    _check("rows_that_see_nothing", 9, bias=True, empty=True, causal=True),
    _check("layouts_of_their_own", 10, H=3, bias=True, rotary=True, strided=True),
)

# What a grid's second axis does not count to.
GPU_CHECKS = (_video("many_sequences", 3, 257, 257, 2, 16, bias=True),)


def _flops(scenario: Scenario) -> int:
    """Of every pair of frames, also of those that a mask leaves out."""
    return 2 * 2 * scenario.count("BTTHWC")


def _bytes(scenario: Scenario, dtype: torch.dtype) -> int:
    return 4 * scenario.count("BTHWC") * dtype.itemsize


def _make_inputs(
    scenario: Scenario, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, object]:
    """q, k, v are views of one fused projection, as the model has them.

    Options: "bias" and "rotary" for these tensors, and the arguments that are none by their names. Of checks alone:
    "empty", whose first head's bias leaves its first frames nothing to see, and "strided", of unlike layouts.
    """
    options = scenario.options
    draw = Draw(device, dtype, generator)
    T, D = scenario.shape("TD")
    heads = scenario.sizes["C"] // D
    q, k, v = draw(*scenario.shape("BTHW"), 3, heads, D).unbind(4)
    if options.get("strided"):
        k, v = k.transpose(1, 3).contiguous().transpose(1, 3), v.transpose(0, 4).contiguous().transpose(0, 4)
    call: dict[str, object] = {"q": q, "k": k, "v": v}
    if options.get("bias"):
        bias = draw(heads, 2 * T - 1)
        if options.get("empty"):
            bias[0, T // 2 :] = float("-inf")
        call["bias"] = bias
    if options.get("rotary"):
        call["rotary"] = _angles(T, D, device, _layout.accumulation_dtype(dtype))
    return {**call, **{name: options[name] for name in ("causal", "window", "scale") if name in options}}


def _angles(T: int, D: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """RoFormer's: pair i turns by 10000 ** (-2i / D) a frame."""
    pairs = torch.arange(0, D, 2, device=device, dtype=torch.float64)
    angles = torch.arange(T, device=device)[:, None] * 10000.0 ** (-pairs / D)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)


SPEC = OpSpec(
    "temporal_attention",
    SCENARIOS,
    _flops,
    _bytes,
    _make_inputs,
    CHECKS,
    GPU_CHECKS,
    rounds_operands=True,
    constants=("rotary",),
)
