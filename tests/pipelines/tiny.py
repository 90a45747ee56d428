"""A tiny cascade with random parameters everywhere: 8x8 to 16x16 pixels, 4 frames unless the factors want more."""

from __future__ import annotations

import math
from typing import Any

import torch

from lumiere_fast import LumierePipeline, inflate
from lumiere_fast.diffusion import EDMSchedule
from lumiere_fast.pipelines.text_to_video import PipelineConfig
from lumiere_fast.text import TextEncoder
from tests.models.tiny import randomise, tiny_unet

SCHEDULE = EDMSchedule(sigma_max=20.0)


def make_pipeline(
    base_factor: int = 2,
    ssr_factor: int = 2,
    window_frames: int = 4,
    *,
    text_encoder: TextEncoder | None = None,
    seed: int = 0,
    **ssr_changes: Any,
) -> LumierePipeline:
    """`ssr_changes` are settings of the super-resolution model's `UNetConfig`."""
    width = 64 if text_encoder is None else text_encoder.embed_dim
    common: dict[str, Any] = {"text_embed_dim": width, "dtype": torch.float32}
    base = inflate(tiny_unet(**common, sample_size=8), temporal_factors=(base_factor,), temporal_conditioning=True)
    ssr = inflate(tiny_unet(**common, ssr=True, **{"sample_size": 16} | ssr_changes), temporal_factors=(ssr_factor,))
    frames = math.lcm(4, base_factor, ssr_factor)
    config = PipelineConfig(SCHEDULE, SCHEDULE, num_frames=frames, fps=8, window_frames=window_frames)
    return LumierePipeline(randomise(base, seed), randomise(ssr, seed), config, text_encoder)
