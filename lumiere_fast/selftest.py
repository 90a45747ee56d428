"""Every kernel that can run here against its reference: ``lumiere-fast selftest``, ``python -m lumiere_fast.selftest``.

A kernel is held against the reference at the small scenarios of its op's spec, in fp32, fp16 and bf16 where it takes
them. On a GPU the outcome is kept (`lumiere_fast.evidence`), so that "auto" does not have to check again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from lumiere_fast import dispatch, evidence, ops
from lumiere_fast.ops import _selfcheck


@dataclass(frozen=True)
class Check:
    """The outcome for one kernel.

    Args:
        detail: of a failure, what was wrong; of one that is unavailable, every reason.
    """

    op: str
    backend: str
    status: Literal["passed", "failed", "unavailable"]
    detail: str
    seconds: float


def run(device: str | None = None, names: Iterable[str] | None = None) -> list[Check]:
    """Check every kernel of the named ops on a device.

    Args:
        device: None for the GPU where there is one, else the CPU.
        names: of ops; None for all.

    Raises:
        ValueError: an op or the device is unknown, or the device is not here.
    """
    return list(checks(device, names))


def checks(device: str | None = None, names: Iterable[str] | None = None) -> Iterator[Check]:
    """`run`, one outcome at a time."""
    where = checked_device(device)
    for op in [dispatch.registered(name) for name in (dispatch.registered_ops() if names is None else names)]:
        for backend in dispatch.kernels(op.name):
            yield _check(op, backend, where)


def checked_device(device: str | None) -> torch.device:
    """A device that is here, with its index; None for the GPU if there is one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        device = "cuda" if gpus else "cpu"
    accepted = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if device not in accepted:
        raise ValueError(f"device must be one of {', '.join(accepted)} on this machine, got {device!r}")
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def example_call(op: str, device: torch.device | str) -> dict[str, Any]:
    """Arguments by name of a call of `op`: the smallest scenario of its spec, in fp32."""
    public = getattr(ops, op)
    return _selfcheck.example(public, _selfcheck.smallest(_selfcheck.spec_of(public)), device, torch.float32)


def why_not(op: str, backend: str, device: torch.device | str) -> list[str]:
    """Every reason why a backend cannot run `example_call` on a device; none where it serves another of the checks.

    A kernel may be for some of an op's calls alone: for half precision, for those with a weight.
    """
    with torch.no_grad():
        reasons = dispatch.why_not(op, backend, **example_call(op, device))
        found = dispatch.registered(op).backends.get(backend)
        if not reasons or found is None or torch.device(device).type not in found.needs.devices:
            return reasons
        public = getattr(ops, op)
        for scenario in _selfcheck.spec_of(public).checks:
            call = _selfcheck.example(public, scenario, device, torch.bfloat16)
            if not dispatch.why_not(op, backend, **call):
                return []
    return reasons


def _check(op: dispatch.Op, backend: str, device: torch.device) -> Check:
    started = time.perf_counter()
    reasons = why_not(op.name, backend, device)
    if not reasons and backend == "triton" and dispatch.interpreting():
        reasons = [dispatch.INTERPRETED]
    if reasons:
        return Check(op.name, backend, "unavailable", "; ".join(reasons), 0.0)
    failures = op.check(backend, device)
    if device.type == "cuda":
        evidence.remember(op.name, backend, device, failures)
    seconds = time.perf_counter() - started
    return Check(op.name, backend, "failed" if failures else "passed", "; ".join(failures), seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the outcomes; 1 if a kernel is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="selftest", description="Hold every kernel against its reference.")
    parser.add_argument("ops", nargs="*", help="ops to check; all if none is named")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the GPU if there is one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    found = []
    for check in checks(options.device, options.ops or None):
        found.append(check)
        if not options.json:
            print(f"{check.op:22} {check.backend:7} {check.status:11} {check.detail}".rstrip(), flush=True)
    if options.json:
        print(json.dumps([asdict(check) for check in found], indent=2))
    return int(any(check.status == "failed" for check in found))


if __name__ == "__main__":
    raise SystemExit(main())
