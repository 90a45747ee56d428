"""What there is to learn: four denoising tasks over the procedural clips.

| task | model | data |
|---|---|---|
| t2i | `UNet2D` | single frames, half of the captions with a motion phrase |
| inflate | `STUNet`, its U-Net frozen | whole clips |
| ssr | `UNet2D` with a conditioning image | single frames at twice the size, and their small, noised version |
| inflate of an ssr | `STUNet`, its U-Net frozen | windows of clips, likewise |

The loss is `mean((F - target)^2)` of the parameterisation, one noise level a sample.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lumiere_fast.data.clips import CLIP_FRAMES, ClipBatch, ClipSampler, mixed_generator, render
from lumiere_fast.diffusion import EDMParameterization, EDMSchedule, augmented_conditioning
from lumiere_fast.models import STUNet, UNet2D
from lumiere_fast.text import TextEncoder, WordVectorEncoder

NOISE_STREAM = 2  # `ClipSampler` draws from streams 0 and 1 of the same seed
MAX_AUGMENTATION = 0.4


@dataclass
class DenoisingTask:
    """One model, the clips it learns from, and its loss at any step: a pure function of (weights, step).

    Args:
        model: a `UNet2D` learns from single frames, a `STUNet` from clips of `num_frames`.
        batch_size: images or clips a step.
        seed: names the stream of clips, captions and noise.
        num_frames: frames of a training sample for a `STUNet`; fewer than a clip's 16 take a random window of it.
        upscale_factor: how many times smaller the clip is that a super-resolution model is given.
        drop_text: share of samples whose prompt is emptied, for classifier-free guidance.
    """

    model: UNet2D | STUNet
    schedule: EDMSchedule
    batch_size: int
    seed: int = 0
    num_frames: int = 16
    drop_text: float = 0.1
    upscale_factor: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    text_encoder: TextEncoder = field(default_factory=WordVectorEncoder)
    parameterization: EDMParameterization = field(default_factory=EDMParameterization)

    def __post_init__(self) -> None:
        self.clips = ClipSampler(self.seed)
        self.spatial = self.model.unet.config if isinstance(self.model, STUNet) else self.model.config
        if not 1 <= self.num_frames <= CLIP_FRAMES:
            raise ValueError(f"num_frames must be from 1 to the {CLIP_FRAMES} of a clip, got {self.num_frames}")
        if self.spatial.text_embed_dim != self.text_encoder.embed_dim:
            raise ValueError(
                f"the model reads text of width {self.spatial.text_embed_dim}, "
                f"{self.text_encoder.name} gives {self.text_encoder.embed_dim}"
            )

    def settings(self) -> dict[str, Any]:
        """What the loss depends on besides the weights, as plain data."""
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "num_frames": self.num_frames,
            "drop_text": self.drop_text,
            "upscale_factor": self.upscale_factor,
            "text_encoder": self.text_encoder.name,
            "schedule": asdict(self.schedule),
            "parameterization": asdict(self.parameterization),
        }

    def loss(self, step: int) -> Tensor:
        """The mean loss of batch `step`, the same at every call for the same weights."""
        generator = mixed_generator(self.seed, NOISE_STREAM, step)
        batch = self._batch(step, generator).to(self.device)
        clean = render(batch.states, self.spatial.sample_size)
        dropped = torch.rand(len(batch.prompts), generator=generator) < self.drop_text
        prompts = ["" if drop else prompt for prompt, drop in zip(batch.prompts, dropped.tolist(), strict=True)]
        hidden_states, mask = self.text_encoder.encode(prompts)
        sigma = self.schedule.sample_sigmas(len(prompts), generator).to(self.device)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        per_sample = sigma[:, None, None, None, None]
        noisy = clean + per_sample * noise
        prediction = self.model(
            self.parameterization.scale_input(noisy, per_sample),
            self.parameterization.timestep(sigma),
            hidden_states.to(self.device),
            mask.to(self.device),
            **self._image_conditioning(batch, generator),
        )
        target = self.parameterization.target(clean, noisy, per_sample)
        return (prediction.float() - target).square().mean()

    def _batch(self, step: int, generator: torch.Generator) -> ClipBatch:
        if not isinstance(self.model, STUNet):
            return self.clips.images(step, self.batch_size)
        batch = self.clips.batch(step, self.batch_size)
        spare = batch.frames.shape[1] - self.num_frames
        start = int(torch.randint(spare + 1, (), generator=generator))
        return replace(batch, frames=batch.frames[:, start : start + self.num_frames])

    def _image_conditioning(self, batch: ClipBatch, generator: torch.Generator) -> dict[str, Tensor]:
        if not self.spatial.conditioning_channels:
            return {}
        small = render(batch.states, self.spatial.sample_size // self.upscale_factor)
        level = MAX_AUGMENTATION * torch.rand(small.shape[0], generator=generator).to(self.device)
        noise = torch.randn(small.shape, generator=generator).to(self.device)
        return augmented_conditioning(small, noise, level, self.upscale_factor, self.parameterization)
