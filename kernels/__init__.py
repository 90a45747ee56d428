"""Triton kernels, one file an op, installed as `lumiere_fast.kernels`. Nothing here imports the rest of the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

# Ops whose kernel is not written yet. An op leaves the list in the change that adds kernels/<op>.py or csrc/<op>.*.
PENDING_KERNELS: tuple[str, ...] = (
    "group_norm",
    "group_norm_stats",
    "temporal_conv",
    "temporal_attention",
    "spatial_attention",
    "denoise_step",
    "space_time_downsample",
    "space_time_upsample",
)


def source_hash(op: str) -> str:
    """Of everything the op's Triton kernel is made of: kernels/<op>.py and what all kernels share."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (folder / f"{op}.py", *sorted(folder.glob("_[!_]*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
