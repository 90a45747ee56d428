"""Triton kernels, one file an op, installed as `lumiere_fast.kernels`. Nothing here imports the rest of the package."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

HOMES = {"group_norm_stats": "group_norm"}
"""Ops that live in another one's files."""

# Ops whose kernel is not written yet. An op leaves the list in the change that adds kernels/<op>.py or csrc/<op>.*.
PENDING_KERNELS: tuple[str, ...] = ()


_FOLDER = Path(__file__).parent
_IMPORT = re.compile(r"^\s*from \.([a-z]\w*) import", re.MULTILINE)


def modules_of(op: str) -> tuple[str, ...]:
    """The modules whose `VARIANTS` are the op's: kernels/<op>.py, and kernels/<op>_backward.py where there is one."""
    home = HOMES.get(op, op)
    return tuple(name for name in (home, f"{home}_backward") if (_FOLDER / f"{name}.py").is_file())


def source_hash(op: str) -> str:
    """Of everything the op's Triton kernels are made of: its modules, those they import, and what all kernels share.

    That has the default configurations in it, not those of single GPUs, which were held against the reference there.

    Raises:
        FileNotFoundError: the op has no Triton kernel.
    """
    names = list(modules_of(op))
    if not names:
        raise FileNotFoundError(f"{op} has no Triton kernel in {_FOLDER}")
    for name in names:  # grows while it is walked
        text = (_FOLDER / f"{name}.py").read_text("utf-8")
        names += [found for found in _IMPORT.findall(text) if found not in names]
    digest = hashlib.sha256()
    shared = (*sorted(_FOLDER.glob("_[!_]*.py")), _FOLDER / "configs" / "default.json")
    for path in (*(_FOLDER / f"{name}.py" for name in sorted(names)), *shared):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
