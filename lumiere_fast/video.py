"""Clips in and out of files. The suffix of an output says what is written:

| output | |
|---|---|
| ``clip.mp4`` | H.264 video (PyAV) |
| ``clip.gif`` | animation (Pillow) |
| ``clip.png`` | contact sheet: all frames in one picture (Pillow) |
| ``clip.npy`` | NumPy array (T, H, W, 3) uint8 |
| ``clip`` or ``clip/``, no suffix | a folder of pictures, ``frame_0000.png`` on (Pillow) |

Frames are either what a pipeline returns for one clip, a float tensor ``(3, T, H, W)`` in [-1, 1], or pixels, a uint8
array ``(T, H, W, 3)``. PyAV and Pillow are imported when a file is written or read, not before.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Pixels: TypeAlias = npt.NDArray[np.uint8]
Frames: TypeAlias = "Pixels | torch.Tensor"

MIN_FPS, MAX_FPS = 0.01, 1000  # what the clocks of the formats can hold, with room to spare
FOLDER = ""  # the suffix that stands for a folder of pictures

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
        ValueError: an empty name, one that is too long, or a suffix that no writer knows.
        ModuleNotFoundError: the library that writes this suffix is not installed.
        FileNotFoundError: the folder that it would lie in does not exist.
        FileExistsError: it exists and ``overwrite`` is false; or it is a folder and should be a file, or the reverse;
            or it is a folder with anything but pictures of an earlier clip, which is never replaced.
        PermissionError: the folder that it would lie in cannot be written to.
    """
    if not os.fspath(path):
        raise ValueError("output is empty; name a file, such as clip.mp4")
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _WRITERS or (suffix == FOLDER and path.name[:1] in ("", ".")):  # "-o .mp4" names no folder
        named = ", ".join(filter(None, _WRITERS))
        raise ValueError(
            f"output {str(path)!r}: the suffix says the format and must be one of {named}; a name without suffix makes "
            "a folder of PNG frames"
        )
    module, package = _NEEDS.get(suffix, ("PIL", "pillow"))
    if find_spec(module) is None:
        raise ModuleNotFoundError(
            f"writing {suffix or 'PNG frames'} needs {package}, which is not installed: pip install {package}",
            name=module,
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"output {str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first"
        )
    _check_free(path, suffix == FOLDER, overwrite)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"output {str(path)!r}: the folder {str(path.parent)!r} is not writable")
    return path


def _check_free(path: Path, folder: bool, overwrite: bool) -> None:
    """Whether a file, or a ``folder`` of pictures, may take this name."""
    if not _exists(path):
        return
    if path.is_dir() != folder:
        kind = "file; a name without suffix makes a folder of PNG frames" if folder else "folder; name a file"
        raise FileExistsError(f"output {str(path)!r} is a {kind}")
    entries = [entry.name for entry in path.iterdir()] if folder else [path.name]
    if folder and not all(re.fullmatch(r"frame_\d{4,}\.png", entry) for entry in entries):
        raise FileExistsError(f"output {str(path)!r} is a folder of other things than PNG frames; name a new one")
    if entries and not overwrite:
        raise _taken(path)


def _exists(path: Path) -> bool:
    """Whether there is such an entry, if only a link to nothing."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ValueError(f"output {str(path)!r}: the name is too long for this file system; shorten it") from error
    return True


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(f"output {str(path)!r} exists; pass overwrite (--overwrite) to replace it, or name another")


def numbered_outputs(path: str | os.PathLike[str], count: int) -> list[Path]:
    """The outputs of ``count`` clips: ``path`` itself for one, else numbered from 0 in front of the suffix.

    ``clip.mp4`` of 3: ``clip_0000.mp4``, ``clip_0001.mp4``, ``clip_0002.mp4``. A folder of pictures likewise:
    ``clip_0000/`` and so on.
    """
    path = Path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{index:04d}{path.suffix}") for index in range(count)]


def write_video(
    frames: Frames, path: str | os.PathLike[str], fps: float, overwrite: bool = False, *, min_size: int = 256
) -> None:
    """Write one clip; the suffix of ``path`` says how.

    ``.mp4`` is H.264, yuv420p, BT.709, what every player takes; odd sizes are padded by their last row or column.
    ``.gif`` loops for ever. Its clock counts hundredths of a second: frame times are rounded such that the clip keeps
    its length, and none is below 0.02 s, the shortest that players honour. The others
    keep the clip's own size: ``.png`` is the contact sheet, ``.npy`` the array, and a name without suffix a folder of
    pictures, numbered from ``frame_0000.png``.

    The output appears whole or not at all: frames go to a temporary file in the same folder, which then takes the name;
    without ``overwrite`` only if nobody else has taken it meanwhile.

    Args:
        frames: see the module's docstring.
        fps: frames a second, from 0.01 to 1000. Only ``.mp4`` and ``.gif`` have a place for it.
        overwrite: replace a file that exists, or a folder of pictures.
        min_size: an ``.mp4`` or ``.gif`` with a short side below this many pixels is enlarged by the smallest
            sufficient whole factor, each pixel repeated: players blur tiny clips or cannot show them. 1 keeps the size.

    Raises:
        ValueError: frames of another shape or dtype, ``fps`` or ``min_size`` out of range.
        OSError: it could not be written, say for want of space; names the output.
        As ``check_output`` for ``path``.
    """
    path = check_output(path, overwrite)
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"fps: expected a number from {MIN_FPS} to {MAX_FPS}, got {fps}")
    if min_size < 1:
        raise ValueError(f"min_size: expected at least 1, got {min_size}")
    pixels = _as_pixels(frames)
    suffix = path.suffix.lower()
    if suffix in (".mp4", ".gif"):
        pixels = _enlarged(pixels, min_size)
    with _replacing(path, overwrite) as partial, _named_errors(path):
        _WRITERS[suffix](pixels, partial, fps)


def read_array(path: str | os.PathLike[str], max_frames: int | None = None) -> Pixels:
    """A clip as ``write_video`` puts it into an ``.npy``: uint8 ``(T, H, W, 3)``. ``max_frames`` stops after so many.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no such array. Python objects are not unpacked.
    """
    try:
        clip = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{str(path)!r} holds no array that can be read: {error}") from error
    if not isinstance(clip, np.ndarray):
        raise ValueError(f"{str(path)!r} must hold one array, a clip of uint8 (T, H, W, 3)")
    return np.array(_checked(clip)[:max_frames])


def read_video(path: str | os.PathLike[str], max_frames: int | None = None) -> tuple[Pixels, float]:
    """Decode a video file with PyAV: uint8 ``(T, H, W, 3)`` and the frames a second that its header states.

    ``max_frames`` stops after so many.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no video frames.
    """
    import av

    with av.open(os.fspath(path)) as container:
        if not container.streams.video:
            raise ValueError(f"video {os.fspath(path)!r} holds no video stream")
        decoded = islice(container.decode(video=0), max_frames)
        frames = [frame.to_ndarray(format="rgb24") for frame in decoded]
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
def _named_errors(path: Path) -> Iterator[None]:
    """What the disk refuses, as an OSError that names the output: a full disk names nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(f"output {str(path)!r} could not be written: {error}") from error


@contextmanager
def _replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` on success and vanishes on failure, Ctrl-C included."""
    unique = uuid.uuid4().hex  # of the name nothing: it may be as long as a name can be
    partial, old = (path.with_name(f".{unique}.{end}") for end in ("part", "old"))
    try:
        yield partial
        if not overwrite:
            _take(path, partial)
        else:
            if path.is_dir():  # of pictures, or `check_output` would have refused it; only files replace one another
                os.replace(path, old)
            os.replace(partial, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _take(path: Path, partial: Path) -> None:
    """Give ``partial`` a free name: of two processes that write to it at once only one gets it."""
    try:
        if not partial.is_dir():
            path.touch(exist_ok=False)  # not a hard link, which some file systems lack
        os.replace(partial, path)  # a folder only takes the place of an empty one
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise _taken(path) from error
        if path.is_file():
            path.unlink()
        raise


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


def _write_array(pixels: Pixels, path: Path, fps: float) -> None:
    with path.open("wb") as file:  # np.save gives a bare name another suffix
        np.save(file, pixels)


def _write_frames(pixels: Pixels, path: Path, fps: float) -> None:
    from PIL import Image

    path.mkdir()
    for index, frame in enumerate(pixels):
        Image.fromarray(frame).save(path / f"frame_{index:04d}.png", "PNG")


_WRITERS: dict[str, Callable[[Pixels, Path, float], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".png": _write_sheet,
    ".npy": _write_array,
    FOLDER: _write_frames,
}
_NEEDS = {".mp4": ("av", "av"), ".npy": ("numpy", "numpy")}  # of the others Pillow
