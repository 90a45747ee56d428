"""A folder of captioned videos as training data, in Hugging Face's VideoFolder and ImageFolder conventions.

    clips/                          or   clips/
        cat.mp4   cat.txt                    metadata.jsonl    {"file_name": "cat.mp4", "text": "a cat runs"}
        deep/dog.webm  deep/dog.txt          cat.mp4  deep/dog.webm

Opening a folder probes every file once and remembers the outcome in the user's cache folder. Afterwards a batch decodes
only what it shows, from the nearest keyframe on, in threads that work ahead of the training step.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast.data.clips import mixed_generator
from lumiere_fast.data.source import CROP_STREAM, ORDER_STREAM, CaptionedFrames
from lumiere_fast.evidence import cache_folder, write_cache

_CONTAINERS = {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"}
VIDEO_SUFFIXES = frozenset(_CONTAINERS | {".apng", ".gif", ".webm", ".wmv", ".y4m"})
IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
INDEX_VERSION = 1
PREFETCHED_STEPS = 2
LISTED = 10  # names in an error message, before "and n more"

Crop = Literal["center", "random"]
ShortClips = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Probe:
    """What is known of a file without decoding it: seconds, `start` the time of its first frame; pictures last 0 s."""

    start: float
    duration: float
    num_frames: int


@dataclass(frozen=True)
class Entry:
    """One captioned file; `name` is its path below the folder, with forward slashes."""

    name: str
    caption: str
    size: int
    probe: Probe


class _Sample(NamedTuple):
    """Where a training sample lies: seconds of each frame, and where in its room the square is (0 to 1, down, across).

    `size`: pixels a side once resized.
    """

    entry: Entry
    times: tuple[float, ...]
    offset: tuple[float, float]
    size: int


class VideoFolder:
    """Captioned videos and pictures of a folder, as a `ClipSource`.

    Every epoch shows each file once, in a new order. A sample is `num_frames` frames at `fps` frames a second, from a
    random time on: the frame shown at a time is the nearest one by its timestamp, so that variable frame rates keep
    their pace. Frames are turned upright (rotation metadata), cropped to a square of the picture as displayed, and
    resized with antialiasing.

    With `num_frames` = 1 samples are single frames at random times, and pictures count. Otherwise pictures are left
    out, and a video needs `(num_frames - 1/2) / fps` seconds: holding or looping one would teach that motion stops or
    jumps.

    Args:
        folder: searched with its subfolders. Captions are `name.txt` beside each file; or, for all files,
            `metadata.jsonl` or `metadata.csv` at its top with `file_name` (relative) and `text`. Empty captions are
            allowed. Names that start with a dot and other kinds of files are left out.
        crop: "center", or "random" along the longer side.
        short_clips: "refuse" names the videos that are too short in an error, "skip" leaves them out.
        num_workers: threads that decode. They do not change the result.

    Raises:
        FileNotFoundError: no such folder, or a file that the metadata names.
        ValueError: files that cannot be read or have no caption, all of them named; metadata that is not as above;
            nothing left to train on.
        ModuleNotFoundError: PyAV or Pillow is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        num_frames: int,
        fps: float,
        seed: int = 0,
        crop: Crop = "center",
        short_clips: ShortClips = "refuse",
        num_workers: int = 4,
    ) -> None:
        check_choices(crop, short_clips)
        _check_numbers(num_frames, fps, num_workers)
        self.folder = Path(folder)
        self.num_frames = num_frames
        self.fps = fps
        self.seed = seed
        self.crop = crop
        self.num_workers = num_workers
        self.entries = _long_enough(_index(self.folder, num_frames == 1, num_workers), num_frames, fps, short_clips)
        if not self.entries:
            kinds = "videos or pictures" if num_frames == 1 else f"videos of {num_frames} frames at {fps:g} fps"
            raise ValueError(f"{self.folder} holds no captioned {kinds}")
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[tuple[int, int, int], list[Future[Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def settings(self) -> dict[str, Any]:
        """See `ClipSource`. The fingerprint is of names, sizes, captions and frame counts."""
        listing = json.dumps([[e.name, e.size, e.caption, e.probe.num_frames] for e in self.entries])
        return {
            "data": "folder",
            "data_fingerprint": hashlib.sha256(listing.encode()).hexdigest()[:16],
            "seed": self.seed,
            "num_frames": self.num_frames,
            "fps": self.fps,
            "crop": self.crop,
        }

    def draw(self, step: int, batch_size: int, size: int, device: torch.device) -> CaptionedFrames:
        """See `ClipSource`. Starts on the next batches in the background.

        Raises:
            ValueError: a file cannot be decoded, or changed since it was probed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch needs at least one clip; pass a positive integer")
        wanted = [(later, batch_size, size) for later in range(step, step + 1 + PREFETCHED_STEPS)]
        for key in self._ahead.keys() - set(wanted):
            for future in self._ahead.pop(key):
                future.cancel()
        for key in wanted:
            if key not in self._ahead:
                self._ahead[key] = [self._workers().submit(self._load, sample) for sample in self._samples(*key)]
        clips = torch.stack([future.result() for future in self._ahead.pop(wanted[0])])
        prompts = [self.entries[index].caption for index in self._order(step, batch_size)]
        return CaptionedFrames(clips.to(device).transpose(1, 2), prompts)

    def close(self) -> None:
        """Stop decoding ahead."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="lumiere-fast-videos")
        return self._pool

    def _order(self, step: int, batch_size: int) -> list[int]:
        """Which entries batch `step` shows."""
        count = len(self.entries)
        places = range(step * batch_size, (step + 1) * batch_size)
        epochs = {
            epoch: torch.randperm(count, generator=mixed_generator(self.seed, ORDER_STREAM, epoch)).tolist()
            for epoch in {place // count for place in places}
        }
        return [epochs[place // count][place % count] for place in places]

    def _samples(self, step: int, batch_size: int, size: int) -> Iterator[_Sample]:
        draws = torch.rand(batch_size, 3, generator=mixed_generator(self.seed, CROP_STREAM, step), dtype=torch.float64)
        for index, (when, down, across) in zip(self._order(step, batch_size), draws.tolist(), strict=True):
            entry = self.entries[index]
            spare = entry.probe.duration - (self.num_frames / self.fps if self.num_frames > 1 else 0)
            first = entry.probe.start + when * max(spare, 0.0)
            times = tuple(first + frame / self.fps for frame in range(self.num_frames))
            yield _Sample(entry, times, (down, across) if self.crop == "random" else (0.5, 0.5), size)

    def _load(self, sample: _Sample) -> Tensor:
        """(T, 3, size, size) fp32 in [-1, 1]."""
        path = self.folder / sample.entry.name
        try:
            if _is_image(path):
                pictures = [Picture(_read_image(path), 1.0)]
            else:
                pictures = read_frames(path, sample.times, sample.entry.probe.start)
        except _unreadable() as error:
            raise ValueError(f"{path} cannot be read any more, or is damaged after its beginning: {error}") from error
        squares = {id(picture): _square(picture, sample.offset, sample.size) for picture in pictures}
        return torch.stack([squares[id(picture)] for picture in pictures])


def check_choices(crop: str, short_clips: str) -> None:
    """A ValueError unless both are as `VideoFolder` takes them."""
    if crop not in get_args(Crop):
        raise ValueError(f"crop must be one of {', '.join(get_args(Crop))}, got {crop!r}")
    if short_clips not in get_args(ShortClips):
        raise ValueError(f"short_clips must be one of {', '.join(get_args(ShortClips))}, got {short_clips!r}")


def _check_numbers(num_frames: int, fps: float, num_workers: int) -> None:
    if num_frames < 1:
        raise ValueError(f"num_frames must be >= 1, got {num_frames}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be a finite number above 0, got {fps}")
    if num_workers < 1:
        raise ValueError(f"num_workers must be >= 1, got {num_workers}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


# ------------------------------------------------------------------------------------------------------------- captions


def _captions(folder: Path) -> dict[str, str]:
    """Caption of each file, by its name below the folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of videos")
    found = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (path.is_file() or (path.is_symlink() and not path.exists()))
    ]
    dangling = [name for name in found if not (folder / name).exists()]
    if dangling:
        raise FileNotFoundError(
            f"{folder}: {len(dangling)} files are links to files that do not exist: {_listed(dangling)}"
        )
    metadata = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(metadata) > 1:
        raise ValueError(f"{folder} holds both {' and '.join(METADATA_NAMES)}; keep one")
    captions = _metadata_captions(metadata[0]) if metadata else _text_captions(folder, found)
    uncaptioned = [name for name in found if name not in captions]
    if uncaptioned:
        where = f"a row in {metadata[0].name}" if metadata else "a text file of the same name beside it"
        raise ValueError(
            f"{folder}: {len(uncaptioned)} files have no caption, which is {where}: {_listed(uncaptioned)}"
        )
    return captions


def _text_captions(folder: Path, names: Iterable[str]) -> dict[str, str]:
    captions = {}
    for name in names:
        path = (folder / name).with_suffix(".txt")
        if path.is_file():
            captions[name] = " ".join(_read_text(path).split())
    return captions


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _metadata_captions(path: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    rows = _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    for line, row in rows:
        name, text = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            keys = ", ".join(map(str, row)) or "nothing"
            raise ValueError(f"{path}, line {line}: file_name and text must both be strings; the row has {keys}")
        if not (_is_text(name) and _is_text(text)):
            raise ValueError(f"{path}, line {line}: file_name and text must be Unicode; one holds half of a character")
        name = PurePosixPath(name).as_posix()  # "./a.mp4" is a.mp4
        if name in captions:
            raise ValueError(f"{path}, line {line}: {name} has a caption already")
        captions[name] = " ".join(text.split())
    missing = [name for name in captions if not (path.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} names {len(missing)} files that are not there: {_listed(missing)}")
    return captions


def _is_text(text: str) -> bool:
    r"""Whether it has no lone surrogate, such as JSON's "\ud800", which no encoding can write."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(_read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {line}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}: must be a JSON object")
        yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num + 1}: not valid CSV: {error}") from error
        yield reader.line_num, row


# ---------------------------------------------------------------------------------------------------------------- index


def _index(folder: Path, with_images: bool, num_workers: int) -> list[Entry]:
    """Every captioned file with its probe, from the cache where the file is as it was."""
    captions = _captions(folder)
    stats = {name: (folder / name).stat() for name in sorted(captions)}
    keys = {name: f"{name}|{stat.st_size}|{stat.st_mtime_ns}" for name, stat in stats.items()}
    names = [name for name in keys if with_images or not _is_image(folder / name)]
    cache = cache_folder() / "video_folders" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    known = _read_cache(cache)
    unknown = [name for name in names if keys[name] not in known]
    with ThreadPoolExecutor(num_workers) as pool:
        outcomes = dict(zip(unknown, pool.map(lambda name: _probe(folder / name), unknown), strict=True))
    unreadable = [f"{name} ({outcome})" for name, outcome in outcomes.items() if isinstance(outcome, str)]
    known |= {keys[name]: probe for name, probe in outcomes.items() if isinstance(probe, Probe)}
    if unknown:
        _write_cache(cache, {key: known[key] for key in keys.values() if key in known})
    if unreadable:
        raise ValueError(f"{folder}: {len(unreadable)} files are unreadable or truncated: {_listed(unreadable)}")
    return [Entry(name, captions[name], stats[name].st_size, known[keys[name]]) for name in names]


def _read_cache(path: Path) -> dict[str, Probe]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: Probe(**value) for key, value in found["probes"].items()} if found["v"] == INDEX_VERSION else {}
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or damaged: probing again is all it costs
        return {}


def _write_cache(path: Path, probes: Mapping[str, Probe]) -> None:
    content = {"v": INDEX_VERSION, "probes": {key: asdict(probe) for key, probe in probes.items()}}
    write_cache(path, json.dumps(content))


def _long_enough(entries: list[Entry], num_frames: int, fps: float, short_clips: str) -> list[Entry]:
    needed = (num_frames - 0.5) / fps if num_frames > 1 else 0.0
    short = [entry for entry in entries if entry.probe.duration < needed]
    if short and short_clips == "refuse":
        raise ValueError(
            f"{len(short)} videos are shorter than the {needed:.2f} s that {num_frames} frames at {fps:g} fps need: "
            + _listed([f"{entry.name} ({entry.probe.duration:.2f} s)" for entry in short])
            + "; remove them, train on fewer frames or more a second, or leave them out with short_clips='skip'"
        )
    return [entry for entry in entries if entry.probe.duration >= needed]


def _probe(path: Path) -> Probe | str:
    """What a file holds; or, as a string, why it cannot be read."""
    try:
        return _probe_image(path) if _is_image(path) else _probe_video(path)
    except _unreadable() as error:
        return " ".join(str(error).split())


def _unreadable() -> tuple[type[Exception], ...]:
    """What PyAV, Pillow and the checks below raise for a file that is not what its name says."""
    import av
    from PIL import Image

    return (OSError, ValueError, SyntaxError, av.FFmpegError, Image.DecompressionBombError)


def _probe_image(path: Path) -> Probe:
    _read_image(path)
    return Probe(0.0, 0.0, 1)


def _probe_video(path: Path) -> Probe:
    """Headers may lie, or lack a duration: the packets tell the time. None is decoded but the first frame's."""
    import av

    with av.open(str(path)) as container:
        start = next(_decoded(container), None)
    if start is None:
        raise ValueError("no video frame in it can be decoded")
    with av.open(str(path)) as container:
        last, span, count = start.time, 0.0, 0
        for packet in container.demux(_video_stream(container)):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None or packet.time_base is None or packet.is_discard:
                continue
            count += 1
            time = float(stamp * packet.time_base)
            if time >= last:
                last, span = time, float((packet.duration or 0) * packet.time_base)
    return Probe(start.time, last - start.time + span, count)


# ------------------------------------------------------------------------------------------------------------- decoding


class Picture(NamedTuple):
    """Upright RGB `pixels`, uint8 (H, W, 3), each `aspect` times as wide as high."""

    pixels: npt.NDArray[np.uint8]
    aspect: float


class _Frame(NamedTuple):
    """PyAV's `frame`, the seconds at which it is shown, and the width of its pixels in terms of their height."""

    time: float
    frame: Any
    aspect: float


def read_frames(path: Path, times: Sequence[float], start: float) -> list[Picture]:
    """The frame nearest to each of the ascending `times` (seconds), the earlier of two as near.

    Decodes from the keyframe before the first time on, and stops after the last. `start`: the time of the first frame.
    A frame that is wanted several times is one and the same object.
    """
    import av

    with av.open(str(path)) as container:
        if times[0] > start and _seek(container, times[0]):
            pictures = _nearest(_decoded(container), times)
            if pictures is not None:
                return pictures
    with av.open(str(path)) as container:  # a file without an index, or one that landed after the first time
        pictures = _nearest(_decoded(container), times, from_start=True)
    if pictures is None:
        raise ValueError("no video frame in it can be decoded")
    return pictures


def _seek(container: Any, time: float) -> bool:
    import av

    stream = _video_stream(container)
    try:
        container.seek(int(time / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


def _nearest(frames: Iterator[_Frame], times: Sequence[float], *, from_start: bool = False) -> list[Picture] | None:
    """None if the frames begin after the first time, though they are not the file's first."""
    found: list[Picture] = []
    previous = next(frames, None)
    if previous is None or (previous.time > times[0] and not from_start):
        return None
    for frame in frames:
        _take_until((previous.time + frame.time) / 2, previous, times, found)
        if len(found) == len(times):
            return found
        previous = frame
    _take_until(math.inf, previous, times, found)
    return found


def _take_until(end: float, frame: _Frame, times: Sequence[float], found: list[Picture]) -> None:
    """Append `frame` for each of the times left that is not after `end`."""
    picture = None
    while len(found) < len(times) and times[len(found)] <= end:
        picture = picture or _upright(frame)
        found.append(picture)


def _decoded(container: Any) -> Iterator[_Frame]:
    """The frames in the order shown, from where the container stands."""
    stream = _video_stream(container)
    aspect = float(stream.sample_aspect_ratio or 1)
    for frame in container.decode(stream):
        stamp = frame.dts if frame.pts is None else frame.pts
        if stamp is None:
            raise ValueError("its frames carry no times; remux it, for instance with ffmpeg -i in -c copy out.mkv")
        if not frame.is_corrupt:
            yield _Frame(float(stamp * frame.time_base), frame, aspect)


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("it holds no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # the samples of a batch are decoded side by side
    return stream


def _upright(frame: _Frame) -> Picture:
    """The frame as it should be shown: turned by its rotation metadata."""
    quarters = round(frame.frame.rotation / 90)  # counter-clockwise, as np.rot90 counts
    pixels = np.rot90(frame.frame.to_ndarray(format="rgb24"), quarters)
    return Picture(pixels, 1 / frame.aspect if quarters % 2 else frame.aspect)


def _read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Upright RGB pixels; transparent ones over white."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def _square(picture: Picture, offset: tuple[float, float], size: int) -> Tensor:
    """(3, size, size) fp32 in [-1, 1] of the largest square as displayed, `offset` of the way into the spare room."""
    height, width = picture.pixels.shape[:2]
    side = min(float(height), width * picture.aspect)
    rows, columns = max(round(side), 1), max(round(side / picture.aspect), 1)
    top, left = round(offset[0] * (height - rows)), round(offset[1] * (width - columns))
    pixels = picture.pixels[top : top + rows, left : left + columns].astype(np.float32)
    channels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = F.interpolate(channels, (size, size), mode="bilinear", antialias=True)[0]
    return (resized / 127.5 - 1).clamp(-1, 1)  # rounding may leave the range
