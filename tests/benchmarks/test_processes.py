"""Workers that answer, die, hang and outlast the deadline, played by a small program."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import processes

# Each unit says what the worker shall do with it.
PLAYER = """
import json, os, signal, sys, time
for unit in json.load(sys.stdin):
    if unit == "die": os.kill(os.getpid(), signal.SIGSEGV)
    if unit == "leave": sys.exit(0)
    if unit == "hang": time.sleep(60)
    print("noise", file=sys.stderr)
    print(json.dumps([{"unit": unit, "device": sys.argv[1], "pid": os.getpid()}]), flush=True)
    if unit == "broken device": sys.exit(3)
"""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    program = tmp_path / "player.py"
    program.write_text(PLAYER)
    monkeypatch.setattr(processes, "WORKER", (sys.executable, str(program)))

    def run(units: list[str], seconds: float = 30.0, limit: float = 20.0) -> list[tuple[Any, Any]]:
        return list(processes.work(units, "cpu", tmp_path / "log", time.monotonic() + seconds, {}, limit))

    return run


def test_one_worker_answers_for_each_unit(play: Any, tmp_path: Path) -> None:
    results = play(["a", "b"])
    assert [(unit, reply[0]["unit"], reply[0]["device"]) for unit, reply in results] == [
        ("a", "a", "cpu"),
        ("b", "b", "cpu"),
    ]
    assert len({reply[0]["pid"] for _, reply in results}) == 1
    assert "noise" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("deed", "word"), [("die", "SIGSEGV"), ("leave", "code 0")])
def test_a_death_is_the_unit_s_and_the_rest_goes_on(play: Any, deed: str, word: str) -> None:
    (_, a), (died, why), (_, b) = play(["a", deed, "b"])
    assert died == deed and word in why
    assert a[0]["unit"] == "a" and b[0]["unit"] == "b" and a[0]["pid"] != b[0]["pid"]


def test_a_hang_is_ended_at_the_limit_and_the_rest_goes_on(play: Any) -> None:
    started = time.monotonic()
    (unit, why), (_, reply) = play(["hang", "a"], limit=1.0)
    assert unit == "hang" and "1 s" in why and reply[0]["unit"] == "a"
    assert time.monotonic() - started < 10


def test_a_device_that_broke_between_units_is_nobody_s_death(play: Any) -> None:
    replies = [reply for _, reply in play(["broken device", "a"])]
    assert [reply[0]["unit"] for reply in replies] == ["broken device", "a"]
    assert replies[0][0]["pid"] != replies[1][0]["pid"]


def test_the_deadline_ends_it_without_the_rest(play: Any) -> None:
    started = time.monotonic()
    assert [unit for unit, _ in play(["a", "hang", "b"], seconds=1.0)] == ["a"]
    assert time.monotonic() - started < 5


def test_run_gives_the_code_or_none_at_the_deadline(tmp_path: Path) -> None:
    def code(program: str, seconds: float) -> int | None:
        return processes.run([sys.executable, "-c", program], tmp_path / "log", time.monotonic() + seconds)

    assert code("raise SystemExit(5)", 20) == 5
    assert code("import time; time.sleep(60)", 0.2) is None
