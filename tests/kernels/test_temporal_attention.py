"""The Triton kernels of temporal_attention against the reference: in Triton's interpreter, or compiled on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import dispatch
from lumiere_fast.ops.temporal_attention import MOST_HEAD_DIM, temporal_attention, temporal_attention_reference
from tests.ops.common import Draw, arguments_of, assert_no_worse_than_torch

pytest.importorskip("triton", reason="the kernels need Triton")
from lumiere_fast.kernels import temporal_attention as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Never bfloat16 in the interpreter, which computes it wrongly and says nothing.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NAN, INF = float("nan"), float("inf")

# Rows that see nothing that is finite are -inf less -inf before they become NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Launches(list[str]):
    """The names of the compiled forms launched so far, each of which the gate compiles ahead of time."""

    def __call__(self, kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        absent = {"rotary": None} if arguments[4] is None else {}
        form = (kernel.__name__, NAMES[out.dtype], tuple(sorted({**options, **absent}.items(), key=str)))
        assert arguments[3].dtype == torch.float32
        assert arguments[4] is None or arguments[4].data_ptr() % kernels.VECTOR_BYTES == 0
        assert len(arguments) == len(kernels.TENSORS) + len(kernels.SCALARS)
        self.append(SHIPPED[form])
        LAUNCH(kernel, programs, out, *arguments, **options)


LAUNCH = kernels.launch
SHIPPED = {
    (
        variant.kernel,
        variant.signature["q"].removeprefix("*"),
        tuple(
            sorted(
                {
                    **variant.constexprs,
                    "num_warps": variant.num_warps,
                    "num_stages": variant.num_stages,
                }.items(),
                key=str,
            )
        ),
    ): variant.name
    for variant in kernels.VARIANTS
}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    recorded = Launches()
    monkeypatch.setattr(kernels, "launch", recorded)
    yield recorded


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    return Draw(seed)(*shape).to(DEVICE, dtype)


def fused(T: int, D: int, dtype: torch.dtype, *, B: int = 1, H: int = 1, W: int = 3, heads: int = 1) -> Tensor:
    return draw(B, T, H, W, 3, heads, D, dtype=dtype)


def bias_for(q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(q.shape[4], 2 * q.shape[1] - 1, dtype=dtype, seed=11)


def rotary_for(q: Tensor) -> Tensor:
    angles = draw(q.shape[1], q.shape[5] // 2, seed=13)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def reference(*arguments: Any) -> Tensor:
    """In fp64."""
    return temporal_attention_reference(*(a.double() if isinstance(a, Tensor) else a for a in arguments))


def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
    arguments = arguments_of(temporal_attention, q, k, v, **options)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    kernels.temporal_attention(*arguments, out=out.fill_(NAN))
    return out


def check(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
    out = run(q, k, v, out, **options)
    arguments = arguments_of(temporal_attention, q, k, v, **options)
    assert_no_worse_than_torch(out, temporal_attention_reference(*arguments), reference(*arguments))
    return out


def everything(q: Tensor) -> dict[str, Any]:
    return {"bias": bias_for(q), "rotary": rotary_for(q), "causal": True, "window": q.shape[1] // 2, "scale": 0.3}


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    ("T", "W"), [(1, 67), (2, 37), (5, 13), (16, 5), (17, 3), (64, 1), (80, 1), (100, 1), (129, 1), (200, 1)]
)
def test_lengths(T: int, W: int, dtype: torch.dtype) -> None:
    q, k, v = fused(T, 32, dtype, W=W).unbind(4)
    check(q, k, v)
    check(q, k, v, **everything(q))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("D", "block"), [(8, 32), (32, 32), (40, 64), (64, 64), (80, 128), (96, 128), (128, 128)])
def test_head_sizes_in_whole_vectors(D: int, block: int, dtype: torch.dtype, launches: Launches) -> None:
    for T in (7, 66):
        q, k, v = fused(T, D, dtype, W=2 if T == 66 else 11).unbind(4)
        check(q, k, v)
        check(q, k, v, **everything(q))
    name = NAMES[dtype]
    assert [form for form in launches if form.startswith(f"{name} packed d{block}")] == launches[:2]
    assert [form for form in launches if form.startswith(f"{name} streamed d{block}")] == launches[2:]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("D", [1, 5, 6, 33])
def test_head_sizes_that_are_not(D: int, dtype: torch.dtype, launches: Launches) -> None:
    q, k, v = fused(6, D, dtype, heads=2).unbind(4)
    check(q, k, v)
    check(q, k, v, **(everything(q) | ({} if D % 2 == 0 else {"rotary": None})))
    assert all(" strided " in form for form in launches)


@pytest.mark.parametrize("T", [5, 40, 70])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": 0},
        {"window": 1},
        {"window": 3},
        {"window": 2**40},
        {"causal": True, "window": 2},
        {"scale": 0.0},
        {"scale": -1.5},
    ],
    ids=str,
)
def test_masks_and_scales(T: int, options: dict[str, Any]) -> None:
    q, k, v = fused(T, 16, torch.float32, W=1 if T == 70 else 2, heads=2).unbind(4)
    check(q, k, v, **options)


@pytest.mark.parametrize("T", [5, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=NAMES.get)
def test_bias_of_either_dtype_and_any_strides(T: int, dtype: torch.dtype) -> None:
    q, k, v = fused(T, 16, torch.float16, W=2, heads=2).unbind(4)
    check(q, k, v, bias=bias_for(q, dtype).T.contiguous().T)
    check(q, k, v, rotary=rotary_for(q).transpose(0, 1).contiguous().transpose(0, 1), bias=None)
    check(q, k, v, rotary=torch.cat([draw(1), rotary_for(q).flatten()])[1:].view(T, 8, 2))  # off a vector's boundary


def test_every_pixel_head_and_clip_is_its_own(launches: Launches) -> None:
    """Of clips, rows of pixels apart, and heads, all numbers differ."""
    f = fused(9, 16, torch.float32, B=2, H=3, W=5, heads=2)
    check(*f.unbind(4), bias=bias_for(f[:, :, :, :, 0]))
    check(*f[:, :, :, 1:4].unbind(4), bias=bias_for(f[:, :, :, :, 0]))  # rows do not follow one another
    check(*f[1:, 2:8, 1:2].unbind(4))
    check(*f[:, :, :, 1:2].unbind(4))  # a column
    check(*f[:, ::2, ::2, ::2].unbind(4))
    check(*f.transpose(2, 3).contiguous().transpose(2, 3).unbind(4))
    check(*f.permute(2, 3, 0, 1, 4, 5, 6).contiguous().permute(2, 3, 0, 1, 4, 5, 6).unbind(4))
    check(*(part.expand(2, 9, 3, 5, 2, 16) for part in f[:, :, :1, :1].unbind(4)))
    assert set(launches) == {"fp32 packed d32"}


def test_views_without_dense_vectors(launches: Launches) -> None:
    wide = draw(1, 6, 2, 3, 2, 32)
    q, k, v = wide[..., ::2], wide[..., 1:17], wide.transpose(-1, -2).contiguous().transpose(-1, -2)[..., :16]
    check(q, k, v)
    check(q, q, v, **everything(q))
    f = draw(1, 6, 1, 3, 3, 2, 20, dtype=torch.float16)[..., :16]  # steps of half vectors
    check(*f.unbind(4))
    assert all(" strided" in form for form in launches)


@pytest.mark.parametrize("T", [5, 70])
def test_out_of_any_strides(T: int) -> None:
    H, heads = (2, 2) if T == 5 else (1, 1)
    q, k, v = fused(T, 16, torch.float32, H=H, W=2, heads=heads).unbind(4)
    for out in (
        torch.empty(1, T, H, 2, heads, 32, device=DEVICE)[..., :16],
        torch.empty(1, T, H, 2, heads, 32, device=DEVICE)[..., ::2],
        torch.empty(1, H, 2, T, heads, 16, device=DEVICE).permute(0, 3, 1, 2, 4, 5),
    ):
        check(q, k, v, out)
    rows = torch.full((1, T, H, 3, heads, 16), 5.0, device=DEVICE)
    check(q, k, v, rows[:, :, :, :2])
    assert bool((rows[:, :, :, 2] == 5.0).all())  # nothing is written beside it


@pytest.mark.parametrize("D", [16, 5])
@pytest.mark.parametrize("T", [5, 40, 70])
def test_rows_that_see_nothing_are_zero(T: int, D: int) -> None:
    q, k, v = fused(T, D, torch.float32, W=1 if T == 70 else 3, heads=2).unbind(4)
    bias = bias_for(q)
    bias[0] = -INF
    bias[1, T - 1 :] = -INF  # the last head sees what lies ahead, so its last frame sees nothing
    y = check(q, k, v, bias=bias)
    assert bool((y[..., 0, :] == 0).all()) and bool((y[:, -1, ..., 1, :] == 0).all())
    assert not bool((y[:, 0, ..., 1, :] == 0).any())


@pytest.mark.parametrize("T", [5, 40, 70])
def test_a_bias_that_is_finite_leaves_no_frame_out(T: int) -> None:
    q, k, v = fused(T, 16, torch.float32, W=1 if T == 70 else 3, heads=3).unbind(4)
    bias, least = bias_for(q), torch.finfo(torch.float32).min
    bias[0], bias[1, T - 1 :], bias[2] = least, least, -least  # the last frame of the second head sees nothing else
    y = check(q, k, v, bias=bias)
    assert not bool((y == 0).any())
    check(q, k, v, bias=bias, causal=True)


@pytest.mark.parametrize("D", [16, 5])
@pytest.mark.parametrize("T", [5, 40, 70])
def test_rows_that_see_nothing_are_zero_whatever_values_are(T: int, D: int) -> None:
    q, k, v = fused(T, D, torch.float32, W=1 if T == 70 else 3, heads=2).unbind(4)
    bias = bias_for(q)
    bias[0] = -INF
    v[:, T // 2] = NAN
    y = run(q, k, v, bias=bias)
    assert bool((y[..., 0, :] == 0).all()) and bool(y[..., 1, :].isnan().all())


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("T", [5, 70])
def test_what_is_not_finite_spoils_its_own_pixel_and_head(T: int, name: str, wrong: float) -> None:
    f = fused(T, 16, torch.float32, W=3 if T == 5 else 2, heads=2)
    clean = run(*f.unbind(4))
    f[0, T - 1, 0, 1, "qkv".index(name), 1, 3] = wrong
    y = run(*f.unbind(4))
    own = torch.zeros(y.shape, dtype=torch.bool, device=DEVICE)
    own[0, T - 1 if name == "q" else slice(None), 0, 1, 1] = True
    assert torch.equal(y[~own], clean[~own])
    spoiled = ~reference(*f.unbind(4)).isfinite()
    assert bool((~y.isfinite())[spoiled].all())


def test_a_frame_that_is_left_out_of_a_packed_tile_spoils_nothing() -> None:
    q, k, v = fused(5, 16, torch.float32, W=3).unbind(4)
    clean = run(q, k, v, causal=True)
    v[:, 4] = NAN
    y = run(q, k, v, causal=True)
    assert torch.equal(y[:, :4], clean[:, :4]) and bool(y[:, 4].isnan().all())


def test_the_same_twice() -> None:
    for T in (7, 70):
        q, k, v = fused(T, 32, torch.float16, W=5).unbind(4)
        assert torch.equal(run(q, k, v, **everything(q)), run(q, k, v, **everything(q)))


def test_no_clips(launches: Launches) -> None:
    assert run(*fused(5, 16, torch.float32, B=0).unbind(4)).shape == (0, 5, 1, 3, 1, 16)
    assert not launches


@pytest.mark.parametrize("axis", ["b", "h", "w", "n"])
@pytest.mark.parametrize("T", [3, 70])
def test_more_programs_than_a_second_grid_axis_holds(axis: str, T: int) -> None:
    count, step = 1_400_000, 2**24
    shape = tuple(T if name == "t" else 64 if name == "d" else count if name == axis else 1 for name in "bthwnd")
    strides = (*(step if name == axis else 64 for name in "bthwn"), 1)
    plan = kernels._plan(kernels.Geometry(shape, (strides,) * 4, 2, True), False)
    together = kernels.PACKED[2, False][64].rows // T if axis in "hw" and T == 3 else 1  # pixels, of one head and clip
    assert plan.programs == -(-count // together) > 65535
    assert plan.scalars.count(step) == 4


@pytest.mark.skipif(DEVICE == "cuda", reason="the memory between is only reserved, not touched, on a CPU")
@pytest.mark.parametrize(("axis", "T"), [("b", 5), ("t", 3), ("h", 5), ("w", 5), ("n", 5), ("t", 70), ("w", 70)])
def test_addresses_past_2_31(axis: str, T: int) -> None:
    """A few elements, billions apart in an allocation that is never touched between."""
    sizes = {"b": 1, "t": T, "h": 1, "w": 1, "n": 1, "d": 16}
    sizes[axis] = max(sizes[axis], 2)
    if axis == "h":
        sizes["w"] = 2
    apart = -(-(2**31 + 64) // (sizes[axis] - 1) // 8) * 8
    strides, step = dict.fromkeys("bthwnd", 0), 16
    strides["d"] = 1
    for name in "nwhtb":
        strides[name] = apart if name == axis else step
        step *= 1 if name == axis else sizes[name]
    held = torch.empty(sum((sizes[name] - 1) * strides[name] for name in sizes) + 1, dtype=torch.float16)
    q = held.as_strided(tuple(sizes.values()), tuple(strides.values()))
    q.copy_(draw(*q.shape, dtype=torch.float16))
    expected = check(q.contiguous(), q.contiguous(), q.contiguous())
    assert torch.equal(run(q, q, q), expected)
    run(q.contiguous(), q.contiguous(), q.contiguous(), q)
    assert torch.equal(q, expected)


def test_what_is_declined() -> None:
    q = draw(1, 2, 1, 1, 1, MOST_HEAD_DIM + 1)
    needs = dispatch._OPS["temporal_attention"].backends["triton"].needs
    assert needs.limits is not None
    assert needs.limits(*arguments_of(temporal_attention, q, q, q)) == ["D must be at most 128, got 129"]
    assert not needs.limits(*arguments_of(temporal_attention, *[q[..., :128]] * 3))
    reasons = needs.unmet({"q": q.double(), "k": q.double(), "v": q.double()})
    assert any("float64" in reason for reason in reasons)
