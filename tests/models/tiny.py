"""Tiny models with random parameters everywhere, so that no zero hides a mistake, and inputs for them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumiere_fast.models import STUNet, UNet2D, UNetConfig

Model = TypeVar("Model", bound=nn.Module)
WIDTHS = (16, 24, 32, 40)


def tiny_config(levels: int = 2, *, ssr: bool = False, **changes: Any) -> UNetConfig:
    """`levels` of one layer each, the two coarsest with attention; an `ssr` has a conditioning image and its level."""
    settings: dict[str, Any] = {
        "sample_size": 8 * 2 ** (levels - 1),
        "block_out_channels": WIDTHS[:levels],
        "layers_per_block": (1,) * levels,
        "attention_levels": tuple(range(max(levels - 2, 0), levels)),
        "attention_head_dim": 8,
        "text_embed_dim": 12,
        "text_width": 16,
        "text_layers": 1,
        "time_embed_dim": 20,
        "norm_num_groups": 4,
    }
    if ssr:
        settings |= {"conditioning_channels": 3, "noise_augmentation": True}
    return UNetConfig(**settings | changes)


@torch.no_grad()
def randomise(module: Model, seed: int = 0) -> Model:
    """Every parameter moved by normal noise, matrices scaled by their fan-in: activations stay near unit size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.add_(scale * noise)
    return module


def tiny_unet(levels: int = 2, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> UNet2D:
    """A `UNet2D` of `tiny_config`, all its parameters random, in eval mode."""
    torch.manual_seed(seed)
    return randomise(UNet2D(tiny_config(levels, **changes)).to(dtype), seed).eval()


def draw_inputs(model: UNet2D | STUNet, *shape: int, seed: int = 1, tokens: int = 5) -> dict[str, Tensor]:
    """Arguments for a sample of shape (B, T, H, W), or (B, H, W) for images, in the dtype of the model."""
    unet = model.unet if isinstance(model, STUNet) else model
    config, dtype = unet.config, next(unet.parameters()).dtype
    batch, space = shape[0], shape[1:]
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {
        "sample": normal(batch, config.in_channels, *space),
        "timestep": 300 * normal(batch),
        "encoder_hidden_states": normal(batch, tokens, config.text_embed_dim),
        "encoder_attention_mask": torch.arange(tokens) < torch.tensor([[tokens - i % 3] for i in range(batch)]),
    }
    if config.conditioning_channels:
        inputs["image_conditioning"] = normal(batch, config.conditioning_channels, *space)
    if config.noise_augmentation:
        inputs["augmentation_level"] = 300 * normal(batch)
    return inputs


def of_rows(layer: nn.Linear, rows: Tensor) -> Tensor:
    """The layer on (..., C), whatever it is made to work on."""
    return F.linear(rows, layer.weight, layer.bias)


def frame_by_frame(unet: UNet2D, inputs: dict[str, Tensor], step: int = 1) -> Tensor:
    """`unet` on every `step`-th frame of a clip's inputs, one image at a time, stacked over time again."""
    moving = ("sample", "image_conditioning")
    frames = []
    for t in range(0, inputs["sample"].shape[2], step):
        frames.append(unet(**{name: x[:, :, t] if name in moving else x for name, x in inputs.items()}))
    return torch.stack(frames, dim=2)
