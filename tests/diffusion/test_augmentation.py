from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lumiere_fast.diffusion import EDMParameterization, VParameterization, augmented_conditioning


def test_augmented_conditioning_is_the_noised_clip_doubled() -> None:
    small, noise = torch.randn(2, 2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.0, 0.3])
    noised = torch.stack([small[0], small[1] + 0.3 * noise[1]])
    wanted = F.interpolate(noised, scale_factor=(1, 2, 2), mode="trilinear", align_corners=False)
    for parameterization in (EDMParameterization(), VParameterization()):
        result = augmented_conditioning(small, noise, level, 2, parameterization)
        torch.testing.assert_close(result["image_conditioning"], wanted)
        torch.testing.assert_close(
            result["augmentation_level"], 250 * torch.tensor([math.log(1e-4), math.log(0.3)]), rtol=1e-6, atol=0.0
        )
