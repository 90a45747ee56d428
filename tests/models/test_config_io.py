from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lumiere_fast import InflationConfig, STUNet, UNet2D, UNetConfig, inflate
from lumiere_fast.models import PRESETS
from lumiere_fast.models.config import config_from_dict, config_to_dict
from lumiere_fast.models.io import load_model, load_stunet, save_model
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
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_a_loaded_video_model_is_frozen_like_an_inflated_one(folder: Path) -> None:
    loaded = load_stunet(folder)
    assert loaded.inflation_config == InflationConfig((2,), temporal_conditioning=True)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == set(loaded.new_parameters())
    assert not loaded.train().unet.training


def test_half_precision_on_disk_is_single_precision_in_memory(tmp_path: Path) -> None:
    model = video_model()
    save_model(model, tmp_path, dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
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
    path = folder / "model.safetensors"
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
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_model(folder)


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_model(folder / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model\.safetensors is missing: a model folder holds config\.json and"
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


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().sample_size = 8  # type: ignore[misc]
