"""Inflating a text-to-image U-Net into a Space-Time U-Net (paper, section 3.1 and appendix B)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lumiere_fast.models.config import InflationConfig
from lumiere_fast.models.stunet import STUNet
from lumiere_fast.models.unet2d import UNet2D


def inflate(
    unet2d: UNet2D,
    config: InflationConfig | None = None,
    *,
    temporal_factors: Sequence[int] | None = None,
    **overrides: int | bool | str,
) -> STUNet:
    """Add temporal layers to `unet2d` and freeze it: only the new parameters take gradients.

    At initialisation, for N the product of the temporal factors and any clip v,
    `stunet(v)[:, :, ::N] == unet2d(each frame of v[:, :, ::N])`; with all factors 1 the video model is the image model
    frame by frame.

    Args:
        unet2d: the trained text-to-image (or image super-resolution) model. It becomes part of the result, not a copy.
        config: what to add; or give `temporal_factors`, one for each spatial resize (finest first, default 2 each), and
            other fields of `InflationConfig` by name.

    Returns:
        The video model, its temporal layers in the dtype and on the device of `unet2d`.

    Raises:
        ValueError: the factors do not fit the model, or a field is out of its range; `unet2d` is then as it was.
    """
    if config is None:
        resizes = len(unet2d.config.block_out_channels) - 1
        config = InflationConfig(tuple(temporal_factors) if temporal_factors is not None else (2,) * resizes)
    elif temporal_factors is not None:
        config = dataclasses.replace(config, temporal_factors=tuple(temporal_factors))
    config = dataclasses.replace(config, **overrides)  # type: ignore[arg-type]
    stunet = STUNet(unet2d, config)
    stunet.temporal.to(next(unet2d.parameters()))  # its device and dtype
    unet2d.requires_grad_(False)
    return stunet.train(unet2d.training)
