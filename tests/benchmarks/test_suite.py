"""The test-suite as the lab runs it, on small suites written here: counts, failures, lacks, crashes, the deadline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import suite
from benchmarks.reporting import lacking_module, last_line

MIXED = """
import pytest
def test_right(): pass
@pytest.mark.parametrize("x", [1, 2])
def test_wrong(x): assert x == 1, "two is wrong"
@pytest.mark.skip(reason="not here")
def test_elsewhere(): pass
def test_lacking(): import no_such_package_of_others
@pytest.fixture
def leaving():
    yield
    raise RuntimeError("teardown")
def test_teardown(leaving): pass
"""
FILES = {
    "mixed": MIXED,
    "lacking": "import no_such_package_of_others\ndef test_x(): pass\n",
    "ours": "import benchmarks.no_such_module\ndef test_x(): pass\n",
    "skipped": "import pytest\npytest.importorskip('no_such_package_of_others')\ndef test_x(): pass\n",
    "crashing": "import os\ndef test_a(): pass\ndef test_b(): os.abort()\n",
    "right": "def test_a(): pass\ndef test_b(): pass\n",
    "slow": "import time\ndef test_wrong(): assert 0\ndef test_slow(): time.sleep(60)\n",
}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def play(*names: str, seconds: float = 60.0) -> dict[str, dict[str, Any]]:
        for name in names:
            (tmp_path / f"test_{name}.py").write_text(FILES[name])
        files, deadline = [f"test_{name}.py" for name in names], time.monotonic() + seconds
        results = suite.run(files, tmp_path / "log", deadline, {}, root=tmp_path)
        return {file[len("test_") : -len(".py")]: row for file, row in results}

    return play


def test_outcomes_of_a_file(run: Any) -> None:
    results = run("mixed", "lacking", "ours", "skipped", "right")
    mixed = results["mixed"]
    assert (mixed["verdict"], mixed["measured"]) == ("failed", "2 passed, 2 failed, 2 skipped")
    assert len(mixed["failures"]) == 2 and "two is wrong" in mixed["why"] and "teardown" in mixed["why"]
    assert results["lacking"]["verdict"] == "skipped" and "no_such_package_of_others" in results["lacking"]["why"]
    assert results["ours"]["verdict"] == "failed" and "no_such_module" in results["ours"]["why"]
    assert results["skipped"]["verdict"] == "skipped"
    assert (results["right"]["verdict"], results["right"]["measured"]) == ("met", "2 passed")


def test_a_crash_costs_its_file_only(run: Any) -> None:
    results = run("crashing", "right")
    assert results["crashing"]["verdict"] == "failed" and "SIGABRT" in results["crashing"]["why"]
    assert results["right"]["verdict"] == "met"


def test_at_the_deadline_what_is_not_done_is_missing_but_for_what_failed(run: Any) -> None:
    started = time.monotonic()
    results = run("slow", "right", seconds=6.0)
    assert time.monotonic() - started < 20
    assert "right" not in results and results["slow"]["verdict"] == "failed"


def test_only_packages_of_others_may_be_lacking() -> None:
    assert lacking_module("ModuleNotFoundError: No module named 'no_such_package'")
    assert lacking_module("ModuleNotFoundError: No module named 'lumiere_fast.nothing'") is None
    assert lacking_module("No module named 'torch'") is None  # it is here: something else is wrong
    assert last_line("x = 1\nE   assert 1 == 2\nE   more\nfile.py:3: AssertionError") == "assert 1 == 2"


def test_the_suite_leaves_out_the_one_that_runs_it() -> None:
    files = suite.test_files()
    assert "tests/benchmarks/test_suite.py" in files and suite.RUNS_THE_LAB not in files
    assert (suite.ROOT / suite.RUNS_THE_LAB).exists()
