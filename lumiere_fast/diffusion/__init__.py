"""Noise schedules, parameterisation and samplers."""

from lumiere_fast.diffusion.augmentation import augmented_conditioning
from lumiere_fast.diffusion.parameterization import EDMParameterization
from lumiere_fast.diffusion.samplers import SAMPLERS, Sampler, ddim, dpm_solver_pp_2m
from lumiere_fast.diffusion.schedule import EDMSchedule, NoiseLevel

__all__ = [
    "SAMPLERS",
    "EDMParameterization",
    "EDMSchedule",
    "NoiseLevel",
    "Sampler",
    "augmented_conditioning",
    "ddim",
    "dpm_solver_pp_2m",
]
