"""The Triton kernels of denoise_step against the reference: in Triton's interpreter, or compiled if there is a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import dispatch
from lumiere_fast.ops import StepCoefficients, Threshold, window_starts
from lumiere_fast.ops.denoise_step import _OP, denoise_step_reference
from tests.ops.common import CHANNELS_LAST, CONTIGUOUS, FORMATS, Draw, assert_no_worse_than_torch

pytest.importorskip("triton", reason="the kernels need Triton")
from lumiere_fast.kernels import denoise_step as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Never bfloat16 in the interpreter, which computes it wrongly and says nothing.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
STEP, COUNT, FIND = kernels._step_kernel, kernels._count_kernel, kernels._find_kernel
ONLY_X0 = StepCoefficients(0, 1, 0, 1)
PLAIN = StepCoefficients(0.8, -0.6, 0.7, 0.45)
FULL = PLAIN._replace(history=-0.15, noise=0.3)
BOUNDS = {
    "none": None,
    "static": Threshold(),
    "clip": Threshold("dynamic", 0.9),
    "frame": Threshold("dynamic", 0.9, "frame"),
}

# Lanes that nothing covers divide zero by zero before they are masked off; what is not finite is tested.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


class Launches(list[Any]):
    """The kernels launched so far, each a form that the gate compiles ahead of time."""

    def __call__(self, kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        names = [name for name in kernel.arg_names if name not in ("TILE", "VECTOR")]
        given = dict(zip(names, arguments, strict=True))
        form = {name: f"*{NAMES[x.dtype]}" for name, x in given.items() if isinstance(x, Tensor)}
        form |= {name: "fp32" if isinstance(x, float) else "i32" for name, x in given.items() if name not in form}
        assert (kernel.__name__, form, options) in SHIPPED
        self.append(kernel)
        LAUNCH(kernel, programs, out, *arguments, **options)


LAUNCH = kernels.launch
SHIPPED = [
    (
        variant.kernel,
        {name: kind for name, kind in variant.signature.items() if kind != "constexpr"},
        {
            **variant.constexprs,
            **{"num_warps": variant.num_warps, "num_stages": variant.num_stages},
            **({} if variant.maxnreg is None else {"maxnreg": variant.maxnreg}),
        },
    )
    for variant in kernels.VARIANTS
]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    recorded = Launches()
    monkeypatch.setattr(kernels, "launch", recorded)
    yield recorded


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """(B, C, T, H, W) normal, on the device."""
    source = Draw(32)

    def clip(
        *shape: int, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = CHANNELS_LAST
    ) -> Tensor:
        return source(*shape).to(DEVICE, dtype).contiguous(memory_format=memory_format)

    return clip


def run(*inputs: Any, out: tuple[Tensor, Tensor] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """What the kernels write, over NaN unless room is given."""
    flat = bind(*inputs, **options)
    if out is None:
        out = _OP.allocate(flat)
        for result in out:
            result.fill_(math.nan)
    kernels.denoise_step(*flat, out=out)
    return out


def bind(*inputs: Any, **options: Any) -> tuple[Any, ...]:
    return dispatch.registered("denoise_step").bind(*inputs, **options)


def check(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out = options.pop("out", None)
    flat = bind(*inputs, **options)
    theirs = denoise_step_reference(*flat)
    windows, *cover, latent, coefficients, scale, bound, percentile, noise, history = flat
    latent, noise, history = (None if x is None else x.double() for x in (latent, noise, history))
    state = latent, coefficients, scale, bound, percentile, noise, history
    exact = denoise_step_reference([window.double() for window in windows], *cover, *state)
    ours = run(*inputs, **options, out=out)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert_no_worse_than_torch(mine, other, truth)
    return ours


def constants(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The VECTOR of every launch from now on."""
    found: list[int] = []

    def watch(kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        found.append(options.get("VECTOR", 0))
        launches(kernel, programs, out, *arguments, **options)

    monkeypatch.setattr(kernels, "launch", watch)
    return found


@pytest.mark.parametrize("latent_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", BOUNDS)
def test_all_at_once(
    bound: str, dtype: torch.dtype, latent_dtype: torch.dtype, draw: Any, launches: Launches, monkeypatch: Any
) -> None:
    """Guidance, weights, a bound, history and noise; one launch where no quantile is needed."""
    vectors = constants(launches, monkeypatch)
    windows = [draw(2, 3, 2, 4, 8, dtype=dtype) for _ in range(2)]
    latent, noise, history = (draw(1, 3, 3, 4, 8, dtype=latent_dtype) for _ in range(3))
    options = {"guidance_scale": 2.5, "weights": [1.0, 3.0], "noise": noise, "history": history}
    check(windows, [0, 1], latent, FULL, **options, threshold=BOUNDS[bound])
    assert launches == [*[COUNT, FIND] * (4 if bound in ("clip", "frame") else 0), STEP]
    assert {vector for vector in vectors if vector} == {16 // min(dtype.itemsize, latent_dtype.itemsize)}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("dtype", "latent_dtype"), [(torch.float32, torch.float32), (torch.float16, torch.float32)])
def test_tiles(
    dtype: torch.dtype, latent_dtype: torch.dtype, memory_format: Any, draw: Any, launches: Launches, monkeypatch: Any
) -> None:
    """Runs of one element, of a tile, and of a little less and more, with wide loads and without."""
    vectors = constants(launches, monkeypatch)
    vector = 16 // dtype.itemsize
    for width in (vector, 1024 - vector, 1024, 1024 + vector, 1, 255, 257):
        window = draw(2, 1, 1, 1, width, dtype=dtype, memory_format=memory_format)
        latent = draw(1, 1, 1, 1, width, dtype=latent_dtype, memory_format=memory_format)
        for result in check([window], [0], latent, PLAIN, guidance_scale=3.0):
            assert result.is_contiguous(memory_format=memory_format)
        assert vectors[-1] == (vector if width % vector == 0 else 1)


def test_a_quantile_over_more_tiles_than_one_program_counts(draw: Any) -> None:
    """Ten tiles, so two programs, the second of two tiles and one of them cut."""
    window = draw(1, 1, 1, 1, 9 * 1024 + 8)
    check([window], [0], torch.zeros_like(window), ONLY_X0, threshold=Threshold("dynamic", 0.7))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 5)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_shapes(memory_format: torch.memory_format, shape: tuple[int, int, int], draw: Any) -> None:
    """Of two clips, whose halves lie one after the other; windows and latent in different formats, too."""
    C, H, W = shape
    windows = [draw(4, C, 2, H, W, memory_format=memory_format) for _ in range(2)]
    latent = draw(2, C, 3, H, W)
    check(windows, [0, 1], latent, PLAIN, guidance_scale=2.0, threshold=Threshold("dynamic", 0.8), weights=[0.5, 2.0])
    check([window[:2] for window in windows], [0, 1], latent, PLAIN, threshold=BOUNDS["static"])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [8, 7], ids=["wide", "narrow"])
def test_space_and_time(width: int, weighted: bool, draw: Any, launches: Launches) -> None:
    starts = [list(corner) for corner in product((0, 1), (0, 2), (0, width // 2))]
    windows = [draw(2, 3, 2, 3, width, dtype=torch.float16) for _ in starts]
    weights = [torch.rand(n, dtype=torch.float64) + 0.1 for n in (2, 3, width)] if weighted else None
    latent = draw(1, 3, 3, 5, width + width // 2)
    check(windows, starts, latent, PLAIN, guidance_scale=2.0, weights=weights)
    check([windows[0][:1]], [[0, 0, 0]], latent[:, :, :2, :3, :width], PLAIN, threshold=Threshold("dynamic", 0.5))
    assert launches.count(STEP) == 2


def test_the_paper_s_clip_is_one_launch(draw: Any, launches: Launches) -> None:
    starts = window_starts(80, 8)
    assert len(starts) == 13
    windows = [draw(2, 1, 8, 2, 4) for _ in starts]
    check(windows, starts, draw(1, 1, 80, 2, 4), PLAIN, guidance_scale=7.5)
    assert launches == [STEP]


def test_more_windows_than_slots(draw: Any, launches: Launches) -> None:
    """They do not lie over one position, so each launch takes a box of frames; the counters are the whole clip's."""
    starts = list(range(17))
    latent = draw(1, 1, 18, 1, 4)
    check([draw(1, 1, 2, 1, 4) for _ in starts], starts, latent, PLAIN, threshold=Threshold("dynamic", 0.6))
    assert launches == [*[COUNT, COUNT, FIND] * 4, STEP, STEP]


@pytest.mark.parametrize(
    "kind", ["lengths", "layouts", "crowded", "uneven weights"], ids=lambda kind: kind.replace(" ", "_")
)
def test_what_is_blended_first(kind: str, draw: Any, launches: Launches, monkeypatch: Any) -> None:
    """Into fp32, without a rounding on the way."""
    blended: list[Tensor] = []
    blend = kernels.blend_windows
    monkeypatch.setattr(
        kernels, "blend_windows", lambda *arguments, out: blend(*arguments, out=out) or blended.append(out)
    )
    half, weights = torch.float16, None
    starts, frames = [0, 1], 3
    windows = [draw(2, 2, 2, 2, 4, dtype=half) for _ in range(2)]
    if kind == "lengths":
        windows[1] = windows[1][:, :, :1]
        windows.append(draw(2, 2, 1, 2, 4, dtype=half))
        starts = [0, 1, 2]
    elif kind == "layouts":
        windows[1] = windows[1].contiguous()
    elif kind == "crowded":
        starts, frames = list(range(17)), 33
        windows = [draw(2, 1, 17, 1, 4, dtype=half) for _ in starts]
    else:
        starts, weights, frames = [[0, 0, 0], [1, 0, 0]], [[1.0, 1e-25], [1.0, 1e-25], [1.0] * 4], 3
    latent = draw(1, windows[0].shape[1], frames, *windows[0].shape[3:])
    check(windows, starts, latent, PLAIN, guidance_scale=2.0, weights=weights)
    assert [whole.dtype for whole in blended] == [torch.float32] and launches == [STEP]


@pytest.mark.parametrize("percentile", [1e-9, 0.5, 0.77, 0.995, 1.0])
@pytest.mark.parametrize("per", ["clip", "frame"])
def test_quantiles(per: str, percentile: float, draw: Any) -> None:
    """Of one clip far outside and one inside, which is not touched."""
    window = draw(2, 1, 2, 3, 4) * torch.tensor([5.0, 0.05], device=DEVICE).view(2, 1, 1, 1, 1)
    _, x0 = check([window], [0], torch.zeros_like(window), ONLY_X0, threshold=Threshold("dynamic", percentile, per))
    assert torch.equal(x0[1], window[1])


@pytest.mark.parametrize(
    ("values", "percentile"),
    [
        ([0.3, 5.0, 0.1, 0.2], 0.83),  # neighbours in different octaves, one of them below 1
        ([0.3, 1.0, 0.1, 0.2], 0.9),
        ([3.0, 3.0 + 2**-9, 1.0, 2.0], 0.9),  # they part in the second digit,
        ([3.0, 3.0 + 2**-15, 1.0, 2.0], 0.7),  # in the third
        ([3.0, 3.0 + 2**-22, 1.0, 2.0], 0.9),  # and in the last
        ([2.5, -2.5, 2.5, -2.5], 0.7),
        ([1.0, -1.0, 1.0, 1.0], 0.7),
        ([0.0, -0.0, 1e-45, 1e-40], 0.7),
        ([3e38, -3.4e38, 2.0, 1e30], 0.9),
        ([7.0], 0.3),
    ],
)
def test_neighbours_of_the_position(values: list[float], percentile: float) -> None:
    window = torch.tensor(values, device=DEVICE).view(1, 1, 1, 1, -1)
    threshold = Threshold("dynamic", percentile)
    ours = run([window], [0], torch.zeros_like(window), ONLY_X0, threshold=threshold)
    theirs = denoise_step_reference(*bind([window], [0], torch.zeros_like(window), ONLY_X0, threshold=threshold))
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("bound", [None, Threshold(), *(Threshold("dynamic", p, "frame") for p in (0.5, 2 / 3, 1.0))])
@pytest.mark.parametrize(
    "values", [[3.0, INF, 2.0, 0.5], [3.0, -INF, NAN, 0.5], [INF, INF, -INF, 1.0], [NAN, 1.0, 2.0, 3.0]]
)
def test_what_is_not_finite_is_as_the_reference_s(values: list[float], bound: Threshold | None) -> None:
    frames = torch.tensor([values, [4.0, 3.0, 2.0, 1.0]], device=DEVICE).view(1, 1, 2, 1, 4)
    ours = run([frames], [0], torch.zeros_like(frames), ONLY_X0, threshold=bound)
    theirs = denoise_step_reference(*bind([frames], [0], torch.zeros_like(frames), ONLY_X0, threshold=bound))
    torch.testing.assert_close(ours[1], theirs[1], equal_nan=True)


def test_the_search_ends_early_where_nothing_is_bounded(draw: Any, monkeypatch: Any) -> None:
    """What later passes would count is spoilt after the first: nobody looks at it."""
    window = draw(1, 1, 2, 2, 4).clamp(-0.9, 0.9)
    window[:, :, 1] = 3.0
    states: list[Tensor] = []

    def spy(kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        LAUNCH(kernel, programs, out, *arguments, **options)
        if kernel is FIND:
            states.append(arguments[0].clone())

    monkeypatch.setattr(kernels, "launch", spy)
    run([window], [0], torch.zeros_like(window), ONLY_X0, threshold=Threshold("dynamic", 0.9, "frame"))
    first, *later = states
    assert first[0, kernels.LIMIT.value] != 0 and first[1, kernels.LIMIT.value] == 0
    assert all(torch.equal(state[0], first[0]) for state in later)
    assert not torch.equal(later[-1][1], first[1])


@pytest.mark.parametrize("bound", ["static", "clip"])
@pytest.mark.parametrize("latent_dtype", DTYPES)
def test_in_place_is_out_of_place_bit_for_bit(latent_dtype: torch.dtype, bound: str, draw: Any) -> None:
    windows = [draw(2, 3, 2, 2, 8, dtype=torch.float16) for _ in range(2)]
    latent, noise, history = (draw(1, 3, 3, 2, 8, dtype=latent_dtype) for _ in range(3))
    options = {"guidance_scale": 2.0, "threshold": BOUNDS[bound], "noise": noise, "history": history}
    wanted = run(windows, [0, 1], latent, FULL, **options)
    found = run(windows, [0, 1], latent, FULL, **options, out=(latent, history))
    assert found[0] is latent and found[1] is history
    assert torch.equal(latent, wanted[0]) and torch.equal(history, wanted[1])


def test_what_has_no_coefficient_is_not_read(draw: Any) -> None:
    window = draw(1, 1, 1, 2, 4)
    void = torch.full_like(window, math.nan)
    assert not any(result.isnan().any() for result in run([window], [0], window, PLAIN, noise=void, history=void))


@pytest.mark.parametrize("bound", ["none", "clip"])
def test_any_strides(bound: str, draw: Any) -> None:
    """Every tensor in a layout of its own, and nothing beside the results is touched."""
    windows = [draw(2, 6, 2, 3, 8)[:, ::2, ..., 1::2] for _ in range(2)]
    latent = draw(1, 3, 3, 4, 3).permute(0, 1, 2, 4, 3)
    noise = draw(1, 3, 3, 3, 4, memory_format=CONTIGUOUS)
    history = draw(1, 3, 1, 3, 4).expand(1, 3, 3, 3, 4)
    held = torch.full((2, 1, 4, 5, 6, 9), -7.0, device=DEVICE)
    out = held[0, :, :3, 1:4, ::2, 1:5], held[1, :, 1:, :3, 3:, ::2][..., :4]
    options = {"guidance_scale": 2.0, "threshold": BOUNDS[bound], "noise": noise, "history": history}
    check(windows, [0, 1], latent, FULL, **options, out=out)
    for result in out:
        result.fill_(-7.0)
    assert (held == -7.0).all()


def test_tensors_that_are_not_aligned_take_narrow_loads(draw: Any, launches: Launches, monkeypatch: Any) -> None:
    vectors = constants(launches, monkeypatch)
    memory = torch.empty(17, device=DEVICE).normal_()
    latent = memory[1:].view(1, 1, 1, 4, 4)
    check([draw(1, 1, 1, 4, 4)], [0], latent, PLAIN)
    assert vectors == [1]


def test_steps_share_one_compiled_form(draw: Any, monkeypatch: Any) -> None:
    """Coefficients, guidance, bounds and what is absent change no type and no constant of a launch."""
    forms: set[Any] = set()

    def watch(kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        kinds = tuple(x.dtype if isinstance(x, Tensor) else type(x) for x in arguments)
        forms.add((kernel.__name__, kinds, *sorted(options.items())))

    monkeypatch.setattr(kernels, "launch", watch)
    latent = draw(1, 3, 2, 2, 4, dtype=torch.float16)
    for coefficients, scale, weights in ((FULL, 2.0, [1.0, 2.0]), (StepCoefficients(1, 0, 1, 1), None, None)):
        for bound in BOUNDS.values():
            window = draw(2 if scale else 1, 3, 2, 2, 4)
            options = {"noise": latent, "history": latent} if coefficients is FULL else {}
            run([window], [0], latent, coefficients, guidance_scale=scale, threshold=bound, weights=weights, **options)
    assert len(forms) == 3
    arguments = {
        STEP: (*kernels.STEP_TENSORS, *kernels.STEP_INTEGERS, *kernels.STEP_FLOATS),
        COUNT: (*kernels.COUNT_TENSORS, *kernels.COUNT_INTEGERS, *kernels.COUNT_FLOATS),
        FIND: ("state", *kernels.FIND_INTEGERS, "fraction"),
    }
    for kernel, names in arguments.items():  # which are not specialised, and so are all but two
        assert set(kernel.arg_names) - set(names) <= {"TILE", "VECTOR"}


def test_an_empty_batch_launches_nothing(launches: Launches) -> None:
    for bound in BOUNDS.values():
        latent = torch.empty(0, 3, 3, 4, 4, device=DEVICE)
        windows = torch.empty(2, 0, 3, 2, 4, 4, device=DEVICE)
        assert run(windows, [0, 1], latent, PLAIN, threshold=bound)[0].shape == latent.shape
    assert not launches


@pytest.mark.parametrize("width", [7, 8])
def test_elements_past_2_to_the_31(width: int, draw: Any) -> None:
    """Frames that lie 2^30 elements apart in storage that is never touched between them."""
    apart, half = 2**30, torch.float16
    storage = torch.empty(2 * apart + 64, dtype=half, device=DEVICE)
    far = storage.as_strided((1, 1, 3, 1, width), (0, 0, apart, width, 1))
    near, other = (draw(1, 1, 3, 1, width, dtype=half) for _ in "ab")
    far.copy_(near)
    threshold = Threshold("dynamic", 0.7)
    wanted = run([near], [0], other, PLAIN, threshold=threshold)
    assert torch.equal(run([far], [0], other, PLAIN, threshold=threshold)[0], wanted[0])
    wanted = run([other], [0], near, PLAIN)
    run([other], [0], far, PLAIN, out=(far, torch.empty_like(near)))
    assert torch.equal(far, wanted[0])


def test_a_grid_that_cannot_be_is_refused(draw: Any) -> None:
    latent = torch.empty(1, device=DEVICE).expand(2**20, 1, 1, 2**12, 1)
    with pytest.raises(ValueError, match="takes 4294967296 programs"):
        run([latent], [0], latent, PLAIN, out=(latent, latent))


def test_what_it_does_not_take_is_said(draw: Any) -> None:
    window = draw(1, 1, 1, 2, 4)
    reasons = dispatch.why_not("denoise_step", "triton", [window.double()], [0], window, PLAIN)
    assert any("windows is float64" in reason for reason in reasons)


@on_gpu
def test_a_graph_holds_the_whole_step(draw: Any) -> None:
    windows = [draw(2, 3, 8, 8, 8) for _ in range(3)]
    latent, history = draw(1, 3, 20, 8, 8), draw(1, 3, 20, 8, 8)
    for bound in BOUNDS.values():
        call = windows, [0, 6, 12], latent, PLAIN._replace(history=0.2)
        options = {"guidance_scale": 2.0, "threshold": bound, "history": history}
        flat, wanted = bind(*call, **options), run(*call, **options)
        out, graph = _OP.allocate(flat), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernels.denoise_step(*flat, out=out)
        graph.replay()
        assert all(torch.equal(mine, other) for mine, other in zip(out, wanted, strict=True))
