"""Super-resolution by windows, over time and space; `LumierePipeline.upscale`; what it may take of memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lumiere_fast import LumiereOutput, LumierePipeline, STUNet, inflate, ops
from lumiere_fast.diffusion import SAMPLERS, augmented_conditioning, clip_generators, draw_noise
from lumiere_fast.pipelines import budget
from lumiere_fast.pipelines.budget import Job, job_bytes, weight_bytes
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.super_resolution import SuperResolution, padded
from lumiere_fast.pipelines.windows import plan_windows, window_choices
from lumiere_fast.text import TextEmbedding
from tests.models.tiny import draw_inputs, randomise, tiny_unet
from tests.pipelines.test_multidiffusion import EDM, SCHEDULE, draw, seeded
from tests.pipelines.tiny import make_pipeline

BALL = "a red ball moving left"


def super_resolution(
    factor: int, window_frames: int, *, trained: bool = True, **settings: Any
) -> tuple[STUNet, SuperResolution]:
    model = inflate(tiny_unet(ssr=True, dtype=torch.float32), temporal_factors=(factor,))
    if trained:
        randomise(model.temporal)
    return model, SuperResolution(model, Denoiser(SCHEDULE, EDM, **settings), window_frames, factor=2)


@pytest.fixture
def text() -> TextEmbedding:
    inputs = draw_inputs(tiny_unet(ssr=True, dtype=torch.float32), 2, 8, 8)
    return TextEmbedding(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])


@torch.no_grad()
def by_hand(model: STUNet, clip: Tensor, text: TextEmbedding, steps: int, generator: torch.Generator) -> Tensor:
    """DDIM over the whole clip, no windows, no tables."""
    generators = clip_generators(generator, clip.shape[0])
    x = draw_noise((*clip.shape[:3], 2 * clip.shape[3], 2 * clip.shape[4]), "cpu", generators)
    level = torch.full((clip.shape[0],), 0.1)
    conditioning = augmented_conditioning(clip, draw_noise(clip.shape, "cpu", generators), level, 2, EDM)
    sigmas = [s.sigma for s in SCHEDULE.levels(steps)]
    x = x * sigmas[0]
    for now, after in pairwise(sigmas):
        sigma = torch.full((clip.shape[0],), now)
        total = now**2 + 0.25
        output = model(x / total**0.5, 250 * sigma.log(), *text, **conditioning)
        x0 = (x * 0.25 / total + output * now * 0.5 / total**0.5).clamp(-1, 1)
        x = x0 + after * (x - x0) / now
    return x


@pytest.mark.parametrize("num_frames", [4, 8])
def test_a_clip_in_one_window_is_a_clip_without_windows(num_frames: int, text: TextEmbedding) -> None:
    model, enlarge = super_resolution(2, 8, sampler="ddim")
    clip = draw(2, 3, num_frames, 8, 8).float().clamp(-1, 1)
    with torch.no_grad():
        result = enlarge(clip, text, 3, seeded()).clip
    assert result.shape == (2, 3, num_frames, 16, 16)
    torch.testing.assert_close(result, by_hand(model, clip, text, 3, seeded()), rtol=0, atol=1e-4)


def test_a_model_of_single_frames_gives_the_same_in_windows(text: TextEmbedding) -> None:
    """At its initialisation, without temporal resizing, the model predicts each frame alone; trained, it does not."""
    clip = draw(2, 3, 14, 8, 8).float().clamp(-1, 1)
    difference = {}
    for trained in (False, True):
        model, windowed = super_resolution(1, 6, trained=trained)
        whole = SuperResolution(model, windowed.denoiser, 14, factor=2)
        with torch.no_grad():
            one, other = (each(clip, text, 3, seeded()).clip for each in (windowed, whole))
            difference[trained] = (one - other).abs().max()
    assert difference[False] < 1e-4
    assert difference[True] > 1e-2


def test_the_small_clip_and_its_noise_are_the_same_in_all_windows(text: TextEmbedding) -> None:
    model, enlarge = super_resolution(2, 8)
    seen: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    clip = torch.zeros(2, 3, 14, 8, 8)
    with torch.no_grad():
        enlarge(clip, text, 2, seeded())
    assert len(seen) == 4
    for step in (0, 2):
        first, second = seen[step]["image_conditioning"], seen[step + 1]["image_conditioning"]
        assert torch.equal(first[:, :, 6:8], second[:, :, 0:2])
        assert torch.equal(first, seen[0]["image_conditioning"])
    # every second phase of the linear enlargement weighs neighbours (3/4, 1/4) along each axis, but at the edges
    kept = (0.75**2 + 0.25**2) ** 2
    assert seen[0]["image_conditioning"][..., 1:-1, 1:-1].var().item() == pytest.approx(0.1**2 * kept, rel=0.15)
    torch.testing.assert_close(seen[0]["augmentation_level"], 250 * torch.full((2,), 0.1).log())


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_clip_is_enlarged_as_it_would_be_alone(sampler: str, text: TextEmbedding) -> None:
    """Noise, augmentation and fresh noise are the clip's own; a generator each does what one for both does."""
    _, enlarge = super_resolution(2, 4, sampler=sampler)
    clip = draw(2, 3, 6, 8, 8).float().clamp(-1, 1)
    generator = seeded()
    with torch.no_grad():
        both = enlarge(clip, text, 3, seeded()).clip
        parts = [(clip[i : i + 1], TextEmbedding(*(x[i : i + 1] for x in text))) for i in (0, 1)]
        alone = [enlarge(*part, 3, generator).clip for part in parts]
        listed = enlarge(clip, text, 3, [seeded(), seeded(9)]).clip
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-4)
    torch.testing.assert_close(listed[0], both[0], rtol=0, atol=1e-4)
    assert (listed[1] - both[1]).abs().mean() > 0.01


def test_a_seed_decides_everything(text: TextEmbedding) -> None:
    _, enlarge = super_resolution(2, 4)
    clip = draw(2, 3, 6, 8, 8).float().clamp(-1, 1)

    def make(seed: int) -> Tensor:
        with torch.no_grad():
            return enlarge(clip, text, 2, seeded(seed)).clip

    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: super_resolution(4, 6),
            "multiple of the model's temporal factor 4, got 6; the nearest accepted are 4 and 8",
        ),
        (lambda: super_resolution(2, 0), "window_frames must be a positive multiple .* got 0"),
        (lambda: super_resolution(2, 2), "overlap must be from 0 to window_frames - 1 = 1, got 2"),
    ],
)
def test_windows_the_model_cannot_take_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Windows in space ----------------------------------------------------------------------------------------------------


def of_each_pixel(sample: Tensor, timestep: Tensor, text: Any, *, image_conditioning: Tensor, **_: Tensor) -> Tensor:
    return torch.sin(3 * sample + image_conditioning)


@pytest.mark.parametrize("weights", [None, "flat", "pyramid"])
def test_a_model_of_single_pixels_gives_the_same_in_windows(
    weights: Any, text: TextEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window sees its own part of the latent and of the small clip, and goes back where it came from."""
    model, enlarge = super_resolution(2, 4)
    monkeypatch.setattr(model, "forward", of_each_pixel)
    enlarge = replace(enlarge, weights=weights)
    clip = draw(2, 3, 6, 11, 15).float().clamp(-1, 1)
    with torch.no_grad():
        windowed = enlarge(clip, text, 3, seeded())
        whole = enlarge(clip, text, 3, seeded(), windows=plan_windows(6, 6, 0))
    assert len(windowed.windows) == 2 * 2 * 3
    assert windowed.clip.shape == (2, 3, 6, 22, 30)
    torch.testing.assert_close(windowed.clip, whole.clip, rtol=0, atol=1e-5)


def test_frames_no_larger_than_the_model_was_trained_on_are_not_cut() -> None:
    _, enlarge = super_resolution(2, 4)
    assert enlarge.plan(6, 8, 8).window_size is None
    assert enlarge.plan(6, 8, 8).weights == "flat"
    large = enlarge.plan(6, 8, 20)
    assert (large.window_size, large.size, large.size_overlap, large.weights) == (
        (16, 16),
        (16, 40),
        (4, 4),
        "trapezoid",
    )
    assert replace(enlarge, size_overlap=6).plan(6, 12, 12).size_overlap == (6, 6)


def test_the_small_clip_is_enlarged_a_window_at_a_time(text: TextEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    _, enlarge = super_resolution(2, 4)
    seen: list[tuple[int, ...]] = []
    upsample = ops.space_time_upsample

    def watching(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[1] == 3:
            seen.append(tuple(x.shape))
        return upsample(x, *args, **kwargs)

    monkeypatch.setattr(ops, "space_time_upsample", watching)
    with torch.no_grad():
        enlarge(draw(2, 3, 10, 8, 8).float(), text, 1, seeded())
    assert seen == [(2, 3, 4, 8, 8)] * 4


# A clip of the user's ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> LumierePipeline:
    pytest.importorskip("tokenizers")
    return make_pipeline()


def upscale(pipe: LumierePipeline, frames: Any, prompt: Any = BALL, **settings: Any) -> LumiereOutput:
    return pipe.upscale(frames, prompt, **{"generator": seeded(), "num_inference_steps": 2} | settings)


def test_a_clip_is_raised_by_the_second_stage_alone(pipe: LumierePipeline) -> None:
    clip = draw(2, 3, 6, 8, 8).float().clamp(-1, 1)
    output = upscale(pipe, clip, [BALL, "a blue star"])
    denoiser = Denoiser(pipe.config.ssr_schedule, pipe.config.ssr_parameterization)
    with torch.no_grad():
        text = pipe.text_encoder.encode([BALL, "a blue star"])
        wanted = SuperResolution(pipe.ssr, denoiser, 4, 2)(clip, text, 2, clip_generators(seeded(), 2)).clip
    torch.testing.assert_close(output.frames, wanted.clamp(-1, 1), rtol=0, atol=1e-5)
    assert torch.equal(output.base_frames, clip)
    assert list(output.seconds) == list(output.windows) == ["ssr"]
    assert str(output.windows["ssr"]).startswith("2 windows of 4 frames, overlap 2, exact")


@pytest.mark.parametrize("size", [(1, 3, 5), (3, 9, 13), (5, 8, 8), (7, 5, 20)])
def test_any_length_and_size(pipe: LumierePipeline, size: tuple[int, int, int]) -> None:
    """What the model cannot take is made up by repetition, and cut off again."""
    clip = draw(1, 3, *size).float().clamp(-1, 1)
    frames = upscale(pipe, clip).frames
    t, h, w = size
    assert frames.shape == (1, 3, t, 2 * h, 2 * w)
    assert frames.std() > 0.05
    if size[0] < 4:
        by_hand = torch.cat([clip, clip[:, :, -1:]], dim=2)
        assert torch.equal(frames, upscale(pipe, by_hand).frames[:, :, :t])


def test_sides_are_made_up_to_what_the_model_takes() -> None:
    """Patches of 2 and a level more: sides of 4 when enlarged by 2, though windows of trained size shift anyhow."""
    model = make_pipeline(patch_size=2).ssr
    enlarge = SuperResolution(model, Denoiser(SCHEDULE, EDM), 4, 2)
    assert model.unet.config.spatial_factor == 4
    assert enlarge.padding(3, 5, 7) == (1, 1, 1)
    assert enlarge.padding(4, 6, 8) == (0, 0, 0)
    assert enlarge.padding(5, 9, 11) == (0, 0, 0)
    clip = draw(1, 3, 2, 3, 3)
    larger = padded(clip, (1, 2, 0))
    assert larger.shape == (1, 3, 3, 5, 3)
    assert torch.equal(larger[:, :, :2, :3], clip)
    assert torch.equal(larger[:, :, 2, 4], clip[:, :, 1, 2])


def test_a_clip_may_come_in_any_form(pipe: LumierePipeline) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    clip = torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1
    wanted = upscale(pipe, clip, num_inference_steps=1).frames
    images = [image.fromarray(frame) for frame in pixels]
    for frames in (clip[None], pixels, pixels[None], pixels / 255, images, [images]):
        frames = upscale(pipe, frames, num_inference_steps=1).frames
        torch.testing.assert_close(frames, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(3, 4, 8), r"a tensor \(B, 3, T, H, W\) or \(3, T, H, W\), got shape \(3, 4, 8\)"),
        (torch.zeros(4, 2, 8, 8), r"got shape \(4, 2, 8, 8\)"),
        (torch.zeros(3, 0, 8, 8), r"got shape \(3, 0, 8, 8\)"),
        (torch.zeros(3, 4, 8, 8, dtype=torch.uint8), "floats in .* got torch.uint8"),
        (torch.full((3, 4, 8, 8), 2.0), "out of range"),
        (torch.full((3, 4, 8, 8), torch.nan), "nan"),
        (np.zeros((4, 8, 8, 3), np.int64), "uint8, or of floats in .* got int64"),
        (np.full((4, 8, 8, 3), 255.0), "out of range"),
        (np.zeros((4, 8, 3), np.uint8), "an array .* got shape"),
        (5, "a tensor, an array or images of one size"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "images of one size"),
    ],
)
def test_bad_clips_are_named(pipe: LumierePipeline, frames: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upscale(pipe, frames)


# Memory --------------------------------------------------------------------------------------------------------------


def bytes_of_long_clip(pipe: LumierePipeline) -> Callable[[int], int]:
    """What 16 frames in windows of so many take: in windows of 8 the fewest are computed."""
    ssr = SuperResolution(pipe.ssr, Denoiser(SCHEDULE, EDM), 8, 2)
    return job_bytes(ssr, window_choices(16, 2, at_most=8), Job(1, 16, 8, 8))


def window_frames(pipe: LumierePipeline, **settings: Any) -> int:
    settings = {"window_frames": 8, "num_inference_steps": 1} | settings
    return upscale(pipe, torch.zeros(3, 16, 8, 8), **settings).windows["ssr"].window_frames


def test_windows_are_the_best_that_max_memory_holds(pipe: LumierePipeline) -> None:
    needed, weights = bytes_of_long_clip(pipe), weight_bytes(pipe.base, pipe.ssr)
    assert window_frames(pipe, max_memory="1GiB") == 8
    assert window_frames(pipe, max_memory=weights + needed(8) - 1) == 6
    assert window_frames(pipe, max_memory=weights + needed(4)) == 4
    message = r"max_memory is .* takes about .* in windows of 4 frames, the shortest.*; allow more, or ask for fewer"
    with pytest.raises(ValueError, match=message):
        window_frames(pipe, max_memory=weights + needed(4) - 1)
    pipe.enable_model_cpu_offload("cpu:0")
    assert window_frames(pipe, max_memory=weight_bytes(pipe.ssr) + needed(8)) == 8
    pipe.to("cpu")


def test_what_is_free_decides_where_nothing_is_said(pipe: LumierePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bytes_of_long_clip(pipe)

    def windows(free: int | None) -> int:
        monkeypatch.setattr(budget, "free_memory", lambda device: free)
        return window_frames(pipe)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for free in (None, 2**40, needed(8)):
            assert windows(free) == 8
    with pytest.warns(RuntimeWarning, match=r"windows of 8 frames take about .* are free: .* by 4 windows of 6 frames"):
        assert windows(needed(8) - 1) == 6
    with pytest.warns(RuntimeWarning, match=r"the shortest.*memory may run out"):
        assert windows(1) == 4


@pytest.mark.parametrize("make", [make_pipeline, LumierePipeline.from_pretrained], ids=["tiny", "demo"])
def test_what_counts_as_ample_is_more_than_a_pass_takes(make: Callable[[], LumierePipeline]) -> None:
    pytest.importorskip("tokenizers")
    pipe = make()
    factor, size = pipe.ssr.temporal_factor, pipe.base.unet.config.sample_size
    ssr = SuperResolution(pipe.ssr, Denoiser(SCHEDULE, EDM), 2 * factor, 2)
    job = Job(1, 2 * factor, size, size)
    finest = budget._finest(ssr, ssr.plan(*job[1:]), job)
    assert finest < budget._window_bytes(ssr, job)(2 * factor) < budget.AMPLE * finest


def test_memory_that_runs_out_in_the_middle_makes_windows_smaller(
    pipe: LumierePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clip is then that of the smaller windows, and the result says so."""
    clip = draw(1, 3, 12, 8, 8).float().clamp(-1, 1)
    wanted = upscale(pipe, clip, window_frames=4)
    forward = pipe.ssr.forward

    def exhausted(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if sample.shape[2] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.ssr, "forward", exhausted)
    with pytest.warns(UserWarning, match="out of memory"):
        output = upscale(pipe, clip, window_frames=8)
    assert output.windows == wanted.windows
    assert torch.equal(output.frames, wanted.frames)
