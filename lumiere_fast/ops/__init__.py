"""The eight ops of the engine; each module states its formula, shapes and source."""

from __future__ import annotations

from lumiere_fast.ops.blend_windows import blend_windows, window_starts, window_weights
from lumiere_fast.ops.denoise_step import DenoiseStep, StepCoefficients, Threshold, denoise_step
from lumiere_fast.ops.group_norm import group_norm, group_norm_stats
from lumiere_fast.ops.space_time_downsample import space_time_downsample
from lumiere_fast.ops.space_time_upsample import space_time_upsample
from lumiere_fast.ops.spatial_attention import spatial_attention
from lumiere_fast.ops.temporal_attention import temporal_attention
from lumiere_fast.ops.temporal_conv import NormArgs, temporal_conv

__all__ = [
    "DenoiseStep",
    "NormArgs",
    "StepCoefficients",
    "Threshold",
    "blend_windows",
    "denoise_step",
    "group_norm",
    "group_norm_stats",
    "space_time_downsample",
    "space_time_upsample",
    "spatial_attention",
    "temporal_attention",
    "temporal_conv",
    "window_starts",
    "window_weights",
]
