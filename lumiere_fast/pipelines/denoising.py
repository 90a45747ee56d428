"""The sampling loop of both stages: a clip denoised in one window, or in overlapping ones by MultiDiffusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lumiere_fast import ops
from lumiere_fast.diffusion import Parameterization, Schedule, check_sampler, draw_noise, sampling_table
from lumiere_fast.ops.denoise_step import Threshold, _flat_threshold
from lumiere_fast.pipelines.windows import Window, WindowPlan

Predictor = Callable[[Tensor, Tensor, Window], Tensor]
"""`predict(scaled, timestep, window)`: the network's output for the scaled clip of a window, in any floating dtype.
With guidance its batch is doubled, conditional before unconditional."""

CLAMP = Threshold("static")


@dataclass(frozen=True)
class Denoiser:
    """How a stage turns noise into a clip: what the network was trained for and how it is sampled.

    Args:
        schedule, parameterization: those of the network's training.
        sampler: a name in `lumiere_fast.diffusion.SAMPLERS`.
        threshold: how the predicted clean clip is bounded at every step, once, after blending; None for not at all.
        eta: of sampler "ddim": 0 deterministic, 1 ancestral.

    Raises:
        ValueError: one of these is not as above.
    """

    schedule: Schedule
    parameterization: Parameterization
    sampler: str = "dpm-solver++"
    threshold: Threshold | None = CLAMP
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.eta)
        _flat_threshold(self.threshold)  # refuses what the op would, before there is work

    def __call__(
        self,
        predict: Predictor,
        noise: Tensor,
        num_inference_steps: int,
        *,
        windows: WindowPlan,
        guidance_scale: float | None = None,
        generators: Sequence[torch.Generator] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Denoise unit `noise` (B, C, T, H, W), drawn once a frame whatever the windows.

        At each step every window's prediction is made from the same latent, the predictions are averaged where windows
        overlap (paper, section 3.2: the least-squares reconciliation of MultiDiffusion), and one step is taken for the
        whole clip, with noise drawn once a frame from `generators`, one a clip, where the sampler is stochastic.
        `on_step(done, total)` counts the windows of all steps. The latent keeps the dtype of `noise`.
        """
        levels = self.schedule.levels(num_inference_steps)
        coefficients = sampling_table(self.sampler, levels, self.parameterization, eta=self.eta)
        if generators is None and any(row.noise for row in coefficients):
            raise ValueError(f"sampler {self.sampler!r} draws noise at every step: give generators, one a clip")
        latent = noise * levels[0].sigma
        history: Tensor | None = None
        for step, row in enumerate(coefficients):
            alpha, sigma = (torch.full((latent.shape[0],), value, device=latent.device) for value in levels[step])
            scaled = self.parameterization.scale_input(latent, _per_clip(alpha), _per_clip(sigma))
            timestep = self.parameterization.timestep(alpha, sigma)
            predictions = []
            for index, window in enumerate(windows):
                predictions.append(predict(window.of(scaled), timestep, window))
                if on_step is not None:
                    on_step(step * len(windows) + index + 1, len(coefficients) * len(windows))
            fresh = None
            if generators is not None and row.noise:
                fresh = draw_noise(latent.shape, latent.device, generators).to(latent.dtype)
            latent, history = ops.denoise_step(
                predictions,
                windows.starts,
                latent,
                row,
                guidance_scale=guidance_scale,
                threshold=self.threshold,
                weights=windows.weights,
                noise=fresh,
                history=history,
            )
        return latent


def _per_clip(values: Tensor) -> Tensor:
    """(B,) to broadcast against (B, C, T, H, W)."""
    return values[:, None, None, None, None]


def resolve_threshold(threshold: Threshold | str | None) -> Threshold | None:
    """The `Threshold` of a name, "static" or "dynamic", with its defaults; a `Threshold` or None as it is."""
    if threshold is None or isinstance(threshold, Threshold):
        return threshold
    if threshold == "static":
        return CLAMP
    if threshold == "dynamic":
        return Threshold("dynamic")
    raise ValueError(f"threshold must be 'static', 'dynamic', None or a Threshold, got {threshold!r}")
