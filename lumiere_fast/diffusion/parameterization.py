"""What the network sees and predicts: EDM preconditioning (Karras et al. 2022, table 1).

    x0 = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, timestep(sigma))

with s the standard deviation of the data: c_skip = s^2 / (sigma^2 + s^2), c_out = sigma s / sqrt(sigma^2 + s^2),
c_in = 1 / sqrt(sigma^2 + s^2), timestep = 250 ln sigma, so that inputs, targets and the embedding stay at unit scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lumiere_fast.diffusion.schedule import NoiseLevel


@dataclass(frozen=True)
class EDMParameterization:
    """EDM preconditioning for data of standard deviation `sigma_data`."""

    sigma_data: float = 0.5

    def scale_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """c_in(sigma) x; sigma broadcasts against x."""
        return x * torch.rsqrt(sigma**2 + self.sigma_data**2)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The noise level as the network is told it. A level of 0 counts as 1e-4."""
        return 250.0 * sigma.clamp(min=1e-4).log()

    def x0_coefficients(self, level: NoiseLevel) -> tuple[float, float]:
        """(c_skip, c_out): x0 = c_skip * x + c_out * prediction. Written for alpha = 1."""
        variance = level.sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, level.sigma * self.sigma_data / variance**0.5

    def target(self, clean: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
        """What the network should predict: `(clean - c_skip noisy) / c_out`, of unit variance at every level."""
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        return (clean - c_skip * noisy) * variance.sqrt() / (sigma * self.sigma_data)
