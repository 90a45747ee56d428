"""The sampling loop of both stages: a clip denoised in one window, or in overlapping ones by MultiDiffusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lumiere_fast import ops
from lumiere_fast.diffusion import SAMPLERS, EDMParameterization, EDMSchedule
from lumiere_fast.ops.denoise_step import Threshold

Predictor = Callable[[Tensor, Tensor, slice], Tensor]
"""`predict(scaled_window, timestep, frames)`: the network's output for the frames of one window. With guidance its
batch is doubled, conditional before unconditional."""

CLAMP = Threshold("static")


@dataclass(frozen=True)
class Denoiser:
    """How a stage turns noise into a clip: what the network was trained for and how it is sampled."""

    schedule: EDMSchedule
    parameterization: EDMParameterization
    sampler: str = "dpm-solver++"
    threshold: Threshold | None = CLAMP

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")

    def __call__(
        self,
        predict: Predictor,
        noise: Tensor,
        num_inference_steps: int,
        *,
        windows: list[slice],
        guidance_scale: float | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Denoise unit `noise` (B, C, T, H, W), drawn once a frame whatever the windows.

        At each step every window's prediction is made from the same latent, the predictions are averaged where windows
        overlap (paper, section 3.2: the least-squares reconciliation of MultiDiffusion), and one step is taken for the
        whole clip. `on_step(done, total)` counts the windows of all steps.
        """
        levels = self.schedule.levels(num_inference_steps)
        coefficients = SAMPLERS[self.sampler](levels, self.parameterization)
        starts = torch.tensor([frames.start for frames in windows])
        latent = noise * levels[0].sigma
        history: Tensor | None = None
        for step, row in enumerate(coefficients):
            sigma = torch.full((latent.shape[0],), levels[step].sigma, device=latent.device)
            scaled = self.parameterization.scale_input(latent, sigma[:, None, None, None, None])
            timestep = self.parameterization.timestep(sigma)
            predictions = []
            for index, frames in enumerate(windows):
                predictions.append(predict(scaled[:, :, frames], timestep, frames))
                if on_step is not None:
                    on_step(step * len(windows) + index + 1, len(coefficients) * len(windows))
            latent, history = ops.denoise_step(
                predictions,
                starts,
                latent,
                row,
                guidance_scale=guidance_scale,
                threshold=self.threshold,
                history=history,
            )
        return latent


def plan_windows(num_frames: int, window_frames: int, overlap: int = 2) -> list[slice]:
    """Windows of `window_frames` that cover `num_frames`, neighbours sharing `overlap` frames (paper: 2).

    The last window is shifted back where the tiling is not exact; a clip no longer than a window is one window.
    """
    if not 0 <= overlap < window_frames:
        raise ValueError(f"overlap must be from 0 to window_frames - 1 = {window_frames - 1}, got {overlap}")
    if num_frames <= window_frames:
        return [slice(0, num_frames)]
    return [slice(start, start + window_frames) for start in ops.window_starts(num_frames, window_frames, overlap)]
