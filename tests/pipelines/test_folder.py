"""Pipelines on disk: the layout of diffusers, what is refused, and that nothing is lost when a save fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lumiere_fast import LumierePipeline
from lumiere_fast.diffusion import CosineSchedule, EDMParameterization, EDMSchedule, VParameterization
from lumiere_fast.models.io import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, save_model
from lumiere_fast.pipelines import folder as layout
from lumiere_fast.pipelines.text_to_video import PipelineConfig
from tests.models.tiny import tiny_unet
from tests.pipelines.tiny import make_pipeline

BALL = "a red ball moving left"


@pytest.fixture(scope="module")
def pipe() -> LumierePipeline:
    """Two stages that were trained in different ways."""
    made = make_pipeline()
    config = PipelineConfig(
        EDMSchedule(sigma_max=20.0, train_mean=0.3),
        CosineSchedule(shift=-1.5),
        num_frames=4,
        fps=8,
        window_frames=4,
        base_parameterization=EDMParameterization(0.7),
        ssr_parameterization=VParameterization(),
    )
    return LumierePipeline(made.base, made.ssr, config)


@pytest.fixture(scope="module")
def saved(pipe: LumierePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "new" / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved pipeline, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def clip(pipe: LumierePipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    frames: Tensor = pipe(BALL, num_inference_steps=2, ssr_num_inference_steps=2, generator=generator).frames
    return frames


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The layout ----------------------------------------------------------------------------------------------------------


def test_the_files_are_those_of_diffusers(saved: Path) -> None:
    models = [f"{stage}/{name}" for stage in ("base", "ssr") for name in ("config.json", WEIGHTS_NAME)]
    schedulers = [f"{stage}_scheduler/scheduler_config.json" for stage in ("base", "ssr")]
    assert sorted(content(saved)) == sorted([*models, *schedulers, "model_index.json", "text_encoder/config.json"])
    assert json.loads((saved / "model_index.json").read_text()) == {
        "_class_name": "LumierePipeline",
        "_lumiere_fast_version": version("lumiere_fast"),
        "base": ["lumiere_fast", "STUNet"],
        "ssr": ["lumiere_fast", "STUNet"],
        "base_scheduler": ["lumiere_fast", "EDMSchedule"],
        "ssr_scheduler": ["lumiere_fast", "CosineSchedule"],
        "text_encoder": ["lumiere_fast", "WordVectorEncoder"],
        "num_frames": 4,
        "fps": 8,
        "window_frames": 4,
    }
    scheduler = json.loads((saved / "ssr_scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["shift"]) == ("CosineSchedule", -1.5)
    assert scheduler["parameterization"] == {"_class_name": "VParameterization"}


def test_what_is_saved_is_loaded(pipe: LumierePipeline, saved: Path) -> None:
    pytest.importorskip("tokenizers")
    for given in (saved, str(saved)):
        loaded = LumierePipeline.from_pretrained(given)
        assert loaded.config == pipe.config
        assert not loaded.base.training
        assert not loaded.ssr.training
    for mine, theirs in ((loaded.base, pipe.base), (loaded.ssr, pipe.ssr)):
        weights = theirs.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in mine.state_dict().items())
    torch.testing.assert_close(clip(loaded), clip(pipe), rtol=0, atol=1e-4)


def test_the_models_load_on_their_own(pipe: LumierePipeline, saved: Path) -> None:
    model = type(pipe.base).from_pretrained(saved / "base")
    assert torch.equal(model.unet.conv_in.weight, pipe.base.unet.conv_in.weight)


def test_half_precision_on_disk(pipe: LumierePipeline, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pipe.save_pretrained(tmp_path, dtype=torch.float16)  # a folder that is empty
    assert {x.dtype for x in load_file(tmp_path / "ssr" / WEIGHTS_NAME).values()} == {torch.float16}
    loaded = LumierePipeline.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.ssr.parameters()} == {torch.float32}
    assert (clip(loaded) - clip(pipe)).abs().mean() < 0.02


def test_half_precision_in_memory(pipe: LumierePipeline, saved: Path) -> None:
    pytest.importorskip("tokenizers")
    loaded = LumierePipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert {p.dtype for model in (loaded.base, loaded.ssr) for p in model.parameters()} == {torch.bfloat16}
    frames = clip(loaded)
    assert frames.dtype == torch.float32
    assert 0 < (frames - clip(pipe)).abs().mean() < 0.1
    with pytest.raises(ValueError, match=r"torch_dtype must be a floating torch\.dtype"):
        LumierePipeline.from_pretrained(saved, torch_dtype=torch.int64)


def test_shards(pipe: LumierePipeline, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    pipe.save_pretrained(tmp_path / "tiny", max_shard_size=50_000)
    for stage in ("base", "ssr"):
        assert (tmp_path / "tiny" / stage / WEIGHTS_INDEX_NAME).is_file()
        assert not (tmp_path / "tiny" / stage / WEIGHTS_NAME).exists()
    assert torch.equal(clip(LumierePipeline.from_pretrained(tmp_path / "tiny")), clip(pipe))


# Where it may be saved -----------------------------------------------------------------------------------------------


def test_a_pipeline_is_kept_unless_told(folder: Path) -> None:
    pytest.importorskip("tokenizers")
    before = content(folder)
    other = make_pipeline(seed=3)
    with pytest.raises(FileExistsError, match=r"tiny exists and is not empty; .* overwrite=True \(--overwrite\)"):
        other.save_pretrained(folder)
    assert content(folder) == before
    (folder / "README.md").write_text("mine")
    (folder / "tokenizer").mkdir()  # of a text encoder that the new pipeline does not have
    (folder / "base" / WEIGHTS_INDEX_NAME).write_text("{}")
    other.save_pretrained(folder, overwrite=True)
    assert set(content(folder)) == {*before, "README.md"}
    assert not (folder / "tokenizer").exists()
    assert torch.equal(clip(LumierePipeline.from_pretrained(folder)), clip(other))


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"model_index.json": '{"_class_name": "StableDiffusionPipeline"}', "base/x": "mine"},
        {"model_index.json": "{"},
    ],
)
def test_a_folder_of_something_else_is_never_replaced(
    pipe: LumierePipeline, tmp_path: Path, files: dict[str, str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match="holds something else than a LumierePipeline"):
        pipe.save_pretrained(tmp_path, overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_the_folder_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    before = content(folder)

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(layout, "write_index", fails)  # the last thing that is written
    target = folder if exists else tmp_path / "fresh"
    with pytest.raises(OSError, match="no space"):
        make_pipeline(seed=3).save_pretrained(target, overwrite=True)
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("count", range(1, 13))
def test_an_interruption_while_files_are_moved_leaves_the_old_pipeline(
    folder: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """At each of the renames: 6 entries out, 6 in."""
    before = content(folder)
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == count:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_pipeline(seed=3).save_pretrained(folder, overwrite=True)
    assert content(folder) == before


def test_there_is_no_moment_at_which_two_pipelines_are_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is the first file to go and the last to come."""
    rename, present = Path.rename, []

    def watching(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        present.append((folder / "model_index.json").exists())
        return moved

    monkeypatch.setattr(Path, "rename", watching)
    make_pipeline(seed=3).save_pretrained(folder, overwrite=True)
    assert present == [False] * 11 + [True]


# What is refused -----------------------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(folder: Path, **changes: Any) -> None:
    edit(folder / "model_index.json", **changes)


def edit_scheduler(folder: Path, **changes: Any) -> None:
    edit(folder / "base_scheduler" / "scheduler_config.json", **changes)


def swap_models(folder: Path) -> None:
    (folder / "base").rename(folder / "spare")
    (folder / "ssr").rename(folder / "base")
    (folder / "spare").rename(folder / "ssr")


def to_pickle(folder: Path) -> None:
    (folder / "ssr" / WEIGHTS_NAME).rename(folder / "ssr" / "diffusion_pytorch_model.bin")


def to_old_layout(folder: Path) -> None:
    schedule = {"sigma_min": 0.02, "sigma_max": 80.0}
    index = {"_class_name": "LumierePipeline", "base_schedule": schedule, "ssr_schedule": schedule, "num_frames": 16}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: edit_index(f, _class_name="StableDiffusionPipeline"),
            "expected _class_name LumierePipeline, got 'Stab",
        ),
        (lambda f: edit_index(f, scheduler="x"), r"not a pipeline of this version: unknown entries \['scheduler'\]"),
        (to_old_layout, r"model_index\.json: not a pipeline of this version: unknown entries \['base_schedule', 'ssr_"),
        (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json is not valid JSON"),
        (lambda f: edit_index(f, base=["os", "system"]), r"base must be \['lumiere_fast', 'STUNet'\], got \['os'"),
        (lambda f: edit_index(f, ssr="STUNet"), r"ssr must be \['lumiere_fast', 'STUNet'\], got 'STUNet'"),
        (lambda f: edit_index(f, ssr_scheduler=["diffusers", "DDIMScheduler"]), "ssr_scheduler must be .*CosineSched"),
        (lambda f: edit_index(f, text_encoder=["transformers", "CLIPTextModel"]), "text_encoder must be .*T5Encoder"),
        (lambda f: edit_index(f, fps="x"), r"model_index\.json: fps must be an integer >= 1, got 'x'"),
        (lambda f: edit_index(f, fps=10**9), r"model_index\.json: fps must be at most 1000, got 1000000000"),
        (
            lambda f: edit_index(f, num_frames=7),
            "num_frames must be a multiple of 2, the models' temporal factor, got 7",
        ),
        (lambda f: edit_index(f, window_frames=3), "window_frames must be a multiple of 2, .* got 3"),
        (lambda f: edit_index(f, window_frames=0), "window_frames must be an integer >= 1, got 0"),
        (lambda f: edit_index(f, num_frames=True), "num_frames must be an integer >= 1, got True"),
        (
            lambda f: edit_scheduler(f, _class_name="CosineSchedule"),
            r"expected _class_name EDMSchedule, as model_index[.]json says",
        ),
        (lambda f: edit_scheduler(f, sigma_min=100), r"scheduler_config\.json: sigma_min must"),
        (lambda f: edit_scheduler(f, beta=1), r"scheduler_config\.json: EDMSchedule has no setting beta"),
        (lambda f: edit_scheduler(f, parameterization=None), r"scheduler_config\.json: expected an object"),
        (lambda f: edit_scheduler(f, parameterization={"sigma_data": -1}), "sigma_data must be a number > 0, got -1"),
        (lambda f: edit(f / "text_encoder" / "config.json", name="word-vectors-v0"), "read the text encoder 'word-vec"),
        (lambda f: (f / "base" / WEIGHTS_NAME).write_bytes(b"123"), r"base/diffusion_\S+\.safetensors is truncated"),
        (to_pickle, r"ssr/\S+ is missing: diffusion_pytorch_model\.bin is a pickle, .* convert it: python -c"),
        (swap_models, "look at their order"),
        (
            lambda f: shutil.copy(f / "base" / WEIGHTS_NAME, f / "ssr" / WEIGHTS_NAME),
            r"ssr/diffusion_\S+\.safetensors: these weights are of another architecture: 'unet\.\S+'",
        ),
        (
            lambda f: save_model(tiny_unet(dtype=torch.float32), f / "base"),
            "base holds a UNet2D, a STUNet is needed",
        ),
    ],
)
def test_a_damaged_folder_is_told(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        LumierePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (".", "is not a folder of weights; give one, or a shipped model: demo"),
        ("model_index.json", r"model_index\.json is missing"),
        ("ssr", "ssr is not a folder"),
        ("base/config.json", r"base/config\.json is missing"),
        (f"base/{WEIGHTS_NAME}", r"base/diffusion_pytorch_model\.safetensors is missing"),
        ("ssr_scheduler", "ssr_scheduler is not a folder"),
        ("text_encoder", "text_encoder is not a folder"),
    ],
)
def test_what_is_missing_is_named(folder: Path, missing: str, message: str) -> None:
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        LumierePipeline.from_pretrained(folder)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a file, a folder of weights is needed"):
        LumierePipeline.from_pretrained(folder / "model_index.json")
    (folder / "pipe.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pipe\.ckpt is a pickle"):
        LumierePipeline.from_pretrained(folder / "pipe.ckpt")
