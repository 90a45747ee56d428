"""What a wheel holds, that it works away from the source tree, and that an editable install maps ``kernels/``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import lumiere_fast
import lumiere_fast.native

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns(
    *(
        ".git",
        ".venv",
        "build",
        "dist",
        "runs",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        "_native*.so",
        "_native_build.json",
    )
)
NATIVE = {f"lumiere_fast/_native{sysconfig.get_config_var('EXT_SUFFIX')}"}
REPORT = {"lumiere_fast/_native_build.json"}

# A build without nvcc, which is quicker; the CUDA half is built by the install that runs these tests.
NO_NVCC = {"CUDACXX": "/nonexistent/nvcc"}
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", **NO_NVCC}

# What a test waits for is compiled on as many cores as others leave it.
pytestmark = pytest.mark.timeout(900)

needs_toolchain = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("cmake", "ninja"))
    or not (shutil.which("c++") or shutil.which("g++"))
    or find_spec("pybind11") is None,
    reason="needs cmake, ninja, pybind11 and a C++ compiler",
)


def run(*command: str, cwd: Path, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command run elsewhere, with ``path`` searched for modules before what is installed."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CC", "CXX", "CUDACXX")}
    kept |= {"PYTHONPATH": str(path)} if path is not None else {}
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False)


def python(*arguments: str, cwd: Path, path: Path | None = None, **environment: str) -> str:
    """Output of this interpreter."""
    result = run(sys.executable, *arguments, cwd=cwd, path=path, **environment)
    assert result.returncode == 0, f"{arguments}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that setuptools' leftovers neither stay in it nor leak into a wheel."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=IGNORED))


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search path on which importing torch fails."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('building must not import torch')\n")
    return folder


def build_wheel(source: Path, out: Path, path: Path | None = None, **environment: str) -> Path:
    command = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), ".")
    python(*command, cwd=source, path=path, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source: Path, no_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), no_torch, **NO_NVCC)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, which for one without data or scripts is what installing does."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_under(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_has_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"lumiere_fast", f"lumiere_fast-{declared_version()}.dist-info"}


def test_wheel_ships_every_file_of_the_package(installed: Path) -> None:
    """Also finds a folder that lacks ``__init__.py`` and a data file that ``package_data`` does not name."""
    built = re.compile(r"_native(\.|_build\.json$)")  # the tree may hold an editable install's
    expected = {f"lumiere_fast/{name}" for name in files_under(ROOT / "lumiere_fast") if not built.match(name)}
    expected |= {f"lumiere_fast/kernels/{name}" for name in files_under(ROOT / "kernels")}
    shipped = {name for name in files_under(installed) if name.startswith("lumiere_fast/")}
    assert shipped - NATIVE == expected | REPORT
    assert "lumiere_fast/py.typed" in shipped


def test_wheel_states_the_licence_and_the_command(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    licences = [path for path in info.rglob("*") if path.name == "LICENSE"]
    assert [path.read_bytes() for path in licences] == [(ROOT / "LICENSE").read_bytes()]
    assert "lumiere-fast = lumiere_fast.cli:main" in (info / "entry_points.txt").read_text()


def test_installed_package_works_away_from_the_tree(installed: Path, tmp_path: Path) -> None:
    script = (
        "import json, lumiere_fast, lumiere_fast.kernels as k; print(json.dumps([lumiere_fast.__file__, k.__file__]))"
    )
    package, kernels = json.loads(python("-c", script, cwd=tmp_path, path=installed))
    assert Path(package) == installed / "lumiere_fast" / "__init__.py"
    assert Path(kernels) == installed / "lumiere_fast" / "kernels" / "__init__.py"


def test_no_top_level_kernels_away_from_the_tree(installed: Path, tmp_path: Path) -> None:
    script = (
        "from importlib.util import find_spec; print([n for n in ('kernels', 'csrc', 'benchmarks') if find_spec(n)])"
    )
    assert python("-c", script, cwd=tmp_path, path=installed).strip() == "[]"


def installed_editable() -> bool:
    # An egg-info that a build left in the tree is a distribution too, without this file.
    origins = (each.read_text("direct_url.json") for each in metadata.distributions(name="lumiere_fast"))
    return any(json.loads(origin).get("dir_info", {}).get("editable") for origin in origins if origin)


@pytest.mark.parametrize("inside", [True, False], ids=["inside the tree", "outside"])
def test_editable_install_maps_kernels(inside: bool, tmp_path: Path) -> None:
    if not installed_editable():
        pytest.skip("this environment has no editable install")
    found = python("-c", "import lumiere_fast.kernels as k; print(k.__file__)", cwd=ROOT if inside else tmp_path)
    assert Path(found.strip()) == ROOT / "kernels" / "__init__.py"


def unpacked_sdist(source: Path, folder: Path) -> Path:
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    python("-c", script, str(folder), cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (tree,) = (path for path in folder.iterdir() if path.is_dir())
    return tree


def test_sdist_holds_what_a_build_needs_and_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    """All of csrc/, so that it builds the same module; the wheel here is made without it, to compare the rest."""
    tree = unpacked_sdist(source, tmp_path)
    for folder in ("csrc", "cmake", "examples"):
        assert files_under(tree / folder) == files_under(ROOT / folder) != set()
    for name in ("CMakeLists.txt", "Makefile", "constraints.txt", "tests/test_packaging.py"):
        assert (tree / name).is_file(), f"{name} is missing from the sdist"
    second = build_wheel(tree, tmp_path / "wheels", LUMIERE_FAST_SKIP_NATIVE="1")
    assert names_in(second) == names_in(wheel) - NATIVE


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def native_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "lumiere_fast" / "_native_build.json").read_text())
    return report


def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def environment_with(wheel: Path, folder: Path) -> tuple[Path, Path]:
    """A fresh environment with the wheel: its interpreter and its site-packages.

    The libraries that the wheel needs come from this environment, without what the .pth files here add: our own tree.
    """
    home = folder / "venv"
    venv.create(home, with_pip=False)
    interpreter = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    asked = run(str(interpreter), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    site = Path(asked.stdout.strip())
    install = ("install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel))
    python("-m", "pip", "--python", str(interpreter), *install, cwd=folder)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter, site


USE_NATIVE = """
import torch
from lumiere_fast import native, ops
windows = torch.arange(24.0).reshape(2, 1, 1, 3, 2, 2)
out = torch.full((1, 1, 5, 2, 2), torch.nan)
native.blend_windows(list(windows), [0, 2], (5,), None, out=out)
assert torch.equal(out, ops.blend_windows(windows, [0, 2], 5, backend="reference"))
print(native.load().__file__, native.why_not("cuda"), sep="\\n")
"""


@needs_toolchain
class TestNativeCoreInAWheel:
    def test_the_wheel_is_a_platform_s_and_carries_one_module(self, wheel: Path, installed: Path) -> None:
        assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name and "none-any" not in wheel.name
        assert {name for name in names_in(wheel) if "_native." in name} == NATIVE
        (info,) = installed.glob("*.dist-info")
        assert "Root-Is-Purelib: false" in (info / "WHEEL").read_text()

    def test_it_works_installed_in_an_environment_of_its_own(self, wheel: Path, tmp_path: Path) -> None:
        interpreter, site = environment_with(wheel, tmp_path)
        done = run(str(interpreter), "-c", USE_NATIVE, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        module, reasons = done.stdout.splitlines()
        assert Path(module).relative_to(site).as_posix() in NATIVE
        assert "without its CUDA half: CUDACXX was /nonexistent/nvcc, which is not there" in reasons

    def test_without_nvcc_the_report_says_so(self, installed: Path) -> None:
        report = native_report(installed)
        assert report["version"] == declared_version()
        assert report["cpu"] == {"built": True, "why_not": None}
        assert not report["cuda"]["built"] and "install CUDA 12.1 or newer" in report["cuda"]["why_not"]
        assert report["info"]["compiler"] and report["info"]["cuda"] is None
        csrc = ROOT / "csrc"
        sources = report["info"]["sources"]
        assert sources == {op: lumiere_fast.native.hash_of_sources(op, csrc) for op in sources}

    def test_a_build_again_compiles_nothing(self, wheel: Path, source: Path) -> None:
        built = python("setup.py", "build_ext", cwd=source, **NO_NVCC)
        assert "ninja: no work to do" in built and "Building CXX" not in built

    def test_max_jobs_bounds_the_compilations(self, wheel: Path, source: Path) -> None:
        for given in ("3", ""):
            said = python("setup.py", "build_ext", cwd=source, MAX_JOBS=given, **NO_NVCC)
            (jobs,) = re.findall(r"Compilations at a time: (\d+)", said)
            assert jobs == given or (not given and 1 <= int(jobs) <= (os.cpu_count() or 1))
            assert (" -j 3" in said) == bool(given)


class TestInstallWithoutNativeCore:
    @needs_toolchain
    def test_without_a_compiler_the_install_is_pure_python_and_says_why(
        self, source: Path, wheel: Path, tmp_path: Path
    ) -> None:
        """In a tree where a build has succeeded before: nothing of that one may come along."""
        tree = Path(shutil.copytree(source, tmp_path / "tree"))
        assert list(tree.glob("build/lib*/lumiere_fast/_native*"))
        pure = build_wheel(tree, tmp_path / "wheels", **NO_COMPILER)
        assert pure.name == f"lumiere_fast-{declared_version()}-py3-none-any.whl"
        folder = unpack(pure, tmp_path / "unpacked")
        assert not [name for name in names_in(pure) if "_native." in name]
        report = native_report(folder)
        missing = "no C++ compiler was found (CXX=/nonexistent/c++): install g++ or clang++, then install again"
        assert report["cpu"] == report["cuda"] | {"why_not": missing} and report["info"] is None
        script = """
import torch
from lumiere_fast import native, ops
assert ops.blend_windows(torch.ones(1, 1, 1, 3, 2, 2), [0], 3).shape == (1, 1, 3, 2, 2)
print(native.why_not("cpu") + native.why_not("cuda"))
try:
    native.load()
except native.NativeUnavailable as error:
    print(error)
"""
        said = run(str(environment_with(pure, tmp_path)[0]), "-c", script, cwd=tmp_path).stdout
        assert said.count(f"the native core was not built: {missing}") == 3

    @needs_toolchain
    @pytest.mark.skipif(sys.platform == "win32", reason="the tools here are shell scripts")
    @pytest.mark.parametrize("kind", ["path", "c", "broken"])
    def test_what_is_wrong_with_the_compilers_is_said(self, kind: str, source: Path, tmp_path: Path) -> None:
        """None on PATH; none for C; and one that does not work, of which CMake's own words are left."""
        tree = shutil.copytree(source, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "weights", "tests"))
        tools = tmp_path / "bin"
        tools.mkdir()
        for tool in ("cmake", "ninja"):
            (tools / tool).symlink_to(shutil.which(tool) or tool)
        broken = tools / "broken"
        broken.write_text("#!/bin/sh\necho 'broken: fatal error: no licence' >&2\nexit 1\n")
        broken.chmod(0o755)
        environment, said = {
            "path": (
                {"PATH": str(tools)},
                r"^no C\+\+ compiler was found \(none of c\+\+, g\+\+, clang\+\+ is on PATH\)",
            ),
            "c": ({"CC": "/nonexistent -m64"}, r"^no C compiler was found \(CC=/nonexistent\): install gcc or clang"),
            "broken": (
                {"CXX": str(broken)},
                r"configuring .* \(exit status 1\): The C\+\+ compiler .* is not able to compile a simple test program"
                r"\. broken: fatal error: no licence$",
            ),
        }[kind]
        python("setup.py", "build_ext", "--inplace", cwd=Path(tree), **NO_NVCC, **environment)
        assert re.search(said, native_report(Path(tree))["cpu"]["why_not"])

    def test_a_module_of_an_earlier_build_does_not_survive(self, source: Path, tmp_path: Path) -> None:
        tree = shutil.copytree(source, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "weights", "tests"))
        (stale,) = (tree / name for name in NATIVE)
        stale.write_bytes(b"of an earlier build")
        python("setup.py", "build_ext", "--inplace", cwd=tree, LUMIERE_FAST_SKIP_NATIVE="1")
        assert not stale.exists()
        for half in ("cpu", "cuda"):
            assert "LUMIERE_FAST_SKIP_NATIVE was set" in native_report(tree)[half]["why_not"]

    @pytest.mark.parametrize(
        ("variable", "value", "said"),
        [
            ("LUMIERE_FAST_CUDA_ARCHS", "80;hopper", "LUMIERE_FAST_CUDA_ARCHS has 'hopper'"),
            ("MAX_JOBS", "many", "MAX_JOBS is 'many'; it takes a number"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, variable: str, value: str, said: str, source: Path) -> None:
        done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=source, **{variable: value})
        assert done.returncode != 0 and said in done.stderr


@needs_toolchain
@pytest.mark.skipif(sys.platform == "win32", reason="the tools here are shell scripts")
def test_a_cuda_half_that_fails_leaves_the_cpu_half(source: Path, wheel: Path, tmp_path: Path) -> None:
    """nvcc is there, but it does not work."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc: error: no licence' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    second = build_wheel(source, tmp_path / "wheels", CUDACXX=str(nvcc))
    assert names_in(second) >= NATIVE
    report = native_report(unpack(second, tmp_path / "unpacked"))
    assert report["cpu"]["built"] and not report["cuda"]["built"]
    assert f"with nvcc {nvcc}, configuring the native core failed" in report["cuda"]["why_not"]
    assert report["log"]


def declared_version() -> str:
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert match
    return match[1]


def test_the_version_is_one_everywhere() -> None:
    assert lumiere_fast.__version__ == declared_version()
    assert f"## [{declared_version()}]" in (ROOT / "CHANGELOG.md").read_text()


OPTIONAL = ("triton", "av", "typer", "click", "tokenizers", "matplotlib", "einops", "pybind11")


def test_importing_needs_no_optional_part(tmp_path: Path) -> None:
    """Every module but the command line comes up without a GPU and with the optional libraries missing."""
    script = f"""
import importlib, pkgutil, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import lumiere_fast
names = [module.name for module in pkgutil.walk_packages(lumiere_fast.__path__, "lumiere_fast.")]
for name in sorted({{*names, "lumiere_fast.kernels"}} - {{"lumiere_fast.cli"}}):
    importlib.import_module(name)
    print(name)
"""
    imported = python("-c", script, cwd=tmp_path, CUDA_VISIBLE_DEVICES="").split()
    assert {"lumiere_fast.kernels", "lumiere_fast.info", "lumiere_fast.video"} <= set(imported)
