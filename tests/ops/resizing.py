"""What the tests of the two resizing ops share: random calls, and every backend held against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lumiere_fast import dispatch, evidence, native
from tests.ops.common import (
    CHANNELS_LAST,
    FORMATS,
    HALF_DTYPES,
    Draw,
    assert_no_worse_than_torch,
    check_compiled,
    check_operator,
    check_operator_gradient,
    check_out,
    device_of,
    in_layout,
    steps,
)

Op = Callable[..., Tensor]

KERNELS = ("cpu", "cuda", "wgmma")
DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)
needs_core = pytest.mark.skipif(bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu")))
needs_avx2 = pytest.mark.skipif(bool(native.why_not("avx2")), reason="; ".join(native.why_not("avx2")))


def takes_learned(backend: str, dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, *HALF_DTYPES) if backend == "cpu" else dtype in HALF_DTYPES


def device_for(backend: str) -> str:
    """Where it runs, on a device that can; without, the test is skipped."""
    device = device_of(backend)
    if backend == "wgmma" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("warpgroup instructions are of compute capability 9.0 alone")
    return device


def random_call(
    op: Op, modes: tuple[str, ...], case: int, backend: str, dtype: torch.dtype, learned: bool, grad: bool = False
) -> dict[str, Any]:
    """A call that the backend takes; sizes, factors, layouts and taps drawn by `case`."""
    random, draw = np.random.default_rng(case), Draw(case)
    device = device_for(backend)
    B, T, H, W = (int(n) for n in random.integers((1, 1, 1, 1), (3, 6, 7, 14)))
    channels, layout = int(random.choice([1, 3, 8, 20, 24])), int(random.integers(4))
    if backend == "wgmma":  # as bulk copies need it: all of a frame behind one another
        channels, layout = int(random.choice([8, 24, 40])), 2 * int(random.integers(2))
    t, h, w = (int(f) for f in random.choice([1, 1, 2, 2, 3, 4], 3))
    if op.__name__ == "space_time_downsample":
        T, H, W = (T if learned else T * t), H * h, W * w
    x = in_layout(draw(B, channels, T, H, W).to(dtype).to(device), layout)
    if backend == "wgmma":
        x = x.contiguous(memory_format=CHANNELS_LAST) if layout == 0 else sliced_in_time(x)
    call: dict[str, Any] = {"x": x.requires_grad_(grad), "factor": (t, h, w), "mode": str(random.choice(modes))}
    if learned:
        out, taps = int(random.choice([1, 8, 17, 24])), int(random.choice([1, 3, 5]))
        weight = draw(out, channels, taps) / math.sqrt(channels * taps)
        call["weight"] = weight.to(dtype).to(device).requires_grad_(grad)
        if random.integers(4):
            call["bias"] = draw(out).to(dtype).to(device).requires_grad_(grad)
    return call


def sliced_in_time(x: Tensor) -> Tensor:
    """The same numbers in channels last, with a frame of something else between two of them."""
    whole = x.repeat_interleave(2, 2).contiguous(memory_format=CHANNELS_LAST)
    return whole[:, :, ::2]


def doubled(call: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in call.items()
    }


def leaves_of(call: dict[str, Any]) -> list[Tensor]:
    return [value for value in call.values() if isinstance(value, Tensor) and value.requires_grad]


def gradients_of(op: Op, call: dict[str, Any], backend: str, seed: Tensor) -> list[Tensor]:
    y = op(**call, backend=backend)
    return list(torch.autograd.grad(y, leaves_of(call), seed.to(y)))


def check_backend(op: Op, modes: tuple[str, ...], backend: str, dtype: torch.dtype) -> None:
    for learned in (False, True):
        if (backend == "wgmma" and not learned) or (learned and not takes_learned(backend, dtype)):
            continue
        for case in range(24):
            call = random_call(op, modes, case, backend, dtype, learned)
            ours, theirs = (op(**call, backend=each) for each in (backend, "reference"))
            assert steps(ours) == steps(theirs) and ours.dtype == dtype
            both = learned and max(call["factor"][1:]) > 1  # rounded between space and time too
            exact = op(**doubled(call), backend="reference")
            # Where torch happens to be exact, a rounding in the last place of an intermediate is still one.
            assert_no_worse_than_torch(ours, theirs, exact, rounded=dtype, roundings=2 if both else 1)


def check_backend_gradients(op: Op, modes: tuple[str, ...], backend: str, dtype: torch.dtype) -> None:
    for learned in (False, True):
        if (backend == "wgmma" and not learned) or (learned and (backend == "cpu" or dtype not in HALF_DTYPES)):
            continue  # on the CPU a learned resize has torch's gradients, the reference's
        for case in range(12):
            call = random_call(op, modes, case, backend, dtype, learned, grad=True)
            seed = Draw(100 + case)(*op(**call, backend="reference").shape)
            ours, theirs = (gradients_of(op, call, each, seed) for each in (backend, "reference"))
            exact = gradients_of(op, doubled(call), "reference", seed)
            for mine, other, truth in zip(ours, theirs, exact, strict=True):
                assert_no_worse_than_torch(mine, other, truth, factor=3.0, rounded=dtype, roundings=4)


def check_learned_backward(op: Op, modes: tuple[str, ...], backward: Callable[..., Any]) -> None:
    """The backward of the GPU's backends is torch and adjoints, so that it runs here; each argument by itself too."""
    for case in range(12):
        call = random_call(op, modes, case, "cpu", torch.float64, learned=True, grad=True)
        names = [name for name, value in call.items() if isinstance(value, Tensor)]
        seed = Draw(100 + case)(*op(**call, backend="reference").shape)
        expected = dict(zip(names, gradients_of(op, call, "reference", seed), strict=True))
        for wanted in (names, *([name] for name in names)):
            some = {n: v.detach().requires_grad_(n in wanted) if n in names else v for n, v in call.items()}
            arguments = (some["x"], some["factor"], some["mode"], some["weight"], some.get("bias"))
            of_x, *_, of_weight, of_bias = backward((seed,), *arguments)
            found = {"x": of_x, "weight": of_weight, "bias": of_bias}
            assert {name for name, value in found.items() if value is not None} == set(wanted)
            for name in wanted:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


def check_half_written_memory(op: Op, learned: bool) -> None:
    """Into every other column of something larger, in both formats: nothing beside is written."""
    draw = Draw(50, torch.float32)
    parameters = {"weight": draw(16, 24, 3), "bias": draw(16)} if learned else {}
    for memory_format in FORMATS:
        x = draw.clip(2, 48, 6, 4, 12, memory_format=memory_format)[:, ::2, :, :, 2:8]
        expected = op(x, (2, 2, 3), **parameters, backend="reference")
        held = torch.full((*expected.shape[:-1], 2 * expected.shape[-1]), math.nan)
        held = held.contiguous(memory_format=memory_format)
        y = op(x, (2, 2, 3), **parameters, backend="cpu", out=held[..., 1::2])
        torch.testing.assert_close(y, expected)
        assert held.isnan().sum() == held.numel() - y.numel()


def check_captured(op: Op, mode: str) -> None:
    """Both ways are chosen by "auto", and pass through torch.compile and torch's own check of operators."""
    draw = Draw(56, torch.float32)
    x, weight, bias = draw.clip(2, 32, 5, 4, 6), draw(16, 32, 3), draw(16)
    even = draw.clip(1, 320, 4, 2, 2, grad=True)
    torch.compiler.reset()  # of what earlier tests compiled of the same function
    with dispatch.record_backends() as used:
        check_compiled(op, even, (2, 2, 2), mode=mode)
        check_compiled(op, x, (2, 2, 3), mode=mode, weight=weight, bias=bias)
    assert used == {"cpu"}
    check_operator(op, even, (2, 2, 2), mode=mode, backend="cpu")
    check_operator(op, x, (2, 2, 3), mode=mode, weight=weight, bias=bias, backend="cpu")
    with dispatch.record_backends() as used:
        op(x, (2, 2, 3), mode=mode, weight=weight.clone().requires_grad_())
        op(x.double(), (2, 2, 3), mode=mode, weight=weight.double())
        op(x[:, :8], (2, 2, 3), mode=mode, weight=weight[:, :8])  # torch is faster at few channels
    assert used == {"reference"}


def check_compiled_gradient(op: Op, mode: str) -> None:
    """Through AOT autograd, which traces the backward: the adjoint is an operator there."""
    x = Draw(57, torch.float32).clip(2, 8, 4, 4, 6, grad=True)
    compiled = torch.compile(lambda x: op(x, (2, 2, 3), mode=mode).square().sum(), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(op(x, (2, 2, 3), mode=mode, backend="reference").square().sum(), x)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()


def check_choice_on_gpus(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" takes, by what was proved, on which GPU, and for which call; no GPU needed to ask."""
    found = dispatch.registered(op.__name__)
    monkeypatch.setattr(native, "why_not", lambda half: [])

    def fake(*shape: int, strides: Sequence[int] = (), dtype: torch.dtype = torch.bfloat16) -> Tensor:
        dense = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return torch.empty_strided(shape, strides or dense, dtype=dtype, device="cuda")

    def chosen(*proved: str, capability: tuple[int, int] = (9, 0), **changes: Any) -> str:
        call = {"x": clip, "weight": weight, "bias": None, "mode": "linear", "factor": (2, 1, 1), **changes}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        unproven = lambda op, backend, device, check: [] if backend in proved else ["not proved"]  # noqa: E731
        monkeypatch.setattr(evidence, "why_unproven", unproven)
        arguments = found.bind(**call)
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            return dispatch.select(found, None, arguments)

    both, rows = ("cuda", "wgmma"), (12288, 1, 2048, 512, 64)  # strides of 6 frames of 4 by 8 pixels of 64 channels
    with FakeTensorMode():
        clip, weight = fake(2, 64, 6, 4, 8, strides=rows), fake(72, 64, 3)
        assert chosen(*both) == "wgmma"
        assert chosen("cuda") == "cuda" and chosen("wgmma") == "wgmma" and chosen() == "reference"
        assert chosen(*both, capability=(8, 0)) == chosen(*both, capability=(10, 0)) == "cuda"
        assert chosen(*both, capability=(7, 5)) == "reference"
        assert chosen(*both, weight=None) == "cuda"  # fixed taps
        assert chosen(*both, factor=(2, 2, 2)) == "wgmma"
        assert chosen(*both, x=fake(2, 64, 6, 4, 8)) == "cuda"  # contiguous
        assert chosen(*both, x=fake(2, 64, 6, 4, 4, strides=rows)) == "cuda"  # rows lie apart
        assert chosen(*both, x=fake(2, 64, 3, 4, 8, strides=(12288, 1, 4096, 512, 64))) == "wgmma"
        thin: dict[str, Any] = {"x": fake(2, 20, 6, 4, 8, strides=rows), "weight": fake(8, 20, 3)}
        assert chosen(*both, **thin) == "wgmma" and chosen(*both, **thin, factor=(2, 2, 2)) == "cuda"
        wide: dict[str, Any] = {"x": fake(2, 64, 6, 4, 8, strides=rows, dtype=torch.float32)}
        assert chosen(*both, **wide) == "reference" and chosen(*both, **wide, weight=None) == "cuda"
        assert chosen(*both, weight=fake(72, 64, 3, dtype=torch.float32)) == "reference"


def identity(channels: int, taps: int, dtype: torch.dtype) -> Tensor:
    weight = torch.zeros(channels, channels, taps, dtype=dtype)
    weight[:, :, taps // 2] = torch.eye(channels, dtype=dtype)
    return weight


class EveryWay:
    """What is tested of either op through every way to it: as an operator, compiled, by each backend on its device."""

    op: Op
    backward: Callable[..., Any]
    modes: tuple[str, ...]
    mode: str  # one of them, of several taps
    frames: Callable[[Tensor, int], Tensor]  # what identity weights make of a clip, by the factor in time

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize(("learned", "factor"), [(False, (2, 2, 2)), (True, (2, 2, 2)), (True, (2, 1, 1))])
    def test_operator(self, learned: bool, factor: tuple[int, int, int], memory_format: torch.memory_format) -> None:
        draw = Draw(20)
        x = draw.clip(2, 3, 4, 6, 2, memory_format=memory_format, grad=True)
        call: dict[str, Any] = {"factor": factor, "mode": "linear" if learned else self.mode}
        if learned:
            call |= {"weight": draw(5, 3, 3, grad=True), "bias": draw(5, grad=True)}
        check_operator(self.op, x, **call)
        check_operator_gradient(self.op, x, **call)
        check_compiled(self.op, x, **call)
        with torch.no_grad():
            check_out(self.op, x, **call)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("backend", KERNELS)
    def test_every_backend_is_the_reference_on_its_device(self, backend: str, dtype: torch.dtype) -> None:
        check_backend(self.op, self.modes, backend, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("backend", KERNELS)
    def test_gradients_of_every_backend_are_the_reference_s(self, backend: str, dtype: torch.dtype) -> None:
        check_backend_gradients(self.op, self.modes, backend, dtype)

    @needs_core
    def test_gradients_of_a_learned_resize_by_temporal_conv(self) -> None:
        check_learned_backward(self.op, self.modes, self.backward)

    @needs_avx2
    @pytest.mark.parametrize("learned", [False, True])
    def test_cpu_takes_slices(self, learned: bool) -> None:
        check_half_written_memory(self.op, learned)

    @needs_avx2
    def test_cpu_is_chosen_and_captured(self) -> None:
        check_captured(self.op, "linear")

    @needs_core
    def test_gradients_pass_through_compile(self) -> None:
        for mode in self.modes:
            check_compiled_gradient(self.op, mode)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
    @pytest.mark.parametrize("backend", KERNELS)
    def test_identity_weights_pass_bits_on(self, backend: str, dtype: torch.dtype) -> None:
        """Every path: what a fresh resize of an inflated model computes is its image model's, to the bit."""
        if not takes_learned(backend, dtype):
            pytest.skip(f"{backend} multiplies no {dtype}")
        device = device_for(backend)
        for channels, frames, taps, t in [(24, 8, 3, 2), (64, 7, 3, 2), (40, 5, 5, 3), (16, 4, 1, 4), (320, 2, 3, 2)]:
            x = Draw(58).clip(2, channels, frames, 5, 7).to(device, dtype)
            weight = identity(channels, taps, dtype).to(device)
            for bias in (None, x.new_zeros(channels)):
                y = self.op(x, (t, 1, 1), weight=weight, bias=bias, backend=backend)
                assert torch.equal(y, self.frames(x, t))

    def test_warpgroups_where_a_gpu_has_proved_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check_choice_on_gpus(self.op, monkeypatch)
