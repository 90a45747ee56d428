"""Which folders become which packages, and how the native core is built; everything else is said in pyproject.toml.

The Triton kernels live in ``kernels/`` at the top of the tree and are installed as ``lumiere_fast.kernels``. That
mapping needs ``package_dir``, and with it an editable install needs PEP 660 (``pip install -e .``, setuptools >= 64).

The native core is built by CMake. An install succeeds without it: ``lumiere_fast/_native_build.json`` then says what
was missing, and ``python -m lumiere_fast.info`` repeats it. Read from the environment:

    LUMIERE_FAST_SKIP_NATIVE=1    do not build it
    LUMIERE_FAST_CUDA_ARCHS       architectures of the CUDA half, "80;90a" by default; "none" leaves it out
    MAX_JOBS                      compilations at a time; by default as many as the cores and the memory allow
    CC, CXX, CUDACXX, CXXFLAGS    as CMake reads them
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
KERNELS = "lumiere_fast.kernels"
MODULE = "lumiere_fast._native"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
DEFAULT_ARCHS = "80;90a"
LOG_LINES = 25


class StepFailed(Exception):
    """A step of the build went wrong; `log` is the end of what it printed."""

    def __init__(self, reason: str, log: list[str] | None = None) -> None:
        super().__init__(reason)
        self.log = log or []


def build_native(package: Path) -> dict[str, Any]:
    """Build the module into the folder `package` and return the report on it; without one, no module is left there."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    report: dict[str, Any] = {
        "version": version and version[1],
        "cpu": {"built": False, "why_not": None},
        "cuda": {"built": False, "why_not": None},
        "info": None,
        "log": [],
    }
    module = package / f"_native{SUFFIX}"
    try:
        built = _build_halves(report)
    except StepFailed as failure:
        report["cpu"]["why_not"] = str(failure)
        report["cuda"]["why_not"] = report["cuda"]["why_not"] or str(failure)
        report["log"] = failure.log
        module.unlink(missing_ok=True)
        return report
    package.mkdir(parents=True, exist_ok=True)
    # Not over the old file: a process that has it mapped would crash.
    fresh = shutil.copy2(built, f"{module}.new")
    os.replace(fresh, module)
    return report


def _build_halves(report: dict[str, Any]) -> Path:
    """Both halves, or the CPU's with the reason why not CUDA's in the report. Returns the module."""
    if os.environ.get("LUMIERE_FAST_SKIP_NATIVE", "") not in ("", "0"):
        raise StepFailed("LUMIERE_FAST_SKIP_NATIVE was set at the install: unset it and install again")
    archs, jobs = _cuda_archs(), _jobs()
    _require_compilers()
    folder = _build_folder()
    nvcc = _nvcc()
    if archs is None:
        report["cuda"]["why_not"] = "LUMIERE_FAST_CUDA_ARCHS was none at the install: unset it and install again"
    elif not nvcc:
        named = os.environ.get("CUDACXX")
        missing = f"CUDACXX was {named}, which is not there" if named else "nvcc is neither on PATH nor in CUDA_HOME"
        report["cuda"]["why_not"] = f"{missing}: install CUDA 12.1 or newer, then install again"
    else:
        settings = ["-DLF_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DLF_CUDA_ARCHS={archs}"]
        _forget_another_nvcc(folder, nvcc)
        try:
            _configure(folder, jobs, settings)
            return _compile(folder, jobs, report, "cuda", "cpu")
        except StepFailed as failure:
            report["cuda"]["why_not"] = f"with nvcc {nvcc}, {failure}"
            report["log"] = failure.log
    _configure(folder, jobs, ["-DLF_CUDA=OFF"])
    return _compile(folder, jobs, report, "cpu")


def _cuda_archs() -> str | None:
    """CMake's list of architectures; None where the CUDA half is not wanted."""
    given = os.environ.get("LUMIERE_FAST_CUDA_ARCHS", "").strip() or DEFAULT_ARCHS
    if given.lower() == "none":
        return None
    archs = re.split(r"[;,\s]+", given)
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", arch)]
    if wrong:
        raise SystemExit(
            f"LUMIERE_FAST_CUDA_ARCHS has {', '.join(map(repr, wrong))}; it takes architectures as CMake names them, "
            f'separated by ";" ("{DEFAULT_ARCHS}"), or "none"'
        )
    return ";".join(archs)


def _jobs() -> str:
    """What MAX_JOBS says, "" for nothing."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if given and not (given.isdecimal() and int(given) > 0):
        raise SystemExit(f"MAX_JOBS is {given!r}; it takes a number of processes")
    return given


def _nvcc() -> str | None:
    if "CUDACXX" in os.environ:
        return shutil.which(os.environ["CUDACXX"])
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [Path(home) / "bin" / "nvcc" for home in (*homes, "/usr/local/cuda")]
    return shutil.which("nvcc") or next((str(place) for place in places if os.access(place, os.X_OK)), None)


def _require_compilers() -> None:
    """Before CMake is asked, which takes many lines to say it."""
    if sys.platform == "win32":
        return  # where CMake also looks in places that no variable names
    for variable, language, names, remedy in (
        ("CXX", "C++", ("c++", "g++", "clang++"), "g++ or clang++"),
        ("CC", "C", ("cc", "gcc", "clang"), "gcc or clang"),
    ):
        given = shlex.split(os.environ.get(variable, ""))[:1]  # what follows are options
        if not any(map(shutil.which, given or names)):
            looked = f"{variable}={given[0]}" if given else f"none of {', '.join(names)} is on PATH"
            raise StepFailed(f"no {language} compiler was found ({looked}): install {remedy}, then install again")


def _tool(name: str) -> str:
    """A program of this environment, activated or not, or else of the system."""
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if found is None:
        raise StepFailed(_missing(name))
    return found


def _missing(name: str) -> str:
    return f"{name} was not found: `pip install {name}`, or install without --no-build-isolation"


def _build_folder() -> Path:
    """Kept from one build to the next, so that only what changed is compiled; emptied where it is for other tools."""
    folder = ROOT / "build" / f"native{SUFFIX.removesuffix('.so')}"
    names = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS")
    tools = json.dumps([sys.base_prefix, str(ROOT), *(os.environ.get(name) for name in names)])
    note = folder / "tools.json"
    if folder.exists() and not (note.is_file() and note.read_text() == tools):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(tools)
    return folder


def _forget_another_nvcc(folder: Path, nvcc: str) -> None:
    """CMake cannot change it in a folder that has been configured: it would lose the other settings."""
    cache = folder / "CMakeCache.txt"
    known = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.+)$", cache.read_text(), re.MULTILINE) if cache.is_file() else None
    if known and known[1] != nvcc:
        cache.unlink()
        shutil.rmtree(folder / "CMakeFiles")


def _configure(folder: Path, jobs: str, settings: list[str]) -> None:
    try:
        import pybind11
    except ImportError:
        raise StepFailed(_missing("pybind11")) from None
    _run(
        "configuring",
        _tool("cmake"),
        *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        *("-DLF_PYTHON=ON", "-DLF_LIBRARY=OFF", "-DBUILD_TESTING=OFF", "-DCMAKE_BUILD_TYPE=Release"),
        # Said at each run: a build in isolation has them somewhere else each time.
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DLF_MAX_JOBS={jobs}",
        *settings,
    )


def _compile(folder: Path, jobs: str, report: dict[str, Any], *halves: str) -> Path:
    parallel = ["-j", jobs] if jobs else []
    _run("compiling", _tool("cmake"), "--build", str(folder), "--target", "_native", *parallel)
    report["info"] = json.loads((folder / "generated" / "build_info.json").read_text())
    for half in halves:
        report[half]["built"] = True
    return folder / f"_native{SUFFIX}"


def _run(step: str, *command: str) -> None:
    print(*command, flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise StepFailed(f"{step} the native core could not start: {error}") from error
    print(done.stdout, flush=True)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        said = f"{step} the native core failed (exit status {done.returncode}): {_cause(lines)}"
        raise StepFailed(said, lines[-LOG_LINES:])


def _cause(lines: list[str]) -> str:
    """What a failed step said was wrong: CMake's first message without its heading, or the first line on an error."""
    heading = next((i for i, line in enumerate(lines) if re.match(r"CMake Error at .*:$", line)), None)
    if heading is None:
        return _first_error(lines)
    message = list(itertools.takewhile(lambda line: line.startswith(" "), lines[heading + 1 :]))
    said, _, output = " ".join(line.strip() for line in message).partition("It fails with the following output:")
    # Of a compiler that does not work, CMake says so and then repeats what that one printed.
    return f"{said.strip()} {_first_error(message)}" if output else said


def _first_error(lines: list[str]) -> str:
    errors = [line for line in lines if re.search(r"error|not found|no such file", line, re.IGNORECASE)]
    return (errors or lines or ["it printed nothing"])[0].strip()


class BuildNative(build_ext):
    """build_ext by CMake, into the wheel or, for an editable install, into the source tree."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "lumiere_fast"
        report = build_native(package)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_native_build.json").write_text(json.dumps(report, indent=2) + "\n")
        for half in ("cpu", "cuda"):
            if not report[half]["built"]:
                self.warn(f"the {half} half of the native core was not built: {report[half]['why_not']}")
        if not report["cpu"]["built"]:
            self.extensions = self.distribution.ext_modules = []  # what is left is pure Python


class BuildWheel(bdist_wheel):
    """A platform's wheel where the native core was built, else one for any."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    packages=[
        *find_packages(include=["lumiere_fast", "lumiere_fast.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
    # Said here and not through MANIFEST.in, so that what a wheel ships does not depend on what an sdist does.
    include_package_data=False,
    package_data={
        "lumiere_fast": ["py.typed", "evidence.json", "weights/**/*.safetensors", "weights/**/*.json"],
        "lumiere_fast.text": ["data/*"],
        KERNELS: ["configs/*.json"],
    },
    ext_modules=[Extension(MODULE, sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": BuildWheel},
)
