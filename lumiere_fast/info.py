"""What is installed, on which device it runs, and which backend runs each op: ``python -m lumiere_fast.info [--json]``.

Whether a backend serves an op depends on the call, so the table answers for one small fp32 call of each op on the best
device there is, where no gradient is needed. ``lumiere_fast.dispatch.why_not`` answers for any other call.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any, TypedDict

import torch

from lumiere_fast import dispatch, ops
from lumiere_fast.kernels import PENDING_KERNELS
from lumiere_fast.ops._spec import OpSpec

_PACKAGES = ("lumiere_fast", "torch", "triton", "numpy", "safetensors", "tokenizers", "av", "pillow")

_HOME = {"group_norm_stats": "group_norm"}  # an op that has no module of its own, and where it lives


class Info(TypedDict):
    """The report, as ``--json`` prints it; a backend's list of reasons is empty where it can run the op."""

    python: str
    packages: dict[str, str | None]
    device: str
    threads: int
    cores: int | None
    backend: str
    ops: dict[str, dict[str, list[str]]]
    pending_kernels: list[str]


def collect() -> Info:
    """Everything that ``python -m lumiere_fast.info`` tells."""
    return Info(
        python=platform.python_version(),
        packages={name: _version(name) for name in _PACKAGES},
        device=_device_name(),
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        backend=dispatch.current_backend(),
        ops=reasons_by_op("cuda" if torch.cuda.is_available() else "cpu"),
        pending_kernels=list(PENDING_KERNELS),
    )


def reasons_by_op(device: str) -> dict[str, dict[str, list[str]]]:
    """For each op and backend, what ``why_not`` says about ``example_call`` on ``device``."""
    table: dict[str, dict[str, list[str]]] = {}
    for op in dispatch.registered_ops():
        call = example_call(op, device)
        table[op] = {backend: dispatch.why_not(op, backend, **call) for backend in dispatch.BACKENDS}
    return table


def example_call(op: str, device: str) -> dict[str, Any]:
    """Arguments by name of a call of ``op``: the smallest scenario of its spec, in fp32."""
    spec: OpSpec = importlib.import_module(f"lumiere_fast.ops.{_HOME.get(op, op)}").SPEC
    scenario = min(spec.scenarios, key=lambda each: math.prod(each.sizes.values()))
    inputs = spec.make_inputs(scenario, device, torch.float32, torch.Generator().manual_seed(0))
    accepted = inspect.signature(getattr(ops, op)).parameters
    return {name: value for name, value in inputs.items() if name in accepted}


def render(info: Info) -> str:
    """The report for people."""
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in info["packages"].items())
    lines = [
        f"Python    {info['python']}",
        f"packages  {packages}",
        f"device    {info['device']}",
        f"threads   {info['threads']} of {info['cores']} cores",
        f"backend   {info['backend']}",
        "",
        *_table(info["ops"]),
        "",
        *_reasons(info["ops"]),
        "",
        f"kernels pending: {', '.join(info['pending_kernels']) or 'none'}",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lumiere_fast.info", description="What can run here, and why not.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    as_json = parser.parse_args(arguments).json
    info = collect()
    print(json.dumps(info, indent=2) if as_json else render(info))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    return f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _table(table: dict[str, dict[str, list[str]]]) -> list[str]:
    width = max(map(len, table)) + 2
    header = "op".ljust(width) + "".join(name.ljust(len(name) + 3) for name in dispatch.BACKENDS)
    rows = [
        op.ljust(width) + "".join(("-" if why else "yes").ljust(len(name) + 3) for name, why in backends.items())
        for op, backends in table.items()
    ]
    return [line.rstrip() for line in (header, *rows)]


def _reasons(table: dict[str, dict[str, list[str]]]) -> list[str]:
    """Each distinct reason once, with the backends and ops that it stands against."""
    against: dict[str, dict[str, list[str]]] = {}
    for op, backends in table.items():
        for backend, reasons in backends.items():
            for reason in reasons:
                against.setdefault(reason, {}).setdefault(backend, []).append(op)
    lines = []
    for reason, backends in against.items():
        lines.append(f"why not: {reason}")
        lines += [
            f"  {name}: {'every op' if len(ops) == len(table) else ', '.join(ops)}" for name, ops in backends.items()
        ]
    return lines


if __name__ == "__main__":
    main()
