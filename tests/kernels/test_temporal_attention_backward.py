"""The backward of temporal_attention against autograd of the reference in fp64: in Triton's interpreter, or a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast.ops._selfcheck import FLOORS, relative_error
from lumiere_fast.ops.temporal_attention import temporal_attention_reference
from tests.ops.common import Draw

pytest.importorskip("triton", reason="the kernels need Triton")
from lumiere_fast.kernels import temporal_attention_backward as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Never bfloat16 in the interpreter, which computes it wrongly and says nothing.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ARGUMENTS = ("q", "k", "v", "bias")
FACTOR = 3.0  # of torch's own error that a gradient may have
# What torch's autograd of the reference keeps in fp32 and products round to the dtype of q: P, g_S, turned q and k.
ROUNDINGS = {torch.float32: 1, torch.float16: 4, torch.bfloat16: 4}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched so far, each in a form that the gate compiles ahead of time."""
    launch, names = kernels.launch, []

    def recorded(kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        tensors = tuple(x if x is None else NAMES[x.dtype] for x in arguments if x is None or isinstance(x, Tensor))
        assert (kernel.__name__, tensors, tuple(sorted(options.items()))) in SHIPPED
        assert all(x.data_ptr() % kernels.VECTOR_BYTES == 0 for x in arguments if isinstance(x, Tensor))
        names.append(kernel.__name__)
        launch(kernel, programs, out, *arguments, **options)

    monkeypatch.setattr(kernels, "launch", recorded)
    return names


def _tensors(variant: Any) -> tuple[str | None, ...]:
    """The element types of its tensors, None for those it goes without."""
    return tuple(
        None if kind == "constexpr" else kind.removeprefix("*")
        for name, kind in variant.signature.items()
        if kind.startswith("*") or variant.constexprs.get(name, 0) is None
    )


SHIPPED = {
    (
        variant.kernel,
        _tensors(variant),
        tuple(
            sorted(
                {
                    **{name: value for name, value in variant.constexprs.items() if name.isupper()},
                    **{"num_warps": variant.num_warps, "num_stages": variant.num_stages},
                }.items()
            )
        ),
    )
    for variant in kernels.VARIANTS
}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory begins as NaN, and torch refuses what differs from run to run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw_arguments(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    rotary: bool = False,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> list[Any]:
    """Those of the reference: views of a fused projection; q, k, v and bias want gradients."""
    B, T, H, W, heads, D = shape
    draw = Draw(sum(shape))
    fused = draw(B, T, H, W, 3, heads, D).to(DEVICE, dtype)
    values: list[Any] = [each.detach().requires_grad_() for each in fused.unbind(4)]
    values.append(draw(heads, 2 * T - 1).to(DEVICE, dtype).requires_grad_() if bias else None)
    angle = draw(T, D // 2)
    turns = torch.stack((angle.cos(), angle.sin()), -1).to(DEVICE, torch.float32)
    return [*values, turns if rotary else None, causal, window, scale]


def draw_gradient(arguments: Sequence[Any]) -> Tensor:
    return Draw(5)(*arguments[0].shape).to(arguments[0])


def autograd(g_y: Tensor, arguments: Sequence[Any], double: bool) -> list[Tensor | None]:
    """torch's own gradients of the reference."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value.double() if double else value).detach().requires_grad_(value.requires_grad)

    leaves = [leaf(value) for value in arguments]
    with torch.enable_grad():
        y = temporal_attention_reference(*leaves)
    y.backward(g_y.to(y))
    return [value.grad if isinstance(value, Tensor) else None for value in leaves[:4]]


def backward(g_y: Tensor, arguments: Sequence[Any]) -> tuple[Tensor | None, ...]:
    *ours, rotary, causal, window, scale = kernels.temporal_attention_backward((g_y,), *arguments)
    assert (rotary, causal, window, scale) == (None,) * 4
    return tuple(ours)


def check(arguments: Sequence[Any], g_y: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Every gradient that is wanted, and none else, is as near to the exact one as torch's own, in the dtype of q."""
    g_y = draw_gradient(arguments) if g_y is None else g_y
    ours = backward(g_y, arguments)
    theirs, exact = autograd(g_y, arguments, double=False), autograd(g_y, arguments, double=True)
    dtype = arguments[0].dtype
    for name, value, mine, other, truth in zip(ARGUMENTS, arguments[:4], ours, theirs, exact, strict=True):
        if value is None or not value.requires_grad:
            assert mine is None, name
            continue
        assert mine is not None and other is not None and truth is not None, name
        assert (mine.shape, mine.dtype, mine.is_contiguous()) == (value.shape, value.dtype, True), name
        if not truth.any():  # of one frame
            assert not mine.any(), name
            continue
        error, torchs = (relative_error(found.to(dtype), truth) for found in (mine, other))
        bound = FACTOR * torchs + ROUNDINGS[dtype] * FLOORS[dtype]
        assert error <= bound, f"{name} is off by {error:.1e}, {bound:.1e} is allowed"
    return ours


@pytest.mark.parametrize(
    ("T", "D", "pixels"),
    [
        (1, 32, 67),
        (2, 8, 33),
        (5, 40, 13),
        (16, 64, 7),
        (17, 96, 5),
        (33, 24, 2),
        (64, 32, 2),
        (80, 40, 1),
        (100, 128, 1),
    ],
)
def test_frames_and_head_sizes(T: int, D: int, pixels: int) -> None:
    """Tiles that are full, that one pixel fills, that the last is cut short of, and frames in several."""
    for dtype in DTYPES:
        if dtype != torch.float32:
            check(draw_arguments((1, T, 1, pixels, 2, D), dtype, rotary=D == 40))
        elif T <= 33:  # whose tiles are a quarter as large, and of one pixel
            check(draw_arguments((1, T, 1, min(pixels, 2), 2, D), dtype, rotary=D == 40))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"rotary": True},
        {"causal": True},
        {"window": 0},
        {"window": 2, "scale": 0.3},
        {"causal": True, "window": 3, "rotary": True, "scale": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("T", [6, 70])
def test_options(T: int, options: dict[str, Any]) -> None:
    for dtype in DTYPES if T == 6 else DTYPES[1:]:
        check(draw_arguments((2, T, 2, 3 if T == 6 else 1, 1, 16), dtype, **options))


def test_three_tiles_of_frames() -> None:
    check(draw_arguments((1, 130, 1, 2, 1, 32), torch.float16, window=70, rotary=True))


@pytest.mark.parametrize("T", [3, 70])
def test_rows_that_see_nothing_have_no_gradient(T: int) -> None:
    arguments = draw_arguments((1, T, 1, 2, 2, 16), torch.float16, causal=True)
    with torch.no_grad():
        arguments[3][0] = float("-inf")
    ours = check(arguments)
    assert all(each is not None and each.isfinite().all() for each in ours)
    assert all(not each[..., 0, :].any() for each in ours[:3] if each is not None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v", "g_y"])
def test_a_pixel_is_spoilt_by_none_but_its_own_numbers(which: str, bad: float) -> None:
    arguments = draw_arguments((1, 3, 1, 23, 1, 8), torch.float16, rotary=True)
    g_y = draw_gradient(arguments)
    clean = backward(g_y, arguments)
    with torch.no_grad():
        dict(zip(("q", "k", "v", "g_y"), (*arguments[:3], g_y), strict=True))[which][0, 1, 0, 4, 0, 2] = bad
    *found, g_bias = backward(g_y, arguments)
    for mine, before in zip(found, clean, strict=False):
        assert mine is not None and before is not None
        assert mine[:, :, :, 4].isnan().all()
        others = [pixel for pixel in range(23) if pixel != 4]
        assert torch.equal(mine[:, :, :, others], before[:, :, :, others])
    assert g_bias is not None and g_bias.isnan().any()


STRIDED = {
    "each its own layout": lambda x: x.permute(0, 4, 1, 2, 3, 5).contiguous().permute(0, 2, 3, 4, 1, 5),
    "rows apart": lambda x: torch.cat((x, x), 2)[:, :, ::2],
    "D not dense": lambda x: x.transpose(4, 5).contiguous().transpose(4, 5),
    "begins off a vector": lambda x: torch.cat((x[..., :1], x), -1)[..., 1:],
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides(name: str) -> None:
    arguments = draw_arguments((2, 3, 2, 2, 2, 8), torch.float16, rotary=True)
    g_y = draw_gradient(arguments)
    for at in range(3):
        strided = [*arguments]
        strided[at] = STRIDED[name](arguments[at].detach()).requires_grad_()
        if name == "rows apart":
            strided = [x.detach() if isinstance(x, Tensor) else x for x in strided]
            strided[at] = torch.stack((arguments[at].detach(),) * 2, 3).flatten(2, 3)[:, :, ::2].requires_grad_()
        check(strided, g_y)
    check(
        arguments, STRIDED[name](g_y) if name != "rows apart" else torch.stack((g_y, g_y), 3).flatten(2, 3)[:, :, ::2]
    )


@pytest.mark.parametrize(
    ("T", "D", "dtype"),
    [
        (3, 5, torch.float32),
        (18, 6, torch.float32),
        (3, 1, torch.float16),
        (3, 10, torch.float16),
        (66, 5, torch.float16),
    ],
)
def test_head_sizes_that_vectors_do_not_divide(T: int, D: int, dtype: torch.dtype) -> None:
    check(draw_arguments((1, T, 1, 1 if T == 66 else 3, 2, D), dtype, rotary=D % 2 == 0))


@pytest.mark.parametrize("T", [3, 70])
def test_angles_that_lie_anyhow(T: int) -> None:
    """Off the boundary of a vector, or pairs of channels first."""
    *arguments, rotary, causal, window, scale = draw_arguments((1, T, 1, 2, 1, 8), torch.float16, rotary=True)
    off = torch.cat((rotary.flatten()[:1], rotary.flatten()))[1:].view(rotary.shape)
    for angles in (off, rotary.transpose(0, 1).contiguous().transpose(0, 1)):
        check([*arguments, angles, causal, window, scale])


def test_gradient_of_a_sum() -> None:
    """Which autograd expands from one number."""
    arguments = draw_arguments((1, 4, 2, 3, 1, 8))
    one = torch.ones((), device=DEVICE).expand(arguments[0].shape)
    ours = backward(one, arguments)
    for mine, truth in zip(ours, autograd(one, arguments, double=True), strict=True):
        torch.testing.assert_close(mine, truth, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [4, 66])
@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "qv", "none"])
def test_no_more_is_computed_than_wanted(T: int, wanted: str, launches: list[str]) -> None:
    arguments = draw_arguments((1, T, 1, 2, 1, 8), torch.float16)
    for name, value in zip(ARGUMENTS, arguments, strict=False):
        value.requires_grad_(name == wanted or (len(wanted) == 2 and name in wanted))
    if wanted == "none":
        assert backward(draw_gradient(arguments), arguments) == (None,) * 4 and not launches
        return
    check(arguments)
    assert ("_lag_kernel" in launches) == (wanted == "bias")
    assert ("_key_kernel" in launches) == (T == 66 and wanted in ("k", "v", "qv"))


def test_nothing_there() -> None:
    arguments = draw_arguments((0, 3, 2, 2, 2, 8))
    ours = backward(draw_gradient(arguments), arguments)
    for value, mine in zip(arguments, ours, strict=False):
        assert mine is not None and mine.shape == value.shape and not mine.any()


@pytest.mark.parametrize("T", [5, 70])
def test_the_same_bits_in_every_run(T: int) -> None:
    arguments = draw_arguments((1, T, 1, 40 if T == 5 else 2, 2, 16), torch.float16)
    g_y = draw_gradient(arguments)
    for first, second in zip(backward(g_y, arguments), backward(g_y, arguments), strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


@pytest.mark.parametrize("room", [0, 40 << 10, 1 << 30])
def test_partials_are_as_many_as_fit(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one for all tiles of a head to one for each; and never more room than a result takes."""
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", room)
    arguments = draw_arguments((1, 16, 1, 12, 1, 128), torch.float16)
    taken = []
    monkeypatch.setattr(
        kernels, "_along_lags", lambda partials, T, bias: taken.append(partials) or ALONG(partials, T, bias)
    )
    check(arguments)
    (partials,) = taken
    assert partials.shape[0] == {0: 1, 40 << 10: 2, 1 << 30: 3}[room]
    assert partials.shape[0] == 1 or partials.nbytes <= arguments[0].nbytes


ALONG = kernels._along_lags


@pytest.mark.parametrize("T", [3, 66])
def test_elements_past_2_to_the_31(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels that lie 2^31 elements apart in storage that is never touched between them."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    arguments = draw_arguments((1, T, 1, 2, 1, 8), torch.float16)
    g_y = draw_gradient(arguments)
    wanted = backward(g_y, arguments)
    tensors = [x.detach() for x in (*arguments[:3], g_y)]
    storage = torch.empty(2**31 + 4 * T * 8, dtype=torch.float16, device=DEVICE)
    far = [storage[at * T * 8 :].as_strided(g_y.shape, (0, 8, 0, 2**31, 0, 1)) for at in range(4)]
    for there, here in zip(far, tensors, strict=True):
        there.copy_(here)
    *qkv, gradient = far
    found = backward(gradient, [*(x.requires_grad_() for x in qkv), *arguments[3:]])
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("where", ["scores", "weights"])
def test_what_overflows_in_one_pixel_of_a_tile_spoils_no_other(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of finite numbers, its own or with those of its neighbours."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    if dtype == torch.float32:  # fp32, whose range bfloat16 has, in the interpreter: it runs the packed form of either
        geometry = kernels._geometry
        monkeypatch.setattr(kernels, "_geometry", lambda *given: geometry(*given)._replace(itemsize=2))
        monkeypatch.setattr(kernels, "launch", LAUNCH)
    arguments = draw_arguments((1, 3, 1, 23, 1, 8), dtype)
    g_y = draw_gradient(arguments)
    clean = backward(g_y, arguments)
    with torch.no_grad():
        if where == "scores":
            arguments[0][:, :, :, 4], arguments[1][:, :, :, 4] = 1e30, 1e30
        else:
            g_y[:, :, :, 4], arguments[2][:, :, :, 7] = 1e30, 1e30
    for mine, before in zip(backward(g_y, arguments)[:3], clean, strict=False):
        assert mine is not None and before is not None
        others = [pixel for pixel in range(23) if pixel not in (4, 7)]
        assert torch.equal(mine[:, :, :, others], before[:, :, :, others])
        assert mine[:, :, :, 7].isfinite().all()
        assert where == "scores" or mine[:, :, :, 4].isfinite().all()


LAUNCH = kernels.launch


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("options", [{"causal": True}, {"window": 3}], ids=str)
def test_what_overflows_with_frames_that_are_left_out(options: dict[str, Any]) -> None:
    arguments = draw_arguments((1, 18, 1, 1, 1, 8), **options)
    g_y = draw_gradient(arguments)
    with torch.no_grad():
        g_y[:, 0], arguments[2][:, 8], arguments[2][:, 17] = 1e20, 1e20, 1e20
    for mine, truth in zip(backward(g_y, arguments), autograd(g_y, arguments, double=True), strict=True):
        assert mine is not None and truth is not None and mine.isfinite().all()
        assert relative_error(mine, truth) < 1e-5
    with torch.no_grad():  # the first frame's own score is infinite: it spoils what it sees
        arguments[0][:, 0], arguments[1][:, 0] = 1e20, 1e20
    for mine in backward(g_y, arguments)[:3]:
        seen = 1 if options.get("causal") else 4
        assert mine is not None and mine[:, seen:].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("T", [5, 40])
def test_a_bias_that_is_finite_leaves_no_frame_out(T: int) -> None:
    arguments = draw_arguments((1, T, 1, 1, 2, 8))
    g_y = draw_gradient(arguments)
    least = torch.finfo(torch.float32).min
    bias = arguments[3].detach().float()
    bias[0, T:], bias[1, : T - 1] = least, least  # beside a frame that is seen, as masks are made
    arguments[3] = bias.requires_grad_()
    check(arguments, g_y)
