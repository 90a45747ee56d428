from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lumiere_fast.diffusion import (
    SAMPLERS,
    EDMParameterization,
    EDMSchedule,
    NoiseLevel,
    augmented_conditioning,
    ddim,
    dpm_solver_pp_2m,
)
from lumiere_fast.ops import StepCoefficients
from lumiere_fast.pipelines.denoising import Denoiser

EDM = EDMParameterization()
MEAN, STD = 0.3, 0.5

# A variance-preserving run of levels: the tables must not lean on alpha = 1.
COSINE = [NoiseLevel(math.cos(t), math.sin(t)) for t in (1.5, 1.2, 0.9, 0.5, 0.2)] + [NoiseLevel(1.0, 0.0)]


def gaussian_x0(x: float, level: NoiseLevel, mean: float = MEAN, std: float = STD) -> float:
    """E[x0 | x] for data N(mean, std^2): the exact denoiser, in closed form."""
    gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
    return mean + gain * (x - level.alpha * mean)


def run(table: Sequence[StepCoefficients], levels: Sequence[NoiseLevel], x: float) -> float:
    """The documented step, with the exact denoiser in place of the network."""
    history = math.nan
    for row, level in zip(table, levels, strict=False):
        x0 = gaussian_x0(x, level)
        x = row.latent * x + row.x0 * x0 + (row.history * history if row.history else 0.0)
        history = x0
    return x


def affine(table: Sequence[StepCoefficients], levels: Sequence[NoiseLevel]) -> tuple[float, float]:
    """(gain, offset): with a linear denoiser the whole run is `gain * x + offset`."""
    offset = run(table, levels, 0.0)
    return run(table, levels, 1.0) - offset, offset


# Samplers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "steps"), [("ddim", 600), ("dpm-solver++", 80)])
def test_a_gaussian_is_sampled_with_its_mean_and_variance(name: str, steps: int) -> None:
    """Exactly: from N(MEAN, STD^2 + sigma_max^2) to N(MEAN, STD^2), to 1 %."""
    levels = EDMSchedule().levels(steps)
    gain, offset = affine(SAMPLERS[name](levels, EDM), levels)
    assert gain * MEAN + offset == pytest.approx(MEAN, rel=0.01)
    assert gain**2 * (STD**2 + levels[0].sigma ** 2) == pytest.approx(STD**2, rel=0.01)


@pytest.mark.parametrize(("name", "steps"), [("ddim", 600), ("dpm-solver++", 80)])
def test_a_gaussian_is_sampled_through_the_whole_loop(name: str, steps: int) -> None:
    """The same with tensors: preconditioned predictions, `denoise_step`, and the loop that calls it."""
    schedule = EDMSchedule(sigma_max=20.0)
    noise = torch.randn(2, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0))

    def predict(scaled: torch.Tensor, timestep: torch.Tensor, frames: slice) -> torch.Tensor:
        sigma = (timestep.double() / 250).exp()[:, None, None, None, None]
        x = scaled * (sigma**2 + EDM.sigma_data**2).sqrt()
        x0 = MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)
        return EDM.target(x0, x, sigma).float()

    clip = Denoiser(schedule, EDM, name, threshold=None)(predict, noise, steps, windows=[slice(0, 4)])
    # the loop starts at sigma_max * noise: the mean it starts from is 0, which the flow shrinks to next to nothing
    assert clip.mean().item() == pytest.approx(MEAN + STD / 20 * (20 * noise.mean().item() - MEAN), abs=0.01)
    assert (clip.var() / noise.var()).item() == pytest.approx(STD**2, rel=0.01)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver_pp_2m, 2)])
def test_order_of_convergence(sampler: Callable[..., list[StepCoefficients]], order: int) -> None:
    """Halving the steps' length divides the error of the probability flow by 2^order. The flow of a Gaussian is known:
    x keeps its distance from the mean in standard deviations."""

    def error(steps: int) -> float:
        levels = EDMSchedule(sigma_min=0.05, sigma_max=10.0).levels(steps)[:-1]  # without the jump to a clean clip
        start, end = levels[0].sigma, levels[-1].sigma
        exact = MEAN + math.sqrt((STD**2 + end**2) / (STD**2 + start**2)) * (4.0 - MEAN)
        return abs(run(sampler(levels, EDM), levels, 4.0) - exact)

    for steps in (40, 80, 160):
        assert error(steps) / error(2 * steps) == pytest.approx(2**order, rel=0.15)
    assert error(40) > 1e-7, "nothing to converge"


def test_second_order_beats_first() -> None:
    levels = EDMSchedule().levels(24)
    gain = {name: abs(affine(table(levels, EDM), levels)[0] * 80 / STD - 1) for name, table in SAMPLERS.items()}
    assert gain["dpm-solver++"] < gain["ddim"] / 4


@pytest.mark.parametrize("levels", [COSINE, EDMSchedule().levels(6)], ids=["preserving", "exploding"])
def test_dpm_solver_coefficients_from_the_paper(levels: list[NoiseLevel]) -> None:
    """Lu et al. 2022, algorithm 2, by its own symbols; the last step, to lambda = infinity, is first order."""
    table = dpm_solver_pp_2m(levels, EDM)
    alpha, sigma = (np.array([getattr(level, name) for level in levels]) for name in ("alpha", "sigma"))
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    assert len(table) == len(levels) - 1
    for i in range(1, len(levels)):
        h = lam[i] - lam[i - 1]
        minus = -alpha[i] * (np.exp(-h) - 1)
        if i in (1, len(levels) - 1):
            first, second = minus, 0.0
        else:
            r = (lam[i - 1] - lam[i - 2]) / h
            first, second = minus * (1 + 1 / (2 * r)), -minus / (2 * r)
        row = table[i - 1]
        assert (row.latent, row.x0, row.history) == pytest.approx((sigma[i] / sigma[i - 1], first, second), rel=1e-9)
        assert row.noise == 0.0


@pytest.mark.parametrize("levels", [COSINE, EDMSchedule().levels(6)], ids=["preserving", "exploding"])
def test_ddim_keeps_the_noise_and_changes_its_amount(levels: list[NoiseLevel]) -> None:
    x0, eps = 0.37, -1.2
    for row, now, after in zip(ddim(levels, EDM), levels, levels[1:], strict=False):
        x = now.alpha * x0 + now.sigma * eps
        assert row.latent * x + row.x0 * x0 == pytest.approx(after.alpha * x0 + after.sigma * eps, abs=1e-12)
        assert row.history == row.noise == 0.0


@pytest.mark.parametrize("levels", [COSINE, EDMSchedule().levels(6)], ids=["preserving", "exploding"])
def test_the_samplers_agree_where_x0_does_not_change(levels: list[NoiseLevel]) -> None:
    """With a constant x0 there is nothing to extrapolate; and both have read the same parameterisation."""
    for one, two in zip(ddim(levels, EDM), dpm_solver_pp_2m(levels, EDM), strict=True):
        assert (one.latent, one.x0) == pytest.approx((two.latent, two.x0 + two.history), rel=1e-9, abs=1e-12)
        assert one[:2] == two[:2]


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_last_step_lands_on_x0(name: str) -> None:
    for steps in (1, 2, 5):
        last = SAMPLERS[name](EDMSchedule().levels(steps), EDM)[-1]
        assert (last.latent, last.x0, last.history) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_one_step_is_one_denoising(name: str) -> None:
    levels = EDMSchedule().levels(1)
    (row,) = SAMPLERS[name](levels, EDM)
    assert (row.x0_latent, row.x0_prediction) == EDM.x0_coefficients(levels[0])
    assert run([row], levels, 5.0) == pytest.approx(gaussian_x0(5.0, levels[0]))


# Schedule ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 24])
def test_levels_are_those_of_karras(steps: int) -> None:
    levels = EDMSchedule(sigma_min=0.05, sigma_max=40.0, rho=5.0).levels(steps)
    wanted = np.linspace(40.0**0.2, 0.05**0.2, steps) ** 5
    assert [level.sigma for level in levels[:-1]] == pytest.approx(wanted.tolist())
    assert levels[-1] == NoiseLevel(1.0, 0.0)
    assert {level.alpha for level in levels} == {1.0}


def test_one_level_is_the_noisiest() -> None:
    assert EDMSchedule().levels(1) == [NoiseLevel(1.0, pytest.approx(80.0)), NoiseLevel(1.0, 0.0)]


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps must be >= 1, got {steps}"):
        EDMSchedule().levels(steps)


def test_log_snr() -> None:
    assert NoiseLevel(0.6, 0.8).log_snr == pytest.approx(math.log(0.75))
    assert NoiseLevel(1.0, 0.0).log_snr == math.inf


def test_training_noise_is_log_normal() -> None:
    schedule = EDMSchedule(train_mean=1.0, train_std=1.4)
    logs = schedule.sample_sigmas(100_000, torch.Generator().manual_seed(0)).log()
    assert logs.mean().item() == pytest.approx(1.0, abs=0.02)
    assert logs.std().item() == pytest.approx(1.4, abs=0.02)
    again = schedule.sample_sigmas(100_000, torch.Generator().manual_seed(0))
    assert torch.equal(again.log(), logs)


# Parameterisation ----------------------------------------------------------------------------------------------------

SIGMAS = [0.002, 0.02, 0.3, 1.0, 7.0, 80.0]


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_a_network_that_hits_the_target_gives_back_the_clean_clip(sigma: float, sigma_data: float) -> None:
    edm = EDMParameterization(sigma_data)
    clean, noise = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = clean + sigma * noise
    c_skip, c_out = edm.x0_coefficients(NoiseLevel(1.0, sigma))
    target = edm.target(clean, noisy, torch.tensor(sigma, dtype=torch.float64))
    torch.testing.assert_close(c_skip * noisy + c_out * target, clean, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_inputs_and_targets_have_unit_variance_and_nothing_in_common(sigma: float, sigma_data: float) -> None:
    edm = EDMParameterization(sigma_data)
    clean, noise = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = torch.tensor(sigma, dtype=torch.float64)
    noisy = sigma_data * clean + sigma * noise
    seen, target = edm.scale_input(noisy, level), edm.target(sigma_data * clean, noisy, level)
    assert seen.var().item() == pytest.approx(1.0, rel=0.02)
    assert target.var().item() == pytest.approx(1.0, rel=0.02)
    assert (seen * target).mean().item() == pytest.approx(
        0.0, abs=0.02
    )  # c_skip leaves only what the input does not tell


def test_preconditioning_is_that_of_the_table() -> None:
    """Karras et al. 2022, table 1, with the numbers put in: sigma = 2, sigma_data = 0.5."""
    assert EDM.x0_coefficients(NoiseLevel(1.0, 2.0)) == pytest.approx((0.25 / 4.25, 2 * 0.5 / math.sqrt(4.25)))
    assert EDM.scale_input(torch.tensor(3.0), torch.tensor(2.0)).item() == pytest.approx(3 / math.sqrt(4.25))
    assert EDM.timestep(torch.tensor([2.0, 0.0])).tolist() == pytest.approx([250 * math.log(2), 250 * math.log(1e-4)])


# Noise augmentation --------------------------------------------------------------------------------------------------


def test_augmented_conditioning_is_the_noised_clip_doubled() -> None:
    generator = torch.Generator().manual_seed(0)
    small, noise = torch.randn(2, 2, 3, 4, 6, 5, generator=generator)
    level = torch.tensor([0.0, 0.3])
    result = augmented_conditioning(small, noise, level, 2, EDM)
    noised = torch.stack([small[0], small[1] + 0.3 * noise[1]])
    wanted = F.interpolate(noised, scale_factor=(1, 2, 2), mode="trilinear", align_corners=False)
    torch.testing.assert_close(result["image_conditioning"], wanted)
    torch.testing.assert_close(result["augmentation_level"], EDM.timestep(level))
