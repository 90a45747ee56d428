from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast.ops import space_time_upsample
from lumiere_fast.ops.space_time_upsample import MODES, space_time_upsample_backward
from tests.ops import resizing
from tests.ops.common import (
    CHANNELS_LAST,
    FORMATS,
    HALF_DTYPES,
    Draw,
)

FACTORS = [(1, 2, 2), (2, 1, 1), (2, 2, 2), (3, 2, 4), (1, 5, 3)]


@pytest.fixture
def draw() -> Draw:
    return Draw(21)


def duplicate_then_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, factor: int) -> Tensor:
    """The paper's order of work: frames duplicated, then rearranged to (b h w) c t for a Conv1D."""
    frames = x.repeat_interleave(factor, dim=2)
    b, c, t, h, w = frames.shape
    y = F.conv1d(frames.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t), weight, bias, padding=weight.shape[2] // 2)
    return y.reshape(b, h, w, weight.shape[0], t).permute(0, 3, 4, 1, 2)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_fixed_taps_equal_torch(factor: tuple[int, int, int], memory_format: torch.memory_format, draw: Draw) -> None:
    x = draw.clip(2, 3, 3, 4, 5).contiguous(memory_format=memory_format)
    size = [n * f for n, f in zip(x.shape[2:], factor, strict=True)]
    nearest = space_time_upsample(x, factor)
    assert torch.equal(nearest, F.interpolate(x, size=size, mode="nearest"))
    linear = space_time_upsample(x, factor, mode="linear")
    torch.testing.assert_close(linear, F.interpolate(x, size=size, mode="trilinear", align_corners=False))
    for y in (nearest, linear):
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_learned_is_duplication_then_conv1d(frames: int, factor: int, size: int, draw: Draw) -> None:
    x, weight, bias = (
        draw.clip(2, 4, frames, 3, 5),
        draw(6, 4, size),
        draw(6),
    )
    for b in (None, bias):
        y = space_time_upsample(x, (factor, 1, 1), weight=weight, bias=b)
        torch.testing.assert_close(y, duplicate_then_conv1d(x, weight, b, factor))


@pytest.mark.parametrize(("mode", "torch_mode"), [("nearest", "nearest"), ("linear", "trilinear")])
def test_learned_resizes_space_first(mode: str, torch_mode: str, draw: Draw) -> None:
    x = draw.clip(1, 3, 4, 3, 5)
    weight = draw(2, 3, 3)
    bias = draw(2)
    large = F.interpolate(x, size=(4, 6, 15), mode=torch_mode)
    y = space_time_upsample(x, (2, 2, 3), mode=mode, weight=weight, bias=bias)
    torch.testing.assert_close(y, duplicate_then_conv1d(large, weight, bias, 2))
    assert y.is_contiguous(memory_format=CHANNELS_LAST)


def test_polyphase_identity(draw: Draw) -> None:
    """y[2t] = W0 x[t-1] + (W1+W2) x[t]; y[2t+1] = (W0+W1) x[t] + W2 x[t+1], zero outside: what kernels will compute."""
    x = draw.clip(1, 3, 5, 1, 1)
    weight = draw(3, 3, 3)
    w0, w1, w2 = weight.unbind(2)
    frames = [torch.zeros(3, dtype=torch.float64), *x[0, :, :, 0, 0].T, torch.zeros(3, dtype=torch.float64)]
    wanted = []
    for t in range(1, 6):
        wanted += [w0 @ frames[t - 1] + (w1 + w2) @ frames[t], (w0 + w1) @ frames[t] + w2 @ frames[t + 1]]
    y = space_time_upsample(x, (2, 1, 1), weight=weight)
    torch.testing.assert_close(y[0, :, :, 0, 0].T, torch.stack(wanted))


def test_identity_weight_duplicates_frames(draw: Draw) -> None:
    x = draw.clip(1, 4, 3, 3, 3)
    weight = torch.zeros(4, 4, 3, dtype=torch.float64)
    weight[:, :, 1] = torch.eye(4)
    assert torch.equal(space_time_upsample(x, (2, 1, 1), weight=weight), x.repeat_interleave(2, dim=2))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_adjoint(mode: str, draw: Draw) -> None:
    """<A x, y> = <x, A^T y> with A^T from autograd; and constants stay constant."""
    x = draw.clip(2, 3, 4, 3, 2).requires_grad_()
    out = space_time_upsample(x, (2, 3, 2), mode=mode)
    y = draw(*out.shape)
    (transposed,) = torch.autograd.grad(out, x, y)
    torch.testing.assert_close((out * y).sum(), (x * transposed).sum())
    torch.testing.assert_close(space_time_upsample(torch.ones_like(x), (2, 3, 2), mode=mode), torch.ones_like(out))


@pytest.mark.parametrize("subset", [(0,), (1,), (0, 1, 2)])
def test_gradcheck(subset: tuple[int, ...], draw: Draw) -> None:
    inputs = [
        draw.clip(1, 2, 3, 2, 2),
        draw(3, 2, 3),
        draw(3),
    ]
    for i in subset:
        inputs[i].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: space_time_upsample(x, (2, 2, 1), mode="linear", weight=weight, bias=bias), inputs
    )


def test_strided_slices_of_a_larger_tensor(draw: Draw) -> None:
    big = draw.clip(2, 7, 8, 9, 10)
    weight = draw(3, 5, 3)
    for x in (big[:, 1:6, 1:7, :6, 2:8], big[:1, :5, ::2, 1:7, ::2], big[:, 2:, :6, 1:7, :4].flip(3)):
        dense = x.clone(memory_format=torch.contiguous_format)
        for mode, torch_mode in (("nearest", "nearest"), ("linear", "trilinear")):
            y = space_time_upsample(x, (2, 2, 2), mode=mode)
            torch.testing.assert_close(y, F.interpolate(dense, scale_factor=2, mode=torch_mode))
            assert y.is_contiguous(memory_format=CHANNELS_LAST)
        y = space_time_upsample(x, (2, 1, 1), weight=weight)
        torch.testing.assert_close(y, duplicate_then_conv1d(dense, weight, None, 2))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_result_is_never_a_view_of_the_input(mode: str, draw: Draw) -> None:
    x = draw.clip(1, 2, 3, 2, 2)
    y = space_time_upsample(x, (1, 1, 1), mode=mode)
    assert torch.equal(y, x)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_empty_batch_one_frame_and_primes(mode: str, draw: Draw) -> None:
    weight = torch.randn(2, 3, 3)
    assert space_time_upsample(torch.empty(0, 3, 2, 4, 4), (2, 2, 2), mode=mode).shape == (0, 3, 4, 8, 8)
    y = space_time_upsample(torch.empty(0, 3, 2, 4, 4), (2, 2, 2), mode=mode, weight=weight)
    assert y.shape == (0, 2, 4, 8, 8)
    x = draw.clip(1, 7, 1, 13, 11)
    assert torch.equal(space_time_upsample(x, (2, 1, 1), mode=mode), x.expand(1, 7, 2, 13, 11))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_rounds_once(dtype: torch.dtype, draw: Draw) -> None:
    x = draw.clip(1, 4, 4, 4, 4).to(dtype)
    weight = draw(4, 4, 3).to(dtype)
    once = {"rtol": 1.01 * torch.finfo(dtype).eps / 2, "atol": 1e-5}
    assert torch.equal(space_time_upsample(x, (2, 2, 2)), F.interpolate(x, scale_factor=2))
    linear = space_time_upsample(x, (2, 2, 2), mode="linear")
    torch.testing.assert_close(linear.double(), F.interpolate(x.double(), scale_factor=2, mode="trilinear"), **once)
    large = F.interpolate(x.double(), scale_factor=(1, 2, 2), mode="trilinear")
    learned = space_time_upsample(x, (2, 2, 2), mode="linear", weight=weight)
    torch.testing.assert_close(learned.double(), duplicate_then_conv1d(large, weight.double(), None, 2), **once)


def test_errors(draw: Draw) -> None:
    x = draw.clip(1, 3, 4, 7, 4)
    for mode in ("area", "blur"):
        with pytest.raises(ValueError, match=rf"mode '{mode}' goes down only.*nearest, linear"):
            space_time_upsample(x, (2, 1, 1), mode=mode)
    with pytest.raises(ValueError, match=r"mode must be 'nearest' or 'linear', got 'cubic'"):
        space_time_upsample(x, (2, 1, 1), mode="cubic")
    with pytest.raises(ValueError, match="factor must be three integers"):
        space_time_upsample(x, (2.0, 1, 1))
    with pytest.raises(ValueError, match="k odd"):
        space_time_upsample(x, (2, 1, 1), weight=torch.zeros(3, 3, 4))
    with pytest.raises(ValueError, match="bias came without weight"):
        space_time_upsample(x, (2, 1, 1), bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(B, C, T, H, W\)"):
        space_time_upsample(x[0], (2, 1, 1))


class TestEveryWay(resizing.EveryWay):
    op = staticmethod(space_time_upsample)
    backward = staticmethod(space_time_upsample_backward)
    modes = MODES
    mode = "linear"

    @staticmethod
    def frames(x: Tensor, factor: int) -> Tensor:
        return x.repeat_interleave(factor, dim=2)
