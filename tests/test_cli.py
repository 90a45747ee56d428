"""The command line over a tiny untrained pipeline: what it writes; that a refusal is one line, exit code 2, no file."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lumiere_fast import dispatch, training, video
from lumiere_fast.diffusion import (
    CosineSchedule,
    EDMParameterization,
    EDMSchedule,
    Parameterization,
    Schedule,
    VParameterization,
)
from lumiere_fast.models import PRESETS, InflationConfig, Preset, UNet2D, UNetConfig, inflate
from lumiere_fast.models.io import WEIGHTS_NAME
from lumiere_fast.pipelines import LumierePipeline, checkpoint
from lumiere_fast.pipelines.text_to_video import PipelineConfig
from lumiere_fast.text import PromptWarning, WordVectorEncoder
from lumiere_fast.training.run_folder import write_run_files

typer = pytest.importorskip("typer")
cli = pytest.importorskip("lumiere_fast.cli")

PROMPT = "a red ball moving left on a black background"
FRAMES, SIZE, FPS = 4, 16, 8


def tiny(size: int, **changes: Any) -> UNet2D:
    common: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": (1, 1),
        "attention_levels": (1,),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "text_width": 16,
        "text_layers": 1,
        "time_embed_dim": 16,
    }
    return UNet2D(UNetConfig(sample_size=size, **(common | changes)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    inflation = InflationConfig(temporal_factors=(2,), text_layers=1)
    schedule = EDMSchedule()
    pipe = LumierePipeline(
        inflate(tiny(SIZE // 2), inflation),
        inflate(tiny(SIZE, conditioning_channels=3, noise_augmentation=True), inflation),
        PipelineConfig(schedule, schedule, num_frames=FRAMES, fps=FPS, window_frames=FRAMES),
    )
    folder = tmp_path_factory.mktemp("weights")
    pipe.save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, captured.out, captured.err


def generate(capsys: pytest.CaptureFixture[str], weights: Path, output: Path, *options: str) -> tuple[int, str, str]:
    return run(capsys, "generate", PROMPT, "-o", output, "--weights", weights, "--steps", "2", *options)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("lumiere-fast: ") and err.count("\n") == 1 and err.endswith("\n")
    for word in words:
        assert word in err


# ---------------------------------------------------------------- generate


def test_generate_writes_a_video_and_one_closing_line(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    code, out, err = generate(capsys, weights, path, "--backend", "reference")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    for part in (f"{FRAMES} frames of {SIZE}x{SIZE} at {FPS} fps", "base ", "ssr ", "backend reference", str(path)):
        assert part in out
    frames, fps = video.read_video(path)
    assert (len(frames), fps) == (FRAMES, FPS)
    assert listing(tmp_path) == ["clip.mp4"]


def test_generate_is_what_the_pipeline_gives(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    options = ("--seed", "3", "--frames", "2", "--guidance", "1.5", "--quiet", "--threads", "1")
    assert generate(capsys, weights, tmp_path / "clip.png", *options)[0] == 0
    generators = [torch.Generator().manual_seed(3)]
    result = LumierePipeline.from_pretrained(weights)(
        PROMPT, num_frames=2, num_inference_steps=2, guidance_scale=1.5, generator=generators
    )
    with Image.open(tmp_path / "clip.png") as image:
        difference = np.asarray(image).astype(int) - video.contact_sheet(result.frames[0])
    assert np.abs(difference).max() <= 1


def test_the_seed_decides(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert generate(capsys, weights, tmp_path / f"{name}.png", "--seed", seed)[0] == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b and a != c


def test_fps_is_the_file_s(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    assert "at 12 fps" in generate(capsys, weights, tmp_path / "clip.mp4", "--fps", "12")[1]
    assert video.read_video(tmp_path / "clip.mp4")[1] == 12


def test_overwrite(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip.png"
    path.write_bytes(b"old")
    assert generate(capsys, weights, path, "--overwrite")[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def pixels(folder: Path) -> list[Any]:
    """The arrays in a folder, in the order of their names."""
    return [np.load(path) for path in sorted(folder.glob("*.npy"))]


def test_several_prompts_give_numbered_clips(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    """From the command line, then from the file, blank lines left out; each its own with the next seed."""
    (tmp_path / "prompts.txt").write_text("\ufeffa blue star rising\n\n  a green ring  \n", encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    options = ("--prompt-file", str(tmp_path / "prompts.txt"), "--seed", "7", "--batch-size", "2")
    code, printed, err = generate(capsys, weights, out / "clip.npy", *options)
    assert (code, err) == (0, "")
    names = [f"clip_{index:04d}.npy" for index in range(3)]
    assert listing(out) == names
    first, second = printed.splitlines()  # a line a batch
    assert first.endswith(f"{out / names[0]}, {out / names[1]}")
    assert second.endswith(f"; {out / names[2]}")
    made = pixels(out)
    assert all(clip.shape == (FRAMES, SIZE, SIZE, 3) and clip.dtype == np.uint8 for clip in made)
    pipe = LumierePipeline.from_pretrained(weights)
    for index, prompt in enumerate((PROMPT, "a blue star rising", "a green ring")):
        generators = [torch.Generator().manual_seed(7 + index)]
        alone = pipe(prompt, num_inference_steps=2, generator=generators).frames[0]
        difference = np.abs(made[index].astype(int) - video.to_uint8(alone))
        assert difference.max() <= 1  # the batch changes roundings
    assert np.abs(made[0].astype(int) - made[1]).mean() > 1


def test_one_prompt_of_a_file_is_not_numbered(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a blue star rising\n")
    options = ("--prompt-file", tmp_path / "prompts.txt", "-o", tmp_path / "clip", "--weights", weights, "--steps", "1")
    assert run(capsys, "generate", *options)[0] == 0
    assert listing(tmp_path) == ["clip", "prompts.txt"]
    assert listing(tmp_path / "clip") == [f"frame_{index:04d}.png" for index in range(FRAMES)]


def test_the_largest_seed_may_be_counted_on_from(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    options = ("--weights", weights, "--steps", "1", "-o", tmp_path / "a.npy", "--seed")
    assert run(capsys, "generate", "a ball", "a star", *options, str(2**63 - 1))[0] == 0
    assert listing(tmp_path) == ["a_0000.npy", "a_0001.npy"]


def test_what_does_not_reach_the_model_is_said_once(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    long = "red " * 40 + "ball"
    options = ("-o", tmp_path / "a.npy", "--weights", weights, "--steps", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)  # for whatever is not caught and printed
        before = list(warnings.filters)
        code, _, err = run(capsys, "generate", PROMPT, "a красный ball", long, *options)
        assert list(warnings.filters) == before
    assert code == 0
    unknown, cut = err.splitlines()
    assert unknown == (
        "lumiere-fast: warning: prompt 1 has words that the text encoder does not know: 'красный'; "
        "they will not be followed"
    )
    assert cut.startswith("lumiere-fast: warning: prompt 2 is longer than 32 tokens; dropped from its end: ")


@pytest.mark.parametrize(
    ("options", "settings", "dtype"),
    [
        ((), {}, torch.float32),
        (
            ("--sampler", "ddpm", "--threshold", "none"),
            {"sampler": "ddpm", "threshold": None},
            torch.float32,
        ),
        (
            ("--dtype", "bfloat16", "--device", "cpu", "--threshold", "dynamic"),
            {"threshold": "dynamic"},
            torch.bfloat16,
        ),
    ],
)
def test_options_reach_the_pipeline(
    capsys: pytest.CaptureFixture[str],
    weights: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    settings: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    calls: list[tuple[torch.dtype, dict[str, Any]]] = []
    original = LumierePipeline.__call__

    def call(self: LumierePipeline, *args: Any, **given: Any) -> Any:
        calls.append((self.ssr.unet.conv_in.weight.dtype, given))
        return original(self, *args, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LumierePipeline, "__call__", call)
        assert generate(capsys, weights, tmp_path / "clip.npy", *options)[0] == 0
    ((seen, given),) = calls
    del given["generator"]
    assert (seen, given) == (dtype, {"num_inference_steps": 2, "progress": False, **settings})


def test_threads_are_given_back(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    original = LumierePipeline.__call__

    def call(self: LumierePipeline, *args: Any, **options: Any) -> Any:
        seen.append(torch.get_num_threads())
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LumierePipeline, "__call__", call)
        assert generate(capsys, weights, tmp_path / "clip.png", "--threads", "1")[0] == 0
    assert seen == [1] and torch.get_num_threads() == before


def test_progress_goes_to_a_terminal_only(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)
    assert "ssr" in generate(capsys, weights, tmp_path / "a.png")[2]
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)
    assert generate(capsys, weights, tmp_path / "b.png", "--quiet")[2] == ""


# ---------------------------------------------------------------- windows, memory and resuming


def test_windows_and_memory_reach_the_pipeline(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[dict[str, Any], torch.device | None]] = []
    original = LumierePipeline.__call__

    def call(self: LumierePipeline, *args: Any, **given: Any) -> Any:
        seen.append((given, self._offload_device))
        return original(self, *args, **given)

    monkeypatch.setattr(LumierePipeline, "__call__", call)
    options = ("--frames", "6", "--window-frames", "2", "--overlap", "1", "--max-memory", "1GiB", "--offload")
    assert generate(capsys, weights, tmp_path / "clip.npy", *options)[0] == 0
    ((given, offloaded),) = seen
    assert offloaded == torch.device("cpu")
    wanted = {"num_frames": 6, "window_frames": 2, "overlap": 1, "max_memory": "1GiB"}
    assert {name: given[name] for name in wanted} == wanted


def test_the_plan_is_told_with_the_progress(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)
    err = generate(capsys, weights, tmp_path / "a.npy", "--frames", "6")[2]
    for stage in ("base", "ssr"):
        assert len(re.findall(f"^{stage}: 2 windows of 4 frames, overlap 2, exact$", err, re.MULTILINE)) == 1


class Interruption:
    """Ctrl-C after so many states have been kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        save = checkpoint.save_state

        def interrupted(*args: Any) -> None:
            save(*args)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint, "save_state", interrupted)


@pytest.fixture
def interruption(monkeypatch: pytest.MonkeyPatch) -> Interruption:
    return Interruption(monkeypatch)


@pytest.mark.parametrize("after", [1, 4])
def test_the_same_command_goes_on(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, interruption: Interruption, after: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    options = ("--sampler", "ddpm", "--resume")
    assert generate(capsys, weights, tmp_path / "whole.npy", *options)[0] == 0
    interruption.left = after
    code, printed, err = generate(capsys, weights, out / "clip.npy", *options)
    state = out / "clip.npy.resume.safetensors"
    assert (code, printed) == (130, "")
    assert err == f"lumiere-fast: interrupted; the same command goes on from {state}\n"
    assert listing(out) == [state.name]
    assert_refused(generate(capsys, weights, out / "clip.npy", *options, "--seed", "1"), str(state), "seeds was")
    assert_refused(generate(capsys, weights, out / "clip.npy", *options, "--overlap", "1"), "overlap was 2 and is 1")
    assert generate(capsys, weights, out / "clip.npy", *options)[0] == 0
    assert listing(out) == ["clip.npy"]
    assert (out / "clip.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_batches_that_are_done_are_not_made_again(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, interruption: Interruption
) -> None:
    arguments = ("generate", "a ball", "a star", "a ring", "-o", tmp_path / "a.npy", "--weights", weights)
    arguments += ("--steps", "1", "--resume")
    interruption.left = (1 + 8) + 2  # steps of both stages, and then two of the second clip's
    assert run(capsys, *arguments)[0] == 130
    assert listing(tmp_path) == ["a_0000.npy", "a_0001.npy.resume.safetensors"]
    before = (tmp_path / "a_0000.npy").stat().st_mtime_ns
    code, printed, _ = run(capsys, *arguments)
    assert (code, printed.count("\n")) == (0, 3)
    assert printed.startswith(f"kept as they are: {tmp_path / 'a_0000.npy'}\n")
    assert listing(tmp_path) == ["a_0000.npy", "a_0001.npy", "a_0002.npy"]
    assert (tmp_path / "a_0000.npy").stat().st_mtime_ns == before
    assert_refused(run(capsys, *arguments), "a_0000.npy", "exists")


def test_the_state_stays_until_the_clip_is_written(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setitem(video._WRITERS, ".npy", full)
        assert_refused(generate(capsys, weights, tmp_path / "a.npy", "--resume"), "No space left")
    assert listing(tmp_path) == ["a.npy.resume.safetensors"]
    monkeypatch.setattr(UNet2D, "forward", None)  # nothing is computed any more
    assert generate(capsys, weights, tmp_path / "a.npy", "--resume")[0] == 0
    assert listing(tmp_path) == ["a.npy"]


def test_a_batch_of_which_some_is_written_goes_on(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("generate", "a ball", "a star", "-o", tmp_path / "a.npy", "--batch-size", "2", "--weights", weights)
    arguments += ("--steps", "1", "--resume")
    write = video._WRITERS[".npy"]

    def full_after_one(*given: object) -> None:
        if (tmp_path / "a_0000.npy").exists():
            raise OSError("No space left on device")
        write(*given)

    with monkeypatch.context() as patch:
        patch.setitem(video._WRITERS, ".npy", full_after_one)
        assert_refused(run(capsys, *arguments), "No space left")
    assert listing(tmp_path) == ["a_0000.npy", "a_0000.npy.resume.safetensors"]
    first = (tmp_path / "a_0000.npy").read_bytes()
    monkeypatch.setattr(UNet2D, "forward", None)  # nothing is computed any more
    assert run(capsys, *arguments)[0] == 0
    assert listing(tmp_path) == ["a_0000.npy", "a_0001.npy"]
    assert (tmp_path / "a_0000.npy").read_bytes() == first


# ---------------------------------------------------------------- upscale


@pytest.fixture
def small_video(tmp_path: Path) -> Path:
    pytest.importorskip("av")
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 10, 3), dtype=np.uint8)
    video.write_video(pixels, folder / "small.mp4", 12, min_size=1)
    return folder / "small.mp4"


def upscale(
    capsys: pytest.CaptureFixture[str], weights: Path, source: Path, output: Path, *options: str
) -> tuple[int, str, str]:
    settings = ("--prompt", PROMPT, "--weights", weights, "--steps", "2")
    return run(capsys, "upscale", source, "-o", output, *settings, *options)


def test_upscale_raises_a_video_of_any_size(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, small_video: Path
) -> None:
    code, out, err = upscale(capsys, weights, small_video, tmp_path / "a.npy", "--seed", "3")
    assert (code, err) == (0, "")
    for part in ("5 frames of 20x12 at 12 fps; ssr ", "writing ", "backend ", f"{tmp_path / 'a.npy'}\n"):
        assert part in out
    pixels, _ = video.read_video(small_video)
    pipe = LumierePipeline.from_pretrained(weights)
    wanted = pipe.upscale(pixels, PROMPT, num_inference_steps=2, generator=cli._generators(3, 1))
    assert np.array_equal(np.load(tmp_path / "a.npy"), video.to_uint8(wanted.frames[0]))
    assert (
        "3 frames of 20x12 at 4 fps"
        in upscale(capsys, weights, small_video, tmp_path / "b.npy", "--frames", "3", "--fps", "4")[1]
    )


def test_upscale_raises_what_generate_wrote_as_an_array(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 10, 3), dtype=np.uint8)
    np.save(tmp_path / "clip.npy", pixels)
    pipe = LumierePipeline.from_pretrained(weights)
    code, out, _ = upscale(capsys, weights, tmp_path / "clip.npy", tmp_path / "a.npy", "--frames", "4")
    assert code == 0
    assert f"4 frames of 20x12 at {pipe.default_fps:g} fps" in out
    wanted = pipe.upscale(pixels[:4], PROMPT, num_inference_steps=2, generator=cli._generators(0, 1))
    assert np.array_equal(np.load(tmp_path / "a.npy"), video.to_uint8(wanted.frames[0]))


def test_upscale_refuses_other_arrays(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    for name, array in {"real": np.zeros((2, 4, 4, 3)), "flat": np.zeros((4, 4), np.uint8)}.items():
        np.save(tmp_path / f"{name}.npy", array)
        assert_refused(upscale(capsys, weights, tmp_path / f"{name}.npy", output), "uint8 array (T, H, W, 3)", "got")
    np.save(tmp_path / "objects.npy", np.array([{}, ""], dtype=object), allow_pickle=True)
    assert_refused(upscale(capsys, weights, tmp_path / "objects.npy", output), "objects.npy", "holds no array")
    (tmp_path / "text.npy").write_text("text")
    assert_refused(upscale(capsys, weights, tmp_path / "text.npy", output), "text.npy", "holds no array")
    assert not output.exists()


def test_upscale_goes_on(
    capsys: pytest.CaptureFixture[str],
    weights: Path,
    tmp_path: Path,
    small_video: Path,
    interruption: Interruption,
) -> None:
    assert upscale(capsys, weights, small_video, tmp_path / "whole.npy")[0] == 0
    interruption.left = 1
    code, _, err = upscale(capsys, weights, small_video, tmp_path / "a.npy", "--resume")
    assert (code, err.count("\n")) == (130, 1)
    assert upscale(capsys, weights, small_video, tmp_path / "a.npy", "--resume")[0] == 0
    assert listing(tmp_path) == ["a.npy", "in", "whole.npy"]
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--window-frames", "3"), ("window_frames", "3", "2 and 4")),
        (("--overlap", "4"), ("overlap", "4")),
        (("--max-memory", "12 potatoes"), ("max_memory", "12 potatoes", "12GiB")),
        (("--max-memory", "1"), ("max_memory", "allow more")),
        (("--sampler", "magic"), ("sampler", "magic")),
        (("--prompt", " "), ("prompt 0 is empty",)),
        (("--frames", "0"), ("--frames",)),
        (("--output", "a.webm"), (".webm",)),
    ],
)
def test_upscale_refuses_bad_options(
    capsys: pytest.CaptureFixture[str],
    weights: Path,
    tmp_path: Path,
    small_video: Path,
    options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    assert_refused(upscale(capsys, weights, small_video, tmp_path / "a.npy", *options), *words)
    assert listing(tmp_path) == ["in"]


def test_upscale_refuses_what_is_no_video(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    output = tmp_path / "a.npy"
    assert_refused(upscale(capsys, weights, text, output), "INPUT", "text.mp4", "not a video that can be read")
    assert_refused(upscale(capsys, weights, tmp_path / "b.mp4", output), "b.mp4", "is not a file")
    assert_refused(upscale(capsys, weights, tmp_path, output), "is not a file")
    assert listing(tmp_path) == ["text.mp4"]


# ---------------------------------------------------------------- refusals of generate


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--frames", "3"), ("3", "2", "4")),
        (("--frames", "-2"), ("num_frames", "-2")),
        (("--steps", "-1"), ("--steps",)),
        (("--steps", "0"), ("--steps",)),
        (("--steps", "many"), ("--steps",)),
        (("--guidance", "-1"), ("--guidance",)),
        (("--guidance", "nan"), ("guidance",)),
        (("--threads", "0"), ("--threads",)),
        (("--fps", "0"), ("--fps",)),
        (("--fps", "1001"), ("--fps", "1000")),
        (("--steps", "9" * 30), ("--steps", "10000")),
        (("--frames", "9" * 400), ("--frames", "1000000000")),
        (("--seed", "-1"), ("--seed",)),
        (("--sampler", "magic"), ("sampler", "magic", "ddim")),
        (("--threshold", "magic"), ("threshold", "magic", "dynamic")),
        (("--dtype", "int8"), ("--dtype", "int8", "bfloat16")),
        (("--device", "abacus"), ("device must be one of cpu", "abacus")),
        (("--device", "cuda:99"), ("device must be one of cpu", "cuda:99")),
        (("--batch-size", "0"), ("--batch-size",)),
        (("--frames", "800000000"), ("1 x 800000000 frames", "GiB", "fewer frames")),
        (("--window-frames", "3"), ("window_frames", "3", "2 and 4")),
        (("--overlap", "4"), ("overlap", "4")),
        (("--max-memory", "12 potatoes"), ("max_memory", "12 potatoes", "12GiB")),
        (("--max-memory", "1KB"), ("max_memory", "allow more")),
        (("--prompt-file", "no-such-file"), ("--prompt-file", "no-such-file")),
        (("--backend", "magic"), ("backend", "magic", "reference")),
        (("--backend", "triton"), ("triton", "no triton kernel")),
        (("--nonsense",), ("--nonsense",)),
    ],
)
def test_bad_options_are_refused(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(generate(capsys, weights, tmp_path / "clip.gif", *options), *words)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("prompt", ["", "   "])
def test_an_empty_prompt_is_refused(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, prompt: str
) -> None:
    assert_refused(run(capsys, "generate", prompt, "-o", tmp_path / "a.gif", "--weights", weights), "prompt")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("prompts", "content", "words"),
    [
        ((), None, ("no prompt", "--prompt-file")),
        ((), b"\n  \n", ("no prompt",)),
        ((), b"a ball\n\xff\xfe", ("prompts.txt", "UTF-8")),
        ((PROMPT, " "), b"a ball", ("prompt 1 is empty",)),
        ((PROMPT, "\udcff\udcfe ball"), None, ("prompts[1]", "not valid Unicode")),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompts: tuple[str, ...],
    content: bytes | None,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(LumierePipeline, "from_pretrained", None)
    options: tuple[str | Path, ...] = ("-o", tmp_path / "a.gif")
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
        options += ("--prompt-file", tmp_path / "prompts.txt")
    assert_refused(run(capsys, "generate", *prompts, *options), *words)
    assert not (tmp_path / "a.gif").exists()


def test_one_output_that_exists_refuses_them_all(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_0002.gif").write_bytes(b"old")
    options = ("-o", tmp_path / "a.gif", "--weights", weights, "--steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(LumierePipeline, "from_pretrained", None)
        assert_refused(run(capsys, "generate", "a ball", "a star", "a ring", *options), "a_0002.gif", "--overwrite")
    assert listing(tmp_path) == ["a_0002.gif"] and (tmp_path / "a_0002.gif").read_bytes() == b"old"
    assert run(capsys, "generate", "a ball", "a star", "a ring", *options, "--overwrite")[0] == 0
    assert listing(tmp_path) == ["a_0000.gif", "a_0001.gif", "a_0002.gif"]
    assert (tmp_path / "a_0002.gif").read_bytes().startswith(b"GIF8")


def test_a_pickle_is_refused(capsys: pytest.CaptureFixture[str], damaged: Path, tmp_path: Path) -> None:
    (damaged / "ssr" / WEIGHTS_NAME).rename(damaged / "ssr" / "diffusion_pytorch_model.bin")
    assert_refused(generate(capsys, damaged, tmp_path / "clip.gif"), "diffusion_pytorch_model.bin", "pickle", "convert")
    assert not (tmp_path / "clip.gif").exists()


def test_memory_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")

    monkeypatch.setattr(LumierePipeline, "__call__", exhausted)
    assert_refused(generate(capsys, weights, tmp_path / "clip.gif"), "out of memory. Tried")
    assert listing(tmp_path) == []


def test_a_bad_backend_in_the_environment_is_refused(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "magic")
    assert_refused(generate(capsys, weights, tmp_path / "clip.gif"), dispatch.ENVIRONMENT_VARIABLE, "magic")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("old.png", "--overwrite"),
        ("clip.webm", ".mp4, .gif, .png, .npy"),
        ("nowhere/clip.png", "nowhere/clip.png"),
        (".mp4", ".mp4"),
        ("x" * 300 + ".png", "too long"),
    ],
)
def test_the_output_is_checked_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, word: str
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded for an output that cannot be written")

    monkeypatch.setattr(LumierePipeline, "from_pretrained", loads)
    (tmp_path / "old.png").write_bytes(b"old")
    assert_refused(run(capsys, "generate", PROMPT, "-o", tmp_path / name), word)
    assert listing(tmp_path) == ["old.png"] and (tmp_path / "old.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    "command",
    [("generate", PROMPT), ("upscale", "a.mp4", "--prompt", PROMPT), ("train", "t2i"), ("assemble", "base", "ssr")],
    ids=lambda command: command[0],
)
def test_an_empty_output_is_refused_as_such(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run(capsys, *command, "-o", ""), "--output", "it is empty")
    assert listing(tmp_path) == []


def test_an_output_that_another_command_made_meanwhile_is_kept(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / "clip.npy", video._WRITERS[".npy"]

    def slow(pixels: video.Pixels, partial: Path, fps: float) -> None:
        original(pixels, partial, fps)
        path.write_bytes(b"the other's")

    monkeypatch.setitem(video._WRITERS, ".npy", slow)
    assert_refused(generate(capsys, weights, path), "clip.npy", "exists", "--overwrite")
    assert listing(tmp_path) == ["clip.npy"] and path.read_bytes() == b"the other's"


@pytest.fixture
def damaged(weights: Path, tmp_path: Path) -> Path:
    """A copy of the weights to damage."""
    folder = tmp_path / "damaged"
    for path in weights.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(weights)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return folder


def test_missing_weights_are_refused(capsys: pytest.CaptureFixture[str], damaged: Path, tmp_path: Path) -> None:
    output = tmp_path / "clip.gif"
    assert_refused(generate(capsys, tmp_path / "no-such-folder", output), "no-such-folder")
    (damaged / "ssr" / WEIGHTS_NAME).unlink()
    assert_refused(generate(capsys, damaged, output), f"ssr/{WEIGHTS_NAME}")
    (damaged / "base" / "config.json").unlink()
    assert_refused(generate(capsys, damaged, output), "base/config.json")
    (damaged / "model_index.json").unlink()
    assert_refused(generate(capsys, damaged, output), "model_index.json")
    assert not output.exists()


def test_truncated_weights_are_refused(capsys: pytest.CaptureFixture[str], damaged: Path, tmp_path: Path) -> None:
    path = damaged / "base" / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(generate(capsys, damaged, tmp_path / "clip.gif"), f"base/{WEIGHTS_NAME}")
    assert not (tmp_path / "clip.gif").exists()


def test_weights_of_another_architecture_name_the_first_key(
    capsys: pytest.CaptureFixture[str], damaged: Path, tmp_path: Path
) -> None:
    path = damaged / "base" / WEIGHTS_NAME
    tensors = load_file(path)
    first = min(tensors)
    save_file({**tensors, first: torch.zeros(3, 5, 7)}, path)
    assert_refused(generate(capsys, damaged, tmp_path / "clip.gif"), first)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    assert_refused(generate(capsys, damaged, tmp_path / "clip.gif"), first)
    save_file({**tensors, "a.stranger": torch.zeros(1)}, path)
    assert_refused(generate(capsys, damaged, tmp_path / "clip.gif"), "a.stranger")
    assert not (tmp_path / "clip.gif").exists()


@pytest.mark.parametrize("where", ["generating", "writing"])
def test_ctrl_c_ends_in_130_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if where == "generating":
        monkeypatch.setattr(LumierePipeline, "__call__", interrupted)
    else:
        monkeypatch.setitem(video._WRITERS, ".gif", interrupted)
    code, out, _ = generate(capsys, weights, tmp_path / "clip.gif")
    assert (code, out, listing(tmp_path)) == (130, "", [])


def test_a_defect_of_ours_is_not_hidden(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(LumierePipeline, "from_pretrained", breaks)
    with pytest.raises(RuntimeError, match="broken"):
        cli.main(["generate", PROMPT, "-o", str(tmp_path / "clip.gif")])


# ---------------------------------------------------------------- train


def trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the command hands to `training.train`."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(training, "train", lambda *args, **options: calls.append((args, options)))
    code, printed, _ = run(capsys, "train", *arguments)
    assert code == 0 and printed.startswith("trained ")
    ((positional, named),) = calls
    del named["on_log"]
    return positional, named


TRAIN_DEFAULTS: dict[str, Any] = {
    "source": None,
    "data": None,
    "cascade": None,
    "schedule": None,
    "prediction_type": None,
    "text_encoder": None,
    "steps": None,
    "batch_size": None,
    "gradient_accumulation_steps": 1,
    "learning_rate": None,
    "precision": "fp32",
    "gradient_checkpointing": False,
    "crop": "center",
    "short_clips": "refuse",
    "seed": 0,
    "resume": False,
    "device": "cpu",
    "checkpoint_every": 200,
}


def test_train_passes_its_options_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert trained(capsys, monkeypatch, "t2i", "-o", out) == (("t2i", out), TRAIN_DEFAULTS)
    given = {
        "source": tmp_path,
        "data": tmp_path / "clips",
        "cascade": PRESETS["demo"],
        "schedule": "cosine",
        "prediction_type": "v_prediction",
        "text_encoder": None,
        "steps": 7,
        "batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.5,
        "precision": "bf16",
        "gradient_checkpointing": True,
        "crop": "random",
        "short_clips": "skip",
        "seed": 4,
        "resume": True,
        "device": "cpu",
        "checkpoint_every": 9,
    }
    assert given.keys() == TRAIN_DEFAULTS.keys()
    options = (
        *("--from", tmp_path, "--data", tmp_path / "clips", "--preset", "demo", "--schedule", "cosine"),
        *("--prediction-type", "v_prediction", "--steps", "7", "--batch-size", "3", "--learning-rate", "0.5"),
        *("--gradient-accumulation-steps", "2", "--precision", "bf16", "--gradient-checkpointing"),
        *("--crop", "random", "--skip-short", "--seed", "4", "--resume", "--checkpoint-every", "9"),
    )
    assert trained(capsys, monkeypatch, "inflate", "-o", out, *options) == (("inflate", out), given)


def test_train_takes_its_shapes_from_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = dataclasses.replace(PRESETS["demo"], fps=5)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dataclasses.asdict(cascade)))
    _, named = trained(capsys, monkeypatch, "t2i", "-o", tmp_path / "run", "--config", path)
    assert named["cascade"] == cascade
    path.rename(tmp_path / "cascade.json")
    _, named = trained(capsys, monkeypatch, "t2i", "-o", tmp_path / "run", "--config", tmp_path)
    assert named["cascade"] == cascade


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("nonsense",), "t2i"),
        (("inflate",), "source"),
        (("t2i", "--steps", "0"), "--steps"),
        (("t2i", "--batch-size", "-1"), "--batch-size"),
        (("t2i", "--gradient-accumulation-steps", "0"), "--gradient-accumulation-steps"),
        (("t2i", "--checkpoint-every", "0"), "--checkpoint-every"),
        (("t2i", "--device", "abacus"), "device must be one of cpu"),
        (("t2i", "--precision", "fp8"), "precision must be one of fp32, bf16"),
        (("t2i", "--schedule", "linear"), "schedule must be one of edm, cosine"),
        (("t2i", "--prediction-type", "v"), "prediction_type must be one of edm, epsilon, v_prediction, sample"),
        (("t2i", "--preset", "giant"), "--preset must be one of demo, paper"),
        (("t2i", "--preset", "demo", "--config", "x.json"), "give one of them"),
        (("t2i", "--config", "no-such.json"), "no-such.json"),
        (("t2i", "--data", "no-such-folder"), "no-such-folder is not a folder of videos"),
        (("inflate", "--from", "no-such-folder"), "no-such-folder"),
    ],
)
def test_train_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    assert_refused(run(capsys, "train", *arguments, "-o", tmp_path / "run"), word)
    assert listing(tmp_path) == []


def test_train_says_once_what_of_the_captions_is_lost(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same caption comes back at another place of another batch."""

    def train(*_: object, **__: object) -> None:
        for batch in (["a красный ball", PROMPT], [PROMPT, "a красный ball"], ["a синий ball"] * 2):
            WordVectorEncoder().encode(batch)

    monkeypatch.setattr(training, "train", train)
    before = warnings.showwarning
    code, _, err = run(capsys, "train", "t2i", "-o", tmp_path / "run")
    assert code == 0 and warnings.showwarning is before
    assert err.splitlines() == [
        f"lumiere-fast: warning: a caption has words that the text encoder does not know: '{word}'; they will not be "
        "followed"
        for word in ("красный", "синий")
    ]


def test_train_on_a_folder_resume_and_plot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    pytest.importorskip("matplotlib")
    from tests.data.files import write_folder

    monkeypatch.setenv("LUMIERE_FAST_CACHE", str(tmp_path / "cache"))
    common: dict[str, Any] = {"attention_levels": (1,), "block_out_channels": (8, 16), "layers_per_block": (1, 1)}
    common |= {"attention_head_dim": 8, "norm_num_groups": 4, "text_width": 16, "text_layers": 1, "time_embed_dim": 16}
    base = UNetConfig(sample_size=8, **common)
    ssr = UNetConfig(sample_size=16, conditioning_channels=3, noise_augmentation=True, **common)
    inflation = InflationConfig((2,))
    cascade = Preset(base, inflation, ssr, inflation, num_frames=4, fps=8, window_frames=4)
    config = tmp_path / "cascade.json"
    config.write_text(json.dumps(dataclasses.asdict(cascade)))
    data, out = write_folder(tmp_path / "clips"), tmp_path / "run"
    options = ("--data", data, "--config", config, "--steps", "2", "--batch-size", "1", "--threads", "1")
    assert run(capsys, "train", "t2i", "-o", out, *options)[0] == 0
    assert {"log.csv", "loss.png", "cascade.json", "scheduler_config.json"} <= set(listing(out))
    assert_refused(run(capsys, "train", "t2i", "-o", out, *options), "continue it with resume=True (--resume)")
    assert run(capsys, "train", "t2i", "-o", out, *options, "--resume")[0] == 0
    assert_refused(run(capsys, "train", "t2i", "-o", out, *options, "--resume", "--crop", "random"), "crop=center (now")
    (out / "loss.png").unlink()
    code, printed, _ = run(capsys, "plot", out)
    assert (code, printed) == (0, f"{out / 'loss.png'}\n")
    assert (out / "loss.png").exists()
    assert_refused(run(capsys, "plot", tmp_path / "nowhere"), "log.csv is missing")


# ---------------------------------------------------------------- assemble and evaluate


def test_assembled_weights_generate(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "joined"
    code, printed, _ = run(capsys, "assemble", weights / "base", weights / "ssr", "-o", out)
    assert code == 0 and str(out) in printed
    assert load_file(out / "base" / WEIGHTS_NAME).keys() == load_file(weights / "base" / WEIGHTS_NAME).keys()
    code, printed, _ = generate(capsys, out, tmp_path / "clip.png")
    assert code == 0 and f"{SIZE}x{SIZE}" in printed


def test_assemble_refuses(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "joined"
    assert_refused(run(capsys, "assemble", tmp_path / "none", weights / "ssr", "-o", out), "none")
    assert_refused(run(capsys, "assemble", weights / "base", weights / "base", "-o", out), "super-resolution")
    assert_refused(run(capsys, "assemble", weights / "base", weights / "ssr", "-o", weights), "exists")
    assert_refused(run(capsys, "assemble", weights / "base", weights / "ssr", "-o", out, "--dtype", "int8"), "--dtype")
    assert listing(tmp_path) == []


def test_assemble_replaces_a_pipeline_only_if_told(
    capsys: pytest.CaptureFixture[str], weights: Path, damaged: Path
) -> None:
    parts = ("assemble", weights / "base", weights / "ssr", "-o", damaged)
    assert_refused(run(capsys, *parts), "damaged exists and is not empty", "--overwrite")
    assert run(capsys, *parts, "--overwrite", "--dtype", "bfloat16")[0] == 0
    assert {x.dtype for x in load_file(damaged / "base" / WEIGHTS_NAME).values()} == {torch.bfloat16}
    (damaged / "model_index.json").unlink()
    assert_refused(run(capsys, *parts, "--overwrite"), "something else")


def run_folder(folder: Path, model: Path, fps: int, schedule: Schedule, parameterization: Parameterization) -> Path:
    """The folder of a finished training run of a cascade with this frame rate."""
    shutil.copytree(model, folder)
    cascade = dataclasses.replace(PRESETS["demo"], num_frames=8, fps=fps, window_frames=4)
    write_run_files(folder, cascade, schedule, parameterization)
    return folder


def test_an_assembled_pipeline_samples_as_its_models_were_trained(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path
) -> None:
    noising = (CosineSchedule(shift=-1.0), VParameterization())
    base = run_folder(tmp_path / "base", weights / "base", 12, *noising)
    other = (EDMSchedule(train_mean=0.7), EDMParameterization(0.3))
    ssr = run_folder(tmp_path / "ssr", weights / "ssr", 12, *other)
    assert run(capsys, "assemble", base, ssr, "-o", tmp_path / "joined")[0] == 0
    config = LumierePipeline.from_pretrained(tmp_path / "joined").config
    assert (config.base_schedule, config.base_parameterization) == noising
    assert (config.ssr_schedule, config.ssr_parameterization) == other
    assert (config.num_frames, config.fps, config.window_frames) == (8, 12, 4)

    stranger = run_folder(tmp_path / "stranger", weights / "ssr", 24, *other)
    assert_refused(run(capsys, "assemble", base, stranger, "-o", tmp_path / "x"), "different cascades", "stranger")
    assert not (tmp_path / "x").exists()


def test_evaluate_prints_what_the_scorer_found(
    capsys: pytest.CaptureFixture[str], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--weights", weights, "--clips", "3", "--batch-size", "2", "--steps", "1", "--seed", "9")
    code, printed, err = run(capsys, "evaluate", *options, "--json")
    assert (code, err) == (0, "")
    pipe = LumierePipeline.from_pretrained(weights)
    expected = training.evaluate_pipeline(pipe, 3, batch_size=2, seed=9, num_inference_steps=1)
    assert json.loads(printed) == expected
    code, printed, _ = run(capsys, "evaluate", *options)
    rows = {row[0]: row[1:] for row in (re.split(r"\s{2,}", line) for line in printed.splitlines())}
    labels = {name: name for name in ("shape", "colour", "ground", "motion")}
    for name, label in (labels | {"look": "colour, ground and shape", "all": "all four"}).items():
        assert [cell.split()[0] for cell in rows[label]] == [
            f"{expected[stage][name]['accuracy']:.3f}" for stage in ("base", "ssr")
        ]


def test_evaluate_moves_the_pipeline(
    capsys: pytest.CaptureFixture[str], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[object] = []
    monkeypatch.setattr(LumierePipeline, "to", lambda self, place: places.append(place) or self)
    options = ("--weights", weights, "--clips", "1", "--steps", "1", "--device", "cpu")
    assert run(capsys, "evaluate", *options)[0] == 0
    assert places == [torch.device("cpu")]


@pytest.mark.parametrize(
    "options",
    [("--clips", "0"), ("--weights", "no-such-folder"), ("--backend", "magic"), ("--device", "cuda:99")],
)
def test_evaluate_refuses(capsys: pytest.CaptureFixture[str], weights: Path, options: tuple[str, ...]) -> None:
    assert_refused(run(capsys, "evaluate", "--weights", weights, *options))


# ---------------------------------------------------------------- the rest


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0 and "kernels pending: " in out
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0 and set(json.loads(out)["ops"]) == set(dispatch.registered_ops())


@pytest.mark.parametrize("arguments", [("frobnicate",), ("generate",)])
def test_a_malformed_command_is_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert_refused(run(capsys, *arguments))


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert "Usage: lumiere-fast" in err and "generate" in err


@pytest.mark.parametrize("module", ["lumiere_fast", "lumiere_fast.cli"])
def test_the_package_is_the_command(module: str) -> None:
    command = [sys.executable, "-m", module, "plot", "no-such-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lumiere-fast: no-such-run") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [(), ("generate",), ("train",), ("plot",), ("assemble",), ("evaluate",), ("info",)])
def test_help(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0 and "Usage: lumiere-fast" in out
