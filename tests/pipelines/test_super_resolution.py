"""Super-resolution by windows, over time and space; `LumierePipeline.upscale`; what it may take of memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lumiere_fast import LumierePipeline, STUNet, inflate
from lumiere_fast.diffusion import SAMPLERS, EDMSchedule, augmented_conditioning, clip_generators, draw_noise
from lumiere_fast.pipelines import budget
from lumiere_fast.pipelines.budget import Job, video_bytes, weight_bytes, window_bytes
from lumiere_fast.pipelines.denoising import Denoiser
from lumiere_fast.pipelines.super_resolution import SuperResolution
from lumiere_fast.text import TextEmbedding
from tests.models.tiny import draw_inputs, randomise, tiny_unet
from tests.pipelines.test_multidiffusion import EDM, SCHEDULE, draw, seeded
from tests.pipelines.tiny import make_pipeline

BALL = "a red ball moving left"

