"""Super-resolution in windows holds one window's activations and a few videos, however long the clip is.

Counted on tensors without values: what is alive at once is a matter of shapes and lifetimes alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import inflate, ops
from lumiere_fast.diffusion import EDMParameterization
from lumiere_fast.pipelines import super_resolution
from lumiere_fast.pipelines.activations import peak_bytes
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.super_resolution import SuperResolution
from lumiere_fast.pipelines.windows import plan_windows
from lumiere_fast.text import TextEmbedding
from tests.models.tiny import draw_inputs, tiny_unet
from tests.pipelines.tiny import SCHEDULE

SIZE, WINDOW = 16, 8
FRAME = 3 * SIZE**2 * 4  # bytes of a full-size one
SHORT, LONG = 14, 44  # frames, tiled exactly by 2 and 7 windows
HELD = 2  # videos that stay while a window is denoised: the latent and the clean clip of the step before

Peak = Callable[..., int]


def in_place(windows: object, starts: object, latent: Tensor, *_: object, **settings: Any) -> tuple[Tensor, Tensor]:
    """A step as a kernel takes it, without temporaries; those of the reference are not the pipeline's."""
    _, x0 = settings["out"]
    return latent, torch.empty_like(latent) if x0 is None else x0


@pytest.fixture(scope="module")
def peak() -> Iterator[Peak]:
    unet = tiny_unet(ssr=True, dtype=torch.float32)
    model = inflate(unet, temporal_factors=(2,)).eval()
    inputs = draw_inputs(unet, 1, SIZE // 2, SIZE // 2)
    text = TextEmbedding(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])

    @functools.cache
    def of(num_frames: int, window_frames: int = WINDOW) -> int:
        """Bytes alive at once of a clip of `num_frames`, in three steps of a sampler that has a history."""
        enlarge = SuperResolution(model, Denoiser(SCHEDULE, EDMParameterization()), window_frames, factor=2)
        small = torch.zeros(1, 3, num_frames, SIZE // 2, SIZE // 2)
        return peak_bytes(lambda clip: enlarge(clip, text, 3, [torch.Generator()]), small)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "denoise_step", in_place)
        patch.setattr(super_resolution, "clip_generators", lambda given, *_: given)  # seeds need values
        yield of


def videos(num_frames: int) -> int:
    """Bytes of the videos themselves: those held, and every window's prediction."""
    return (HELD * num_frames + len(plan_windows(num_frames, WINDOW)) * WINDOW) * FRAME


def test_a_longer_clip_takes_its_videos_and_nothing_else(peak: Peak) -> None:
    """But for the small clip, noised: a quarter of a frame for each."""
    growth = (peak(LONG) - peak(SHORT)) - (videos(LONG) - videos(SHORT))
    assert growth == pytest.approx((LONG - SHORT) * FRAME / 4, rel=0.05)


def test_beside_its_videos_a_longer_clip_takes_what_a_short_one_does(peak: Peak) -> None:
    assert peak(LONG) - videos(LONG) <= 1.1 * (peak(SHORT) - videos(SHORT))
    assert peak(LONG, window_frames=LONG) > 3 * peak(LONG), "it is not the windows that save memory"
