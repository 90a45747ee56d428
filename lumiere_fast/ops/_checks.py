"""Checks of public arguments. Each raises a ValueError: the op, the argument, what came and what is accepted."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere_fast.ops._layout import accumulation_dtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = (None, "silu")


def check_is_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else "one"
        raise ValueError(f"{op}: {name} must be a dense tensor, got {kind} of layout {value.layout}")


def check_activation(op: str, x: Tensor) -> None:
    """`x` is (B, C, T, H, W), floating; B may be 0."""
    check_is_tensor(op, "x", x)
    if x.dim() != 5 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must be (B, C, T, H, W) with C, T, H, W >= 1, got {tuple(x.shape)}")
    check_floating(op, "x", x)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_tensor(op: str, name: str, tensor: Tensor | None, beside: Tensor, *shapes: Sequence[int]) -> None:
    """An optional tensor is None or has one of `shapes`, on the device of `beside`, floating."""
    if tensor is None:
        return
    check_is_tensor(op, name, tensor)
    if not any(tensor.shape == tuple(shape) for shape in shapes):
        accepted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{op}: {name} must have shape {accepted}, got {tuple(tensor.shape)}")
    check_floating(op, name, tensor)
    check_device(op, name, tensor, beside)


def check_device(op: str, name: str, tensor: Tensor, beside: Tensor) -> None:
    if tensor.device != beside.device:
        raise ValueError(f"{op}: {name} must be on {beside.device} like the other tensors, got {tensor.device}")


def check_same_dtype(op: str, name: str, tensor: Tensor, other: str, beside: Tensor) -> None:
    if tensor.dtype != beside.dtype:
        raise ValueError(f"{op}: {name} must be {beside.dtype} like {other}, got {tensor.dtype}")


def check_parameter(
    op: str, name: str, tensor: Tensor | None, x: Tensor, *shapes: Sequence[int], other: str = "x"
) -> None:
    """As `check_tensor`, and in the dtype of `x` (the argument `other`) or, kept more precisely, of the arithmetic."""
    check_tensor(op, name, tensor, x, *shapes)
    precise = accumulation_dtype(x.dtype)
    if tensor is not None and tensor.dtype not in (x.dtype, precise):
        also = "" if precise == x.dtype else f" or {precise}"
        raise ValueError(f"{op}: {name} must be {x.dtype} like {other}{also}, got {tensor.dtype}; cast one of them")


def under_autocast(x: Tensor, *tensors: Tensor | None) -> Sequence[Tensor | None]:
    """Where autocast is on, parameters in fp32 follow the dtype of `x`, as those of torch's own layers do."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    return [tensor.to(x.dtype) if isinstance(tensor, Tensor) else tensor for tensor in tensors]


def check_integer(op: str, name: str, value: Any) -> int:
    """An integer, numpy's too; no bool, and no float however whole."""
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):  # a symbol, in a trace, has no __index__
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{op}: {name} takes integers, got {value!r}")
    return operator.index(value)


_CHOICES = (str, int, np.bool_, type(None))  # made once: a call is a few microseconds


def check_choice(op: str, name: str, value: object, accepted: Sequence[object]) -> None:
    if not isinstance(value, _CHOICES) or value not in accepted:  # of an array's comparison there is no truth value
        raise ValueError(f"{op}: {name} must be {' or '.join(map(repr, accepted))}, got {value!r}")


def check_scale(op: str, scale: Any) -> float | None:
    """What scores are multiplied by: a finite number, numpy's too, or None."""
    return check_number(op, "scale", scale, or_none=True)


def check_number(op: str, name: str, value: Any, *, or_none: bool = False) -> Any:
    """A finite number as a float, numpy's too; no bool, no tensor. None where that is accepted."""
    if type(value) is float and abs(value) <= sys.float_info.max:
        return value  # the usual case, told at a fraction of the cost
    if value is None and or_none:
        return None
    plain = value.item() if isinstance(value, np.generic) else value  # numpy's own comparison warns of the bound
    number = isinstance(plain, float | int | torch.SymFloat) and not isinstance(plain, bool)
    if not number or not abs(plain) <= sys.float_info.max:
        raise ValueError(f"{op}: {name} must be {'None or ' if or_none else ''}a finite number, got {value!r}")
    return float(plain)


def check_groups(op: str, name: str, groups: int, channels: int) -> None:
    groups = check_integer(op, name, groups)
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"{op}: {name} must divide the {channels} channels, got {groups}")


def check_film(op: str, x: Tensor, scale: Tensor | None, shift: Tensor | None, prefix: str = "") -> None:
    """FiLM is (B, C), or (B, T, C) for each frame its own."""
    B, C, T = x.shape[:3]
    check_parameter(op, f"{prefix}scale", scale, x, (B, C), (B, T, C))
    check_parameter(op, f"{prefix}shift", shift, x, (B, C), (B, T, C))


def check_heads(op: str, q: Tensor) -> None:
    """`q` is (B, T, H, W, heads, D), floating; B may be 0."""
    check_is_tensor(op, "q", q)
    if q.dim() != 6 or 0 in q.shape[1:]:
        raise ValueError(f"{op}: q must be (B, T, H, W, heads, D) with T, H, W, heads, D >= 1, got {tuple(q.shape)}")
    check_floating(op, "q", q)


def check_like(op: str, name: str, tensor: Tensor, other: str, beside: Tensor) -> None:
    """`tensor` has the shape, dtype and device of `beside`, the argument `other`."""
    check_is_tensor(op, name, tensor)
    if tensor.shape != beside.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {other}, {tuple(beside.shape)}, got {tuple(tensor.shape)}"
        )
    check_same_dtype(op, name, tensor, other, beside)
    check_device(op, name, tensor, beside)
