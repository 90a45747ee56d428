"""What there is to learn: four denoising tasks over captioned clips.

| task | model | data |
|---|---|---|
| t2i | `UNet2D` | single frames |
| inflate | `STUNet`, its U-Net frozen | clips |
| ssr | `UNet2D` with a conditioning image | single frames, and their area-averaged, noised small version |
| inflate of an ssr | `STUNet`, its U-Net frozen | windows of clips, likewise |

The loss is `mean((F - target)^2)` of the parameterisation, one noise level a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lumiere_fast import ops
from lumiere_fast.data.clips import mixed_generator
from lumiere_fast.data.source import NOISE_STREAM, ClipSource
from lumiere_fast.diffusion import EDMParameterization, Parameterization, Schedule, augmented_conditioning, to_dict
from lumiere_fast.models import STUNet, UNet2D
from lumiere_fast.models.stunet import check_num_frames
from lumiere_fast.text import TextEncoder, WordVectorEncoder

MAX_AUGMENTATION = 0.4

Precision = Literal["fp32", "bf16"]


@dataclass
class DenoisingTask:
    """One model, the clips it learns from, and its loss at any step: a pure function of (weights, step).

    Args:
        model: a `UNet2D` learns from single frames, a `STUNet` from clips.
        source: gives the clips; noise is drawn under its seed.
        batch_size: images or clips that are run through the model at a time.
        gradient_accumulation_steps: such batches in one step. A step of 2 batches of 4 sees the clips and noise of a
            step of 1 batch of 8, and has its gradient.
        drop_text: share of samples whose prompt is emptied, for classifier-free guidance.
        upscale_factor: how many times smaller the clip is that a super-resolution model is given.
        precision: "bf16" runs the model under autocast; weights, loss and noise stay fp32.
    """

    model: UNet2D | STUNet
    source: ClipSource
    schedule: Schedule
    batch_size: int
    gradient_accumulation_steps: int = 1
    drop_text: float = 0.1
    upscale_factor: int = 2
    precision: Precision = "fp32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    text_encoder: TextEncoder = field(default_factory=WordVectorEncoder)
    parameterization: Parameterization = field(default_factory=EDMParameterization)

    def __post_init__(self) -> None:
        self.spatial = self.model.unet.config if isinstance(self.model, STUNet) else self.model.config
        for name in ("batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")
        if isinstance(self.model, STUNet):
            check_num_frames(self.source.num_frames, self.model.temporal_factor)
        elif self.source.num_frames != 1:
            raise ValueError(f"a UNet2D learns from single frames, the source gives {self.source.num_frames}")
        if self.spatial.text_embed_dim != self.text_encoder.embed_dim:
            raise ValueError(
                f"the model reads text of width {self.spatial.text_embed_dim}, "
                f"{self.text_encoder.name} gives {self.text_encoder.embed_dim}"
            )
        check_precision(self.precision, self.device)

    def settings(self) -> dict[str, Any]:
        """What the loss depends on besides the weights, as plain data."""
        return {
            **self.source.settings(),
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "drop_text": self.drop_text,
            "upscale_factor": self.upscale_factor,
            "precision": self.precision,
            "text_encoder": self.text_encoder.name,
            "schedule": to_dict(self.schedule),
            "parameterization": to_dict(self.parameterization),
        }

    def loss(self, step: int) -> Tensor:
        """The mean loss over all samples of a step, the same at every call for the same weights."""
        return torch.stack(list(self.losses(step))).mean()

    def losses(self, step: int) -> Iterator[Tensor]:
        """The mean loss of each batch of a step; each graph is made when it is asked for."""
        samples = self._samples(step)
        for start in range(0, self.gradient_accumulation_steps * self.batch_size, self.batch_size):
            yield self._batch_loss({name: x[start : start + self.batch_size] for name, x in samples.items()})

    def _samples(self, step: int) -> dict[str, Tensor]:
        """All that is drawn for a step, sample by sample."""
        generator = mixed_generator(self.source.seed, NOISE_STREAM, step)
        count = self.batch_size * self.gradient_accumulation_steps
        clean, prompts = self.source.draw(step, count, self.spatial.sample_size, self.device)
        dropped = torch.rand(count, generator=generator) < self.drop_text
        kept = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        hidden_states, mask = self.text_encoder.encode(kept)
        alpha, sigma = self.schedule.sample_levels(count, generator)
        samples = {"alpha": alpha, "sigma": sigma, "hidden_states": hidden_states, "mask": mask, "clean": clean}
        samples["noise"] = torch.randn(clean.shape, generator=generator)
        if self.spatial.conditioning_channels:
            samples["level"] = MAX_AUGMENTATION * torch.rand(count, generator=generator)
            small = (*clean.shape[:3], *(size // self.upscale_factor for size in clean.shape[3:]))
            samples["small_noise"] = torch.randn(small, generator=generator)
        return {name: x.to(self.device) for name, x in samples.items()}

    def _batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        clean, noise = batch["clean"], batch["noise"]
        alpha, sigma = (batch[name][:, None, None, None, None] for name in ("alpha", "sigma"))
        noisy = self.parameterization.scale_input(alpha * clean + sigma * noise, alpha, sigma)
        conditioning = self._image_conditioning(batch)
        timestep = self.parameterization.timestep(alpha, sigma).flatten()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            prediction = self.model(noisy, timestep, batch["hidden_states"], batch["mask"], **conditioning)
        target = self.parameterization.target(clean, noise, alpha, sigma)
        return (prediction.float() - target).square().mean()

    def _image_conditioning(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.spatial.conditioning_channels:
            return {}
        factor = self.upscale_factor
        small = ops.space_time_downsample(batch["clean"], (1, factor, factor), mode="area")
        return augmented_conditioning(small, batch["small_noise"], batch["level"], factor, self.parameterization)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise a ValueError unless `device` computes in `precision` at a sane pace.

    Without bf16 units a processor emulates: a training step of the demo model took 7 times as long as in fp32 with AVX2
    and 1.7 times as long with AVX-512 alone; with AVX512-BF16 it took half as long.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if precision == "bf16" and not _has_bf16_units(device):
        raise ValueError(
            f"precision='bf16' needs a GPU of compute capability 8.0 or a CPU with AVX512-BF16, which {device} is not: "
            "it would be slower than precision='fp32'; use that"
        )


def _has_bf16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()
