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
    CONTIGUOUS,
    FORMATS,
    HALF_DTYPES,
    Draw,
    check_compiled,
    check_operator,
    check_operator_gradient,
    check_out,
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


CALLS = [
    (False, (2, 2, 2), "linear", CHANNELS_LAST),
    (True, (2, 2, 2), "linear", CHANNELS_LAST),
    (True, (2, 1, 1), "nearest", CONTIGUOUS),
]


@pytest.mark.parametrize(("learned", "factor", "mode", "memory_format"), CALLS)
def test_operator(
    learned: bool, factor: tuple[int, int, int], mode: str, memory_format: torch.memory_format, draw: Draw
) -> None:
    x = draw.clip(2, 3, 4, 3, 2, memory_format=memory_format, grad=True)
    parameters = {"weight": draw(5, 3, 3, grad=True), "bias": draw(5, grad=True)} if learned else {}
    check_operator(space_time_upsample, x, factor, mode=mode, **parameters)
    check_operator_gradient(space_time_upsample, x, factor, mode=mode, **parameters)
    check_compiled(space_time_upsample, x, factor, mode=mode, **parameters)
    with torch.no_grad():
        check_out(space_time_upsample, x, factor, mode=mode, **parameters)


# Every backend, on its device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", resizing.DTYPES, ids=str)
@pytest.mark.parametrize("backend", resizing.KERNELS)
def test_every_backend_is_the_reference_on_its_device(backend: str, dtype: torch.dtype) -> None:
    resizing.check_backend(space_time_upsample, MODES, backend, dtype)


@pytest.mark.parametrize("dtype", resizing.DTYPES, ids=str)
@pytest.mark.parametrize("backend", resizing.KERNELS)
def test_gradients_of_every_backend_are_the_reference_s(backend: str, dtype: torch.dtype) -> None:
    resizing.check_backend_gradients(space_time_upsample, MODES, backend, dtype)


@resizing.needs_core
def test_gradients_of_a_learned_resize_by_temporal_conv() -> None:
    resizing.check_learned_backward(space_time_upsample, MODES, space_time_upsample_backward)


@resizing.needs_avx2
@pytest.mark.parametrize("learned", [False, True])
def test_cpu_takes_slices(learned: bool) -> None:
    resizing.check_half_written_memory(space_time_upsample, learned)


@resizing.needs_avx2
def test_cpu_is_chosen_and_captured() -> None:
    resizing.check_captured(space_time_upsample, "linear")


@resizing.needs_core
@pytest.mark.parametrize("mode", MODES)
def test_gradients_pass_through_compile(mode: str) -> None:
    resizing.check_compiled_gradient(space_time_upsample, mode)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("backend", resizing.KERNELS)
def test_identity_weights_pass_bits_on(backend: str, dtype: torch.dtype) -> None:
    """Every path: what a fresh resize of an inflated model computes is its image model's, to the bit."""
    if not resizing.takes_learned(backend, dtype):
        pytest.skip(f"{backend} multiplies no {dtype}")
    device = resizing.device_for(backend)
    for channels, frames, taps, factor in [(24, 8, 3, 2), (64, 7, 3, 2), (40, 5, 5, 3), (16, 4, 1, 4), (320, 2, 3, 2)]:
        x = Draw(58).clip(2, channels, frames, 5, 7).to(device, dtype)
        weight = resizing.identity(channels, taps, dtype).to(device)
        for bias in (None, x.new_zeros(channels)):
            y = space_time_upsample(x, (factor, 1, 1), weight=weight, bias=bias, backend=backend)
            assert torch.equal(y, x.repeat_interleave(factor, dim=2))


def test_warpgroups_where_a_gpu_has_proved_them(monkeypatch: pytest.MonkeyPatch) -> None:
    resizing.check_choice_on_gpus(space_time_upsample, monkeypatch)
