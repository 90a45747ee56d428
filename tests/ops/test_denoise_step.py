from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lumiere_fast.ops import StepCoefficients, Threshold, blend_windows, denoise_step
from lumiere_fast.ops.denoise_step import quantile
from tests.ops.common import (
    CHANNELS_LAST,
    FORMATS,
    Draw,
    check_compiled,
    check_operator,
    check_operator_gradient,
    check_out,
)

STARTS = [0, 6, 12]  # windows of 8 frames over 20
PLAIN = StepCoefficients(1.2, -0.5, 0.8, 0.3)


@pytest.fixture
def draw() -> Draw:
    return Draw(23)


def cosine(t: float) -> tuple[float, float]:
    """alpha and sigma of the cosine schedule at time t in (0, 1)."""
    return math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)


def mean_of_windows(windows: Tensor) -> Tensor:
    total, count = torch.zeros(*windows.shape[1:3], 20, *windows.shape[4:], dtype=windows.dtype), torch.zeros(20)
    for window, start in zip(windows, STARTS, strict=True):
        total[:, :, start : start + 8] += window
        count[start : start + 8] += 1
    return total / count[:, None, None]


def test_ddim_with_eta_on_eps(draw: Draw) -> None:
    """Song et al. 2021, eq. 12 and 16, on a blended, guided eps, in fp64 and by hand."""
    (alpha, sigma), (alpha_next, sigma_next), eta = cosine(0.7), cosine(0.6), 0.6
    windows, latent, noise = (
        draw(3, 4, 3, 8, 4, 4),
        draw(2, 3, 20, 4, 4),
        draw(2, 3, 20, 4, 4),
    )
    blended = mean_of_windows(windows)
    eps = (1 + 2.5) * blended[:2] - 2.5 * blended[2:]
    x0 = ((latent - sigma * eps) / alpha).clamp(-1, 1)
    fresh = eta * sigma_next / sigma * math.sqrt(1 - (alpha / alpha_next) ** 2)
    direction = (latent - alpha * x0) / sigma
    wanted = alpha_next * x0 + math.sqrt(sigma_next**2 - fresh**2) * direction + fresh * noise

    toward = math.sqrt(sigma_next**2 - fresh**2) / sigma
    coefficients = StepCoefficients(
        1 / alpha, -sigma / alpha, latent=toward, x0=alpha_next - toward * alpha, noise=fresh
    )
    step = denoise_step(
        windows, STARTS, latent, coefficients, guidance_scale=3.5, threshold=Threshold("static"), noise=noise
    )
    torch.testing.assert_close(step.x0, x0)
    torch.testing.assert_close(step.latent, wanted)


def test_dpm_solver_pp_2m_on_v(draw: Draw) -> None:
    """Lu et al. 2022, algorithm 2, on a v prediction, in fp64 and by hand."""
    (a0, s0), (a1, s1), (a2, s2) = cosine(0.8), cosine(0.7), cosine(0.55)
    lambdas = [math.log(a / s) for a, s in ((a0, s0), (a1, s1), (a2, s2))]
    h, h_last = lambdas[2] - lambdas[1], lambdas[1] - lambdas[0]
    r = h_last / h
    window, latent, history = (
        draw(2, 3, 5, 4, 4),
        draw(2, 3, 5, 4, 4),
        draw(2, 3, 5, 4, 4),
    )
    x0 = a1 * latent - s1 * window
    corrected = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * history
    wanted = s2 / s1 * latent - a2 * math.expm1(-h) * corrected

    pull = -a2 * math.expm1(-h)
    coefficients = StepCoefficients(a1, -s1, latent=s2 / s1, x0=pull * (1 + 1 / (2 * r)), history=-pull / (2 * r))
    step = denoise_step([window], [0], latent, coefficients, history=history)
    torch.testing.assert_close(step.x0, x0)
    torch.testing.assert_close(step.latent, wanted)


@pytest.mark.parametrize("per", ["clip", "frame"])
@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold(per: str, percentile: float, draw: Draw) -> None:
    """Imagen's rule with torch.quantile, clip by clip or frame by frame; one clip stays inside and is not touched."""
    window = draw(2, 3, 5, 6, 7) * torch.tensor([0.1, 3.0]).view(2, 1, 1, 1, 1)
    step = denoise_step(
        [window],
        [0],
        torch.zeros_like(window),
        StepCoefficients(0, 1, 0, 1),
        threshold=Threshold("dynamic", percentile, per),
    )
    wanted = torch.empty_like(window)
    for b in range(2):
        for frames in [slice(0, 5)] if per == "clip" else [slice(f, f + 1) for f in range(5)]:
            part = window[b, :, frames]
            s = max(torch.quantile(part.abs().flatten(), percentile).item(), 1.0)
            wanted[b, :, frames] = part.clamp(-s, s) / s
    torch.testing.assert_close(step.x0, wanted)
    torch.testing.assert_close(step.latent, wanted)
    torch.testing.assert_close(step.x0[0], window[0])


def test_quantile_past_the_limit_of_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randperm(2**24 + 5, generator=generator, dtype=torch.int32).float().view(1, 1, -1)
    assert quantile(values, 0.999, (1, 2)).item() == pytest.approx(0.999 * (2**24 + 4), rel=1e-6)


def test_threshold_comes_after_blending(draw: Draw) -> None:
    """Two windows at 3 and -1 agree on 1 where they overlap, which a bound of 1 before blending would make 0."""
    windows = [torch.full((1, 1, 4, 1, 1), 3.0), torch.full((1, 1, 4, 1, 1), -1.0)]
    step = denoise_step(
        windows, [0, 2], torch.zeros(1, 1, 6, 1, 1), StepCoefficients(0, 1, 0, 1), threshold=Threshold("static")
    )
    assert step.x0.flatten().tolist() == [1, 1, 1, 1, -1, -1]


def test_one_window_is_no_window(draw: Draw) -> None:
    """A video in one window steps exactly as by plain arithmetic on the prediction itself."""
    window, latent = (
        draw(2, 3, 8, 4, 4).float(),
        draw(2, 3, 8, 4, 4).float(),
    )
    step = denoise_step([window], [0], latent, PLAIN, weights=draw(8).abs() + 0.1)
    x0 = PLAIN.x0_latent * latent + PLAIN.x0_prediction * window
    assert torch.equal(step.x0, x0)
    assert torch.equal(step.latent, PLAIN.latent * latent + PLAIN.x0 * x0)


def test_guidance_of_one_is_the_conditional_half(draw: Draw) -> None:
    windows, latent = draw(3, 4, 3, 8, 4, 4), draw(2, 3, 20, 4, 4)
    guided = denoise_step(windows, STARTS, latent, PLAIN, guidance_scale=1.0)
    torch.testing.assert_close(guided, denoise_step(windows[:, :2], STARTS, latent, PLAIN))


def test_noise_variance_in_overlaps_is_one() -> None:
    """One draw for each frame keeps unit variance everywhere. Stepping each window with noise of its own and averaging
    the samples halves it in overlaps: the bug that this op exists to make impossible."""
    draw = Draw(4, torch.float32)
    starts, shape = [0, 6], (1, 3, 14, 64, 64)  # frames 6 and 7 are in both windows
    latent, silent = torch.zeros(shape), torch.zeros(2, 1, 3, 8, 64, 64)
    only_noise = StepCoefficients(0, 1, 0, 1, noise=1.0)
    noise = draw(*shape)
    once = denoise_step(silent, starts, latent, only_noise, noise=noise).latent.var(dim=(0, 1, 3, 4))
    torch.testing.assert_close(once, torch.ones(14), atol=0.06, rtol=0)

    stepped = [
        denoise_step(
            silent[i : i + 1],
            [0],
            latent[:, :, s : s + 8],
            only_noise,
            noise=draw(1, 3, 8, 64, 64),
        ).latent
        for i, s in enumerate(starts)
    ]
    wrong = blend_windows(stepped, starts, 14).var(dim=(0, 1, 3, 4))
    wanted = torch.ones(14)
    wanted[6:8] = 0.5
    torch.testing.assert_close(wrong, wanted, atol=0.06, rtol=0)


def test_blends_in_space(draw: Draw) -> None:
    corners = [[0, 0, 0], [0, 0, 3], [0, 2, 0], [0, 2, 3]]
    windows, latent = draw(4, 2, 3, 4, 4, 5), draw(1, 3, 4, 6, 8)
    step = denoise_step(windows, corners, latent, PLAIN, guidance_scale=2.0)
    blended = blend_windows(windows, corners, 4)
    prediction = blended[1:] + 2.0 * (blended[:1] - blended[1:])
    torch.testing.assert_close(step.x0, PLAIN.x0_latent * latent + PLAIN.x0_prediction * prediction)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_results_are_like_latent(memory_format: torch.memory_format, draw: Draw) -> None:
    windows = draw(3, 2, 3, 8, 4, 5).to(torch.bfloat16)
    latent = draw(1, 3, 20, 4, 5).float().contiguous(memory_format=memory_format)
    step = denoise_step(windows, STARTS, latent, PLAIN, guidance_scale=2.0, threshold=Threshold("dynamic", per="frame"))
    for y in step:
        assert y.dtype == torch.float32
        assert y.is_contiguous(memory_format=memory_format)
    exact = denoise_step(
        windows.double(),
        STARTS,
        latent.double(),
        PLAIN,
        guidance_scale=2.0,
        threshold=Threshold("dynamic", per="frame"),
    )
    # bf16 windows are read as they are: nothing is rounded to bf16 on the way, fp32 rounding is all that is left.
    torch.testing.assert_close(step.latent.double(), exact.latent, rtol=1e-5, atol=1e-5)


def test_strided_latent_and_empty_batch(draw: Draw) -> None:
    big = draw(2, 4, 20, 9, 9).to(memory_format=CHANNELS_LAST)
    windows = draw(3, 2, 3, 8, 4, 4)
    view = big[:, 1:, :, ::2, 1:9:2][:, :, :, :4]
    torch.testing.assert_close(
        denoise_step(windows, STARTS, view, PLAIN), denoise_step(windows, STARTS, view.contiguous(), PLAIN)
    )
    for threshold in (None, Threshold("dynamic"), Threshold("dynamic", per="frame")):
        step = denoise_step(
            torch.empty(3, 0, 3, 8, 4, 4), STARTS, torch.empty(0, 3, 20, 4, 4), PLAIN, threshold=threshold
        )
        assert step.latent.shape == (0, 3, 20, 4, 4)


@pytest.mark.parametrize(
    "threshold", [None, Threshold("static"), Threshold("dynamic", 0.8), Threshold("dynamic", 0.8, "frame")]
)
def test_gradcheck(threshold: Threshold | None, draw: Draw) -> None:
    windows = [draw(2, 2, 3, 1, 2).requires_grad_() for _ in range(2)]
    latent, noise, history = (draw(1, 2, 5, 1, 2).requires_grad_() for _ in range(3))
    coefficients = StepCoefficients(1.3, -0.7, 0.6, 0.5, history=-0.2, noise=0.4)

    def run(first: Tensor, second: Tensor, latent: Tensor, noise: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(
            denoise_step(
                [first, second],
                [0, 2],
                latent,
                coefficients,
                guidance_scale=1.5,
                threshold=threshold,
                noise=noise,
                history=history,
            )
        )

    assert torch.autograd.gradcheck(run, (*windows, latent, noise, history))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_operator(memory_format: torch.memory_format, draw: Draw) -> None:
    windows = [draw.clip(4, 3, 4, 4, 2, memory_format=memory_format, grad=True) for _ in range(2)]
    latent, noise, history = (draw.clip(2, 3, 6, 4, 2, memory_format=memory_format, grad=True) for _ in range(3))
    inputs = windows, [0, 2], latent, PLAIN._replace(history=-0.2, noise=0.4)
    options = {
        "guidance_scale": 3.0,
        "threshold": Threshold("dynamic", 0.8, "frame"),
        "noise": noise,
        "history": history,
    }
    check_operator(denoise_step, *inputs, **options)
    check_operator_gradient(denoise_step, *inputs, **options)
    check_compiled(denoise_step, *inputs, **options)
    with torch.no_grad():
        check_out(denoise_step, *inputs, **options)
    # Neither guidance, nor a threshold, nor noise and history: the optional arguments left out.
    check_operator(denoise_step, [w[:2] for w in windows], [0, 2], latent, PLAIN)


def test_errors(draw: Draw) -> None:
    windows, latent = draw(3, 2, 3, 8, 4, 4), draw(2, 3, 20, 4, 4)
    with pytest.raises(ValueError, match=r"coefficients\.noise is 0\.5, so noise must be a tensor"):
        denoise_step(windows, STARTS, latent, PLAIN._replace(noise=0.5))
    with pytest.raises(ValueError, match=r"coefficients\.history is -0\.5, so history must be a tensor"):
        denoise_step(windows, STARTS, latent, PLAIN._replace(history=-0.5))
    with pytest.raises(ValueError, match=r"noise must have the shape of latent, \(2, 3, 20, 4, 4\), got \(1, 3"):
        denoise_step(windows, STARTS, latent, PLAIN._replace(noise=0.5), noise=latent[:1])
    with pytest.raises(ValueError, match=r"twice latent's batch.*latent \(2, 3, 20, 4, 4\).*\(2, 3, 8, 4, 4\)"):
        denoise_step(windows, STARTS, latent, PLAIN, guidance_scale=2.0)
    with pytest.raises(ValueError, match="without guidance"):
        denoise_step(windows, STARTS, latent[:1], PLAIN)
    with pytest.raises(ValueError, match="denoise_step: frames 8, 9, 10, 11 are in no window"):
        denoise_step(windows[:2], [0, 12], latent, PLAIN)
    with pytest.raises(ValueError, match="denoise_step: window 2 spans"):
        denoise_step(windows, [0, 6, 13], latent, PLAIN)
    with pytest.raises(ValueError, match=r"threshold\.kind must be 'static' or 'dynamic', got 'hard'"):
        denoise_step(windows, STARTS, latent, PLAIN, threshold=Threshold("hard"))
    with pytest.raises(ValueError, match=r"threshold\.per must be 'clip' or 'frame', got 'pixel'"):
        denoise_step(windows, STARTS, latent, PLAIN, threshold=Threshold("dynamic", per="pixel"))
    with pytest.raises(ValueError, match=r"percentile must be in \(0, 1\], got 99\.5"):
        denoise_step(windows, STARTS, latent, PLAIN, threshold=Threshold("dynamic", 99.5))
