"""The pixel-space text-to-image U-Net that Lumiere inflates; with T > 1 frames it denoises each one on its own.

Imagen-like: residual blocks scaled and shifted by noise level and pooled text, self- and text cross-attention at the
coarse levels. One skip a layer, taken before the level's resize.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumiere_fast.models.blocks import (
    Downsample2D,
    FrameConv2d,
    FrameGroupNorm,
    NoiseEmbedding,
    SpatialLayer,
    TextConditioner,
    TextKeys,
    Upsample2D,
    channels_first,
    channels_last,
)
from lumiere_fast.models.config import UNetConfig
from lumiere_fast.models.prepared_text import PreparedText, as_prepared
from lumiere_fast.models.pretrained import PretrainedModel


class Inflation(Protocol):
    """The temporal layers that a video model threads through the walk of `UNet2D.forward`.

    `layer(i, x)` follows the i-th spatial layer of the walk; `downsample(i, x)` and `upsample(i, x)` follow the spatial
    resize below level i.
    """

    def layer(self, index: int, x: Tensor) -> Tensor: ...

    def downsample(self, level: int, x: Tensor) -> Tensor: ...

    def upsample(self, level: int, x: Tensor) -> Tensor: ...


class NoInflation:
    """The text-to-image model itself: nothing between the spatial layers."""

    def layer(self, index: int, x: Tensor) -> Tensor:
        return x

    def downsample(self, level: int, x: Tensor) -> Tensor:
        return x

    def upsample(self, level: int, x: Tensor) -> Tensor:
        return x


class Level(nn.Module):
    """The spatial layers of one resolution and the resize that leaves it (None at the end of the walk)."""

    def __init__(self, layers: list[SpatialLayer], resize: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resize = resize


def _levels(modules: nn.ModuleList) -> Iterator[Level]:
    return cast("Iterator[Level]", iter(modules))


class UNet2D(PretrainedModel, nn.Module):
    """Text-to-image (or image super-resolution) U-Net on pixels.

    `forward` predicts what the diffusion parameterisation trained it for, at the shape of `sample`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths = config.block_out_channels
        stem, patch = widths[0], config.patch_size
        self.text = TextConditioner(config.text_embed_dim, config.text_width, config.text_layers, config.time_embed_dim)
        self.noise_embedding = NoiseEmbedding(config.time_embed_dim)
        self.augmentation_embedding = NoiseEmbedding(config.time_embed_dim) if config.noise_augmentation else None
        self.conv_in = FrameConv2d(
            config.in_channels + config.conditioning_channels, stem, patch + 2, stride=patch, padding=1
        )
        self.down_levels = nn.ModuleList()
        channels, skips = stem, []
        for level, width in enumerate(widths):
            layers = []
            for _ in range(config.layers_per_block[level]):
                layers.append(self._layer(level, channels, width))
                channels = width
                skips.append(width)
            last = level == len(widths) - 1
            self.down_levels.append(Level(layers, None if last else Downsample2D(width, width)))
        self.mid_layers = nn.ModuleList(self._layer(len(widths) - 1, channels, channels) for _ in range(2))
        self.up_levels = nn.ModuleList()
        for level in reversed(range(len(widths))):
            layers = []
            for _ in range(config.layers_per_block[level]):
                layers.append(self._layer(level, channels + skips.pop(), widths[level]))
                channels = widths[level]
            self.up_levels.append(Level(layers, Upsample2D(channels, channels) if level else None))
        self.norm_out = FrameGroupNorm(config.norm_num_groups, channels)
        self.conv_out = FrameConv2d(channels, config.out_channels * patch**2, 3, padding=1)

    def _layer(self, level: int, in_channels: int, out_channels: int) -> SpatialLayer:
        config = self.config
        attends = level in config.attention_levels
        return SpatialLayer(
            in_channels,
            out_channels,
            config.time_embed_dim,
            config.norm_num_groups,
            attention=(config.attention_head_dim, config.text_width) if attends else None,
        )

    def enable_gradient_checkpointing(self) -> None:
        """In training keep the inputs of each layer of the walk alone, and compute the rest again in the backward pass.

        About a third more time for a fraction of the memory; the gradients are the same.
        """
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations again."""
        self.gradient_checkpointing = False

    def walk(self) -> Iterator[tuple[int, int]]:
        """(level, channels) after each spatial layer, in the order of the forward walk: down, middle, up."""
        widths, repeats = self.config.block_out_channels, self.config.layers_per_block
        coarsest = len(widths) - 1
        levels = range(len(widths))
        order = [level for level in levels for _ in range(repeats[level])]
        order += [coarsest] * len(self.mid_layers)
        order += [level for level in reversed(levels) for _ in range(repeats[level])]
        return ((level, widths[level]) for level in order)

    def spatial_layers(self) -> list[SpatialLayer]:
        """The layers in the order of the walk."""
        down, up = ([level.layers for level in _levels(levels)] for levels in (self.down_levels, self.up_levels))
        return [cast("SpatialLayer", layer) for layers in (*down, self.mid_layers, *up) for layer in layers]

    def prepare_text(self, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> PreparedText:
        """All that `forward` computes of the text alone, for its argument `encoder_hidden_states`.

        For sampling: call it under `torch.no_grad()`, and again when the weights have changed. In training give
        `forward` the states themselves; see `PreparedText`.

        Raises:
            ValueError: one of the two is not what `forward` takes.
        """
        text, pooled = self.text(encoder_hidden_states, encoder_attention_mask)
        layers = (layer.text_keys(text, encoder_attention_mask) for layer in self.spatial_layers())
        return PreparedText(self, pooled, tuple(layers))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | PreparedText,
        encoder_attention_mask: Tensor | None = None,
        *,
        image_conditioning: Tensor | None = None,
        augmentation_level: Tensor | None = None,
        inflation: Inflation | None = None,
    ) -> Tensor:
        """
        Args:
            sample: noisy images (B, C, H, W) or frames (B, C, T, H, W); H, W multiples of `config.spatial_factor`.
                It and the conditioning are cast to the dtype of the weights, which is that of the prediction.
            timestep: (B,) noise level as the parameterisation tells it (250 ln(sigma / alpha)); best in fp32, which its
                embedding is made in.
            encoder_hidden_states, encoder_attention_mask: (B, L, text_embed_dim) and (B, L), True at real tokens; or
                what `prepare_text` makes of the two, alone: for sampling, where a text serves more than one call.
            image_conditioning: (B, conditioning_channels, [T,] H, W), concatenated to the input.
            augmentation_level: (B,) how much noise the conditioning image carries, on the scale of `timestep`.
            inflation: temporal layers to run between the spatial ones (used by `STUNet`).
        """
        if sample.ndim == 4:
            conditioning_5d = None if image_conditioning is None else image_conditioning[:, :, None]
            return self.forward(
                sample[:, :, None],
                timestep,
                encoder_hidden_states,
                encoder_attention_mask,
                image_conditioning=conditioning_5d,
                augmentation_level=augmentation_level,
                inflation=inflation,
            )[:, :, 0]
        temporal = inflation or NoInflation()
        x = self._input(sample, image_conditioning)
        text = as_prepared(self, encoder_hidden_states, encoder_attention_mask, x, self.conv_in.weight)
        embedding = self._embedding(timestep, text, augmentation_level)

        def step(index: int, layer: nn.Module, *inputs: Tensor) -> Tensor:
            return self._step(layer, temporal, index, embedding, text.layers[index], *inputs)

        index = 0
        skips: list[Tensor] = []
        h = self.conv_in(x)
        for level, down in enumerate(_levels(self.down_levels)):
            for layer in down.layers:
                h = step(index, layer, h)
                index += 1
                skips.append(h)
            if down.resize is not None:
                h = temporal.downsample(level, down.resize(h))
        for layer in self.mid_layers:
            h = step(index, layer, h)
            index += 1
        for level, up in zip(reversed(range(len(self.up_levels))), _levels(self.up_levels), strict=True):
            for layer in up.layers:
                h = step(index, layer, h, skips.pop())
                index += 1
            if up.resize is not None:
                h = temporal.upsample(level - 1, up.resize(h))
        return self._output(h)

    def _step(
        self,
        layer: nn.Module,
        temporal: Inflation,
        index: int,
        embedding: Tensor,
        text: TextKeys | None,
        *inputs: Tensor,
    ) -> Tensor:
        """One spatial layer of the walk, on the main path and on the way up its skip, and the temporal layer after."""

        def run(*inputs: Tensor) -> Tensor:
            x = torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0]
            return temporal.layer(index, layer(x, embedding, text))

        if self.gradient_checkpointing:
            # nothing here draws random numbers, whose state is slow to keep
            return cast("Tensor", checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False))
        return run(*inputs)

    def _input(self, sample: Tensor, image_conditioning: Tensor | None) -> Tensor:
        config = self.config
        if sample.ndim != 5 or sample.shape[1] != config.in_channels:
            raise ValueError(f"sample must be (B, {config.in_channels}, [T,] H, W), got {tuple(sample.shape)}")
        height, width = sample.shape[-2:]
        if height % config.spatial_factor or width % config.spatial_factor:
            raise ValueError(f"height and width must be multiples of {config.spatial_factor}, got {height}x{width}")
        channels = config.conditioning_channels
        wanted = (sample.shape[0], channels, *sample.shape[2:]) if channels else None
        given = None if image_conditioning is None else tuple(image_conditioning.shape)
        if given != wanted:
            raise ValueError(f"image_conditioning must be {wanted or 'absent'} for this model and sample, got {given}")
        if image_conditioning is not None:
            sample = torch.cat([sample, image_conditioning], dim=1)
        return sample.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last_3d)

    def _embedding(self, timestep: Tensor, text: PreparedText, augmentation_level: Tensor | None) -> Tensor:
        """(B, E) that scales and shifts the layers: noise level, pooled text and augmentation."""
        embedding = self.noise_embedding(timestep) + text.pooled
        if (augmentation_level is None) != (self.augmentation_embedding is None):
            wanted = "required" if self.augmentation_embedding is not None else "not accepted"
            raise ValueError(f"augmentation_level is {wanted} by this model")
        if self.augmentation_embedding is not None:
            embedding = embedding + self.augmentation_embedding(augmentation_level)
        return embedding

    def _output(self, h: Tensor) -> Tensor:
        config = self.config
        out = channels_last(self.conv_out(self.norm_out(h, act="silu")))
        if config.patch_size == 1:
            return channels_first(out)
        patch = config.patch_size
        out = out.unflatten(-1, (patch, patch, config.out_channels))  # (B, T, h, w, p, p, C)
        return channels_first(out.transpose(3, 4).flatten(4, 5).flatten(2, 3))
