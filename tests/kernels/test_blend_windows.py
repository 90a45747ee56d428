"""The Triton kernels of blend_windows against the reference: in Triton's interpreter, or compiled if there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lumiere_fast.ops import window_starts
from lumiere_fast.ops.blend_windows import SPEC, blend_windows_reference, describe, flatten
from tests.ops.common import CHANNELS_LAST, CONTIGUOUS, FORMATS, Draw, assert_no_worse_than_torch

pytest.importorskip("triton", reason="the kernels need Triton")
from lumiere_fast.kernels import blend_windows as kernels

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Never bfloat16 in the interpreter, which computes it wrongly and says nothing.
DTYPES = (torch.float32, torch.float64, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ALIKE, MIXED = kernels._alike_kernel, kernels._mixed_kernel

# Lanes that nothing covers divide zero by zero before they are masked off.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


class Launches(list[Any]):
    """The kernels launched so far, each a form that the gate compiles ahead of time."""

    def __call__(self, kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        form = tuple(NAMES[x.dtype] if isinstance(x, Tensor) else None for x in tensors(kernel, arguments))
        del options["num_warps"], options["num_stages"]
        assert (kernel.__name__, form, tuple(sorted(options.items()))) in SHIPPED
        self.append(kernel)
        LAUNCH(kernel, programs, out, *arguments, **options, num_warps=4, num_stages=1)


def tensors(kernel: Any, values: Sequence[Any]) -> Sequence[Any]:
    return values[: len(kernels.ALIKE_TENSORS if kernel is ALIKE else kernels.MIXED_TENSORS)]


LAUNCH = kernels.launch
SHIPPED = {
    (
        variant.kernel,
        tuple(
            None if kind == "constexpr" else kind.removeprefix("*")
            for kind in tensors(getattr(kernels, variant.kernel), list(variant.signature.values()))
        ),
        tuple(sorted((name, value) for name, value in variant.constexprs.items() if name not in ("weights", "sums"))),
    )
    for variant in kernels.VARIANTS
}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    recorded = Launches()
    monkeypatch.setattr(kernels, "launch", recorded)
    yield recorded


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """(B, C, T, H, W) normal, on the device."""
    source = Draw(31)

    def clip(
        *shape: int, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = CHANNELS_LAST
    ) -> Tensor:
        return source(*shape).to(DEVICE, dtype).contiguous(memory_format=memory_format)

    return clip


def run(windows: Any, starts: Any, num_frames: int, weights: Any = None, out: Tensor | None = None) -> Tensor:
    """What the kernel writes over NaN."""
    flat = flatten(windows, starts, num_frames, weights)
    out = describe(*flat).empty() if out is None else out
    kernels.blend_windows(*flat, out=out.fill_(float("nan")))
    return out


def check(windows: Any, starts: Any, num_frames: int, weights: Any = None, out: Tensor | None = None) -> Tensor:
    ours = run(windows, starts, num_frames, weights, out)
    parts, *rest = flatten(windows, starts, num_frames, weights)
    exact = blend_windows_reference([part.double() for part in parts], *rest)
    assert_no_worse_than_torch(ours, blend_windows_reference(parts, *rest), exact)
    return ours


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles(dtype: torch.dtype, memory_format: torch.memory_format, draw: Any, launches: Launches) -> None:
    """Runs of one element, of a tile, and of a little less and more, in both kernels."""
    vector = 16 // dtype.itemsize
    tile = 128 * 2 * vector
    for width in (vector, tile - vector, tile, tile + vector):
        check([draw(1, 1, 2, 1, width, dtype=dtype, memory_format=memory_format) for _ in range(2)], [0, 1], 3)
        assert launches[-1] is ALIKE
    for width in (1, 255, 257):
        check([draw(1, 1, 2, 1, width, dtype=dtype, memory_format=memory_format) for _ in range(2)], [0, 1], 3)
        assert launches[-1] is MIXED


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 8), (3, 5, 7), (4, 2, 9), (8, 1, 16)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_shapes(memory_format: torch.memory_format, shape: tuple[int, int, int], draw: Any) -> None:
    C, H, W = shape
    windows = [draw(2, C, 3, H, W, memory_format=memory_format) for _ in range(3)]
    assert check(windows, [0, 2, 3], 6).is_contiguous(memory_format=memory_format)
    check(windows, [0, 2, 3], 6, weights=[0.5, 2.0, 1.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_windows_of_the_ssr(dtype: torch.dtype, draw: Any, launches: Launches) -> None:
    """13 windows of 8 frames over 80, whatever their number the launches are few."""
    starts = window_starts(80, 8)
    windows = torch.stack([draw(1, 1, 8, 4, 4, dtype=dtype, memory_format=CONTIGUOUS) for _ in starts])
    check(windows, starts, 80)
    assert launches == [ALIKE, ALIKE]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_and_lengths_of_any_kind(
    dtype: torch.dtype, memory_format: torch.memory_format, draw: Any, launches: Launches
) -> None:
    clip = draw(1, 6, 7, 4, 8, dtype=dtype)
    plain = clip[:, :3, :2, 1:, ::2].contiguous(memory_format=memory_format)
    repeated = plain[:, :1].expand_as(plain)
    windows = [plain, clip[:, 3:, 4:, :3, :4], clip[:, ::2, 2:4, 1:, 4:], plain[:, :, :1], repeated]
    assert check(windows, [0, 1, 3, 2, 4], 6).is_contiguous(memory_format=memory_format)
    assert set(launches) == {MIXED}


@pytest.mark.parametrize("memory_format", FORMATS)
def test_long_rows_without_runs(memory_format: torch.memory_format, draw: Any, launches: Launches) -> None:
    """More than one tile along W, every element on its own."""
    windows = [draw(1, 6, 2, 1, 600, memory_format=memory_format)[:, ::2, ..., ::2] for _ in range(2)]
    check(windows, [0, 1], 3)
    assert launches == [MIXED]


def test_rows_with_gaps_keep_wide_loads(draw: Any, launches: Launches) -> None:
    wide = [draw(2, 4, 3, 4, 12)[..., 4:8] for _ in range(2)]
    check(wide, [0, 2], 5)
    assert launches == [ALIKE]


def test_misaligned_windows_take_narrow_loads(draw: Any, launches: Launches) -> None:
    memory = torch.empty(2 * 4 * 16 * 4 + 1, device=DEVICE)[1:]
    windows = [part.reshape(1, 4, 4, 4, 4) for part in memory.normal_().split(256)]
    check(windows, [0, 3], 7)
    assert launches == [MIXED]


@pytest.mark.parametrize("layout", ["slice", "axes in another order", "gaps everywhere"])
def test_out_of_any_strides(layout: str, draw: Any) -> None:
    """And nothing beside it is touched."""
    windows = [draw(2, 3, 3, 4, 4) for _ in range(2)]
    held = torch.full((2, 5, 6, 10, 12), -7.0, device=DEVICE)
    if layout == "slice":
        out = held[:, :3, :5, :4, 4:8]
    elif layout == "axes in another order":
        out = held[:, :3, :5, :4, :4].permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    else:
        out = held[:, ::2, 1:, 2::2, ::3]
    blended = check(windows, [0, 2], 5, out=out)
    assert blended is out
    if layout != "axes in another order":
        out.fill_(-7.0)
        assert (held == -7.0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [ALIKE, MIXED], ids=["alike", "mixed"])
def test_space_and_time(kernel: Any, dtype: torch.dtype, weighted: bool, draw: Any, launches: Launches) -> None:
    """Twelve windows, so several launches, each of a box."""
    width, step = (16, 8) if kernel is ALIKE else (7, 5)
    starts = [list(corner) for corner in product((0, 2), (0, 2, 4), (0, step))]
    windows = [draw(1, 3, 3, 4, width, dtype=dtype) for _ in starts]
    weights = [torch.rand(n, dtype=torch.float64) + 0.1 for n in (3, 4, width)] if weighted else None
    check(windows, starts, 5, weights)
    assert set(launches) == {kernel} and len(launches) > 1


def test_windows_of_different_boxes(draw: Any, launches: Launches) -> None:
    """They tile the plane, differently before and after frame 2; the second layer overlaps in time."""
    starts = [[0, 0, 0], [0, 0, 5], [0, 4, 0], [1, 0, 0], [1, 3, 2]]
    sizes = [(2, 4, 5), (3, 6, 2), (2, 2, 6), (3, 3, 7), (3, 3, 5)]
    corner, size = [1, 2, 0], (3, 4, 3)
    windows = [draw(2, 2, *shape) for shape in (*sizes, size)]
    check(windows, [*starts, corner], 4)
    assert set(launches) == {MIXED} and len(launches) > 1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("number", "shape"), [(8, (2, 8)), (9, (2, 8)), (4, (1, 3)), (5, (1, 3)), (13, (1, 3))])
def test_more_windows_at_a_position_than_a_launch_takes(
    number: int, shape: tuple[int, int], weighted: bool, draw: Any, launches: Launches
) -> None:
    H, W = shape
    windows = [draw(1, 1, number, H, W) for _ in range(number)]
    weights = torch.rand(number, dtype=torch.float64) + 0.1 if weighted else None
    check(windows, list(range(number)), 2 * number - 1, weights)
    assert (number > 8 or H == 1) == (MIXED in launches)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_vanish_in_fp32(dtype: torch.dtype, draw: Any) -> None:
    """Where only light windows meet, their shares are still right."""
    weights = [[1.0, 1e-25, 1e-27, 1.0], [1.0, 1e-25], [1.0] * 8]
    windows = [draw(1, 1, 4, 2, 8, dtype=dtype) for _ in range(2)]
    check(windows, [[0, 0, 0], [1, 0, 0]], 5, weights)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 7)])
def test_what_one_window_says_or_all_agree_on_is_exact(shape: tuple[int, int, int], draw: Any) -> None:
    C, H, W = shape
    window = draw(1, C, 4, H, W)
    special = torch.tensor([-0.0, float("inf"), -float("inf"), 1e-45, 3e38], device=DEVICE)
    window.permute(0, 2, 3, 4, 1).reshape(-1)[: len(special)].copy_(special)
    alone = run([window], [0], 4, weights=[0.3, 0.1, 0.7, 0.9])
    assert torch.equal(alone.view(torch.int32), window.view(torch.int32))
    same = draw(1, C, 1, H, W).expand(1, C, 4, H, W).contiguous(memory_format=CHANNELS_LAST)
    agreed = run([same] * 3, [0, 1, 3], 7, weights=[0.3, 0.1, 0.7, 0.9])
    assert torch.equal(agreed, same[:, :, :1].expand_as(agreed))


def test_an_empty_batch_launches_nothing(launches: Launches) -> None:
    assert run(torch.empty(3, 0, 3, 8, 4, 4, device=DEVICE), [0, 6, 12], 20).shape == (0, 3, 20, 4, 4)
    assert not launches


@pytest.mark.parametrize("width", [7, 8])
def test_elements_past_2_to_the_31(width: int, draw: Any) -> None:
    """Frames that lie 2^30 elements apart in storage that is never touched between them."""
    apart = 2**30
    storage = torch.empty(2 * apart + 64, dtype=torch.float16, device=DEVICE)
    window = storage.as_strided((1, 1, 3, 1, width), (0, 0, apart, width, 1))
    other = draw(1, 1, 3, 1, width, dtype=torch.float16)
    window.copy_(draw(1, 1, 3, 1, width, dtype=torch.float16))
    check([window, other], [0, 1], 4)
    blended = run([other[:, :, :2], other[:, :, 1:]], [0, 1], 3, out=window)
    assert torch.equal(blended, run([other[:, :, :2], other[:, :, 1:]], [0, 1], 3))


def test_a_grid_that_cannot_be_is_refused(draw: Any) -> None:
    window = torch.empty(1, device=DEVICE).expand(2**20, 1, 1, 2**12, 1)
    out = torch.empty(1, device=DEVICE).expand(window.shape)
    with pytest.raises(ValueError, match="takes 4294967296 programs"):
        kernels.blend_windows([window], [0], (1,), None, out=out)
    row = torch.empty(1, device=DEVICE).expand(1, 1, 1, 1, 2**31)
    with pytest.raises(ValueError, match="a row of 2147483648 pixels is longer"):
        kernels.blend_windows([row], [0], (1,), None, out=row)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_boxes_cover_the_result_once_with_the_windows_that_reach_them(data: st.DataObject, slots: int) -> None:
    extent = data.draw(st.tuples(*[st.integers(1, 5)] * 3))
    edges = st.tuples(
        *(st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda p: p[0] < p[1]) for n in extent)
    )
    spans = data.draw(st.lists(edges, min_size=1, max_size=9))
    times = torch.zeros(extent, dtype=torch.int64)
    for box, reach in kernels.boxes(tuple((0, n) for n in extent), tuple(range(len(spans))), spans, slots):
        index = tuple(slice(*side) for side in box)
        times[index] += 1
        overlapping = [
            i for i, span in enumerate(spans) if all(a < d and c < b for (a, b), (c, d) in zip(span, box, strict=True))
        ]
        assert list(reach) == overlapping
        covering = [i for i in reach if all(a <= c and d <= b for (a, b), (c, d) in zip(spans[i], box, strict=True))]
        assert len(reach) <= slots or list(reach) == covering
    assert (times == 1).all()


TRACE = """
import torch, triton
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from lumiere_fast.kernels.blend_windows import blend_windows

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

@torch.library.triton_op("test::blend", mutates_args=())
def blend(windows: list[torch.Tensor], weights: list[float] | None) -> torch.Tensor:
    size = windows[0].shape[-1]
    out = torch.empty(1, 3, 6, size, size, device="cuda", memory_format=torch.channels_last_3d)
    if not isinstance(out, FakeTensor):
        blend_windows(windows, [0, 2], (6,), weights, out=out)
    return out

class Model(torch.nn.Module):
    def forward(self, *windows):
        weights = None if windows[0].shape[-1] == 8 else [1.0, 2.0, 3.0, 4.0]
        return (torch.ops.test.blend(list(windows), weights),)

with FakeTensorMode():
    for size in (8, 5):
        memory = [torch.empty(1, 4, size, size, 3, device="cuda") for _ in "ab"]
        graph, _ = aot_export_module(Model(), [m.permute(0, 4, 1, 2, 3) for m in memory], trace_joint=False)
        calls = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        print(*(call.kwargs["tensors_to_clone"] for call in calls))
"""


def test_a_trace_holds_the_launch_and_knows_that_it_only_writes_out() -> None:
    """torch.compile sees both kernels: traced on fake CUDA tensors, for sm_90, without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TRACE], capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment
    )
    assert done.stdout.split("\n") == ["['out']", "['out']", ""], done.stdout + done.stderr


@pytest.mark.parametrize("scenario", [s for s in SPEC.scenarios if s.cpu], ids=lambda scenario: scenario.name)
def test_the_spec_takes_wide_loads(scenario: Any, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LAUNCH", lambda *arguments, **options: None)
    for dtype in (torch.float32, torch.float16):
        inputs = SPEC.make_inputs(scenario, DEVICE, dtype, torch.Generator().manual_seed(0))
        run(inputs["windows"], inputs["starts"], inputs["num_frames"])
    assert set(launches) == {ALIKE}


@on_gpu
def test_another_stream_and_a_graph(draw: Any) -> None:
    windows = [draw(1, 3, 8, 8, 8) for _ in range(3)]
    weights = [1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0]
    wanted = run(windows, [0, 6, 12], 20, weights)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = run(windows, [0, 6, 12], 20, weights)
    stream.synchronize()
    assert torch.equal(elsewhere, wanted)
    flat, out, graph = flatten(windows, [0, 6, 12], 20, weights), torch.empty_like(wanted), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.blend_windows(*flat, out=out)
    for window in windows:
        window.mul_(2)
    graph.replay()
    assert torch.equal(out, 2 * wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one(draw: Any) -> None:
    windows = [draw(1, 3, 8, 8, 8).to("cuda:1") for _ in range(2)]
    check(windows, [0, 6], 14)
