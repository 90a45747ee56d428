"""Folders of videos: which frames are shown, what of them is seen, what is refused, and that nothing else decides."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lumiere_fast.data import videos
from lumiere_fast.data.videos import VideoFolder, read_frames
from tests.data.files import ramp, ramp_index, write_clip, write_folder

pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUMIERE_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "clips"
    path.mkdir()
    return path


def caption(path: Path, text: str = "a clip") -> Path:
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def draw(source: VideoFolder, step: int = 0, batch_size: int = 1, size: int = 8) -> Tensor:
    try:
        return source.draw(step, batch_size, size, CPU).frames
    finally:
        source.close()


# Which frames --------------------------------------------------------------------------------------------------------


def shown(source: VideoFolder, step: int = 0) -> list[float]:
    """The indices of the ramp that a batch of one shows."""
    return [ramp_index(float(value)) for value in draw(source, step)[0].mean(dim=(0, 2, 3))]


@pytest.mark.parametrize(
    ("name", "fps"), [("a.mp4", 12), ("a.mp4", 29.97), ("a.webm", 24), ("a.mkv", 10), ("a.gif", 10), ("a.avi", 25)]
)
@pytest.mark.parametrize("wanted_fps", [4, 8, 30])
def test_frames_are_the_nearest_in_time(folder: Path, name: str, fps: float, wanted_fps: float) -> None:
    """The brightness ramp tells the index of the frame shown: it must be the time asked for, to half a frame."""
    count, num_frames = 50, 5
    caption(write_clip(folder / name, count, fps))
    source = VideoFolder(folder, num_frames=num_frames, fps=wanted_fps)
    (entry,) = source.entries
    assert entry.probe.num_frames == count
    assert entry.probe.duration == pytest.approx(count / fps, abs=0.003)
    starts = set()
    for step in range(6):
        (sample,) = source._samples(step, 1, 8)
        found = shown(source, step)
        indices = [round(index) for index in found]
        assert found == pytest.approx(indices, abs=0.3)
        exact = [min(t * fps, count - 1) for t in sample.times]
        assert all(abs(i - x) <= 0.53 for i, x in zip(indices, exact, strict=True)), (exact, found)  # times are in ms
        assert 0 <= sample.times[0] <= count / fps - num_frames / wanted_fps + 0.004
        starts.add(round(sample.times[0], 3))
    assert len(starts) == 6, "every step shows the same window"


def test_a_variable_frame_rate_keeps_its_pace(folder: Path) -> None:
    times = [0.0, 0.05, 0.1, 0.5, 0.9, 1.3, 1.31, 1.32, 2.0, 2.1]
    path = write_clip(folder / "a.mkv", len(times), times=times)
    wanted = [0.0, 0.06, 0.31, 0.69, 0.71, 1.304, 1.65, 1.67, 5.0]
    pictures = read_frames(path, wanted, 0.0)
    found = [ramp_index(picture.pixels.mean() / 127.5 - 1) for picture in pictures]
    nearest = [min(range(len(times)), key=lambda i: abs(times[i] - t)) for t in wanted]
    assert nearest == [0, 1, 3, 3, 4, 5, 7, 8, 9]
    assert found == pytest.approx(nearest, abs=0.3)


@pytest.mark.parametrize("options", [{"g": "12", "bf": "3"}, {"g": "250", "bf": "2"}, {"g": "6", "bf": "0"}])
def test_seeking_shows_what_decoding_everything_shows(folder: Path, options: dict[str, str]) -> None:
    """To the bit, on a picture that no two frames share, with frames that refer to later ones."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 24, 32, 3), dtype=np.uint8)
    path = write_clip(folder / "a.mp4", [np.ascontiguousarray(frame) for frame in noise], 20, **options)
    everything = read_frames(path, [i / 20 for i in range(60)], 0.0)
    for first in (1, 11, 12, 13, 35, 59):
        (found,) = read_frames(path, [first / 20], 0.0)
        assert np.array_equal(found.pixels, everything[first].pixels), first
    assert len({frame.pixels.tobytes() for frame in everything}) == 60


def test_a_window_of_a_long_video_is_not_all_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(folder / "a.mp4", 60, 10, g="6")
    seen: list[float] = []
    original = videos._decoded

    def counted(container: Any) -> Any:
        for frame in original(container):
            seen.append(frame.time)
            yield frame

    monkeypatch.setattr(videos, "_decoded", counted)
    read_frames(path, [4.0, 4.5], 0.0)  # keyframes at 3.6 and 4.2
    assert 3.5 < seen[0] <= 4.0
    assert 4.5 < seen[-1] < 4.8
    assert len(seen) < 13


def test_a_file_that_cannot_seek_is_decoded_from_its_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(folder / "a.mp4", 30, 10)
    late = videos._seek

    def too_late(container: Any, time: float) -> bool:
        return late(container, 2.9)

    for seek in (too_late, lambda container, time: False):
        monkeypatch.setattr(videos, "_seek", seek)
        (picture,) = read_frames(write_clip(path, 30, 10, g="5"), [1.0], 0.0)
        assert ramp_index(picture.pixels.mean() / 127.5 - 1) == pytest.approx(10, abs=0.3)


def test_single_frames_come_from_all_over_a_video(folder: Path) -> None:
    caption(write_clip(folder / "a.mp4", 40, 10))
    source = VideoFolder(folder, num_frames=1, fps=8)
    found = [index for step in range(30) for index in shown(source, step)]
    assert min(found) < 8
    assert max(found) > 31


# What of a frame -----------------------------------------------------------------------------------------------------


def corners(height: int, width: int) -> np.ndarray:
    """Four colours, one a quarter: red top left, green top right, blue bottom left, white bottom right."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2, 0] = 255
    frame[: height // 2, width // 2 :, 1] = 255
    frame[height // 2 :, : width // 2, 2] = 255
    frame[height // 2 :, width // 2 :] = 255
    return frame


def quarters(clip: Tensor) -> list[list[int]]:
    """The colour of each quarter of (3, T, size, size), rounded to 0 or 1, in reading order."""
    size = clip.shape[-1]
    places = [(size // 4, size // 4), (size // 4, 3 * size // 4), (3 * size // 4, size // 4)]
    return [(clip[:, 0, y, x] > 0).int().tolist() for y, x in [*places, (3 * size // 4, 3 * size // 4)]]


RED, GREEN, BLUE, WHITE = [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]


@pytest.mark.parametrize(
    ("degrees", "wanted"),
    [
        (0, [RED, GREEN, BLUE, WHITE]),
        (90, [GREEN, WHITE, RED, BLUE]),  # counter-clockwise
        (-90, [BLUE, RED, WHITE, GREEN]),
        (180, [WHITE, BLUE, GREEN, RED]),
    ],
)
def test_rotation_metadata_turns_the_picture(folder: Path, degrees: int, wanted: list[list[int]]) -> None:
    def rotate(stream: Any) -> None:
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write rotation metadata")
        stream.set_display_rotation(degrees)

    caption(write_clip(folder / "a.mp4", [corners(32, 48)] * 3, adjust=rotate))
    clip = draw(VideoFolder(folder, num_frames=2, fps=10), size=16)[0]
    assert quarters(clip) == wanted


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (33, 65), (31, 31), (16, 200)])
def test_the_square_is_the_middle_of_the_picture(folder: Path, shape: tuple[int, int]) -> None:
    caption(write_clip(folder / "a.mkv", [corners(*shape)] * 2))
    source = VideoFolder(folder, num_frames=1, fps=10)
    clip = draw(source, size=16)[0]
    assert quarters(clip) == [RED, GREEN, BLUE, WHITE]
    assert clip.shape == (3, 1, 16, 16)
    assert clip.dtype == torch.float32


def test_pixels_that_are_not_square_are_seen_as_displayed(folder: Path) -> None:
    """40 x 20 pixels twice as wide as high show a picture of 4 to 1, whose middle square is 10 pixels wide."""

    def widen(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = 2

    frame = np.zeros((20, 40, 3), np.uint8)
    frame[:, 15:25] = 255
    caption(write_clip(folder / "a.mp4", [frame] * 2, adjust=widen))
    clip = draw(VideoFolder(folder, num_frames=1, fps=10), size=20)
    assert clip.min() > 0.8


def test_random_crops_move_along_the_longer_side_and_are_reproducible(folder: Path) -> None:
    across = np.repeat(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], 24, axis=0).repeat(3, axis=2)
    caption(write_clip(folder / "a.mp4", [across] * 4))
    source = VideoFolder(folder, num_frames=2, fps=10, crop="random")
    means = [draw(source, step).mean().item() for step in range(12)]
    assert max(means) - min(means) > 0.8
    assert means == [draw(source, step).mean().item() for step in range(12)]
    assert all(torch.equal(clip[:, :, 0], clip[:, :, 1]) for clip in (draw(source, step) for step in range(3)))
    centred = VideoFolder(folder, num_frames=2, fps=10)
    assert draw(centred, 0).mean().item() == draw(centred, 1).mean().item() == pytest.approx(0, abs=0.03)


def test_resizing_does_not_alias(folder: Path) -> None:
    """Black and white noise made 8 times smaller is nearly even gray; picking pixels would leave noise."""
    noise = np.random.default_rng(0).integers(0, 2, (64, 64, 1), dtype=np.uint8) * 255
    Image.fromarray(noise.repeat(3, axis=2)).save(caption(folder / "a.png"))
    picture = draw(VideoFolder(folder, num_frames=1, fps=8), size=8)
    assert picture.std() < 0.15
    assert picture.mean().abs() < 0.1


def test_colours_and_range(folder: Path) -> None:
    for name, colour in (("black", 0), ("white", 255)):
        caption(write_clip(folder / f"{name}.mp4", [np.full((16, 16, 3), colour, np.uint8)] * 2))
    source = VideoFolder(folder, num_frames=1, fps=8)
    found = {source.entries[i].name: draw(source, 0, 2)[place] for place, i in enumerate(source._order(0, 2))}
    assert found["black.mp4"].max() < -0.97
    assert found["white.mp4"].min() > 0.97
    assert all(clip.abs().max() <= 1 for clip in found.values())


def test_pictures_are_single_frames(folder: Path) -> None:
    upright = Image.fromarray(corners(32, 48))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned 90 degrees clockwise
    upright.save(caption(folder / "a.png"))
    upright.save(caption(folder / "b.jpg"), exif=exif, quality=95)
    Image.new("RGBA", (10, 10), (200, 0, 0, 0)).save(caption(folder / "c.webp"))
    source = VideoFolder(folder, num_frames=1, fps=8)
    clips = dict(zip(source._order(0, 3), source.draw(0, 3, 16, CPU).frames, strict=True))
    source.close()
    assert quarters(clips[0]) == [RED, GREEN, BLUE, WHITE]
    assert quarters(clips[1]) == [BLUE, RED, WHITE, GREEN]
    assert clips[2].min() == 1, "what is transparent is white"
    with pytest.raises(ValueError, match="holds no captioned videos of 4 frames"):
        VideoFolder(folder, num_frames=4, fps=8)


# Captions ------------------------------------------------------------------------------------------------------------


def prompts(source: VideoFolder) -> dict[str, str]:
    return {entry.name: entry.caption for entry in source.entries}


def test_text_files_beside_the_videos(folder: Path) -> None:
    (folder / "deep").mkdir()
    caption(write_clip(folder / "a.mp4", 3), "  ein Bär läuft —\n  日本語 🐻\r\n")
    caption(write_clip(folder / "deep" / "Ünï.WEBM".replace("WEBM", "webm"), 3), "")
    caption(write_clip(folder / "c.gif", 3)).with_suffix(".txt").write_bytes("\ufeffmarked".encode())
    (folder / "notes.md").write_text("not a clip")
    (folder / "._a.mp4").write_bytes(b"what macOS leaves behind")
    assert prompts(VideoFolder(folder, num_frames=1, fps=8)) == {
        "a.mp4": "ein Bär läuft — 日本語 🐻",
        "c.gif": "marked",
        "deep/Ünï.webm": "",
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(folder: Path, kind: str) -> None:
    write_clip(folder / "a.mp4", 3)
    (folder / "deep").mkdir()
    write_clip(folder / "deep" / "b.webm", 3)
    wanted = {"a.mp4": 'a "red", ball', "deep/b.webm": "ü"}
    if kind == "jsonl":
        lines = [json.dumps({"file_name": f"./{name}", "text": text, "more": 1}) for name, text in wanted.items()]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        text = 'text,file_name\n"a ""red"", ball",a.mp4\nü,deep/b.webm\n'
        (folder / "metadata.csv").write_text(text, encoding="utf-8-sig")
    source = VideoFolder(folder, num_frames=1, fps=8)
    assert prompts(source) == wanted
    batch = source.draw(0, 2, 8, CPU)
    source.close()
    assert sorted(batch.prompts) == sorted(wanted.values())


def test_prompts_go_with_their_clips(tmp_path: Path) -> None:
    folder = tmp_path / "levels"
    folder.mkdir()
    for level in (0, 20, 40):
        caption(write_clip(folder / f"{level}.mp4", [ramp(level)] * 3), f"level {level}")
    source = VideoFolder(folder, num_frames=2, fps=10)
    for step in range(4):
        frames, texts = source.draw(step, 2, 8, CPU)
        for clip, text in zip(frames, texts, strict=True):
            assert ramp_index(clip.mean().item()) == pytest.approx(int(text.split()[1]), abs=0.4)
    source.close()


BAD_METADATA = [
    ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n{"file_name": 3, "text": "x"}', "line 2: file_name and"),
    ("metadata.jsonl", '{"file_name": "a.mp4", "caption": "x"}', "the row has file_name, caption"),
    ("metadata.jsonl", "{", "line 1: not valid JSON"),
    ("metadata.jsonl", "[]", "line 1: must be a JSON object"),
    ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n' * 2, "line 2: a.mp4 has a caption already"),
    ("metadata.jsonl", '{"file_name": "b.mp4", "text": "x"}', "names 1 files that are not there: b.mp4"),
    (
        "metadata.jsonl",
        '{"file_name": "a.mp4", "text": "x"}\n{"file_name": "b.mp4", "text": "\\ud800"}',
        "line 2: .* Unicode",
    ),
    ("metadata.jsonl", '{"file_name": "\\udfff.mp4", "text": "x"}', "metadata.jsonl, line 1: .* must be Unicode"),
    ("metadata.jsonl", "[" * 200_000, "line 1: not valid JSON"),
    ("metadata.csv", f"file_name,text\na.mp4,{'x' * 200_000}\n", "metadata.csv, line 2: not valid CSV: field larger"),
    ("metadata.csv", "file_name,caption\na.mp4,x\n", "line 2: file_name and text must both"),
    ("metadata.csv", "file_name,text\na.mp4\n", "line 2: file_name and text must both"),
    ("metadata.csv", "file_name,text\n", "1 files have no caption, which is a row in metadata.csv: a.mp4"),
    ("a.txt", b"\xff\xfe\xfa", "a.txt is not UTF-8 text"),
    ("b.txt", "not its caption", "1 files have no caption, which is a text file of the same name beside it: a.mp4"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_METADATA)
def test_bad_captions_are_refused(folder: Path, name: str, content: str | bytes, message: str) -> None:
    write_clip(folder / "a.mp4", 3)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        VideoFolder(folder, num_frames=1, fps=8)


def test_two_kinds_of_metadata_are_refused(folder: Path) -> None:
    for name in ("metadata.jsonl", "metadata.csv"):
        (folder / name).write_text("")
    with pytest.raises(ValueError, match=r"holds both metadata\.jsonl and metadata\.csv; keep one"):
        VideoFolder(folder, num_frames=1, fps=8)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_all_named(folder: Path) -> None:
    good = caption(write_clip(folder / "good.mp4", 5))
    content = good.read_bytes()
    caption(folder / "noise.mp4").write_bytes(os.urandom(2000))
    caption(folder / "cut.mp4").write_bytes(content[: len(content) // 2])  # its index was at its end
    caption(folder / "empty.webm").write_bytes(b"")
    caption(folder / "text.png").write_text("not a picture")
    with pytest.raises(ValueError) as error:
        VideoFolder(folder, num_frames=1, fps=8)
    message = str(error.value)
    assert message.startswith(f"{folder}: 4 files are unreadable or truncated: cut.mp4 (")
    assert all(name in message for name in ("noise.mp4 (", "empty.webm (", "text.png ("))
    assert "good.mp4" not in message


def test_a_folder_with_the_name_of_a_video_is_searched(folder: Path) -> None:
    (folder / "sub.mp4").mkdir()
    caption(write_clip(folder / "sub.mp4" / "a.mp4", 3))
    source = VideoFolder(folder, num_frames=1, fps=8)
    assert [entry.name for entry in source.entries] == ["sub.mp4/a.mp4"]


def test_links_to_nothing_are_named_and_others_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "link.mp4").symlink_to(caption(write_clip(tmp_path / "elsewhere.mp4", 3)))
    caption(folder / "link.mp4")
    assert len(VideoFolder(folder, num_frames=1, fps=8)) == 1
    (folder / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    caption(folder / "gone.mp4")
    with pytest.raises(FileNotFoundError, match=r"1 files are links to files that do not exist: gone\.mp4$"):
        VideoFolder(folder, num_frames=1, fps=8)


def test_sound_alone_is_no_video(folder: Path) -> None:
    import av

    path = caption(folder / "sound.mkv")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(
        ValueError, match=r"1 files are unreadable or truncated: sound\.mkv \(it holds no video stream\)"
    ):
        VideoFolder(folder, num_frames=1, fps=8)


def test_short_clips_are_refused_by_name_or_left_out(folder: Path) -> None:
    for name, count in (("long.mp4", 20), ("fits.mp4", 10), ("short.mp4", 8), ("shorter.mp4", 2)):
        caption(write_clip(folder / name, count, 10))
    with pytest.raises(
        ValueError, match=r"2 videos are shorter than the 0\.95 s that 10 frames at 10 fps need"
    ) as error:
        VideoFolder(folder, num_frames=10, fps=10)
    assert "short.mp4 (0.80 s), shorter.mp4 (0.20 s); " in str(error.value)
    source = VideoFolder(folder, num_frames=10, fps=10, short_clips="skip")
    assert [entry.name for entry in source.entries] == ["fits.mp4", "long.mp4"]
    fits = [step for step in range(8) if source._order(step, 1) == [0]]
    assert shown(source, fits[0]) == pytest.approx(range(10), abs=0.3)
    with pytest.raises(ValueError, match="holds no captioned videos of 50 frames at 10 fps"):
        VideoFolder(folder, num_frames=50, fps=10, short_clips="skip")


def test_long_lists_are_cut(folder: Path) -> None:
    for index in range(12):
        (folder / f"{index:02}.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"12 files have no caption.*: 00\.mp4, .*, 09\.mp4 and 2 more$"):
        VideoFolder(folder, num_frames=1, fps=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "num_frames must be >= 1, got 0"),
        ({"fps": 0}, "fps must be a finite number above 0, got 0"),
        ({"fps": float("nan")}, "fps must be"),
        ({"crop": "left"}, "crop must be one of center, random, got 'left'"),
        ({"short_clips": "hold"}, "short_clips must be one of refuse, skip, got 'hold'"),
        ({"num_workers": 0}, "num_workers must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoFolder(folder, **{"num_frames": 1, "fps": 8, **changes})


def test_no_folder_and_an_empty_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder of videos"):
        VideoFolder(tmp_path / "nowhere", num_frames=1, fps=8)
    with pytest.raises(ValueError, match="holds no captioned videos or pictures"):
        VideoFolder(folder, num_frames=1, fps=8)
    caption(write_clip(folder / "a.mp4", 3))
    with pytest.raises(ValueError, match="batch_size=0"):
        VideoFolder(folder, num_frames=1, fps=8).draw(0, 0, 8, CPU)


def test_damage_behind_the_beginning_names_the_file(folder: Path) -> None:
    path = caption(write_clip(folder / "a.mp4", 20))
    source = VideoFolder(folder, num_frames=1, fps=8)
    path.write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read any more, or is damaged"):
        draw(source)


# The stream ----------------------------------------------------------------------------------------------------------


def batches(source: VideoFolder, steps: Any, batch_size: int = 4) -> dict[int, Tensor]:
    found = {step: source.draw(step, batch_size, 8, CPU).frames for step in steps}
    source.close()
    return found


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clips")

    def make(**changes: Any) -> VideoFolder:
        return VideoFolder(folder, **{"num_frames": 4, "fps": 8, "crop": "random", **changes})

    wanted = batches(make(), range(4))
    for source, steps in ((make(num_workers=1), (3, 0, 2, 1)), (make(num_workers=7), (2, 2, 3)), (make(), (1,))):
        for step, frames in batches(source, steps).items():
            assert torch.equal(frames, wanted[step])
    assert not torch.equal(wanted[0], wanted[1])
    assert not torch.equal(batches(make(seed=1), [0])[0], wanted[0])


def test_an_epoch_shows_every_file_once(tmp_path: Path) -> None:
    source = VideoFolder(write_folder(tmp_path / "clips", clips=5, frames=4), num_frames=1, fps=8)
    order = [index for step in range(10) for index in source._order(step, 3)]
    epochs = [order[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_the_next_batches_are_decoded_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = VideoFolder(write_folder(tmp_path / "clips"), num_frames=2, fps=8, num_workers=2)
    threads: list[threading.Thread] = []
    original: Callable[..., Tensor] = source._load

    def load(sample: Any) -> Tensor:
        threads.append(threading.current_thread())
        return original(sample)

    monkeypatch.setattr(source, "_load", load)
    source.draw(0, 2, 8, CPU)
    deadline = time.monotonic() + 20
    while len(threads) < 2 * (1 + videos.PREFETCHED_STEPS) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(threads) == 2 * (1 + videos.PREFETCHED_STEPS)
    assert threading.current_thread() not in threads
    ahead = source._ahead[1, 2, 8]
    assert len(ahead) == 2
    assert torch.equal(source.draw(1, 2, 8, CPU).frames[0].transpose(0, 1), ahead[0].result())
    source.close()
    assert not any(thread.is_alive() for thread in threads)


def test_settings_tell_another_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clips")

    def settings(**changes: Any) -> dict[str, Any]:
        return VideoFolder(folder, **{"num_frames": 4, "fps": 8, **changes}).settings()

    before = settings()
    assert json.loads(json.dumps(before)) == before
    assert settings(num_workers=1) == before
    for name, value in (("crop", "random"), ("fps", 4), ("num_frames", 2), ("seed", 5)):
        assert settings(**{name: value}) == {**before, name: value}
    moved = folder.rename(tmp_path / "moved")
    assert VideoFolder(moved, num_frames=4, fps=8).settings() == before
    (moved / "clip1.txt").write_text("another caption")
    assert VideoFolder(moved, num_frames=4, fps=8).settings()["data_fingerprint"] != before["data_fingerprint"]


def test_a_file_is_probed_once(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "clips")
    probed: list[str] = []
    original = videos._probe

    def probe(path: Path) -> Any:
        probed.append(path.name)
        return original(path)

    monkeypatch.setattr(videos, "_probe", probe)
    first = VideoFolder(folder, num_frames=1, fps=8)
    assert sorted(probed) == ["clip0.mp4", "clip1.mp4", "clip2.mp4"]
    assert VideoFolder(folder, num_frames=1, fps=8).entries == first.entries
    assert len(probed) == 3
    write_clip(folder / "clip1.mp4", 30)
    assert VideoFolder(folder, num_frames=1, fps=8).entries[1].probe.num_frames == 30
    assert probed[3:] == ["clip1.mp4"]
    (cache,) = (own_cache / "video_folders").iterdir()
    cache.write_text("damaged")
    VideoFolder(folder, num_frames=1, fps=8)
    assert len(probed) == 7


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder would be")
    assert len(VideoFolder(write_folder(tmp_path / "clips"), num_frames=1, fps=8)) == 3
