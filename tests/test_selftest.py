"""The self-check finds what is wrong with a kernel, and only that."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import dispatch, native, ops, selftest
from lumiere_fast.dispatch import Backend
from lumiere_fast.ops import _selfcheck
from lumiere_fast.ops.blend_windows import blend_windows_backward, blend_windows_reference

Kernel = Callable[..., None]


def right(*arguments: Any, out: Tensor) -> None:
    out.copy_(blend_windows_reference(*arguments))


def off(*arguments: Any, out: Tensor) -> None:
    right(*arguments, out=out)
    out[..., -1, -1] *= 1.05


def off_by_a_rounding(*arguments: Any, out: Tensor) -> None:
    right(*arguments, out=out)
    out *= 1 + torch.finfo(out.dtype).eps


def unwritten(*arguments: Any, out: Tensor) -> None:
    written = torch.empty_like(out)
    right(*arguments, out=written)
    out[:, :, :-1].copy_(written[:, :, :-1])


def wrong_in_half(*arguments: Any, out: Tensor) -> None:
    (off if out.dtype == torch.float16 else right)(*arguments, out=out)


def crashes(*arguments: Any, out: Tensor) -> None:
    raise RuntimeError("out of\nresources")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], None]:
    """Put a function in the place of the CPU's kernel of blend_windows."""

    def put(kernel: Kernel) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(native, "why_not", lambda half: [])
        monkeypatch.setattr(Backend, "load", lambda self: kernel)

    return put


def outcome() -> selftest.Check:
    (found,) = (each for each in selftest.run("cpu", ["blend_windows"]) if each.backend == "cpu")
    return found


@pytest.mark.parametrize("kernel", [right, off_by_a_rounding])
def test_a_right_kernel_passes(kernel: Kernel, use: Callable[[Kernel], None]) -> None:
    use(kernel)
    assert (outcome().status, outcome().detail) == ("passed", "")


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (off, "demo in torch.float32, channels last: result 0 is off by "),
        (unwritten, "result 0 is off by nan"),
        (wrong_in_half, "demo in torch.float16, contiguous: result 0 is off by "),
        (crashes, "RuntimeError: out of resources"),
    ],
)
def test_a_wrong_kernel_fails_and_it_is_told_where(kernel: Kernel, told: str, use: Callable[[Kernel], None]) -> None:
    use(kernel)
    assert outcome().status == "failed" and told in outcome().detail
    assert ("float32" in outcome().detail) == (kernel is not wrong_in_half)


Backward = Callable[..., Any]


def with_backward(change: Callable[[list[Tensor]], Any]) -> Backward:
    """That of blend_windows, with what it found for the windows changed."""

    def backward(*arguments: Any) -> tuple[Any, ...]:
        found, *others = blend_windows_backward(*arguments)
        return (change(found), *others)

    return backward


def fails(found: list[Tensor]) -> None:
    raise AttributeError("'int' object has no attribute 'to'")


WRONG_GRADIENTS: dict[str, Callable[[list[Tensor]], Any]] = {
    "that of windows is off by 5": lambda found: [*found[:-1], found[-1] * 1.05],
    "that of windows is off by nan": lambda found: [*found[:-1], torch.full_like(found[-1], float("nan"))],
    "windows has none": lambda found: [*found[:-1], None],
    "windows has one of shape (1,)": lambda found: [*found[:-1], torch.ones(1)],
    "AttributeError: 'int' object has no attribute 'to'": fails,
    "ValueError: ": lambda found: found[:-1],
}


@pytest.mark.parametrize("told", WRONG_GRADIENTS)
def test_a_wrong_gradient_fails_and_it_is_told_where(
    told: str, use: Callable[[Kernel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(right)
    monkeypatch.setattr(Backend, "load_backward", lambda self: with_backward(WRONG_GRADIENTS[told]))
    found = outcome()
    assert found.status == "failed" and "result 0" not in found.detail
    for dtype in ("float32", "bfloat16"):
        assert re.search(rf"gradient at \w+ in torch\.{dtype}: {re.escape(told)}", found.detail)


@pytest.mark.parametrize("backward", [with_backward(lambda found: found), None])
def test_a_right_gradient_passes_and_so_does_torch_s(
    backward: Backward | None, use: Callable[[Kernel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(right)
    monkeypatch.setattr(Backend, "load_backward", lambda self: backward)
    with torch.inference_mode():
        assert (outcome().status, outcome().detail) == ("passed", "")


def test_large_calls_are_checked_on_a_gpu_alone() -> None:
    spec = _selfcheck.spec_of(ops.temporal_conv)
    large = _selfcheck._checks(spec, torch.device("cuda"))[len(spec.checks) :]
    assert _selfcheck._checks(spec, torch.device("cpu")) == spec.checks
    assert {(each.sizes["k"], each.options["fused"]) for each in large} == {(k, f) for k in (1, 3) for f in (0, 1)}
    assert all(each.sizes["C"] == 256 and each.count("BTHW") >= 64 * 128 for each in large)


def test_every_kernel_of_every_op_has_an_outcome() -> None:
    found = selftest.run("cpu")
    ours, torchs = ["triton", "wgmma", "cuda", "cpu"], {"spatial_attention": ["cudnn", "flash", "efficient"]}
    every = [(op, backend) for op in dispatch.registered_ops() for backend in [*ours, *torchs.get(op, [])]]
    assert [(each.op, each.backend) for each in found] == every
    assert "passed" in {each.status for each in found if (each.op, each.backend) == ("spatial_attention", "flash")}
    assert all(each.status == "passed" or (each.status == "unavailable" and each.detail) for each in found)


def test_what_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op must be one of .*blend_windows.*got 'blend'"):
        selftest.run("cpu", ["blend"])
    with pytest.raises(ValueError, match=r"device must be one of cpu.* on this machine, got 'cuda:99'"):
        selftest.run("cuda:99")


@pytest.fixture(params=["module", "command"])
def run(request: pytest.FixtureRequest) -> Callable[..., int]:
    """`python -m lumiere_fast.selftest`, which needs no Typer, and `lumiere-fast selftest`."""
    if request.param == "module":
        return lambda *arguments: selftest.main(arguments)
    pytest.importorskip("typer")
    from lumiere_fast import cli

    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(["selftest", *arguments])
        return int(ended.value.code or 0)

    return command


def test_the_command_prints_outcomes(
    run: Callable[..., int], use: Callable[[Kernel], None], capsys: pytest.CaptureFixture[str]
) -> None:
    use(right)
    assert run("blend_windows", "--device", "cpu") == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [
        ["blend_windows", "triton", "unavailable"],
        ["blend_windows", "wgmma", "unavailable"],
        ["blend_windows", "cuda", "unavailable"],
        ["blend_windows", "cpu", "passed"],
    ]


def test_the_command_ends_in_1_when_a_kernel_is_wrong(
    run: Callable[..., int], use: Callable[[Kernel], None], capsys: pytest.CaptureFixture[str]
) -> None:
    use(off)
    assert run("blend_windows", "--device", "cpu", "--json") == 1
    assert [each["status"] for each in json.loads(capsys.readouterr().out)] == [
        *["unavailable"] * 3,
        "failed",
    ]
