"""Triton kernels, one file an op, installed as `lumiere_fast.kernels`. Nothing here imports the rest of the package."""

from __future__ import annotations

# Ops whose kernel is not written yet. An op leaves the list in the change that adds kernels/<op>.py or csrc/<op>.*.
PENDING_KERNELS: tuple[str, ...] = (
    "group_norm",
    "group_norm_stats",
    "temporal_conv",
    "temporal_attention",
    "spatial_attention",
    "blend_windows",
    "denoise_step",
    "space_time_downsample",
    "space_time_upsample",
)
