"""denoise_step against the same step composed of torch operations, all of them into held buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from benchmarks.bench_blend_windows import Accumulate, video_like
from benchmarks.harness import Case, each_scenario
from lumiere_fast.ops.denoise_step import SPEC, StepCoefficients, Threshold

Quantile = Callable[[Tensor, float], Tensor]


class Composed:
    """A loop that accumulates, then diffusers-style guidance, thresholding and DPM-Solver++(2M).

    Args:
        quantile: how that of a dynamic threshold is found; not for a static one.
    """

    def __init__(self, quantile: Quantile | None, windows: Sequence[Tensor], latent: Tensor) -> None:
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
        x0 = self.x0
        self.predict_x0(windows, starts, latent, coefficients, guidance_scale)
        if self.quantile is None:
            x0.clamp_(-1, 1)
        else:
            limit = self.limit(self.quantile, threshold)
            torch.clamp(x0, -limit, limit, out=x0).div_(limit)
        return self.step(latent, coefficients, history), x0

    def predict_x0(
        self,
        windows: Sequence[Tensor],
        starts: Sequence[int],
        latent: Tensor,
        coefficients: StepCoefficients,
        guidance_scale: float,
    ) -> None:
        conditional, unconditional = self.accumulate(windows, starts, latent.shape[2]).chunk(2)
        x0 = torch.sub(conditional, unconditional, out=self.x0).mul_(guidance_scale).add_(unconditional)
        x0.mul_(coefficients.x0_prediction).add_(torch.mul(latent, coefficients.x0_latent, out=self.scratch))

    def step(self, latent: Tensor, coefficients: StepCoefficients, history: Tensor) -> Tensor:
        torch.mul(latent, coefficients.latent, out=self.following)
        self.following.add_(torch.mul(self.x0, coefficients.x0, out=self.scratch))
        return self.following.add_(torch.mul(history, coefficients.history, out=self.scratch))

    def limit(self, quantile: Quantile, threshold: Threshold) -> Tensor:
        return limit_of(torch.abs(self.x0, out=self.magnitude), quantile, threshold)


class FewPasses(Composed):
    """The same in as few passes as torch's operators allow: windows are copied where they are the first over a frame,
    counts are known beforehand, and each term of a sum is one operator."""

    def __init__(self, quantile: Quantile | None, windows: Sequence[Tensor], latent: Tensor) -> None:
        super().__init__(quantile, windows, latent)
        self.total = video_like(windows, latent.shape[2], latent.dtype)

    def predict_x0(
        self,
        windows: Sequence[Tensor],
        starts: Sequence[int],
        latent: Tensor,
        coefficients: StepCoefficients,
        guidance_scale: float,
    ) -> None:
        counts, covered = [0] * latent.shape[2], 0
        for window, start in zip(windows, starts, strict=True):
            end = start + window.shape[2]
            shared = max(covered - start, 0)
            self.total[:, :, start : start + shared] += window[:, :, :shared]
            self.total[:, :, start + shared : end] = window[:, :, shared:]
            covered = end
            counts[start:end] = [count + 1 for count in counts[start:end]]
        for count, frames in groupby(range(len(counts)), key=counts.__getitem__):
            if count > 1:
                first, *rest = frames
                self.total[:, :, first : first + 1 + len(rest)] *= 1 / count
        conditional, unconditional = self.total.chunk(2)
        torch.lerp(unconditional, conditional, guidance_scale, out=self.x0)
        self.x0.mul_(coefficients.x0_prediction).add_(latent, alpha=coefficients.x0_latent)

    def step(self, latent: Tensor, coefficients: StepCoefficients, history: Tensor) -> Tensor:
        torch.mul(latent, coefficients.latent, out=self.following)
        self.following.add_(self.x0, alpha=coefficients.x0)
        return self.following.add_(history, alpha=coefficients.history)


def limit_of(magnitude: Tensor, quantile: Quantile, threshold: Threshold) -> Tensor:
    rows = magnitude.permute(0, 2, 3, 4, 1)  # as stored: flattening is a view
    flat = rows.flatten(2) if threshold.per == "frame" else rows.flatten(1)[:, None]
    return quantile(flat, threshold.percentile).clamp(min=1)[:, None, :, None, None]


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
    """Without the rest sorted, which is most of it; with `kthvalue` it takes torch longer."""
    position = fraction * (flat.shape[-1] - 1)
    below = int(position)
    top = flat.topk(flat.shape[-1] - below, dim=-1).values
    return torch.lerp(top[..., -1], top[..., max(-2, -top.shape[-1])], position - below)


def composed(
    windows: Sequence[Tensor],
    starts: Sequence[int],
    latent: Tensor,
    coefficients: StepCoefficients,
    guidance_scale: float,
    threshold: Threshold,
    history: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same without held buffers, which torch.compile would not need."""
    total, count = (latent.new_zeros((windows[0].shape[0], *latent.shape[1:])) for _ in range(2))
    for window, start in zip(windows, starts, strict=True):
        total[:, :, start : start + window.shape[2]] += window
        count[:, :, start : start + window.shape[2]] += 1
    conditional, unconditional = (total / count).chunk(2)
    prediction = unconditional + guidance_scale * (conditional - unconditional)
    x0 = coefficients.x0_latent * latent + coefficients.x0_prediction * prediction
    if threshold.kind == "static":
        x0 = x0.clamp(-1, 1)
    else:
        limit = limit_of(x0.abs(), by_selection, threshold)
        x0 = torch.clamp(x0, -limit, limit) / limit
    return coefficients.latent * latent + coefficients.x0 * x0 + coefficients.history * history, x0


@each_scenario(SPEC)
def test_denoise_step(case: Case) -> None:
    windows, latent, threshold = (case.inputs[name] for name in ("windows", "latent", "threshold"))
    quantiles: dict[str, Quantile | None] = {"composed": None}
    if threshold.kind == "dynamic":
        quantiles = {"composed, sort": BySorting(), "composed, topk": by_selection}
    best = "few passes" if threshold.kind == "static" else "few passes, topk"
    case.compare(
        {
            **{n: partial(Composed(quantile, windows, latent), **case.inputs) for n, quantile in quantiles.items()},
            best: partial(FewPasses([*quantiles.values()][-1], windows, latent), **case.inputs),
        },
        limits=case.copy(),
        compiled=composed,
    )
