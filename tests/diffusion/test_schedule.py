from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from lumiere_fast.diffusion import (
    SCHEDULES,
    CosineSchedule,
    EDMSchedule,
    NoiseLevel,
    Schedule,
    schedule_from_dict,
    to_dict,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# EDM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 24])
def test_levels_are_those_of_karras(steps: int) -> None:
    levels = EDMSchedule(sigma_min=0.05, sigma_max=40.0, rho=5.0).levels(steps)
    wanted = np.linspace(40.0**0.2, 0.05**0.2, steps) ** 5
    assert [level.sigma for level in levels[:-1]] == pytest.approx(wanted.tolist())
    assert levels[-1] == NoiseLevel(1.0, 0.0)
    assert {level.alpha for level in levels} == {1.0}


def test_one_level_is_the_noisiest() -> None:
    assert EDMSchedule().levels(1) == [NoiseLevel(1.0, pytest.approx(80.0)), NoiseLevel(1.0, 0.0)]


def test_training_noise_is_log_normal() -> None:
    schedule = EDMSchedule(train_mean=1.0, train_std=1.4)
    alpha, sigma = schedule.sample_levels(100_000, seeded())
    assert torch.equal(alpha, torch.ones(100_000))
    assert sigma.log().mean().item() == pytest.approx(1.0, abs=0.02)
    assert sigma.log().std().item() == pytest.approx(1.4, abs=0.02)


# Cosine --------------------------------------------------------------------------------------------------------------


def nichol_dhariwal(t: np.ndarray, s: float = 0.008) -> np.ndarray:
    """alpha^2 by equation 17 of "Improved denoising diffusion", as printed."""
    f = np.cos((t + s) / (1 + s) * np.pi / 2) ** 2
    return f / np.cos(s / (1 + s) * np.pi / 2) ** 2


@pytest.mark.parametrize("steps", [1, 2, 24, 1000])
def test_cosine_levels_are_those_of_the_paper(steps: int) -> None:
    """Evenly spaced in t, from where alpha / sigma has its least value to the clean clip in place of the greatest."""
    schedule = CosineSchedule(log_snr_min=-4.0, log_snr_max=5.0)
    t = np.linspace(0, 1, 2_000_001)[1:-1]
    log_snr = 0.5 * np.log(nichol_dhariwal(t) / (1 - nichol_dhariwal(t)))
    first, last = np.interp([4.0, -5.0], -log_snr, t)
    wanted = nichol_dhariwal(first + np.arange(steps) / steps * (last - first))
    levels = schedule.levels(steps)
    assert [level.alpha**2 for level in levels[:-1]] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert levels[0].log_snr == pytest.approx(-4.0, abs=1e-9)
    assert levels[-1] == NoiseLevel(1.0, 0.0)


@pytest.mark.parametrize("shift", [0.0, math.log(64 / 128), 1.5])
def test_cosine_preserves_the_variance_and_only_gets_cleaner(shift: float) -> None:
    levels = CosineSchedule(shift=shift).levels(2000)
    assert [level.alpha**2 + level.sigma**2 for level in levels] == pytest.approx([1.0] * 2001, abs=1e-12)
    log_snr = np.array([level.log_snr for level in levels])
    assert (np.diff(log_snr) > 0).all()
    assert log_snr[0] == pytest.approx(-7.5, abs=1e-9)
    assert -7.5 <= log_snr[-2] <= 7.5 < log_snr[-1] == math.inf


def test_the_shift_moves_the_log_snr_and_nothing_else() -> None:
    """With ends that move along, the same times have a log-SNR that is `shift` higher."""
    plain = CosineSchedule(log_snr_min=-6.0, log_snr_max=6.0).levels(50)
    shifted = CosineSchedule(shift=-0.7, log_snr_min=-6.7, log_snr_max=5.3).levels(50)
    wanted = [level.log_snr - 0.7 for level in plain[:-1]]
    assert [level.log_snr for level in shifted[:-1]] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("schedule", [CosineSchedule(), CosineSchedule(shift=-1.0, log_snr_min=-3, log_snr_max=2)])
def test_training_draws_the_cosine_times_uniformly(schedule: CosineSchedule) -> None:
    """Quantiles of the drawn log-SNR against those of a fine grid of levels, which is even in t; both ends are hit."""
    alpha, sigma = schedule.sample_levels(200_000, seeded())
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(200_000))
    drawn = (alpha.double() / sigma.double()).log().numpy()
    assert schedule.log_snr_min - 1e-3 <= drawn.min() and drawn.max() <= schedule.log_snr_max + 1e-3
    grid = np.array([level.log_snr for level in schedule.levels(20_000)[:-1]])
    at = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(np.quantile(drawn, at), np.quantile(grid, at), atol=0.05)


# All -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EDMSchedule(), CosineSchedule()])
@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(schedule: Schedule, steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps must be >= 1, got {steps}"):
        schedule.levels(steps)


@pytest.mark.parametrize("schedule", [EDMSchedule(), CosineSchedule()])
def test_training_draws_are_the_generators(schedule: Schedule) -> None:
    one, two, other = (torch.stack(schedule.sample_levels(64, seeded(seed))) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_log_snr() -> None:
    assert NoiseLevel(0.6, 0.8).log_snr == pytest.approx(math.log(0.75))
    assert NoiseLevel(1.0, 0.0).log_snr == math.inf


CHANGED = [EDMSchedule(0.01, 50.0, 5.0, -1.0, 0.7), CosineSchedule(-0.5, 0.01, -6.0, 6.5)]


@pytest.mark.parametrize("schedule", CHANGED, ids=lambda schedule: type(schedule).__name__)
def test_json_holds_a_schedule(schedule: Schedule) -> None:
    assert schedule_from_dict(json.loads(json.dumps(to_dict(schedule)))) == schedule


def test_every_schedule_is_registered_and_edm_needs_no_name() -> None:
    assert set(SCHEDULES.values()) == {type(schedule) for schedule in CHANGED} == set(Schedule.__subclasses__())
    assert schedule_from_dict({"sigma_max": 50.0}) == EDMSchedule(sigma_max=50.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "Linear"}, "_class_name must be one of EDMSchedule, CosineSchedule, got 'Linear'"),
        ({"sigma": 1}, "EDMSchedule has no setting sigma; it has sigma_min, sigma_max, rho"),
        ({"sigma_min": "x"}, "sigma_min must be a number > 0, got 'x'"),
        ({"sigma_max": math.inf}, "sigma_max must be a number > 0, got inf"),
        ({"rho": 0}, "rho must be a number > 0, got 0"),
        ({"train_std": True}, "train_std must be a number > 0, got True"),
        ({"train_mean": math.nan}, "train_mean must be a finite number, got nan"),
        ({"sigma_min": 80.0}, "sigma_min must be less than sigma_max=80.0, got 80.0"),
        ({"_class_name": "CosineSchedule", "offset": -0.1}, "offset must be a number > 0, got -0.1"),
        ({"_class_name": "CosineSchedule", "shift": None}, "shift must be a finite number, got None"),
        ({"_class_name": "CosineSchedule", "log_snr_min": 9}, "log_snr_min must be less than log_snr_max=7.5, got 9"),
        ("EDMSchedule", "expected an object with _class_name one of EDMSchedule, CosineSchedule, got 'EDMSchedule'"),
    ],
)
def test_what_is_no_schedule_is_told(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_from_dict(values)
