"""What shows that a kernel is right on a GPU, without which "auto" does not choose it.

Either the package carries the record of a run of the lab on a GPU of the same compute capability, made from the same
source (`evidence.json`, which `python -m benchmarks.lab --publish` writes), or the kernel was held against its
reference once on this machine. The outcome of that self-check is kept in the user's cache folder (LUMIERE_FAST_CACHE,
or `lumiere_fast` in XDG_CACHE_HOME, or ~/.cache/lumiere_fast) by kernel source, GPU and versions if it was a pass.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lumiere_fast import kernels, native
from lumiere_fast.kernels._configs import cache_folder as cache_folder

logger = logging.getLogger(__name__)

TORCHS: tuple[str, ...] = ("cudnn", "flash", "efficient")
"""The backends that are torch's own kernels. They are checked as ours are: with them, what is checked is how we call
them, that this build of torch has them, and torch."""

RECORDS = Path(__file__).parent / "evidence.json"
SELF_CHECKS = "selfchecks.json"

Check = Callable[[str, torch.device], list[str]]
"""`check(backend, device)` holds a kernel against its reference and tells what was wrong."""

_lock = threading.Lock()
_outcomes: dict[tuple[str, str, torch.device], list[str]] = {}


@dataclass(frozen=True)
class Evidence:
    """One green run of the lab: `backend` of `op`, made from `source`, was right on `gpu`."""

    op: str
    backend: str
    source: str
    gpu: str
    capability: str
    commit: str
    date: str
    torch: str
    triton: str | None
    cuda: str | None


@functools.cache
def records() -> tuple[Evidence, ...]:
    """The lab's records that the package carries."""
    return tuple(Evidence(**row) for row in json.loads(RECORDS.read_text(encoding="utf-8"))["records"])


def source_hash(op: str, backend: str) -> str:
    """Of the kernel's source: of a native kernel what was built, or where nothing was the source tree's; of one of
    torch's, which have none here, how it is called and the version of torch."""
    if backend in TORCHS:
        called = (Path(__file__).parent / "ops" / "_sdpa.py").read_bytes()
        versions = f"{torch.__version__} {torch.backends.cudnn.version()}"
        return hashlib.sha256(called + versions.encode()).hexdigest()[:16]
    if backend == "triton":
        return kernels.source_hash(op)
    return native.source_hash(op) or native.hash_of_sources(op)


def recorded(op: str, backend: str, capability: str | None = None) -> Evidence | None:
    """The newest record for the kernel's present source, on GPUs of `capability` or of any."""
    source = source_hash(op, backend)
    found = [
        each
        for each in records()
        if (each.op, each.backend, each.source) == (op, backend, source) and capability in (None, each.capability)
    ]
    return max(found, key=lambda each: each.date, default=None)


def why_unproven(op: str, backend: str, device: torch.device, check: Check) -> list[str]:
    """Why "auto" must not take this kernel on a CUDA device; empty once it is proved. May run `check`."""
    if (known := _outcomes.get((op, backend, device))) is not None:  # as a rule: this is asked at every call
        return known
    if not torch.cuda.is_available():  # a fake tensor's device
        return [f"nothing shows that it is right on {device}, which is not here"]
    with _lock:
        found = _outcomes.get((op, backend, device))
        if found is None and (busy := _why_not_now()):
            return [f"no GPU has proved it, and it cannot be checked while {busy}: make a call before"]
        if found is None:
            found = _outcomes[op, backend, device] = _outcome(op, backend, device, check)
    return found


def _why_not_now() -> str | None:
    """What would see the self-check's calls, or spoil them."""
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    return None


def _outcome(op: str, backend: str, device: torch.device, check: Check) -> list[str]:
    major, minor = torch.cuda.get_device_capability(device)
    if recorded(op, backend, f"{major}.{minor}") is not None:
        return []
    if passed_before(op, backend, device):
        return []
    failures = check(backend, device)
    remember(op, backend, device, failures)
    for failure in failures:
        logger.warning("%s on the backend %s is wrong on %s, and not used: %s", op, backend, device, failure)
    return _reasons(failures, device)


def _reasons(failures: Sequence[str], device: torch.device) -> list[str]:
    return [f"its self-check failed on {device}: {failure}" for failure in failures]


def passed_before(op: str, backend: str, device: torch.device) -> bool:
    """Whether an earlier self-check of the same kernel on such a GPU found nothing wrong."""
    return _key(op, backend, device) in _read_checks()


def remember(op: str, backend: str, device: torch.device, failures: Sequence[str]) -> None:
    """Keep the outcome of a self-check: a pass for good, a failure for this process, since its cause may pass."""
    _outcomes[op, backend, device] = _reasons(failures, device)
    checks, key = _read_checks(), _key(op, backend, device)
    if failures:
        checks.pop(key, None)
    else:
        checks[key] = {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")}
    write_cache(cache_folder() / SELF_CHECKS, json.dumps(checks, indent=1) + "\n")


def write_cache(path: Path, text: str) -> None:
    """Put a file into the cache, whole or not at all: a folder that cannot be written only costs the next run time."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        logger.info("%s is not kept: %s", path, error)


def _read_checks() -> dict[str, Any]:
    try:
        found = json.loads((cache_folder() / SELF_CHECKS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: checking again is all it costs
        return {}
    return found if isinstance(found, dict) else {}


def _key(op: str, backend: str, device: torch.device) -> str:
    """Everything that a kernel's result on a device may depend on."""
    gpu = torch.cuda.get_device_name(device)
    versions = (f"torch {torch.__version__}", f"triton {package_version('triton')}", f"CUDA {torch.version.cuda}")
    build = {name: value for name, value in native.build_info().items() if name != "sources"}
    made = "" if backend == "triton" else json.dumps(build, sort_keys=True)
    return " | ".join((op, backend, source_hash(op, backend), gpu, *versions, made))


def package_version(package: str) -> str | None:
    """None for a package that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
