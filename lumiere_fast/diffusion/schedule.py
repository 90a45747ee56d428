"""Noise levels: which noisy clips exist, which of them training draws and which of them sampling visits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumiere_fast.diffusion._json import check_numbers, check_positive_numbers, from_dict


class NoiseLevel(NamedTuple):
    """A noisy clip is `alpha * clip + sigma * noise`."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = ln(alpha / sigma), half the logarithm of the signal-to-noise ratio; +inf for a clean clip."""
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


@dataclass(frozen=True)
class Schedule(ABC):
    """The noise levels of a diffusion model. Subclasses are frozen dataclasses of numbers, so that JSON can hold them.

    Variance exploding: alpha = 1, sigma grows. Variance preserving: alpha^2 + sigma^2 = 1.
    """

    def levels(self, num_inference_steps: int) -> list[NoiseLevel]:
        """The n + 1 levels of n steps, from the noisiest to the clean clip (1, 0); n below 1 is a ValueError."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be >= 1, got {num_inference_steps}")
        return [*self._noisy_levels(num_inference_steps), NoiseLevel(1.0, 0.0)]

    @abstractmethod
    def _noisy_levels(self, count: int) -> list[NoiseLevel]: ...

    @abstractmethod
    def sample_levels(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training noise levels (alpha, sigma), each (B,) fp32 where the generator lives."""


@dataclass(frozen=True)
class EDMSchedule(Schedule):
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
        check_numbers(train_mean=self.train_mean)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min must be less than sigma_max={self.sigma_max}, got {self.sigma_min}")

    def _noisy_levels(self, count: int) -> list[NoiseLevel]:
        largest, smallest = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        last = max(count - 1, 1)
        return [NoiseLevel(1.0, (largest + i / last * (smallest - largest)) ** self.rho) for i in range(count)]

    def sample_levels(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        normal = torch.randn(batch_size, generator=generator, device=generator.device)
        sigma = torch.exp(self.train_mean + self.train_std * normal)
        return torch.ones_like(sigma), sigma


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Variance-preserving noise, alpha^2 + sigma^2 = 1, at any time t from 0 (clean) to 1 (noise).

        alpha^2 = cos^2(a) / cos^2(a_0),    a = pi/2 (t + offset) / (1 + offset),    a_0 its value at t = 0

    (Nichol & Dhariwal 2021, equation 17), whose log-SNR `lambda = ln(alpha / sigma)` is then raised by `shift`. The
    ends of t are cut where lambda leaves [log_snr_min, log_snr_max]: there it is as good as noise, or clean.
    Sampling visits n times evenly spaced from the noisy end, the clean clip in place of the n + 1st; training draws t
    uniformly.

    Args:
        shift: `ln(64 / size)` keeps for clips of `size` pixels the noise that suits 64 (Hoogeboom et al. 2023, "simple
            diffusion"): larger clips need more.
        offset: of t; keeps the steps next to the clean clip from being too small.
    """

    shift: float = 0.0
    offset: float = 0.008
    log_snr_min: float = -7.5
    log_snr_max: float = 7.5

    def __post_init__(self) -> None:
        check_numbers(shift=self.shift, log_snr_min=self.log_snr_min, log_snr_max=self.log_snr_max)
        check_positive_numbers(offset=self.offset)
        if self.log_snr_min >= self.log_snr_max:
            raise ValueError(f"log_snr_min must be less than log_snr_max={self.log_snr_max}, got {self.log_snr_min}")

    def _noisy_levels(self, count: int) -> list[NoiseLevel]:
        start, end = self._time(self.log_snr_min), self._time(self.log_snr_max)
        times = start + torch.arange(count, dtype=torch.float64) / count * (end - start)
        alphas, sigmas = self._at(times)
        return [NoiseLevel(*pair) for pair in zip(alphas.tolist(), sigmas.tolist(), strict=True)]

    def sample_levels(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start, end = self._time(self.log_snr_min), self._time(self.log_snr_max)
        uniform = torch.rand(batch_size, generator=generator, device=generator.device)
        return self._at(end + uniform * (start - end))

    @property
    def _first_angle(self) -> float:
        """a_0."""
        return math.pi / 2 * self.offset / (1 + self.offset)

    def _at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma). As cos^2 a_0 - cos^2 a = sin(a - a_0) sin(a + a_0), no difference is taken near t = 0."""
        passed = math.pi / 2 / (1 + self.offset) * time
        angle = self._first_angle + passed
        snr = angle.cos() ** 2 / (passed.sin() * (angle + self._first_angle).sin()) * math.exp(2 * self.shift)
        return (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()

    def _time(self, log_snr: float) -> float:
        """The t of a lambda."""
        alpha = math.sqrt(1 / (1 + math.exp(2 * (self.shift - log_snr))))
        angle = math.acos(math.cos(self._first_angle) * alpha)
        return (angle - self._first_angle) * 2 / math.pi * (1 + self.offset)


SCHEDULES: dict[str, type[Schedule]] = {kind.__name__: kind for kind in (EDMSchedule, CosineSchedule)}


def schedule_from_dict(values: Mapping[str, Any]) -> Schedule:
    """The schedule that `to_dict` wrote; without a `_class_name`, an `EDMSchedule`. Errors are ValueErrors."""
    return from_dict(values, SCHEDULES, EDMSchedule.__name__)
