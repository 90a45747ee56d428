"""Noise-conditioning augmentation of the super-resolution cascade (Ho et al. 2022, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from lumiere_fast import ops
from lumiere_fast.diffusion.parameterization import Parameterization


def noise_augmented(small: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """A clip (B, 3, T, h, w) noised by `level` (B,), the standard deviation: alpha is 1, whatever the schedule."""
    return small + level[:, None, None, None, None] * noise


def augmented_conditioning(
    small: Tensor, noise: Tensor, level: Tensor, factor: int, parameterization: Parameterization
) -> dict[str, Tensor]:
    """What super-resolution sees of a clip (B, 3, T, h, w): noised by `level` (B,), then `factor` times larger."""
    noised = noise_augmented(small, noise, level)
    return {
        "image_conditioning": ops.space_time_upsample(noised, (1, factor, factor), mode="linear"),
        "augmentation_level": parameterization.timestep(torch.ones_like(level), level),
    }
