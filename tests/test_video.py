"""Files are decoded again by the libraries that players are built on, and compared with the frames that went in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lumiere_fast import video

COLOURS = np.array(
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255), (128, 64, 200), (255, 160, 0)],
    np.uint8,
)


def flat_clip(height: int = 32, width: int = 48) -> video.Pixels:
    """One colour a frame: what survives chroma subsampling, so that colours can be compared closely."""
    return np.broadcast_to(COLOURS[:, None, None], (len(COLOURS), height, width, 3)).copy()


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- pixels


def test_to_uint8_maps_the_range_ends_and_middle() -> None:
    values = torch.tensor([-1.0, 1.0, 0.0, -2.0, 3.0, 1 / 255, -1 / 255])
    clip = values.repeat(3, 2, 5, 1)  # (3, T=2, H=5, W=7)
    pixels = video.to_uint8(clip)
    assert pixels.shape == (2, 5, 7, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    # 0 is half way between 127 and 128; the last two are exact.
    np.testing.assert_array_equal(pixels[0, 0, :, 0], [0, 255, 128, 0, 255, 128, 127])


def test_to_uint8_inverts_the_pixels_of_any_memory_format() -> None:
    pixels = np.random.default_rng(7).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    clip = torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1  # strides of channels-last memory
    assert not clip.is_contiguous()
    np.testing.assert_array_equal(video.to_uint8(clip), pixels)
    np.testing.assert_array_equal(video.to_uint8(clip.contiguous()), pixels)


def test_to_uint8_takes_a_tensor_with_a_gradient_and_half_precision() -> None:
    clip = torch.zeros(3, 1, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    assert video.to_uint8(clip).max() == 128


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(1, 3, 2, 4, 4),  # a batch
        torch.zeros(4, 2, 4, 4),  # four channels
        torch.zeros(3, 2, 4, 4, dtype=torch.uint8),
        torch.zeros(3, 0, 4, 4),
        torch.full((3, 1, 2, 2), float("nan")),
        torch.full((3, 1, 2, 2), float("inf")),
    ],
)
def test_to_uint8_refuses(frames: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^frames: "):
        video.to_uint8(frames)


# ---------------------------------------------------------------- contact sheet


@pytest.mark.parametrize("columns", [1, 3, 8, 11])
def test_contact_sheet_places_each_frame(columns: int) -> None:
    clip = np.random.default_rng(columns).integers(0, 255, (8, 5, 7, 3), dtype=np.uint8)
    sheet = video.contact_sheet(clip, columns)
    rows = -(-8 // columns)
    assert sheet.shape == (rows * 7 - 2, columns * 9 - 2, 3)
    seen = np.zeros(sheet.shape[:2], dtype=bool)
    for index, frame in enumerate(clip):
        row, column = divmod(index, columns)
        area = np.s_[row * 7 : row * 7 + 5, column * 9 : column * 9 + 7]
        np.testing.assert_array_equal(sheet[area], frame)
        seen[area] = True
    assert (sheet[~seen] == 255).all()


def test_contact_sheet_is_square_by_default_and_takes_tensors() -> None:
    assert video.contact_sheet(torch.zeros(3, 9, 4, 4)).shape == (16, 16, 3)
    assert video.contact_sheet(torch.zeros(3, 10, 4, 4)).shape == (16, 22, 3)


def test_contact_sheet_refuses_no_columns() -> None:
    with pytest.raises(ValueError, match="columns: expected at least 1, got 0"):
        video.contact_sheet(flat_clip(), 0)


# ---------------------------------------------------------------- mp4


@pytest.mark.parametrize("fps", [8, 16, 24, 12.5, 30000 / 1001, video.MIN_FPS, video.MAX_FPS])
def test_mp4_keeps_colours_frame_count_and_rate(tmp_path: Path, fps: float) -> None:
    pytest.importorskip("av")
    video.write_video(flat_clip(), tmp_path / "clip.mp4", fps)
    frames, rate = video.read_video(tmp_path / "clip.mp4")
    assert rate == pytest.approx(fps, rel=1e-4)
    assert frames.shape == (len(COLOURS), 256, 384, 3)
    difference = np.abs(frames.astype(int) - COLOURS[:, None, None].astype(int))
    assert difference.max() <= 4


def test_mp4_is_what_players_take(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    video.write_video(flat_clip(), tmp_path / "clip.mp4", 16)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.colorspace) == ("h264", "yuv420p", 1)
        assert float(stream.duration * stream.time_base) == pytest.approx(len(COLOURS) / 16)


def test_mp4_keeps_the_picture(tmp_path: Path) -> None:
    """A dark square that moves left by 4 pixels a frame is where it was drawn."""
    pytest.importorskip("av")
    clip = np.full((6, 64, 64, 3), 230, dtype=np.uint8)
    for index, frame in enumerate(clip):
        frame[24:40, 40 - 4 * index : 56 - 4 * index] = (20, 30, 40)
    video.write_video(clip, tmp_path / "clip.mp4", 16)
    frames, _ = video.read_video(tmp_path / "clip.mp4")
    dark = frames.mean(axis=-1) < 128
    for index, mask in enumerate(dark):
        rows, columns = np.nonzero(mask)
        assert (rows.min(), rows.max()) == pytest.approx((24 * 4, 40 * 4 - 1), abs=1)
        assert (columns.min(), columns.max()) == pytest.approx(((40 - 4 * index) * 4, (56 - 4 * index) * 4 - 1), abs=1)


@pytest.mark.parametrize(
    ("height", "width", "min_size", "expected"),
    [
        (32, 32, 256, (256, 256)),
        (30, 40, 256, (270, 360)),  # 9 times, the smallest whole factor
        (31, 47, 1, (32, 48)),  # padded, not enlarged
        (255, 300, 256, (510, 600)),
        (300, 257, 256, (300, 258)),
    ],
)
def test_mp4_sizes(tmp_path: Path, height: int, width: int, min_size: int, expected: tuple[int, int]) -> None:
    pytest.importorskip("av")
    video.write_video(flat_clip(height, width)[:2], tmp_path / "clip.mp4", 16, min_size=min_size)
    frames, _ = video.read_video(tmp_path / "clip.mp4")
    assert frames.shape[1:3] == expected
    assert (
        np.abs(frames.astype(int) - COLOURS[:2, None, None].astype(int)).max() <= 4
    )  # the padding has the frame's colour


def test_mp4_from_a_tensor(tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = torch.zeros(3, 4, 16, 16)
    clip[0], clip[2] = 1.0, -1.0  # orange
    video.write_video(clip, tmp_path / "clip.mp4", 16, min_size=16)
    frames, _ = video.read_video(tmp_path / "clip.mp4")
    assert frames.shape == (4, 16, 16, 3)
    assert np.abs(frames.astype(int) - np.array((255, 128, 0))).max() <= 4


# ---------------------------------------------------------------- gif and png


def test_gif_keeps_colours_frames_and_length(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    video.write_video(flat_clip(), tmp_path / "clip.gif", 16, min_size=32)
    with Image.open(tmp_path / "clip.gif") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (len(COLOURS), (48, 32), 0)
        milliseconds = []
        for index, colour in enumerate(COLOURS):
            image.seek(index)
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.broadcast_to(colour, (32, 48, 3)))
            milliseconds.append(image.info["duration"])
    assert sum(milliseconds) == 500 and set(milliseconds) == {60, 70}


def test_gif_frames_are_never_shorter_than_players_honour(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    video.write_video(flat_clip(), tmp_path / "clip.gif", 240)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.info["duration"] == 20


def test_png_is_the_contact_sheet(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    clip = np.random.default_rng(3).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    video.write_video(clip, tmp_path / "CLIP.PNG", 16)
    with Image.open(tmp_path / "CLIP.PNG") as image:
        np.testing.assert_array_equal(np.asarray(image), video.contact_sheet(clip))


# ---------------------------------------------------------------- arrays and folders of pictures


def test_npy_is_the_pixels(tmp_path: Path) -> None:
    clip = np.random.default_rng(5).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    video.write_video(clip, tmp_path / "clip.npy", 16)
    loaded = np.load(tmp_path / "clip.npy", allow_pickle=False)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, clip)
    assert listing(tmp_path) == ["clip.npy"]


def test_a_name_without_suffix_is_a_folder_of_pictures(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    clip = np.random.default_rng(6).integers(0, 256, (11, 6, 4, 3), dtype=np.uint8)
    video.write_video(clip, f"{tmp_path}/clip/", 16)
    assert listing(tmp_path) == ["clip"]
    assert listing(tmp_path / "clip") == [f"frame_{index:04d}.png" for index in range(11)]
    for index, frame in enumerate(clip):
        with Image.open(tmp_path / "clip" / f"frame_{index:04d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), frame)


def test_a_folder_of_pictures_is_replaced_as_a_whole_and_only_if_told(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    path = tmp_path / "clip"
    path.mkdir()  # an empty folder is free
    video.write_video(flat_clip(), path, 16)
    with pytest.raises(FileExistsError, match="--overwrite"):
        video.write_video(flat_clip(), path, 16)
    assert len(listing(path)) == len(COLOURS)
    video.write_video(flat_clip()[:2], path, 16, overwrite=True)
    assert listing(path) == ["frame_0000.png", "frame_0001.png"]
    assert listing(tmp_path) == ["clip"]


@pytest.mark.parametrize("name", ["notes.txt", "frame_0000.jpg", "frame_1.png"])
def test_a_folder_of_anything_else_is_never_replaced(tmp_path: Path, name: str) -> None:
    pytest.importorskip("PIL")
    path = tmp_path / "clip"
    path.mkdir()
    (path / "frame_0000.png").write_bytes(b"old")
    (path / name).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="other things than PNG frames"):
        video.write_video(flat_clip(), path, 16, overwrite=True)
    assert listing(path) == sorted(["frame_0000.png", name])
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="is a file"):
        video.check_output(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("where", ["writing", "naming"])
def test_a_failure_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "clip"
    video.write_video(flat_clip()[:3], path, 16)
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    replace, saved = video.os.replace, Image.Image.save

    def fails(self: object, file: Path, *args: object) -> None:
        if Path(file).name == "frame_0001.png":
            raise OSError("disk full")
        saved(self, file, *args)

    def cannot_rename(source: Path, target: Path) -> None:
        if source.suffix == ".part":
            raise OSError("no rename")
        replace(source, target)

    if where == "writing":
        monkeypatch.setattr(Image.Image, "save", fails)
    else:
        monkeypatch.setattr(video.os, "replace", cannot_rename)
    with pytest.raises(OSError, match=r"disk full|no rename"):
        video.write_video(flat_clip(), path, 16, overwrite=True)
    assert listing(tmp_path) == ["clip"]
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before


def test_outputs_are_numbered_in_front_of_the_suffix() -> None:
    names = [str(path) for path in video.numbered_outputs("out/clip.mp4", 3)]
    assert names == ["out/clip_0000.mp4", "out/clip_0001.mp4", "out/clip_0002.mp4"]
    assert [str(path) for path in video.numbered_outputs("out/", 2)] == ["out_0000", "out_0001"]
    assert video.numbered_outputs("clip.mp4", 1) == [Path("clip.mp4")]


# ---------------------------------------------------------------- what is refused, and what is left behind


@pytest.mark.parametrize("name", ["clip.webm", ".mp4", ".", "v1.5/"])
def test_an_unknown_suffix_lists_the_accepted_ones(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"must be one of \.mp4, \.gif, \.png, \.npy; a name without suffix makes"):
        video.check_output(name)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        video.check_output(tmp_path / "nowhere" / "clip.png")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"writing \.mp4 needs av.*pip install av"):
        video.check_output(tmp_path / "clip.mp4")


def test_a_file_that_exists_is_kept_unless_told(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    path = tmp_path / "clip.png"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="--overwrite"):
        video.write_video(flat_clip(), path, 16)
    assert path.read_bytes() == b"precious"
    video.write_video(flat_clip(), path, 16, overwrite=True)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert listing(tmp_path) == ["clip.png"]


def test_a_folder_is_never_replaced(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        video.check_output(tmp_path / "clip.mp4", overwrite=True)


@pytest.mark.parametrize("fps", [0, -1, 0.009, 1001, 10**40, float("nan"), float("inf")])
def test_a_rate_is_one_that_a_file_can_hold(tmp_path: Path, fps: float) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(ValueError, match=r"fps: expected a number from 0\.01 to 1000, got "):
        video.write_video(flat_clip(), tmp_path / "clip.png", fps)
    assert listing(tmp_path) == []


def test_a_minimum_size_must_be_positive(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(ValueError, match="min_size: expected at least 1, got 0"):
        video.write_video(flat_clip(), tmp_path / "clip.gif", 16, min_size=0)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 4, 4, 3)),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 4), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, frames: video.Pixels) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(ValueError, match="expected a uint8 array"):
        video.write_video(frames, tmp_path / "clip.png", 16)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"precious")
    seen: list[str] = []

    def fails(pixels: video.Pixels, partial: Path, fps: float) -> None:
        partial.write_bytes(b"half")
        seen.extend(listing(tmp_path))
        raise error

    monkeypatch.setitem(video._WRITERS, ".mp4", fails)
    with pytest.raises(error):
        video.write_video(flat_clip(), path, 16, overwrite=True)
    assert len(seen) == 2  # the temporary file was beside the old one
    assert listing(tmp_path) == ["clip.mp4"] and path.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png", "clip.npy", "clip"])
def test_a_full_disk_is_told_with_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name != "clip.npy":
        pytest.importorskip("av" if name == "clip.mp4" else "PIL")

    def fails(pixels: video.Pixels, partial: Path, fps: float) -> None:
        partial.mkdir() if name == "clip" else partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(video._WRITERS, Path(name).suffix, fails)
    with pytest.raises(OSError, match=rf"output '{tmp_path / name}' could not be written: .*No space left"):
        video.write_video(flat_clip(), tmp_path / name, 16)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["clip.npy", "clip"])
def test_of_two_that_write_to_one_name_only_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("PIL")
    suffix, clip = Path(name).suffix, flat_clip()
    write = video._WRITERS[suffix]

    def slow(pixels: video.Pixels, partial: Path, fps: float) -> None:
        write(pixels, partial, fps)
        monkeypatch.setitem(video._WRITERS, suffix, write)
        video.write_video(clip[:2], tmp_path / name, 16)  # another process, meanwhile

    monkeypatch.setitem(video._WRITERS, suffix, slow)
    with pytest.raises(FileExistsError, match=rf"output '{tmp_path / name}' exists; pass overwrite"):
        video.write_video(clip, tmp_path / name, 16)
    assert listing(tmp_path) == [name]
    first = tmp_path / name
    kept = len(listing(first)) if first.is_dir() else len(np.load(first))
    assert kept == 2


def test_what_cannot_take_the_name_leaves_no_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(source: Path, target: Path) -> None:
        raise OSError("no rename")

    monkeypatch.setattr(video.os, "replace", cannot)
    with pytest.raises(OSError, match="no rename"):
        video.write_video(flat_clip(), tmp_path / "clip.npy", 16)
    assert listing(tmp_path) == []


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    longest = "x" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 4) + ".npy"
    video.write_video(flat_clip(), tmp_path / longest, 16)
    assert listing(tmp_path) == [longest]
    with pytest.raises(ValueError, match="the name is too long"):
        video.check_output(tmp_path / f"x{longest}")
    with pytest.raises(ValueError, match="output is empty"):
        video.check_output("")


def test_a_link_to_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "clip.npy").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="exists"):
        video.check_output(tmp_path / "clip.npy")


def test_an_interrupted_encoder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")

    class Interrupted:
        @staticmethod
        def from_ndarray(*_: object, **__: object) -> Iterator[None]:
            raise KeyboardInterrupt

    monkeypatch.setattr(av, "VideoFrame", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        video.write_video(flat_clip(), tmp_path / "clip.mp4", 16)
    assert listing(tmp_path) == []


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(FileNotFoundError):
        video.read_video(tmp_path / "clip.mp4")
