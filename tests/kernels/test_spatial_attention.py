"""The Triton kernels of spatial_attention against the reference: in Triton's interpreter, or compiled on a GPU."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast.ops.spatial_attention import SPEC, spatial_attention_reference
from tests.ops.common import Draw, assert_no_worse_than_torch

pytest.importorskip("triton", reason="the kernels need Triton")
from lumiere_fast.kernels import _configs
from lumiere_fast.kernels import spatial_attention as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # never bfloat16 in the interpreter, which computes it wrongly and says nothing
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TILE = 16  # pixels and keys of a tile, in most tests: the interpreter takes as long for full ones as for few lanes

# Lanes outside divide, and rows without keys subtract infinities, before they are masked off.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for case in _configs.cases(kernels.OP):
            config = {"block_m": TILE, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
            config |= {} if case.endswith("-text") else {"block_n": TILE}
            stack.enter_context(_configs.override(kernels.OP, case, config))
        yield


class Launches(list[str]):
    """Names of the kernels launched so far."""

    def __call__(self, kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        self.append(kernel.__name__)
        LAUNCH(kernel, programs, out, *arguments, **options)


LAUNCH = kernels.launch


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    recorded = Launches()
    monkeypatch.setattr(kernels, "launch", recorded)
    return recorded


class Case:
    """The flat arguments of `spatial_attention`, drawn as views of fused projections; text where L is given."""

    def __init__(
        self,
        frame: Sequence[int],
        D: int,
        L: int | None = None,
        dtype: torch.dtype = HALF,
        *,
        B: int = 1,
        T: int = 1,
        heads: int = 1,
        scale: float | None = None,
    ) -> None:
        self.draw = Draw(7, torch.float32)
        self.q, self.k, self.v = self.draw(B, T, *frame, 3, heads, D).to(DEVICE, dtype).unbind(4)
        if L is not None:
            self.k, self.v = self.draw(B, L, 2, heads, D).to(DEVICE, dtype).unbind(2)
        self.key_mask: Tensor | None = None
        self.scale = scale

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.key_mask, self.scale

    def run(self, out: Tensor | None = None) -> Tensor:
        out = torch.empty(self.q.shape, dtype=self.q.dtype, device=DEVICE) if out is None else out
        kernels.spatial_attention(*self.arguments, out=out.fill_(float("nan")))
        return out

    def check(self, out: Tensor | None = None) -> Tensor:
        ours = self.run(out)
        exact = spatial_attention_reference(*(each.double() for each in self.arguments[:3]), *self.arguments[3:])
        assert_no_worse_than_torch(ours, spatial_attention_reference(*self.arguments), exact)
        return ours


PIXELS = [(1, 1), (3, 5), (4, 4), (1, 17), (7, 5), (31, 1)]  # one, a tile and one more or less, primes


@pytest.mark.parametrize("frame", PIXELS, ids=str)
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_frames(dtype: torch.dtype, frame: tuple[int, int], launches: Launches) -> None:
    """Several clips, frames and heads, none of which sees another."""
    Case(frame, 16, dtype=dtype, B=2, T=2, heads=2).check()
    assert launches == ["_flash_kernel" if dtype == HALF else "_plain_kernel"]


@pytest.mark.parametrize("D", [5, 8, 32, 40, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_channels(dtype: torch.dtype, D: int, launches: Launches) -> None:
    """Those of a head in whole vectors, one block or two of them filled or not; others one by one."""
    Case((3, 7), D, dtype=dtype).check()
    Case((3, 7), D, 20, dtype).check()
    vectors = dtype == HALF and D % 8 == 0
    assert launches == (["_flash_kernel", "_text_kernel"] if vectors else ["_plain_kernel"] * 2)


@pytest.mark.parametrize("D", [136, 200])
def test_wide_heads_take_the_plain_kernel(D: int, launches: Launches) -> None:
    Case((3, 3), D).check()
    assert launches == ["_plain_kernel"]


@pytest.mark.parametrize("L", [1, 2, 16, 77, 128, 200])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_text(dtype: torch.dtype, L: int, launches: Launches) -> None:
    """Of one tile, whose pixels run through the frames of a clip, and of more."""
    Case((3, 3), 16, L, dtype, B=2, T=2, heads=2).check()
    expected = "_plain_kernel" if dtype != HALF else "_text_kernel" if L <= 128 else "_flash_kernel"
    assert launches == [expected]


MASKS = {
    "prefix": lambda L: torch.arange(L) < L // 3,
    "prefix of whole tiles": lambda L: torch.arange(L) < TILE,
    "random": lambda L: torch.rand(L, generator=torch.Generator().manual_seed(1)) < 0.3,
    "last": lambda L: torch.arange(L) == L - 1,
    "all": lambda L: torch.ones(L, dtype=torch.bool),
    "none": lambda L: torch.zeros(L, dtype=torch.bool),
}


@pytest.mark.parametrize("L", [33, 150])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, dtype: torch.dtype, L: int) -> None:
    """Each clip has its own; what is left out may be anything, and where nothing is left the result is 0."""
    case = Case((3, 3), 16, L, dtype, B=2)
    case.key_mask = torch.stack([MASKS[name](L), MASKS["all"](L)]).to(DEVICE)
    y = case.check()
    if name == "none":
        assert (y[0] == 0).all() and y[1].any()
    for each in (case.k, case.v):
        each[~case.key_mask] = float("nan")
    assert torch.equal(case.run(), y)


def test_a_mask_of_any_strides() -> None:
    for L in (33, 150):
        case = Case((3, 3), 16, L, B=3)
        case.key_mask = (torch.rand(L, 6, generator=torch.Generator().manual_seed(2)) < 0.5).to(DEVICE).t()[::2]
        case.check()
        case.key_mask = case.key_mask[:1].expand(3, L)
        case.check()


class Count:
    """How often a function of the kernels is called, in the interpreter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.calls, self.counted = 0, getattr(kernels, name)
        monkeypatch.setattr(kernels, name, self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.counted(*arguments)


in_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels call nothing")


@in_interpreter
def test_tiles_after_the_last_key_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((3, 3), 16, 300)
    case.key_mask = (torch.arange(300) < 40)[None].to(DEVICE)
    tiles = Count(monkeypatch, "_attend")
    case.check()
    assert tiles.calls == 3


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("L", [None, 20, 150])
def test_large_scores(L: int | None, dtype: torch.dtype) -> None:
    """Of ten thousand and more: one weight takes all, and nothing overflows."""
    case = Case((5, 5), 64, L, dtype, scale=400.0)
    assert case.check().isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.7, 0.3])
@pytest.mark.parametrize("L", [None, 20, 150])
def test_scales(L: int | None, scale: float, launches: Launches) -> None:
    Case((5, 5), 16, L, scale=scale).check()
    assert (launches == ["_plain_kernel"]) == (scale <= 0)


@pytest.mark.parametrize("L", [None, 20, 150])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_rows(value: float, L: int | None) -> None:
    case = Case((5, 5), 16, L, T=2)
    y = case.run()
    case.q[0, 1, 2, 3, 0, 0] = value
    z = case.run()
    assert z[0, 1, 2, 3].isnan().all()
    z[0, 1, 2, 3] = y[0, 1, 2, 3]
    assert torch.equal(z, y)
    if L is None:
        case.v[0, 0, 1, 1, 0, 0] = value
        z = case.run()
        assert not z[0, 0, ..., 0].isfinite().any() and torch.equal(z[..., 1:][:, :1], y[..., 1:][:, :1])


VIEWS = {
    "of the frames": lambda x: x[:, 1:],
    "of every other frame": lambda x: x[:, ::2],
    "of rows": lambda x: x[:, :, 1:3],
    "of columns": lambda x: x[:, :, :, 1:4],
    "of every other column": lambda x: x[:, :, :, ::2],
    "of one column": lambda x: x[:, :, :, :1],
    "of a head": lambda x: x[..., 1:, :],
    "of channels": lambda x: x[..., 8:],
    "of channels askew": lambda x: x[..., 3:11],
    "of every other channel": lambda x: x[..., ::2],
    "one frame for all": lambda x: x[:, :1].expand(-1, 3, -1, -1, -1, -1),
    "turned": lambda x: x.transpose(2, 3),
    "channels first": lambda x: x.permute(0, 1, 5, 4, 2, 3).contiguous().permute(0, 1, 4, 5, 3, 2),
}
PLAIN_VIEWS = {"of columns", "of channels askew", "of every other channel", "turned", "channels first"}


@pytest.mark.parametrize("name", VIEWS)
def test_strided_views(name: str, launches: Launches) -> None:
    """Whole vectors and frames without gaps are read as they lie, everything else element by element."""
    view = VIEWS[name]
    case = Case((4, 6), 16, T=3, heads=2)
    case.q, case.k, case.v = view(case.q), view(case.k), view(case.v)
    case.check()
    text = Case((4, 6), 16, 20, T=3, heads=2)
    text.q = view(text.q)
    if name == "of a head":
        text.k, text.v = text.k[..., :1, :], text.v[..., 1:, :]
    elif "channel" in name and name != "channels first":
        text.k, text.v = view(text.k), view(text.v)
    text.check()
    plain = ["_plain_kernel"] * 2
    assert launches == (plain if name in PLAIN_VIEWS else ["_flash_kernel", "_text_kernel"])


EXPANDED = {
    "over columns": ((4, 6), lambda x: x[:, :, :, :1].expand_as(x)),
    "over rows": ((4, 6), lambda x: x[:, :, :1].expand_as(x)),
    "over pixels": ((4, 6), lambda x: x[:, :, :1, :1].expand_as(x)),
    "over the columns of one row": ((1, 6), lambda x: x[:, :, :, :1].expand_as(x)),
    "over the rows of one column": ((6, 1), lambda x: x[:, :, :1].expand_as(x)),
    "over frames": ((4, 6), lambda x: x[:, :1].expand_as(x)),
    "over frames of one pixel": ((1, 1), lambda x: x[:, :1].expand_as(x)),
    "over all": ((4, 6), lambda x: x[:, :1, :1, :1].expand_as(x)),
}


@pytest.mark.parametrize("names", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("name", EXPANDED)
def test_expanded_views(name: str, names: str, launches: Launches) -> None:
    """A stride of 0 is a step as any other where an axis has more than one element."""
    frame, view = EXPANDED[name]
    case = Case(frame, 16, T=3, heads=2)
    for each in names:
        setattr(case, each, view(getattr(case, each)))
    case.check()
    assert launches == ["_plain_kernel" if name in {"over columns", "over rows"} else "_flash_kernel"]


@pytest.mark.parametrize("L", [20, 150])
@pytest.mark.parametrize("name", EXPANDED)
def test_expanded_views_before_text(name: str, L: int) -> None:
    frame, view = EXPANDED[name]
    case = Case(frame, 16, L, T=3, heads=2)
    case.q = view(case.q)
    case.check()


@pytest.mark.parametrize("names", ["k", "v", "kv"])
@pytest.mark.parametrize("L", [20, 150])
def test_expanded_text(L: int, names: str) -> None:
    """Over its keys, and one text for all clips."""
    for kept in ((slice(None), slice(1)), (slice(1), slice(None))):
        case = Case((4, 6), 16, L, B=2, T=3, heads=2)
        for each in names:
            text = getattr(case, each)
            setattr(case, each, text[kept].expand_as(text))
        case.check()


@pytest.mark.parametrize("name", sorted(VIEWS.keys() - {"one frame for all"}))  # a result does not overlap itself
def test_out_of_any_strides(name: str) -> None:
    """And nothing beside it is touched."""
    for L in (None, 20):
        held = torch.full((1, 3, 4, 6, 2, 16), -7.0, dtype=HALF, device=DEVICE)
        out = VIEWS[name](held)
        case = Case(out.shape[2:4], out.shape[5], L, T=out.shape[1], heads=out.shape[4])
        assert case.check(out) is out
        if name != "channels first":
            out.fill_(-7.0)
            assert (held == -7.0).all()


@pytest.mark.parametrize(("D", "L"), [(40, None), (80, 77), (96, 200), (128, None)])
def test_tiles_that_ship(D: int, L: int | None) -> None:
    """One more pixel than two of them have."""
    case = Case((1, 257), D, L)
    name = kernels.case_of(D, 1, 257, L)
    with _configs.override(kernels.OP, name, _configs._defaults()[kernels.OP][name]):
        case.check()


def test_nothing_to_do(launches: Launches) -> None:
    for L in (None, 5):
        assert Case((3, 3), 16, L, B=0).run().shape == (0, 1, 3, 3, 1, 16)
    assert launches == []


def test_results_are_the_same_from_run_to_run() -> None:
    for L in (None, 20, 150):
        case = Case((5, 5), 40, L, heads=2)
        assert torch.equal(case.run(), case.run())


@pytest.mark.parametrize("D", [5, 16])
@pytest.mark.parametrize("L", [None, 20, 150])
def test_elements_past_2_to_the_31(L: int | None, D: int) -> None:
    """Pixels, keys and results that lie 2^30 elements apart in storage that is never touched between them.

    In the interpreter, which takes tiles of any size, keys are in tiles of one.
    """
    one = {"block_m": TILE, "num_warps": 4, "num_stages": 1, "maxnreg": 255, "block_n": TILE if DEVICE == "cuda" else 1}
    apart = 2**30
    storage = torch.empty(2 * apart + 2**14, dtype=HALF, device=DEVICE)
    case = Case((1, 3), D, L)

    def far(near: Tensor, place: int) -> Tensor:
        begin, step = place * 2**12, apart if near.dim() == 6 else 16
        return storage.as_strided(near.shape, (0, *([0] * (near.dim() - 4)), step, 0, 1), begin)

    with _configs.override(kernels.OP, "d32-few", one):
        y = case.run()
        case.q = far(case.q, 0).copy_(case.q)
        case.k, case.v = far(case.k, 1).copy_(case.k), far(case.v, 2).copy_(case.v)
        assert torch.equal(case.run(far(y, 3)), y)


@in_interpreter
def test_walks_over_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where programs are many: each walks as far as it may, and the last one not so far."""
    monkeypatch.setattr(kernels, "WALKS", 1)
    monkeypatch.setattr(kernels, "LONGEST_WALK", 3)
    monkeypatch.setattr(kernels, "_cached_plan", kernels._plan)
    tiles = Count(monkeypatch, "_scores")
    Case((4, 7), 16, 20, B=2, T=5, heads=2).check()
    assert tiles.calls == 2 * 2 * 9


def test_launches_are_forms_that_ship(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the gate compiles ahead of time is what launches ask for, at every scenario and class of heads."""
    shipped = {
        (each.kernel, NAMES_OF[each.signature["q"]], tuple(each.constexprs.items()), each.num_warps, each.num_stages)
        for each in kernels.VARIANTS
    }
    found = set()

    def record(kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        options.pop("maxnreg", None)
        form = (kernel.__name__, out.dtype, tuple(options.items()), warps, stages)
        assert form in shipped, form
        assert len(arguments) == len(kernels.TENSORS) + len(kernels.SCALARS)
        found.add(form)

    monkeypatch.setattr(kernels, "launch", record)
    monkeypatch.setattr(kernels, "chosen", lambda op, case, device: _configs._defaults()[op][case])
    for hopper in (False, True):
        monkeypatch.setattr(kernels, "_hopper", lambda device, answer=hopper: answer)
        for dtype in NAMES:
            for D, frames, L in product((5, 32, 40, 64, 80, 96, 128), (1, 99), (None, 77)):
                q, k, v, out = torch.empty((4, 1, frames, 4, 80, 1, D), dtype=dtype, device=DEVICE)
                k, v = (k, v) if L is None else (k[0, 0, 0, :L][None], v[0, 0, 0, :L][None])
                for scale in (1.0, -1.0):
                    kernels.spatial_attention(q, k, v, None, scale, out=out)
    assert found == shipped


def test_a_plan_is_found_again_by_all_that_decides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that differ in one thing are launched as if no other was before, also under another configuration."""
    monkeypatch.setattr(kernels, "_cached_case", functools.lru_cache(kernels._fast_case))
    monkeypatch.setattr(kernels, "_cached_plan", functools.lru_cache(kernels._plan))
    found: list[Any] = []

    def record(kernel: Any, programs: int, out: Tensor, *arguments: Any, **options: Any) -> None:
        found.append((kernel.__name__, programs, arguments[len(kernels.TENSORS) :], options))

    monkeypatch.setattr(kernels, "launch", record)

    def calls() -> Iterator[Case]:
        for L in (None, 20, 150):
            yield Case((4, 6), 16, L, T=2)
            yield Case((6, 4), 16, L, T=2)
            yield Case((4, 6), 16, L, torch.float32, T=2)
            yield Case((4, 6), 16, L, T=2, scale=0.3)
            yield Case((4, 6), 16, L, T=2, scale=-0.3)
            case = Case((4, 6), 24, L, T=2)
            yield case
            case.q = case.q[..., 8:]
            case.k, case.v = case.k[..., 8:], case.v[..., 8:]
            yield case
            case.k = torch.empty(case.k.numel() + 1, dtype=HALF, device=DEVICE)[1:].view(case.k.shape)
            yield case
            case.k = case.k.clone()
            yield case
            if L is not None:
                case.key_mask = torch.ones(1, L, dtype=torch.bool, device=DEVICE)
                yield case

    def run() -> list[Any]:
        found.clear()
        for case in calls():
            case.run()
        return found.copy()

    def run_all() -> list[Any]:
        results = run()
        with contextlib.ExitStack() as stack:
            for case in _configs.cases(kernels.OP):
                stack.enter_context(_configs.override(kernels.OP, case, _configs._defaults()[kernels.OP][case]))
            results += run()
            monkeypatch.setattr(kernels, "_hopper", lambda device: False)
            results += run()
            monkeypatch.setattr(kernels, "_hopper", HOPPER)
        return results

    cached = run_all()
    misses = kernels._cached_plan.cache_info().misses
    assert run_all() == cached and kernels._cached_plan.cache_info().misses == misses
    monkeypatch.setattr(kernels, "_cached_case", kernels._fast_case)
    monkeypatch.setattr(kernels, "_cached_plan", kernels._plan)
    assert run_all() == cached


HOPPER = kernels._hopper
NAMES_OF = {f"*{name}": dtype for dtype, name in NAMES.items()}


@pytest.mark.parametrize("scenario", [s for s in SPEC.scenarios if s.cpu], ids=lambda scenario: scenario.name)
def test_the_spec_takes_the_fast_kernels(scenario: Any, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LAUNCH", lambda *arguments, **options: None)
    inputs = SPEC.make_inputs(scenario, DEVICE, HALF, torch.Generator().manual_seed(0))
    named = {"key_mask": None, "scale": None, **inputs}
    kernels.spatial_attention(**named, out=torch.empty(named["q"].shape, dtype=HALF))
    assert launches == ["_text_kernel" if scenario.options["text"] else "_flash_kernel"]


def test_candidates_are_configurations() -> None:
    assert set(kernels.CANDIDATES) == set(_configs.cases(kernels.OP))
    for case, found in kernels.CANDIDATES.items():
        assert found
        for config in found:
            with _configs.override(kernels.OP, case, config):
                assert math.prod(config.values()) > 0
