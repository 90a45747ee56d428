"""What is installed, on which device it runs, and which backend runs each op: ``python -m lumiere_fast.info [--json]``.

Whether a backend serves an op depends on the call, so the table answers for one small fp32 call of each op on the best
device there is, where no gradient is needed. ``lumiere_fast.dispatch.why_not`` answers for any other call. ``--table``
prints the table of the README, which tells of the kernels and what GPUs have proved them, wherever it is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from typing import Any, TypedDict

import torch

from lumiere_fast import dispatch, evidence, native, selftest
from lumiere_fast.kernels import PENDING_KERNELS

_PACKAGES = (
    *("lumiere_fast", "torch", "triton", "numpy", "safetensors", "tokenizers", "tqdm", "typer", "pillow", "av"),
    *("huggingface_hub", "transformers", "matplotlib"),
)


class Info(TypedDict):
    """The report, as ``--json`` prints it.

    Attributes:
        cuda: the CUDA version that torch was built with, if any.
        ops: by op and backend, every reason why it cannot run the op here; empty where it can.
        evidence: by op and GPU backend, the newest lab record of its present source on a GPU; None where there is none.
        native: how the native core was built, and for each half why it cannot be used.
    """

    python: str
    packages: dict[str, str | None]
    device: str
    cuda: str | None
    threads: int
    cores: int | None
    backend: str
    ops: dict[str, dict[str, list[str]]]
    evidence: dict[str, dict[str, dict[str, Any] | None]]
    native: dict[str, Any]
    pending_kernels: list[str]


def collect() -> Info:
    """Everything that ``python -m lumiere_fast.info`` tells."""
    return Info(
        python=platform.python_version(),
        packages={name: evidence.package_version(name) for name in _PACKAGES},
        device=_device_name(),
        cuda=torch.version.cuda,
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        backend=dispatch.current_backend(),
        ops=reasons_by_op("cuda" if torch.cuda.is_available() else "cpu"),
        evidence=evidence_by_op(),
        native={**native.build_info(), "why_not": {half: native.why_not(half) for half in ("cpu", "cuda")}},
        pending_kernels=list(PENDING_KERNELS),
    )


def reasons_by_op(device: str) -> dict[str, dict[str, list[str]]]:
    """For each op and backend, why it is not for small calls on ``device``; see `selftest.why_not`."""
    return {
        op: {backend: selftest.why_not(op, backend, device) for backend in dispatch.BACKENDS}
        for op in dispatch.registered_ops()
    }


def evidence_by_op() -> dict[str, dict[str, dict[str, Any] | None]]:
    """For each op and the GPU backends it has, the newest lab record of the kernel's present source."""
    table: dict[str, dict[str, dict[str, Any] | None]] = {}
    for op in dispatch.registered_ops():
        kernels = [name for name in dispatch.kernels(op) if name not in dispatch.COMPOSED]  # torch's are not published
        backends = [
            name for name in kernels if name in dispatch.GPU_BACKENDS and name in dispatch.registered(op).backends
        ]
        found = {backend: evidence.recorded(op, backend) for backend in backends}
        table[op] = {name: dataclasses.asdict(each) if each else None for name, each in found.items()}
    return table


def readme_table() -> str:
    """The kernels there are and what shows that they are right, in Markdown."""
    kernels = [name for name in dispatch.BACKENDS if name not in dispatch.COMPOSED]
    lines = [f"| op | {' | '.join(kernels)} | torch's own |", "|---" * (2 + len(kernels)) + "|"]
    for op in dispatch.registered_ops():
        torchs = ", ".join(name for name in dispatch.kernels(op) if name in dispatch.COMPOSED) or "-"
        lines.append(f"| `{op}` | {' | '.join(_state(op, backend) for backend in kernels)} | {torchs} |")
    return "\n".join(lines)


def _state(op: str, backend: str) -> str:
    if backend not in dispatch.registered(op).backends:
        return "to come" if op in PENDING_KERNELS else "-"
    if backend not in dispatch.GPU_BACKENDS:
        return "tested"
    found = evidence.recorded(op, backend)
    return "not yet run on a GPU" if found is None else f"right on {found.gpu} ({found.date}, {found.commit[:7]})"


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
        *_evidence(info["evidence"]),
        *_native(info["native"]),
        "",
        f"kernels pending: {', '.join(info['pending_kernels']) or 'none'}",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lumiere_fast.info", description="What can run here, and why not.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--table", action="store_true", help="print the README's table of kernels")
    options = parser.parse_args(arguments)
    if options.table:
        print(readme_table())
    else:
        print(json.dumps(collect(), indent=2) if options.json else render(collect()))


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


def _evidence(table: dict[str, dict[str, dict[str, Any] | None]]) -> list[str]:
    lines = []
    for op, backends in table.items():
        for backend, found in backends.items():
            told = found and f"right on {found['gpu']}, {found['date']}, commit {found['commit'][:7]}"
            lines.append(f"evidence: {op} on {backend}: {told or 'not yet run on a GPU'}")
    return lines


def _native(facts: dict[str, Any]) -> list[str]:
    lines = [f"native core: {name}: {value}" for name, value in facts.items() if name != "why_not" and value]
    for half, reasons in facts["why_not"].items():
        lines.append(f"native core: {half} half: {'; '.join(reasons) or 'built'}")
    return lines


if __name__ == "__main__":
    main()
