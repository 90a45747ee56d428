"""Wrong arguments that torch, or the core, would say something else of than a ValueError that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lumiere_fast import native
from lumiere_fast.ops import (
    group_norm,
    space_time_downsample,
    space_time_upsample,
    spatial_attention,
    temporal_attention,
)

RESIZES = (space_time_downsample, space_time_upsample)
BACKENDS = ("reference", *(["cpu"] if not native.why_not("cpu") else []), None)

X, WEIGHT = torch.ones(1, 16, 4, 4, 4), torch.ones(16, 16, 3)


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(16, 4, 4, 4)] * 2, layout=layout)


def refused(match: str, op: Callable[..., Tensor], *arguments: Any, **options: Any) -> None:
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=f"^{op.__name__}: {match}"):
            op(*arguments, **options, backend=backend)


@pytest.mark.parametrize("op", RESIZES)
def test_a_weight_needs_channels_out(op: Callable[..., Tensor]) -> None:
    refused("weight must be .* with C_out >= 1", op, X, (2, 1, 1), weight=WEIGHT[:0])


@pytest.mark.parametrize("op", RESIZES)
@pytest.mark.parametrize("x", [X, X[:0]])
def test_results_too_large_to_count(op: Callable[..., Tensor], x: Tensor) -> None:
    for weight in (None, WEIGHT):
        for factor in ((2**63, 1, 1), (2**70, 1, 1), (2**40, 2**40, 1), (1, 2**30, 2**30), (2**60, 1, 1)):
            refused("factor must keep .* within 2\\*\\*56", op, x, factor, weight=weight)
    wide = torch.ones(1, 1, 1).expand(2**50, 16, 3)
    refused("factor must keep", op, x, (2, 1, 1), weight=wide)
    wide = torch.ones(1).expand(2**30, 4, 2**10, 2**10, 4)
    refused("factor must keep", op, wide, (2, 2, 2))


def test_factors_below_the_bound_are_taken() -> None:
    y = space_time_downsample(X, (2**42, 1, 1), weight=WEIGHT)
    assert torch.equal(y, space_time_downsample(X, (4, 1, 1), weight=WEIGHT))
    assert space_time_upsample(X[:0], (2**46, 1, 1)).shape == (0, 16, 2**48, 4, 4)


@pytest.mark.parametrize("op", RESIZES)
def test_out_is_a_dense_tensor(op: Callable[..., Tensor]) -> None:
    y = op(X, (2, 2, 2))
    refused("out must be a tensor, got list", op, X, (2, 2, 2), out=[1])
    refused("out must be a tensor, got ndarray", op, X, (2, 2, 2), out=y.numpy())
    refused("out must be a dense tensor, got one of layout torch.sparse_coo", op, X, (2, 2, 2), out=y.to_sparse())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("op", RESIZES)
def test_tensors_are_dense(op: Callable[..., Tensor]) -> None:
    for layout in (torch.strided, torch.jagged):
        refused(f"x must be a dense tensor, got a nested one of layout {layout}", op, nested(layout), (2, 2, 2))
    for name, tensors in (
        ("x", {"x": X.to_sparse()}),
        ("weight", {"x": X, "weight": WEIGHT.to_sparse()}),
        ("bias", {"x": X, "weight": WEIGHT, "bias": torch.ones(16).to_sparse()}),
    ):
        refused(f"{name} must be a dense tensor, got one of layout torch.sparse_coo", op, factor=(2, 1, 1), **tensors)
    with pytest.raises(ValueError, match="group_norm: x must be a dense tensor"):
        group_norm(nested(torch.strided), 4, None, None)


@pytest.mark.parametrize("op", RESIZES)
def test_a_mode_is_a_string(op: Callable[..., Tensor]) -> None:
    for mode in (np.array(["nearest", "linear"]), np.array(["nearest"]), ["nearest"], None, 2):
        refused("mode must be 'nearest' or 'linear'", op, X, (2, 2, 2), mode=mode)


def test_a_truth_value_may_be_numpy_s() -> None:
    for value in (np.True_, np.False_):
        wanted = group_norm(X, 2, None, None, per_frame=bool(value))
        for backend in BACKENDS:
            torch.testing.assert_close(group_norm(X, 2, None, None, per_frame=value, backend=backend), wanted)


@pytest.mark.parametrize("op", [spatial_attention, temporal_attention])
def test_a_scale_is_a_finite_number(op: Callable[..., Tensor]) -> None:
    q = torch.ones(1, 2, 1, 3, 1, 4)
    for scale in (float("nan"), float("inf"), "1", True, 1j, [1.0], np.ones(1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=f"^{op.__name__}: scale must be None or a finite number, got "):
            op(q, q, q, scale=scale)
    for number in (2, np.float32(2), np.float64(2), np.int64(2)):
        assert torch.equal(op(q, q, q, scale=number), op(q, q, q, scale=2.0))
    torch.compiler.reset()  # of what earlier tests compiled of the same function
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for scale in (0.25, 0.5, 2.0):  # from the second on, torch may trace it as a symbol
        torch.testing.assert_close(compiled(q, q, q, scale=scale), op(q, q, q, scale=scale))
