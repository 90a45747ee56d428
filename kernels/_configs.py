"""Which configuration a kernel is launched with: tables by op and case, of this GPU or for any.

A case names what a configuration depends on, never a length; its op's kernel module makes the name. A table is JSON,

    {"gpu": "NVIDIA H100 80GB HBM3", "temporal_conv": {"half-wide-kn-plain-many": {"block_m": 128, ...}, ...}, ...}

and the first that has the case wins: the innermost `override`, the user's table for this GPU (in `user_file`), the
one that ships for it, and configs/default.json, which has every case, names every field and runs on any GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

Config = Mapping[str, int]
Table = Mapping[str, Mapping[str, Config]]
"""Configurations by op and case."""

FOLDER = Path(__file__).parent / "configs"
DEFAULT = "default"

_overrides: ContextVar[Mapping[tuple[str, str], Config]] = ContextVar(
    "lumiere_fast_configs", default=MappingProxyType({})
)


def chosen(op: str, case: str, device: torch.device) -> Config:
    """The configuration of a case on a device.

    Raises:
        ValueError: no such op or case, or a table that is damaged or has what no kernel knows; it names the file.
    """
    found = _overrides.get().get((op, case))
    return _chosen(op, case, gpu_name(device)) if found is None else found


@contextlib.contextmanager
def override(op: str, case: str, config: Config) -> Iterator[None]:
    """Within the block, in this thread or task, `case` of `op` is launched with `config`.

    Raises:
        ValueError: no such op or case, or a field is missing, unknown or of the wrong kind.
    """
    _check_config(op, case, config, "the override")
    token = _overrides.set({**_overrides.get(), (op, case): dict(config)})
    try:
        yield
    finally:
        _overrides.reset(token)


def cases(op: str) -> tuple[str, ...]:
    """The names of an op's cases.

    Raises:
        ValueError: the op has none.
    """
    if op not in _defaults():
        raise ValueError(f"op must be one of {', '.join(_defaults())}, got {op!r}")
    return tuple(_defaults()[op])


def shipped(op: str) -> dict[str, list[Config]]:
    """By case, the configurations of all tables that ship: what has to be compiled ahead of time."""
    tables = [_defaults(), *(read(path) for path in sorted(FOLDER.glob("*.json")) if path.stem != DEFAULT)]
    return {case: [table[op][case] for table in tables if case in table.get(op, {})] for case in cases(op)}


def save(path: Path, gpu: str, table: Table) -> None:
    """Write the table of a GPU into a file; what it held of other cases stays.

    Raises:
        ValueError: the table, or what the file holds already, is not as it must be.
        OSError: the file cannot be written.
    """
    _check_table(table, "the new table")
    merged = {op: dict(held) for op, held in (read(path, gpu) if path.exists() else {}).items()}
    for op, configs in table.items():
        merged.setdefault(op, {}).update({case: dict(config) for case, config in configs.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"gpu": gpu, **merged}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    _chosen.cache_clear()


def gpu_name(device: torch.device) -> str | None:
    """None for what is no GPU, or is one that only fake tensors are on."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _device_name(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _device_name(index: int) -> str:
    """Asked for once: it takes longer than the rest of a launch's preparation."""
    return torch.cuda.get_device_name(index)


def file_name(gpu: str) -> str:
    """Of a GPU's table: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def user_file(gpu: str) -> Path:
    """Where the user's own table for a GPU is."""
    return cache_folder() / "configs" / file_name(gpu)


def cache_folder() -> Path:
    """LUMIERE_FAST_CACHE, or `lumiere_fast` in XDG_CACHE_HOME, or ~/.cache/lumiere_fast."""
    if given := os.environ.get("LUMIERE_FAST_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lumiere_fast"


@functools.cache
def _chosen(op: str, case: str, gpu: str | None) -> Config:
    _check_case(op, case, "the call")
    files = [] if gpu is None else [user_file(gpu), FOLDER / file_name(gpu)]
    tables = [read(path, gpu) for path in files if path.exists()]
    return next(table[op][case] for table in (*tables, _defaults()) if case in table.get(op, {}))


def read(path: Path, gpu: str | None = None) -> Table:
    """The table in a file, which must be that of `gpu` if one is given.

    Raises:
        ValueError: it is not as it must be, or another GPU's.
    """
    table = _load(path)
    found = table.pop("gpu", None)
    if gpu is not None and found != gpu:
        raise ValueError(f'{path}: "gpu" is {found!r}, this is the table of {gpu!r}; move the file, or tune again')
    _check_table(table, str(path))
    return table


def _load(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the table of configurations cannot be read: {error}; mend or remove it") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: the table of configurations must be a JSON object; mend or remove it")
    return table


@functools.cache
def _defaults() -> Table:
    """The table that has every case; what it names is what there is."""
    return _load(FOLDER / f"{DEFAULT}.json")


def _check_table(table: Mapping[str, Any], where: str) -> None:
    for op, configs in table.items():
        _check_op(op, where)
        if not isinstance(configs, Mapping):
            raise ValueError(f"{where}: {op} must be an object of cases, got {configs!r}")
        for case, config in configs.items():
            _check_config(op, case, config, where)


def _check_op(op: str, where: str) -> None:
    if op not in _defaults():
        raise ValueError(f"{where}: there is no op {op!r} with configurations, only {', '.join(_defaults())}")


def _check_case(op: str, case: str, where: str) -> None:
    _check_op(op, where)
    if case not in _defaults()[op]:
        raise ValueError(f"{where}: {op} has no case {case!r}, only {', '.join(_defaults()[op])}")


def _check_config(op: str, case: str, config: Any, where: str) -> None:
    """Exactly the fields that the default has, each of the same kind: true or false, or a number above 0."""
    _check_case(op, case, where)
    fields = _defaults()[op][case]
    if not isinstance(config, Mapping) or set(config) != set(fields):
        raise ValueError(f"{where}: {op}, {case} must have exactly {', '.join(fields)}, got {config!r}")
    for name, value in config.items():
        kind = type(fields[name])
        if type(value) is not kind or (kind is int and value < 1):
            kinds = "true or false" if kind is bool else "a whole number above 0"
            raise ValueError(f"{where}: {op}, {case}: {name} must be {kinds}, got {value!r}")
