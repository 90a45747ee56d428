"""Clips in and out of files: ``.mp4`` (PyAV), ``.gif`` and ``.png`` contact sheets (Pillow).

Frames are either what a pipeline returns for one clip, a float tensor ``(3, T, H, W)`` in [-1, 1], or pixels, a uint8
array ``(T, H, W, 3)``. PyAV and Pillow are imported when a file is written or read, not before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Pixels: TypeAlias = npt.NDArray[np.uint8]
Frames: TypeAlias = "Pixels | torch.Tensor"

_GUTTER = 2  # pixels between the cells of a contact sheet, so that frames with equal grounds can be told apart
_BT709 = 1  # the code of BT.709 for matrix, primaries and transfer in H.264's colour description


def to_uint8(frames: torch.Tensor) -> Pixels:
    """Pixels of one clip: ``round((clamp(x, -1, 1) + 1) * 127.5)``.

    Args:
        frames: float tensor ``(3, T, H, W)``, nominally in [-1, 1]; any memory format and device.

    Returns:
        uint8 array ``(T, H, W, 3)``, contiguous.

    Raises:
        ValueError: another shape or dtype, an empty clip, or values that are not finite.
    """
    if frames.dim() != 4 or frames.shape[0] != 3 or not frames.is_floating_point():
        raise ValueError(
            f"frames: expected a float tensor (3, T, H, W) in [-1, 1], got {tuple(frames.shape)} of {frames.dtype}; "
            "take one clip of a batch with frames[i]"
        )
    frames = frames.detach().float()
    if not bool(torch.isfinite(frames).all()):
        raise ValueError("frames: some values are not finite (nan or inf); the clip cannot be shown")
    pixels = frames.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return _checked(pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy())


def contact_sheet(frames: Frames, columns: int | None = None) -> Pixels:
    """All frames of a clip in one picture, in reading order, with white gutters of 2 pixels.

    Args:
        frames: see the module's docstring.
        columns: frames in a row; by default the fewest that make the sheet no higher than wide, counted in frames.

    Returns:
        uint8 array ``(rows * H + (rows - 1) * 2, columns * W + (columns - 1) * 2, 3)``; cells left over are white.

    Raises:
        ValueError: ``columns`` below 1, or frames of another shape or dtype.
    """
    pixels = _as_pixels(frames)
    count, height, width, _ = pixels.shape
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    rows = math.ceil(count / columns)
    step_y, step_x = height + _GUTTER, width + _GUTTER
    sheet = np.full((rows * step_y - _GUTTER, columns * step_x - _GUTTER, 3), 255, dtype=np.uint8)
    for index, frame in enumerate(pixels):
        top, left = index // columns * step_y, index % columns * step_x
        sheet[top : top + height, left : left + width] = frame
    return sheet


def check_output(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Whether ``write_video`` can write ``path``: ask before spending minutes on the frames.

    Returns:
        ``path`` as a ``Path``.

    Raises:
        ValueError: a suffix that no writer knows.
        ModuleNotFoundError: the library that writes this suffix is not installed.
        FileNotFoundError: the folder does not exist.
        FileExistsError: the file exists and ``overwrite`` is false, or it is a folder.
        PermissionError: the folder cannot be written to.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise ValueError(f"output {str(path)!r}: the suffix says the format and must be one of {', '.join(_WRITERS)}")
    module, package = ("av", "av") if suffix == ".mp4" else ("PIL", "pillow")
    if find_spec(module) is None:
        raise ModuleNotFoundError(
            f"writing {suffix} needs {package}, which is not installed: pip install {package}", name=module
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"output {str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first"
        )
    if path.is_dir():
        raise FileExistsError(f"output {str(path)!r} is a folder; name a file")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"output {str(path)!r} exists; pass overwrite (--overwrite) to replace it, or name another file"
        )
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"output {str(path)!r}: the folder {str(path.parent)!r} is not writable")
    return path


def write_video(
    frames: Frames, path: str | os.PathLike[str], fps: float, overwrite: bool = False, *, min_size: int = 256
) -> None:
    """Write one clip; the suffix of ``path`` says how.

    ``.mp4`` is H.264, yuv420p, BT.709, what every player takes; odd sizes are padded by their last row or column.
    ``.gif`` loops for ever. Its clock counts hundredths of a second: frame times are rounded such that the clip keeps
    its length, and none is below 0.02 s, the shortest that players honour. ``.png`` is the contact sheet.

    The file appears whole or not at all: frames go to a temporary file in the same folder, which then takes the name.

    Args:
        frames: see the module's docstring.
        fps: frames a second, above 0. A contact sheet has no time and does not use it.
        overwrite: replace a file that exists.
        min_size: an ``.mp4`` or ``.gif`` with a short side below this many pixels is enlarged by the smallest
            sufficient whole factor, each pixel repeated: players blur tiny clips or cannot show them. 1 keeps the size.

    Raises:
        ValueError: frames of another shape or dtype, ``fps`` or ``min_size`` out of range.
        As ``check_output`` for ``path``.
    """
    path = check_output(path, overwrite)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps: expected a finite number above 0, got {fps}")
    if min_size < 1:
        raise ValueError(f"min_size: expected at least 1, got {min_size}")
    pixels = _as_pixels(frames)
    suffix = path.suffix.lower()
    if suffix != ".png":
        pixels = _enlarged(pixels, min_size)
    with _replacing(path) as partial:
        _WRITERS[suffix](pixels, partial, fps)


def read_video(path: str | os.PathLike[str]) -> tuple[Pixels, float]:
    """Decode a video file with PyAV: uint8 ``(T, H, W, 3)`` and the frames a second that its header states.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no video frames.
    """
    import av

    with av.open(os.fspath(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rate = container.streams.video[0].average_rate
    if not frames or rate is None:
        raise ValueError(f"video {os.fspath(path)!r} holds no frames")
    return np.stack(frames), float(rate)


def _as_pixels(frames: Frames) -> Pixels:
    return to_uint8(frames) if isinstance(frames, torch.Tensor) else _checked(frames)


def _checked(pixels: Pixels) -> Pixels:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"frames: expected a uint8 array (T, H, W, 3) with no empty axis, got {pixels.shape} of {pixels.dtype}"
        )
    return pixels


def _enlarged(pixels: Pixels, min_size: int) -> Pixels:
    factor = math.ceil(min_size / min(pixels.shape[1:3]))
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else pixels


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` on success and vanishes on failure, Ctrl-C included."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_mp4(pixels: Pixels, path: Path, fps: float) -> None:
    import av

    height, width = pixels.shape[1:3]
    even = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        codec = stream.codec_context
        # Untagged files are read as BT.601 or BT.709 by size, and colours shift: convert by BT.709 and say so.
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        for frame in np.pad(pixels, even, mode="edge"):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())


def _write_gif(pixels: Pixels, path: Path, fps: float) -> None:
    from PIL import Image

    images = [Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in pixels]
    ends = [round(100 * index / fps) for index in range(len(images) + 1)]
    milliseconds = [10 * max(2, end - start) for start, end in pairwise(ends)]
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)


def _write_sheet(pixels: Pixels, path: Path, fps: float) -> None:
    from PIL import Image

    Image.fromarray(contact_sheet(pixels)).save(path, "PNG")


_WRITERS: dict[str, Callable[[Pixels, Path, float], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".png": _write_sheet,
}
