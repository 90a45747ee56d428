"""Super-resolution by windows, over time and space; `LumierePipeline.upscale`; what it may take of memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import STUNet, inflate
from lumiere_fast.diffusion import SAMPLERS, augmented_conditioning, clip_generators, draw_noise
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.super_resolution import SuperResolution
from lumiere_fast.text import TextEmbedding
from tests.models.tiny import draw_inputs, randomise, tiny_unet
from tests.pipelines.test_multidiffusion import EDM, SCHEDULE, draw, seeded

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
    # every second phase of the linear enlargement weighs neighbours (3/4, 1/4) along each axis
    kept = (0.75**2 + 0.25**2) ** 2
    assert seen[0]["image_conditioning"].var().item() == pytest.approx(0.1**2 * kept, rel=0.15)
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
        (lambda: super_resolution(2, 0), "got 0"),
        (lambda: super_resolution(2, 2), "overlap must be from 0 to window_frames - 1 = 1, got 2"),
    ],
)
def test_windows_the_model_cannot_take_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
