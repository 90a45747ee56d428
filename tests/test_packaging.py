"""What a wheel holds, that it works away from the source tree, and that an editable install maps ``kernels/``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lumiere_fast

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache")


def python(*arguments: str, cwd: Path, path: Path | None = None, hide_gpu: bool = False) -> str:
    """Output of this interpreter run elsewhere, with ``path`` searched before what is installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if hide_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
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


@pytest.fixture(scope="module")
def wheel(source: Path, no_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    python(
        "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), ".", cwd=source, path=no_torch
    )
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, which for a pure one is what installing does."""
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
    expected = {f"lumiere_fast/{name}" for name in files_under(ROOT / "lumiere_fast")}
    expected |= {f"lumiere_fast/kernels/{name}" for name in files_under(ROOT / "kernels")}
    shipped = {name for name in files_under(installed) if name.startswith("lumiere_fast/")}
    assert shipped == expected
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


def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    python("-c", script, str(tmp_path), cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (tree,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for name in (
        "CMakeLists.txt",
        "csrc/include/lumiere_fast.h",
        "Makefile",
        "constraints.txt",
        "tests/test_packaging.py",
    ):
        assert (tree / name).is_file(), f"{name} is missing from the sdist"
    script = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    python("-c", script, str(tmp_path), cwd=tree)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(tmp_path / wheel.name) as second:
        assert set(first.namelist()) == set(second.namelist())


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
    imported = python("-c", script, cwd=tmp_path, hide_gpu=True).split()
    assert {"lumiere_fast.kernels", "lumiere_fast.info", "lumiere_fast.video"} <= set(imported)
