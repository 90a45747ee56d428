"""Noise levels: which noisy clips exist, which of them training draws and which of them sampling visits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class NoiseLevel(NamedTuple):
    """A noisy clip is `alpha * clip + sigma * noise`."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = ln(alpha / sigma); +inf for a clean clip."""
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


def check_positive_numbers(**values: float) -> None:
    """Raise a ValueError that names the first value that is not a finite number above 0."""
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number > 0, got {value!r}")


@dataclass(frozen=True)
class EDMSchedule:
    """Variance-exploding noise, alpha = 1 (Karras et al. 2022, "Elucidating the design space", equation 5).

    Sampling visits `sigma_i = (max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho`, then 0. Training draws
    `ln sigma ~ N(train_mean, train_std)`; video wants more noise than images, whose frames repeat one another.
    """

    sigma_min: float = 0.02
    sigma_max: float = 80.0
    rho: float = 7.0
    train_mean: float = -0.1
    train_std: float = 1.4

    def __post_init__(self) -> None:
        check_positive_numbers(
            sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho, train_std=self.train_std
        )
        if self.sigma_min > self.sigma_max:
            raise ValueError(f"sigma_min must not exceed sigma_max={self.sigma_max}, got {self.sigma_min}")

    def levels(self, num_inference_steps: int) -> list[NoiseLevel]:
        """The n + 1 levels of n steps, from pure noise to the clean clip."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be >= 1, got {num_inference_steps}")
        largest, smallest = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        last = max(num_inference_steps - 1, 1)
        sigmas = [(largest + i / last * (smallest - largest)) ** self.rho for i in range(num_inference_steps)]
        return [NoiseLevel(1.0, sigma) for sigma in [*sigmas, 0.0]]

    def sample_sigmas(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """(B,) training noise levels, fp32."""
        return torch.exp(self.train_mean + self.train_std * torch.randn(batch_size, generator=generator))
