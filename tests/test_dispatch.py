"""dispatch.py and ops/_registry.py, by an op made for these tests: it has the kernels that no op has yet."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import lumiere_fast
from lumiere_fast import dispatch, evidence, ops
from lumiere_fast.dispatch import AUTO, Backend, BackendUnavailable, Divisible, Needs, use_backend, why_not
from lumiere_fast.dispatch import BACKENDS as BACKEND_NAMES
from lumiere_fast.ops._registry import _REGISTERED, RegisteredOp, Result, register
from lumiere_fast.selftest import example_call

CALLS: list[str] = []


def note(call: str) -> None:
    if not torch.compiler.is_compiling():  # Dynamo would guard on the list
        CALLS.append(call)


def toy(
    x: Tensor, factor: float = 2.0, *, mode: str = "plain", backend: str | None = None, out: Tensor | None = None
) -> Any:
    return REGISTERED[0](flatten_toy(x, factor, mode), backend, out)


def flatten_toy(x: Tensor, factor: float, mode: str) -> tuple[Any, ...]:
    note("flatten")
    if x.dim() != 2:
        raise ValueError(f"toy: x must be (B, C), got {tuple(x.shape)}")
    return x, factor, mode


def toy_reference(x: Tensor, factor: float = 2.0, mode: str = "plain") -> Tensor:
    note("reference")
    return x if factor == 1 else x * factor


def describe_toy(x: Tensor, factor: float, mode: str) -> Result:
    return Result(tuple(x.shape), x.dtype, x.device)


def kernel(name: str) -> Any:
    def run(x: Tensor, factor: float, mode: str, *, out: Tensor) -> None:
        CALLS.append(name)
        out.copy_(x.detach() * factor)

    return run


# The cuda entry stands for a kernel with a backward; for these tests it runs on the CPU.
BACKENDS = (
    Backend(
        "triton",
        "toy_kernels:triton",
        Needs(
            devices=("cuda",),
            dtypes={"x": (torch.float16, torch.bfloat16)},
            divisible=(Divisible("x", 1, 8),),
            dense=(("x", 1),),
            values={"mode": ("fancy", "plainer")},
            modules=("no_such_module", "torch"),
        ),
    ),
    Backend("cuda", "toy_kernels:cuda", Needs(devices=("cpu",), dtypes={"x": (torch.float64,)}, gradient=True)),
    Backend("cpu", "toy_kernels:cpu", Needs(devices=("cpu",), dtypes={"x": (torch.float32,)})),
)
REGISTERED: list[RegisteredOp] = []


@pytest.fixture(scope="module", autouse=True)
def toy_op() -> Iterator[None]:
    module = types.ModuleType("toy_kernels")
    for backend in BACKENDS:
        setattr(module, backend.name, kernel(backend.name))
    sys.modules["toy_kernels"] = module
    REGISTERED.append(register(toy, toy_reference, flatten_toy, describe_toy, BACKENDS))
    yield
    del sys.modules["toy_kernels"], dispatch._OPS["toy"]
    REGISTERED.clear()


@pytest.fixture(autouse=True)
def no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "_elsewhere", set())
    torch._dynamo.reset()
    CALLS.clear()


def ran() -> list[str]:
    return [name for name in CALLS if name != "flatten"]


SINGLE = torch.ones(2, 3)
DOUBLE = torch.ones(2, 3, dtype=torch.float64)


def test_why_not_lists_every_reason() -> None:
    assert why_not("toy", "triton", torch.ones(3, 6)[:, ::2], mode="plain") == [
        "x is on cpu, it needs cuda",
        "x is float32, it needs float16 or bfloat16",
        "axis 1 of x is 3, it needs a multiple of 8",
        "axis 1 of x has stride 2, it needs stride 1",
        "mode is 'plain', it needs 'fancy' or 'plainer'",
        "the Python module no_such_module is not installed",
    ]


def test_a_gradient_is_a_reason_only_while_gradients_are_on() -> None:
    x = SINGLE.clone().requires_grad_()
    assert why_not("toy", "cpu", x) == [
        "a gradient is needed, it has no backward (use torch.no_grad() where none is wanted)"
    ]
    with torch.no_grad():
        assert why_not("toy", "cpu", x) == []
    assert why_not("toy", "cuda", x.double()) == []


def test_capability_is_that_of_the_tensors_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device.index])
    needs = Needs(capability=(8, 0))
    tensors = [types.SimpleNamespace(device=torch.device("cuda", i), requires_grad=False) for i in (0, 1)]
    monkeypatch.setattr(dispatch, "tensors_in", lambda value: (value,))
    assert needs.unmet({"x": tensors[0]}) == []
    assert needs.unmet({"x": tensors[0], "y": tensors[1]}) == ["cuda:1 has compute capability 7.5, it needs 8.0"]
    of_hopper = Needs(capability=(9, 0), most_capability=(9, 0))
    assert of_hopper.unmet({"x": tensors[0]}) == []
    assert of_hopper.unmet({"x": tensors[1]}) == ["cuda:1 has compute capability 7.5, it needs 9.0"]
    capability[0] = (10, 0)
    assert of_hopper.unmet({"x": tensors[0]}) == ["cuda:0 has compute capability 10.0, it needs 9.0 at most"]


def test_lists_of_tensors_and_absent_tensors_are_seen_through() -> None:
    needs = Needs(devices=("cuda",), dense=(("bias", 0),), divisible=(Divisible("windows", 0, 4),))
    assert needs.unmet({"windows": [torch.ones(4), torch.ones(3)], "bias": None}) == [
        "windows is on cpu, it needs cuda",
        "axis 0 of windows is 3, it needs a multiple of 4",
    ]


def test_supports_is_why_not_without_reasons() -> None:
    assert lumiere_fast.supports("toy", "cpu", SINGLE)
    assert not lumiere_fast.supports("toy", "cpu", DOUBLE)
    assert lumiere_fast.supports("toy", "reference", DOUBLE)


def test_why_not_refuses_what_the_op_refuses() -> None:
    with pytest.raises(ValueError, match=r"toy: x must be \(B, C\)"):
        why_not("toy", "cpu", torch.ones(3))
    with pytest.raises(ValueError, match=r"op must be one of .*group_norm.*got 'groupnorm'"):
        why_not("groupnorm", "cpu", SINGLE)
    with pytest.raises(ValueError, match=f"backend must be one of {', '.join(BACKEND_NAMES)}, got 'tpu'"):
        why_not("toy", "tpu", SINGLE)


def test_pending_kernels_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    op = dataclasses.replace(dispatch.registered("toy"), backends={})
    monkeypatch.setattr(dispatch, "PENDING_KERNELS", ("toy",))
    for backend in ("triton", "cuda", "cpu"):
        assert dispatch.reasons_against(op, backend, ()) == [
            "its kernel is not written yet (lumiere_fast.kernels.PENDING_KERNELS)"
        ]
    assert dispatch.reasons_against(op, "reference", ()) == []


def test_an_op_without_a_kernel_of_that_kind_says_so() -> None:
    assert dispatch.reasons_against(dispatch._OPS["group_norm"], "cuda", ()) == ["group_norm has no cuda kernel"]


def test_auto_takes_the_first_that_can() -> None:
    toy(SINGLE)
    toy(DOUBLE)
    toy(SINGLE.half())
    assert ran() == ["cpu", "cuda", "reference"]


def test_arguments_are_checked_once() -> None:
    toy(SINGLE)
    assert CALLS == ["flatten", "cpu"]


def test_auto_logs_each_reason_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lumiere_fast"):
        toy(SINGLE)
        first = [record.getMessage() for record in caplog.records]
        toy(SINGLE)
        assert len(caplog.records) == len(first) == 7
        toy(SINGLE.half())
    assert "toy does not run on the backend triton: x is on cpu, it needs cuda" in first
    more = [record.getMessage() for record in caplog.records[7:]]
    assert more[0] == "toy does not run on the backend cuda: x is float16, it needs float64"
    assert more[1] == "toy does not run on the backend cpu: x is float16, it needs float32"
    torchs = "it is a kernel of torch's for attention over space: give backend= to that op alone"
    assert more[2:] == [f"toy does not run on the backend {name}: {torchs}" for name in evidence.TORCHS]


def test_forced_means_forced() -> None:
    toy(SINGLE, backend="reference")
    toy(SINGLE, backend="cpu")
    assert ran() == ["reference", "cpu"]
    with pytest.raises(BackendUnavailable) as raised:
        toy(SINGLE, backend="triton")
    assert ran() == ["reference", "cpu"]
    for reason in why_not("toy", "triton", SINGLE):
        assert reason in str(raised.value)
    assert str(raised.value).startswith("toy cannot run on the backend 'triton': ")


EVERY_KERNEL = [
    (op, backend) for op in dispatch.registered_ops() for backend in BACKEND_NAMES if backend != "reference"
]


@pytest.mark.parametrize(("op", "backend"), EVERY_KERNEL)
@pytest.mark.parametrize("way", ["argument", "block", "environment"])
def test_a_forced_backend_runs_or_says_every_reason(
    op: str, backend: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other backend runs in its place, the reference least of all."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = example_call(op, "cpu")
    reasons = why_not(op, backend, **call)
    used: list[str] = []
    registered = _REGISTERED[op]
    monkeypatch.setattr(registered, "reference", lambda *arguments: used.append("reference"))

    def load(self: Backend) -> Any:
        if self.name in dispatch.COMPOSED:
            return lambda *arguments: used.append(self.name)
        return lambda *arguments, out: used.append(self.name)

    monkeypatch.setattr(Backend, "load", load)
    if way == "environment":
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, backend)
    options = {"backend": backend} if way == "argument" else {}
    block = use_backend(backend) if way == "block" else contextlib.nullcontext()
    raises = pytest.raises(BackendUnavailable) if reasons else contextlib.nullcontext()
    with block, raises as raised:
        getattr(ops, op)(**call, **options)
    assert used == ([] if reasons else [backend])
    if reasons:
        message = str(raised.value)
        assert message.startswith(f"{op} cannot run on the backend '{backend}': {'; '.join(reasons)}. ")


def on_a_gpu(*shape: int) -> Tensor:
    """A tensor that says it is on a GPU, of which there is none."""
    with FakeTensorMode():
        return torch.empty(shape, device="cuda:1")


def test_auto_wants_proof_on_a_gpu_and_forced_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, torch.device]] = []

    def unproven(op: str, backend: str, device: torch.device, check: Any) -> list[str]:
        asked.append((op, backend, device))
        return [] if backend == "cuda" else ["nobody has seen it run"]

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(evidence, "why_unproven", unproven)
    anywhere = {name: Backend(name, f"toy_kernels:{name}", Needs()) for name in ("triton", "cuda", "cpu")}
    op = dataclasses.replace(dispatch.registered("toy"), backends=anywhere)
    arguments = (on_a_gpu(2, 3), 2.0, "plain")
    assert dispatch.select(op, None, arguments) == "cuda"
    assert asked == [("toy", name, torch.device("cuda:1")) for name in ("triton", "cuda")]
    asked.clear()
    assert dispatch.select(op, "triton", arguments) == "triton" and not asked


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton = Backend("triton", "toy_kernels:triton", Needs(devices=("cuda",), modules=("triton",)))
    op = dataclasses.replace(dispatch.registered("toy"), backends={"triton": triton})
    monkeypatch.setattr(dispatch, "_installed", lambda module: True)
    arguments = (SINGLE, 2.0, "plain")
    assert dispatch.select(op, None, arguments) == "reference"
    assert dispatch.select(op, "triton", arguments) == "triton"
    with pytest.raises(BackendUnavailable, match="x is bfloat16, which Triton's interpreter computes wrongly"):
        dispatch.select(op, "triton", (SINGLE.bfloat16(), 2.0, "plain"))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendUnavailable, match="x is on cpu, it needs cuda"):
        dispatch.select(op, "triton", arguments)


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument is stronger than the block, the block than the environment."""
    assert dispatch.current_backend() == AUTO
    monkeypatch.setenv("LUMIERE_FAST_BACKEND", "reference")
    toy(SINGLE)
    with use_backend("cpu"):
        toy(SINGLE)
        toy(SINGLE, backend="reference")
    with use_backend("auto"):
        toy(SINGLE)
    assert ran() == ["reference", "cpu", "reference", "cpu"]


def test_use_backend_nests_and_restores() -> None:
    with use_backend("cpu"):
        with pytest.raises(RuntimeError, match="inner"), use_backend("reference"):
            assert dispatch.current_backend() == "reference"
            raise RuntimeError("inner")
        assert dispatch.current_backend() == "cpu"
    assert dispatch.current_backend() == AUTO


def test_use_backend_is_the_threads_own() -> None:
    seen = []
    with use_backend("cpu"):
        other = threading.Thread(target=lambda: seen.append(dispatch.current_backend()))
        other.start()
        other.join()
    assert seen == [AUTO]


def test_unknown_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = re.escape(
        "backend must be one of auto, triton, wgmma, cuda, cpu, cudnn, flash, efficient, reference, got 'tpu'"
    )
    with pytest.raises(ValueError, match=accepted):
        toy(SINGLE, backend="tpu")
    with pytest.raises(ValueError, match=accepted), use_backend("tpu"):
        pass
    monkeypatch.setenv("LUMIERE_FAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match="LUMIERE_FAST_BACKEND" + accepted.removeprefix("backend")):
        toy(SINGLE)
    assert ran() == []
    monkeypatch.setenv("LUMIERE_FAST_BACKEND", "")  # as good as not set
    toy(SINGLE)
    assert ran() == ["cpu"]


def test_auto_on_a_gpu_never_proves_or_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "why_unproven", lambda *_: pytest.fail("the interpreter proves nothing"))
    op = dataclasses.replace(
        dispatch.registered("toy"), backends={"triton": Backend("triton", "toy_kernels:triton", Needs())}
    )
    for value in ("1", "true", "ON", "yes"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert dispatch.select(op, None, (on_a_gpu(2, 3), 2.0, "plain")) == "reference"


@pytest.mark.parametrize("transform", ["grad", "jvp", "dual"])
def test_derivatives_that_kernels_cannot_see_go_to_the_reference(transform: str) -> None:
    x = DOUBLE.clone()
    if transform == "grad":
        assert torch.func.grad(lambda x: toy(x, 3.0).sum())(x).eq(3).all()
    elif transform == "jvp":
        assert torch.func.jvp(lambda x: toy(x, 3.0), (x,), (torch.ones_like(x),))[1].eq(3).all()
    else:
        with forward_ad.dual_level():
            y = toy(forward_ad.make_dual(x, torch.ones_like(x)), 3.0)
            assert forward_ad.unpack_dual(y).tangent.eq(3).all()
            with pytest.raises(BackendUnavailable, match="forward-mode differentiation is active"):
                toy(x, 3.0, backend="cuda")
    assert set(ran()) == {"reference"}


def test_auto_passes_over_what_does_not_pay() -> None:
    """By the sizes of what is given; an argument that is not does not count."""
    backend = Backend("cpu", "toy_kernels:cpu", Needs(), pays_from=(("x", 0, 3), ("factor", 1, 4)))
    op = dataclasses.replace(dispatch.registered("toy"), backends={"cpu": backend})
    short, long = torch.ones(2, 3), torch.ones(3, 4)
    assert dispatch.reasons_to_pass_over(op, "cpu", (long, None, "plain")) == ()
    assert dispatch.reasons_to_pass_over(op, "cpu", (short, None, "plain")) == [
        "axis 0 of x is below 3, from where it pays"
    ]
    assert len(dispatch.reasons_to_pass_over(op, "cpu", (short, short, "plain"))) == 2


def test_limits_that_are_no_field_are_reasons_too() -> None:
    needs = Needs(limits=lambda x, factor, mode: [f"{len(x)} rows, it takes 1"] if len(x) > 1 else [])
    assert needs.unmet({"x": SINGLE, "factor": 2.0, "mode": "plain"}) == ["2 rows, it takes 1"]
    assert needs.unmet({"x": SINGLE[:1], "factor": 2.0, "mode": "plain"}) == []


# ---------------------------------------------------------------- what is composed of torch's operators


def composed(name: str, wants: Needs = Needs()) -> Backend:  # noqa: B008
    """It is called like the reference: torch's own autograd goes through it."""

    def run(x: Tensor, factor: float, mode: str) -> Tensor:
        note(name)
        return x * factor

    return Backend(name, run, dataclasses.replace(wants, gradient=True))


@pytest.fixture
def with_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy with a kernel without a backward, and with two of torch's, of which one is for few rows."""
    few = Needs(limits=lambda x, factor, mode: [f"{len(x)} rows, it takes 1"] if len(x) > 1 else [])
    kernel = Backend("cuda", "toy_kernels:cuda", Needs(devices=("cpu",), gradient=True))
    backends = {"cuda": kernel, "cudnn": composed("cudnn", few), "flash": composed("flash")}
    known = dataclasses.replace(REGISTERED[0].op, backends=backends)
    monkeypatch.setattr(REGISTERED[0], "op", known)
    monkeypatch.setitem(dispatch._OPS, "toy", known)


@pytest.mark.usefixtures("with_torchs")
def test_torch_s_autograd_goes_through_what_is_composed() -> None:
    x = SINGLE.clone().requires_grad_()
    y = toy(x, 3.0, backend="flash")
    assert ran() == ["flash"] and y.grad_fn is not None and "Mul" in y.grad_fn.name()
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert ran() == ["flash"] and (gradient == 3).all()


@pytest.mark.usefixtures("with_torchs")
@pytest.mark.parametrize(("rows", "stands_for_it"), [(1, "cudnn"), (2, "flash")])
def test_a_kernel_without_a_backward_is_differentiated_by_torch_s_best(rows: int, stands_for_it: str) -> None:
    x = torch.ones(rows, 3, requires_grad=True)
    y = toy(x, 3.0, backend="cuda")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert ran() == ["cuda", stands_for_it] and (gradient == 3).all()
    found = REGISTERED[0].gradients("cuda", (x, 3.0, "plain"), (torch.ones(rows, 3),))
    assert ran()[2:] == [stands_for_it] and (found[0] == 3).all() and found[1:] == (None, None)


@pytest.mark.usefixtures("with_torchs")
def test_the_operator_runs_and_differentiates_what_it_is_told() -> None:
    x = SINGLE.clone().requires_grad_()
    y = torch.ops.lumiere_fast.toy(x, 3.0, "plain", "flash")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert ran() == ["flash", "flash"] and (gradient == 3).all()


@pytest.mark.usefixtures("with_torchs")
def test_a_composed_result_is_put_into_out_and_none_is_asked_of_nothing() -> None:
    out = torch.empty(3, 2).T
    assert toy(SINGLE, 3.0, out=out, backend="flash") is out and (out == 3).all()
    assert toy(torch.ones(0, 3), backend="flash").shape == (0, 3)
    assert ran() == ["flash", "reference"]


@pytest.mark.parametrize("name", evidence.TORCHS)
def test_torch_s_kernels_are_for_attention_alone(name: str) -> None:
    assert why_not("toy", name, SINGLE) == [
        "it is a kernel of torch's for attention over space: give backend= to that op alone"
    ]
    with (
        pytest.raises(
            BackendUnavailable,
            match="it is a kernel of torch's for attention over space: give backend= to that op alone",
        ),
        use_backend(name),
    ):
        toy(SINGLE)
    assert dispatch.kernels("toy") == ("triton", "wgmma", "cuda", "cpu")
    assert dispatch.kernels("spatial_attention") == ("triton", "wgmma", "cuda", "cpu", *evidence.TORCHS)


# ---------------------------------------------------------------- a measured order


def test_auto_follows_the_order_of_the_call_s_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without a place come after those that have one; equal places leave the order of BACKENDS."""
    tables = {"short": {"flash": 2, "cudnn": 1}, "long": {"reference": 1, "cpu": 1}, "none": {}}
    asked: list[tuple[str, str, torch.device]] = []

    def chosen(table: str, case: str, device: torch.device) -> dict[str, int]:
        asked.append((table, case, device))
        return tables[case]

    monkeypatch.setattr(dispatch._configs, "chosen", chosen)
    case = lambda x, factor, mode: mode  # noqa: E731
    backends = {name: composed(name) for name in ("cudnn", "flash")} | {"cpu": BACKENDS[2]}
    op = dataclasses.replace(dispatch.registered("toy"), backends=backends, case=case)

    def first_of(mode: str) -> str:
        return dispatch.select(op, None, (SINGLE, 2.0, mode))

    assert [first_of(mode) for mode in ("short", "long", "none")] == ["cudnn", "cpu", "cpu"]
    assert asked == [("toy_order", mode, torch.device("cpu")) for mode in ("short", "long", "none")]
    order = dispatch.order(op, torch.device("cpu"), (SINGLE, 2.0, "short"))
    assert order == ("cudnn", "flash", "triton", "wgmma", "cuda", "cpu", "efficient", "reference")
    assert dispatch.select(op, "flash", (SINGLE, 2.0, "short")) == "flash"
    assert dispatch.first_composed(op, (SINGLE, 2.0, "none")) == "cudnn"
    assert dispatch.first_composed(op, (SINGLE, 2.0, "long")) == "reference"
    assert dispatch.order(dispatch.registered("toy"), torch.device("cpu"), ()) == BACKEND_NAMES


def test_register_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=f"backend must be one of {', '.join(BACKEND_NAMES)}, got 'metal'"):
        dispatch.register(dispatch.Op("metal_op", (), flatten_toy, None, {"metal": BACKENDS[0]}, None))  # type: ignore[arg-type]
    assert "metal_op" not in dispatch.registered_ops()


def test_a_kernel_writes_out_itself() -> None:
    out = torch.empty(2, 3)
    assert toy(SINGLE, 3.0, out=out) is out
    assert ran() == ["cpu"] and (out == 3).all()


def test_a_kernel_is_not_asked_to_write_nothing() -> None:
    assert toy(torch.ones(0, 3)).shape == (0, 3)
    assert ran() == []


@pytest.mark.parametrize("where", ["the input", "a part of it", "rows between its rows"])
def test_out_may_not_lie_in_an_input(where: str) -> None:
    memory = torch.ones(8, 3)
    x, out = {
        "the input": (memory[:2], memory[:2]),
        "a part of it": (memory[:4], memory[3:7]),
        "rows between its rows": (memory[::2], memory[1::2]),
    }[where]
    with pytest.raises(ValueError, match="toy: out must not lie in the memory of an input"):
        toy(x, out=out)
    assert (memory == 1).all() and ran() == []
    assert toy(memory[:4], out=memory[4:]).eq(2).all()  # neighbours in one storage


def test_out_must_have_a_place_for_each_element() -> None:
    with pytest.raises(ValueError, match="toy: out has several elements in one place"):
        toy(SINGLE, out=torch.empty(3).expand(2, 3))


def test_a_kernel_without_a_backward_of_its_own_uses_the_reference_s() -> None:
    """It is run again in the backward pass, and only then."""
    x = DOUBLE.clone().requires_grad_()
    y = toy(x, 3.0)
    assert ran() == ["cuda"]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert ran() == ["cuda", "reference"] and (gradient == 3).all()


def test_a_kernel_s_own_backward_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(gradients: tuple[Tensor, ...], x: Tensor, factor: float, mode: str) -> tuple[Any, ...]:
        CALLS.append(f"backward of {factor} {mode}, x {'wants' if x.requires_grad else 'does not want'} one")
        return gradients[0] * factor, None, None

    monkeypatch.setattr(sys.modules["toy_kernels"], "backward", backward, raising=False)
    own = dataclasses.replace(BACKENDS[1], backward="toy_kernels:backward")
    monkeypatch.setattr(REGISTERED[0], "op", dataclasses.replace(REGISTERED[0].op, backends={"cuda": own}))
    x = DOUBLE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(toy(x, 3.0, backend="cuda").sum(), x)
    assert ran() == ["cuda", "backward of 3.0 plain, x wants one"] and (gradient == 3).all()


def test_a_dispatch_mode_sees_the_operator() -> None:
    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen():
        toy(SINGLE)
    assert "lumiere_fast.toy.default" in Seen.names and ran() == ["cpu"]


def test_a_fake_tensor_gets_a_fake_result_and_no_kernel_runs() -> None:
    with FakeTensorMode() as mode:
        y = toy(torch.empty(2, 3))
    assert isinstance(y, FakeTensor) and y.fake_mode is mode and y.shape == (2, 3)
    assert ran() == []


def test_compiled_code_holds_the_operator_and_follows_use_backend() -> None:
    graphs: list[str] = []

    def record(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module.code)
        return module.forward

    compiled = torch.compile(toy, fullgraph=True, backend=record)
    torch.testing.assert_close(compiled(SINGLE), 2 * SINGLE)
    assert "lumiere_fast.toy" in graphs[-1] and "'cpu'" in graphs[-1]
    with use_backend("reference"):
        torch.testing.assert_close(compiled(SINGLE), 2 * SINGLE)
    assert len(graphs) == 2 and "lumiere_fast.toy" not in graphs[-1]
    compiled(SINGLE)
    assert len(graphs) == 2  # the first graph again


def test_the_operator_never_returns_its_input() -> None:
    """A reference may hand its input through where there is nothing to do; an operator may not."""
    assert toy(SINGLE, 1.0, backend="reference") is SINGLE
    y = torch.ops.lumiere_fast.toy(SINGLE, 1.0, "plain", "reference")
    assert torch.equal(y, SINGLE) and y.data_ptr() != SINGLE.data_ptr()
