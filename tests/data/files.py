"""Tiny video files with closed forms, written by PyAV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
CODECS = {".webm": ("libvpx-vp9", "yuv420p"), ".avi": ("ffv1", "yuv444p")}


def ramp(index: int, height: int = 24, width: int = 32) -> Pixels:
    """A gray frame whose brightness tells its index, up to 59."""
    return np.full((height, width, 3), 10 + 4 * index, np.uint8)


def ramp_index(value: float) -> float:
    """The frame index that a brightness in [-1, 1] tells."""
    return ((value + 1) * 127.5 - 10) / 4


def write_clip(
    path: Path,
    frames: Sequence[Pixels] | int,
    fps: float = 10,
    *,
    times: Sequence[float] | None = None,
    adjust: Callable[[Any], None] | None = None,
    **options: str,
) -> Path:
    """Write `frames` (a number: that many of the ramp) at `fps`, or each at its `times` in seconds.

    `adjust` is given the stream before anything is written; `options` are the encoder's.
    """
    import av

    frames = [ramp(index) for index in range(frames)] if isinstance(frames, int) else frames
    if path.suffix == ".gif":
        return _write_gif(path, frames, fps)
    codec, pixel_format = CODECS.get(path.suffix, ("libx264", "yuv444p"))
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        rate = 1000 if times else Fraction(fps).limit_denominator(1001)
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if adjust is not None:
            adjust(stream)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pixel_format)
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[index]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _write_gif(path: Path, frames: Sequence[Pixels], fps: float) -> Path:
    """By Pillow, which chooses the palette; PyAV's encoder has 8 grays."""
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return path


def write_folder(folder: Path, clips: int = 3, frames: int = 12, fps: float = 8) -> Path:
    """A folder of captioned moving squares, each of its own colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip in range(clips):
        pictures = []
        for index in range(frames):
            picture = np.full((40, 48, 3), 30, np.uint8)
            picture[10:26, 2 * index : 2 * index + 16, clip % 3] = 220
            pictures.append(picture)
        write_clip(folder / f"clip{clip}.mp4", pictures, fps)
        (folder / f"clip{clip}.txt").write_text(f"a square, number {clip}, moving right", encoding="utf-8")
    return folder
