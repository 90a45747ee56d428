"""The layers of both U-Nets, spatial (text-to-image) and temporal (inflation).

Every layer maps a video activation `(B, C, T, H, W)` in channels_last_3d memory to another one. Spatial layers treat
the frames as independent images, so a text-to-image model is the case T = 1, or any T frame by frame. Folding to frames
or to rows is a view of that memory: nothing here copies to change layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumiere_fast import ops
from lumiere_fast.ops._layout import fold_frames
from lumiere_fast.ops._layout import from_rows as channels_first
from lumiere_fast.ops._layout import to_rows as channels_last

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Conditioning:
    """What steers the layers of one U-Net call.

    Args:
        embedding: (B, E) noise level and pooled text, before its activation.
        text: (B, L, D) contextualised text states, and `text_mask` (B, L), True at real tokens.
    """

    embedding: Tensor
    text: Tensor
    text_mask: Tensor


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
        self, stats: tuple[Tensor, Tensor], scale: Tensor | None = None, shift: Tensor | None = None
    ) -> ops.NormArgs:
        """This norm and SiLU as what the temporal convolution of the normalised activation does while it reads."""
        return ops.NormArgs(*stats, self.weight, self.bias, self.num_groups, scale, shift)


class ScaleShift(nn.Module):
    """`Linear(SiLU(embedding))` split into the (scale, shift) of a group norm; zero-initialised: no change at first."""

    def __init__(self, embed_dim: int, channels: int) -> None:
        super().__init__()
        self.proj = zero_init(nn.Linear(embed_dim, 2 * channels))

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.proj(F.silu(embedding)).chunk(2, dim=-1)
        return scale, shift


def zero_init(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
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

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        h = self.conv1(self.norm1(x, act="silu"))
        scale, shift = self.scale_shift(conditioning.embedding)
        h = self.conv2(self.norm2(h, scale=scale, shift=shift, act="silu"))
        return self.shortcut(x) + h


class SpatialSelfAttention(nn.Module):
    """`x + Linear(attention over the H*W positions of each frame (norm(x)))`."""

    def __init__(self, channels: int, head_dim: int, num_groups: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = FrameGroupNorm(num_groups, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(channels_last(self.norm(x)))
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        return x + channels_first(self.to_out(ops.spatial_attention(q, k, v).flatten(-2)))


class TextCrossAttention(nn.Module):
    """`x + Linear(attention of every position to the text tokens)`."""

    def __init__(self, channels: int, head_dim: int, text_dim: int, num_groups: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = FrameGroupNorm(num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(text_dim, 2 * channels)
        self.to_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        q = self.to_q(channels_last(self.norm(x))).unflatten(-1, (-1, self.head_dim))
        k, v = self.to_kv(conditioning.text).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        attended = ops.spatial_attention(q, k, v, key_mask=conditioning.text_mask)
        return x + channels_first(self.to_out(attended.flatten(-2)))


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

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        x = self.resnet(x, conditioning)
        if self.self_attention is not None and self.cross_attention is not None:
            x = self.cross_attention(self.self_attention(x), conditioning)
        return x


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

    def between(self, x: Tensor, norm: ops.NormArgs, stats_groups: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
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
    the norms are ops of their own, whose backward takes fewer passes than that of their parts.
    """

    def __init__(self, channels: int, kernel_size: int, num_groups: int, embed_dim: int | None) -> None:
        super().__init__()
        self.conv2d = FrameConv2d(channels, channels, 3, padding=1)
        self.norm1 = FrameGroupNorm(num_groups, channels)
        self.conv1d = TemporalConv(channels, kernel_size)
        self.norm2 = FrameGroupNorm(num_groups, channels)
        self.film = TemporalFilm(embed_dim, channels)
        self.proj = zero_init(nn.Linear(channels, channels))

    def forward(self, s: Tensor, embedding: Tensor | None) -> Tensor:
        scale, shift = self.film(embedding)
        h = self.conv2d(s)
        if torch.is_grad_enabled():
            h = self.conv1d(self.norm1(h, act="silu"))
            h, norm2 = self.norm2(h, scale=scale, shift=shift, act="silu"), None
        else:
            h, stats = self.conv1d.between(h, self.norm1.applied(self.norm1.stats(h)), self.norm2.num_groups)
            norm2 = self.norm2.applied(stats, scale, shift)
        # a Linear over channels is a temporal convolution of one tap
        return ops.temporal_conv(h, self.proj.weight[:, :, None], self.proj.bias, norm=norm2, residual=s)


class TemporalSelfAttention(nn.Module):
    """`x + Linear(attention over the T frames of each position (film(norm(x)) + sinusoidal frame positions))`."""

    def __init__(self, channels: int, head_dim: int, num_groups: int, embed_dim: int | None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = FrameGroupNorm(num_groups, channels)
        self.film = TemporalFilm(embed_dim, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        scale, shift = self.film(embedding)
        frames = torch.arange(x.shape[2], device=x.device)
        positions = sinusoidal_embedding(frames, x.shape[1]).to(x.dtype)
        h = channels_last(self.norm(x, scale=scale, shift=shift)) + positions[:, None, None, :]
        q, k, v = self.to_qkv(h).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        return x + channels_first(self.to_out(ops.temporal_attention(q, k, v).flatten(-2)))


class AttentionInflationBlock(nn.Module):
    """`s + Linear(L stacked temporal self-attentions (s))` (paper, figure 4c); the identity at initialisation."""

    def __init__(self, channels: int, head_dim: int, num_groups: int, num_layers: int, embed_dim: int | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TemporalSelfAttention(channels, head_dim, num_groups, embed_dim) for _ in range(num_layers)
        )
        self.proj = zero_init(nn.Linear(channels, channels))

    def forward(self, s: Tensor, embedding: Tensor | None) -> Tensor:
        h = s
        for layer in self.layers:
            h = layer(h, embedding)
        return s + channels_first(self.proj(channels_last(h)))


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
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != width:
            raise ValueError(f"encoder_hidden_states must be (B, L, {width}), got {tuple(hidden_states.shape)}")
        if mask.dtype != torch.bool or mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"encoder_attention_mask must be torch.bool {tuple(hidden_states.shape[:2])}, True at real tokens, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )


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
