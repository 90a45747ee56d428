"""The door to the native core: what it says of itself, and that its CPU half computes the reference's numbers."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lumiere_fast import native, ops
from lumiere_fast.ops.blend_windows import blend_windows_reference
from lumiere_fast.ops.denoise_step import denoise_step_reference
from tests.ops.common import CHANNELS_LAST, FORMATS, Draw

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STARTS = (0, 6, 12)  # windows of 8 frames, overlap 2, over 20 frames
SHARED_MEMORY = "the output, or the memory to work in, lies in the memory of another tensor"

needs_core = pytest.mark.skipif(bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu")))


@pytest.fixture
def draw() -> Draw:
    return Draw(41)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def blended(
    windows: list[Tensor], starts: list[int], extent: tuple[int, ...], weights: list[float] | None = None
) -> Tensor:
    """Into NaN-poisoned memory in the windows' format."""
    first = windows[0]
    shape = (*first.shape[:2], *extent, *first.shape[2 + len(extent) :])
    out = torch.full(shape, torch.nan, dtype=first.dtype)
    if first.is_contiguous(memory_format=CHANNELS_LAST):
        out = out.contiguous(memory_format=CHANNELS_LAST)
    native.blend_windows(windows, starts, extent, weights, out=out)
    return out


def check(
    windows: list[Tensor], starts: list[int], extent: tuple[int, ...], weights: list[float] | None = None
) -> None:
    wanted = blend_windows_reference(windows, starts, extent, weights)
    assert torch.equal(blended(windows, starts, extent, weights), wanted)


@needs_core
class TestBlendWindows:
    """Bit for bit: the core and torch round every step alike."""

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_the_reference(self, dtype: torch.dtype, memory_format: torch.memory_format, draw: Draw) -> None:
        for b, c, h, w in [(1, 1, 1, 1), (2, 3, 5, 7), (1, 3, 16, 16), (3, 8, 1, 13), (1, 16, 3, 31)]:
            windows = [draw(b, c, 8, h, w).to(dtype).contiguous(memory_format=memory_format) for _ in STARTS]
            check(windows, [*STARTS], (20,))
            check(windows, [3, 0, 2], (11,))
            for starts, frames in (([*STARTS], 20), ([3, 0, 2], 11)):
                check(windows, starts, (frames,), (draw(8).abs() + 0.1).tolist())

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_in_space_too(self, dtype: torch.dtype, memory_format: torch.memory_format, draw: Draw) -> None:
        starts = [(t, h, w) for t in (0, 3) for h in (0, 4) for w in (0, 2, 6)]
        flat = [value for start in starts for value in start]
        for c in (1, 3):
            windows = [draw(2, c, 5, 6, 4).to(dtype).contiguous(memory_format=memory_format) for _ in starts]
            check(windows, flat, (8, 10, 10))
            weights = (draw(5 + 6 + 4).abs() + 0.1).tolist()
            wanted = blend_windows_reference(windows, flat, (8, 10, 10), weights)
            # Up to eight windows overlap: torch may add their weights up in another order.
            bound = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4e-7 if dtype != torch.float64 else 1e-15}
            torch.testing.assert_close(blended(windows, flat, (8, 10, 10), weights), wanted, **bound)

    def test_uneven_windows_one_frame_and_no_batch(self, draw: Draw) -> None:
        lengths = [5, 8, 4, 1]
        check([draw(2, 3, n, 3, 5).float() for n in lengths], [0, 3, 9, 7], (13,))
        check([draw(1, 2, 1, 3, 3).float()], [0], (1,))
        check([draw(0, 3, 8, 4, 4).float() for _ in STARTS], [*STARTS], (20,))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_windows_that_agree_and_windows_alone(self, dtype: torch.dtype, draw: Draw) -> None:
        clip = draw(1, 3, 20, 5, 7).to(dtype)
        windows = [clip[:, :, s : s + 8] for s in STARTS]
        assert torch.equal(blended(windows, [*STARTS], (20,)), clip)
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(dtype).tiny, torch.finfo(dtype).max])
        alone = special.to(dtype).reshape(1, 1, 1, 1, 6)
        assert torch.equal(blended([alone], [0], (1,)).view(torch.uint8), alone.view(torch.uint8))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_every_half_precision_number_passes_through_fp32(self, dtype: torch.dtype) -> None:
        """All 2**16 of them, blended: conversions there and back, with subnormals, infinities and NaN."""
        numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(1, 1, 1, 256, 256)
        zeros = torch.zeros_like(numbers)
        for partner in (numbers, zeros, numbers.flip(3)):
            got = blended([numbers, partner], [0, 0], (1,))
            wanted = blend_windows_reference([numbers, partner], [0, 0], (1,), None)
            assert torch.equal(got.isnan(), wanted.isnan())
            assert torch.equal(got.nan_to_num(nan=0.5), wanted.nan_to_num(nan=0.5))
            assert wanted.isfinite().sum() > 30000

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_strides_of_windows_and_of_out(self, dtype: torch.dtype, draw: Draw) -> None:
        """Slices of larger tensors in many orders of the axes, one for each window; nothing else is written."""
        orders = [(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (2, 0, 4, 1, 3), (4, 3, 2, 1, 0)]

        def inside(order: tuple[int, ...], shape: tuple[int, ...], whole: Tensor) -> Tensor:
            """A view of `shape` into `whole`, whose axes lie in `order`; odd entries of every axis."""
            back = [order.index(axis) for axis in range(5)]
            view = whole.permute(back)[1::2, 1::2, 1::2, 1::2, 1::2]
            assert view.shape == shape
            return view

        def larger(order: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
            return [2 * shape[axis] + 1 for axis in order]

        for first in range(4):
            shape = (2, 3, 8, 5, 7) if first % 2 else (1, 1, 8, 2, 600)
            turned = orders[first:] + orders[:first]
            windows = [inside(o, shape, draw(*larger(o, shape)).to(dtype)) for o in turned[:3]]
            wanted = blend_windows_reference(windows, [*STARTS], (20,), None)
            whole = torch.full(larger(turned[3], wanted.shape), torch.nan, dtype=dtype)
            out = inside(turned[3], wanted.shape, whole)
            native.blend_windows(windows, STARTS, (20,), None, out=out)
            assert torch.equal(out, wanted)
            assert whole.isnan().sum() == whole.numel() - out.numel()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_windows_and_out_in_different_formats(self, dtype: torch.dtype, draw: Draw) -> None:
        """Pixels of few channels on one side and planes on the other: walked along the planes, in cuts."""
        for channels in (2, 3, 16, 40):
            planes = [draw(2, channels, 8, 11, 23).to(dtype) for _ in STARTS]
            pixels = [window.contiguous(memory_format=CHANNELS_LAST) for window in planes]
            wanted = blend_windows_reference(planes, [*STARTS], (20,), None)
            for windows in (planes, pixels, [pixels[0], *planes[1:]]):
                for memory_format in FORMATS:
                    out = torch.full_like(wanted, torch.nan).contiguous(memory_format=memory_format)
                    native.blend_windows(windows, STARTS, (20,), None, out=out)
                    assert torch.equal(out, wanted)

    def test_an_array_interface_alone_will_do(self, draw: Draw) -> None:
        class Exporter:
            def __init__(self, array: Any, **changes: Any) -> None:
                self.array = array
                self.__array_interface__ = {**array.__array_interface__, **changes}

        window, out = draw(1, 2, 3, 4, 5).float(), torch.full((1, 2, 3, 4, 5), torch.nan)
        native.blend_windows([Exporter(window.numpy())], [0], (3,), None, out=Exporter(out.numpy()))
        assert Exporter(window.numpy()).__array_interface__["strides"] is None
        assert torch.equal(out, window)
        turned = draw(5, 2, 3, 4, 1).float().transpose(0, 4)
        native.blend_windows([Exporter(turned.numpy())], [0], (3,), None, out=Exporter(out.numpy()))
        assert torch.equal(out, turned)
        with pytest.raises(ValueError, match="without an address; give a numpy array"):
            native.blend_windows([Exporter(window.numpy(), data=None)], [0], (3,), None, out=out)

    def test_threads_change_nothing(self, draw: Draw, threads: None) -> None:
        for memory_format in FORMATS:
            windows = [draw(1, 3, 8, 131, 127).float().contiguous(memory_format=memory_format) for _ in STARTS]
            wanted = blend_windows_reference(windows, [*STARTS], (20,), None)
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                assert torch.equal(blended(windows, [*STARTS], (20,)), wanted)

    def test_computes_on_torch_s_threads(self, draw: Draw, threads: None) -> None:
        """Through a GOMP_parallel that counts its calls and hands them on to torch's."""
        address = native._torch_threads()
        if not address:
            assert sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info()
            pytest.skip("this torch does not compute with an OpenMP runtime that has GOMP_parallel")
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        teams: list[int] = []

        def parallel(work: int, data: int, num_threads: int, flags: int) -> None:
            teams.append(num_threads)
            kind(address)(work, data, num_threads, flags)

        counted = kind(parallel)
        native.load().borrow_threads(ctypes.cast(counted, ctypes.c_void_p).value)
        try:
            windows = [draw(1, 3, 8, 151, 157).float() for _ in STARTS]
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(
                    blended(windows, [*STARTS], (20,)), blend_windows_reference(windows, STARTS, (20,), None)
                )
            blended([window[..., :4] for window in windows], [*STARTS], (20,))
        finally:
            native.load().borrow_threads(address)
        assert teams == [2, 3]  # neither one thread nor little work asks for a team

    def test_takes_numpy_and_dlpack_without_a_copy(self, draw: Draw) -> None:
        windows = [draw(2, 3, 8, 4, 5).float() for _ in STARTS]
        wanted = blend_windows_reference(windows, [*STARTS], (20,), None)
        arrays = [np.asarray(window)[..., ::-1] for window in windows]
        array = np.full(wanted.shape, np.nan, dtype=np.float32)[..., ::-1]
        native.blend_windows(arrays, STARTS, (20,), None, out=array)
        np.testing.assert_array_equal(array[..., ::-1], wanted.numpy())
        for dtype in DTYPES:
            cast = [window.to(dtype).transpose(3, 4) for window in windows]
            out = torch.full_like(wanted, torch.nan).to(dtype).transpose(3, 4)
            native.blend_windows([Foreign(window) for window in cast], STARTS, (20,), None, out=Foreign(out))
            assert torch.equal(out, blend_windows_reference(cast, [*STARTS], (20,), None))

    def test_negated_views_are_read_as_what_they_mean(self, draw: Draw) -> None:
        window = draw(1, 2, 3, 2, 2)
        negated = torch.view_as_complex(torch.stack([window, window], -1)).conj().imag
        assert negated.is_neg()
        assert torch.equal(blended([negated], [0], (3,)), -window)
        with pytest.raises(ValueError, match="out is a negated view"):
            native.blend_windows([window], [0], (3,), None, out=negated)

    def test_errors(self, draw: Draw) -> None:
        windows = [draw(1, 2, 8, 4, 4).float() for _ in STARTS]
        out = torch.empty(1, 2, 20, 4, 4)

        def refused(match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
            arguments: dict[str, Any] = {"starts": [*STARTS], "extent": (20,), "weights": None, "out": out} | changes
            with pytest.raises(error, match=match):
                native.blend_windows(arguments.pop("windows", windows), **arguments)

        refused("a position of the video is in no window", starts=[0, 6, 7])
        refused("a window sticks out of the video", starts=[0, 6, 13])
        refused("a window sticks out of the video", starts=[-1, 6, 12])
        refused("invalid weights", weights=[1.0] * 7 + [0.0])
        refused("weights must hold one number for each place", weights=[1.0] * 7)
        refused("invalid argument", windows=[], starts=[])
        refused("one integer a window and blended axis", starts=[0, 6])
        refused("extent must be", extent=(20, 4))
        refused("out must have the extent", extent=(21,))
        refused("5 axes", windows=[window[0] for window in windows])
        refused("invalid shape", windows=[*windows[:2], windows[2][:, :1]])
        folded = torch.empty(1, 1, 20, 4, 4).expand(1, 2, -1, -1, -1)
        refused("elements of the output may lie on top of one another", out=folded)
        refused(
            r"windows\[1\] must be float32 on the CPU like out, got float64",
            windows=[windows[0], windows[1].double(), windows[2]],
        )
        refused(
            r"windows\[0\] must be float32, float64, float16 or bfloat16, got torch.int32",
            windows=[w.int() for w in windows],
        )
        refused(r"out must be on the CPU or a CUDA device, got meta", out=out.to("meta"))
        refused(r"windows\[0\] must be a tensor", windows=[None, *windows[1:]])
        refused(r"starts must be integers of at most 64 bits, got 0\.5", starts=[0.5, 6, 12])
        refused("starts must be integers of at most 64 bits, got 'a'", starts=["a", 6, 12])
        refused("starts must be a sequence, got None", starts=None)
        refused("extent must be integers of at most 64 bits, got 9223372036854775808", extent=(2**63,))
        refused("extent must be a sequence, got 20", extent=20)
        refused("weights must be None or numbers, got 'a'", weights=["a"] * 8)
        refused("weights must be a sequence, got 1.0", weights=1.0)
        refused("windows must be a sequence of tensors", windows=None)
        refused("out must be a tensor, a numpy array", out=None)
        sparse = "must be a dense tensor, got one of layout torch.sparse_coo"
        refused(rf"windows\[1\] {sparse}", windows=[windows[0], windows[1].to_sparse(), windows[2]])
        refused(f"out {sparse}", out=out.to_sparse())
        with pytest.raises(ValueError, match=r"windows\[0\] must be a tensor with memory of its own"):
            torch.func.vmap(lambda w: native.blend_windows([w], [0], (8,), None, out=out[:, :, :8]))(windows[0][None])
        refused("over 1e100 times its least", weights=[1.0] * 7 + [1e-101])
        meeting = torch.empty(2000).as_strided((1, 2, 20, 4, 4), (640, 320, 16, 4, 5))
        refused("elements of the output may lie on top of one another", out=meeting)
        whole = torch.empty(1, 2, 27, 4, 4)
        for start in (0, 6, 12):  # the last frame of out is the first of a window
            inside = [whole[:, :, 19:] if s == start else window for s, window in zip(STARTS, windows, strict=True)]
            refused(SHARED_MEMORY, windows=inside, out=whole[:, :, :20])
        apart = torch.empty(2, 2, 20, 4, 4)
        native.blend_windows([apart[:1, :, :8], *windows[1:]], STARTS, (20,), None, out=apart[1:])
        locked = out.numpy().copy()
        locked.flags.writeable = False
        refused("out is a read-only array", out=locked)
        refused("got >f4", out=out.numpy().astype(">f4"))


def step_call(draw: Draw, dtype: torch.dtype = torch.float32, side: int = 16, **changes: Any) -> dict[str, Any]:
    """Two clips of 20 frames, guided: the arguments of the reference."""
    clips = [draw(2, 3, 20, side, side).contiguous(memory_format=CHANNELS_LAST).float() for _ in range(3)]
    windows = [draw(4, 3, 8, side, side).to(dtype).contiguous(memory_format=CHANNELS_LAST) for _ in STARTS]
    call = {"windows": windows, "starts": [*STARTS], "extent": (20,), "weights": None, "latent": clips[0]}
    call |= {"coefficients": [0.8, -0.6, 0.7, 0.45, -0.15, 0.1], "guidance_scale": 7.5, "bound": "frame"}
    return call | {"percentile": 0.995, "noise": clips[1], "history": clips[2]} | changes


def stepped(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Into NaN-poisoned memory."""
    out = torch.full_like(call["latent"], torch.nan), torch.full_like(call["latent"], torch.nan)
    native.denoise_step(**call, out=out)
    return out


def check_step(call: dict[str, Any]) -> None:
    """Bit for bit, the core and torch round every step alike: but torch may fuse the quantile's interpolation."""
    for got, wanted in zip(stepped(call), denoise_step_reference(**call), strict=True):
        if call["bound"] in ("none", "static"):
            assert torch.equal(got, wanted)
        bound = 2 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, wanted, rtol=bound, atol=bound, equal_nan=True)


@needs_core
class TestDenoiseStep:
    @pytest.mark.parametrize("bound", ["none", "static", "clip", "frame"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_the_reference(self, dtype: torch.dtype, bound: str, draw: Draw) -> None:
        side = 48 if bound == "clip" else 16  # a clip that is sampled; frames that are not
        for changes in ({}, {"guidance_scale": None}, {"coefficients": [0.0, 1.0, 0.5, 0.5, 0.0, 0.0], "noise": None}):
            call = step_call(draw, dtype, side, bound=bound, **changes)
            if call["guidance_scale"] is None:
                call["windows"] = [window[:2] for window in call["windows"]]
                call["weights"] = (draw(8).abs() + 0.1).tolist()
            check_step(call)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype_of_the_latent(self, dtype: torch.dtype, draw: Draw) -> None:
        call = step_call(draw, torch.float16)
        call |= {name: call[name].to(dtype) for name in ("latent", "noise", "history")}
        check_step(call)

    @pytest.mark.parametrize("bound", ["clip", "frame"])
    def test_percentiles_infinities_and_nan(self, bound: str, draw: Draw) -> None:
        for percentile in (1e-9, 0.3, 0.995, 1.0):
            for special in (1.0, torch.inf, torch.nan):
                call = step_call(draw, bound=bound, percentile=percentile)
                call["latent"][1, 0, 3, :2] = special
                check_step(call)

    @pytest.mark.parametrize("bound", ["static", "clip", "frame"])
    def test_threads_and_places_change_nothing(self, bound: str, draw: Draw, threads: None) -> None:
        call = step_call(draw, torch.bfloat16, 64, bound=bound)
        torch.set_num_threads(1)
        wanted = stepped(call)
        torch.set_num_threads(5)
        assert all(map(torch.equal, stepped(call), wanted))
        planes = call | {name: call[name].contiguous() for name in ("latent", "noise", "history")}
        assert all(map(torch.equal, stepped(planes), wanted))
        place = call["latent"].clone(), call["history"].clone()
        native.denoise_step(**call | {"latent": place[0], "history": place[1]}, out=place)
        assert all(map(torch.equal, place, wanted))

    def test_numpy_and_dlpack(self, draw: Draw) -> None:
        call = step_call(draw)
        wanted = stepped(call)
        for kind in (Tensor.numpy, Foreign):
            given = {name: kind(value) if isinstance(value, Tensor) else value for name, value in call.items()}
            out = torch.zeros_like(wanted[0]), torch.zeros_like(wanted[1])
            given["windows"] = map(kind, call["windows"])
            native.denoise_step(**given, out=(kind(out[0]), kind(out[1])))
            assert all(map(torch.equal, out, wanted))

    def test_errors(self, draw: Draw) -> None:
        call = step_call(draw)
        out = torch.empty_like(call["latent"]), torch.empty_like(call["latent"])

        def refused(match: str, out: tuple[Any, Any] = out, **changes: Any) -> None:
            with pytest.raises(ValueError, match=f"^denoise_step: .*{match}"):
                native.denoise_step(**call | changes, out=out)

        refused("coefficient of noise is 0.1, so noise must be given", noise=None)
        refused("coefficient of history is -0.15, so history must be given", history=None)
        refused("bound must be one of none, static, clip, frame, got 'dynamic'", bound="dynamic")
        refused(r"percentile must be in \(0, 1\], got 1.5", percentile=1.5)
        refused("coefficients must be six numbers", coefficients=[1.0, 1.0, 1.0, 1.0, 0.0])
        refused("guidance_scale must be None or numbers, got 'a'", guidance_scale="a")
        refused(r"noise must have shape \(2, 3, 20, 16, 16\)", noise=call["noise"][:1])
        refused("history must be float32 on the CPU like", history=call["history"].double())
        refused(
            r"windows\[1\] must be float32", windows=[call["windows"][0], *[w.double() for w in call["windows"][1:]]]
        )
        refused("windows must be a sequence", windows=None)
        refused("invalid argument", windows=[], starts=[])
        refused("invalid shape", guidance_scale=None)
        refused("a position of the video is in no window", starts=[0, 6, 11])
        refused("out must have the extent", extent=(21,))
        refused("latent must be a tensor, a numpy array", latent=None)
        refused(SHARED_MEMORY, out=(out[0], out[0]))
        refused(SHARED_MEMORY, out=(out[0], call["latent"]))
        refused(SHARED_MEMORY, out=(call["history"], out[1]))
        refused(SHARED_MEMORY, out=(call["noise"], out[1]))
        shifted = torch.empty(2, 3, 21, 16, 16)
        refused(SHARED_MEMORY, latent=shifted[:, :, :20], out=(shifted[:, :, 1:], out[1]))
        refused("may lie on top of one another", out=(out[0], out[1][:1].expand(2, -1, -1, -1, -1)))
        native.denoise_step(**call | {"coefficients": [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]}, out=(out[0], call["history"]))


@needs_core
class TestLimitsOfALaunch:
    """What one CUDA launch takes; the C tests hold the launch itself to the same numbers."""

    @staticmethod
    def window(row: int = 1, frames: int = 1) -> Tensor:
        """(1, 1, frames, 2, 1) with rows `row` apart from one another."""
        return torch.empty(64).as_strided((1, 1, frames, 2, 1), (0, 0, 0, row, 0))

    def said(self, windows: list[Tensor], starts: list[int], frames: int) -> list[str]:
        return native.blend_windows_limits(windows, starts, (frames,), None)

    def test_windows_over_one_position(self) -> None:
        most, _ = native.load().BLEND_LIMITS
        window = self.window(frames=2)
        assert self.said([window] * most, [0] * most, 2) == []
        (reason,) = self.said([window] * (most + 1), [0] * (most + 1), 2)
        assert reason == f"{most + 1} windows lie over one position, a launch takes {most}"
        assert self.said([window] * (most + 1), [0] * most + [2], 4) == []  # one lies elsewhere
        assert self.said([window] * (most + 1), [0] * most + [1], 3) != []

    def test_strides_over_one_position(self) -> None:
        _, most = native.load().BLEND_LIMITS
        windows = [self.window(row) for row in range(1, most + 2)]
        assert self.said(windows[:most], [0] * most, 1) == []
        (reason,) = self.said(windows, [0] * (most + 1), 1)
        assert reason == f"windows of {most + 1} different strides lie over one position, it takes {most}"
        assert self.said(windows, [0] * most + [1], 2) == []
        # Axes of one place are not walked along, so that their strides do not count.
        alike = [self.window().as_strided((1, 1, 1, 2, 1), (0, 0, i, 1, i)) for i in range(most + 1)]
        assert self.said(alike, [0] * (most + 1), 1) == []

    def test_where_space_is_weighted(self) -> None:
        core = native.load()
        most, layouts = core.VARYING_BLEND_LIMITS
        assert most < core.BLEND_LIMITS[0] and layouts < core.BLEND_LIMITS[1]

        def said(windows: list[Tensor], starts: list[int], numbers: int = 4, frames: int = 1) -> list[str]:
            return native.blend_windows_limits(windows, starts, (frames, 2, 1), [1.0] * numbers)

        window = self.window()
        assert said([window] * most, [0, 0, 0] * most) == []
        assert said([window] * (most + 1), [0, 0, 0] * (most + 1)) != []
        assert said([window] * (most + 1), [*[0, 0, 0] * most, 1, 0, 0], frames=2) == []
        rows = [self.window(row) for row in range(1, layouts + 2)]
        assert said(rows[:-1], [0, 0, 0] * layouts) == []
        assert said(rows, [0, 0, 0] * (layouts + 1)) != []
        assert said([window], [0, 0, 0], core.MOST_WEIGHTS) == []
        (reason,) = said([window], [0, 0, 0], core.MOST_WEIGHTS + 1)
        assert reason == f"weights has {core.MOST_WEIGHTS + 1} numbers for 3 axes, a launch takes {core.MOST_WEIGHTS}"
        # None of it counts where time alone is weighted.
        frames = core.MOST_WEIGHTS + 1
        assert native.blend_windows_limits([window] * (layouts + 1), [0] * 9, (frames,), [1.0] * frames) == []

    def test_no_core_is_no_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "_loaded", lambda: (None, ("not built",)))
        assert self.said([self.window()] * 700, [0] * 700, 1) == []


@needs_core
class TestSpaceTime:
    """`space_time_downsample` and `space_time_upsample`; what they compute is tested with the ops."""

    OPS = ("space_time_downsample", "space_time_upsample")

    def call(self, op: str, draw: Draw, learned: bool) -> tuple[dict[str, Any], Tensor]:
        """Arguments, and the reference's result."""
        arguments = {"x": draw(2, 3, 4, 4, 6).float(), "factor": (2, 2, 3), "mode": "linear"}
        arguments |= {"weight": draw(5, 3, 3).float(), "bias": draw(5).float()} if learned else {}
        wanted = getattr(ops, op)(**arguments, backend="reference")
        return {"weight": None, "bias": None, **arguments}, wanted

    @pytest.mark.parametrize("learned", [False, True])
    @pytest.mark.parametrize("op", OPS)
    def test_takes_numpy_without_torch_s_tensors(self, op: str, learned: bool, draw: Draw) -> None:
        arguments, wanted = self.call(op, draw, learned)
        arrays = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in arguments.items()}
        arrays["x"] = np.asfortranarray(arrays["x"])
        out = np.full((*wanted.shape[:-1], 2 * wanted.shape[-1]), np.nan, dtype=np.float32)[..., ::-2]
        getattr(native, op)(**arrays, out=out)
        np.testing.assert_allclose(out, wanted.numpy(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("op", OPS)
    def test_takes_whatever_has_dlpack(self, op: str, dtype: torch.dtype, draw: Draw) -> None:
        """Neither torch nor numpy, as CuPy's arrays are; bfloat16, which numpy has not, too."""
        arguments, _ = self.call(op, draw, True)
        tensors = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        wanted = getattr(ops, op)(**tensors, backend="reference")
        out = torch.full_like(wanted, torch.nan)
        foreign = {n: Foreign(v) if isinstance(v, Tensor) else v for n, v in tensors.items()}
        getattr(native, op)(**foreign, out=Foreign(out))
        eps = torch.finfo(dtype).eps  # of the result, and of what lies between space and time
        torch.testing.assert_close(out.float(), wanted.float(), rtol=4 * eps, atol=4 * eps * float(wanted.abs().max()))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("op", OPS)
    def test_adjoints_are_autograd_s(self, op: str, dtype: torch.dtype, draw: Draw) -> None:
        for mode in ("nearest", "linear", "area", "blur")[: 2 if op == "space_time_upsample" else 4]:
            x = draw(2, 3, 4, 6, 6, grad=True)
            y = getattr(ops, op)(x, (2, 2, 3), mode=mode, backend="reference")
            seed = draw(*y.shape).to(dtype)
            (wanted,) = torch.autograd.grad(y, x, seed.double())
            out = torch.full(x.shape, torch.nan, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
            getattr(native, f"{op}_adjoint")(seed, (2, 2, 3), mode, out=out)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(out.double(), wanted, rtol=eps, atol=8 * eps)

    @pytest.mark.parametrize("op", OPS)
    def test_an_empty_batch_is_nothing_to_do(self, op: str) -> None:
        for weight in (None, torch.ones(3, 3, 3)):
            sizes = (2, 2, 2) if op == "space_time_downsample" else (8, 8, 8)
            getattr(native, op)(
                torch.empty(0, 3, 4, 4, 4), (2, 2, 2), "nearest", weight, None, out=torch.empty(0, 3, *sizes)
            )

    @pytest.mark.parametrize("op", OPS)
    def test_errors_name_the_argument_and_nothing_is_written(self, op: str, draw: Draw) -> None:
        arguments, wanted = self.call(op, draw, True)
        x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
        out = torch.full_like(wanted, 7.0)

        def refused(match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
            with pytest.raises(error, match=f"^{op}: {match}"):
                getattr(native, op)(**{**arguments, "out": out, **changes})
            assert (out == 7).all()

        refused(r"x must be \(B, C, T, H, W\)", x=x[0])
        refused(r"x must be \(B, C, T, H, W\) with C, T, H, W >= 1", x=x[:, :, :0])
        refused("x must be a tensor, a numpy array", x=None)
        refused(r"x must be float32 on the CPU like out, got float64 on the CPU", x=x.double())
        refused("x must be a dense tensor", x=x.to_sparse())
        refused(r"x must be float32, float64, float16 or bfloat16, got torch\.int32", x=x.int())
        refused("weight must be float32 on the CPU like out", weight=weight.half())
        refused(r"weight must be \(C_out, C, k\), k odd, with C channels like x", weight=weight[..., :2])
        refused(r"weight must be \(C_out, C, k\)", weight=weight[:, :2])
        refused(r"weight must be \(C_out, C, k\)", weight=weight[0])
        refused(r"weight must be a tensor", weight=3)
        refused(r"bias must have shape \(5,\), got \(4,\)", bias=bias[:4])
        refused("bias came without weight", weight=None)
        refused("bias must be float32 on the CPU like out", bias=bias.double())
        for factor in ((2, 2), (0, 2, 2), (2.0, 2, 2), (True, 2, 2)):
            refused("factor must be three integers >= 1", factor=factor)
        refused("mode must be 'nearest' or 'linear'", mode="cubic")
        refused(r"out must have shape \(2, 5, .*\), got", out=out[..., :1])
        refused("out must be a tensor", out=None)
        refused("invalid strides: elements of the output may lie", out=out[:1].expand(2, -1, -1, -1, -1))
        locked = wanted.numpy().copy()
        locked.flags.writeable = False
        refused("out is a read-only array", out=locked)
        double = {n: v.double() for n, v in arguments.items() if isinstance(v, Tensor)}
        refused(
            "x must be float32, float16 or bfloat16 with a weight on the CPU, got float64", **double, out=out.double()
        )
        whole = torch.full((x.numel() + wanted.numel(),), 7.0)
        meeting = whole[: wanted.numel()].view(wanted.shape)
        for name, value in (("x", x), ("weight", weight), ("bias", bias)):
            inside = whole[wanted.numel() - 1 :][: value.numel()].view(value.shape)
            refused(f"out: {SHARED_MEMORY}", out=meeting, **{name: inside})
        assert (whole == 7).all()

    def test_sizes_that_a_factor_does_not_divide(self, draw: Draw) -> None:
        x = draw(1, 2, 5, 4, 4).float()
        with pytest.raises(ValueError, match="T of x must be a multiple of its factor 2, got 5"):
            native.space_time_downsample(x, (2, 2, 2), "area", None, None, out=x)
        with pytest.raises(ValueError, match="H of x must be a multiple of its factor 3, got 4"):
            native.space_time_downsample(x, (2, 3, 2), "area", torch.ones(2, 2, 1), None, out=x)
        with pytest.raises(ValueError, match="space_time_upsample: mode must be 'nearest' or 'linear', got 'area'"):
            native.space_time_upsample(x, (2, 1, 1), "area", None, None, out=x)

    @pytest.mark.parametrize("op", OPS)
    def test_factors_that_are_none(self, op: str, draw: Draw) -> None:
        arguments, wanted = self.call(op, draw, True)
        out = torch.full_like(wanted, 7.0)
        for factor in (2, None, {1, 2, 3}, (2, 2), (2.0, 1, 1), (2**63, 1, 1), (2**70, 1, 1), np.array([2, 2, 3])):
            for function in (getattr(native, op), getattr(native, f"{op}_adjoint")):
                name = function.__name__
                adjoint = name.endswith("_adjoint")
                call = {"gradient": out, "mode": "linear"} if adjoint else arguments
                with pytest.raises(ValueError, match=f"{name}: factor must be three integers >= 1 of at most 64 bits"):
                    function(**(call | {"factor": factor}), out=torch.ones_like(wanted) if adjoint else out)
        with pytest.raises(ValueError, match=f"{op}: mode must be 'nearest'"):
            getattr(native, op)(**arguments | {"mode": np.array(["nearest", "linear"])}, out=out)
        assert (out == 7).all()

    def test_a_factor_beyond_all_frames(self, draw: Draw) -> None:
        x, weight = draw(1, 16, 4, 4, 4).float(), draw(16, 16, 3).float()
        out = torch.full((1, 16, 1, 4, 4), torch.nan)
        native.space_time_downsample(x, (2**63 - 1, 1, 1), "nearest", weight, None, out=out)
        torch.testing.assert_close(out, ops.space_time_downsample(x, (4, 1, 1), weight=weight, backend="reference"))

    @pytest.mark.parametrize("op", OPS)
    def test_capsules_that_cannot_be_read(self, op: str, draw: Draw) -> None:
        arguments, wanted = self.call(op, draw, False)

        class Versioned(Foreign):
            def __dlpack__(self, stream: int | None = None) -> Any:
                return self.tensor.__dlpack__(max_version=(1, 0))

        class NoCapsule(Foreign):
            def __dlpack__(self, stream: int | None = None) -> Any:
                return None

        class Nowhere:
            def __dlpack__(self, stream: int | None = None) -> Any:
                raise AssertionError

        x = arguments["x"]
        for given, match in (
            (Versioned(x), 'must give a capsule named dltensor, got <capsule object "dltensor_versioned"'),
            (NoCapsule(x), "must give a capsule named dltensor, got None"),
            (Nowhere(), "must be a tensor, a numpy array or an object with __dlpack__ and __dlpack_device__, got"),
        ):
            with pytest.raises(ValueError, match=f"{op}: x .*{match}"):
                getattr(native, op)(**arguments | {"x": given}, out=wanted)
            with pytest.raises(ValueError, match=f"{op}: out .*{match}"):
                getattr(native, op)(**arguments, out=given)

    @pytest.mark.parametrize("op", OPS)
    def test_adjoints_name_the_argument_too(self, op: str, draw: Draw) -> None:
        arguments, wanted = self.call(op, draw, False)
        adjoint, out = getattr(native, f"{op}_adjoint"), torch.full_like(arguments["x"], 7.0)
        for match, gradient, given in (
            (f"{op}_adjoint: gradient must have shape", wanted[..., :1], out),
            (r"gradient must be float32 on the CPU like out", wanted.double(), out),
            (r"out must be \(B, C, T, H, W\)", wanted, out[0]),
            ("invalid strides: elements of the output", wanted, out[:, :1].expand(-1, 3, -1, -1, -1)),
        ):
            with pytest.raises(ValueError, match=match):
                adjoint(gradient, (2, 2, 3), "linear", out=given)
        assert (out == 7).all()

    @pytest.mark.parametrize("op", OPS)
    def test_threads_change_nothing(self, op: str, draw: Draw, threads: None) -> None:
        x, weight = draw(1, 24, 5, 26, 34).float(), draw(40, 24, 3).float()
        for parameters in ((None, None), (weight, None)):
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                y = getattr(ops, op)(x, (1, 2, 2), mode="linear", weight=parameters[0], backend="reference")
                found.append(torch.full_like(y, torch.nan))
                getattr(native, op)(x, (1, 2, 2), "linear", *parameters, out=found[-1])
                torch.testing.assert_close(found[-1], y, rtol=1e-4, atol=1e-4)
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])

    @pytest.mark.parametrize("op", OPS)
    def test_warpgroups_are_for_clips_on_a_gpu_that_lie_right(self, op: str, draw: Draw) -> None:
        arguments, wanted = self.call(op, draw, True)
        with pytest.raises(ValueError, match=f"{op}: x must be on a CUDA device, got the CPU"):
            getattr(native, f"{op}_wgmma")(**arguments, out=torch.empty_like(wanted))
        fixed, wanted = self.call(op, draw, False)
        with pytest.raises(ValueError, match=f"{op}: weight must be given"):
            getattr(native, f"{op}_wgmma")(**fixed, out=torch.empty_like(wanted))
        lies = torch.empty(2, 4, 6, 8, 16, dtype=torch.half).permute(0, 4, 1, 2, 3)
        thin = torch.empty(1, 2, 1, 3, 20, dtype=torch.half).permute(0, 4, 1, 2, 3)
        apart = "axis {} of x has a stride of {} bytes, it needs a multiple of 16 below 2^40"
        for x, reasons in (
            (lies, []),
            (lies[:, :, ::2], []),
            (lies[..., ::2], []),  # every pixel of a row the same way from the next, over its end too
            (lies[..., :4], ["the rows of x lie apart, they need to lie one behind the other"]),
            (lies[:, :, :1].expand(-1, -1, 2, -1, -1), [apart.format(2, 0)]),
            (lies[:, ::2], ["axis 1 of x has stride 2, it needs stride 1"]),
            (thin, [apart.format(a, n) for a, n in ((2, 120), (4, 40))]),
        ):
            assert native.wgmma_reasons(x.shape, x.stride(), 2, (2, 1, 1)) == reasons
        padded = lies[:, :12]  # pixels lie right, but not those of the clip between space and time
        between = "x has 12 channels, with a resize in space it needs a multiple of 8"
        for factor in ((2, 1, 2), (1, 2, 1)):
            assert native.wgmma_reasons(padded.shape, padded.stride(), 2, factor) == [between]
            assert native.wgmma_reasons(lies.shape, lies.stride(), 2, factor) == []
        assert native.wgmma_reasons(padded.shape, padded.stride(), 2, (2, 1, 1)) == []
        far = (1 << 39, *lies.stride()[1:])
        assert native.wgmma_reasons(lies.shape, far, 2, (2, 1, 1)) == [apart.format(0, 1 << 40)]


@needs_core
class TestTemporalAttention:
    """What it computes is tested with the op, and in C."""

    def call(self, draw: Draw) -> tuple[dict[str, Any], Tensor]:
        """Arguments, and the reference's result."""
        q, k, v = draw(2, 5, 2, 3, 3, 2, 6).float().unbind(4)
        bias, rotary = draw(2, 9).float(), draw(5, 3, 2).float()
        arguments = {"q": q, "k": k, "v": v, "bias": bias, "rotary": rotary, "causal": True, "window": 3, "scale": 0.5}
        return arguments, ops.temporal_attention(**arguments, backend="reference")

    def test_takes_numpy_without_torch_s_tensors(self, draw: Draw) -> None:
        arguments, wanted = self.call(draw)
        arrays = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in arguments.items()}
        arrays["k"] = np.asfortranarray(arrays["k"])
        out = np.full((*wanted.shape[:-1], 2 * wanted.shape[-1]), np.nan, dtype=np.float32)[..., ::-2]
        native.temporal_attention(**arrays, out=out)
        np.testing.assert_allclose(out, wanted.numpy(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_takes_whatever_has_dlpack(self, dtype: torch.dtype, draw: Draw) -> None:
        arguments, _ = self.call(draw)
        tensors = {n: v.to(dtype) if n in "qkv" else v for n, v in arguments.items()}
        wanted = ops.temporal_attention(**tensors, backend="reference")
        out = torch.full_like(wanted, torch.nan)
        foreign = {n: Foreign(v) if isinstance(v, Tensor) else v for n, v in tensors.items()}
        native.temporal_attention(**foreign, out=Foreign(out))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.float(), wanted.float(), rtol=2 * eps, atol=8 * torch.finfo(torch.float32).eps)

    @pytest.mark.parametrize(
        "wanted", [(True, True, True, True), (False, True, False, False), (True, False, True, False)]
    )
    def test_gradients_are_autograd_s(self, wanted: tuple[bool, ...], draw: Draw) -> None:
        """Into any strides; those that are not wanted are left alone. The result's may be expanded."""
        arguments, y = self.call(draw)
        leaves = {n: arguments[n].double().requires_grad_() for n in ("q", "k", "v", "bias")}
        precise = {**arguments, **leaves, "rotary": arguments["rotary"].double()}
        seed = draw(1, 5, 1, 1, 2, 6).float().expand_as(y)
        expected = torch.autograd.grad(
            ops.temporal_attention(**precise, backend="reference"), tuple(leaves.values()), seed.double()
        )
        out = [torch.full(x.shape[::-1], torch.nan).permute(*reversed(range(6))) for x in expected[:3]]
        out.append(torch.full(expected[3].shape, torch.nan))
        given = tuple(x if is_wanted else None for x, is_wanted in zip(out, wanted, strict=True))
        native.temporal_attention_backward(seed, **arguments, out=given)
        for found, right, is_wanted in zip(out, expected, wanted, strict=True):
            if is_wanted:
                torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
            else:
                assert found.isnan().all()

    def test_an_empty_batch_has_a_gradient_of_the_bias(self, draw: Draw) -> None:
        arguments, y = self.call(draw)
        empty = {n: v[:0] if n in "qkv" else v for n, v in arguments.items()}
        of_bias = torch.full((2, 9), torch.nan)
        native.temporal_attention(**empty, out=y[:0])
        native.temporal_attention_backward(y[:0], **empty, out=(None, None, None, of_bias))
        assert (of_bias == 0).all()

    def test_errors_name_the_argument_and_nothing_is_written(self, draw: Draw) -> None:
        arguments, wanted = self.call(draw)
        out = torch.full_like(wanted, 7.0)

        def refused(match: str, **changes: Any) -> None:
            with pytest.raises(ValueError, match=f"^temporal_attention: {match}"):
                native.temporal_attention(**{**arguments, "out": out, **changes})
            assert (out == 7).all()

        q, bias, rotary = (arguments[name] for name in ("q", "bias", "rotary"))
        refused(r"q must be \(B, T, H, W, heads, D\) with all but B >= 1, got \(5, 2, 3, 2, 6\)", q=q[0])
        refused(r"q must be \(B, T, H, W, heads, D\)", q=q[:, :0])
        refused("q must be float32, float16 or bfloat16, got float64", q=q.double())
        refused(r"k must be float32 \(2, 5, 2, 3, 2, 6\), got float16", k=q.half())
        refused("v must be float32 .*, got float32", v=q[:, :4])
        refused(r"bias must have shape \(2, 9\), got \(2, 8\)", bias=bias[:, :8])
        refused(r"rotary must be float32 \(5, 3, 2\), got float64", rotary=rotary.double())
        refused("rotary turns pairs of channels, so D must be even, got 5", **{n: q[..., :5] for n in "qkv"})
        strided = np.asfortranarray(rotary.numpy())
        refused("rotary must be contiguous", rotary=strided)
        refused("window must be None or >= 0 frames, got -1", window=-1)
        refused("scale must be finite, got inf", scale=float("inf"))
        refused("out must be float32 .*, got float32", out=out[..., :1])
        refused("invalid strides: elements of the output may lie", out=out[:1].expand(2, -1, -1, -1, -1, -1))
        whole = torch.full((2 * q.numel(),), 7.0)
        inside = whole[q.numel() - 1 : -1].view(q.shape)
        refused(f"out: {SHARED_MEMORY}", q=inside, out=whole[: q.numel()].view(q.shape))
        for changes in ({"gradient": wanted[..., :1]}, {"out": (q[:1], None, None, None)}):
            with pytest.raises(ValueError, match=r"^temporal_attention_backward: (gradient|gq) must be float32"):
                native.temporal_attention_backward(**{"gradient": wanted, **arguments, "out": (None,) * 4, **changes})
        with pytest.raises(ValueError, match=r"^temporal_attention_backward: gbias must be contiguous"):
            native.temporal_attention_backward(wanted, **arguments, out=(None, None, None, torch.empty(9, 2).T))

    def test_rotary_of_any_strides(self, draw: Draw) -> None:
        arguments, wanted = self.call(draw)
        arguments["rotary"] = arguments["rotary"].mT.contiguous().mT
        out = torch.full_like(wanted, torch.nan)
        native.temporal_attention(**arguments, out=out)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


class Foreign:
    """An array of a library that is neither torch nor numpy."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, stream: int | None = None) -> Any:
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


PORTABLE = """
import sys, torch
from lumiere_fast import native
calls = torch.load(sys.argv[1])
for windows, starts, extent, weights, out in calls:
    native.blend_windows(windows, starts, extent, weights, out=out)
torch.save([call[-1] for call in calls], sys.argv[1])
"""


@needs_core
def test_portable_code_gives_the_numbers_of_avx2(draw: Draw, tmp_path: Path) -> None:
    if not native.build_info()["avx2"] or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no AVX2 here: every other test ran the portable code")
    calls = []
    for dtype in DTYPES:
        for starts in ([0, 6, 12], [0, 2, 3]):
            windows = [draw(1, 3, 8, 9, 37).to(dtype) for _ in starts]
            extent = (starts[-1] + 8,)
            for weights in (None, (draw(8).abs() + 0.1).tolist()):
                calls.append((windows, starts, extent, weights, torch.zeros(1, 3, *extent, 9, 37, dtype=dtype)))
    torch.save(calls, tmp_path / "calls.pt")
    subprocess.run(
        [sys.executable, "-c", PORTABLE, str(tmp_path / "calls.pt")],
        env={**os.environ, "LUMIERE_FAST_PORTABLE": "1"},
        cwd=ROOT,
        check=True,
    )
    for (windows, starts, extent, weights, out), portable in zip(calls, torch.load(tmp_path / "calls.pt"), strict=True):
        native.blend_windows(windows, starts, extent, weights, out=out)
        assert torch.equal(out, portable)


@needs_core
class TestWhatItSays:
    def test_the_build(self) -> None:
        info = native.build_info()
        assert info["version"] == metadata.version("lumiere_fast") == native.load().__version__
        assert info["compiler"] and "-O3" in info["flags"]
        assert (info["cuda"] is None) == (info["cuda_archs"] == []) == (info["cuda_flags"] is None)
        assert info["cuda_flags"] is None or "-fmad=false" in info["cuda_flags"]
        report = native.build_report()
        assert report is not None and report["info"] == info and report["cpu"] == {"built": True, "why_not": None}

    def test_each_op_has_the_hash_of_its_sources(self) -> None:
        ops = native.build_info()["sources"]
        assert "blend_windows" in ops
        for op in ops:
            assert re.fullmatch("[0-9a-f]{64}", native.source_hash(op) or "")
        assert native.source_hash("no_such_op") is None

    def test_cmake_and_python_hash_alike(self, tmp_path: Path) -> None:
        csrc = ROOT / "csrc"
        for op, built in native.build_info()["sources"].items():
            assert native.hash_of_sources(op, csrc) == built
        for name in ("common/blend.h", "blend_windows_run.h", "common/cover.cpp", "bindings.cpp"):
            changed = tmp_path / name.replace("/", "_")
            for path in csrc.rglob("*"):
                if path.is_file():
                    target = changed / path.relative_to(csrc)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes() + (b"\n" if path == csrc / name else b""))
            same = native.hash_of_sources("blend_windows", changed) == native.source_hash("blend_windows")
            assert same == (name == "bindings.cpp")

    def test_the_cuda_half_or_why_not(self, draw: Draw) -> None:
        reasons = native.why_not("cuda")
        assert bool(reasons) == (native.build_info()["cuda"] is None)
        with pytest.raises(ValueError, match="half must be one of cpu, cuda"):
            native.why_not("tpu")
        if reasons:
            assert reasons[0].startswith("the native core was built without its CUDA half: ")
        elif not torch.cuda.is_available():
            # Without a device, CUDA says so, through the C functions' status and text.
            module, tensors = native.load(), [draw(1, 1, 1, 1, 2).float() for _ in range(2)]
            window, out = ((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors)
            status = module.blend_windows_cuda(0, [window], [0], (1,), None, out, 0, 0)
            assert status == module.CUDA_ERROR
            assert re.match(r"cudaError\w+: ", module.last_cuda_error())


class TestWhereItCannotBeUsed:
    """What is said, with the module or the report on its build replaced."""

    @pytest.fixture(autouse=True)
    def anew(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        self.borrowed: list[int] = []
        native._loaded.cache_clear()
        monkeypatch.setattr(native, "_REPORT", tmp_path / "report.json")
        monkeypatch.setitem(sys.modules, "lumiere_fast._native", None)
        yield
        native._loaded.cache_clear()
        native._build_info.cache_clear()

    def report(self, **halves: str | None) -> None:
        content = {half: {"built": reason is None, "why_not": reason} for half, reason in halves.items()}
        native._REPORT.write_text(json.dumps(content))

    def test_the_report_is_repeated(self) -> None:
        self.report(cpu="cmake was not found", cuda="cmake was not found")
        for half in native.HALVES:
            assert native.why_not(half) == ["the native core was not built: cmake was not found"]
        assert native.build_info() == {} and native.source_hash("blend_windows") is None
        with pytest.raises(native.NativeUnavailable, match=r"cannot be used: .* cmake was not found"):
            native.load()

    def test_a_module_that_does_not_load(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(native, "_PACKAGE", tmp_path)
        assert "no install left a word about it" in native.why_not("cpu")[0]
        native._loaded.cache_clear()
        (tmp_path / "_native.cpython-39-x86_64-linux-gnu.so").touch()
        self.report(cpu=None, cuda=None)
        (reason,) = native.why_not("cpu")
        assert "is there (_native.cpython-39-x86_64-linux-gnu.so) but does not load: " in reason

    def pretend(self, monkeypatch: pytest.MonkeyPatch, **info: Any) -> None:
        module = ModuleType("lumiere_fast._native")
        version = metadata.version("lumiere_fast")
        built = {
            "version": version,
            "cuda": None,
            "sources": {"blend_windows": native.hash_of_sources("blend_windows")},
        }
        module.build_info = lambda: json.dumps({**built, **info})  # type: ignore[attr-defined]
        module.borrow_threads = self.borrowed.append  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lumiere_fast._native", module)

    def test_a_core_of_another_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch)
        assert native.why_not("cpu") == []
        assert self.borrowed == [native._torch_threads()]
        native._loaded.cache_clear()
        self.pretend(monkeypatch, version="0.0.1")
        (reason,) = native.why_not("cpu")
        assert f"is of version 0.0.1, the package of {metadata.version('lumiere_fast')}" in reason

    @pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")
    def test_sources_that_changed_since(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch, sources={"blend_windows": "0" * 64})
        (reason,) = native.why_not("cuda")
        assert "csrc/ has changed since the native core was built (blend_windows)" in reason

    def test_without_the_cuda_half(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch)
        self.report(cpu=None, cuda="nvcc is neither on PATH nor in CUDA_HOME")
        assert native.why_not("cpu") == []
        (reason,) = native.why_not("cuda")
        assert reason == "the native core was built without its CUDA half: nvcc is neither on PATH nor in CUDA_HOME"
        assert native.why_not("wgmma") == [reason]

    def test_warpgroups_are_of_one_architecture(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch, cuda="13.0", cuda_archs=["80"])
        assert native.why_not("cuda") == []
        (reason,) = native.why_not("wgmma")
        assert reason.startswith("the native core was built for 80, not for 90a: unset LUMIERE_FAST_CUDA_ARCHS")
        native._loaded.cache_clear()
        native._build_info.cache_clear()
        self.pretend(monkeypatch, cuda="13.0", cuda_archs=["80", "90a"])
        assert native.why_not("wgmma") == []
