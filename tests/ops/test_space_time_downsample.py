from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere_fast.ops import space_time_downsample
from lumiere_fast.ops.space_time_downsample import MODES, space_time_downsample_backward
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
    return Draw(20)


def loop_blur(x: Tensor, factor: tuple[int, int, int]) -> Tensor:
    """The definition, sample by sample: [1 2 1]/4 along each resized axis, centred on factor * i, edges repeated."""
    sizes = [n // f for n, f in zip(x.shape[2:], factor, strict=True)]
    out = torch.zeros(*x.shape[:2], *sizes, dtype=x.dtype)
    for index in itertools.product(*(range(n) for n in sizes)):
        for taps in itertools.product(*([(-1, 1), (0, 2), (1, 1)] if f > 1 else [(0, 4)] for f in factor)):
            weight, source = 1.0, []
            for axis, (offset, quarter) in enumerate(taps):
                weight *= quarter / 4
                source.append(min(max(index[axis] * factor[axis] + offset, 0), x.shape[2 + axis] - 1))
            out[(..., *index)] += weight * x[(..., *source)]
    return out


def conv1d_then_stride(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The public implementations' way: rearrange to (b h w) c t, Conv1d of stride 1, keep every stride-th frame."""
    b, c, t, h, w = x.shape
    y = F.conv1d(x.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t), weight, bias, padding=weight.shape[2] // 2)
    return y[..., ::stride].reshape(b, h, w, weight.shape[0], -1).permute(0, 3, 4, 1, 2)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_fixed_taps_equal_torch(factor: tuple[int, int, int], memory_format: torch.memory_format, draw: Draw) -> None:
    t, h, w = factor
    x = draw.clip(2, 3, 2 * t, 3 * h, 2 * w).contiguous(memory_format=memory_format)
    expected = {
        "nearest": x[:, :, ::t, ::h, ::w],
        "linear": F.interpolate(x, size=(2, 3, 2), mode="trilinear", align_corners=False),
        "area": F.avg_pool3d(x, factor),
        "blur": loop_blur(x, factor),
    }
    for mode, wanted in expected.items():
        y = space_time_downsample(x, factor, mode=mode)
        torch.testing.assert_close(y, wanted, msg=lambda text, mode=mode: f"{mode}: {text}")
        assert y.is_contiguous(memory_format=memory_format), mode


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_learned_is_conv1d_then_stride(frames: int, stride: int, size: int, draw: Draw) -> None:
    x, weight, bias = (
        draw.clip(2, 4, frames, 3, 5),
        draw(6, 4, size),
        draw(6),
    )
    for b in (None, bias):
        y = space_time_downsample(x, (stride, 1, 1), weight=weight, bias=b)
        assert y.shape[2] == -(-frames // stride)
        torch.testing.assert_close(y, conv1d_then_stride(x, weight, b, stride))


@pytest.mark.parametrize("mode", ["nearest", "linear", "area", "blur"])
def test_learned_resizes_space_first(mode: str, draw: Draw) -> None:
    x = draw.clip(1, 3, 5, 4, 6)
    weight = draw(3, 3, 3)
    small = space_time_downsample(x, (1, 2, 2), mode=mode)
    y = space_time_downsample(x, (2, 2, 2), mode=mode, weight=weight)
    torch.testing.assert_close(y, conv1d_then_stride(small, weight, None, 2))


def test_identity_weight_keeps_every_second_frame(draw: Draw) -> None:
    x = draw.clip(1, 4, 7, 3, 3)
    weight = torch.zeros(4, 4, 3, dtype=torch.float64)
    weight[:, :, 1] = torch.eye(4)
    assert torch.equal(space_time_downsample(x, (2, 1, 1), weight=weight), x[:, :, ::2])


@pytest.mark.parametrize("mode", ["nearest", "linear", "area", "blur"])
def test_adjoint(mode: str, draw: Draw) -> None:
    """<A x, y> = <x, A^T y> with A^T from autograd."""
    x = draw.clip(2, 3, 4, 6, 4).requires_grad_()
    out = space_time_downsample(x, (2, 3, 2), mode=mode)
    y = draw(*out.shape)
    (transposed,) = torch.autograd.grad(out, x, y)
    torch.testing.assert_close((out * y).sum(), (x * transposed).sum())
    torch.testing.assert_close(space_time_downsample(torch.ones_like(x), (2, 3, 2), mode=mode), torch.ones_like(out))


@pytest.mark.parametrize("subset", [(0,), (1,), (0, 1, 2)])
def test_gradcheck(subset: tuple[int, ...], draw: Draw) -> None:
    inputs = [
        draw.clip(1, 2, 5, 4, 2),
        draw(3, 2, 3),
        draw(3),
    ]
    for i in subset:
        inputs[i].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: space_time_downsample(x, (2, 2, 1), mode="area", weight=weight, bias=bias), inputs
    )


def test_strided_slices_of_a_larger_tensor(draw: Draw) -> None:
    big = draw.clip(2, 7, 8, 9, 10)
    weight = draw(3, 5, 3)
    for x in (big[:, 1:6, 1:7, :6, 2:8], big[:1, :5, ::2, 1:7, ::2][..., :4], big[:, 2:, :6, 1:7, :4].flip(3)):
        dense = x.clone(memory_format=torch.contiguous_format)
        factor = (2, 2, 2)
        torch.testing.assert_close(space_time_downsample(x, factor, mode="area"), F.avg_pool3d(dense, factor))
        y = space_time_downsample(x, (2, 1, 1), weight=weight)
        torch.testing.assert_close(y, conv1d_then_stride(dense, weight, None, 2))
        assert y.is_contiguous(memory_format=CHANNELS_LAST)


def test_result_is_never_a_view_of_the_input(draw: Draw) -> None:
    for shape, factor in [((1, 2, 2, 3, 3), (2, 1, 1)), ((1, 2, 1, 1, 1), (1, 1, 1)), ((1, 1, 3, 3, 3), (3, 3, 3))]:
        x = draw.clip(*shape)
        for mode in ("nearest", "linear"):
            y = space_time_downsample(x, factor, mode=mode)
            assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("mode", ["nearest", "linear", "area", "blur"])
def test_empty_batch_one_frame_and_primes(mode: str, draw: Draw) -> None:
    assert space_time_downsample(torch.empty(0, 3, 2, 4, 4), (2, 2, 2), mode=mode).shape == (0, 3, 1, 2, 2)
    x = draw.clip(1, 7, 1, 13, 11)
    assert space_time_downsample(x, (1, 13, 11), mode=mode).shape == (1, 7, 1, 1, 1)
    weight = torch.randn(2, 3, 3)
    assert space_time_downsample(torch.empty(0, 3, 5, 4, 4), (2, 2, 2), mode=mode, weight=weight).shape == (
        0,
        2,
        3,
        2,
        2,
    )


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_rounds_once(dtype: torch.dtype, draw: Draw) -> None:
    x = draw.clip(1, 4, 4, 4, 4).to(dtype)
    weight = draw(4, 4, 3).to(dtype)
    y = space_time_downsample(x, (2, 2, 2), mode="area")
    assert torch.equal(y, F.avg_pool3d(x.double(), 2).to(dtype))
    y = space_time_downsample(x, (2, 1, 1), weight=weight)
    wanted = conv1d_then_stride(x.double(), weight.double(), None, 2)
    assert y.dtype == dtype
    # One rounding is at most half an ulp; fp32 accumulation may move a value across one rounding boundary.
    torch.testing.assert_close(y.double(), wanted, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-5)


def test_errors(draw: Draw) -> None:
    x = draw.clip(1, 3, 4, 7, 4)
    with pytest.raises(ValueError, match=r"H is 7.*factor 2.*nearest accepted: 6 and 8"):
        space_time_downsample(x, (1, 2, 2))
    with pytest.raises(ValueError, match=r"T is 4.*factor 5.*nearest accepted: 5"):
        space_time_downsample(x, (5, 1, 1))
    with pytest.raises(ValueError, match="factor must be three integers"):
        space_time_downsample(x, (2, 2))
    with pytest.raises(ValueError, match="factor must be three integers"):
        space_time_downsample(x, (0, 1, 1))
    with pytest.raises(ValueError, match=r"mode must be 'nearest' or 'linear' or 'area' or 'blur', got 'cubic'"):
        space_time_downsample(x, (2, 1, 1), mode="cubic")
    with pytest.raises(ValueError, match="k odd"):
        space_time_downsample(x, (2, 1, 1), weight=torch.zeros(3, 3, 2))
    with pytest.raises(ValueError, match="C_in = 3"):
        space_time_downsample(x, (2, 1, 1), weight=torch.zeros(3, 4, 3))
    with pytest.raises(ValueError, match="bias came without weight"):
        space_time_downsample(x, (2, 1, 1), bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\), got \(4,\)"):
        space_time_downsample(x, (2, 1, 1), weight=torch.zeros(3, 3, 3), bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"\(B, C, T, H, W\)"):
        space_time_downsample(x[0], (2, 1, 1))


class TestEveryWay(resizing.EveryWay):
    op = staticmethod(space_time_downsample)
    backward = staticmethod(space_time_downsample_backward)
    modes = MODES
    mode = "area"

    @staticmethod
    def frames(x: Tensor, factor: int) -> Tensor:
        return x[:, :, ::factor]
