from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lumiere_fast import dispatch, native, use_backend
from lumiere_fast.diffusion import (
    CosineSchedule,
    EpsilonParameterization,
    NoiseLevel,
    Parameterization,
    SampleParameterization,
    VParameterization,
    sampling_table,
)
from lumiere_fast.ops import StepCoefficients, Threshold, blend_windows, denoise_step, window_weights
from lumiere_fast.ops.denoise_step import THRESHOLDS, quantile
from tests.ops.common import (
    CHANNELS_LAST,
    FORMATS,
    Draw,
    assert_no_worse_than_torch,
    check_compiled,
    check_operator,
    check_operator_gradient,
    check_out,
    device_of,
    in_layout,
    launch_on,
    steps,
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


def x0_of(kind: type[Parameterization], output: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Ho et al. 2020 (eps), Salimans & Ho 2022 (v, x), for alpha^2 + sigma^2 = 1."""
    if kind is EpsilonParameterization:
        return (x - level.sigma * output) / level.alpha
    return level.alpha * x - level.sigma * output if kind is VParameterization else output


def by_ddim(x: Tensor, x0s: list[Tensor], levels: list[NoiseLevel], noise: Tensor) -> Tensor:
    """Song et al. 2021, equation 12 with sigma_t = 0."""
    now, after = levels[-2:]
    return after.alpha * x0s[-1] + after.sigma * (x - now.alpha * x0s[-1]) / now.sigma


def by_ddpm(x: Tensor, x0s: list[Tensor], levels: list[NoiseLevel], noise: Tensor) -> Tensor:
    """Ho et al. 2020, equation 7; their alpha-bar is alpha^2."""
    now, after = (level.alpha**2 for level in levels[-2:])
    beta = 1 - now / after
    mean = math.sqrt(after) * beta / (1 - now) * x0s[-1] + math.sqrt(1 - beta) * (1 - after) / (1 - now) * x
    return mean + math.sqrt((1 - after) / (1 - now) * beta) * noise


def by_dpm_solver_pp(x: Tensor, x0s: list[Tensor], levels: list[NoiseLevel], noise: Tensor) -> Tensor:
    """Lu et al. 2022, algorithm 2, whose first step is of the first order; their lambda is ln(alpha / sigma)."""
    lambdas = [math.log(level.alpha / level.sigma) for level in levels]
    h, (now, after), corrected = lambdas[-1] - lambdas[-2], levels[-2:], x0s[-1]
    if len(levels) > 2:
        r = (lambdas[-2] - lambdas[-3]) / h
        corrected = (1 + 1 / (2 * r)) * x0s[-1] - 1 / (2 * r) * x0s[-2]
    return after.sigma / now.sigma * x - after.alpha * math.expm1(-h) * corrected


@pytest.mark.parametrize("kind", [EpsilonParameterization, VParameterization, SampleParameterization])
@pytest.mark.parametrize(
    ("sampler", "formula"), [("ddim", by_ddim), ("ddpm", by_ddpm), ("dpm-solver++", by_dpm_solver_pp)]
)
def test_samplers_of_the_tables(
    sampler: str, formula: Callable[..., Tensor], kind: type[Parameterization], draw: Draw
) -> None:
    """Three steps of guided, bounded windows, taken in place, against the papers' formulas."""
    levels = [NoiseLevel(*cosine(t)) for t in (0.85, 0.6, 0.45, 0.3)]
    latent, history = draw(2, 3, 20, 2, 3), torch.empty(2, 3, 20, 2, 3, dtype=torch.float64)
    x, x0s = latent.clone(), []
    for step, row in enumerate(sampling_table(sampler, levels, kind())):
        windows, noise = draw(3, 4, 3, 8, 2, 3), draw(2, 3, 20, 2, 3)
        conditional, unconditional = mean_of_windows(windows).chunk(2)
        output = (1 + 1.5) * conditional - 1.5 * unconditional
        x0s.append(x0_of(kind, output, x, levels[step]).clamp(-1, 1))
        x = formula(x, x0s, levels[: step + 2], noise)
        given = {"noise": noise, "history": history if step else None, "out": (latent, history)}
        done = denoise_step(windows, STARTS, latent, row, guidance_scale=2.5, threshold="static", **given)
        torch.testing.assert_close(done.x0, x0s[-1], rtol=0, atol=1e-12)
        torch.testing.assert_close(done.latent, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", ["flat", "trapezoid", "pyramid"])
@pytest.mark.parametrize("in_space", [False, True])
def test_is_the_closed_form_and_the_least_squares_solution(in_space: bool, weights: str, draw: Draw) -> None:
    """By numpy: `lstsq` of all equations `sqrt(w) J[position] = sqrt(w) prediction`, and their weighted mean."""
    frames = [0, 2, 3]
    corners = list(product(frames, (0, 3), (0, 1))) if in_space else [(t, 0, 0) for t in frames]
    size, extent = ((4, 5, 3), (7, 8, 4)) if in_space else ((4, 2, 3), (7, 2, 3))
    overlaps = (2, 2, 2) if in_space else (2, 0, 0)
    vectors = [window_weights(weights, n, o) if o else (1.0,) * n for n, o in zip(size, overlaps, strict=True)]
    kernel = np.einsum("t,h,w->thw", *vectors)
    windows, latent = draw(len(corners), 4, 2, *size), draw(2, 2, *extent)

    rows, targets = [], []
    total, mass = np.zeros((4, 2, *extent)), np.zeros(extent)
    for corner, window in zip(corners, windows.numpy(), strict=True):
        box = tuple(slice(lo, lo + n) for lo, n in zip(corner, size, strict=True))
        covered = np.zeros(extent, dtype=bool)
        covered[box] = True
        rows.append(np.eye(math.prod(extent))[covered.ravel()] * np.sqrt(kernel).reshape(-1, 1))
        targets.append((window * np.sqrt(kernel)).reshape(8, -1).T)
        total[(..., *box)] += kernel * window
        mass[box] += kernel
    solution = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets))[0].T.reshape(4, 2, *extent)
    np.testing.assert_allclose(solution, total / mass, rtol=0, atol=1e-12)

    starts = corners if in_space else frames
    step = denoise_step(windows, starts, latent, PLAIN, guidance_scale=3.0, weights=weights)
    conditional, unconditional = torch.from_numpy(solution).chunk(2)
    x0 = PLAIN.x0_latent * latent + PLAIN.x0_prediction * (unconditional + 3 * (conditional - unconditional))
    torch.testing.assert_close(step.x0, x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(step.latent, PLAIN.latent * latent + PLAIN.x0 * x0, rtol=0, atol=1e-11)


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
    """One draw for each frame keeps the ancestral sampler's variance everywhere, within 1%. Stepping each window with
    noise of its own and averaging the samples halves it in overlaps: the bug that this op exists to make impossible."""
    draw = Draw(4, torch.float32)
    starts, shape = [0, 6], (1, 3, 14, 192, 192)  # frames 6 and 7 are in both windows: 221184 numbers
    latent, silent = torch.zeros(shape), torch.zeros(1).expand(2, 1, 3, 8, 192, 192)
    row = sampling_table("ddpm", CosineSchedule().levels(10), SampleParameterization())[4]
    assert row.noise > 0.1

    def variance(clip: Tensor, frames: slice) -> float:
        return (clip[:, :, frames] / row.noise).var().item()

    once = denoise_step(silent, starts, latent, row, noise=draw(*shape)).latent
    stepped = [
        denoise_step(silent[:1], [0], latent[:, :, s : s + 8], row, noise=draw(1, 3, 8, 192, 192)).latent
        for s in starts
    ]
    wrong = blend_windows(stepped, starts, 14)
    for frames in (slice(0, 6), slice(6, 8), slice(8, 14)):
        assert variance(once, frames) == pytest.approx(1.0, rel=0.01)
        assert variance(wrong, frames) == pytest.approx(0.5 if frames.start == 6 else 1.0, rel=0.01)


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


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_operator(memory_format: torch.memory_format, backend: str, draw: Draw) -> None:
    usable(backend)
    windows = [draw.clip(4, 3, 4, 4, 2, memory_format=memory_format, grad=True) for _ in range(2)]
    latent, noise, history = (draw.clip(2, 3, 6, 4, 2, memory_format=memory_format, grad=True) for _ in range(3))
    inputs = windows, [0, 2], latent, PLAIN._replace(history=-0.2, noise=0.4)
    options = {
        "guidance_scale": 3.0,
        "threshold": Threshold("dynamic", 0.8, "frame"),
        "noise": noise,
        "history": history,
    }
    check_operator(denoise_step, *inputs, **options, backend=backend)
    check_operator_gradient(denoise_step, *inputs, **options, backend=backend)
    with use_backend(backend):
        check_compiled(denoise_step, *inputs, **options)
        with torch.no_grad():
            check_out(denoise_step, *inputs, **options)
    # Neither guidance, nor a threshold, nor noise and history: the optional arguments left out.
    check_operator(denoise_step, [w[:2] for w in windows], [0, 2], latent, PLAIN, backend=backend)


# In place ------------------------------------------------------------------------------------------------------------


NATIVE = pytest.mark.parametrize("backend", ["reference", "cpu"])


def usable(backend: str) -> str:
    """Its device; skips the test where the op has no such backend here."""
    if backend not in (*dispatch.COMPOSED, *dispatch._OPS["denoise_step"].backends):
        pytest.skip(f"denoise_step has no backend {backend!r}")
    if backend == "cpu" and native.why_not("cpu"):
        pytest.skip("; ".join(native.why_not("cpu")))
    return "cpu" if backend == "reference" else device_of(backend)


MULTISTEP = PLAIN._replace(history=-0.2)


@NATIVE
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "compiled"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_in_place(memory_format: torch.memory_format, mode: str, backend: str, draw: Draw) -> None:
    usable(backend)
    windows = [draw.clip(4, 3, 8, 4, 5, memory_format=memory_format).float() for _ in STARTS]
    inside = torch.inference_mode() if mode == "inference_mode" else torch.no_grad()
    with use_backend(backend), inside:
        latent, history = (draw.clip(2, 3, 20, 4, 5, memory_format=memory_format).float() for _ in range(2))
        expected = denoise_step(windows, STARTS, latent, MULTISTEP, guidance_scale=2.0, history=history)

        def step(latent: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
            return denoise_step(
                windows, STARTS, latent, MULTISTEP, guidance_scale=2.0, history=history, out=(latent, history)
            )

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if mode == "compiled" else step
        result = run(latent, history)
    for given, returned, wanted in zip((latent, history), result, expected, strict=True):
        assert returned is given
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-6 if mode == "compiled" else 0)


@NATIVE
def test_in_place_of_what_a_backward_needs(backend: str, draw: Draw) -> None:
    """Torch is told that the tensors have changed."""
    usable(backend)
    windows, latent, history = draw(3, 2, 3, 8, 4, 4), draw(2, 3, 20, 4, 4), draw(2, 3, 20, 4, 4)
    for saved in (latent, history):
        loss = (torch.ones(1, dtype=torch.float64, requires_grad=True) * saved).sum()
        denoise_step(windows, STARTS, latent, MULTISTEP, history=history, out=(latent, history), backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_out_may_be_nothing_but_what_is_read_there(draw: Draw) -> None:
    windows, held = draw(3, 2, 3, 8, 4, 4), draw(5, 3, 20, 4, 4)
    latent, history, free = held[:2], held[2:4], draw(2, 3, 20, 4, 4)

    def step(*out: Tensor | None, **changes: Any) -> None:
        given = {"windows": windows, "latent": latent, "history": history, **changes}
        denoise_step(starts=STARTS, coefficients=MULTISTEP, **given, out=out)

    step(latent, history)
    step(latent, None)
    step(None, history)
    step(free, history)
    inside = r"must not lie in the memory of an input; give a tensor of its own"
    for out in ((held[1:3], free), (free, held[1:3]), (history, free), (free, latent), (latent.mT, free)):
        with pytest.raises(ValueError, match=inside):
            step(*out)
    with pytest.raises(ValueError, match=r"out\[0\] " + inside):
        step(windows[0].new_empty(0).set_(windows).view(-1)[: free.numel()].view(free.shape), None)
    with pytest.raises(ValueError, match="the tensors of out must not lie in one another's memory"):
        step(free, free)
    with pytest.raises(ValueError, match=r"out\[0\] was given where a gradient is needed"):
        step(latent, history, latent=latent.requires_grad_())


# Every backend, on its device ----------------------------------------------------------------------------------------

KERNELS = pytest.mark.parametrize("backend", ["cpu", "triton"])
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float64),
    (torch.float32, torch.bfloat16),
]
GUIDANCE = (None, 0.0, 1.0, 7.5)


def where(backend: str) -> str:
    """Triton's kernels wait for a GPU here: the interpreter takes minutes, and tests/kernels has it."""
    return "cpu" if backend == "reference" else device_of(backend)


def random_call(case: int, dtype: torch.dtype, latent_dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Each bound with each guidance over sixteen cases; windows over time or space, weighted or not, of all layouts."""
    draw, random = Draw(case), np.random.default_rng(case)
    bound, guidance = list(THRESHOLDS.values())[case % 4], GUIDANCE[case // 4 % 4]
    in_space, weighted = case % 3 == 2, case % 5 < 2
    B, C, T, H, W = (int(n) for n in random.integers((1, 1, 5, 3, 2), (3, 5, 9, 7, 12)))
    length = int(random.integers(2, 6))
    frames = sorted({*range(0, T - length, int(random.integers(1, length + 1))), T - length})
    starts = [(t, h, w) for t in frames for h in (0, 2) for w in (0, 1)] if in_space else frames
    shape = (B, C, T, H + 2, W + 1) if in_space else (B, C, T, H, W)
    batch = B if guidance is None else 2 * B

    def like_latent() -> Tensor:
        return in_layout(draw(*shape).to(device, latent_dtype), int(random.integers(4)))

    row = StepCoefficients(0.9, -0.7, 0.6, 0.5, history=-0.2 * (case % 2), noise=0.4 * (case // 2 % 2))
    call: dict[str, Any] = {
        "windows": [
            in_layout(draw(batch, C, length, H, W).to(device, dtype), int(k))
            for k in random.integers(0, 4, len(starts))
        ],
        "starts": starts,
        "latent": like_latent(),
        "coefficients": row,
        "guidance_scale": guidance,
        "threshold": bound if bound is None else bound._replace(percentile=float(random.choice([0.5, 0.9, 0.995, 1]))),
        "noise": like_latent(),
        "history": like_latent(),
    }
    for name in ("noise", "history"):
        if getattr(row, name) == 0:  # not read
            call[name] = None if case % 3 == 0 else call[name].fill_(math.nan)
    return {**call, "weights": "pyramid"} if weighted else call


def doubled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: doubled(each) for name, each in value.items()}
    if isinstance(value, list):
        return [doubled(each) for each in value]
    return value.double() if isinstance(value, Tensor) else value


@KERNELS
@pytest.mark.parametrize(("dtype", "latent_dtype"), DTYPES, ids=str)
def test_every_backend_is_the_reference(backend: str, dtype: torch.dtype, latent_dtype: torch.dtype) -> None:
    for case in range(32):
        call = random_call(case, dtype, latent_dtype, where(backend))
        ours, theirs = launch_on(denoise_step, backend, **call), denoise_step(**call, backend="reference")
        exact = denoise_step(**doubled(call), backend="reference")
        for mine, other, truth in zip(ours, theirs, exact, strict=True):
            assert mine.dtype == latent_dtype and steps(mine) == steps(other)
            assert_no_worse_than_torch(mine, other, truth)


@KERNELS
def test_every_backend_steps_in_place(backend: str) -> None:
    for case in (1, 3, 7, 11, 14):  # each bound, with history and without
        call = random_call(case, torch.float32, torch.float32, where(backend))
        expected = launch_on(denoise_step, backend, **call)
        history = call["history"] if case % 2 else torch.empty_like(expected[1])
        written = launch_on(denoise_step, backend, **call, out=(call["latent"], history))
        assert written[0] is call["latent"] and written[1] is history
        for mine, wanted in zip(written, expected, strict=True):
            assert torch.equal(mine, wanted)


def clip_of(values: Tensor, backend: str) -> dict[str, Any]:
    """A call whose x0, before its bound, is `values`."""
    window = values.float().to(where(backend))
    return {
        "windows": [window],
        "starts": [0],
        "latent": torch.zeros_like(window),
        "coefficients": StepCoefficients(0, 1, 0, 1),
    }


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("per", ["clip", "frame"])
def test_quantiles_at_the_edges(per: str, backend: str, draw: Draw) -> None:
    """Ties, magnitudes far apart, neighbours on both sides of 1, infinities and NaN, as numpy has them of each part."""
    plain = draw(2, 2, 3, 4, 5)
    inputs = {
        "ties": plain.sign() * 3,
        "all within": 0.3 * plain / plain.abs().max(),
        "exactly one": plain.sign(),
        "far apart": plain.sign() * torch.exp(12 * draw(*plain.shape)).clamp(1e-20, 1e20),
        "around one": torch.where(plain.abs() > plain.abs().median(), plain.sign() * 1.5, 0.5 * plain.sign()),
    }
    axes = (1, 2, 3, 4) if per == "clip" else (1, 3, 4)
    for values, percentile in product(inputs.values(), (0.01, 0.5, 0.9, 0.995, 1.0)):
        x0 = values.float()
        limit = np.maximum(np.quantile(x0.double().abs().numpy(), percentile, axis=axes, keepdims=True), 1.0)
        wanted = torch.from_numpy(np.clip(x0.double().numpy(), -limit, limit) / limit)
        bound = Threshold("dynamic", percentile, per)
        step = launch_on(denoise_step, backend, **clip_of(values, backend), threshold=bound)
        for mine in step:
            torch.testing.assert_close(mine.double().cpu(), wanted, rtol=1e-6, atol=1e-7)
    small = inputs["all within"].float()
    kept = launch_on(denoise_step, backend, **clip_of(small, backend), threshold=Threshold("dynamic", 0.5, per))[1]
    assert torch.equal(kept.cpu(), small)


@pytest.mark.parametrize("sides", [(2, 9, 11), (4, 33, 61), (6, 150, 151)], ids=["counted", "held", "walked over"])
@pytest.mark.parametrize("percentile", [0.5, 0.995, 1.0])
@pytest.mark.parametrize("per", ["clip", "frame"])
def test_quantiles_of_any_size(per: str, percentile: float, sides: tuple[int, ...], draw: Draw) -> None:
    """As the native core searches them: of a few elements, of some that are held, of many that are predicted again."""
    plain = draw(2, 3, *sides).float()
    largest = plain.abs().max()
    scales = {"within one": 0.99 / largest, "just above one": 1.01 / largest, "at one": 1 / largest, "loud": 3.0}
    middle = plain.abs().flatten(2 if per == "frame" else 1).median()
    scales["neighbours on both sides of one"] = 1.0001 / middle
    for scale in scales.values():
        call = clip_of(plain * scale, "cpu") | {"threshold": Threshold("dynamic", percentile, per)}
        for mine, wanted in zip(
            denoise_step(**call, backend="cpu"), denoise_step(**call, backend="reference"), strict=True
        ):
            torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("bound", THRESHOLDS)
def test_what_is_not_finite_stays_where_it_is(bound: str, backend: str, draw: Draw) -> None:
    """NaN counts as the largest magnitude: one of 40 is past the 0.9 quantile of a frame, and of the clip."""
    values = draw(1, 2, 3, 4, 5).float()
    values[0, 0, 0, 0, 0], values[0, 1, 2, 3, 4] = math.nan, math.inf
    threshold = THRESHOLDS[bound]
    threshold = threshold and threshold._replace(percentile=0.9)
    step = launch_on(denoise_step, backend, **clip_of(values, backend), threshold=threshold)
    expected = denoise_step(**clip_of(values, "reference"), threshold=threshold, backend="reference")
    for mine, other in zip(step, expected, strict=True):
        assert mine.isnan().sum() == 1
        torch.testing.assert_close(mine.cpu(), other, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("bound", ["static", "clip", "frame"])
def test_the_order_of_the_windows_and_a_second_call(bound: str, backend: str, draw: Draw) -> None:
    """The same call gives the same bits. Another order differs by roundings: a mean steps away from its first window,
    so that windows that agree keep their value to the bit whatever the order."""
    device, order = where(backend), [3, 0, 2, 1]
    starts, latent = [0, 1, 3, 6], draw(1, 3, 10, 3, 4).float().to(device)
    windows = draw(4, 1, 3, 4, 3, 4).float().to(device)

    def step(windows: Tensor, starts: list[int]) -> Any:
        threshold = THRESHOLDS[bound]
        return launch_on(denoise_step, backend, windows, starts, latent, PLAIN, threshold=threshold, weights="pyramid")

    first, again, shuffled = (
        step(windows, starts),
        step(windows, starts),
        step(windows[order], [starts[i] for i in order]),
    )
    for one, two, other in zip(first, again, shuffled, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, other, rtol=0, atol=4 * float(windows.abs().max()) * 2**-23)
    same = windows[:1, :, :, :1].expand(4, 1, 3, 4, 3, 4).contiguous()
    for one, other in zip(step(same, starts), step(same, [starts[i] for i in order]), strict=True):
        assert torch.equal(one, other)


@KERNELS
def test_gradients_of_every_backend_are_the_reference_s(backend: str) -> None:
    """Of first order and, through a gradient in the loss, of second."""
    device = usable(backend)

    def found(backend: str) -> list[Tensor]:
        draw = Draw(41, torch.float32)
        first, second = (draw(4, 2, 4, 3, 3).to(device).requires_grad_() for _ in range(2))
        latent, noise, history = (draw(2, 2, 6, 3, 3).to(device).requires_grad_() for _ in range(3))
        step = denoise_step(
            [1.5 * first, second],
            [0, 2],
            latent,
            PLAIN._replace(history=-0.2, noise=0.4),
            guidance_scale=2.0,
            threshold=Threshold("dynamic", 0.8, "frame"),
            noise=noise,
            history=history,
            backend=backend,
        )
        leaves = [first, second, latent, noise, history]
        loss = step.latent.square().sum() + (step.x0 * latent).sum()
        slopes = torch.autograd.grad(loss, leaves, create_graph=True)
        penalty = sum(slope.square().sum() for slope in slopes)
        return [*slopes, *torch.autograd.grad(penalty, leaves)]

    for mine, other in zip(found(backend), found("reference"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@NATIVE
def test_exported(backend: str, draw: Draw) -> None:
    usable(backend)

    class Step(torch.nn.Module):
        def forward(self, first: Tensor, second: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(
                denoise_step(
                    [first, second], [0, 3], latent, PLAIN, guidance_scale=2.0, threshold="dynamic", weights="trapezoid"
                )
            )

    inputs = draw(2, 3, 5, 2, 4).float(), draw(2, 3, 5, 2, 4).float(), draw(1, 3, 8, 2, 4).float()
    with use_backend(backend):
        program = torch.export.export(Step(), inputs)
        for ours, eager in zip(program.module()(*inputs), Step()(*inputs), strict=True):
            torch.testing.assert_close(ours, eager)


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


BAD_CALLS: list[tuple[str, dict[str, Any]]] = [
    (r"threshold\.kind must be 'static' or 'dynamic', got 'hard'", {"threshold": Threshold("hard")}),
    (r"threshold\.per must be 'clip' or 'frame', got 'pixel'", {"threshold": Threshold("dynamic", per="pixel")}),
    *(
        (rf"threshold\.percentile must be in \(0, 1\], got {wrong}", {"threshold": Threshold("dynamic", wrong)})
        for wrong in (99.5, 0.0, -0.1, 1.0000001)
    ),
    *(
        (r"threshold\.percentile must be a finite number, got", {"threshold": Threshold("dynamic", wrong)})
        for wrong in (math.nan, math.inf, "0.9", True, None, torch.tensor(0.9))
    ),
    *(
        (r"threshold must be 'static', 'dynamic', None or a Threshold, got", {"threshold": wrong})
        for wrong in ("clip", True, 0.995, ("dynamic", 0.9, "clip"), np.ones(2), torch.ones(2))
    ),
    *(
        ("coefficients must be a StepCoefficients, got", {"coefficients": wrong})
        for wrong in (None, (1.0, 0.0, 1.0, 0.0, 0.0, 0.0), [1.0] * 6, torch.ones(6), 1.0)
    ),
    *(
        (rf"coefficients\.{name} must be a finite number, got ", {"coefficients": PLAIN._replace(**{name: wrong})})
        for name, wrong in zip(
            StepCoefficients._fields, (math.nan, math.inf, None, "1", torch.tensor(1.0), True), strict=True
        )
    ),
    *(
        ("guidance_scale must be None or a finite number, got", {"guidance_scale": wrong})
        for wrong in (math.nan, -math.inf, "7.5", True, torch.tensor(7.5), [7.5])
    ),
    ("latent must be a tensor, got NoneType", {"latent": None}),
    ("latent must be a dense tensor", {"latent": torch.zeros(2, 3, 20, 4, 4).to_sparse()}),
    (
        "latent must be float16, bfloat16, float32 or float64",
        {"latent": torch.zeros(2, 3, 20, 4, 4, dtype=torch.int64)},
    ),
    ("latent must be on cpu like the other tensors, got meta", {"latent": torch.zeros(2, 3, 20, 4, 4, device="meta")}),
    ("latent must be .* and fit the windows", {"latent": torch.zeros(2, 3, 20, 4)}),
    ("latent must be .* and fit the windows", {"latent": torch.zeros(2, 3, 20, 4, 5)}),
    ("latent must be .* and fit the windows", {"latent": torch.zeros(2, 2, 20, 4, 4)}),
    *(
        (rf"{name} {message}", {name: wrong})
        for name in ("noise", "history")
        for message, wrong in (
            ("must be a tensor, got float", 1.0),
            (r"must have the shape of latent, \(2, 3, 20, 4, 4\), got \(2, 3, 20, 4\)", torch.zeros(2, 3, 20, 4)),
            ("must be torch.float32 like latent, got torch.float64", torch.zeros(2, 3, 20, 4, 4).double()),
            ("must be on cpu like the other tensors, got meta", torch.zeros(2, 3, 20, 4, 4, device="meta")),
        )
    ),
    ("weights must be None or 'flat' or 'trapezoid' or 'pyramid', got 'gauss'", {"weights": "gauss"}),
    ("start 6 is given twice", {"starts": [0, 6, 6]}),
    ("out must be a tensor, or 2 for the results, got 1", {"out": (torch.zeros(2, 3, 20, 4, 4),)}),
    (r"out\[1\] must be \(2, 3, 20, 4, 4\) torch\.float32 on cpu", {"out": (None, torch.zeros(2, 3, 20, 4, 5))}),
]


@pytest.mark.parametrize(("message", "changes"), BAD_CALLS, ids=lambda value: str(value)[:40])
def test_bad_arguments_are_named(message: str, changes: dict[str, Any]) -> None:
    call = {"windows": torch.zeros(3, 2, 3, 8, 4, 4), "starts": STARTS, "latent": torch.zeros(2, 3, 20, 4, 4)}
    with pytest.raises(ValueError, match=f"denoise_step: {message}"):
        denoise_step(**{**call, "coefficients": PLAIN, **changes})


def test_numbers_of_numpy_are_taken(draw: Draw) -> None:
    windows, latent = draw(3, 4, 3, 8, 4, 4), draw(2, 3, 20, 4, 4)
    expected = denoise_step(windows, STARTS, latent, PLAIN, guidance_scale=2, threshold=Threshold("dynamic", 0.5))
    row = StepCoefficients(*map(np.float64, PLAIN))
    bound = Threshold("dynamic", np.float64(0.5))
    given = denoise_step(windows, np.array(STARTS), latent, row, guidance_scale=np.float32(2), threshold=bound)
    assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


def test_thresholds_have_names(draw: Draw) -> None:
    windows, latent = 3 * draw(3, 2, 3, 8, 4, 4), draw(2, 3, 20, 4, 4)
    for name in ("static", "dynamic"):
        named, spelled = (denoise_step(windows, STARTS, latent, PLAIN, threshold=t) for t in (name, Threshold(name)))
        assert torch.equal(named.x0, spelled.x0) and named.x0.abs().max() == 1
