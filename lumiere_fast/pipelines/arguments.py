"""What a call of the pipeline is given, checked, and the forms in which clips come and go."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lumiere_fast.text.encoder import as_prompts
from lumiere_fast.video import to_uint8

OUTPUT_TYPES = ("pt", "np", "pil")


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else [prompt]
    if not prompts or any(not isinstance(text, str) or not text.strip() for text in prompts):
        got = "an empty one" if prompts and all(isinstance(text, str) for text in prompts) else repr(prompt)
        raise ValueError(f'prompt must be a sentence, or several; got {got}. Try "a red ball moving left"')
    return as_prompts(prompts)


def as_output(frames: Tensor, output_type: str) -> Any:
    """(B, 3, T, H, W) in [-1, 1] as `LumiereOutput` describes."""
    if output_type == "pt":
        return frames
    if output_type == "np":
        return frames.add(1).div(2).permute(0, 2, 3, 4, 1).contiguous().numpy()
    from PIL import Image

    return [[Image.fromarray(picture) for picture in to_uint8(clip)] for clip in frames]


def integer(name: str, value: object, least: int = 1) -> int:
    """An integer of any library as Python's own; no bool, which is one by descent only, and no float.

    Whether it is at least `least` is for `at_least`, or for who knows more to say.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"{name} must be >= {least}, an integer, got {value!r}") from error


def at_least(least: int, name: str, value: object) -> int:
    number = integer(name, value, least)
    if number < least:
        raise ValueError(f"{name} must be >= {least}, an integer, got {value!r}")
    return number


def guidance(value: Any) -> float:
    try:
        scale = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        scale = math.inf
    if not 0 <= scale < math.inf:
        raise ValueError(f"guidance_scale must be a finite number >= 0, got {value!r}")
    return scale


def as_clips(frames: Any) -> Tensor:
    """Clips in any form of `LumiereOutput`, or of their pixels, as a tensor (B, 3, T, H, W) float32 in [-1, 1].

    Raises:
        ValueError: another shape or dtype, no frames, values that are not finite or out of range.
    """
    if isinstance(frames, Tensor):
        clips = _of_tensor(frames)
    else:
        clips = _of_array(frames if isinstance(frames, np.ndarray) else _stacked(frames))
    if not bool((clips.abs() <= 1 + 1e-6).all()):
        raise ValueError("frames: some values are out of range (a tensor's is [-1, 1], a float array's [0, 1]) or nan")
    return clips.contiguous(memory_format=torch.channels_last_3d)


def _of_tensor(frames: Tensor) -> Tensor:
    if not frames.is_floating_point():
        raise ValueError(
            f"frames: a tensor must be of floats in [-1, 1], got {frames.dtype}; or give an array of uint8"
        )
    return _with_batch(frames.detach().float(), "a tensor (B, 3, T, H, W) or (3, T, H, W)", 1)


def _of_array(frames: npt.NDArray[Any]) -> Tensor:
    if frames.dtype != np.uint8 and frames.dtype.kind != "f":
        raise ValueError(f"frames: an array must be of uint8, or of floats in [0, 1], got {frames.dtype}")
    highest = 255 if frames.dtype == np.uint8 else 1
    clips = _with_batch(torch.tensor(frames), "an array (B, T, H, W, 3) or (T, H, W, 3)", 4)
    return clips.movedim(4, 1).float().mul(2 / highest).sub(1)


def _with_batch(clips: Tensor, wanted: str, channels: int) -> Tensor:
    shape = tuple(clips.shape)
    clips = clips[None] if clips.ndim == 4 else clips
    if clips.ndim != 5 or clips.shape[channels] != 3 or 0 in clips.shape:
        raise ValueError(f"frames must be {wanted}, got shape {shape}")
    return clips


def _stacked(images: Any) -> Any:
    """Images, or a list of them a clip, as one array."""
    try:
        return np.stack([np.asarray(image) if hasattr(image, "size") else _stacked(image) for image in images])
    except (TypeError, ValueError) as error:
        raise ValueError(f"frames must be a tensor, an array or images of one size: {error}") from error
