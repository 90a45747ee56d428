"""The test-suite as the lab runs it, on small suites written here: counts, failures, lacks, crashes, the deadline."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import suite
from benchmarks.reporting import OPTIONAL, lacking_module, lacking_module_of, last_line

MIXED = """
import pytest
def test_right(): pass
@pytest.mark.parametrize("x", [1, 2])
def test_wrong(x): assert x == 1, "two is wrong"
@pytest.mark.skip(reason="not here")
def test_elsewhere(): pass
def test_lacking(): import sentencepiece
@pytest.fixture
def leaving():
    yield
    raise RuntimeError("teardown")
def test_teardown(leaving): pass
"""
FILES = {
    "mixed": MIXED,
    "lacking": "import sentencepiece\ndef test_x(): pass\n",
    "ours": "import benchmarks.no_such_module\ndef test_x(): pass\n",
    "misspelt": "def test_x(): import lumiere_fastt\n",
    "skipped": "import pytest\npytest.importorskip('sentencepiece')\ndef test_x(): pass\n",
    "crashing": "import os\ndef test_a(): pass\ndef test_b(): os.abort()\n",
    "right": "def test_a(): pass\ndef test_b(): pass\n",
    "slow": "import time\ndef test_wrong(): assert 0\ndef test_slow(): time.sleep(60)\n",
}


HIDING = """
import sys
from importlib.machinery import PathFinder
class Hiding:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] == "sentencepiece" else PathFinder.find_spec(name, path, target)
    find_distributions, invalidate_caches = PathFinder.find_distributions, PathFinder.invalidate_caches
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs these files where sentencepiece is not installed, which PYTHONPATH sees to: the suite has to hand it on."""
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDING)
    path = os.pathsep.join(filter(None, [str(tmp_path / "hiding"), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)

    def play(*names: str, seconds: float = 60.0) -> dict[str, dict[str, Any]]:
        for name in names:
            (tmp_path / f"test_{name}.py").write_text(FILES[name])
        files, deadline = [f"test_{name}.py" for name in names], time.monotonic() + seconds
        results = suite.run(files, tmp_path / "log", deadline, {}, root=tmp_path)
        return {file[len("test_") : -len(".py")]: row for file, row in results}

    return play


def test_outcomes_of_a_file(run: Any) -> None:
    results = run("mixed", "lacking", "ours", "misspelt", "skipped", "right")
    mixed = results["mixed"]
    assert (mixed["verdict"], mixed["measured"]) == ("failed", "2 passed, 2 failed, 2 skipped")
    assert len(mixed["failures"]) == 2 and "two is wrong" in mixed["why"] and "teardown" in mixed["why"]
    assert results["lacking"]["verdict"] == "skipped" and "sentencepiece" in results["lacking"]["why"]
    assert results["ours"]["verdict"] == "failed" and "no_such_module" in results["ours"]["why"]
    assert results["misspelt"]["verdict"] == "failed" and "lumiere_fastt" in results["misspelt"]["why"]
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


def missing(name: str) -> str:
    return f"test_x.py:3: in <module>\nE   ModuleNotFoundError: No module named '{name}'\nmore"


def test_only_known_optional_packages_may_be_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.reporting.importlib.util.find_spec", lambda name: None)
    assert lacking_module(missing("av")) == "needs av, which is not installed"
    assert lacking_module(missing("av.codec")) == "needs av, which is not installed"
    for name in ("lumiere_fastt", "lumiere_fast.nothing", "no_such_package", "torch", "numpy", "safetensors"):
        assert lacking_module(missing(name)) is None
    assert lacking_module("E   AssertionError: No module named 'av'") is None  # a message that somebody compares
    assert not OPTIONAL & {"lumiere_fast", "benchmarks", "tests", "kernels", "torch", "numpy", "safetensors", "pytest"}


def test_an_optional_package_that_is_here_is_not_lacking() -> None:
    assert lacking_module(missing("hypothesis")) is None
    assert lacking_module_of(ModuleNotFoundError("x", name="hypothesis")) is None


def test_what_led_to_an_error_may_be_a_lacking_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.reporting.importlib.util.find_spec", lambda name: None)
    cause = ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers.models")
    told = ImportError("the text encoder needs the tokenizers package")
    told.__cause__ = cause
    assert lacking_module_of(told) == lacking_module_of(cause) == "needs tokenizers, which is not installed"
    assert lacking_module_of(ImportError("something else")) is None
    assert lacking_module_of(ModuleNotFoundError("x", name="lumiere_fastt")) is None


def test_last_line() -> None:
    assert last_line("x = 1\nE   assert 1 == 2\nE   more\nfile.py:3: AssertionError") == "assert 1 == 2"


def test_what_proves_kernels_comes_first() -> None:
    files = suite.test_files()
    assert [suite.urgency(file) for file in files] == sorted(map(suite.urgency, files))
    first = [file.rpartition("/")[0] if file.count("/") > 1 else file for file in files]
    kinds = list(dict.fromkeys(first))
    assert kinds[:4] == ["tests/kernels", "tests/ops", "tests/test_native.py", "tests/test_native_core.py"]
    assert files[-1].startswith("tests/") and suite.urgency("tests/test_cli.py") == suite.urgency(
        "tests/data/test_x.py"
    )


def test_the_suite_leaves_out_the_one_that_runs_it() -> None:
    files = suite.test_files()
    assert "tests/benchmarks/test_suite.py" in files and suite.RUNS_THE_LAB not in files
    assert (suite.ROOT / suite.RUNS_THE_LAB).exists()
