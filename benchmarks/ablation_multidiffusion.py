"""The paper's ablation on the demo model: what is seen where windows join, with MultiDiffusion and without.

    python -m benchmarks.ablation_multidiffusion --out docs

writes multidiffusion.png and multidiffusion.json; docs/multidiffusion.md says how to read them. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import provenance
from lumiere_fast import LumierePipeline
from lumiere_fast.data.clips import (
    COLOURS,
    GROUNDS,
    MOTIONS,
    SHAPES,
    Attributes,
    ClipSampler,
    canonical_caption,
    render,
)
from lumiere_fast.pipelines.windows import WindowPlan, plan_windows

OVERLAP = 2  # frames, the paper's
CLIPS_AT_A_TIME = 4
SEED = 30_000  # apart from the seeds of training and evaluation

# The methods, by what they are called in the record.
WINDOWS = "multidiffusion"  # one latent for the whole clip, windows that share frames, blended at every step
OWN_NOISE = "segments"  # abutting segments, each denoised as a clip of its own, with noise of its own
CLIP_NOISE = "segments_of_one_noise"  # the same segments, of one noise drawn for the whole clip
METHODS = (WINDOWS, OWN_NOISE, CLIP_NOISE)


# ---------------------------------------------------------------- the measure


def differences(clips: Tensor, truth: Tensor | None = None) -> Tensor:
    """(B, 3, T, H, W) -> (B, T - 1): mean over pixels of |x[t + 1] - x[t]|, less the truth's own step inside the bars.

    With the truth this is the error of the frame difference: motion that is right adds nothing to it.
    """
    steps = clips.diff(dim=2) if truth is None else clips.diff(dim=2) - truth.diff(dim=2)
    return steps.abs().mean(dim=(1, 3, 4))


def joins(plan: WindowPlan) -> Tensor:
    """(T - 1,) of bool: where frame t + 1 is not in the same windows as frame t."""
    covered = torch.tensor([[w.frames.start <= t < w.frames.stop for w in plan] for t in range(plan.num_frames)])
    return (covered[1:] != covered[:-1]).any(dim=1)


def ratios(found: Tensor, at: Tensor) -> list[float]:
    """Of each clip the mean difference at the joins over the mean elsewhere; 1 where joins do not show."""
    return (found[:, at].mean(dim=1) / found[:, ~at].mean(dim=1)).tolist()


# ---------------------------------------------------------------- the clips


@dataclass(frozen=True)
class Batch:
    """What a method is given, and what would be right. `small` and `truth` only where a clip is enlarged."""

    prompts: list[str]
    num_frames: int
    small: Tensor | None = None
    truth: Tensor | None = None

    def part(self, start: int, num_frames: int) -> Batch:
        """A segment; its truth stays with the whole."""
        small = None if self.small is None else self.small[:, :, start : start + num_frames]
        return Batch(self.prompts, num_frames, small)


Stage = Callable[[LumierePipeline, Batch, int, torch.Generator], Tensor]


def enlarge(pipe: LumierePipeline, batch: Batch, overlap: int, generator: torch.Generator) -> Tensor:
    assert batch.small is not None
    return pipe.upscale(batch.small, batch.prompts, overlap=overlap, generator=generator).frames


def generate(pipe: LumierePipeline, batch: Batch, overlap: int, generator: torch.Generator) -> Tensor:
    """The base model's clip; super-resolution, which nobody looks at, takes one step."""
    settings: dict[str, Any] = {"num_frames": batch.num_frames, "base_overlap": overlap, "ssr_num_inference_steps": 1}
    return pipe(batch.prompts, **settings, generator=generator).base_frames


def moving(number: int, num_frames: int, sizes: tuple[int, int]) -> Batch:
    """Procedural clips that training never saw, at the sizes of both stages."""
    drawn = ClipSampler(SEED, "heldout", num_frames).batch(number, CLIPS_AT_A_TIME)
    small, truth = (render(drawn.states, size) for size in sizes)
    return Batch(drawn.prompts, num_frames, small, truth)


def still(number: int, num_frames: int, sizes: tuple[int, int]) -> Batch:
    """The first frames of such clips, standing: every difference is flicker."""
    batch = moving(number, num_frames, sizes)
    assert batch.small is not None and batch.truth is not None
    small, truth = (clip[:, :, :1].expand(clip.shape) for clip in (batch.small, batch.truth))
    return replace(batch, small=small, truth=truth)


def circling(number: int, num_frames: int, sizes: tuple[int, int]) -> Batch:
    """Sentences of the one motion that can go on for ever at one speed."""
    every = [(s, c, g) for g in range(len(GROUNDS)) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
    chosen = [every[(number * CLIPS_AT_A_TIME + i) * 37 % len(every)] for i in range(CLIPS_AT_A_TIME)]
    prompts = [canonical_caption(Attributes(*triple, MOTIONS.index("circle"))) for triple in chosen]
    return Batch(prompts, num_frames)


@dataclass(frozen=True)
class Setting:
    """A stage with the clips it is given. Both windows and segments tile `num_frames` exactly."""

    title: str
    stage: Stage
    draw: Callable[[int, int, tuple[int, int]], Batch]
    num_frames: int


SETTINGS = {
    "ssr_moving": Setting("super-resolution, moving clips", enlarge, moving, 80),
    "ssr_still": Setting("super-resolution, still clips", enlarge, still, 80),
    "base": Setting("base model beyond its 16 frames", generate, circling, 128),
}


# ---------------------------------------------------------------- the ablation


def make(pipe: LumierePipeline, setting: Setting, method: str, batch: Batch, window: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if method != OWN_NOISE:
        return setting.stage(pipe, batch, overlap_of(method), generator)
    starts = range(0, batch.num_frames, window)
    return torch.cat([setting.stage(pipe, batch.part(start, window), 0, generator) for start in starts], dim=2)


def overlap_of(method: str) -> int:
    return OVERLAP if method == WINDOWS else 0


def ablate(pipe: LumierePipeline, setting: Setting, batches: int) -> dict[str, Any]:
    """The differences of every clip by method, and what they come to."""
    window = pipe.config.num_frames if setting.stage is generate else pipe.config.window_frames
    sizes = tuple(model.unet.config.sample_size for model in (pipe.base, pipe.ssr))
    found: dict[str, list[Tensor]] = {method: [] for method in METHODS}
    for number in range(batches):
        batch = setting.draw(number, setting.num_frames, sizes)
        for method in METHODS:
            clips = make(pipe, setting, method, batch, window, SEED + number)
            found[method].append(differences(clips, batch.truth))
    plans = {method: plan_windows(setting.num_frames, window, overlap_of(method)) for method in METHODS}
    return {
        "title": setting.title,
        "num_frames": setting.num_frames,
        "window_frames": window,
        "clips": batches * CLIPS_AT_A_TIME,
        "methods": {method: told(torch.cat(found[method]), plans[method]) for method in METHODS},
    }


def told(found: Tensor, plan: WindowPlan) -> dict[str, Any]:
    at = joins(plan)
    each = ratios(found, at)
    return {
        "ratio": statistics.mean(each),
        "deviation": statistics.stdev(each),
        "ratios": each,
        "at_joins": found[:, at].mean().item(),
        "elsewhere": found[:, ~at].mean().item(),
        "joins": at.nonzero().flatten().tolist(),
        "by_frame": found.mean(dim=0).tolist(),
    }


# ---------------------------------------------------------------- the picture

INK, GRID = "#1f2933", "#e4e7eb"
# Okabe and Ito's vermilion and blue, which the colour-blind tell apart; widths differ too.
LINES = {OWN_NOISE: ("#d55e00", 1.1, "segments on their own"), WINDOWS: ("#0072b2", 1.9, "MultiDiffusion")}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """A panel a setting: the mean difference of all clips by frame, over the mean away from the joins."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, result in zip(figure.subplots(len(results)), results.values(), strict=True):
        for method, (colour, width, label) in LINES.items():
            numbers = result["methods"][method]
            relative = [value / numbers["elsewhere"] for value in numbers["by_frame"]]
            told = f"{label}: {numbers['ratio']:.3f} ± {numbers['deviation']:.3f} at joins"
            axes.plot(relative, color=colour, linewidth=width, label=told)
            marks = [relative[at] for at in numbers["joins"]]
            axes.plot(numbers["joins"], marks, "o" if method == WINDOWS else "v", color=colour, markersize=5)
        axes.set_title(f"{result['title']}, {result['clips']} clips", loc="left", color=INK, fontsize=10)
        axes.set(ylabel="difference,\nrelative to elsewhere", xlim=(-1, result["num_frames"] - 1))
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5, loc="upper right", ncols=2)
        axes.margins(y=0.25)
    axes.set_xlabel("from frame t to t + 1; marked where windows join; mean of the clips, ± deviation over clips")
    figure.savefig(path, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation_multidiffusion", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the picture and the numbers go")
    parser.add_argument("--batches", type=int, default=1, help=f"of {CLIPS_AT_A_TIME} clips, for each panel (1)")
    given = parser.parse_args()
    pipe = LumierePipeline.from_pretrained("demo")
    results = {name: ablate(pipe, setting, given.batches) for name, setting in SETTINGS.items()}
    head = {"overlap": OVERLAP, "seed": SEED, **provenance.environment("cpu"), "date": provenance.now()}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "multidiffusion.json").write_text(json.dumps({**head, "settings": results}, indent=1) + "\n")
    draw(results, given.out / "multidiffusion.png")
    for result in results.values():
        for method, numbers in result["methods"].items():
            print(f"{result['title']}: {method} {numbers['ratio']:.3f} ± {numbers['deviation']:.3f}")


if __name__ == "__main__":
    main()
