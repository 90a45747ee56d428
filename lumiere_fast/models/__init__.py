"""The text-to-image U-Net, its inflation, and the Space-Time U-Net that results."""

from lumiere_fast.models.blocks import FactorizedAttention
from lumiere_fast.models.config import PRESETS, InflationConfig, Preset, UNetConfig
from lumiere_fast.models.inflation import inflate
from lumiere_fast.models.prepared_text import PreparedText
from lumiere_fast.models.stunet import STUNet
from lumiere_fast.models.unet2d import UNet2D

__all__ = [
    "PRESETS",
    "FactorizedAttention",
    "InflationConfig",
    "PreparedText",
    "Preset",
    "STUNet",
    "UNet2D",
    "UNetConfig",
    "inflate",
]
