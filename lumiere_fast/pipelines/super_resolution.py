"""The second stage: a small clip raised in size by the inflated super-resolution model, window by window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast import ops
from lumiere_fast.diffusion import Generators, clip_generators, draw_noise, noise_augmented
from lumiere_fast.models import STUNet
from lumiere_fast.models.stunet import check_num_frames
from lumiere_fast.ops.blend_windows import WeightKind
from lumiere_fast.pipelines.cuda_graph import Graphed
from lumiere_fast.pipelines.denoising import Denoised, Denoiser, Predictor
from lumiere_fast.pipelines.state import DenoisingState
from lumiere_fast.pipelines.windows import Vectors, Window, WindowPlan, plan_windows
from lumiere_fast.text import TextEmbedding


@dataclass(frozen=True)
class SuperResolution:
    """Raises the height and width of clips of any length in windows of `window_frames` (paper, section 3.2).

    Frames that come out larger than the model's `sample_size`, for which it was trained, are cut into windows of that
    size too. They share a quarter of their side: all that ties the texture of neighbours together is what they share.

    Args:
        factor: how many times larger the model's clips are.
        augmentation_level: standard deviation of the noise added to the small clip, once a clip.
        weights: of the blend of windows, as in `plan_windows`; None for equal ones, as in the paper, of windows over
            time, and a trapezoid, which leaves no edge, where they lie in space.
        size_overlap: rows and columns that neighbours share; None for a quarter.
        cuda_graphs: replay the network as CUDA graphs, see `Graphed`.
    """

    model: STUNet
    denoiser: Denoiser
    window_frames: int
    factor: int
    overlap: int = 2
    augmentation_level: float = 0.1
    weights: WeightKind | Vectors | None = None
    size_overlap: int | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        check_num_frames(self.window_frames, self.model.temporal_factor, "window_frames")
        self.plan(self.window_frames, 1, 1)  # refuses an overlap and weights before there is work

    def plan(self, num_frames: int, height: int, width: int) -> WindowPlan:
        """The windows of a small clip of this size."""
        return plan_windows(num_frames, self.window_frames, self.overlap, **self.space(height, width))

    def space(self, height: int, width: int) -> dict[str, Any]:
        """The settings of `plan_windows` that do not depend on time, for small frames of this size."""
        trained = self.model.unet.config.sample_size
        size = height * self.factor, width * self.factor
        if max(size) <= trained:
            return {"weights": "flat" if self.weights is None else self.weights}
        window = min(size[0], trained), min(size[1], trained)
        settings: dict[str, Any] = {"weights": "trapezoid" if self.weights is None else self.weights}
        if self.size_overlap is not None:
            settings["size_overlap"] = (self.size_overlap, self.size_overlap)
        return {"size": size, "window_size": window, **settings}

    def __call__(
        self,
        clip: Tensor,
        text: TextEmbedding,
        num_inference_steps: int,
        generator: Generators = None,
        on_step: Callable[[int, int], None] | None = None,
        *,
        windows: WindowPlan | None = None,
        resume: DenoisingState | None = None,
        on_state: Callable[[DenoisingState], None] | None = None,
    ) -> Denoised:
        """(B, 3, T, h, w) in [-1, 1] -> (B, 3, T, h * factor, w * factor), fp32.

        Where memory runs out it goes on in smaller windows, with a warning.

        Args:
            generator: one for the batch or one a clip; each clip has a stream of its own, see `clip_generators`.
            windows: None for `plan`.
            on_step, resume, on_state: as `Denoiser` takes them.
        """
        batch, channels, frames, height, width = clip.shape
        check_num_frames(min(frames, self.window_frames), self.model.temporal_factor)
        generators = clip_generators(generator, batch, clip.device)
        noise = draw_noise(
            (batch, channels, frames, height * self.factor, width * self.factor), clip.device, generators
        )
        level = torch.full((batch,), self.augmentation_level, device=clip.device)
        noised = noise_augmented(clip, draw_noise(clip.shape, clip.device, generators), level)
        return self.denoiser(
            self._predictor(noised, level, text),
            noise,
            num_inference_steps,
            windows=windows or self.plan(frames, height, width),
            generators=generators,
            on_step=on_step,
            shrink=lambda plan: plan.smaller(self.model.temporal_factor),
            resume=resume,
            on_state=on_state,
        )

    def _predictor(self, noised: Tensor, level: Tensor, text: TextEmbedding) -> Predictor:
        """The small clip is kept and enlarged a window at a time: enlarged whole it would be a video of its own."""
        prepared = self.model.prepare_text(*text)
        parameterization = self.denoiser.parameterization
        level = parameterization.timestep(torch.ones_like(level), level)

        def network(scaled: Tensor, timestep: Tensor, image: Tensor) -> Tensor:
            prediction: Tensor = self.model(
                scaled, timestep, prepared, image_conditioning=image, augmentation_level=level
            )
            return prediction

        run = Graphed(network) if self.cuda_graphs else network

        def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
            # Whole frames, cut afterwards: a piece enlarged alone would differ along its edges.
            frames = noised[:, :, window.frames]
            image = ops.space_time_upsample(frames, (1, self.factor, self.factor), mode="linear")
            return run(scaled, timestep, image[..., window.rows, window.columns])

        return predict

    def padding(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, rows and columns that a small clip of this size lacks for windows that the model takes.

        What is at least a window long needs none: its windows are shifted, whatever its length.
        """
        config = self.model.unet.config

        def lacking(length: int, window: int, multiple: int) -> int:
            return -length % multiple if length < window else 0

        side = config.spatial_factor // math.gcd(config.spatial_factor, self.factor)
        trained = -(-config.sample_size // self.factor)
        return (
            lacking(frames, self.window_frames, self.model.temporal_factor),
            lacking(height, trained, side),
            lacking(width, trained, side),
        )


def padded(clip: Tensor, padding: tuple[int, int, int]) -> Tensor:
    """More frames, rows and columns at the ends, each the last one repeated."""
    frames, rows, columns = padding
    larger = F.pad(clip, (0, columns, 0, rows, 0, frames), mode="replicate")
    return larger.contiguous(memory_format=torch.channels_last_3d)
