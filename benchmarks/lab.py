"""Everything there is to know about the kernels on one machine, in one command that can be stopped and resumed:

    python -m benchmarks.lab --out DIR [--budget SECONDS] [--part correctness|speed] [--device cpu|cuda]
    python -m benchmarks.lab --publish DIR

It builds, holds every kernel against its reference, runs the test-suite on the device and the kernels under
compute-sanitizer, reads the static resource gate, finds the kernels' fastest configurations, and with these times every
op on every backend against its goals. What is measured goes at once into DIR/record.json; DIR/table.md is made from it
and printed last, and DIR/<gpu>.json, which kernels/configs may ship. A run that finds a record goes on from it: rows
whose source, machine and versions are as they were are kept, the stalest evidence comes first. What the budget has no
room for is left for the next run. An op on a backend that any check found wrong is neither tuned nor timed.
The exit code is 1 if anything is wrong, 2 for arguments that make no sense.

It starts from a bare source tree: this process imports neither torch nor the package, its workers do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gate, processes, provenance, publish, sanitizer, suite
from benchmarks.record import (
    FAILED,
    MET,
    SKIPPED,
    STAGES,
    TABLE_NAME,
    Record,
    Row,
    is_current,
    is_red,
    key_of,
    summary,
    table,
    this_cpu,
    write_atomically,
)

PARTS = {
    "correctness": ("build", "smoke", "tests", "sanitizer", "resources"),
    "speed": ("build", "smoke", "tuning", "benchmarks"),
    None: STAGES,
}
# Of the budget, for each stage; what one does not use the later ones may.
SHARES = {
    "build": 0.22,
    "smoke": 0.15,
    "tests": 0.25,
    "sanitizer": 0.07,
    "resources": 0.1,
    "tuning": 0.07,
    "benchmarks": 0.14,
}
HANGS_AFTER = {"smoke": 90.0, "tuning": 440.0, "benchmarks": 300.0}  # seconds that one unit of work may take
ROW_BUDGET = 0.3  # seconds of timed rounds a row
CASE_BUDGET = 400.0  # seconds for all candidates of a case, to compile, check and time them
BACKENDS = ("triton", "wgmma", "cuda", "cpu", "cudnn", "flash", "efficient", "reference")
ORDER = "_order"  # a table of backends' places is named <op>_order
TRITON_TESTS = "tests/kernels/"
MODEL_TESTS = ("tests/models/", "tests/pipelines/")
MODELS = ("stunet", "super_resolution", "pipeline")
LOG = "lab.log"

LOOK = """
import json, lumiere_fast
from lumiere_fast import kernels, native
print(json.dumps([lumiere_fast.__file__, kernels.__file__, {half: native.why_not(half) for half in native.HALVES}]))
"""


@dataclass(frozen=True)
class Options:
    """The command's; `device` None for the GPU where there is one."""

    out: Path
    budget: float = 480.0
    part: str | None = None
    device: str | None = None
    ops: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = ()
    commit: str | None = None
    compile: bool = False
    build: bool = True


class Lab:
    """One run: `run` goes through the stages, each a method of its own that writes rows until its deadline."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.started = time.monotonic()
        self.record = Record(options.out)
        self.log = options.out / LOG
        self.machine: dict[str, Any] = this_cpu()
        self.described: dict[str, Any] = {}
        self.commit = {**provenance.commit_as(options.commit), "tree": provenance.hash_of(*provenance.TESTED)}
        self.env = {"TRITON_INTERPRET": "0", **({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})}

    def run(self) -> int:
        """All stages within the budget; the exit code."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        for stage, deadline in self.deadlines():
            getattr(self, stage)(deadline)
            if stage == "build" and not self.describe(deadline):
                break
        return self.report()

    def deadlines(self) -> Iterator[tuple[str, float]]:
        stages = PARTS[self.options.part]
        total, spent = sum(SHARES[stage] for stage in stages), 0.0
        for stage in stages:
            spent += SHARES[stage] / total
            yield stage, self.started + self.options.budget * spent

    def report(self) -> int:
        rows = self.record.sorted_rows()
        name = self.machine["gpu"] or self.machine["cpu"]
        lines = [f"{name}, {json.dumps(self.machine['versions'])}, commit {self.commit['commit']}", "", table(rows)]
        lines += ["", summary(rows)]
        if any(row["left"] for row in rows):
            lines += ["Some is left: run again with the same --out to go on."]
        write_atomically(self.options.out / TABLE_NAME, "\n".join(lines) + "\n")
        print("\n".join(lines), flush=True)
        return int(any(map(is_red, rows)))

    # ------------------------------------------------------------ rows

    def put(self, stage: str, row: Row, source: str | None = None) -> None:
        """Complete a row and write it: what it is about, what was found, and where that comes from."""
        empty = dict.fromkeys(("op", "backend", "scenario", "dtype", "threads", "goal", "measured", "ratio", "why"))
        rest = {"numbers": None, "seconds": None, "left": False, "under_way": False, "source": source}
        origin = {**self.commit, "date": provenance.now(), **self.machine}
        self.record.put({"stage": stage, **empty, **rest, **row, **origin})

    def leave(self, stage: str, row: Row, source: str | None, under_way: bool = False) -> None:
        """Say that something is left for the next run, unless what the record has of it still holds."""
        known = self.record.find(key_of({"stage": stage, **row}))
        if known is None or known["left"] or not is_current(known, source, self.machine):
            why = f"left for the next run: the budget is spent{' and it was under way' if under_way else ''}"
            left = {"verdict": SKIPPED, "why": why, "left": True, "under_way": under_way}
            self.put(stage, {**row, **left}, source)

    def holds(self, stage: str, row: Row, source: str | None) -> bool:
        """Whether the record has a row for this source, machine and versions that is not red and was not left."""
        known = self.record.find(key_of({"stage": stage, **row}))
        return known is not None and is_current(known, source, self.machine) and not is_red(known) and not known["left"]

    def date_of(self, stage: str, row: Row) -> str:
        """When the record's row was made; earlier than any if there is none."""
        known = self.record.find(key_of({"stage": stage, **row}))
        return "" if known is None or known["left"] else known["date"]

    def work(self, units: Sequence[Row], deadline: float) -> Iterator[tuple[Row, list[Row] | str]]:
        """Each unit with what a worker process found, or how it died of it, until the deadline."""
        limit = max((HANGS_AFTER[unit["stage"]] for unit in units), default=0.0)
        return processes.work(units, self.machine["device"], self.log, deadline, self.env, limit)

    def wants(self, op: str) -> bool:
        return not self.options.ops or op in self.options.ops

    # ------------------------------------------------------------ stages

    def build(self, deadline: float) -> None:
        """Install the tree in place, unless it is, with an up-to-date native core."""
        source = provenance.hash_of("csrc", "CMakeLists.txt", "setup.py")
        if not self.options.build:
            self.put("build", {"verdict": SKIPPED, "why": "not asked for: the package as it is installed"}, source)
            return
        if self._lacks() == {}:
            self.put("build", {"verdict": MET, "measured": "installed from this tree, native core current"}, source)
            return
        started = time.monotonic()
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        code = processes.run(command, self.log, deadline)
        lacks = self._lacks() if code == 0 else None
        if lacks is None:
            ended = {None: "the build did not end in time", 0: "it installs, and cannot be imported"}
            why = f"{ended.get(code, f'pip ended with code {code}')}; see {LOG}"
            self.put("build", {"verdict": FAILED, "why": why}, source)
        else:
            why = "; ".join(f"{half}: {reason}" for half, reasons in lacks.items() for reason in reasons)
            told = f"built in {time.monotonic() - started:.0f} s"
            self.put("build", {"verdict": MET, "measured": told, "why": why or None}, source)

    def _lacks(self) -> dict[str, list[str]] | None:
        """What stands against each half of the native core that could be here; None if no such package is installed."""
        done = subprocess.run(
            [sys.executable, "-c", LOOK], cwd=provenance.ROOT, capture_output=True, text=True, env=os.environ | self.env
        )
        if done.returncode != 0:
            return None
        *files, halves = json.loads(done.stdout.splitlines()[-1])
        if not all(Path(file).is_relative_to(provenance.ROOT) for file in files):
            return None
        wanted = ("cpu", "cuda") if self.options.device != "cpu" and shutil.which("nvcc") else ("cpu",)
        return {half: halves[half] for half in wanted if halves[half]}

    def describe(self, deadline: float) -> bool:
        """Learn what machine this is and what there is to do on it; whether the package works at all."""
        described = self.ask(deadline)
        if described is None:
            self.put("build", {"verdict": FAILED, "why": f"the package cannot be imported here; see {LOG}"})
            return False
        self.described, self.machine = described, described["machine"]
        self._check_machine()
        self._forget_what_is_gone()
        return True

    def ask(self, deadline: float) -> dict[str, Any] | None:
        """A worker's description; None if it has none to give."""
        command = [*processes.WORKER, self.options.device or "auto", "--describe"]
        process = processes.start(command, self.log, self.env, stdout=subprocess.PIPE)
        try:
            told, _ = process.communicate(timeout=max(60.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            processes.stop(process)
        return dict(json.loads(told)) if process.returncode == 0 else None

    def _check_machine(self) -> None:
        key = "gpu" if self.machine["device"] == "cuda" else "cpu"
        for row in self.record.rows.values():
            if row["device"] is not None and (row["device"], row[key]) != (self.machine["device"], self.machine[key]):
                raise ValueError(
                    f"{self.options.out} holds the record of {row['gpu'] or row['cpu']}, this is {self.machine[key]}; "
                    "give another folder"
                )

    def _forget_what_is_gone(self) -> None:
        units = {key_of(unit) for unit in (*self.described["tuning"], *self.described["benchmarks"])}
        files = set(suite.test_files())
        self.record.rows = {
            key: row
            for key, row in self.record.rows.items()
            if (row["stage"] not in ("tuning", "benchmarks") or key in units)
            and (row["stage"] != "tests" or row["scenario"] in files)
        }

    def smoke(self, deadline: float) -> None:
        """Every kernel against its reference; always, for it tells of this build on this machine at this time."""
        units = [{"stage": "smoke", "op": op} for op in self.described["ops"] if self.wants(op)]
        waiting = {unit["op"] for unit in units}
        for unit, reply in self.work(units, deadline):
            waiting.discard(unit["op"])
            self._forget("smoke", unit["op"])
            if isinstance(reply, str):
                reply = [{"op": unit["op"], "verdict": FAILED, "why": f"{reply}; see {LOG}"}]
            for row in reply:
                self.put("smoke", row, row.get("source"))
        for op in sorted(waiting):
            self.leave("smoke", {"op": op}, None)

    def _forget(self, stage: str, op: str | None) -> None:
        """Every row of a stage, or those of one op."""
        rows = self.record.rows.items()
        self.record.rows = {key: row for key, row in rows if row["stage"] != stage or op not in (None, row["op"])}

    def tests(self, deadline: float) -> None:
        source = self.commit["tree"]
        rows = {file: {"scenario": file, "op": self._op_of(file)} for file in suite.test_files()}
        rows = {file: row for file, row in rows.items() if not self.options.ops or row["op"] in self.options.ops}
        todo = [file for file, row in rows.items() if not self.holds("tests", row, source)]
        todo.sort(key=lambda file: (suite.urgency(file), self.date_of("tests", rows[file])))
        done = set()
        if time.monotonic() < deadline:
            for file, row in suite.run(todo, self.log, deadline, self.env):
                done.add(file)
                self.put("tests", {**rows[file], **row}, source)
        for file in todo:
            if file not in done:
                self.leave("tests", rows[file], source)

    def _op_of(self, file: str) -> str | None:
        name = Path(file).stem.removeprefix("test_")
        return name if name in self.described["ops"] else None

    def sanitizer(self, deadline: float) -> None:
        source = provenance.hash_of("kernels", "csrc", "CMakeLists.txt")
        on_gpu = self.machine["device"] == "cuda"
        for row in sanitizer.rows(on_gpu, self.log, deadline, lambda row: self.holds("sanitizer", row, source)):
            if row.get("left"):
                self.leave("sanitizer", {"scenario": row["scenario"]}, source)
            else:
                self.put("sanitizer", row, source)

    def resources(self, deadline: float) -> None:
        """The static gate: what the compiler made of every kernel that ships. Anew as a whole; it has its own cache."""
        source = provenance.hash_of("kernels", "csrc", "benchmarks/resources.py")
        for op in self.options.ops or (None,):
            known = [
                row for row in self.record.rows.values() if row["stage"] == "resources" and op in (None, row["op"])
            ]
            if known and all(self.holds("resources", row, source) for row in known):
                continue
            rows = gate.rows(op, self.log, deadline)
            if rows is None:
                self.leave("resources", {"op": op}, source)
                continue
            self._forget("resources", op)
            for row in rows:
                self.put("resources", row, source)

    def tuning(self, deadline: float) -> None:
        """Each case of the kernels that have configurations; the winners go into a table beside the record."""
        if not self.described["tuning"]:
            self.put("tuning", {"verdict": SKIPPED, "why": "nothing to tune: configurations are those of a GPU"})
            return
        units = [unit for unit in self.described["tuning"] if self.wants(unit["op"]) and self._is_here(unit)]
        self._measure("tuning", units, deadline, {"budget": CASE_BUDGET})
        if tuned := self.tuned():
            content = {"gpu": self.machine["gpu"], **tuned}
            write_atomically(self.configs, json.dumps(content, indent=1) + "\n")

    @property
    def configs(self) -> Path:
        """The table of what was tuned here, in the form of those in kernels/configs."""
        return self.options.out / str(self.described["configs"])

    def tuned(self, unless_default: bool = False) -> dict[str, dict[str, Any]]:
        """By table and case the configurations found here, or those of them that are not the default."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.record.sorted_rows():
            numbers = row["numbers"] if row["stage"] == "tuning" else None
            if numbers and not (unless_default and numbers["config"] == numbers["default"]):
                found.setdefault(numbers["op"], {})[row["scenario"]] = numbers["config"]
        return found

    def benchmarks(self, deadline: float) -> None:
        """Every op on every backend that is right here."""
        configs = str(self.configs.resolve()) if self.tuned() else None
        units = [
            {**unit, "source": self._source(unit)} for unit in self.described["benchmarks"] if self._is_wanted(unit)
        ]
        settings = {"budget": ROW_BUDGET, "compile": self.options.compile, "configs": configs}
        self._measure("benchmarks", units, deadline, settings)

    def _source(self, unit: Row) -> str | None:
        """Of what is timed: the kernel's, and the configurations found here that it runs with."""
        chosen = self.tuned(unless_default=True) if unit["backend"] in ("triton", "auto") else {}
        used = {table: cases for table, cases in chosen.items() if unit["op"] in (table.removesuffix(ORDER), *MODELS)}
        if not used:
            return None if unit["source"] is None else str(unit["source"])
        digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()
        return f"{unit['source']} tuned {digest[:16]}"

    def _measure(self, stage: str, units: Sequence[Row], deadline: float, settings: Row) -> None:
        """Those units whose rows do not hold any more and that nothing speaks against, in the order of `_urgency`."""
        todo = []
        for unit in units:
            red = self.red(unit["op"], unit["backend"])
            if red is not None:
                why = f"not timed: correctness red ({red})"
                self.put(stage, {**_about(unit), "verdict": SKIPPED, "why": why, "left": True}, unit["source"])
            elif not self.holds(stage, unit, unit["source"]):
                todo.append(unit)
        todo.sort(key=self._urgency)
        done, began = 0, time.monotonic() < deadline
        for unit, reply in self.work([{**unit, **settings} for unit in todo], deadline):
            done += 1
            row = {"verdict": FAILED, "why": f"{reply}; see {LOG}"} if isinstance(reply, str) else reply[0]
            self.put(stage, {**_about(unit), **row}, unit["source"])
        for number, unit in enumerate(todo[done:]):
            self.leave(stage, _about(unit), unit["source"], under_way=began and number == 0)

    def _is_wanted(self, unit: Row) -> bool:
        """What the user asked for, on a backend that is here: one row of the smoke tells of the others."""
        named = not self.options.scenarios or unit["scenario"] in self.options.scenarios
        return self.wants(unit["op"]) and named and self._is_here(unit)

    def _is_here(self, unit: Row) -> bool:
        if unit["backend"] in ("reference", "auto"):
            return True
        row = self.record.find(key_of({"stage": "smoke", "op": unit["op"], "backend": unit["backend"]}))
        return row is None or row["verdict"] != SKIPPED

    def _urgency(self, unit: Row) -> tuple[Any, ...]:
        known = self.record.find(key_of(unit)) or {}
        stale = known.get("under_way", False), self.date_of(unit["stage"], unit)  # what was cut off holds up no others
        return *stale, unit["backend"] == "reference", unit["traffic"], unit["op"], unit["scenario"], unit["threads"]

    # ------------------------------------------------------------ what is wrong

    def red(self, op: str, backend: str) -> str | None:
        """Why this op on this backend must not be timed: what failed, or that nothing was checked; else None."""
        for row in self.record.rows.values():
            if is_red(row) and accuses(row, op, backend):
                named = (row["stage"], row["op"], row["backend"], row["scenario"])
                return " ".join(part for part in named if part)
        if op in MODELS or backend in ("reference", "auto"):
            return None
        smoke = self.record.find(key_of({"stage": "smoke", "op": op, "backend": backend}))
        return None if smoke is not None and smoke["verdict"] == MET else "not checked yet"


def accuses(row: Row, op: str, backend: str) -> bool:
    """Whether a red row speaks against an op on a backend. A model is as wrong as any op that it may use."""
    if row["stage"] == "sanitizer":
        return backend != "reference"
    if row["stage"] not in ("smoke", "tests"):
        return False
    if op in MODELS:
        return row["op"] is not None or str(row["scenario"]).startswith(MODEL_TESTS)
    if row["op"] != op:
        return False
    named = {row["backend"]} if row["stage"] == "smoke" else _backends_named(row)
    return backend in named or (named <= {None} and (row["stage"] == "tests" or backend != "reference"))


def _backends_named(row: Row) -> set[str]:
    """The backends that the failed tests speak of; none, and so all, where one of them names none."""
    named = [_backends_in(test) for test in row["failures"]]
    return set().union(*named) if named and all(named) else set()


def _backends_in(test: str) -> set[str]:
    return {"triton"} if test.startswith(TRITON_TESTS) else set(re.findall(r"[a-z]+", test)) & set(BACKENDS)


def _about(unit: Row) -> Row:
    return {name: unit[name] for name in ("op", "backend", "scenario", "dtype", "threads")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab", description=(__doc__ or "").partition("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="DIR", help="where the record is, or is to be")
    action.add_argument("--publish", type=Path, metavar="DIR", help="put DIR's record into benchmarks/results")
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="of the whole run (480)")
    parser.add_argument("--part", choices=("correctness", "speed"), help="one half; both if left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the GPU where there is one if left out")
    parser.add_argument("--op", action="append", default=[], help="only this op and its tests; may be repeated")
    parser.add_argument("--scenario", action="append", default=[], help="time only this scenario; may be repeated")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the baselines: slow")
    parser.add_argument("--commit", help="of a tree that came without its history")
    parser.add_argument("--no-build", action="store_true", help="take the package as it is installed")
    given = parser.parse_args(arguments)
    try:
        if given.publish is not None:
            print(publish.publish(given.publish))
            return 0
        if not given.budget > 0:
            raise ValueError(f"--budget must be a positive number of seconds, got {given.budget}")
        ops, scenarios, build = tuple(given.op), tuple(given.scenario), not given.no_build
        options = Options(
            given.out, given.budget, given.part, given.device, ops, scenarios, given.commit, given.compile, build
        )
        return Lab(options).run()
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks.lab: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
