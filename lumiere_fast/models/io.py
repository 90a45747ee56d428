"""Folders of weights as diffusers lays them out, and the JSON and safetensors files in them. Never pickle.

A model's folder holds `config.json` (class and architecture) and `diffusion_pytorch_model.safetensors`. A model larger
than a shard has `diffusion_pytorch_model-00001-of-0000N.safetensors` instead, and
`diffusion_pytorch_model.safetensors.index.json`, which tells where each weight is.
"""

from __future__ import annotations

import json
import operator
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lumiere_fast.models.config import InflationConfig, UNetConfig, config_from_dict, config_to_dict
from lumiere_fast.models.pretrained import MAX_SHARD_SIZE
from lumiere_fast.models.stunet import STUNet
from lumiere_fast.models.unet2d import UNet2D

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
WEIGHTS_INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
SHARD_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
VERSION_KEY = "_lumiere_fast_version"
MODEL_KINDS = ("UNet2D", "STUNet")
SHARD_SIZE = r"(\d+(?:\.\d+)?)\s*([KMGT])B"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# Models --------------------------------------------------------------------------------------------------------------


def save_model(
    model: UNet2D | STUNet,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write a model's folder, over the model that it may hold; see `PretrainedModel.save_pretrained`."""
    config: dict[str, Any] = class_header(type(model).__name__)
    if isinstance(model, STUNet):
        config["unet"] = config_to_dict(model.unet.config)
        config["inflation"] = config_to_dict(model.inflation_config)
    else:
        config["unet"] = config_to_dict(model.config)
    _write_weights(model.state_dict(), folder, dtype, max_shard_size)
    write_json_atomically(config, folder / CONFIG_NAME)


def load_model(folder: Path, *, torch_dtype: torch.dtype | None = None) -> UNet2D | STUNet:
    """Build the model of `config.json` and load its weights as `torch_dtype` (None: float32), in eval mode.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: a file is truncated or not what it should be, a pickle, or the weights belong to another
            architecture; names the first key that differs.
    """
    dtype = check_dtype(torch_dtype)
    check_is_folder(folder)
    config = read_json(folder / CONFIG_NAME)
    with torch.device("meta"):  # no memory and no random numbers for values that are about to be replaced
        model = _build(config, folder / CONFIG_NAME)
    load_weights(model, _read_weights(folder, dtype), folder / WEIGHTS_NAME, assign=True)
    return model.eval()


def load_stunet(folder: Path, *, torch_dtype: torch.dtype | None = None) -> STUNet:
    """`load_model` of a folder that must hold an inflated model; a ValueError says so where it does not."""
    model = load_model(folder, torch_dtype=torch_dtype)
    if not isinstance(model, STUNet):
        raise ValueError(f"{folder} holds a {type(model).__name__}, a STUNet is needed: inflate it first")
    return model


def check_dtype(torch_dtype: torch.dtype | None) -> torch.dtype:
    """`torch_dtype`, or float32 for None; a ValueError unless weights can have it."""
    dtype = torch.float32 if torch_dtype is None else torch_dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"torch_dtype must be a floating torch.dtype such as torch.bfloat16, got {torch_dtype!r}")
    return dtype


def _build(config: dict[str, Any], path: Path) -> UNet2D | STUNet:
    kinds = {"UNet2D": {"unet"}, "STUNet": {"unet", "inflation"}}
    kind = str(config.get("_class_name"))
    if kind not in kinds or set(config) - {"_class_name", VERSION_KEY} != kinds[kind]:
        raise ValueError(f"{path}: expected _class_name UNet2D with 'unet', or STUNet with 'unet' and 'inflation'")
    try:
        unet = UNet2D(config_from_dict(UNetConfig, config["unet"]))
        if kind == "UNet2D":
            return unet
        unet.requires_grad_(False)
        return STUNet(unet, config_from_dict(InflationConfig, config["inflation"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path, *, assign: bool = False) -> None:
    """Copy `weights` into `model`, or with `assign` make them its own.

    Raises:
        ValueError: names the first key, in the model's order, that differs or is not floating.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise ValueError(f"{source}: these weights are of another architecture: {name!r} is missing")
        _check_floating(name, weights[name], source)
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: these weights are of another architecture: {name!r} has shape "
                f"{tuple(weights[name].shape)}, the model wants {tuple(tensor.shape)}"
            )
    extra = next((name for name in weights if name not in expected), None)
    if extra is not None:
        raise ValueError(f"{source}: these weights are of another architecture: the model has no {extra!r}")
    model.load_state_dict(weights, assign=assign)


def _check_floating(name: str, tensor: Tensor, source: Path) -> None:
    """Quantised weights would load as the integers that they are stored as, without their scales."""
    if not tensor.is_floating_point():
        raise ValueError(f"{source}: {name!r} is {tensor.dtype}; weights must be floating, such as torch.float16")


# Weights, in one file or in shards -----------------------------------------------------------------------------------


def _write_weights(
    state: dict[str, Tensor], folder: Path, dtype: torch.dtype | None, max_shard_size: int | str
) -> None:
    """All new files are written before the first old one is replaced; files of weights left over are removed.

    A single file takes the place of another in one step. Shards cannot, so the old index goes first: an interruption
    leaves a folder that does not load, never a mixture of two models.
    """
    files, index = _plan_files(state, dtype, max_shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    partials = {name: _partial(folder / name) for name in files}
    try:
        for name, keys in files.items():
            shard = {key: state[key].to(dtype or state[key].dtype).contiguous() for key in keys}
            with _writing(folder / name):
                _save_file(shard, partials[name], {"format": "pt"})
        if index is not None:
            (folder / WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
        for name, partial in partials.items():
            partial.replace(folder / name)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    if index is None:
        (folder / WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    else:
        write_json_atomically(index, folder / WEIGHTS_INDEX_NAME)
    for path in folder.glob(SHARD_PATTERN.format(suffix="*")):
        if path.name not in files:
            path.unlink()


def _plan_files(
    state: dict[str, Tensor], dtype: torch.dtype | None, max_shard_size: int | str
) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """The weights' names by file, and the index where there is more than one file."""
    limit = shard_bytes(max_shard_size)
    planned = {name: torch.empty(x.shape, dtype=dtype or x.dtype, device="meta") for name, x in state.items()}
    if sum(x.nbytes for x in planned.values()) <= limit:
        return {WEIGHTS_NAME: list(planned)}, None  # so that small models do not need huggingface_hub
    try:
        from huggingface_hub import split_torch_state_dict_into_shards
    except ImportError as error:
        raise ModuleNotFoundError(
            "writing shards needs huggingface_hub: pip install huggingface_hub", name="huggingface_hub"
        ) from error
    split = split_torch_state_dict_into_shards(planned, filename_pattern=SHARD_PATTERN, max_shard_size=limit)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return split.filename_to_tensors, index


def shard_bytes(max_shard_size: int | str) -> int:
    """Bytes of "2GB", "500 MB" and the like (1 KB is 1000 bytes), or of a number of them; a ValueError below 1."""
    try:
        if isinstance(max_shard_size, str):
            number, unit = re.fullmatch(SHARD_SIZE, max_shard_size.strip().upper()).groups()  # type: ignore[union-attr]
            size = int(float(number) * 1000 ** ("KMGT".index(unit) + 1))
        else:
            size = operator.index(max_shard_size)
    except (AttributeError, TypeError):
        size = 0
    if size < 1 or isinstance(max_shard_size, bool):
        raise ValueError(
            f'max_shard_size must be a number of bytes >= 1 or a string such as "2GB", got {max_shard_size!r}'
        )
    return size


def _read_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a model's folder, cast, and copied out of the files' buffers, where they lie at any address."""
    if (folder / WEIGHTS_NAME).is_file():
        files = [folder / WEIGHTS_NAME]
    elif (folder / WEIGHTS_INDEX_NAME).is_file():
        files = _shards(folder / WEIGHTS_INDEX_NAME)
    else:
        raise _missing_weights(folder)
    weights: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in read_safetensors(path).items():
            _check_floating(name, tensor, path)
            weights[name] = tensor.to(dtype, copy=True)
    return weights


def _shards(index: Path) -> list[Path]:
    """The files that an index names; each must lie beside it."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: expected a 'weight_map' from the names of weights to files")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file beside it")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} is missing: {index.name} names it")
    return [index.parent / name for name in files]


def _missing_weights(folder: Path) -> Exception:
    path = folder / WEIGHTS_NAME
    found = sorted(entry for entry in folder.iterdir() if entry.suffix in (*PICKLES, ".safetensors"))
    for entry in found:
        if entry.suffix in PICKLES:
            return ValueError(f"{path} is missing: {refuse_pickle(entry)}")
    hint = f"; if {found[0].name} holds them, rename it" if len(found) == 1 else ""
    return FileNotFoundError(f"{path} is missing: a model folder holds {CONFIG_NAME} and {WEIGHTS_NAME}{hint}")


def refuse_pickle(path: Path) -> str:
    """Why a pickle is not loaded, and the command that converts it."""
    return (
        f"{path.name} is a pickle, which can run any code when it is loaded, so it is not; if you trust where it comes "
        'from, convert it: python -c "import torch, safetensors.torch; safetensors.torch.save_file('
        f"torch.load('{path.name}', map_location='cpu', weights_only=True), '{WEIGHTS_NAME}')\""
    )


# Folders -------------------------------------------------------------------------------------------------------------


def as_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a `Path`; a ValueError if it is none."""
    try:
        return Path(path)
    except TypeError as error:
        raise ValueError(f"the path of a folder is needed, a str or a Path, got {path!r}") from error


def check_is_folder(path: Path) -> None:
    """Raise a ValueError, with what to do about a pickle, if `path` is a file."""
    if path.is_file():
        reason = refuse_pickle(path) if path.suffix in PICKLES else "give the folder that holds it"
        raise ValueError(f"{path} is a file, a folder of weights is needed: {reason}")


def check_destination(folder: Path, marker: str, kinds: Collection[str], overwrite: bool) -> None:
    """Raise a FileExistsError unless `folder` is new or empty, or with `overwrite` holds what may be replaced.

    Args:
        marker: the JSON file that tells what a folder holds by its `_class_name`.
        kinds: the classes that may be replaced.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} exists and is a file; choose another name")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} exists and is not empty; choose another folder, or replace what it holds: overwrite=True "
            "(--overwrite)"
        )
    if _kind_of(folder / marker) not in kinds:
        raise FileExistsError(
            f"{folder} holds something else than a {' or '.join(kinds)}, which is all that may be overwritten; "
            "choose another folder"
        )


def _kind_of(marker: Path) -> str | None:
    try:
        return str(read_json(marker).get("_class_name"))
    except (ValueError, OSError):
        return None


@contextmanager
def replacing_entries(folder: Path, marker: str, owned: Iterable[str]) -> Iterator[Path]:
    """An empty folder inside `folder`, whose entries take the place of its `owned` ones on success.

    On failure, Ctrl-C included, `folder` is as it was; other entries of it stay in any case. The `marker` file goes
    first and comes last, so that even a process killed in between leaves a folder that does not load, not a mixture.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    new, old = (folder / f".{name}.{os.getpid()}" for name in ("new", "old"))
    try:
        new.mkdir()
        yield new
        old.mkdir()
        _exchange(folder, new, old, (marker, *owned))
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()


def _exchange(folder: Path, new: Path, old: Path, names: tuple[str, ...]) -> None:
    """Move the entries called `names` to `old` and those of `new` into `folder`, the first name last; all or none."""
    placed: list[Path] = []
    try:
        for name in names:
            if (folder / name).exists():
                (folder / name).rename(old / name)
        for entry in sorted(new.iterdir(), key=lambda path: path.name == names[0]):
            placed.append(entry.rename(folder / entry.name))
    except BaseException:
        for entry in placed:
            entry.rename(new / entry.name)
        for entry in sorted(old.iterdir(), key=lambda path: path.name == names[0]):
            entry.rename(folder / entry.name)
        raise


# Files ---------------------------------------------------------------------------------------------------------------


def class_header(name: str) -> dict[str, Any]:
    """The first entries of a `config.json`: what wrote it, and what it describes."""
    return {"_class_name": name, VERSION_KEY: version("lumiere_fast")}


def read_safetensors(path: Path) -> dict[str, Tensor]:
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
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not a folder")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the second of brackets in brackets, by the thousand
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def write_json_atomically(content: dict[str, Any], path: Path) -> None:
    """Write to a sibling file, then rename: an interruption leaves the old file whole."""
    partial = _partial(path)
    try:
        with _writing(path):
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_file_atomically(tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file` to a sibling file, then rename: an interruption leaves the old file whole.

    Its bytes reach the disk before its name does, so that a power failure leaves no empty file in the place of the old.
    """
    partial = _partial(path)
    try:
        with _writing(path):
            _save_file(tensors, partial, metadata)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """`safetensors.torch.save_file` with the permissions of any new file; its own are the owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the disk refuses, as an OSError that names the file: safetensors raises another, and both may name none."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} could not be written: {error}") from error


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
