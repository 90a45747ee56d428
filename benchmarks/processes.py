"""Running other programs until a deadline, and no longer. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT

WORKER = (sys.executable, "-m", "benchmarks.worker")
BROKEN_DEVICE = 3  # a worker's exit code after a unit that leaves the GPU unusable to its process


def start(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, root: Path = ROOT, **pipes: Any
) -> subprocess.Popen[str]:
    """In the tree, in a process group of its own; what it prints is appended to the log, but for `pipes`."""
    with log.open("a", encoding="utf-8") as file:
        print(f"$ {' '.join(command)}", file=file, flush=True)
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, **pipes}
        return subprocess.Popen(
            command, cwd=root, env={**os.environ, **(env or {})}, text=True, start_new_session=True, **streams
        )


def stop(process: subprocess.Popen[str]) -> None:
    """End the process and all that it started, and close what led to it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def run(command: Sequence[str], log: Path, deadline: float, env: Mapping[str, str] | None = None) -> int | None:
    """The exit code; None if the deadline came first."""
    process = start(command, log, env)
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        stop(process)


def died(code: int) -> str:
    """How a process ended, for people."""
    return f"the process died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with code {code}"


def work(
    units: Sequence[Any], device: str, log: Path, deadline: float, env: Mapping[str, str], limit: float
) -> Iterator[tuple[Any, list[dict[str, Any]] | str]]:
    """Each unit with its rows, or with how the worker died of it. Ends early, without the rest, at the deadline.

    Args:
        limit: seconds that one unit may take: a longer one hangs, and its worker is ended.
    """
    rest = list(units)
    while rest and time.monotonic() < deadline:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = start([*WORKER, device], log, env, **pipes)
        before = len(rest)
        try:
            _send(process, rest)
            for reply in _replies(process, deadline, limit):
                yield rest.pop(0), reply
        except TimeoutError:
            if time.monotonic() >= deadline:
                return
            yield rest.pop(0), f"no answer within {limit:.0f} s"
        else:
            code = process.wait()
            between_units = code == BROKEN_DEVICE and len(rest) < before
            if rest and not between_units:
                yield rest.pop(0), died(code)
        finally:
            stop(process)


def _send(process: subprocess.Popen[str], units: Sequence[Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once, which its exit code tells
        process.stdin.write(json.dumps(units))
        process.stdin.close()


def _replies(process: subprocess.Popen[str], deadline: float, limit: float) -> Iterator[list[dict[str, Any]]]:
    """One for each unit. The limit starts anew with each."""
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    until = min(deadline, time.monotonic() + limit)
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, until - time.monotonic())):
                raise TimeoutError
            block = os.read(descriptor, 1 << 16)
            if not block:
                return
            *complete, rest = (rest + block).split(b"\n")
            for line in complete:
                yield json.loads(line)
                until = min(deadline, time.monotonic() + limit)
