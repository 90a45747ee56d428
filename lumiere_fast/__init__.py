"""Lumiere's text-to-video Space-Time U-Net as a custom-kernel performance engine.

    from lumiere_fast import LumierePipeline
    pipe = LumierePipeline.from_pretrained("demo")
    clip = pipe("a red ball moving left on a black background").frames  # (1, 3, 16, 64, 64) in [-1, 1]

Single ops are in `lumiere_fast.ops`, models in `lumiere_fast.models`.
"""

from __future__ import annotations

from importlib.metadata import version

from lumiere_fast import ops
from lumiere_fast.dispatch import BackendUnavailable, supports, use_backend, why_not
from lumiere_fast.models import InflationConfig, STUNet, UNet2D, UNetConfig, inflate
from lumiere_fast.pipelines import LumiereOutput, LumierePipeline

__version__ = version("lumiere_fast")

__all__ = [
    "BackendUnavailable",
    "InflationConfig",
    "LumiereOutput",
    "LumierePipeline",
    "STUNet",
    "UNet2D",
    "UNetConfig",
    "__version__",
    "inflate",
    "ops",
    "supports",
    "use_backend",
    "why_not",
]
