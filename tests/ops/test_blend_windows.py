from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lumiere_fast import native, use_backend
from lumiere_fast.ops import blend_windows, window_starts, window_weights
from tests.ops.common import (
    CHANNELS_LAST,
    FORMATS,
    Draw,
    assert_no_worse_than_torch,
    check_compiled,
    check_operator,
    check_operator_gradient,
    check_out,
    device_of,
    in_layout,
    launch_on,
)

PAPER_STARTS = [0, 6, 12]  # windows of 8 frames, overlap 2, over 20 frames


@pytest.fixture
def draw() -> Draw:
    return Draw(22)


def least_squares(windows: list[Tensor], starts: list[int], num_frames: int, weights: Tensor | None) -> Tensor:
    """argmin_J sum_i sum_f w_f (J[start_i + f] - window_i[f])^2, solved by lstsq on the explicit selection matrix."""
    rows, targets = [], []
    for window, start in zip(windows, starts, strict=True):
        for f in range(window.shape[2]):
            root = 1.0 if weights is None else weights[f].sqrt()
            row = torch.zeros(num_frames, dtype=torch.float64)
            row[start + f] = root
            rows.append(row)
            targets.append(root * window[:, :, f].flatten())
    solution = torch.linalg.lstsq(torch.stack(rows), torch.stack(targets)).solution
    b, c, _, h, w = windows[0].shape
    return solution.reshape(num_frames, b, c, h, w).movedim(0, 2)


def accumulate(windows: Tensor, starts: list[list[int]], extent: list[int], weights: list[Tensor]) -> Tensor:
    """The naive way: add up weighted windows and weights over the box, divide at the end."""
    total = torch.zeros(*windows.shape[1:3], *extent, dtype=torch.float64)
    mass = torch.zeros(extent, dtype=torch.float64)
    kernel = torch.einsum("t,h,w->thw", *weights)
    for window, (t, h, w) in zip(windows, starts, strict=True):
        box = (slice(t, t + len(weights[0])), slice(h, h + len(weights[1])), slice(w, w + len(weights[2])))
        total[(slice(None), slice(None), *box)] += kernel * window
        mass[box] += kernel
    return total / mass


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("starts", [PAPER_STARTS, [0, 1, 12, 5], [0, 6, 12, 11, 10]])
def test_is_the_least_squares_solution(weighted: bool, starts: list[int], draw: Draw) -> None:
    windows = draw(len(starts), 2, 3, 8, 4, 5)
    weights = draw(8).abs() + 0.1 if weighted else None
    blended = blend_windows(windows, torch.tensor(starts), 20, weights=weights)
    torch.testing.assert_close(blended, least_squares(list(windows), starts, 20, weights))


def test_windows_of_unequal_lengths(draw: Draw) -> None:
    starts, lengths = [0, 3, 9], [5, 8, 4]
    windows = [draw(1, 2, n, 3, 3) for n in lengths]
    torch.testing.assert_close(blend_windows(windows, starts, 13), least_squares(windows, starts, 13, None))


@pytest.mark.parametrize("weighted", [False, True])
def test_blending_in_space_and_time(weighted: bool, draw: Draw) -> None:
    starts = [[t, h, w] for t in (0, 3) for h in (0, 4) for w in (0, 2, 6)]
    windows = draw(len(starts), 1, 2, 5, 6, 4)
    weights = [draw(n).abs() + 0.1 if weighted else torch.ones(n).double() for n in (5, 6, 4)]
    blended = blend_windows(windows, torch.tensor(starts), 8, weights=weights if weighted else None)
    torch.testing.assert_close(blended, accumulate(windows, starts, [8, 10, 10], weights))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=6, unique=True), st.integers(0, 2**31))
def test_any_cover_equals_the_naive_mean(extra: list[int], seed: int) -> None:
    draw = Draw(seed)
    starts = [0, 3, 6, 9, *(s for s in extra if s % 3)]
    windows = draw(len(starts), 1, 1, 3, 1, 2)
    wanted = accumulate(windows, [[s, 0, 0] for s in starts], [12, 1, 2], [torch.ones(n).double() for n in (3, 1, 2)])
    torch.testing.assert_close(blend_windows(windows, starts, 12), wanted)


def test_one_window_is_the_identity(draw: Draw) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        window = draw(2, 3, 8, 4, 4).to(dtype)
        weights = draw(8).abs() + 0.1
        assert torch.equal(blend_windows([window], [0], 8), window)
        assert torch.equal(blend_windows([window], [0], 8, weights=weights), window)


def test_order_of_the_windows_does_not_matter(draw: Draw) -> None:
    windows = draw(3, 2, 3, 8, 4, 4).float()
    order = [2, 0, 1]
    shuffled = blend_windows(windows[order], [PAPER_STARTS[i] for i in order], 20)
    torch.testing.assert_close(shuffled, blend_windows(windows, PAPER_STARTS, 20), rtol=1e-6, atol=1e-6)


BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])


@BACKENDS
@pytest.mark.parametrize("kind", ["flat", "trapezoid", "pyramid", "drawn"])
@pytest.mark.parametrize("starts", [PAPER_STARTS, [0, 1, 2, 5, 6, 7, 12]], ids=["paper", "crowded"])
def test_partition_of_unity_within_one_ulp(backend: str, starts: list[int], kind: str, draw: Draw) -> None:
    """Equal windows keep their value to the bit, and the shares that are really applied add up to one.

    A window's shares are what the blend makes of ones in that window and zeros in all others.
    """
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    weights = (draw(8).abs() + 0.01).tolist() if kind == "drawn" else window_weights(kind, 8)
    given = None if kind == "flat" else weights
    for value in (1.0, 3.1415927, -1e-3):
        windows = torch.full((len(starts), 1, 2, 8, 2, 2), value, device=device)
        blended = launch_on(blend_windows, backend, windows, starts, 20, weights=given)
        assert torch.equal(blended, windows[0, :, :, :1].expand_as(blended))
    shares = []
    for i in range(len(starts)):
        windows = torch.zeros(len(starts), 1, 1, 8, 1, 4, device=device)
        windows[i] = 1
        shares.append(launch_on(blend_windows, backend, windows, starts, 20, weights=given).double())
    total = torch.stack(shares).sum(0)
    assert (total - 1).abs().max() <= torch.finfo(torch.float32).eps
    exact = torch.zeros(len(starts), 20, dtype=torch.float64)
    for i, start in enumerate(starts):
        exact[i, start : start + 8] = torch.tensor(weights, dtype=torch.float64)
    ours = torch.stack(shares)[:, 0, 0, :, 0, 0].cpu()
    torch.testing.assert_close(ours, exact / exact.sum(0), rtol=0, atol=1e-6)


@BACKENDS
def test_the_same_call_gives_the_same_bits(backend: str, draw: Draw) -> None:
    windows = draw(6, 1, 3, 8, 5, 7).float()
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    call = windows.to(device), [0, 1, 3, 4, 9, 12], 20
    once, again = (launch_on(blend_windows, backend, *call, weights="pyramid") for _ in range(2))
    assert torch.equal(once, again)


def test_accumulates_half_precision_in_fp32(draw: Draw) -> None:
    starts = list(range(9))
    windows = draw(9, 1, 2, 8, 4, 4).to(torch.bfloat16)
    wanted = accumulate(
        windows.double(), [[s, 0, 0] for s in starts], [16, 4, 4], [torch.ones(n).double() for n in (8, 4, 4)]
    )
    blended = blend_windows(windows, starts, 16)
    assert blended.dtype == torch.bfloat16
    torch.testing.assert_close(blended.double(), wanted, rtol=1.01 * torch.finfo(torch.bfloat16).eps / 2, atol=1e-6)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_keeps_the_memory_format(memory_format: torch.memory_format, draw: Draw) -> None:
    windows = [draw(2, 3, 8, 4, 4).contiguous(memory_format=memory_format) for _ in PAPER_STARTS]
    assert blend_windows(windows, PAPER_STARTS, 20).is_contiguous(memory_format=memory_format)
    assert blend_windows(torch.stack(windows).contiguous(), PAPER_STARTS, 20).is_contiguous()


def test_slices_empty_batch_and_one_frame(draw: Draw) -> None:
    clip = draw(2, 3, 20, 5, 7).to(memory_format=CHANNELS_LAST)
    windows = [clip[:, :, s : s + 8, 1:, ::2] for s in PAPER_STARTS]
    torch.testing.assert_close(blend_windows(windows, PAPER_STARTS, 20), clip[:, :, :, 1:, ::2])
    assert blend_windows(torch.empty(3, 0, 3, 8, 4, 4), PAPER_STARTS, 20).shape == (0, 3, 20, 4, 4)
    assert blend_windows(torch.ones(1, 1, 1, 1, 1, 1), [0], 1).shape == (1, 1, 1, 1, 1)


def test_gradcheck_and_adjoint(draw: Draw) -> None:
    windows = [draw(1, 2, 4, 1, 2).requires_grad_() for _ in range(3)]
    weights = torch.tensor([0.5, 1.0, 1.0, 0.25], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *parts: blend_windows(parts, [0, 2, 5], 9, weights=weights), windows)
    stacked = draw(3, 1, 2, 4, 1, 2).requires_grad_()
    out = blend_windows(stacked, [0, 2, 5], 9)
    y = draw(*out.shape)
    (transposed,) = torch.autograd.grad(out, stacked, y)
    torch.testing.assert_close((out * y).sum(), (stacked * transposed).sum())


def test_gradient_of_a_subset(draw: Draw) -> None:
    windows = [draw(1, 1, 4, 1, 1) for _ in range(2)]
    windows[1].requires_grad_()
    blend_windows(windows, [0, 2], 6).sum().backward()
    torch.testing.assert_close(windows[1].grad.flatten(), torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_operator(memory_format: torch.memory_format, backend: str, draw: Draw) -> None:
    if native.why_not("cpu") and backend == "cpu":
        pytest.skip("; ".join(native.why_not("cpu")))
    windows = [draw.clip(2, 3, n, 4, 2, memory_format=memory_format, grad=n != 3) for n in (4, 3, 4)]
    check_operator(blend_windows, windows, [0, 2, 4], 8, backend=backend)
    check_operator_gradient(blend_windows, windows, [0, 2, 4], 8, backend=backend)
    weighted = [draw(1, 3, 4, 4, 2, grad=True) for _ in range(2)], [[0, 0, 0], [1, 0, 0]], 5
    weights = [draw(n).abs() + 0.1 for n in (4, 4, 2)]
    check_operator(blend_windows, *weighted, weights=weights, backend=backend)
    check_operator_gradient(blend_windows, *weighted, weights=weights, backend=backend)
    with use_backend(backend):
        check_compiled(blend_windows, windows, [0, 2, 4], 8)
        check_compiled(blend_windows, *weighted, weights="pyramid")
        with torch.no_grad():
            check_out(blend_windows, windows, [0, 2, 4], 8)


@pytest.mark.parametrize("count", [2, 40])
def test_compiled_as_it_comes(count: int, draw: Draw) -> None:
    """Without a backend by name, where every one is asked whether it can."""
    windows = [draw(1, 3, 4, 4, 2) for _ in range(count)]
    check_compiled(blend_windows, windows, [2 * i for i in range(count)], 2 * count + 2)


def test_window_starts() -> None:
    assert window_starts(80, 8) == [0, 6, 12, 18, 24, 30, 36, 42, 48, 54, 60, 66, 72]
    assert window_starts(80, 28) == [0, 26, 52]
    assert window_starts(80, 80) == [0]
    assert window_starts(16, 8) == [0, 6, 8]  # ragged: the last is shifted back
    assert window_starts(9, 8) == [0, 1]
    assert window_starts(16, 8, overlap=0) == [0, 8]
    for frames, window, overlap in ((7, 8, 2), (8, 2, 2), (8, 4, -1)):
        with pytest.raises(ValueError, match="0 <= overlap < window <= num_frames"):
            window_starts(frames, window, overlap)


def test_window_weights() -> None:
    assert window_weights("flat", 4) == (1, 1, 1, 1)
    assert window_weights("trapezoid", 8) == pytest.approx((1 / 3, 2 / 3, 1, 1, 1, 1, 2 / 3, 1 / 3))
    assert window_weights("trapezoid", 5, overlap=1) == (0.5, 1, 1, 1, 0.5)
    assert window_weights("trapezoid", 3, overlap=0) == (1, 1, 1)
    assert window_weights("pyramid", 5) == pytest.approx((1 / 3, 2 / 3, 1, 2 / 3, 1 / 3))
    assert window_weights("pyramid", 6) == pytest.approx((1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3))
    assert window_weights("trapezoid", 7, overlap=5) == window_weights("pyramid", 7)  # the ramps meet
    for kind in ("flat", "trapezoid", "pyramid"):
        assert window_weights(kind, 1) == (1,)
        for n in (2, 9):
            weights = window_weights(kind, n)
            assert weights == weights[::-1] and max(weights) == 1 and min(weights) > 0


@given(st.integers(1, 12), st.data())
def test_a_trapezoid_fades_neighbours_into_one_another(overlap: int, data: st.DataObject) -> None:
    """Over the frames that two share, their weights add up to one: they are the shares themselves."""
    window = data.draw(st.integers(2 * overlap + 1, 40))
    weights = np.array(window_weights("trapezoid", window, overlap))
    assert weights[-overlap:] + weights[:overlap] == pytest.approx(1)
    assert (weights[overlap : window - overlap] == 1).all()


@pytest.mark.parametrize("kind", ["flat", "trapezoid", "pyramid"])
def test_weights_by_name(kind: str, draw: Draw) -> None:
    """The vectors of `window_weights`; a trapezoid's ramp is the least overlap there is along its axis."""
    windows = draw(4, 1, 2, 8, 4, 4)
    starts = [12, 0, 9, 5]  # overlaps of 3, 4 and 5
    expected = blend_windows(windows, starts, 20, weights=window_weights(kind, 8, overlap=3))
    assert torch.equal(blend_windows(windows, starts, 20, weights=kind), expected)
    torch.testing.assert_close(
        expected, least_squares(list(windows), starts, 20, torch.tensor(window_weights(kind, 8, 3)).double())
    )
    corners = [(t, h, w) for t in (0, 6) for h in (0, 1) for w in (0, 5)]  # overlaps of 2, of 5, and none
    windows = draw(8, 1, 2, 8, 6, 5)
    vectors = [window_weights(kind, n, overlap) for n, overlap in ((8, 2), (6, 5), (5, 0))]
    expected = blend_windows(windows, corners, 14, weights=vectors)
    assert torch.equal(blend_windows(windows, corners, 14, weights=kind), expected)


def test_bad_weights_are_named(draw: Draw) -> None:
    windows = draw(3, 1, 2, 8, 4, 4)
    ragged = [windows[0], windows[1][:, :, :7]]
    with pytest.raises(ValueError, match="weights must be None or 'flat' or 'trapezoid' or 'pyramid', got 'gaussian'"):
        blend_windows(windows, PAPER_STARTS, 20, weights="gaussian")
    with pytest.raises(ValueError, match="blend_windows: weights need windows of equal lengths"):
        blend_windows(ragged, [0, 6], 13, weights="pyramid")
    assert torch.equal(blend_windows(ragged, [0, 6], 13, weights="flat"), blend_windows(ragged, [0, 6], 13))
    for wrong in (3, [["a"] * 8], ["x"] * 8, torch.ones(8, 1), object()):
        with pytest.raises(ValueError, match="or a vector of numbers, got"):
            blend_windows(windows, PAPER_STARTS, 20, weights=wrong)
    corners = [(0, 0, 0), (6, 0, 0), (12, 0, 0)]
    for wrong in (3, torch.ones(8), [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="or three vectors of numbers, for T, H and W, got"):
            blend_windows(windows, corners, 20, weights=wrong)
    with pytest.raises(ValueError, match="weights must be 3 vectors, one for each of T, H, W, got 2"):
        blend_windows(windows, corners, 20, weights=[[1.0] * 8, [1.0] * 4])
    with pytest.raises(ValueError, match="window_weights: kind must be 'flat' or 'trapezoid' or 'pyramid', got None"):
        window_weights(None, 8)
    for window, overlap in ((0, 2), (8, -1)):
        with pytest.raises(ValueError, match=f"need window >= 1 and overlap >= 0, got {window} and {overlap}"):
            window_weights("trapezoid", window, overlap)
    with pytest.raises(ValueError, match=r"window_weights: overlap takes integers, got 1\.5"):
        window_weights("trapezoid", 8, 1.5)


def test_errors(draw: Draw) -> None:
    windows = draw(3, 1, 2, 8, 4, 4)
    with pytest.raises(ValueError, match=r"start 6 is given twice"):
        blend_windows(windows, [0, 6, 6], 20)
    with pytest.raises(ValueError, match=r"frames 8, 9, 10, 11 are in no window"):
        blend_windows(windows[:2], [0, 12], 20)
    with pytest.raises(ValueError, match=r"window 2 .*13.*21.*20"):
        blend_windows(windows, [0, 6, 13], 20)
    with pytest.raises(ValueError, match=r"window 0 .*-1"):
        blend_windows(windows, [-1, 6, 12], 20)
    with pytest.raises(ValueError, match=r"3 windows.*2 starts"):
        blend_windows(windows, [0, 6], 20)
    with pytest.raises(ValueError, match="at least one window"):
        blend_windows([], [], 20)
    with pytest.raises(ValueError, match=r"weights\[0\].*8.*7"):
        blend_windows(windows, PAPER_STARTS, 20, weights=torch.ones(7))
    for weights in (-torch.ones(8), torch.zeros(8), torch.full((8,), torch.inf), torch.full((8,), torch.nan)):
        with pytest.raises(ValueError, match="positive and finite"):
            blend_windows(windows, PAPER_STARTS, 20, weights=weights)
    with pytest.raises(ValueError, match=r"equal lengths"):
        blend_windows([windows[0], windows[1][:, :, :7]], [0, 6], 13, weights=torch.ones(8))
    with pytest.raises(ValueError, match=r"windows\[1\].*shape"):
        blend_windows([windows[0], windows[1][:, :1]], [0, 6], 14)
    with pytest.raises(ValueError, match=r"integers"):
        blend_windows(windows, torch.tensor([0.0, 6.0, 12.0]), 20)
    with pytest.raises(ValueError, match=r"\(t 0\.\.8, h 0\.\.4, w 4\.\.5\)"):
        blend_windows(windows[:2], [[0, 0, 0], [0, 0, 5]], 8)


def test_a_list_of_what_is_bare_stays_short(draw: Draw) -> None:
    """Whatever the length: a wrong `num_frames` must not take all memory to say so."""
    with pytest.raises(ValueError, match=r"frames 8, 9, .*, 23, \.\.\. are in no window"):
        blend_windows(draw(1, 1, 2, 8, 4, 4), [0], 2**62)


def test_numbers_of_numpy_are_taken(draw: Draw) -> None:
    windows = draw(3, 1, 2, 8, 4, 4)
    expected = blend_windows(windows, PAPER_STARTS, 20)
    for starts in (np.array(PAPER_STARTS), [np.int64(start) for start in PAPER_STARTS]):
        assert torch.equal(blend_windows(windows, starts, np.int64(20)), expected)
    for num_frames in (20.0, "20", True, None):
        with pytest.raises(ValueError, match="blend_windows: num_frames takes integers"):
            blend_windows(windows, PAPER_STARTS, num_frames)
    with pytest.raises(ValueError, match=r"windows must be a tensor .* or a list of N, got <class 'numpy.ndarray'>"):
        blend_windows(windows.numpy(), PAPER_STARTS, 20)
    with pytest.raises(ValueError, match=r"windows\[1\] must be a tensor, got ndarray"):
        blend_windows([windows[0], windows[1].numpy(), windows[2]], PAPER_STARTS, 20)


def test_only_ratios_of_weights_count_and_none_is_lost(draw: Draw) -> None:
    plain = [draw(4).abs() + 0.1 for _ in range(3)]
    starts = [[t, h, w] for t in (0, 1) for h in (0, 1) for w in (0, 1)]
    eight = draw(8, 1, 1, 4, 4, 4)
    for huge in (1e-120, 1e120):
        scaled = blend_windows(eight, starts, 5, weights=[huge * vector for vector in plain])
        torch.testing.assert_close(scaled, blend_windows(eight, starts, 5, weights=plain))
    far = torch.tensor([1.0, 1e-99, 1.0, 1e-99], dtype=torch.float64)
    assert blend_windows(eight, starts, 5, weights=[far] * 3).isfinite().all()
    with pytest.raises(ValueError, match="within 1e\\+100 of one another"):
        blend_windows(eight, starts, 5, weights=[far**2] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_every_backend_is_the_reference_on_its_device(backend: str, dtype: torch.dtype, draw: Draw) -> None:
    """Random windows: of several strides and layouts, crowded or not, weighted or not, in time and in space."""
    device, random = device_of(backend), np.random.default_rng(5)
    for case in range(24):
        in_space, crowded = case % 3 == 2, case % 4 == 3
        T, H, W = (int(n) for n in random.integers((6, 3, 2), (30, 9, 20)))
        window = int(random.integers(2, T + 1))
        step = 1 if crowded else max(1, window - int(random.integers(0, window)))
        frames = sorted({*range(0, T - window, step), T - window})
        corners = [(t, h, w) for t in frames for h in (0, 2) for w in (0, 1)] if in_space else frames
        size = (int(random.integers(1, 3)), int(random.integers(1, 5)), window, H, W)
        windows = [in_layout(draw(*size).to(device, dtype), kind) for kind in random.integers(0, 4, len(corners))]
        weights = None
        if case % 2:
            vectors = [draw(n).abs() + 0.1 for n in (window, H, W)]
            weights = vectors if in_space else vectors[0]
        expected = blend_windows(windows, corners, T, weights=weights, backend="reference")
        exact = blend_windows([w.double() for w in windows], corners, T, weights=weights, backend="reference")
        ours = blend_windows(windows, corners, T, weights=weights, backend=backend)
        assert ours.stride() == expected.stride()
        assert_no_worse_than_torch(ours, expected, exact)
