"""temporal_attention against pixels rearranged into the batch of torch's own attention, by each of its backends.

The rearranged q, k, v and the result are held from call to call, as ours is. Rotations and tables of masks and biases
are layers of their own to torch's attention, and are made in each call, of what a model has: its angles and its bias.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, Side, each_scenario
from lumiere_fast.ops import temporal_attention
from lumiere_fast.ops._spec import OpSpec, Scenario
from lumiere_fast.ops.temporal_attention import SPEC

# Takes q, k, v as (pixels, heads, T, D), and what is added to the scores or None, or that they are causal.
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]

MOST_SEQUENCES = 65535  # past it, the grids of torch's fused kernels are too large, and some crash instead of saying so


def rearrange(x: Tensor) -> Tensor:
    """b t h w n d -> (b h w) n t d, copied."""
    B, T, H, W, heads, D = x.shape
    return x.permute(0, 2, 3, 4, 1, 5).reshape(B * H * W, heads, T, D).contiguous()


def back(y: Tensor, like: Tensor) -> Tensor:
    B, T, H, W, heads, D = like.shape
    return y.reshape(B, H, W, heads, T, D).permute(0, 4, 1, 2, 3, 5).contiguous()


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def sdpa_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if q.is_cuda and kernel != SDPBackend.MATH and len(q) > MOST_SEQUENCES:
        raise RuntimeError(f"{len(q)} sequences are more than its grid takes")
    with sdpa_kernel(kernel):
        return sdpa(q, k, v, mask, causal)


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        mask = lag_table(q.shape[2], None, True, None, q)
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    added = LowerTriangularMask() if causal else mask
    if isinstance(added, Tensor):
        added = added.expand(len(q), q.shape[1], -1, -1)
    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=added).transpose(1, 2)


def lag_table(T: int, bias: Tensor | None, causal: bool, window: int | None, like: Tensor) -> Tensor:
    """(1, heads or 1, T, T), to be added to the scores."""
    frames = torch.arange(T, device=like.device)
    lag = frames[:, None] - frames
    table = like.new_zeros(1, T, T) if bias is None else bias[:, lag + T - 1]
    if causal:
        table = table.masked_fill(lag < 0, float("-inf"))
    if window is not None:
        table = table.masked_fill(lag.abs() > window, float("-inf"))
    return table[None]  # torch's flash attention takes four axes, or two


def turned(x: Tensor, rotary: Tensor | None) -> Tensor:
    """As a rotary layer does it before attention."""
    if rotary is None:
        return x
    cos, sin = rotary.to(x.dtype)[:, None, None, None].unbind(-1)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def layers(
    attend: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    rotary: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    *,
    rearranged: Callable[[Tensor], Tensor] = rearrange,
    restored: Callable[[Tensor, Tensor], Tensor] = back,
) -> Tensor:
    """Rotation, rearranging, attention, and back."""
    plain = bias is None and window is None
    mask = None if plain else lag_table(q.shape[1], bias, causal, window, q)
    folded = (rearranged(each) for each in (turned(q, rotary), turned(k, rotary), v))
    return restored(attend(*folded, mask, causal and plain), q)


class Held:
    """`rearrange` and `back` into memory that is kept: three tensors in turn, and a result."""

    def __init__(self, q: Tensor) -> None:
        self.rearranged = [rearrange(q) for _ in range(3)]
        self.result = q.new_empty(q.shape)

    def rearrange(self, x: Tensor) -> Tensor:
        B, T, H, W, heads, D = x.shape
        self.rearranged.append(self.rearranged.pop(0))
        self.rearranged[-1].view(B, H, W, heads, T, D).copy_(x.permute(0, 2, 3, 4, 1, 5))
        return self.rearranged[-1]

    def back(self, y: Tensor, like: Tensor) -> Tensor:
        B, T, H, W, heads, D = like.shape
        return self.result.copy_(y.reshape(B, H, W, heads, T, D).permute(0, 4, 1, 2, 3, 5))


def of_views(x: Tensor) -> Tensor:
    """(b h w) n t d of one clip without a copy, where its rows lie evenly."""
    return x.permute(0, 2, 3, 4, 1, 5).flatten(0, 2)


ATTENTIONS: Mapping[str, Attention] = {
    "rearrange + SDPA": sdpa,
    "rearrange + SDPA flash": partial(sdpa_by, SDPBackend.FLASH_ATTENTION),
    "rearrange + SDPA efficient": partial(sdpa_by, SDPBackend.EFFICIENT_ATTENTION),
    "rearrange + SDPA cuDNN": partial(sdpa_by, SDPBackend.CUDNN_ATTENTION),
    "rearrange + SDPA math": partial(sdpa_by, SDPBackend.MATH),
    "rearrange + xFormers": xformers,
    "rearrange + matmul": matmul,
}
OF_GPUS = ("rearrange + SDPA efficient", "rearrange + SDPA cuDNN", "rearrange + xFormers")


def attentions(case: Case) -> dict[str, Attention]:
    """Those that there are here."""
    without = OF_GPUS if case.device != "cuda" else () if importlib.util.find_spec("xformers") else OF_GPUS[-1:]
    return {name: attend for name, attend in ATTENTIONS.items() if name not in without}


@each_scenario(SPEC)
def test_temporal_attention(case: Case) -> None:
    held = Held(case.inputs["q"])
    into = {"rearranged": held.rearrange, "restored": held.back}
    sides: dict[str, Side] = {
        name: partial(layers, attend, **case.inputs, **into) for name, attend in attentions(case).items()
    }
    if case.scenario.sizes["B"] == 1:
        sides["SDPA of views"] = partial(layers, sdpa, **case.inputs, rearranged=of_views, restored=held.back)
    case.compare(sides, limits=case.copy(), compiled=partial(layers, sdpa))


BACKWARD = ("base3", "base3_bias", "svd0", "animatediff0", "long", "long_bias", "host_t16", "host_t16_bias", "host_t80")


def _backward(scenario: Scenario) -> Scenario:
    return replace(scenario, name=f"{scenario.name}_backward", options={**scenario.options, "backward": True})


# Of the gradients alone: q, k, v and the result's are read, three are written; five products instead of two.
BACKWARD_SPEC = OpSpec(
    SPEC.name,
    tuple(_backward(each) for each in SPEC.scenarios if each.name in BACKWARD),
    lambda scenario: SPEC.flops(scenario) * 5 // 2,
    lambda scenario, dtype: SPEC.bytes(scenario, dtype) * 7 // 4,
    SPEC.make_inputs,
)


def gradients(case: Case, forward: Callable[..., Tensor]) -> Side:
    """A side that goes back through a forward pass, which its first call makes."""
    tensors = {name: value.detach() for name, value in case.inputs.items() if isinstance(value, Tensor)}
    leaves = [value.requires_grad_() for name, value in tensors.items() if name not in SPEC.constants]

    @functools.cache
    def graph() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = forward(**{**case.inputs, **tensors})
        return y, case.inputs["q"].contiguous()  # as good as any

    def side() -> tuple[Tensor, ...]:
        y, above = graph()
        return torch.autograd.grad(y, leaves, above, retain_graph=True)

    return side


@each_scenario(BACKWARD_SPEC)
def test_temporal_attention_backward(case: Case) -> None:
    ours = gradients(case, partial(temporal_attention, backend=case.backend))
    sides = {name: gradients(case, partial(layers, attend)) for name, attend in attentions(case).items()}
    case.compare(sides, limits=case.copy(), ours=ours)
