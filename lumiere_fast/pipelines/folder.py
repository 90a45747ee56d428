"""A pipeline's folder, as diffusers lays it out: `model_index.json` and a folder for each component that it names.

| entry | holds |
|---|---|
| `base/`, `ssr/` | the two models: `lumiere_fast.models.io` |
| `base_scheduler/`, `ssr_scheduler/` | `scheduler_config.json`: a stage's schedule, its parameterisation inside |
| `text_encoder/` | `config.json`: the embedded encoder by name, or a T5 encoder with its weights |
| `tokenizer/` | the tokeniser of a T5 encoder |

The index names each component's library and class. Both are looked up here: no code is imported because a file says so.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lumiere_fast.diffusion import (
    SCHEDULES,
    Parameterization,
    Schedule,
    parameterization_from_dict,
    schedule_from_dict,
    to_dict,
)
from lumiere_fast.models.io import (
    VERSION_KEY,
    check_destination,
    check_dtype,
    class_header,
    read_json,
    write_json_atomically,
)
from lumiere_fast.text import T5TextEncoder, TextEncoder, WordVectorEncoder

INDEX_NAME = "model_index.json"
SCHEDULER_CONFIG_NAME = "scheduler_config.json"
PIPELINE = "LumierePipeline"
COMPONENTS = ("base", "ssr", "base_scheduler", "ssr_scheduler", "text_encoder", "tokenizer")
SETTINGS = ("num_frames", "fps", "window_frames")

_OURS = "lumiere_fast"
_T5 = ["transformers", "T5EncoderModel"]


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise a FileExistsError unless a pipeline may be saved here; see `LumierePipeline.save_pretrained`."""
    check_destination(folder, INDEX_NAME, (PIPELINE,), overwrite)


def write_index(
    folder: Path,
    settings: dict[str, int],
    schedules: dict[str, Schedule],
    text_encoder: TextEncoder,
) -> None:
    """`model_index.json`: the class of each component, and the pipeline's settings."""
    index = class_header(PIPELINE)
    index |= {name: [_OURS, "STUNet"] for name in ("base", "ssr")}
    index |= {name: [_OURS, type(schedule).__name__] for name, schedule in schedules.items()}
    if isinstance(text_encoder, T5TextEncoder):
        index |= {"text_encoder": _T5, "tokenizer": ["transformers", type(text_encoder.tokenizer).__name__]}
    else:
        index["text_encoder"] = [_OURS, type(text_encoder).__name__]
    write_json_atomically(index | settings, folder / INDEX_NAME)


def read_index(folder: Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Components, checked, and settings of `model_index.json`; what is wrong is named in a ValueError."""
    path = folder / INDEX_NAME
    index = read_json(path)
    index.pop(VERSION_KEY, None)
    name = index.pop("_class_name", None)
    if name != PIPELINE:
        raise ValueError(f"{path}: expected _class_name {PIPELINE}, got {name!r}")
    unknown = sorted(set(index) - {*COMPONENTS, *SETTINGS})
    missing = sorted({*COMPONENTS, *SETTINGS} - set(index) - {"tokenizer"})
    if unknown or missing:
        raise ValueError(f"{path}: not a pipeline of this version: unknown entries {unknown}, missing {missing}")
    settings = {name: index.pop(name) for name in SETTINGS}
    accepted: dict[str, Collection[str]] = {
        "base": ("lumiere_fast.STUNet",),
        "ssr": ("lumiere_fast.STUNet",),
        "base_scheduler": [f"lumiere_fast.{schedule}" for schedule in SCHEDULES],
        "ssr_scheduler": [f"lumiere_fast.{schedule}" for schedule in SCHEDULES],
        "text_encoder": ("lumiere_fast.WordVectorEncoder", "transformers.T5EncoderModel"),
    }
    for component, kinds in accepted.items():
        pair = index[component]
        if not isinstance(pair, list) or ".".join(map(str, pair)) not in kinds:
            wanted = " or ".join(str(kind.split(".")) for kind in kinds)
            raise ValueError(f"{path}: {component} must be {wanted}, got {pair!r}")
    return index, settings


def write_scheduler(folder: Path, schedule: Schedule, parameterization: Parameterization) -> None:
    """`scheduler_config.json`: what a network was trained for."""
    folder.mkdir(exist_ok=True)
    config = class_header(type(schedule).__name__) | to_dict(schedule)
    write_json_atomically(config | {"parameterization": to_dict(parameterization)}, folder / SCHEDULER_CONFIG_NAME)


def read_scheduler(folder: Path, name: str | None = None) -> tuple[Schedule, Parameterization]:
    """The schedule, where a pipeline's index names its class of that `name`, and the parameterisation."""
    path = folder / SCHEDULER_CONFIG_NAME
    config = read_json(path)
    config.pop(VERSION_KEY, None)
    if name is not None and config.get("_class_name") != name:
        found = config.get("_class_name")
        raise ValueError(f"{path}: expected _class_name {name}, as {INDEX_NAME} says, got {found!r}")
    try:
        parameterization = parameterization_from_dict(config.pop("parameterization", None))
        return schedule_from_dict(config), parameterization
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_text_encoder(folder: Path, encoder: TextEncoder, max_shard_size: int | str) -> None:
    """`text_encoder/`, and `tokenizer/` of a T5 encoder, in a pipeline's folder."""
    if isinstance(encoder, T5TextEncoder):
        encoder.save_pretrained(folder / "text_encoder", folder / "tokenizer", max_shard_size=max_shard_size)
        return
    (folder / "text_encoder").mkdir()
    config = class_header(type(encoder).__name__) | {"name": encoder.name}
    write_json_atomically(config, folder / "text_encoder" / "config.json")


def read_text_encoder(folder: Path, kind: list[str], torch_dtype: torch.dtype | None) -> TextEncoder:
    """The encoder in a pipeline's folder, whose index says that it is a `kind`."""
    if kind == _T5:
        return T5TextEncoder.from_pretrained(
            folder / "text_encoder", folder / "tokenizer", torch_dtype=check_dtype(torch_dtype)
        )
    path = folder / "text_encoder" / "config.json"
    config: dict[str, Any] = read_json(path)
    if config.get("name") != WordVectorEncoder.name:
        raise ValueError(
            f"{path}: these models read the text encoder {config.get('name')!r}, this version of lumiere_fast has "
            f"{WordVectorEncoder.name!r}: to them its vectors would be noise"
        )
    return WordVectorEncoder()
