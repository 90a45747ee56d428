from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lumiere_fast import InflationConfig, LumierePipeline, STUNet, UNet2D, UNetConfig, inflate
from lumiere_fast.models import PRESETS, io
from lumiere_fast.models.config import config_from_dict, config_to_dict
from lumiere_fast.models.io import (
    CONFIG_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    load_model,
    load_stunet,
    load_weights,
    read_json,
    save_model,
    shard_bytes,
)
from tests.models.tiny import draw_inputs, randomise, tiny_config, tiny_unet


def video_model(**changes: Any) -> STUNet:
    inflation = {"temporal_factors": (2,), "temporal_conditioning": True, **changes}
    return randomise(inflate(tiny_unet(dtype=torch.float32), **inflation))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved video model."""
    save_model(video_model(), tmp_path / "model")
    return tmp_path / "model"


# Configurations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_json(name: str) -> None:
    preset = PRESETS[name]
    for config in (preset.base, preset.base_inflation, preset.ssr, preset.ssr_inflation):
        assert config_from_dict(type(config), json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_fit_together(name: str) -> None:
    preset = PRESETS[name]
    assert preset.num_frames % preset.base_inflation.temporal_factor == 0
    assert preset.window_frames % preset.ssr_inflation.temporal_factor == 0
    assert preset.ssr.conditioning_channels == 3
    for unet, inflation in ((preset.base, preset.base_inflation), (preset.ssr, preset.ssr_inflation)):
        assert len(inflation.temporal_factors) == len(unet.block_out_channels) - 1


def test_the_paper_preset_has_the_documented_levels() -> None:
    """80x128x128 at four levels of T = 80/40/20/10 and widths 256/512/768/1024; windows of 8 frames at 1024."""
    paper = PRESETS["paper"]
    assert (paper.num_frames, paper.fps, paper.window_frames) == (80, 16, 8)
    assert (paper.base.sample_size, paper.base.block_out_channels) == (128, (256, 512, 768, 1024))
    assert (paper.ssr.sample_size, paper.ssr.block_out_channels) == (1024, (128, 256, 512, 1024))
    assert paper.base_inflation.temporal_factors == (2, 2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": (1,)}, "layers_per_block has 1 entries, block_out_channels 2"),
        ({"attention_levels": (2,)}, r"attention_levels \(2,\) must index the 2 levels"),
        ({"sample_size": 15}, "sample_size 15 is not a multiple of 2"),
        ({"norm_num_groups": 5}, "width 16 is not a multiple of norm_num_groups=5"),
        ({"norm_num_groups": 0}, "norm_num_groups must hold integers >= 1, got 0"),
        ({"layers_per_block": (1, 0)}, "layers_per_block must hold integers >= 1"),
        ({"sample_size": "16"}, "sample_size must hold integers >= 1, got 16"),
        ({"block_out_channels": (16, 24.0)}, "block_out_channels must hold integers"),
        ({"block_out_channels": (), "layers_per_block": (), "attention_levels": ()}, "block_out_channels must hold"),
        ({"attention_head_dim": 16}, "width 24 of level 1 is not a multiple of attention_head_dim=16"),
        ({"text_width": 18}, "text_width must be a multiple of 4, got 18"),
        ({"time_embed_dim": 21}, "time_embed_dim must be a multiple of 4, got 21"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_unknown_and_missing_keys_are_named() -> None:
    values = config_to_dict(InflationConfig((2, 2)))
    with pytest.raises(ValueError, match=r"not a InflationConfig: unknown keys \['taps'\], missing keys \[\]"):
        config_from_dict(InflationConfig, values | {"taps": 3})
    del values["temporal_factors"]
    with pytest.raises(ValueError, match=r"missing keys \['temporal_factors'\]"):
        config_from_dict(InflationConfig, values)


def test_temporal_factor_is_the_product() -> None:
    assert InflationConfig((2, 1, 4)).temporal_factor == 8
    assert (
        UNetConfig(
            32, (16, 16, 16), (1, 1, 1), (), patch_size=2, norm_num_groups=4, attention_head_dim=16
        ).spatial_factor
        == 8
    )


# Saving and loading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [video_model, lambda: tiny_unet(ssr=True, dtype=torch.float32)], ids=["video", "image"]
)
def test_what_is_saved_is_loaded(make: Callable[[], UNet2D | STUNet], tmp_path: Path) -> None:
    model = make()
    save_model(model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    inputs = draw_inputs(model, 1, 4, 8, 8)
    assert torch.equal(loaded(**inputs), model(**inputs))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", WEIGHTS_NAME]


def test_a_loaded_video_model_is_frozen_like_an_inflated_one(folder: Path) -> None:
    loaded = load_stunet(folder)
    assert loaded.inflation_config == InflationConfig((2,), temporal_conditioning=True)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == set(loaded.new_parameters())
    assert not loaded.train().unet.training


def test_half_precision_on_disk_is_single_precision_in_memory(tmp_path: Path) -> None:
    model = video_model()
    save_model(model, tmp_path, dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS_NAME).values()} == {torch.float16}
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float()), name


def test_channels_last_weights_are_saved_by_value(tmp_path: Path) -> None:
    model = tiny_unet(dtype=torch.float32)
    save_model(model.to(memory_format=torch.channels_last), tmp_path)
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_saving_again_replaces(folder: Path) -> None:
    model = randomise(video_model(), seed=9)
    save_model(model, folder)
    assert torch.equal(load_stunet(folder).unet.conv_in.weight, model.unet.conv_in.weight)
    assert not list(folder.glob("*.partial"))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / WEIGHTS_NAME
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_the_first_missing_key_in_the_models_order_is_named(folder: Path) -> None:
    names = list(load_model(folder).state_dict())
    first, second = names[7], names[20]

    def drop(weights: dict[str, Tensor]) -> None:
        del weights[second], weights[first]

    edit_weights(folder, drop)
    with pytest.raises(ValueError, match=f"another architecture: '{first}' is missing"):
        load_model(folder)


def test_a_key_of_another_shape_is_named(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"unet.conv_in.weight": torch.zeros(16, 6, 3, 3)}))
    message = r"'unet.conv_in.weight' has shape \(16, 6, 3, 3\), the model wants \(16, 3, 3, 3\)"
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_an_extra_key_is_named(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"unet.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"the model has no 'unet\.extra'"):
        load_model(folder)


def test_weights_of_another_configuration_name_their_first_key(folder: Path) -> None:
    edit_config(folder, lambda config: config["unet"].update(block_out_channels=[16, 32]))
    with pytest.raises(ValueError, match=r"'unet\.down_levels\.1\.layers\.0\.\S+' has shape"):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights_are_told(folder: Path, kept: float) -> None:
    path = folder / WEIGHTS_NAME
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_model(folder)


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_model(folder / "nowhere")
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"model\.safetensors is missing: a model folder holds config\.json and",
    ):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"{}", "expected _class_name UNet2D with 'unet', or STUNet with 'unet' and 'inflation'"),
        (b'{"_class_name": ["STUNet"]}', "expected _class_name"),
        (b'{"_class_name": "UNet2D", "unet": null}', "config.json: "),
        (b'{"_class_name": "UNet2D", "unet": {"depth": 3}}', r"not a UNetConfig: unknown keys \['depth'\]"),
    ],
)
def test_damaged_configurations_are_told(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["unet"].update(depth=3), r"config\.json: not a UNetConfig: unknown keys \['depth'\]"),
        (lambda config: config["unet"].update(sample_size=7), r"config\.json: sample_size 7 is not a multiple"),
        (lambda config: config["unet"].update(block_out_channels=16), r"config\.json: "),
        (lambda config: config["inflation"].update(temporal_factors=[2, 2]), "one factor for each of the 1 spatial"),
        (lambda config: config.pop("inflation"), "expected _class_name"),
    ],
)
def test_impossible_saved_configurations_name_the_file(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_config(folder, change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_an_image_model_is_refused_where_a_video_model_is_needed(tmp_path: Path) -> None:
    save_model(tiny_unet(dtype=torch.float32), tmp_path)
    with pytest.raises(ValueError, match="holds a UNet2D, a STUNet is needed"):
        load_stunet(tmp_path)


# The two methods of a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [video_model, lambda: tiny_unet(dtype=torch.float32)], ids=["video", "image"])
def test_save_pretrained_and_from_pretrained(make: Callable[[], UNet2D | STUNet], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(str(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["_class_name"], config["_lumiere_fast_version"]) == (type(model).__name__, version("lumiere_fast"))
    loaded = type(model).from_pretrained(str(tmp_path / "model"))
    inputs = draw_inputs(model, 1, 4, 8, 8)
    assert torch.equal(loaded(**inputs), model(**inputs))
    assert safe_open(tmp_path / "model" / WEIGHTS_NAME, framework="pt").metadata() == {"format": "pt"}


def test_from_pretrained_is_of_its_class(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds a STUNet, not a UNet2D"):
        UNet2D.from_pretrained(folder)


def test_torch_dtype(folder: Path) -> None:
    half = STUNet.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name, tensor in STUNet.from_pretrained(folder).state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.bfloat16()), name
    for wrong in (torch.int8, "float16"):
        with pytest.raises(ValueError, match=r"torch_dtype must be a floating torch\.dtype"):
            STUNet.from_pretrained(folder, torch_dtype=wrong)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_that_is_not_empty_is_kept_unless_told(folder: Path) -> None:
    before = content(folder)
    with pytest.raises(FileExistsError, match="model exists and is not empty"):
        video_model().save_pretrained(folder)
    assert content(folder) == before
    (folder / "README.md").write_text("mine")
    other = tiny_unet(dtype=torch.float32, seed=4)
    other.save_pretrained(folder, overwrite=True)
    assert torch.equal(UNet2D.from_pretrained(folder).conv_in.weight, other.conv_in.weight)
    assert sorted(content(folder)) == ["README.md", "config.json", WEIGHTS_NAME]


@pytest.mark.parametrize(
    "files", [{"notes.txt": "mine"}, {"config.json": "{"}, {"config.json": '{"_class_name": "UNet2DConditionModel"}'}]
)
def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match="holds something else than a UNet2D or STUNet"):
        video_model().save_pretrained(tmp_path, overwrite=True)
    assert content(tmp_path) == before


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        video_model().save_pretrained(tmp_path / "model", overwrite=True)


# Shards --------------------------------------------------------------------------------------------------------------

SHARD = 20_000  # bytes: a tiny model makes several


def test_a_large_model_is_saved_in_shards_and_loaded_again(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    model = video_model()
    model.save_pretrained(tmp_path, max_shard_size=SHARD)
    index = json.loads((tmp_path / WEIGHTS_INDEX_NAME).read_text())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count > 3
    assert shards == [f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert sorted(content(tmp_path)) == sorted([*shards, CONFIG_NAME, WEIGHTS_INDEX_NAME])
    sizes = {name: sum(t.nbytes for t in load_file(tmp_path / name).values()) for name in shards}
    largest = max(t.nbytes for t in model.state_dict().values())
    assert max(sizes.values()) <= max(SHARD, largest)
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / shard)
    loaded = STUNet.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_shards_are_planned_for_the_dtype_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    model = tiny_unet(dtype=torch.float32)
    size = sum(t.nbytes for t in model.state_dict().values())
    model.save_pretrained(tmp_path / "half", dtype=torch.float16, max_shard_size=size // 2)
    assert sorted(content(tmp_path / "half")) == ["config.json", WEIGHTS_NAME]
    model.save_pretrained(tmp_path / "single", max_shard_size=size // 2)
    assert (tmp_path / "single" / WEIGHTS_INDEX_NAME).is_file()
    model.save_pretrained(tmp_path / "text", max_shard_size="20KB")
    assert (tmp_path / "text" / WEIGHTS_INDEX_NAME).is_file()
    model.save_pretrained(tmp_path / "default")
    assert sorted(content(tmp_path / "default")) == ["config.json", WEIGHTS_NAME]


def test_only_shards_need_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = video_model()
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(STUNet.from_pretrained(tmp_path / "whole").unet.conv_in.weight, model.unet.conv_in.weight)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        model.save_pretrained(tmp_path / "shards", max_shard_size=SHARD)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    "size", ["many", "3 apples", "", None, 0, -5, True, 2.5, "-2GB", "0GB", "0.0001KB", "nanGB", "GB", "2GiB", "2"]
)
def test_a_shard_size_that_is_none_is_refused(tmp_path: Path, size: Any) -> None:
    message = 'max_shard_size must be a number of bytes >= 1 or a string such as "2GB", got'
    with pytest.raises(ValueError, match=message):
        video_model().save_pretrained(tmp_path / "model", max_shard_size=size)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("size", "count"), [(7, 7), ("2GB", 2 * 10**9), ("1.5 kb", 1500), ("3MB", 3 * 10**6), (" 1TB ", 10**12)]
)
def test_shard_sizes_in_words(size: int | str, count: int) -> None:
    assert shard_bytes(size) == count


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_weights_that_are_not_floating_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    model = video_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    tensors["unet.conv_in.bias"] = tensors["unet.conv_in.bias"].to(dtype)
    message = f"'unet.conv_in.bias' is {dtype}; weights must be floating"
    with pytest.raises(ValueError, match=message):
        load_weights(model, tensors, tmp_path / "state")
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=rf"{WEIGHTS_NAME}: {message}"):
        STUNet.from_pretrained(tmp_path)


def test_brackets_without_end_are_bad_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON: "):
        read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"no/x\.json is missing: .*no is not a folder"):
        read_json(tmp_path / "no" / "x.json")


@pytest.mark.parametrize("name", ["model", "state", "json"])
def test_a_full_disk_is_an_os_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """safetensors has an error of its own for it, and the system's names no file."""

    def half(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def half_text(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "save_file", half)
    write: dict[str, Callable[[], object]] = {
        "model": lambda: video_model().save_pretrained(tmp_path),
        "state": lambda: io.save_file_atomically({}, tmp_path / "training.safetensors"),
        "json": lambda: io.write_json_atomically({}, tmp_path / "a.json"),
    }
    if name == "json":
        monkeypatch.setattr(Path, "write_text", half_text)
    file = {"model": WEIGHTS_NAME, "state": "training.safetensors", "json": "a.json"}[name]
    with pytest.raises(OSError, match=rf"{tmp_path / file} could not be written: .*No space left"):
        write[name]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [None, 3])
def test_what_is_no_path_is_refused(folder: Any) -> None:
    for call in (STUNet.from_pretrained, video_model().save_pretrained, LumierePipeline.from_pretrained):
        with pytest.raises(ValueError, match=f"the path of a folder is needed, a str or a Path, got {folder}"):
            call(folder)


def test_shards_and_one_file_replace_each_other(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    models = [randomise(video_model(), seed) for seed in range(4)]
    for model, limit in zip(models, (SHARD, 10**9, 2 * SHARD, SHARD), strict=True):
        model.save_pretrained(tmp_path, max_shard_size=limit, overwrite=tmp_path.joinpath(CONFIG_NAME).exists())
        loaded = STUNet.from_pretrained(tmp_path)
        assert torch.equal(loaded.unet.conv_in.weight, model.unet.conv_in.weight)
        index = tmp_path / WEIGHTS_INDEX_NAME
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {WEIGHTS_NAME}
        assert index.exists() == (limit < 10**9)
        assert {path.name for path in tmp_path.glob("*.safetensors")} == named
        assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    before = content(folder)
    written: list[str] = []

    def fills_up(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        written.append(path.name)
        if len(written) == 3:
            raise OSError("no space left on device")

    monkeypatch.setattr(io, "save_file", fills_up)
    with pytest.raises(OSError, match="no space"):
        video_model().save_pretrained(folder, max_shard_size=SHARD, overwrite=True)
    assert len(written) == 3
    assert content(folder) == before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_of_two_models_are_never_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Interrupted at a rename, the folder does not load: some shards are old and some new."""
    pytest.importorskip("huggingface_hub")
    video_model().save_pretrained(tmp_path, max_shard_size=SHARD)
    replace, calls = Path.replace, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == count:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        randomise(video_model(), 7).save_pretrained(tmp_path, max_shard_size=SHARD, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors is missing"):
        load_model(tmp_path)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ({"a": "missing.safetensors"}, FileNotFoundError, r"missing\.safetensors is missing: .*index\.json names it"),
        ({"a": "../model/x.safetensors"}, ValueError, "is not the name of a safetensors file beside it"),
        ({"a": "weights.bin"}, ValueError, "is not the name of a safetensors file beside it"),
        ({"a": 3}, ValueError, "is not the name of a safetensors file beside it"),
        ({}, ValueError, "expected a 'weight_map'"),
        ([], ValueError, "expected a 'weight_map'"),
        (None, ValueError, "expected a 'weight_map'"),
    ],
)
def test_a_damaged_index_is_told(folder: Path, weight_map: Any, error: type[Exception], message: str) -> None:
    (folder / WEIGHTS_NAME).rename(folder / "x.safetensors")
    (folder / WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error, match=message):
        load_model(folder)


def test_a_shard_that_is_missing_or_truncated_is_named(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    video_model().save_pretrained(tmp_path, max_shard_size=SHARD)
    shard = min(tmp_path.glob("*-00002-of-*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"-00002-of-\d{5}\.safetensors is truncated"):
        load_model(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"-00002-of-\d{5}\.safetensors is missing"):
        load_model(tmp_path)


# Pickles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_is_refused_unopened_with_the_command_that_converts_it(folder: Path, suffix: str) -> None:
    """The command is run here, on weights that a pickle holds: what it writes loads."""
    weights = load_file(folder / WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).unlink()
    pickle = folder / f"diffusion_pytorch_model{suffix}"
    pickle.write_bytes(b"not even a pickle")
    message = rf"diffusion_pytorch_model\{suffix} is a pickle, which can run any code"
    for path in (folder, pickle):
        with pytest.raises(ValueError, match=message) as refused:
            load_model(path)
    torch.save(weights, pickle)
    command = str(refused.value).partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", command], cwd=folder, check=True)
    assert torch.equal(load_stunet(folder).unet.conv_in.weight, weights["unet.conv_in.weight"])


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a file, a folder of weights is needed: give the folder that holds it"):
        load_model(folder / WEIGHTS_NAME)


def test_weights_under_another_name_are_not_guessed_but_named(folder: Path) -> None:
    (folder / WEIGHTS_NAME).rename(folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"if model\.safetensors holds them, rename it"):
        load_model(folder)


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().sample_size = 8  # type: ignore[misc]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_weights_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        io.save_file_atomically({"a": torch.zeros(2)}, tmp_path / "state.safetensors")
        save_model(tiny_unet(), tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")} == {0o640}
