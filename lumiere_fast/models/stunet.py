"""The Space-Time U-Net: a frozen text-to-image U-Net with temporal layers threaded through its walk."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from lumiere_fast.models.blocks import (
    AttentionInflationBlock,
    ConvInflationBlock,
    NoiseEmbedding,
    TemporalDownsample,
    TemporalUpsample,
    TextConditioner,
)
from lumiere_fast.models.config import InflationConfig
from lumiere_fast.models.prepared_text import PreparedText, as_prepared
from lumiere_fast.models.pretrained import PretrainedModel
from lumiere_fast.models.unet2d import UNet2D


class TemporalConditioner(nn.Module):
    """The temporal layers' own reading of noise level and text, (B, embed_dim)."""

    def __init__(self, unet: UNet2D, config: InflationConfig) -> None:
        super().__init__()
        spatial = unet.config
        self.text = TextConditioner(
            spatial.text_embed_dim, spatial.text_width, config.text_layers, spatial.time_embed_dim
        )
        self.noise_embedding = NoiseEmbedding(spatial.time_embed_dim)

    def pooled_text(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """The text's part of it, (B, embed_dim)."""
        pooled: Tensor = self.text(hidden_states, mask)[1]
        return pooled

    def forward(self, timestep: Tensor, pooled_text: Tensor) -> Tensor:
        return self.noise_embedding(timestep) + pooled_text


class TemporalLayers(nn.Module):
    """Everything inflation adds: a block after each spatial layer, a resize after each spatial resize (paper, 3.1)."""

    def __init__(self, unet: UNet2D, config: InflationConfig) -> None:
        super().__init__()
        spatial = unet.config
        widths = spatial.block_out_channels
        embed_dim = spatial.time_embed_dim if config.temporal_conditioning else None
        self.conditioner = TemporalConditioner(unet, config) if config.temporal_conditioning else None
        self.blocks = nn.ModuleList()
        for level, channels in unet.walk():
            if level == len(widths) - 1:
                self.blocks.append(
                    AttentionInflationBlock(
                        channels,
                        spatial.attention_head_dim,
                        spatial.norm_num_groups,
                        config.temporal_attention_layers,
                        embed_dim,
                        config.temporal_positions,
                        config.relative_range,
                    )
                )
            else:
                self.blocks.append(
                    ConvInflationBlock(channels, config.temporal_kernel_size, spatial.norm_num_groups, embed_dim)
                )
        # indexed by the level above the resize; the way up leaves the level below it with that level's width
        self.downsamplers = nn.ModuleList(
            _resize(TemporalDownsample, widths[level], config.temporal_kernel_size, factor)
            for level, factor in enumerate(config.temporal_factors)
        )
        self.upsamplers = nn.ModuleList(
            _resize(TemporalUpsample, widths[level + 1], config.temporal_kernel_size, factor)
            for level, factor in enumerate(config.temporal_factors)
        )


def _resize(
    kind: type[TemporalDownsample] | type[TemporalUpsample], channels: int, kernel_size: int, factor: int
) -> nn.Module:
    return nn.Identity() if factor == 1 else kind(channels, kernel_size, factor)


class _Walk:
    """`TemporalLayers` bound to one call's embedding: the `Inflation` that `UNet2D.forward` walks through."""

    def __init__(self, layers: TemporalLayers, embedding: Tensor | None) -> None:
        self.layers = layers
        self.embedding = embedding

    def layer(self, index: int, x: Tensor) -> Tensor:
        return self.layers.blocks[index](x, self.embedding)

    def downsample(self, level: int, x: Tensor) -> Tensor:
        return self.layers.downsamplers[level](x)

    def upsample(self, level: int, x: Tensor) -> Tensor:
        return self.layers.upsamplers[level](x)


class STUNet(PretrainedModel, nn.Module):
    """Denoises a whole clip at once, shrinking it in space and time (paper, section 3.1). Made by `inflate`."""

    def __init__(self, unet: UNet2D, config: InflationConfig) -> None:
        super().__init__()
        resizes = len(unet.config.block_out_channels) - 1
        if len(config.temporal_factors) != resizes:
            raise ValueError(
                f"temporal_factors must name one factor for each of the {resizes} spatial resizes, "
                f"got {config.temporal_factors}"
            )
        self.inflation_config = config
        self.unet = unet
        self.temporal = TemporalLayers(unet, config)

    @property
    def temporal_factor(self) -> int:
        """N: the number of frames must be a multiple of this."""
        return self.inflation_config.temporal_factor

    def prepare_text(self, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> PreparedText:
        """As `UNet2D.prepare_text`, the temporal layers' reading with it."""
        spatial = self.unet.prepare_text(encoder_hidden_states, encoder_attention_mask)
        conditioner = self.temporal.conditioner
        temporal = None
        if conditioner is not None:
            temporal = conditioner.pooled_text(encoder_hidden_states, encoder_attention_mask)
        return dataclasses.replace(spatial, model=self, temporal=temporal)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | PreparedText,
        encoder_attention_mask: Tensor | None = None,
        *,
        image_conditioning: Tensor | None = None,
        augmentation_level: Tensor | None = None,
    ) -> Tensor:
        """As `UNet2D.forward` on (B, C, T, H, W), T a multiple of `temporal_factor`."""
        if sample.ndim != 5:
            raise ValueError(f"sample must be (B, C, T, H, W), got {tuple(sample.shape)}")
        check_num_frames(sample.shape[2], self.temporal_factor)
        text = as_prepared(self, encoder_hidden_states, encoder_attention_mask, sample, self.unet.conv_in.weight)
        conditioner = self.temporal.conditioner
        embedding = None if conditioner is None else conditioner(timestep, text.temporal)
        return self.unet(
            sample,
            timestep,
            dataclasses.replace(text, model=self.unet),
            image_conditioning=image_conditioning,
            augmentation_level=augmentation_level,
            inflation=_Walk(self.temporal, embedding),
        )

    def train(self, mode: bool = True) -> STUNet:
        """The frozen U-Net stays in eval mode; only the temporal layers switch."""
        super().train(mode)
        self.unet.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """See `UNet2D.enable_gradient_checkpointing`; a temporal layer goes with the spatial layer before it."""
        self.unet.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations again."""
        self.unet.disable_gradient_checkpointing()

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that inflation added, by state-dict name: the only ones trained."""
        return {f"temporal.{name}": parameter for name, parameter in self.temporal.named_parameters()}


def check_num_frames(num_frames: int, temporal_factor: int, name: str = "num_frames") -> None:
    """Raise a ValueError naming the two nearest accepted counts unless `num_frames` is a positive multiple."""
    if num_frames >= 1 and num_frames % temporal_factor == 0:
        return
    below = max(num_frames // temporal_factor, 1) * temporal_factor
    above = below + temporal_factor
    raise ValueError(
        f"{name} must be a positive multiple of the model's temporal factor {temporal_factor}, got {num_frames}; "
        f"the nearest accepted are {below} and {above}"
    )
