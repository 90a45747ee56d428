"""Noise schedules, parameterisations, samplers, and the noise itself."""

from lumiere_fast.diffusion._json import to_dict
from lumiere_fast.diffusion.augmentation import augmented_conditioning, noise_augmented
from lumiere_fast.diffusion.noise import Generators, clip_generators, draw_noise
from lumiere_fast.diffusion.parameterization import (
    PARAMETERIZATIONS,
    PREDICTION_TYPES,
    EDMParameterization,
    EpsilonParameterization,
    Parameterization,
    SampleParameterization,
    VParameterization,
    parameterization_from_dict,
)
from lumiere_fast.diffusion.samplers import (
    SAMPLERS,
    Sampler,
    check_sampler,
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    sampling_table,
)
from lumiere_fast.diffusion.schedule import (
    SCHEDULES,
    CosineSchedule,
    EDMSchedule,
    NoiseLevel,
    Schedule,
    schedule_from_dict,
)

__all__ = [
    "PARAMETERIZATIONS",
    "PREDICTION_TYPES",
    "SAMPLERS",
    "SCHEDULES",
    "CosineSchedule",
    "EDMParameterization",
    "EDMSchedule",
    "EpsilonParameterization",
    "Generators",
    "NoiseLevel",
    "Parameterization",
    "SampleParameterization",
    "Sampler",
    "Schedule",
    "VParameterization",
    "augmented_conditioning",
    "check_sampler",
    "clip_generators",
    "ddim",
    "ddpm",
    "dpm_solver_pp_2m",
    "draw_noise",
    "noise_augmented",
    "parameterization_from_dict",
    "sampling_table",
    "schedule_from_dict",
    "to_dict",
]
