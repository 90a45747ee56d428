"""Samplers as tables: each turns a list of noise levels into one `StepCoefficients` a step.

A step is linear in the latent, the predicted clean clip x0, fresh noise and, for the multistep solver, the previous x0.
So a sampler needs no state and no tensor: `ops.denoise_step` applies its table, and the same table serves one window or
many. All hold for any alpha and sigma, variance exploding or preserving. With primes for the level that a step leads
to, `h = ln(alpha'/sigma') - ln(alpha/sigma)` is its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Real

from lumiere_fast.diffusion.parameterization import Parameterization
from lumiere_fast.diffusion.schedule import NoiseLevel
from lumiere_fast.ops.denoise_step import StepCoefficients

Sampler = Callable[[Sequence[NoiseLevel], Parameterization], list[StepCoefficients]]


def ddim(levels: Sequence[NoiseLevel], parameterization: Parameterization, eta: float = 0.0) -> list[StepCoefficients]:
    """DDIM (Song et al. 2021, equations 12 and 16): deterministic for eta = 0, ancestral sampling for eta = 1.

    `x' = alpha' x0 + sqrt(sigma'^2 - s^2) (x - alpha x0) / sigma + s z` with
    `s = eta sigma' sqrt(1 - e^(-2h))`, eta times the deviation of the posterior q(x' | x, x0), and z fresh noise.
    """
    check_eta(eta)
    eta = float(eta)  # a numpy scalar would give its precision to the table
    steps = []
    for now, after in pairwise(levels):
        contracted = math.exp(now.log_snr - after.log_snr)  # e^-h
        kept = after.sigma * math.sqrt((1 - eta**2) + (eta * contracted) ** 2) / now.sigma
        steps.append(
            StepCoefficients(
                *parameterization.x0_coefficients(now),
                latent=kept,
                x0=after.alpha - kept * now.alpha,
                noise=eta * after.sigma * math.sqrt(1 - contracted**2),
            )
        )
    return steps


def ddpm(levels: Sequence[NoiseLevel], parameterization: Parameterization) -> list[StepCoefficients]:
    """Ancestral sampling: a draw from the exact posterior q(x' | x, x0) (Ho et al. 2020, equations 6 and 7).

    With the noise that leads from x' to x, `x = r x' + sqrt(b) z`, `r = alpha/alpha'`, `b = sigma^2 - r^2 sigma'^2`:
    `mean = (r sigma'^2 x + alpha' b x0) / sigma^2`, `variance = b sigma'^2 / sigma^2`.
    """
    steps = []
    for now, after in pairwise(levels):
        ratio = now.alpha / after.alpha
        added = now.sigma**2 - (ratio * after.sigma) ** 2
        steps.append(
            StepCoefficients(
                *parameterization.x0_coefficients(now),
                latent=ratio * (after.sigma / now.sigma) ** 2,
                x0=after.alpha * added / now.sigma**2,
                noise=math.sqrt(added) * after.sigma / now.sigma,
            )
        )
    return steps


def dpm_solver_pp_2m(levels: Sequence[NoiseLevel], parameterization: Parameterization) -> list[StepCoefficients]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), first order at the first and the last step.

    With r = h_previous / h:
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


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "dpm-solver++": dpm_solver_pp_2m, "ddpm": ddpm}


def sampling_table(
    sampler: str, levels: Sequence[NoiseLevel], parameterization: Parameterization, *, eta: float = 0.0
) -> list[StepCoefficients]:
    """The table of a sampler by its name in `SAMPLERS`; `eta` is of "ddim" (see `ddim`)."""
    check_sampler(sampler, eta)
    if sampler == "ddim":
        return ddim(levels, parameterization, eta)
    return SAMPLERS[sampler](levels, parameterization)


def check_sampler(sampler: str, eta: float = 0.0) -> None:
    """Raise a ValueError unless `sampler` is known and takes this `eta`."""
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    check_eta(eta)
    if eta != 0 and sampler != "ddim":
        raise ValueError(f"eta is a setting of sampler 'ddim'; leave it 0 for {sampler!r}, got {eta}")


def check_eta(eta: float) -> None:
    if not isinstance(eta, Real) or isinstance(eta, bool) or not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 (deterministic) to 1 (ancestral), got {eta!r}")
