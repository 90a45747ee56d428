"""Model folders: `config.json` (architecture) beside `model.safetensors` (weights). Never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lumiere_fast.models.config import InflationConfig, UNetConfig, config_from_dict, config_to_dict
from lumiere_fast.models.stunet import STUNet
from lumiere_fast.models.unet2d import UNet2D

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save_model(model: UNet2D | STUNet, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors`, the weights cast to `dtype` (None keeps theirs)."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"_class_name": type(model).__name__}
    if isinstance(model, STUNet):
        config["unet"] = config_to_dict(model.unet.config)
        config["inflation"] = config_to_dict(model.inflation_config)
    else:
        config["unet"] = config_to_dict(model.config)
    weights = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file_atomically(weights, folder / WEIGHTS_NAME)
    write_json_atomically(config, folder / CONFIG_NAME)


def load_model(folder: Path) -> UNet2D | STUNet:
    """Build the model of `config.json` and load its weights in fp32, in eval mode.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is truncated or not what it should be, or the weights belong to another architecture; names
            the first key that differs.
    """
    config = read_json(folder / CONFIG_NAME)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a model folder holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    with torch.device("meta"):  # no memory and no random numbers for values that are about to be replaced
        model = _build(config, folder / CONFIG_NAME)
    # copied out of the file's buffer, whose tensors lie at any address
    weights = {name: tensor.to(torch.float32, copy=True) for name, tensor in read_safetensors(path).items()}
    load_weights(model, weights, path, assign=True)
    return model.eval()


def load_stunet(folder: Path) -> STUNet:
    """`load_model` of a folder that must hold an inflated model; a ValueError says so where it does not."""
    model = load_model(folder)
    if not isinstance(model, STUNet):
        raise ValueError(f"{folder} holds a {type(model).__name__}, a STUNet is needed: inflate it first")
    return model


def _build(config: dict[str, Any], path: Path) -> UNet2D | STUNet:
    kinds = {"UNet2D": {"unet"}, "STUNet": {"unet", "inflation"}}
    kind = str(config.get("_class_name"))
    if kind not in kinds or set(config) - {"_class_name"} != kinds[kind]:
        raise ValueError(f"{path}: expected _class_name UNet2D with 'unet', or STUNet with 'unet' and 'inflation'")
    try:
        unet = UNet2D(config_from_dict(UNetConfig, config["unet"]))
        if kind == "UNet2D":
            return unet
        unet.requires_grad_(False)
        return STUNet(unet, config_from_dict(InflationConfig, config["inflation"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: Path, *, assign: bool = False) -> None:
    """Copy `weights` into `model`, or with `assign` make them its own.

    Raises:
        ValueError: names the first key, in the model's order, that differs.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise ValueError(f"{source}: these weights are of another architecture: {name!r} is missing")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: these weights are of another architecture: {name!r} has shape "
                f"{tuple(weights[name].shape)}, the model wants {tuple(tensor.shape)}"
            )
    extra = next((name for name in weights if name not in expected), None)
    if extra is not None:
        raise ValueError(f"{source}: these weights are of another architecture: the model has no {extra!r}")
    model.load_state_dict(weights, assign=assign)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file; a ValueError says when it is truncated or not safetensors."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file that `read_safetensors` accepts; empty if it has none."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with errors that name the file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def write_json_atomically(content: dict[str, Any], path: Path) -> None:
    """Write to a sibling file, then rename: an interruption leaves the old file whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def save_file_atomically(
    tensors: dict[str, torch.Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """`safetensors.torch.save_file` to a sibling file, then rename."""
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)
