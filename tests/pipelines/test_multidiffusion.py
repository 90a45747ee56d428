"""Temporal MultiDiffusion (paper, section 3.2): the sampling loop over windows, and super-resolution through it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lumiere_fast import ops
from lumiere_fast.diffusion import (
    SAMPLERS,
    CosineSchedule,
    EDMParameterization,
    EDMSchedule,
    NoiseLevel,
    SampleParameterization,
    Schedule,
    VParameterization,
    clip_generators,
    draw_noise,
    sampling_table,
)
from lumiere_fast.ops import _layout
from lumiere_fast.ops.denoise_step import StepCoefficients, Threshold
from lumiere_fast.pipelines.denoising import Denoiser, Predictor, _within_memory
from lumiere_fast.pipelines.state import DenoisingState
from lumiere_fast.pipelines.windows import Window, WindowPlan, plan_windows

EDM = EDMParameterization()
SCHEDULE = EDMSchedule(sigma_min=0.1, sigma_max=10.0)
SCHEDULES = pytest.mark.parametrize("schedule", [SCHEDULE, CosineSchedule()], ids=lambda kind: type(kind).__name__)


def draw(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_each_frame(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
    """A prediction of each frame from that frame, its number and the noise level, alone."""
    number = torch.arange(window.frames.start, window.frames.stop, dtype=scaled.dtype)[:, None, None]
    return torch.sin(scaled + number) + timestep[:, None, None, None, None] / 1000


def of_the_window(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
    """A prediction that depends on where the window lies and on all of its frames."""
    return torch.sin(scaled + scaled.mean(dim=2, keepdim=True) + window.frames.start)


def spans(windows: WindowPlan) -> list[slice]:
    return [window.frames for window in windows]


# Planning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [3, 4, 5, 8, 15, 28, 41, 80])
def test_exact_tilings_of_80_frames(window: int) -> None:
    windows = spans(plan_windows(80, window))
    assert (windows[0].start, windows[-1].stop) == (0, 80)
    assert all(one.stop - two.start == 2 for one, two in pairwise(windows))


def test_the_last_window_is_shifted_back() -> None:
    assert spans(plan_windows(16, 8)) == [slice(0, 8), slice(6, 14), slice(8, 16)]
    assert spans(plan_windows(10, 8, overlap=0)) == [slice(0, 8), slice(2, 10)]


@given(st.integers(1, 90), st.integers(1, 30), st.data())
def test_plans_cover_with_the_overlap_and_no_window_to_spare(num_frames: int, window: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    windows = spans(plan_windows(num_frames, window, overlap))
    assert {frame for w in windows for frame in range(w.start, w.stop)} == set(range(num_frames))
    assert {w.stop - w.start for w in windows} == {min(window, num_frames)}
    starts = [w.start for w in windows]
    assert starts == sorted(set(starts))
    assert all(one.stop - two.start >= overlap for one, two in pairwise(windows))
    stride = window - overlap
    assert len(windows) == 1 + max(0, -(-(num_frames - window) // stride))


@pytest.mark.parametrize(("window", "overlap"), [(8, 8), (8, -1), (0, 0), (2, 2)])
def test_an_impossible_overlap_is_refused(window: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"overlap must be from 0 to window_frames - 1 = {window - 1}, got {overlap}"):
        plan_windows(16, window, overlap)


# The loop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_frames", "window"), [(13, 5), (16, 8), (9, 4)])
@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_a_step_takes_the_least_squares_solution(num_frames: int, window: int, guidance_scale: float | None) -> None:
    """One step's result against `lstsq` over the stacked equations `J[window] = prediction`."""
    windows = plan_windows(num_frames, window)
    batch = 1 if guidance_scale is None else 2
    predictions = [draw(batch, 3, window, 4, 4, seed=i) for i in range(len(windows))]
    noise = draw(1, 3, num_frames, 4, 4, seed=99)

    def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
        return predictions[list(windows).index(window)]

    denoiser = Denoiser(SCHEDULE, EDM, "ddim", threshold=None)
    clip = denoiser(predict, noise.clone(), 1, windows=windows, guidance_scale=guidance_scale).clip

    selection = torch.cat([torch.eye(num_frames, dtype=torch.float64)[w.frames] for w in windows])
    stacked = torch.cat([p.transpose(0, 2).flatten(1) for p in predictions])
    solution = torch.linalg.lstsq(selection, stacked).solution
    solution = solution.unflatten(1, (3, batch, 4, 4)).transpose(0, 2)
    if guidance_scale is not None:
        conditional, unconditional = solution.chunk(2)
        solution = unconditional + guidance_scale * (conditional - unconditional)
    c_skip, c_out = EDM.x0_coefficients(NoiseLevel(1.0, SCHEDULE.sigma_max))
    torch.testing.assert_close(clip, c_skip * SCHEDULE.sigma_max * noise + c_out * solution, rtol=0, atol=1e-9)


@SCHEDULES
@pytest.mark.parametrize("threshold", [None, Threshold("static")])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_windows_do_not_show_where_frames_are_predicted_alone(
    sampler: str, threshold: Threshold | None, schedule: Schedule
) -> None:
    """To the bit: where windows agree their mean is what they agree on."""
    noise = draw(2, 3, 13, 4, 4)
    denoiser = Denoiser(schedule, EDM, sampler, threshold)

    def clip(predict: Predictor, windows: WindowPlan) -> Tensor:
        return denoiser(predict, noise.clone(), 5, windows=windows, generators=clip_generators(seeded(), 2)).clip

    whole = clip(of_each_frame, plan_windows(13, 13, 0))
    for window in (4, 5, 8):
        assert torch.equal(clip(of_each_frame, plan_windows(13, window)), whole)
    other = clip(of_the_window, plan_windows(13, 5))
    assert (other - clip(of_the_window, plan_windows(13, 13, 0))).abs().mean() > 1e-2


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_order_of_the_windows_does_not_matter(sampler: str) -> None:
    noise = draw(1, 3, 16, 4, 4)
    windows = plan_windows(16, 8)  # frames 8 to 13 are in two windows or three
    denoiser = Denoiser(SCHEDULE, EDM, sampler)
    one, two = (
        denoiser(of_the_window, noise.clone(), 5, windows=order, generators=clip_generators(seeded(), 1)).clip
        for order in (windows, replace(windows, corners=(windows.corners[1], windows.corners[2], windows.corners[0])))
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


@SCHEDULES
@pytest.mark.parametrize("settings", [{"sampler": name} for name in SAMPLERS] + [{"sampler": "ddim", "eta": 0.7}])
def test_a_clip_does_not_depend_on_its_batch(settings: dict[str, Any], schedule: Schedule) -> None:
    """Five clips at once, and 2 and 3 with the same generator, bounded by a quantile of each."""
    denoiser = Denoiser(schedule, VParameterization(), threshold=Threshold("dynamic", 0.9), **settings)

    def clips(generator: torch.Generator, count: int) -> Tensor:
        generators = clip_generators(generator, count)
        noise = draw_noise((count, 3, 10, 4, 4), "cpu", generators)
        return denoiser(of_the_window, noise, 4, windows=plan_windows(10, 4), generators=generators).clip

    generator = seeded()
    parts = torch.cat([clips(generator, 2), clips(generator, 3)])
    whole = clips(seeded(), 5)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert (whole[0] - whole[1]).abs().mean() > 0.05


def test_windows_share_the_noise_at_every_step() -> None:
    """All windows look at one clip: the noise is that of the frame, of variance 1 in the overlaps too."""
    noise = draw(1, 3, 14, 64, 64)
    windows = plan_windows(14, 8)
    assert spans(windows) == [slice(0, 8), slice(6, 14)]
    seen: list[Tensor] = []

    def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
        seen.append(scaled)
        return of_the_window(scaled, timestep, window)

    Denoiser(SCHEDULE, EDM)(predict, noise.clone(), 3, windows=windows)
    assert len(seen) == 6
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first[:, :, 6:8], second[:, :, 0:2])
    c_in = (SCHEDULE.sigma_max**2 + EDM.sigma_data**2) ** -0.5
    unit = seen[0] / (c_in * SCHEDULE.sigma_max)
    assert unit[:, :, 6:8].var().item() == pytest.approx(1.0, rel=0.03)
    torch.testing.assert_close(unit, noise[:, :, :8], rtol=0, atol=1e-5)


@SCHEDULES
@pytest.mark.parametrize("settings", [{"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.6}])
def test_fresh_noise_is_drawn_once_a_frame(settings: dict[str, Any], schedule: Schedule) -> None:
    """Where every window predicts a clean clip of zeros, the latent is noise of the level's variance: to all frames
    alike. Noise of each window's own would leave the overlaps less."""
    seen: list[Tensor] = []

    def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
        seen.append(scaled)
        return torch.zeros_like(scaled)

    generators = clip_generators(seeded(), 1)
    noise = draw_noise((1, 3, 14, 64, 64), "cpu", generators)
    windows = plan_windows(14, 8)
    denoiser = Denoiser(schedule, SampleParameterization(), threshold=None, **settings)
    denoiser(predict, noise, 6, windows=windows, generators=generators)
    for step, level in enumerate(schedule.levels(6)[:-1]):
        first, second = seen[2 * step : 2 * step + 2]
        assert torch.equal(first[:, :, 6:8], second[:, :, 0:2])
        latent = torch.cat([first, second[:, :, 2:]], dim=2) * (level.alpha**2 + level.sigma**2) ** 0.5 / level.sigma
        assert latent.var(dim=(0, 1, 3, 4)).tolist() == pytest.approx([1.0] * 14, rel=0.06)  # 4.7 deviations
        assert latent.var().item() == pytest.approx(1.0, rel=0.015)
    whole = seen[0][0, 0].flatten(), seen[2][0, 0].flatten()
    assert abs(torch.corrcoef(torch.stack(whole))[0, 1]) < 0.999, "nothing was drawn"


def test_a_stochastic_sampler_needs_generators() -> None:
    denoiser = Denoiser(SCHEDULE, EDM, "ddpm")
    with pytest.raises(ValueError, match="sampler 'ddpm' draws noise at every step: give generators, one a clip"):
        denoiser(of_each_frame, draw(1, 1, 4, 2, 2), 2, windows=plan_windows(4, 4, 0))


def test_the_latent_stays_in_its_dtype_and_predictions_in_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 network, a float32 sampler, and no cast between them but in the op."""
    seen: list[dict[str, Any]] = []
    step = ops.denoise_step

    def recorded(windows: list[Tensor], starts: Tensor, latent: Tensor, row: object, **settings: Any) -> object:
        seen.append({"windows": windows[0].dtype, "latent": latent.dtype, "history": settings["history"]})
        return step(windows, starts, latent, row, **settings)

    monkeypatch.setattr(ops, "denoise_step", recorded)
    generators = clip_generators(seeded(), 1)
    noise = draw_noise((1, 3, 10, 8, 8), "cpu", generators)

    def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
        assert scaled.dtype == timestep.dtype == torch.float32
        return of_each_frame(scaled, timestep, window).bfloat16()

    results = {}
    for sampler in SAMPLERS:
        denoiser = Denoiser(SCHEDULE, EDM, sampler)
        arguments = {"windows": plan_windows(10, 4), "generators": generators}
        results[sampler] = denoiser(predict, noise.clone(), 4, **arguments).clip
        assert results[sampler].dtype == torch.float32
    assert {step["windows"] for step in seen} == {torch.bfloat16}
    assert {step["latent"] for step in seen} == {torch.float32}
    assert {step["history"].dtype for step in seen if step["history"] is not None} == {torch.float32}
    exact = Denoiser(SCHEDULE, EDM, "ddim")(of_each_frame, noise, 4, windows=plan_windows(10, 4)).clip
    assert 0 < (results["ddim"] - exact).abs().max() < 0.02


def test_overlaps_are_as_varied_as_the_rest() -> None:
    """With the exact denoiser of a Gaussian the clip has the data's variance in every frame. Averaging windows that
    were sampled each on its own, with its own noise, halves it where two overlap."""

    def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
        sigma = (timestep / 250).exp()[:, None, None, None, None]
        x = scaled * (sigma**2 + EDM.sigma_data**2).sqrt()
        x0 = x * EDM.sigma_data**2 / (EDM.sigma_data**2 + sigma**2)
        return EDM.target(x0, (x - x0) / sigma, torch.ones_like(sigma), sigma)

    denoiser = Denoiser(EDMSchedule(), EDM, threshold=None)
    noise = draw(1, 3, 14, 64, 64)
    clip = denoiser(predict, noise, 60, windows=plan_windows(14, 8)).clip
    assert clip.var(dim=(0, 1, 3, 4)).tolist() == pytest.approx([EDM.sigma_data**2] * 14, rel=0.06)

    alone = [denoiser(predict, draw(1, 3, 8, 64, 64, seed=s), 60, windows=plan_windows(8, 8, 0)).clip for s in (0, 1)]
    averaged = (alone[0][:, :, 6:8] + alone[1][:, :, 0:2]) / 2
    assert averaged.var().item() == pytest.approx(EDM.sigma_data**2 / 2, rel=0.06)


def test_every_window_of_every_step_is_counted() -> None:
    steps: list[tuple[int, int]] = []
    Denoiser(SCHEDULE, EDM)(
        of_each_frame, draw(1, 1, 16, 2, 2), 4, windows=plan_windows(16, 8), on_step=lambda *now: steps.append(now)
    )
    assert steps == [(done, 12) for done in range(1, 13)]


def test_the_clip_is_bounded_as_asked() -> None:
    noise = draw(1, 3, 4, 8, 8)

    def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
        return 40 * scaled

    whole = plan_windows(4, 4, 0)
    assert Denoiser(SCHEDULE, EDM)(predict, noise.clone(), 3, windows=whole).clip.abs().max() == 1
    assert Denoiser(SCHEDULE, EDM, threshold=None)(predict, noise.clone(), 3, windows=whole).clip.abs().max() > 2
    dynamic = Denoiser(SCHEDULE, EDM, threshold=Threshold("dynamic", 0.9))(
        predict, noise.clone(), 3, windows=whole
    ).clip
    assert dynamic.abs().max() == 1
    assert dynamic.abs().mean() < Denoiser(SCHEDULE, EDM)(predict, noise.clone(), 3, windows=whole).clip.abs().mean()


@pytest.mark.parametrize("per", ["clip", "frame"])
@pytest.mark.parametrize("percentile", [0.9, 0.995])
def test_a_dynamic_threshold_is_a_quantile_of_the_blended_clip(per: str, percentile: float) -> None:
    """By numpy, of a step whose windows disagree; one clip of the two has a quantile below 1, which counts as 1."""
    noise = draw(2, 3, 10, 8, 8)
    windows = plan_windows(10, 4)
    scale = torch.tensor([4.0, 0.2], dtype=torch.float64)[:, None, None, None, None]
    predictions = [scale * draw(2, 3, 4, 8, 8, seed=i) for i in range(len(windows))]

    def step(threshold: Threshold | None) -> Tensor:
        denoiser = Denoiser(SCHEDULE, SampleParameterization(), "ddim", threshold)
        return denoiser(
            lambda x, t, window: predictions[list(windows).index(window)], noise.clone(), 1, windows=windows
        ).clip

    x0 = step(None).numpy()
    axes = (1, 2, 3, 4) if per == "clip" else (1, 3, 4)
    limit = np.maximum(np.quantile(np.abs(x0), percentile, axis=axes, keepdims=True), 1.0)
    assert (limit[0] > 1).all()
    assert (limit[1] == 1).all()
    wanted = torch.from_numpy(np.clip(x0, -limit, limit) / limit)
    torch.testing.assert_close(step(Threshold("dynamic", percentile, per)), wanted, rtol=0, atol=1e-9)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"sampler must be one of ddim, dpm-solver\+\+, ddpm, got 'euler'"):
        Denoiser(SCHEDULE, EDM, "euler")
    with pytest.raises(ValueError, match="eta is a setting of sampler 'ddim'"):
        Denoiser(SCHEDULE, EDM, "ddpm", eta=0.5)
    with pytest.raises(ValueError, match=r"threshold.percentile must be in \(0, 1\], got 99"):
        Denoiser(SCHEDULE, EDM, threshold=Threshold("dynamic", 99))
    denoiser = Denoiser(SCHEDULE, EDM)
    with pytest.raises(ValueError, match="frames 4, 5 are in no window"):
        denoiser(of_each_frame, draw(1, 1, 10, 2, 2), 2, windows=WindowPlan(10, 4, 0, ((0,), (6,))))
    with pytest.raises(ValueError, match="num_inference_steps must be >= 1, got 0"):
        denoiser(of_each_frame, draw(1, 1, 4, 2, 2), 0, windows=plan_windows(4, 4, 0))


# In place, within memory ---------------------------------------------------------------------------------------------


def on_every_step(monkeypatch: pytest.MonkeyPatch, look: Callable[..., None]) -> None:
    """`look(predictions, latent, row, results=None, **settings)` before each step, with its results after it."""
    step = ops.denoise_step

    def watched(windows: list[Tensor], starts: object, latent: Tensor, row: StepCoefficients, **settings: Any) -> Any:
        look(windows, latent, row, **settings)
        results = step(windows, starts, latent, row, **settings)
        look(windows, latent, row, results=results, **settings)
        return results

    monkeypatch.setattr(ops, "denoise_step", watched)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "a slice": lambda x: torch.cat([x, x], dim=2).contiguous(memory_format=torch.channels_last_3d)[:, :, : x.shape[2]],
    "expanded": lambda x: x[:, :, :1].expand_as(x),
    "frames first": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_steps_are_taken_in_place_in_the_memory_of_dense_noise(
    sampler: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = layout(draw(2, 3, 10, 4, 4, dtype=dtype))
    kept, dense = noise.clone(), noise.is_contiguous(memory_format=_layout.video_format(noise))
    wanted = Denoiser(SCHEDULE, EDM, sampler)(
        of_the_window,
        kept.clone(memory_format=torch.contiguous_format),
        4,
        windows=plan_windows(10, 4),
        generators=clip_generators(seeded(), 2),
    ).clip
    places: list[tuple[int, ...]] = []

    def look(windows: list[Tensor], latent: Tensor, row: object, results: object = None, **settings: Any) -> None:
        if results is not None:
            assert settings["out"] == (latent, settings["history"])
            places.append(tuple(x.data_ptr() for x in (latent, *results)))
            assert len({*places[-1]}) == 2
            assert (latent.data_ptr() == noise.data_ptr()) == dense

    on_every_step(monkeypatch, look)
    clip = (
        Denoiser(SCHEDULE, EDM, sampler)(
            of_the_window, noise, 4, windows=plan_windows(10, 4), generators=clip_generators(seeded(), 2)
        )
    ).clip
    assert len({latent for latent, _, _ in places} | {latent for _, latent, _ in places}) == 1
    if sampler == "dpm-solver++":
        assert places[0] == places[1] == places[2], "the history is not written where it was read"
    assert torch.equal(noise, clip if dense else kept)
    assert clip.dtype == dtype
    assert clip.is_contiguous(memory_format=_layout.video_format(noise))
    torch.testing.assert_close(clip, wanted, rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_a_gradient_flows_where_one_is_asked_for() -> None:
    noise, scale = draw(1, 3, 6, 4, 4).requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)
    denoiser = Denoiser(SCHEDULE, EDM)
    clip = denoiser(lambda *call: scale * of_the_window(*call), noise, 4, windows=plan_windows(6, 4)).clip
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(clip.sum(), [noise, scale]))


@pytest.fixture
def alive() -> Iterator[Callable[[int], int]]:
    """How many tensors of so many elements were made since and still are; those that share memory count once."""

    def count(elements: int) -> int:
        found = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.numel() == elements]
        return len({x.untyped_storage().data_ptr() for x in found})

    gc.freeze()  # what is there already is not looked at, which would take a second a test
    yield count
    gc.unfreeze()


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"sampler": name} for name in SAMPLERS] + [{"sampler": "ddim", "eta": 0.7}])
def test_no_video_is_held_but_those_that_are_read(
    settings: dict[str, Any], alive: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latent, which the noise became, the history where it is read, the predictions of one step, one window's
    input, the step's own noise."""
    noise, windows = draw(1, 3, 14, 9, 11, dtype=torch.float32), plan_windows(14, 6)
    video, part = noise.numel(), noise[:, :, :6].numel()
    table = sampling_table(settings["sampler"], SCHEDULE.levels(4), EDM, eta=settings.get("eta", 0.0))
    calls: list[tuple[int, int]] = []

    def held() -> tuple[int, int]:
        return alive(video), alive(part)

    class Watched(EDMParameterization):
        def scale_input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            assert x.numel() == part
            assert held()[0] == 1 + (table[len(calls) // len(windows)].history != 0)
            return super().scale_input(x, alpha, sigma)

    def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
        step, index = divmod(len(calls), len(windows))
        calls.append(held())
        assert calls[-1] == (1 + (table[step].history != 0), 1 + index)
        return of_the_window(scaled, timestep, window)

    def look(predictions: object, latent: object, row: StepCoefficients, results: object = None, **kwargs: Any) -> None:
        x0 = row.history != 0 or results is not None  # the new one is written over the old
        assert held() == (1 + x0 + (row.noise != 0), len(windows))

    def on_state(state: DenoisingState) -> None:
        assert held() == (1 + (state.step < len(table) and table[state.step].history != 0), 0)

    on_every_step(monkeypatch, look)
    denoiser = Denoiser(SCHEDULE, Watched(), **settings)
    generators = clip_generators(seeded(), 1)
    result = denoiser(predict, noise, 4, windows=windows, generators=generators, on_state=on_state)
    assert len(calls) == 4 * len(windows)
    assert held() == (1, 0)
    assert result.windows == windows


def out_of_cpu_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def out_of_cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def out_of_python_memory() -> None:
    raise MemoryError


LACKS = pytest.mark.parametrize("run_out", [out_of_cpu_memory, out_of_cuda_memory, out_of_python_memory])


def halved(windows: WindowPlan) -> WindowPlan | None:
    return plan_windows(windows.num_frames, windows.window_frames // 2) if windows.window_frames > 4 else None


class Short:
    """A prediction for which memory does not suffice, in its window `index` of step `step`, above `most` frames."""

    def __init__(self, run_out: Callable[[], None], step: int = 2, index: int = 1, most: int = 4) -> None:
        self.run_out, self.first, self.most = run_out, 3 * step + index, most
        self.calls = 0
        self.activations: list[weakref.ref[Tensor]] = []

    def __call__(self, scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
        assert all(activation() is None for activation in self.activations), "memory of the failure is not free"
        self.calls += 1
        if self.calls > self.first and scaled.shape[2] > self.most:
            activation = scaled.clone()
            self.activations += [weakref.ref(activation), weakref.ref(scaled)]
            try:
                self.run_out()
            except (RuntimeError, MemoryError) as error:
                cycle = error  # noqa: F841  # a frame that refers to the error that refers to the frame
                raise
        return of_the_window(scaled, timestep, window)


@torch.no_grad()
@LACKS
@pytest.mark.parametrize("settings", [{"sampler": name} for name in SAMPLERS] + [{"sampler": "ddim", "eta": 0.7}])
def test_a_step_without_memory_is_made_again_in_smaller_windows(
    settings: dict[str, Any], run_out: Callable[[], None]
) -> None:
    """To the bit what two steps in large windows and the rest in small ones are, fresh noise included."""
    large, small = plan_windows(16, 8), plan_windows(16, 4)
    noise, denoiser = draw(1, 3, 16, 4, 4), Denoiser(SCHEDULE, EDM, **settings)
    kept: list[DenoisingState] = []

    def keep(state: DenoisingState) -> None:
        history = None if state.history is None else state.history.clone()
        kept.append(replace(state, latent=state.latent.clone(), history=history, windows=small))

    def generators() -> list[torch.Generator]:
        return clip_generators(seeded(), 1)

    denoiser(of_the_window, noise.clone(), 5, windows=large, generators=generators(), on_state=keep)
    wanted = denoiser(of_the_window, noise.clone(), 5, windows=large, generators=generators(), resume=kept[1])
    short, states = Short(run_out), []
    with pytest.warns(UserWarning, match="out of memory") as caught:
        result = denoiser(
            short, noise, 5, windows=large, generators=generators(), shrink=halved, on_state=states.append
        )
    assert torch.equal(result.clip, wanted.clip)
    assert result.windows == wanted.windows == small
    assert [state.windows for state in states] == [large] * 2 + [small] * 3
    assert [str(warning.message) for warning in caught] == [
        f"out of memory with {large}: the step is made again with {small}"
    ]
    assert short.calls == 6 + 2 + 3 * len(small)
    assert short.activations


@torch.no_grad()
@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at CPUAllocator.cpp:64] . DefaultCPUAllocator: can't allocate memory: you tried",
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried",
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "could not create a memory object",
    ],
)
def test_libraries_say_it_in_their_own_words(words: str) -> None:
    def run_out() -> None:
        raise RuntimeError(words)

    with pytest.warns(UserWarning, match="out of memory"):
        result = Denoiser(SCHEDULE, EDM)(
            Short(run_out), draw(1, 1, 16, 2, 2), 4, windows=plan_windows(16, 8), shrink=halved
        )
    assert result.windows.window_frames == 4


@torch.no_grad()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_memory_may_run_out_after_the_network(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the step itself, when its noise is drawn: it is made again with the same noise."""
    large, small = plan_windows(16, 8), plan_windows(16, 4)
    noise, denoiser = draw(1, 3, 16, 4, 4), Denoiser(SCHEDULE, EDM, sampler)
    wanted = denoiser(of_the_window, noise.clone(), 3, windows=small, generators=clip_generators(seeded(), 1)).clip

    def run_out(windows: list[Tensor], *_: object, results: object = None, **settings: Any) -> None:
        if windows[0].shape[2] > 4:
            out_of_cuda_memory()

    on_every_step(monkeypatch, run_out)
    with pytest.warns(UserWarning, match="out of memory"):
        result = denoiser(
            of_the_window, noise, 3, windows=large, generators=clip_generators(seeded(), 1), shrink=halved
        )
    assert result.windows == small
    assert torch.equal(result.clip, wanted)


@torch.no_grad()
def test_windows_are_counted_on_where_a_step_is_made_again() -> None:
    steps: list[tuple[int, int]] = []
    windows = plan_windows(16, 8)
    with pytest.warns(UserWarning, match="out of memory"):
        Denoiser(SCHEDULE, EDM)(
            Short(out_of_cuda_memory),
            draw(1, 1, 16, 2, 2),
            4,
            windows=windows,
            shrink=halved,
            on_step=lambda *now: steps.append(now),
        )
    small = len(plan_windows(16, 4))
    assert steps == [(done, 12) for done in range(1, 8)] + [(done, 7 + 2 * small) for done in range(8, 8 + 2 * small)]


@torch.no_grad()
@LACKS
def test_memory_that_no_plan_suffices_for_is_an_error(run_out: Callable[[], None]) -> None:
    noise, windows = draw(1, 1, 16, 2, 2), plan_windows(16, 8)
    kinds = (torch.OutOfMemoryError, MemoryError, RuntimeError)
    with pytest.raises(kinds):
        Denoiser(SCHEDULE, EDM)(Short(run_out), noise, 4, windows=windows)
    tried: list[WindowPlan] = []
    with pytest.raises(kinds), pytest.warns(UserWarning, match="out of memory"):
        Denoiser(SCHEDULE, EDM)(
            Short(run_out, most=0), noise, 4, windows=windows, shrink=lambda plan: tried.append(plan) or halved(plan)
        )
    assert tried == [windows, plan_windows(16, 4)]


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("memory"), KeyboardInterrupt()]
)
def test_other_errors_are_not_taken_for_a_lack_of_memory(error: BaseException) -> None:
    def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
        raise error

    def shrink(plan: WindowPlan) -> WindowPlan:
        raise AssertionError("the step would be made again")

    with pytest.raises(type(error)) as caught:
        Denoiser(SCHEDULE, EDM)(predict, draw(1, 1, 16, 2, 2), 4, windows=plan_windows(16, 8), shrink=shrink)
    assert caught.value is error


@pytest.mark.parametrize(("device", "calls"), [("cpu", []), ("cuda", [True])])
def test_a_gpu_is_given_its_memory_back_once_nothing_holds_it(
    device: str, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held[0]() is None))

    def make(windows: WindowPlan) -> list[Tensor]:
        activation = draw(4)
        held.append(weakref.ref(activation))
        if windows.window_frames > 4:
            out_of_cuda_memory()
        return [activation]

    with pytest.warns(UserWarning, match="out of memory"):
        _, windows = _within_memory(make, plan_windows(16, 8), halved, torch.device(device))
    assert windows.window_frames == 4
    assert emptied == calls
