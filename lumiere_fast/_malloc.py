"""glibc's malloc told to keep what is freed, for the commands; a library leaves such things to the program it is in.

By default it gives large blocks back to the system at once, and the next layer's output faults its pages in again, all
of them zeroed first: 50 ms for 128 MiB that are filled in 5. See mallopt(3).
"""

from __future__ import annotations

import ctypes
import os
import platform

# mallopt's parameters, as malloc.h numbers them, and what they are set to.
M_TRIM_THRESHOLD, KEPT = -1, 2**31 - 1  # bytes at the top of the heap that may lie free: the most an int can say
M_MMAP_THRESHOLD, LARGEST = -3, 2**30  # a block from this size on goes back to the system as before
M_MMAP_MAX = -4  # how many blocks may be such

# Whoever sets one of these, as a variable of its own or in GLIBC_TUNABLES, has decided.
SETTINGS = ("mmap_threshold", "trim_threshold", "top_pad", "mmap_max")


def keep_freed_memory() -> bool:
    """Have this process reuse the memory of large blocks. False where malloc is not glibc's, or is set by the user."""
    try:
        if platform.libc_ver()[0] != "glibc" or _set_by_user():
            return False
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # libc_ver reads Python's own file, CDLL may open nothing, mallopt may be missing
        return False
    # Until glibc 2.35 or so there is no such threshold above 32 MB, but one can do without mmap.
    reused = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_MAX, 0)
    return bool(reused and mallopt(M_TRIM_THRESHOLD, KEPT))


def _set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables for name in SETTINGS)
