"""The pytest plugin of suite.py: appends a line of JSON for each outcome to the file named by --lab-events."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

# Names to import of packages that the package, or a test, does without; any other that is missing is a failure.
OPTIONAL = frozenset(
    {
        "PIL",
        "av",
        "einops",
        "google",
        "huggingface_hub",
        "hypothesis",
        "matplotlib",
        "pybind11",
        "sentencepiece",
        "tokenizers",
        "tqdm",
        "transformers",
        "triton",
        "typer",
    }
)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--lab-events", help="where the lab reads what became of each test")


def pytest_configure(config: Any) -> None:
    if config.getoption("--lab-events") and not hasattr(config, "workerinput"):  # xdist's workers report to us
        config.pluginmanager.register(_Reporter(Path(config.getoption("--lab-events"))))


class _Reporter:
    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")
        self.collected = False

    def tell(self, **event: Any) -> None:
        print(json.dumps(event), file=self.file, flush=True)

    def tell_collected(self, ids: Sequence[str]) -> None:
        names = [name.split("::")[0] for name in ids]
        for name in dict.fromkeys(names):
            self.tell(file=name, collected=names.count(name))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tell_collected([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """pytest-xdist's workers collect, each the same."""
        if not self.collected:
            self.collected = True
            self.tell_collected(ids)

    def pytest_collectreport(self, report: Any) -> None:
        name = report.nodeid.split("::")[0]
        if report.skipped and report.nodeid.endswith(".py"):
            self.tell(file=name, lacking=_reason(report))
        elif report.failed:
            text = str(report.longrepr)
            lacking = lacking_module(text)
            if lacking is not None:
                self.tell(file=name, lacking=lacking)
            else:
                self._outcome(name, name, "failed", "collect", 0.0, last_line(text))

    def pytest_runtest_logreport(self, report: Any) -> None:
        outcome, why = report.outcome, None
        if report.failed:
            text = str(report.longrepr)
            outcome, why = ("skipped", None) if lacking_module(text) is not None else ("failed", last_line(text))
        self._outcome(report.nodeid.split("::")[0], report.nodeid, outcome, report.when, report.duration, why)

    def _outcome(self, file: str, test: str, outcome: str, when: str, seconds: float, why: str | None) -> None:
        self.tell(file=file, test=test, outcome=outcome, when=when, seconds=seconds, why=why)


def lacking_module(text: str) -> str | None:
    """What a failed test lacks, where that is an optional package which is not installed here."""
    found = re.findall(r"^E +ModuleNotFoundError: No module named '(\w+)", text, re.MULTILINE)
    return next(filter(None, map(_lacking, found)), None)


def lacking_module_of(error: BaseException | None) -> str | None:
    """The same of an exception, or of what led to it."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and (lacking := _lacking((error.name or "").partition(".")[0])):
            return lacking
        error = error.__cause__ or error.__context__
    return None


def _lacking(name: str) -> str | None:
    missing = name in OPTIONAL and importlib.util.find_spec(name) is None
    return f"needs {name}, which is not installed" if missing else None


def last_line(text: str) -> str:
    """pytest's own `E` line, or the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if re.match(r"E\s", line)]
    return (errors or lines or [""])[0 if errors else -1][:300]


def _reason(report: Any) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
