"""denoise_step against the same step composed of torch operations, all of them into held buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench_blend_windows import Accumulate
from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops.denoise_step import SPEC, StepCoefficients, Threshold

Quantile = Callable[[Tensor, float], Tensor]


class Composed:
    """A loop that accumulates, then diffusers-style guidance, dynamic thresholding and DPM-Solver++(2M)."""

    def __init__(self, quantile: Quantile, windows: Sequence[Tensor], latent: Tensor) -> None:
        self.quantile = quantile
        self.accumulate = Accumulate(windows, latent.shape[2])
        self.x0, self.magnitude, self.following, self.scratch = (torch.empty_like(latent) for _ in range(4))

    def __call__(
        self,
        windows: Sequence[Tensor],
        starts: Sequence[int],
        latent: Tensor,
        coefficients: StepCoefficients,
        guidance_scale: float,
        threshold: Threshold,
        history: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x0, following, scratch = self.x0, self.following, self.scratch
        conditional, unconditional = self.accumulate(windows, starts, latent.shape[2]).chunk(2)
        torch.sub(conditional, unconditional, out=x0).mul_(guidance_scale).add_(unconditional)
        x0.mul_(coefficients.x0_prediction).add_(torch.mul(latent, coefficients.x0_latent, out=scratch))
        limit = self.limit(threshold)
        torch.clamp(x0, -limit, limit, out=x0).div_(limit)
        torch.mul(latent, coefficients.latent, out=following)
        following.add_(torch.mul(x0, coefficients.x0, out=scratch))
        following.add_(torch.mul(history, coefficients.history, out=scratch))
        return following, x0

    def limit(self, threshold: Threshold) -> Tensor:
        rows = torch.abs(self.x0, out=self.magnitude).permute(0, 2, 3, 4, 1)  # as stored: flattening is a view
        flat = rows.flatten(2) if threshold.per == "frame" else rows.flatten(1)[:, None]
        return self.quantile(flat, threshold.percentile).clamp(min=1)[:, None, :, None, None]


class BySorting:
    """What `torch.quantile` does over the last axis, and refuses to past 2**24 elements."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def __call__(self, flat: Tensor, fraction: float) -> Tensor:
        if self.held is None:
            self.held = torch.empty_like(flat), torch.empty_like(flat, dtype=torch.int64)
        ordered, _ = torch.sort(flat, dim=-1, out=self.held)
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
    windows, latent = case.inputs["windows"], case.inputs["latent"]
    quantiles: dict[str, Quantile] = {"composed, sort": BySorting(), "composed, kthvalue": by_selection}
    case.compare(
        {name: partial(Composed(quantile, windows, latent), **case.inputs) for name, quantile in quantiles.items()},
        limits=case.copy(),
    )
