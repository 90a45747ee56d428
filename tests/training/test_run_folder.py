from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lumiere_fast.diffusion import CosineSchedule, VParameterization
from lumiere_fast.models import PRESETS
from lumiere_fast.training.run_folder import check_cascade, read_cascade, read_noising, write_run_files

DEMO = PRESETS["demo"]


@pytest.mark.parametrize("preset", PRESETS.values())
def test_what_is_written_is_read(preset: Any, tmp_path: Path) -> None:
    schedule, parameterization = CosineSchedule(shift=0.5), VParameterization()
    write_run_files(tmp_path, preset, schedule, parameterization)
    assert read_cascade(tmp_path) == preset
    assert read_cascade(tmp_path / "cascade.json") == preset
    assert read_noising(tmp_path) == (schedule, parameterization)


def test_what_is_missing(tmp_path: Path) -> None:
    assert read_noising(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"cascade\.json is missing"):
        read_cascade(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": None}, r"missing keys \['num_frames'\]"),
        ({"frames": 3}, r"unknown keys \['frames'\]"),
        ({"num_frames": 18}, "num_frames must be a multiple of the 4 of base_inflation, got 18"),
        ({"window_frames": 6}, "window_frames must be a multiple of the 4 of ssr_inflation, got 6"),
        ({"window_frames": 32}, "window_frames must not exceed num_frames=16, got 32"),
        ({"fps": 0}, "fps must be an integer >= 1, got 0"),
        ({"fps": True}, "fps must be an integer >= 1, got True"),
        ({"base": 5}, "base must be an object, got 5"),
        ({"base": {"widths": [1]}}, r"base: .*unknown keys \['widths'\]"),
        ({"ssr_inflation": {"temporal_factors": [0, 1]}}, "ssr_inflation: temporal_factors must be >= 1"),
    ],
)
def test_a_bad_cascade_names_its_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {**dataclasses.asdict(DEMO), **change}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(ValueError, match=rf"mine\.json: .*{message}"):
        read_cascade(path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("base", {"conditioning_channels": 3}, "base must have conditioning_channels=0"),
        ("ssr", {"conditioning_channels": 0}, "ssr must have conditioning_channels=3"),
        ("ssr", {"noise_augmentation": False}, "noise_augmentation=true"),
        ("ssr", {"sample_size": 48}, r"ssr\.sample_size must be a multiple of base\.sample_size=32, got 48"),
        ("ssr", {"sample_size": 32}, "got 32"),
    ],
)
def test_models_that_do_not_fit_each_other_are_refused(part: str, change: dict[str, Any], message: str) -> None:
    cascade = dataclasses.replace(DEMO, **{part: dataclasses.replace(getattr(DEMO, part), **change)})
    with pytest.raises(ValueError, match=message):
        check_cascade(cascade)


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"schedule": {"_class_name": "X"}, "parameterization": {}}'])
def test_a_damaged_scheduler_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"scheduler_config\.json"):
        read_noising(tmp_path)
