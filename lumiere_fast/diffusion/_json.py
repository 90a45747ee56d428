"""Schedules and parameterisations as plain data, by class name: what a pipeline's JSON holds of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from lumiere_fast.diffusion.parameterization import Parameterization
    from lumiere_fast.diffusion.schedule import Schedule

Component = TypeVar("Component", bound="Schedule | Parameterization")


def to_dict(component: Schedule | Parameterization) -> dict[str, Any]:
    """`{"_class_name": "CosineSchedule", ...}`: what `schedule_from_dict` or `parameterization_from_dict` reads."""
    return {"_class_name": type(component).__name__, **asdict(component)}


def from_dict(values: Mapping[str, Any], classes: Mapping[str, type[Component]], default: str) -> Component:
    """The inverse of `to_dict`; `default` is the class of dictionaries without a `_class_name`."""
    if not isinstance(values, Mapping):
        raise ValueError(f"expected an object with _class_name one of {', '.join(classes)}, got {values!r}")
    name = values.get("_class_name", default)
    if name not in classes:
        raise ValueError(f"_class_name must be one of {', '.join(classes)}, got {name!r}")
    settings = {key: value for key, value in values.items() if key != "_class_name"}
    known = [field.name for field in fields(classes[name])]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    return classes[name](**settings)


def check_numbers(**values: float) -> None:
    """Raise a ValueError that names the first value that is not a finite number."""
    for name, value in values.items():
        if not _is_number(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_positive_numbers(**values: float) -> None:
    """Raise a ValueError that names the first value that is not a finite number above 0."""
    for name, value in values.items():
        if not _is_number(value) or value <= 0:
            raise ValueError(f"{name} must be a number > 0, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
