from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from lumiere_fast.diffusion import (
    SAMPLERS,
    CosineSchedule,
    EDMParameterization,
    EDMSchedule,
    EpsilonParameterization,
    NoiseLevel,
    Parameterization,
    SampleParameterization,
    Schedule,
    VParameterization,
    check_sampler,
    clip_generators,
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    draw_noise,
    sampling_table,
)
from lumiere_fast.ops import StepCoefficients
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.windows import Window, plan_windows

EDM = EDMParameterization()
KINDS = [EDM, EpsilonParameterization(), VParameterization(), SampleParameterization()]
SCHEDULES = [EDMSchedule(), CosineSchedule()]
MEAN, STD = 0.3, 0.5

# Few levels, far apart. A variance-preserving run among them: the tables must not lean on alpha = 1.
COSINE = [NoiseLevel(math.cos(t), math.sin(t)) for t in (1.5, 1.2, 0.9, 0.5, 0.2)] + [NoiseLevel(1.0, 0.0)]
RUNS = pytest.mark.parametrize("levels", [COSINE, EDMSchedule().levels(6)], ids=["preserving", "exploding"])


def name(value: object) -> str:
    return type(value).__name__


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


def exact_predictions(levels: Sequence[NoiseLevel], kind: Parameterization) -> tuple[np.ndarray, np.ndarray]:
    """(slope, offset) at each level of E[target | x], linear in x: what a perfectly trained network answers."""
    alpha, sigma = torch.tensor(levels, dtype=torch.float64).T
    answers = []
    for x in (0.0, 1.0):
        x0 = torch.tensor([gaussian_x0(x, level) for level in levels], dtype=torch.float64)
        answers.append(kind.target(x0, (x - alpha * x0) / sigma, alpha, sigma))
    return (answers[1] - answers[0]).numpy(), answers[0].numpy()


def moments(
    table: Sequence[StepCoefficients],
    levels: Sequence[NoiseLevel],
    kind: Parameterization,
    start: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """Mean and variance at the end of a run from those of its `start`; None for those of data at the first level.

    Exactly: latent and history are linear in each other and in the fresh noise, so their joint mean and covariance
    follow the table.
    """
    alpha, sigma = levels[0]
    first, spread = start or (alpha * MEAN, alpha**2 * STD**2 + sigma**2)
    mean, covariance = np.array([first, 0.0]), np.diag([spread, 0.0])
    for row, slope, offset in zip(table, *exact_predictions(levels[:-1], kind), strict=True):
        gain, constant = row.x0_latent + row.x0_prediction * slope, row.x0_prediction * offset  # of x0 in the latent
        matrix = np.array([[row.latent + row.x0 * gain, row.history], [gain, 0.0]])
        mean = matrix @ mean + np.array([row.x0, 1.0]) * constant
        covariance = matrix @ covariance @ matrix.T + np.diag([row.noise**2, 0.0])
    return mean[0], covariance[0, 0]


# A Gaussian with the exact score -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize(
    ("sampler", "eta", "steps"),
    [("ddim", 0.0, 600), ("ddim", 0.5, 1000), ("ddim", 1.0, 1500), ("ddpm", 0.0, 1500), ("dpm-solver++", 0.0, 80)],
)
def test_a_gaussian_is_sampled_with_its_mean_and_variance(
    sampler: str, eta: float, steps: int, schedule: Schedule, kind: Parameterization
) -> None:
    levels = schedule.levels(steps)
    mean, variance = moments(sampling_table(sampler, levels, kind, eta=eta), levels, kind)
    assert mean == pytest.approx(MEAN, rel=0.01)
    assert variance == pytest.approx(STD**2, rel=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_what_the_network_predicts_makes_no_difference(sampler: str, schedule: Schedule) -> None:
    levels = schedule.levels(9)
    results = [moments(SAMPLERS[sampler](levels, kind), levels, kind) for kind in KINDS]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize("schedule", [EDMSchedule(sigma_max=20.0), CosineSchedule()], ids=name)
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 150), ("dpm-solver++", 60), ("ddpm", 200)])
def test_a_gaussian_is_sampled_through_the_whole_loop(
    sampler: str, steps: int, schedule: Schedule, kind: Parameterization
) -> None:
    """The same with tensors and drawn noise, in fp32: scaled inputs, predictions, `denoise_step`, the loop that calls
    it. Against the moments of the same table, to four deviations of 2^16 samples."""
    generators = clip_generators(torch.Generator().manual_seed(0), 2)
    noise = draw_noise((2, 1, 2, 128, 128), "cpu", generators)

    def predict(scaled: torch.Tensor, timestep: torch.Tensor, window: Window) -> torch.Tensor:
        ratio = (timestep.double() / 250).exp()[:, None, None, None, None]
        alpha = 1 / (1 + ratio**2).sqrt() if isinstance(schedule, CosineSchedule) else torch.ones_like(ratio)
        sigma = alpha * ratio
        x = scaled / kind.scale_input(torch.ones_like(ratio), alpha, sigma)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return kind.target(x0, (x - alpha * x0) / sigma, alpha, sigma).float()

    denoiser = Denoiser(schedule, kind, sampler, threshold=None)
    clip = denoiser(predict, noise, steps, windows=plan_windows(2, 2, 0), generators=generators).clip
    levels = schedule.levels(steps)
    start = (0.0, levels[0].sigma ** 2)  # as the loop starts
    mean, variance = moments(SAMPLERS[sampler](levels, kind), levels, kind, start)
    assert clip.mean().item() == pytest.approx(mean, abs=4 * STD / 256)
    assert clip.var().item() == pytest.approx(variance, rel=4 * 2**0.5 / 256)
    assert (mean, variance) == pytest.approx((MEAN, STD**2), rel=0.05)


@pytest.mark.parametrize("schedule", [EDMSchedule(sigma_min=0.05, sigma_max=10.0), CosineSchedule()], ids=name)
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver_pp_2m, 2)])
def test_order_of_convergence(sampler: Callable[..., list[StepCoefficients]], order: int, schedule: Schedule) -> None:
    """Halving the steps' length divides the error of the probability flow by 2^order. The flow of a Gaussian is known:
    x keeps its distance from the mean in standard deviations. Over a part of the schedule, between fixed ends."""

    def error(steps: int) -> float:
        if isinstance(schedule, CosineSchedule):  # its last level moves with the number of steps
            levels = [NoiseLevel(math.cos(t), math.sin(t)) for t in np.linspace(1.5, 0.1, steps)]
        else:
            levels = schedule.levels(steps)[:-1]  # without the jump to a clean clip
        start, end = (level.alpha**2 * STD**2 + level.sigma**2 for level in (levels[0], levels[-1]))
        exact = levels[-1].alpha * MEAN + math.sqrt(end / start) * (4.0 - levels[0].alpha * MEAN)
        return abs(run(sampler(levels, EDM), levels, 4.0) - exact)

    for steps in (40, 80, 160):
        assert error(steps) / error(2 * steps) == pytest.approx(2**order, rel=0.15)
    assert error(40) > 1e-7, "nothing to converge"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_second_order_beats_first(schedule: Schedule) -> None:
    levels = schedule.levels(24)
    size = math.sqrt(levels[0].alpha ** 2 * STD**2 + levels[0].sigma ** 2)
    gain = {
        sampler: abs(affine(SAMPLERS[sampler](levels, EDM), levels)[0] * size / STD - 1)
        for sampler in ("ddim", "dpm-solver++")
    }
    assert gain["dpm-solver++"] < gain["ddim"] / 4


# Each sampler against its paper --------------------------------------------------------------------------------------


@RUNS
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


@RUNS
def test_ddim_keeps_the_noise_and_changes_its_amount(levels: list[NoiseLevel]) -> None:
    x0, eps = 0.37, -1.2
    for row, now, after in zip(ddim(levels, EDM), levels, levels[1:], strict=False):
        x = now.alpha * x0 + now.sigma * eps
        assert row.latent * x + row.x0 * x0 == pytest.approx(after.alpha * x0 + after.sigma * eps, abs=1e-12)
        assert row.history == row.noise == 0.0


@RUNS
def test_ddpm_draws_from_the_posterior(levels: list[NoiseLevel]) -> None:
    """Bayes' rule by precisions: N(x'; alpha' x0, sigma'^2), which the clean clip gives, times N(x; r x', b), which the
    noisy one does. Their product's precision is the sum, its mean the mean weighted by precision."""
    x, x0 = 0.8, -0.35
    for row, now, after in zip(ddpm(levels, EDM)[:-1], levels, levels[1:], strict=False):
        r = now.alpha / after.alpha
        b = now.sigma**2 - r**2 * after.sigma**2
        precision = 1 / after.sigma**2 + r**2 / b
        mean = (after.alpha * x0 / after.sigma**2 + r * x / b) / precision
        assert row.latent * x + row.x0 * x0 == pytest.approx(mean, rel=1e-9)
        assert row.noise**2 == pytest.approx(1 / precision, rel=1e-9)
        assert row.history == 0.0


@RUNS
def test_ddim_of_eta_one_is_ddpm(levels: list[NoiseLevel]) -> None:
    for one, two in zip(ddim(levels, EDM, eta=1.0), ddpm(levels, EDM), strict=True):
        assert one == pytest.approx(two, rel=1e-9, abs=1e-12)


@RUNS
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_of_any_eta_keeps_the_marginals(levels: list[NoiseLevel], eta: float) -> None:
    """Where x ~ N(alpha x0, sigma^2), the step's result is N(alpha' x0, sigma'^2); eta is the share of the posterior's
    deviation that is drawn afresh."""
    posterior = [row.noise for row in ddpm(levels, EDM)]
    for row, now, after, full in zip(ddim(levels, EDM, eta), levels, levels[1:], posterior, strict=False):
        assert row.latent * now.alpha + row.x0 == pytest.approx(after.alpha)
        assert (row.latent * now.sigma) ** 2 + row.noise**2 == pytest.approx(after.sigma**2)
        assert row.noise == pytest.approx(eta * full, rel=1e-9)


@RUNS
def test_the_samplers_agree_where_x0_does_not_change(levels: list[NoiseLevel]) -> None:
    """With a constant x0 there is nothing to extrapolate; and both have read the same parameterisation."""
    for one, two in zip(ddim(levels, EDM), dpm_solver_pp_2m(levels, EDM), strict=True):
        assert (one.latent, one.x0) == pytest.approx((two.latent, two.x0 + two.history), rel=1e-9, abs=1e-12)
        assert one[:2] == two[:2]


# All -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=name)
@RUNS
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_x0_is_read_as_the_parameterization_says(
    sampler: str, levels: list[NoiseLevel], kind: Parameterization
) -> None:
    table = SAMPLERS[sampler](levels, kind)
    assert [row[:2] for row in table] == [kind.x0_coefficients(level) for level in levels[:-1]]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_last_step_lands_on_x0(sampler: str, schedule: Schedule) -> None:
    for steps in (1, 2, 5):
        last = SAMPLERS[sampler](schedule.levels(steps), EDM)[-1]
        assert last[2:] == (0.0, pytest.approx(1.0), 0.0, 0.0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_one_step_is_one_denoising(sampler: str, schedule: Schedule) -> None:
    levels = schedule.levels(1)
    (row,) = SAMPLERS[sampler](levels, EDM)
    assert (row.x0_latent, row.x0_prediction) == EDM.x0_coefficients(levels[0])
    assert run([row], levels, 5.0) == pytest.approx(gaussian_x0(5.0, levels[0]))


@pytest.mark.parametrize("schedule", [*SCHEDULES, CosineSchedule(shift=-1.5)], ids=name)
@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("steps", [3, 1000])
def test_tables_are_finite_and_small_at_any_number_of_steps(sampler: str, schedule: Schedule, steps: int) -> None:
    """Neighbouring levels do not cancel, and no step extrapolates far."""
    levels = schedule.levels(steps)
    for row, (now, after) in zip(SAMPLERS[sampler](levels, EDM), pairwise(levels), strict=True):
        assert all(math.isfinite(value) for value in row)
        assert 0 <= row.noise <= after.sigma
        assert abs(row.history) < 2
        assert row.latent * now.alpha + row.x0 + row.history == pytest.approx(after.alpha, abs=1e-9)


@pytest.mark.parametrize(
    ("sampler", "eta", "message"),
    [
        ("euler", 0.0, r"sampler must be one of ddim, dpm-solver\+\+, ddpm, got 'euler'"),
        ("ddim", 1.5, r"eta must be from 0 \(deterministic\) to 1 \(ancestral\), got 1.5"),
        ("ddim", -0.1, "eta must be from 0"),
        ("ddim", math.nan, "eta must be from 0"),
        ("ddpm", 0.5, "eta is a setting of sampler 'ddim'; leave it 0 for 'ddpm', got 0.5"),
        ("dpm-solver++", 1.0, "eta is a setting of sampler 'ddim'"),
    ],
)
def test_what_is_no_sampler_is_told(sampler: str, eta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampler(sampler, eta)
    with pytest.raises(ValueError, match=message):
        sampling_table(sampler, COSINE, EDM, eta=eta)
