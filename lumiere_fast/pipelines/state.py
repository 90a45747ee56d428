"""A denoising run between two of its steps, and the file that holds it: an interrupted run goes on bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumiere_fast.models.io import PICKLES, as_path, read_metadata, read_safetensors, save_file_atomically
from lumiere_fast.pipelines.windows import WindowPlan

KEY = "lumiere_fast.denoising_state"
GENERATOR = "generator.{}"
PICKLE_STARTS = (b"\x80", b"PK")  # of protocols 2 and later, and of the archive that torch.save makes


@dataclass(frozen=True, eq=False)
class DenoisingState:
    """All that the steps still to come depend on.

    Args:
        step: how many steps are done.
        latent: the clip after them.
        history: the clean clip predicted at the last of them; None where the next step does not read it.
        generators: the state of each clip's generator; none where the run was given none.
        windows: the plan in use, which may be smaller than the one that the run began with.
        source: the clip that the run enlarges, where it is one that an earlier stage made.
    """

    step: int
    latent: Tensor
    history: Tensor | None
    generators: tuple[Tensor, ...]
    windows: WindowPlan
    source: Tensor | None = None


def save_state(path: str | os.PathLike[str], state: DenoisingState, about: Mapping[str, Any]) -> None:
    """Write `state` and what it belongs to into a safetensors file, which is at any time the old one or the new one.

    Args:
        about: what must be the same for a run to go on from it, for `check_same`: strings, numbers, booleans, None,
            and lists of these.

    Raises:
        OSError: the file could not be written; names it.
        ValueError: `about` holds something else, or `path` is no path.
    """
    path = as_path(path)
    if not _survives_json(about):
        raise ValueError(f"about must hold strings, finite numbers, booleans, None and lists of these, got {about!r}")
    videos = {"latent": state.latent, "history": state.history, "source": state.source}
    tensors = {name: video for name, video in videos.items() if video is not None}
    header = {
        "step": state.step,
        "channels_last": {name: _is_channels_last(tensor) for name, tensor in tensors.items()},
        "windows": asdict(state.windows),
        "about": dict(about),
    }
    entries = {name: _as_stored(tensor) for name, tensor in tensors.items()}
    entries |= {GENERATOR.format(i): generator for i, generator in enumerate(state.generators)}
    save_file_atomically(entries, path, metadata={KEY: json.dumps(header)})


def load_state(path: str | os.PathLike[str]) -> tuple[DenoisingState, dict[str, Any]]:
    """What `save_state` was given, on the CPU; dtypes and memory formats as they were.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, a pickle, or not written by `save_state`; names it.
    """
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a file: there is no interrupted run to go on from")
    try:
        entries = read_safetensors(path)
    except ValueError as error:
        if path.suffix in PICKLES or _starts_as_pickle(path):
            raise ValueError(f"{path} is a pickle, which can run any code when it is loaded, so it is not") from error
        raise
    try:
        return _state_from(json.loads(read_metadata(path)[KEY]), entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the state of an interrupted run, or it is damaged: {error!r}; remove it to begin anew"
        ) from error


def check_same(about: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise a ValueError that names every field in which `about`, of this run, and `found`, of the state, differ."""
    differing = [
        f"{name} was {_shown(found, name)} and is {_shown(about, name)}"
        for name in [*found, *(name for name in about if name not in found)]
        if name not in about or name not in found or about[name] != found[name]
    ]
    if differing:
        raise ValueError(f"the interrupted run had other settings: {'; '.join(differing)}")


def _starts_as_pickle(path: Path) -> bool:
    """To be asked of what is no safetensors file: that begins with its header's length, which may be any number."""
    with path.open("rb") as file:
        return file.read(2).startswith(PICKLE_STARTS)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "not given"


def _survives_json(about: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads(json.dumps(dict(about))) == dict(about))
    except (TypeError, ValueError):
        return False


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last_3d)


def _as_stored(tensor: Tensor) -> Tensor:
    """Contiguous, as safetensors wants it: of a channels_last_3d tensor a view with the channels last."""
    return tensor.permute(0, 2, 3, 4, 1) if _is_channels_last(tensor) else tensor.contiguous()


def _state_from(header: dict[str, Any], entries: dict[str, Tensor]) -> tuple[DenoisingState, dict[str, Any]]:
    videos = {}
    for name, channels_last in header["channels_last"].items():
        stored = entries.pop(name).clone()  # out of the file, which is replaced while the run goes on
        videos[name] = stored.permute(0, 4, 1, 2, 3) if channels_last else stored
    generators = tuple(entries.pop(GENERATOR.format(i)) for i in range(len(entries)))
    plan = _plan_from(header["windows"])
    history, source = videos.get("history"), videos.get("source")
    return DenoisingState(header["step"], videos["latent"], history, generators, plan, source), header["about"]


def _plan_from(values: dict[str, Any]) -> WindowPlan:
    """The lists of JSON as the tuples that they were."""
    known = {field.name for field in fields(WindowPlan)}
    if set(values) != known:
        raise ValueError(f"a plan of windows has {', '.join(sorted(known))}, got {', '.join(sorted(values))}")
    return WindowPlan(**{name: _as_tuples(value) for name, value in values.items()})


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
