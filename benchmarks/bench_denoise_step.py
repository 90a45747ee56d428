"""denoise_step against the same step composed of torch operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench_blend_windows import accumulate
from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops.denoise_step import SPEC, StepCoefficients, Threshold


def composed(
    quantile: Callable[[Tensor, float], Tensor],
    windows: Sequence[Tensor],
    starts: Sequence[int],
    latent: Tensor,
    coefficients: StepCoefficients,
    guidance_scale: float,
    threshold: Threshold,
    history: Tensor,
) -> tuple[Tensor, Tensor]:
    """A loop that accumulates, then diffusers-style guidance, dynamic thresholding and DPM-Solver++(2M)."""
    conditional, unconditional = accumulate(windows, starts, latent.shape[2]).to(latent.dtype).chunk(2)
    prediction = unconditional + guidance_scale * (conditional - unconditional)
    x0 = coefficients.x0_latent * latent + coefficients.x0_prediction * prediction
    flat = (x0.transpose(1, 2).flatten(2) if threshold.per == "frame" else x0.flatten(1)[:, None]).abs()
    limit = quantile(flat, threshold.percentile).clamp(min=1)[:, None, :, None, None]
    x0 = torch.clamp(x0, -limit, limit) / limit
    following = coefficients.latent * latent + coefficients.x0 * x0 + coefficients.history * history
    return following, x0


def by_sorting(flat: Tensor, fraction: float) -> Tensor:
    """What `torch.quantile` does over the last axis, and refuses to past 2**24 elements."""
    ordered = flat.sort(dim=-1).values
    position = fraction * (flat.shape[-1] - 1)
    below = int(position)
    return torch.lerp(ordered[..., below], ordered[..., min(below + 1, flat.shape[-1] - 1)], position - below)


def by_selection(flat: Tensor, fraction: float) -> Tensor:
    position = fraction * (flat.shape[-1] - 1)
    below = int(position)
    lower = flat.kthvalue(below + 1, dim=-1).values
    return torch.lerp(lower, flat.kthvalue(min(below + 2, flat.shape[-1]), dim=-1).values, position - below)


@each_scenario(SPEC)
def test_denoise_step(case: Case) -> None:
    case.compare(
        {
            "composed, sort": partial(composed, by_sorting, **case.inputs),
            "composed, kthvalue": partial(composed, by_selection, **case.inputs),
        }
    )
