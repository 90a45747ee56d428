"""Architectures as data: what a checkpoint's `config.json` holds, and the named presets.

Widths of the published model are not public. The `paper` preset is this project's fixed choice at the published
resolutions (80x128x128 in the base, 1024x1024 in the super-resolution model); `demo` is what ships trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UNetConfig:
    """A pixel-space text-to-image (or image super-resolution) U-Net.

    Args:
        sample_size: height and width of the images it was made for, pixels.
        in_channels, out_channels: channels of the noisy image and of the prediction.
        conditioning_channels: channels of an image concatenated to the input (super-resolution: the upsampled
            low-resolution image); 0 for none.
        patch_size: stride of the stem and of the head; the first level works at `sample_size / patch_size`.
        block_out_channels: width of each level, finest first.
        layers_per_block: residual layers of each level on the way down, and again on the way up.
        attention_levels: indices of the levels whose layers attend over space and to the text.
        attention_head_dim: channels of one attention head.
        text_embed_dim: width of the text encoder's states.
        text_width, text_layers: width and number of the transformer layers that contextualise those states inside the
            model.
        time_embed_dim: width of the noise-level-and-text embedding that scales and shifts every residual block.
        norm_num_groups: groups of every group norm.
        noise_augmentation: the model is told how much noise was added to its conditioning image.
    """

    sample_size: int
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    attention_levels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    conditioning_channels: int = 0
    patch_size: int = 1
    attention_head_dim: int = 64
    text_embed_dim: int = 64
    text_width: int = 128
    text_layers: int = 2
    time_embed_dim: int = 256
    norm_num_groups: int = 32
    noise_augmentation: bool = False

    def __post_init__(self) -> None:
        for name in ("block_out_channels", "layers_per_block", "attention_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists
        levels = len(self.block_out_channels)
        _check_positive(self)
        if len(self.layers_per_block) != levels:
            raise ValueError(f"layers_per_block has {len(self.layers_per_block)} entries, block_out_channels {levels}")
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"attention_levels {self.attention_levels} must index the {levels} levels, 0 the finest")
        if self.sample_size % self.spatial_factor:
            raise ValueError(f"sample_size {self.sample_size} is not a multiple of {self.spatial_factor}")
        for name in ("text_width", "time_embed_dim"):
            if getattr(self, name) % 4:
                raise ValueError(f"{name} must be a multiple of 4, got {getattr(self, name)}")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"width {width} is not a multiple of norm_num_groups={self.norm_num_groups}")
        for level in (*self.attention_levels, levels - 1):  # the coarsest attends over time once inflated
            if self.block_out_channels[level] % self.attention_head_dim:
                raise ValueError(
                    f"width {self.block_out_channels[level]} of level {level} is not a multiple of "
                    f"attention_head_dim={self.attention_head_dim}"
                )

    @property
    def spatial_factor(self) -> int:
        """Height and width must be multiples of this."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)


def _check_positive(config: UNetConfig) -> None:
    """Every count is an integer of at least 1; only the conditioning image may be absent."""
    for name, value in dataclasses.asdict(config).items():
        least = 0 if name in ("conditioning_channels", "attention_levels", "noise_augmentation") else 1
        counts = value if isinstance(value, tuple) else (value,)
        if (not counts and least) or any(not isinstance(count, int) or count < least for count in counts):
            raise ValueError(f"{name} must hold integers >= {least}, got {value}")


TEMPORAL_POSITIONS = ("sinusoidal", "relative", "rotary")


def check_temporal_positions(
    positions: str, relative_range: int, channels: int | None = None, head_dim: int | None = None
) -> None:
    """Raise a ValueError unless temporal attention, of such a width and heads, can be told the order so."""
    if positions not in TEMPORAL_POSITIONS:
        raise ValueError(f"temporal_positions must be one of {', '.join(TEMPORAL_POSITIONS)}, got {positions!r}")
    if not isinstance(relative_range, int) or isinstance(relative_range, bool) or relative_range < 1:
        raise ValueError(f"relative_range must be an integer >= 1, got {relative_range!r}")
    if positions == "rotary" and head_dim is not None and head_dim % 2:
        raise ValueError(f"temporal_positions='rotary' turns pairs of channels: a head must be even, got {head_dim}")
    if positions == "sinusoidal" and channels is not None and channels % 2:
        raise ValueError(
            f"temporal_positions='sinusoidal' adds pairs of sinusoids: channels must be even, got {channels}; "
            "'relative' takes any"
        )


@dataclass(frozen=True)
class InflationConfig:
    """What inflation adds to a text-to-image U-Net (paper, section 3.1 and appendix B).

    Args:
        temporal_factors: temporal stride after each spatial resize, finest first; 1 keeps the frame rate there.
        temporal_kernel_size: taps of every temporal convolution (odd).
        temporal_attention_layers: L, the stacked temporal attentions of a block at the coarsest level.
        temporal_conditioning: the temporal layers are scaled and shifted by the noise level and by their own reading of
            the text. Not in the paper, whose text-to-image model has captions that speak of motion; a model trained on
            still images alone has no reason to keep the words that say how things move.
        text_layers: transformer layers of that reading.
        temporal_positions: how temporal attention knows the order of frames: "sinusoidal", "relative" (a learned bias)
            or "rotary"; see `TemporalSelfAttention`. The paper does not say.
        relative_range: lags, in frames, that a "relative" bias tells apart; longer ones are taken for the longest.
    """

    temporal_factors: tuple[int, ...]
    temporal_kernel_size: int = 3
    temporal_attention_layers: int = 1
    temporal_conditioning: bool = False
    text_layers: int = 2
    temporal_positions: str = "sinusoidal"
    relative_range: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "temporal_factors", tuple(self.temporal_factors))
        if any(factor < 1 for factor in self.temporal_factors):
            raise ValueError(f"temporal_factors must be >= 1, got {self.temporal_factors}")
        if self.temporal_kernel_size < 1 or self.temporal_kernel_size % 2 == 0:
            raise ValueError(f"temporal_kernel_size must be odd, got {self.temporal_kernel_size}")
        if self.temporal_attention_layers < 1:
            raise ValueError(f"temporal_attention_layers must be >= 1, got {self.temporal_attention_layers}")
        check_temporal_positions(self.temporal_positions, self.relative_range)

    @property
    def temporal_factor(self) -> int:
        """N: the number of frames must be a multiple of this."""
        return math.prod(self.temporal_factors)


@dataclass(frozen=True)
class Preset:
    """A whole cascade: the base model, the super-resolution model and how many frames they are made for."""

    base: UNetConfig
    base_inflation: InflationConfig
    ssr: UNetConfig
    ssr_inflation: InflationConfig
    num_frames: int
    fps: int
    window_frames: int


def config_to_dict(config: UNetConfig | InflationConfig) -> dict[str, Any]:
    """Plain data for `config.json`."""
    return dataclasses.asdict(config)


def config_from_dict(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Rebuild `kind` from `config_to_dict`'s data; unknown or missing keys are named in a ValueError."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if unknown or missing:
        raise ValueError(f"not a {kind.__name__}: unknown keys {unknown}, missing keys {missing}")
    return kind(**values)


DEMO = Preset(
    base=UNetConfig(
        sample_size=32,
        patch_size=2,
        block_out_channels=(64, 96, 96),
        layers_per_block=(2, 2, 2),
        attention_levels=(1, 2),
        attention_head_dim=32,
        norm_num_groups=16,
    ),
    base_inflation=InflationConfig(temporal_factors=(2, 2), temporal_attention_layers=2, temporal_conditioning=True),
    ssr=UNetConfig(
        sample_size=64,
        patch_size=2,
        block_out_channels=(32, 64, 96),
        layers_per_block=(2, 2, 2),
        attention_levels=(2,),
        attention_head_dim=32,
        norm_num_groups=16,
        conditioning_channels=3,
        noise_augmentation=True,
    ),
    ssr_inflation=InflationConfig(temporal_factors=(2, 2)),
    num_frames=16,
    fps=8,
    window_frames=8,
)

PAPER = Preset(
    base=UNetConfig(
        sample_size=128,
        block_out_channels=(256, 512, 768, 1024),
        layers_per_block=(3, 3, 3, 3),
        attention_levels=(1, 2, 3),
        text_embed_dim=4096,
        text_width=1024,
        time_embed_dim=1024,
    ),
    base_inflation=InflationConfig(temporal_factors=(2, 2, 2), temporal_attention_layers=4),
    ssr=UNetConfig(
        sample_size=1024,
        block_out_channels=(128, 256, 512, 1024),
        layers_per_block=(2, 4, 8, 8),
        attention_levels=(3,),
        text_embed_dim=4096,
        text_width=1024,
        time_embed_dim=1024,
        conditioning_channels=3,
        noise_augmentation=True,
    ),
    ssr_inflation=InflationConfig(temporal_factors=(2, 2, 1)),
    num_frames=80,
    fps=16,
    window_frames=8,
)

PRESETS: dict[str, Preset] = {"demo": DEMO, "paper": PAPER}
