"""Where a measurement comes from: source, commit, machine, versions. The functions above the line need no torch."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lumiere_fast", "torch", "triton", "numpy")
SOURCES = ("lumiere_fast", "kernels", "csrc", "CMakeLists.txt", "setup.py")
TESTED = (*SOURCES, "tests")  # what a result of the test-suite depends on
TEXT = {".py", ".cu", ".cpp", ".c", ".h", ".cuh", ".txt"}


def hash_of(*names: str) -> str:
    """Of every source file under these files and folders of the tree, their paths included."""
    digest = hashlib.sha256()
    for name in names:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in TEXT:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> tuple[str, bool]:
    """The commit of the tree and whether it was changed since; ("unknown", True) away from its history."""
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return ("unknown", True) if head is None else (head, changes != "")


def commit_as(given: str | None) -> dict[str, Any]:
    """The commit that rows name, and whether the tree was changed since. Only without its history is `given` believed.

    Raises:
        ValueError: `given` is not the commit that is checked out.
    """
    head, dirty = commit()
    if given is None or head == given:
        return {"commit": head, "dirty": dirty}
    if head != "unknown":
        raise ValueError(f"--commit is for a tree without its history; this one's is {head}, got {given}")
    return {"commit": given, "dirty": False}


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------- with torch and the package


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that a row was measured with."""
    import torch

    gpu = device == "cuda"
    capability = torch.cuda.get_device_capability() if gpu else None
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "capability": None if capability is None else f"{capability[0]}.{capability[1]}",
        "driver": driver() if gpu else None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
        },
    }


def source_of(op: str, backend: str) -> str | None:
    """The hash that evidence goes by: of a kernel; of the reference's module; of everything for a model."""
    from lumiere_fast import dispatch, evidence

    if op not in dispatch.registered_ops() or backend not in dispatch.BACKENDS:
        return hash_of(*SOURCES)
    if backend == "reference":
        return hash_of("lumiere_fast/ops")
    return evidence.source_hash(op, backend)
