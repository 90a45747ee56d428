"""The layers of both U-Nets, spatial (text-to-image) and temporal (inflation).

Every layer maps a video activation `(B, C, T, H, W)` in channels_last_3d memory to another one. Spatial layers treat
the frames as independent images, so a text-to-image model is the case T = 1, or any T frame by frame. Folding to frames
or to rows is a view of that memory: nothing here copies to change layout.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumiere_fast import ops
from lumiere_fast.models.config import check_temporal_positions
from lumiere_fast.ops._checks import check_activation, check_integer
from lumiere_fast.ops._layout import accumulation_dtype, fold_frames
from lumiere_fast.ops._layout import from_rows as channels_first
from lumiere_fast.ops._layout import to_rows as channels_last

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)
Stats = tuple[Tensor, Tensor]
"""Mean and reciprocal deviation of an activation by frame and group, (B, T, G) each: what a group norm goes by."""


class TextKeys(NamedTuple):
    """What a cross-attention reads of the text: keys and values (B, L, heads, D), mask (B, L), True at real tokens."""

    keys: Tensor
    values: Tensor
    mask: Tensor


def unfold_frames(x: Tensor, num_frames: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W), the view back; inverse of `fold_frames`."""
    return x.unflatten(0, (x.shape[0] // num_frames, num_frames)).transpose(1, 2)


def channels_last_weights(model: Model) -> Model:
    """The same model, the input channels of its convolution weights dense in memory like those of the activations."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave this form out
    for module in model.modules():
        if isinstance(module, TemporalKernel):
            module.weight.data = module.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    return model


def autocast_is_on(device: torch.device) -> bool:
    """Whether layers on `device` now choose the dtype of their arithmetic themselves."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def sinusoidal_embedding(positions: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """`[cos(p f_i), sin(p f_i)]`, f_i geometric from 1 to 1/max_period; (N,) -> (N, dim), fp32."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class FrameConv2d(nn.Conv2d):
    """`nn.Conv2d` over every frame of a video activation."""

    def forward(self, x: Tensor) -> Tensor:
        return unfold_frames(super().forward(fold_frames(x)), x.shape[2])


class FrameGroupNorm(nn.Module):
    """Group norm over each frame, with optional scale and shift (FiLM) and SiLU in the same pass."""

    def __init__(self, num_groups: int, channels: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None, act: str | None = None
    ) -> Tensor:
        return ops.group_norm(x, self.num_groups, self.weight, self.bias, scale=scale, shift=shift, act=act)

    def stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics of `x`, for `applied`."""
        return ops.group_norm_stats(x, self.num_groups)

    def applied(
        self, stats: Stats, scale: Tensor | None = None, shift: Tensor | None = None, *, act: str | None
    ) -> ops.NormArgs:
        """This norm as what the temporal convolution of the normalised activation does while it reads."""
        return ops.NormArgs(*stats, self.weight, self.bias, self.num_groups, scale, shift, act)


class ChannelLinear(nn.Linear):
    """`nn.Linear` over the channels of a video activation: a temporal convolution of one tap, and what that fuses.

    In training on a CPU, where the convolution has no kernel, it is torch's Linear, 1.07 times faster in a layer.
    """

    def forward(self, x: Tensor, *, norm: ops.NormArgs | None = None, residual: Tensor | None = None) -> Tensor:
        if norm is None and x.device.type == "cpu" and torch.is_grad_enabled():
            y = channels_first(super().forward(channels_last(x)))
            return y if residual is None else residual + y
        return ops.temporal_conv(x, self.weight[:, :, None], self.bias, norm=norm, residual=residual)

    def after_norm(
        self,
        x: Tensor,
        norm: FrameGroupNorm,
        stats: Stats | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        act: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`linear(act(film(norm(x)))) + residual`; `stats` are those of `x`, where its producer took them.

        In training the norm is an op of its own, whose backward takes fewer passes than that of its parts.
        """
        if torch.is_grad_enabled():
            return self(norm(x, scale=scale, shift=shift, act=act), residual=residual)
        args = norm.applied(norm.stats(x) if stats is None else stats, scale, shift, act=act)
        return self(x, norm=args, residual=residual)

    def before_norm(self, x: Tensor, residual: Tensor, groups: int | None) -> tuple[Tensor, Stats | None]:
        """`linear(x) + residual` and, for a norm of so many groups that follows, its statistics: not in training."""
        if groups is None or torch.is_grad_enabled():
            return self(x, residual=residual), None
        return ops.temporal_conv(x, self.weight[:, :, None], self.bias, residual=residual, stats_groups=groups)


class ScaleShift(nn.Module):
    """`Linear(SiLU(embedding))` split into the (scale, shift) of a group norm; zero-initialised: no change at first."""

    def __init__(self, embed_dim: int, channels: int) -> None:
        super().__init__()
        self.proj = zero_init(nn.Linear(embed_dim, 2 * channels))

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.proj(F.silu(embedding)).chunk(2, dim=-1)
        return scale, shift


def zero_init(layer: Layer) -> Layer:
    """The same layer with weight and bias 0."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


# Spatial layers: the text-to-image model ----------------------------------------------------------------------------


class ResnetBlock2D(nn.Module):
    """`x + conv(silu(film(norm(conv(silu(norm(x)))))))` with a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = FrameGroupNorm(num_groups, in_channels)
        self.conv1 = FrameConv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = ScaleShift(embed_dim, out_channels)
        self.norm2 = FrameGroupNorm(num_groups, out_channels)
        self.conv2 = zero_init(FrameConv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = FrameConv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, act="silu"))
        scale, shift = self.scale_shift(embedding)
        h = self.conv2(self.norm2(h, scale=scale, shift=shift, act="silu"))
        return self.shortcut(x) + h


def split_heads(projected: Tensor, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """(B, parts * C, T, H, W) -> as many views (B, T, H, W, heads, head_dim)."""
    return channels_last(projected).unflatten(-1, (parts, -1, head_dim)).unbind(-3)


def join_heads(attended: Tensor) -> Tensor:
    """(B, T, H, W, heads, head_dim) -> (B, C, T, H, W), a view."""
    return channels_first(attended.flatten(-2))


class SpatialSelfAttention(nn.Module):
    """`x + Linear(attention over the H*W positions of each frame (norm(x)))`.

    Four passes: the norm's statistics; the projection, which normalises what it reads; the attention; the Linear, which
    adds `x`. The first falls away where the producer of `x` took its statistics, and the last takes them for the norm
    that follows. The other attention layers are the same.
    """

    def __init__(self, channels: int, head_dim: int, num_groups: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = FrameGroupNorm(num_groups, channels)
        self.to_qkv = ChannelLinear(channels, 3 * channels)
        self.to_out = zero_init(ChannelLinear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.chained(x)[0]

    def chained(self, x: Tensor, stats: Stats | None = None, groups: int | None = None) -> tuple[Tensor, Stats | None]:
        """`forward` of an `x` of known statistics, with those of the result; see `ChannelLinear`."""
        q, k, v = split_heads(self.to_qkv.after_norm(x, self.norm, stats), 3, self.head_dim)
        return self.to_out.before_norm(join_heads(ops.spatial_attention(q, k, v)), x, groups)


class TextCrossAttention(nn.Module):
    """`x + Linear(attention of every position to the text tokens)`."""

    def __init__(self, channels: int, head_dim: int, text_dim: int, num_groups: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = FrameGroupNorm(num_groups, channels)
        self.to_q = ChannelLinear(channels, channels)
        self.to_kv = nn.Linear(text_dim, 2 * channels)
        self.to_out = zero_init(ChannelLinear(channels, channels))

    def text_keys(self, text: Tensor, mask: Tensor) -> TextKeys:
        """Of contextualised text states (B, L, text_dim), for `forward`."""
        keys, values = self.to_kv(text).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        return TextKeys(keys, values, mask)

    def forward(self, x: Tensor, text: TextKeys, stats: Stats | None = None) -> Tensor:
        (q,) = split_heads(self.to_q.after_norm(x, self.norm, stats), 1, self.head_dim)
        attended = ops.spatial_attention(q, text.keys, text.values, key_mask=text.mask)
        return self.to_out(join_heads(attended), residual=x)


class SpatialLayer(nn.Module):
    """One pre-trained spatial layer: a residual block, at attention levels then self- and text cross-attention."""

    def __init__(
        self, in_channels: int, out_channels: int, embed_dim: int, num_groups: int, *, attention: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.resnet = ResnetBlock2D(in_channels, out_channels, embed_dim, num_groups)
        self.self_attention: SpatialSelfAttention | None = None
        self.cross_attention: TextCrossAttention | None = None
        if attention is not None:
            head_dim, text_dim = attention
            self.self_attention = SpatialSelfAttention(out_channels, head_dim, num_groups)
            self.cross_attention = TextCrossAttention(out_channels, head_dim, text_dim, num_groups)

    def text_keys(self, text: Tensor, mask: Tensor) -> TextKeys | None:
        """What `forward` needs of contextualised text states (B, L, text_dim); None without attention."""
        return None if self.cross_attention is None else self.cross_attention.text_keys(text, mask)

    def forward(self, x: Tensor, embedding: Tensor, text: TextKeys | None) -> Tensor:
        """`embedding` (B, E) is noise level and pooled text, before its activation."""
        x = self.resnet(x, embedding)
        if self.self_attention is None or self.cross_attention is None:
            return x
        assert text is not None
        x, stats = self.self_attention.chained(x, groups=self.cross_attention.norm.num_groups)
        return self.cross_attention(x, text, stats)


class Downsample2D(FrameConv2d):
    """Halves H and W of every frame: 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)


class Upsample2D(nn.Module):
    """Doubles H and W of every frame: nearest, then a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = FrameConv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(ops.space_time_upsample(x, (1, 2, 2)))


# Temporal layers: what inflation adds --------------------------------------------------------------------------------


def identity_kernel_(weight: Tensor) -> Tensor:
    """Fill a (C, C, k) temporal kernel with the identity: the centre tap passes each channel on, the others are 0."""
    out_channels, in_channels, taps = weight.shape
    if out_channels != in_channels or taps % 2 == 0:
        raise ValueError(f"the identity needs a square kernel with an odd number of taps, got {tuple(weight.shape)}")
    with torch.no_grad():
        weight.zero_()
        weight[:, :, taps // 2] = torch.eye(in_channels)
    return weight


class TemporalKernel(nn.Module):
    """Weights of a convolution over time, `(C, C, k)`, identity-initialised (paper, appendix B)."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(identity_kernel_(torch.empty(channels, channels, kernel_size)))
        self.bias = nn.Parameter(torch.zeros(channels))


class TemporalConv(TemporalKernel):
    """A convolution over time."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.temporal_conv(x, self.weight, self.bias)

    def between(self, x: Tensor, norm: ops.NormArgs, stats_groups: int) -> tuple[Tensor, Stats]:
        """The convolution of the normalised `x`, and its statistics for the norm that follows."""
        return ops.temporal_conv(x, self.weight, self.bias, norm=norm, stats_groups=stats_groups)


class TemporalDownsample(TemporalKernel):
    """Identity-initialised temporal convolution followed by a stride (paper, appendix B)."""

    def __init__(self, channels: int, kernel_size: int, factor: int) -> None:
        super().__init__(channels, kernel_size)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return ops.space_time_downsample(x, (self.factor, 1, 1), weight=self.weight, bias=self.bias)


class TemporalUpsample(TemporalKernel):
    """Frame duplication followed by an identity-initialised temporal convolution (paper, appendix B)."""

    def __init__(self, channels: int, kernel_size: int, factor: int) -> None:
        super().__init__(channels, kernel_size)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return ops.space_time_upsample(x, (self.factor, 1, 1), weight=self.weight, bias=self.bias)


class TemporalFilm(nn.Module):
    """Scale and shift of a temporal norm; absent (None, None) in the paper's unconditioned inflation."""

    def __init__(self, embed_dim: int | None, channels: int) -> None:
        super().__init__()
        self.scale_shift = None if embed_dim is None else ScaleShift(embed_dim, channels)

    def forward(self, embedding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if self.scale_shift is None:
            return None, None
        assert embedding is not None
        return self.scale_shift(embedding)


class ConvInflationBlock(nn.Module):
    """`s + Linear(act(norm(Conv1D_t(act(norm(Conv2D_hw(s)))))))` (paper, figure 4b); the identity at initialisation.

    Behind the Conv2D it is three passes: the first norm's statistics; the Conv1D, which normalises what it reads and
    takes the second norm's statistics of what it writes; the Linear, which normalises too and adds `s`. In training
    the norms are ops of their own, as `ChannelLinear` explains.
    """

    def __init__(self, channels: int, kernel_size: int, num_groups: int, embed_dim: int | None) -> None:
        super().__init__()
        self.conv2d = FrameConv2d(channels, channels, 3, padding=1)
        self.norm1 = FrameGroupNorm(num_groups, channels)
        self.conv1d = TemporalConv(channels, kernel_size)
        self.norm2 = FrameGroupNorm(num_groups, channels)
        self.film = TemporalFilm(embed_dim, channels)
        self.proj = zero_init(ChannelLinear(channels, channels))

    def forward(self, s: Tensor, embedding: Tensor | None) -> Tensor:
        scale, shift = self.film(embedding)
        h, stats = self.conv2d(s), None
        if torch.is_grad_enabled():
            h = self.conv1d(self.norm1(h, act="silu"))
        else:
            norm1 = self.norm1.applied(self.norm1.stats(h), act="silu")
            h, stats = self.conv1d.between(h, norm1, self.norm2.num_groups)
        return self.proj.after_norm(h, self.norm2, stats, scale=scale, shift=shift, act="silu", residual=s)


class TemporalSelfAttention(nn.Module):
    """`x + Linear(attention over the T frames of each position (film(norm(x))))`, told the order of the frames.

    `positions` is how it is told, of any number of frames and in no pass of its own:
        "sinusoidal": the norm's shift grows by the sinusoids of each frame's position;
        "relative": the scores by a learned bias of the head and the lag between query and key, zero-initialised. It has
            one for each lag up to `relative_range` frames, of which the last serves beyond;
        "rotary": queries and keys are turned by angles of each frame's position.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        num_groups: int,
        embed_dim: int | None,
        positions: str = "sinusoidal",
        relative_range: int = 32,
    ) -> None:
        super().__init__()
        check_temporal_positions(positions, relative_range, channels, head_dim)
        self.head_dim = head_dim
        self.positions = positions
        self.norm = FrameGroupNorm(num_groups, channels)
        self.film = TemporalFilm(embed_dim, channels)
        self.to_qkv = ChannelLinear(channels, 3 * channels)
        self.to_out = ChannelLinear(channels, channels)
        self.relative_bias: nn.Parameter | None = None
        if positions == "relative":
            self.relative_bias = nn.Parameter(torch.zeros(channels // head_dim, 2 * relative_range + 1))

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return self.chained(x, embedding)[0]

    def chained(
        self, x: Tensor, embedding: Tensor | None, stats: Stats | None = None, groups: int | None = None
    ) -> tuple[Tensor, Stats | None]:
        """`forward` of an `x` of known statistics, with those of the result; see `ChannelLinear`."""
        scale, shift = self.film(embedding)
        if self.positions == "sinusoidal":
            shift = shifted_by_position(shift, x)
        projected = self.to_qkv.after_norm(x, self.norm, stats, scale=scale, shift=shift)
        q, k, v = split_heads(projected, 3, self.head_dim)
        bias = None if self.relative_bias is None else bias_of_lags(self.relative_bias, x.shape[2])
        rotary = rotations(q) if self.positions == "rotary" else None
        return self.to_out.before_norm(join_heads(ops.temporal_attention(q, k, v, bias=bias, rotary=rotary)), x, groups)


def shifted_by_position(shift: Tensor | None, x: Tensor) -> Tensor:
    """The shift of a norm of `x`, None or (B, C), and the sinusoids of each frame's position: (B, T, C), >= fp32."""
    batch, channels, num_frames = x.shape[:3]
    frames = torch.arange(num_frames, device=x.device)
    positions = sinusoidal_embedding(frames, channels).to(accumulation_dtype(x.dtype)).expand(batch, -1, -1)
    return positions if shift is None else positions + shift[:, None]


def bias_of_lags(table: Tensor, num_frames: int) -> Tensor:
    """(heads, 2R + 1) for lags -R to R -> (heads, 2T - 1), those beyond R frames as those of R."""
    reach = table.shape[1] // 2
    lags = torch.arange(1 - num_frames, num_frames, device=table.device)
    return table[:, lags.clamp(-reach, reach) + reach]


def rotations(q: Tensor) -> Tensor:
    """Cosine and sine of each frame's angle for each pair of the channels of `q`, (T, D / 2, 2), >= fp32."""
    frames = torch.arange(q.shape[1], device=q.device)
    cos, sin = sinusoidal_embedding(frames, q.shape[-1]).chunk(2, dim=-1)
    return torch.stack([cos, sin], dim=-1).to(accumulation_dtype(q.dtype))


class AttentionInflationBlock(nn.Module):
    """`s + Linear(L stacked temporal self-attentions (s))` (paper, figure 4c); the identity at initialisation.

    Each layer hands its result's statistics to the norm of the next.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        num_groups: int,
        num_layers: int,
        embed_dim: int | None,
        positions: str = "sinusoidal",
        relative_range: int = 32,
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.layers = nn.ModuleList(
            TemporalSelfAttention(channels, head_dim, num_groups, embed_dim, positions, relative_range)
            for _ in range(num_layers)
        )
        self.proj = zero_init(ChannelLinear(channels, channels))

    def forward(self, s: Tensor, embedding: Tensor | None) -> Tensor:
        layers = cast("list[TemporalSelfAttention]", list(self.layers))
        h, stats = s, None
        for layer in layers:
            h, stats = layer.chained(h, embedding, stats, None if layer is layers[-1] else self.num_groups)
        return self.proj(h, residual=s)


class FactorizedAttention(nn.Module):
    """Attention over space, then over time, each with its norm and residual: a 3D attention at a fraction of its cost.

        h = x + Linear(attention over the H*W positions of each frame (norm(x)))
        y = h + Linear(attention over the T frames of each position (norm(h)))

    T*H*W*(H*W + T) scores a head instead of (T*H*W)^2. Both closing Linears are zero-initialised: a fresh one put into
    a trained network changes nothing.

    Args:
        channels: C, a multiple of `head_dim` and of `num_groups`; even with "sinusoidal" positions.
        head_dim: channels of one head; even with "rotary" positions.
        num_groups: groups of both norms, whose statistics are those of single frames.
        positions, relative_range: how attention over time knows the order of frames; see `TemporalSelfAttention`.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int = 64,
        num_groups: int = 32,
        *,
        positions: str = "sinusoidal",
        relative_range: int = 32,
    ) -> None:
        super().__init__()
        channels, head_dim, num_groups = _checked_widths(channels=channels, head_dim=head_dim, num_groups=num_groups)
        self.spatial = SpatialSelfAttention(channels, head_dim, num_groups)
        self.temporal = TemporalSelfAttention(channels, head_dim, num_groups, None, positions, relative_range)
        zero_init(self.temporal.to_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same shape in channels_last_3d memory, which an `x` of another layout is brought into
        once.

        Raises:
            ValueError: `x` is not such a tensor, or, without autocast, not of the module's dtype.
        """
        self._check(x)
        h = x.contiguous(memory_format=torch.channels_last_3d)
        h, stats = self.spatial.chained(h, groups=self.temporal.norm.num_groups)
        return self.temporal.chained(h, None, stats)[0]

    def _check(self, x: Tensor) -> None:
        check_activation("FactorizedAttention", x)
        weight = self.spatial.to_qkv.weight
        if x.shape[1] != weight.shape[1]:
            raise ValueError(f"FactorizedAttention: x must have {weight.shape[1]} channels, got {tuple(x.shape)}")
        if x.dtype != weight.dtype and not autocast_is_on(x.device):
            raise ValueError(f"FactorizedAttention: x must be {weight.dtype} like the module, got {x.dtype}; cast one")


def _checked_widths(**widths: int) -> tuple[int, ...]:
    """The first is the channels, and a multiple of each other."""
    numbers = {name: check_integer("FactorizedAttention", name, width) for name, width in widths.items()}
    channels = numbers["channels"]
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"FactorizedAttention: {name} must be >= 1, got {number}")
        if channels % number:
            raise ValueError(f"FactorizedAttention: channels must be a multiple of {name}={number}, got {channels}")
    return tuple(numbers.values())


# Text and noise level ------------------------------------------------------------------------------------------------


class TextConditioner(nn.Module):
    """Contextualises a frozen text encoder's states and pools them: (B, L, text_dim) -> (B, L, width), (B, embed_dim).

    A pre-norm transformer over projected states with sinusoidal positions; pooling is attention with one learned score
    per head. Padding tokens (mask False) are never attended to; each prompt needs at least one real token.
    """

    def __init__(self, text_dim: int, width: int, num_layers: int, embed_dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj_in = nn.Linear(text_dim, width)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.pool_scores = nn.Linear(width, num_heads)
        self.pool_out = nn.Linear(width, embed_dim)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        self._check(hidden_states, mask)
        h = self.proj_in(hidden_states.to(self.proj_in.weight.dtype))
        positions = torch.arange(h.shape[1], device=h.device)
        h = h + sinusoidal_embedding(positions, h.shape[2]).to(h.dtype)
        h = self.layers(h, src_key_padding_mask=~mask)
        scores = self.pool_scores(h).masked_fill(~mask[..., None], float("-inf"))
        values = h.unflatten(-1, (self.num_heads, -1))
        pooled = (scores.softmax(dim=1)[..., None] * values).sum(dim=1).flatten(1)
        return h, self.pool_out(pooled)

    def _check(self, hidden_states: Tensor, mask: Tensor) -> None:
        width = self.proj_in.in_features
        states = hidden_states
        if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[1] < 1 or states.shape[2] != width:
            raise ValueError(
                f"encoder_hidden_states must be a tensor (B, L, {width}) with L >= 1, got {_described(states)}"
            )
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != states.shape[:2]:
            raise ValueError(
                f"encoder_attention_mask must be a torch.bool tensor {tuple(states.shape[:2])}, True at real tokens, "
                f"got {_described(mask)}"
            )


def _described(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class NoiseEmbedding(nn.Module):
    """`MLP(sinusoids of a noise level)`: (B,) on the scale of diffusion timesteps, thousands -> (B, embed_dim)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.in_features = embed_dim // 2
        self.mlp = nn.Sequential(nn.Linear(self.in_features, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))

    def forward(self, level: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        embedding: Tensor = self.mlp(sinusoidal_embedding(level, self.in_features).to(dtype))
        return embedding
