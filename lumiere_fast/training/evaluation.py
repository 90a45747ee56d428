"""Scoring what a model makes of held-out prompts, with the tracker of `lumiere_fast.data`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lumiere_fast.data.clips import ClipBatch, ClipSampler
from lumiere_fast.data.tracker import evaluate
from lumiere_fast.diffusion import EDMParameterization, Parameterization, Schedule, clip_generators, draw_noise
from lumiere_fast.models import UNet2D
from lumiere_fast.pipelines import LumierePipeline
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.text_to_video import denoise_from_text
from lumiere_fast.text import WordVectorEncoder
from lumiere_fast.training.stages import IMAGES

EVALUATION_SEED = 20_000  # apart from the seeds of training runs


def evaluate_pipeline(
    pipeline: LumierePipeline,
    num_clips: int = 200,
    *,
    batch_size: int = 10,
    seed: int = EVALUATION_SEED,
    on_batch: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Tracker figures of `num_clips` clips of held-out prompts, before ("base") and after ("ssr") super-resolution.

    Args:
        settings: passed on to the pipeline: `num_inference_steps`, `guidance_scale` and so on.
        on_batch: called with (clips done, clips in all).
    """
    base, frames, attributes = [], [], []
    generator = torch.Generator().manual_seed(seed)
    for batch in _heldout(seed, num_clips, batch_size, still=False):
        output = pipeline(batch.prompts, generator=generator, **settings)
        base.append(output.base_frames)
        frames.append(output.frames)
        attributes += batch.attributes
        if on_batch is not None:
            on_batch(len(attributes), num_clips)
    return {"base": evaluate(torch.cat(base), attributes), "ssr": evaluate(torch.cat(frames), attributes)}


@torch.inference_mode()
def evaluate_images(
    unet: UNet2D,
    num_images: int = 200,
    *,
    batch_size: int = 50,
    num_inference_steps: int = 24,
    guidance_scale: float = 3.0,
    seed: int = EVALUATION_SEED,
    noising: tuple[Schedule, Parameterization] | None = None,
) -> dict[str, Any]:
    """Tracker figures of a text-to-image model: colour, ground and shape, and "look", all three at once.

    The gate before inflation: a shape that the image model cannot draw no temporal layer will.

    Args:
        noising: how the model was trained, as `read_noising` tells it of a run's folder; None for the default.
    """
    denoiser = Denoiser(*(noising or (IMAGES.schedule, EDMParameterization())))
    text_encoder = WordVectorEncoder()
    generator = torch.Generator().manual_seed(seed)
    size = unet.config.sample_size
    images: list[Tensor] = []
    attributes = []
    for batch in _heldout(seed, num_images, batch_size, still=True):
        generators = clip_generators(generator, len(batch.prompts))
        noise = draw_noise((len(batch.prompts), 3, 1, size, size), "cpu", generators)
        images.append(
            denoise_from_text(
                unet, text_encoder, denoiser, batch.prompts, noise, num_inference_steps, guidance_scale
            ).clamp(-1, 1)
        )
        attributes += batch.attributes
    return evaluate(torch.cat(images), attributes)


def _heldout(seed: int, total: int, batch_size: int, *, still: bool) -> Iterator[ClipBatch]:
    sampler = ClipSampler(seed, "heldout")
    draw = sampler.images if still else sampler.batch
    for step, done in enumerate(range(0, total, batch_size)):
        yield draw(step, min(batch_size, total - done))
