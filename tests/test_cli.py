"""The command line over a tiny untrained pipeline: what it writes; that a refusal is one line, exit code 2, no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lumiere_fast import dispatch, training, video
from lumiere_fast.diffusion import EDMSchedule
from lumiere_fast.models import InflationConfig, UNet2D, UNetConfig, inflate
from lumiere_fast.pipelines import LumierePipeline
from lumiere_fast.pipelines.text_to_video import PipelineConfig

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
    result = LumierePipeline.from_pretrained(weights)(
        PROMPT, num_frames=2, num_inference_steps=2, guidance_scale=1.5, generator=torch.Generator().manual_seed(3)
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
        (("--seed", "-1"), ("--seed",)),
        (("--backend", "magic"), ("backend", "magic", "reference")),
        (("--backend", "triton"), ("triton", "not written yet")),
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


def test_a_bad_backend_in_the_environment_is_refused(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "magic")
    assert_refused(generate(capsys, weights, tmp_path / "clip.gif"), "backend", "magic")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "word"),
    [("old.png", "--overwrite"), ("clip.webm", ".mp4, .gif, .png"), ("nowhere/clip.png", "nowhere"), ("clip", ".mp4")],
)
def test_the_output_is_checked_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, word: str
) -> None:
    def loads(*_: object) -> None:
        raise AssertionError("weights were loaded for an output that cannot be written")

    monkeypatch.setattr(LumierePipeline, "from_pretrained", loads)
    (tmp_path / "old.png").write_bytes(b"old")
    assert_refused(run(capsys, "generate", PROMPT, "-o", tmp_path / name), word)
    assert listing(tmp_path) == ["old.png"] and (tmp_path / "old.png").read_bytes() == b"old"


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
    (damaged / "ssr" / "model.safetensors").unlink()
    assert_refused(generate(capsys, damaged, output), "ssr/model.safetensors")
    (damaged / "base" / "config.json").unlink()
    assert_refused(generate(capsys, damaged, output), "base/config.json")
    (damaged / "model_index.json").unlink()
    assert_refused(generate(capsys, damaged, output), "model_index.json")
    assert not output.exists()


def test_truncated_weights_are_refused(capsys: pytest.CaptureFixture[str], damaged: Path, tmp_path: Path) -> None:
    path = damaged / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(generate(capsys, damaged, tmp_path / "clip.gif"), "base/model.safetensors")
    assert not (tmp_path / "clip.gif").exists()


def test_weights_of_another_architecture_name_the_first_key(
    capsys: pytest.CaptureFixture[str], damaged: Path, tmp_path: Path
) -> None:
    path = damaged / "base" / "model.safetensors"
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
    def breaks(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(LumierePipeline, "from_pretrained", breaks)
    with pytest.raises(RuntimeError, match="broken"):
        cli.main(["generate", PROMPT, "-o", str(tmp_path / "clip.gif")])


# ---------------------------------------------------------------- train


def test_train_passes_its_options_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(training, "train", lambda *args, **options: calls.append((args, options)))
    out = tmp_path / "run"
    options = (
        "--from",
        tmp_path,
        "--steps",
        "7",
        "--batch-size",
        "3",
        "--learning-rate",
        "0.5",
        "--seed",
        "4",
        "--resume",
    )
    code, printed, _ = run(capsys, "train", "inflate", "-o", out, *options)
    assert code == 0 and str(out) in printed
    ((positional, named),) = calls
    assert positional == ("inflate", out)
    del named["on_log"]
    assert named == {
        "source": tmp_path,
        "steps": 7,
        "batch_size": 3,
        "learning_rate": 0.5,
        "seed": 4,
        "resume": True,
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("nonsense",), "t2i"),
        (("inflate",), "source"),
        (("t2i", "--steps", "0"), "--steps"),
        (("t2i", "--batch-size", "-1"), "--batch-size"),
        (("t2i", "--device", "abacus"), "--device"),
        (("inflate", "--from", "no-such-folder"), "no-such-folder"),
    ],
)
def test_train_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    assert_refused(run(capsys, "train", *arguments, "-o", tmp_path / "run"), word)
    assert listing(tmp_path) == []


# ---------------------------------------------------------------- assemble and evaluate


def test_assembled_weights_generate(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "joined"
    code, printed, _ = run(capsys, "assemble", weights / "base", weights / "ssr", "-o", out)
    assert code == 0 and str(out) in printed
    assert (
        load_file(out / "base" / "model.safetensors").keys() == load_file(weights / "base" / "model.safetensors").keys()
    )
    code, printed, _ = generate(capsys, out, tmp_path / "clip.png")
    assert code == 0 and f"{SIZE}x{SIZE}" in printed


def test_assemble_refuses(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "joined"
    assert_refused(run(capsys, "assemble", tmp_path / "none", weights / "ssr", "-o", out), "none")
    assert_refused(run(capsys, "assemble", weights / "base", weights / "base", "-o", out), "super-resolution")
    assert_refused(run(capsys, "assemble", weights / "base", weights / "ssr", "-o", weights), "exists")
    assert listing(tmp_path) == []


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
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    for name in ("shape", "colour", "ground", "motion", "all"):
        assert [rows[name][0], rows[name][2]] == [
            f"{expected[stage][name]['accuracy']:.3f}" for stage in ("base", "ssr")
        ]


@pytest.mark.parametrize("options", [("--clips", "0"), ("--weights", "no-such-folder"), ("--backend", "magic")])
def test_evaluate_refuses(capsys: pytest.CaptureFixture[str], weights: Path, options: tuple[str, ...]) -> None:
    assert_refused(run(capsys, "evaluate", "--weights", weights, *options))


# ---------------------------------------------------------------- the rest


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0 and "kernels pending: " in out
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0 and set(json.loads(out)["ops"]) == set(dispatch.registered_ops())


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("generate",)])
def test_a_malformed_command_is_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert_refused(run(capsys, *arguments))


@pytest.mark.parametrize("command", [(), ("generate",), ("train",), ("assemble",), ("evaluate",), ("info",)])
def test_help(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0 and "Usage: lumiere-fast" in out
