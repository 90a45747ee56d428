"""The commands keep freed memory, seen by the pages that a process has to fault in again; importing changes nothing."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import NoReturn

import pytest

from lumiere_fast import _malloc

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")

SCRIPT = """
import json, resource, statistics
import torch
import lumiere_fast
from lumiere_fast import cli

def fault():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB, more than what glibc learns to keep
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def faults():  # of a usual round: one may come to lie elsewhere than the last
    return statistics.median([fault() for _ in range(9)])

imported = faults()
try:
    cli.main(["assemble", "--help"])
except SystemExit as end:
    assert not end.code
print(json.dumps([imported, faults()]))
"""


def faults_before_and_after_a_command(**environment: str) -> tuple[float, float]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    return before, after


@glibc
def test_a_command_keeps_freed_memory_and_an_import_does_not() -> None:
    before, after = faults_before_and_after_a_command()
    assert before > 100 and after < before / 10, (before, after)


@glibc
@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
def test_what_the_user_has_set_stays(environment: dict[str, str]) -> None:
    before, after = faults_before_and_after_a_command(**environment)
    assert before > 100 and after > before / 2, (before, after)


@pytest.mark.parametrize("name", _malloc.SETTINGS)
def test_any_such_setting_is_the_user_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", pytest.fail)
    with monkeypatch.context() as patch:
        patch.setenv(f"MALLOC_{name.upper()}_", "1")
        assert not _malloc.keep_freed_memory()
    monkeypatch.setenv("GLIBC_TUNABLES", f"glibc.rtld.nns=2:glibc.malloc.{name}=1")
    assert not _malloc.keep_freed_memory()


def test_a_glibc_that_refuses_the_threshold_goes_without_mmap(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def mallopt(parameter: int, value: int) -> int:
        asked.append((parameter, value))
        return int(parameter != _malloc.M_MMAP_THRESHOLD or value <= 32 * 2**20)

    monkeypatch.setattr(_malloc, "_set_by_user", lambda: False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert _malloc.keep_freed_memory()
    assert asked[1:] == [(_malloc.M_MMAP_MAX, 0), (_malloc.M_TRIM_THRESHOLD, 2**31 - 1)]


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(ctypes, "CDLL", pytest.fail)
    assert not _malloc.keep_freed_memory()


def fails_with(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_: object) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize(
    ("module", "name", "instead"),
    [
        (platform, "libc_ver", fails_with(FileNotFoundError("no such interpreter"))),
        (ctypes, "CDLL", fails_with(OSError("no symbols of this process"))),
        (ctypes, "CDLL", lambda name: SimpleNamespace()),  # without mallopt
    ],
    ids=["libc_ver", "CDLL", "mallopt"],
)
def test_where_malloc_cannot_be_told_nothing_happens(
    module: ModuleType, name: str, instead: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_malloc, "_set_by_user", lambda: False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(module, name, instead)
    assert not _malloc.keep_freed_memory()


@glibc
def test_a_setting_of_something_else_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _malloc.SETTINGS:
        monkeypatch.delenv(f"MALLOC_{name.upper()}_", raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert _malloc.keep_freed_memory()
