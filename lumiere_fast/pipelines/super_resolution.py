"""The second stage: a small clip raised in size by the inflated super-resolution model, window by window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lumiere_fast.diffusion import Generators, augmented_conditioning, clip_generators, draw_noise
from lumiere_fast.models import STUNet
from lumiere_fast.models.stunet import check_num_frames
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.windows import Window, plan_windows
from lumiere_fast.text import TextEmbedding


@dataclass(frozen=True)
class SuperResolution:
    """Raises the height and width of clips of any length in windows of `window_frames` (paper, section 3.2).

    Args:
        factor: how many times larger the model's clips are.
        augmentation_level: standard deviation of the noise added to the small clip, once a clip.
    """

    model: STUNet
    denoiser: Denoiser
    window_frames: int
    factor: int
    overlap: int = 2
    augmentation_level: float = 0.1

    def __post_init__(self) -> None:
        check_num_frames(self.window_frames, self.model.temporal_factor)
        plan_windows(self.window_frames, self.window_frames, self.overlap)  # refuses an overlap before there is work

    def __call__(
        self,
        clip: Tensor,
        text: TextEmbedding,
        num_inference_steps: int,
        generator: Generators = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """(B, 3, T, h, w) in [-1, 1] -> (B, 3, T, h * factor, w * factor), fp32.

        `generator`: one for the batch or one a clip; each clip has a stream of its own, see `clip_generators`.
        """
        batch, channels, frames, height, width = clip.shape
        check_num_frames(min(frames, self.window_frames), self.model.temporal_factor)
        generators = clip_generators(generator, batch, clip.device)
        size = (batch, channels, frames, height * self.factor, width * self.factor)
        noise = draw_noise(size, clip.device, generators)
        conditioning = augmented_conditioning(
            clip,
            draw_noise(clip.shape, clip.device, generators),
            torch.full((batch,), self.augmentation_level, device=clip.device),
            self.factor,
            self.denoiser.parameterization,
        )
        prepared = self.model.prepare_text(*text)
        image, level = conditioning["image_conditioning"], conditioning["augmentation_level"]

        def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
            return self.model(
                scaled,
                timestep,
                prepared,
                image_conditioning=window.of(image),
                augmentation_level=level,
            )

        windows = plan_windows(frames, self.window_frames, self.overlap)
        return self.denoiser(
            predict, noise, num_inference_steps, windows=windows, generators=generators, on_step=on_step
        ).clip
