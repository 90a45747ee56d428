"""The self-check finds what is wrong with a kernel, and only that."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast import dispatch, native, selftest
from lumiere_fast.dispatch import Backend
from lumiere_fast.ops.blend_windows import blend_windows_reference

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


def test_every_kernel_of_every_op_has_an_outcome() -> None:
    found = selftest.run("cpu")
    kernels = [name for name in dispatch.BACKENDS if name != "reference"]
    assert [(each.op, each.backend) for each in found] == [(o, k) for o in dispatch.registered_ops() for k in kernels]
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
        ["blend_windows", "cuda", "unavailable"],
        ["blend_windows", "cpu", "passed"],
    ]


def test_the_command_ends_in_1_when_a_kernel_is_wrong(
    run: Callable[..., int], use: Callable[[Kernel], None], capsys: pytest.CaptureFixture[str]
) -> None:
    use(off)
    assert run("blend_windows", "--device", "cpu", "--json") == 1
    assert [each["status"] for each in json.loads(capsys.readouterr().out)] == ["unavailable", "unavailable", "failed"]
