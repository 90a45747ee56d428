"""One process a folder: who is refused, what a killed holder leaves, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lumiere_fast.training.lock import LOCK_NAME, locked

fcntl = pytest.importorskip("fcntl")

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])  # alone, without torch: it starts sooner
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
with lock.locked(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    module = ROOT / "lumiere_fast" / "training" / "lock.py"
    command = [sys.executable, "-c", HOLDER, str(module), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_another_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holder(folder) as process:
        with pytest.raises(BlockingIOError, match=r"another process is training in .*run: wait for it"), locked(folder):
            pytest.fail("two at once")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert (folder / LOCK_NAME).exists()
    with locked(folder):
        pass
    assert not (folder / LOCK_NAME).exists()


def test_an_empty_folder_goes_again_and_a_full_one_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "deep" / "failed"):
        raise KeyError
    assert not (tmp_path / "deep" / "failed").exists()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("kept")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert not list((tmp_path / "mine").iterdir())


def test_a_file_that_its_holder_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before its holder unlinked it, locked after: the next one would lock a new file beside it."""
    flock, inodes = fcntl.flock, []

    def late(file: int, operation: int) -> None:
        if not inodes:
            (tmp_path / LOCK_NAME).unlink()
        inodes.append(os.fstat(file).st_ino)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert len(inodes) == 2
        assert (tmp_path / LOCK_NAME).stat().st_ino == inodes[-1]


def test_a_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_without_fcntl_there_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked(tmp_path / "run"), locked(tmp_path / "run"):
        assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="file is a file; a run needs a folder"), locked(tmp_path / "file"):
        pass
