"""What a run's folder says of itself beside its weights: the cascade it belongs to, and how it was noised.

`cascade.json` holds a `Preset`, `scheduler_config.json` (as in a pipeline's folder) the noise schedule and what the
network predicts. The next stage and `assemble` read them, so that a model is sampled in the way it was trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumiere_fast.diffusion import Parameterization, Schedule
from lumiere_fast.models import InflationConfig, Preset, UNetConfig
from lumiere_fast.models.config import config_from_dict
from lumiere_fast.models.io import read_json, write_json_atomically
from lumiere_fast.pipelines.folder import SCHEDULER_CONFIG_NAME, read_scheduler, write_scheduler

CASCADE_NAME = "cascade.json"


def write_run_files(folder: Path, cascade: Preset, schedule: Schedule, parameterization: Parameterization) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomically(dataclasses.asdict(cascade), folder / CASCADE_NAME)
    write_scheduler(folder, schedule, parameterization)


def read_noising(folder: Path) -> tuple[Schedule, Parameterization] | None:
    """How the model in `folder` was trained, or None if its folder does not tell.

    Raises:
        ValueError: `scheduler_config.json` is damaged.
    """
    return read_scheduler(folder) if (folder / SCHEDULER_CONFIG_NAME).is_file() else None


def read_cascade(path: Path) -> Preset:
    """The cascade in a JSON file, or in the `cascade.json` of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or its parts do not fit each other; names the file.
    """
    path = path / CASCADE_NAME if path.is_dir() else path
    values = read_json(path)
    try:
        return check_cascade(_cascade_from_dict(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _cascade_from_dict(values: Mapping[str, Any]) -> Preset:
    preset: Preset = config_from_dict(Preset, values)
    kinds = {"base": UNetConfig, "base_inflation": InflationConfig, "ssr": UNetConfig, "ssr_inflation": InflationConfig}
    parts = {}
    for name, kind in kinds.items():
        if not isinstance(values[name], Mapping):
            raise ValueError(f"{name} must be an object, got {values[name]!r}")
        try:
            parts[name] = config_from_dict(kind, values[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    return dataclasses.replace(preset, **parts)


def check_cascade(cascade: Preset) -> Preset:
    """The same cascade; a ValueError unless its models fit each other and their frames."""
    for name in ("num_frames", "fps", "window_frames"):
        value = getattr(cascade, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if cascade.window_frames > cascade.num_frames:
        raise ValueError(f"window_frames must not exceed num_frames={cascade.num_frames}, got {cascade.window_frames}")
    base, ssr = cascade.base, cascade.ssr
    if base.conditioning_channels or base.noise_augmentation:
        raise ValueError("base must have conditioning_channels=0 and noise_augmentation=false")
    if ssr.conditioning_channels != base.out_channels or not ssr.noise_augmentation:
        raise ValueError(f"ssr must have conditioning_channels={base.out_channels} and noise_augmentation=true")
    if ssr.sample_size % base.sample_size or ssr.sample_size == base.sample_size:
        raise ValueError(
            f"ssr.sample_size must be a multiple of base.sample_size={base.sample_size}, got {ssr.sample_size}"
        )
    for part, frames in (("base", "num_frames"), ("ssr", "window_frames")):
        factor = getattr(cascade, f"{part}_inflation").temporal_factor
        if getattr(cascade, frames) % factor:
            raise ValueError(
                f"{frames} must be a multiple of the {factor} of {part}_inflation, got {getattr(cascade, frames)}"
            )
    return cascade
