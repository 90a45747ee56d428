"""What the network sees and predicts, for a noisy clip `x = alpha x0 + sigma noise` of any (alpha, sigma).

| class | `prediction_type` | F, the network's target | x0 |
|---|---|---|---|
| `EDMParameterization` | "edm" | (sigma x0 / s - alpha s noise) / d | c_skip x + c_out F |
| `EpsilonParameterization` | "epsilon" | noise | (x - sigma F) / alpha |
| `VParameterization` | "v_prediction" | (alpha noise - sigma x0) / n | (alpha x - sigma n F) / n^2 |
| `SampleParameterization` | "sample" | x0 | F |

with s the standard deviation of the data, `d^2 = alpha^2 s^2 + sigma^2` and `n^2 = alpha^2 + sigma^2`, which is 1 for
variance-preserving noise. The names are those of diffusers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lumiere_fast.diffusion._json import check_positive_numbers, from_dict
from lumiere_fast.diffusion.schedule import NoiseLevel


@dataclass(frozen=True)
class Parameterization(ABC):
    """How a network's input, noise level and output are scaled. Subclasses are frozen dataclasses of numbers.

    `alpha` and `sigma` broadcast against the clips: (B, 1, 1, 1, 1) for (B, C, T, H, W).
    """

    prediction_type: ClassVar[str]

    def scale_input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The network's input, at unit scale: `x / sqrt(alpha^2 + sigma^2)`."""
        return x * torch.rsqrt(alpha**2 + sigma**2)

    def timestep(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise level as the network is told it, `250 ln(sigma / alpha)`. A ratio below 1e-4 counts as 1e-4."""
        return 250.0 * (sigma / alpha).clamp(min=1e-4).log()

    @abstractmethod
    def x0_coefficients(self, level: NoiseLevel) -> tuple[float, float]:
        """(of the noisy clip, of the prediction) in x0, the predicted clean clip."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should predict of `alpha * clean + sigma * noise`."""


@dataclass(frozen=True)
class EDMParameterization(Parameterization):
    """Preconditioning for data of standard deviation `sigma_data` (Karras et al. 2022, table 1).

    Theirs for alpha = 1, and for any alpha theirs of x / alpha, whose noise is sigma / alpha:

        c_skip = alpha s^2 / d^2,  c_out = sigma s / d,  c_in = 1 / d,  d^2 = alpha^2 s^2 + sigma^2

    Input and target have unit variance at every level. With s = 1 and variance-preserving noise the target is -v.
    """

    prediction_type = "edm"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_positive_numbers(sigma_data=self.sigma_data)

    def scale_input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """c_in x."""
        return x * torch.rsqrt(sigma**2 + alpha**2 * self.sigma_data**2)

    def x0_coefficients(self, level: NoiseLevel) -> tuple[float, float]:
        """(c_skip, c_out)."""
        alpha, sigma = level
        variance = sigma**2 + alpha**2 * self.sigma_data**2
        return alpha * self.sigma_data**2 / variance, sigma * self.sigma_data / variance**0.5

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """`(clean - c_skip x) / c_out`, its differences taken on paper: exact at the smallest sigma too."""
        variance = sigma**2 + alpha**2 * self.sigma_data**2
        return (sigma / self.sigma_data * clean - alpha * self.sigma_data * noise) * variance.rsqrt()


@dataclass(frozen=True)
class EpsilonParameterization(Parameterization):
    """The network predicts the noise (Ho et al. 2020)."""

    prediction_type = "epsilon"

    def x0_coefficients(self, level: NoiseLevel) -> tuple[float, float]:
        return 1 / level.alpha, -level.sigma / level.alpha

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise


@dataclass(frozen=True)
class VParameterization(Parameterization):
    """The network predicts `v = (alpha noise - sigma clean) / n` (Salimans & Ho 2022, where n = 1)."""

    prediction_type = "v_prediction"

    def x0_coefficients(self, level: NoiseLevel) -> tuple[float, float]:
        alpha, sigma = level
        power = alpha**2 + sigma**2
        return alpha / power, -sigma / power**0.5

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * noise - sigma * clean) * torch.rsqrt(alpha**2 + sigma**2)


@dataclass(frozen=True)
class SampleParameterization(Parameterization):
    """The network predicts the clean clip."""

    prediction_type = "sample"

    def x0_coefficients(self, level: NoiseLevel) -> tuple[float, float]:
        return 0.0, 1.0

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return clean


_KINDS = (EDMParameterization, EpsilonParameterization, VParameterization, SampleParameterization)
PARAMETERIZATIONS: dict[str, type[Parameterization]] = {kind.__name__: kind for kind in _KINDS}
PREDICTION_TYPES: dict[str, type[Parameterization]] = {kind.prediction_type: kind for kind in _KINDS}


def parameterization_from_dict(values: Mapping[str, Any]) -> Parameterization:
    """What `to_dict` wrote; without a `_class_name`, an `EDMParameterization`. Errors are ValueErrors."""
    return from_dict(values, PARAMETERIZATIONS, EDMParameterization.__name__)
