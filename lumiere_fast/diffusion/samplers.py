"""Samplers as tables: each turns a list of noise levels into one `StepCoefficients` a step.

A step is linear in the latent, the predicted clean clip x0 and, for the multistep solver, the previous x0. So a sampler
needs no state and no tensor: `ops.denoise_step` applies its table, and the same table serves one window or many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from lumiere_fast.diffusion.parameterization import EDMParameterization
from lumiere_fast.diffusion.schedule import NoiseLevel
from lumiere_fast.ops.denoise_step import StepCoefficients

Sampler = Callable[[Sequence[NoiseLevel], EDMParameterization], list[StepCoefficients]]


def ddim(levels: Sequence[NoiseLevel], parameterization: EDMParameterization) -> list[StepCoefficients]:
    """Deterministic DDIM (Song et al. 2021, eta = 0): `x' = alpha' x0 + sigma' (x - alpha x0) / sigma`."""
    steps = []
    for now, after in pairwise(levels):
        ratio = after.sigma / now.sigma
        steps.append(
            StepCoefficients(*parameterization.x0_coefficients(now), latent=ratio, x0=after.alpha - ratio * now.alpha)
        )
    return steps


def dpm_solver_pp_2m(levels: Sequence[NoiseLevel], parameterization: EDMParameterization) -> list[StepCoefficients]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), first order at the first and the last step.

    With lambda = ln(alpha/sigma), h its step and r = h_previous / h:
    `D = (1 + 1/(2r)) x0 - 1/(2r) x0_previous`, `x' = (sigma'/sigma) x - alpha' (e^-h - 1) D`.
    """
    steps = []
    previous_h = math.inf
    for now, after in pairwise(levels):
        h = after.log_snr - now.log_snr
        gain = -after.alpha * math.expm1(-h)
        extrapolation = 0.0 if math.isinf(h) or math.isinf(previous_h) else h / (2 * previous_h)
        steps.append(
            StepCoefficients(
                *parameterization.x0_coefficients(now),
                latent=after.sigma / now.sigma,
                x0=gain * (1 + extrapolation),
                history=-gain * extrapolation,
            )
        )
        previous_h = h
    return steps


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "dpm-solver++": dpm_solver_pp_2m}
