"""The torch-free C library: built by CMake from nothing, tested in C, and looked at from outside."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

needs_toolchain = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("cmake", "ctest", "ninja"))
    or not (shutil.which("c++") or shutil.which("g++")),
    reason="needs cmake, ctest, ninja and a C++ compiler",
)


def run(*command: str) -> str:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def project_version() -> str:
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert match
    return match[1]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    run("cmake", "-S", ".", "-B", str(folder), "-G", "Ninja")
    run("cmake", "--build", str(folder))
    return folder


@needs_toolchain
def test_the_c_test_passes(build: Path) -> None:
    output = run("ctest", "--test-dir", str(build), "--output-on-failure", "--no-tests=error")
    assert "100% tests passed, 0 tests failed out of 1" in output


@needs_toolchain
@pytest.mark.skipif(sys.platform != "linux", reason="names of shared libraries and nm are Linux's")
class TestSharedLibrary:
    def test_its_version_is_the_package_s(self, build: Path) -> None:
        library = ctypes.CDLL(str(build / "liblumiere_fast.so"))
        library.lf_version_string.restype = ctypes.c_char_p
        library.lf_version.restype = ctypes.c_int32
        version = project_version()
        major, minor, patch = (int(part) for part in version.split("."))
        assert library.lf_version_string() == version.encode()
        assert library.lf_version() == major * 10000 + minor * 100 + patch

    def test_exports_are_the_header_s_functions_and_nothing_else(self, build: Path) -> None:
        if not shutil.which("nm"):
            pytest.skip("needs nm")
        listed = run("nm", "-D", "--defined-only", str(build / "liblumiere_fast.so"))
        exported = {line.split()[-1] for line in listed.splitlines()}
        header = (ROOT / "csrc" / "include" / "lumiere_fast.h").read_text()
        declared = set(re.findall(r"^LF_API .*?\b(lf_\w+)\(", header, flags=re.MULTILINE))
        assert declared and exported == declared

    def test_it_links_no_torch_python_or_cuda(self, build: Path) -> None:
        if not shutil.which("ldd"):
            pytest.skip("needs ldd")
        linked = run("ldd", str(build / "liblumiere_fast.so"))
        assert not re.search(r"torch|c10|python|cuda", linked)


def test_no_source_includes_torch_or_python() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".c", ".cpp", ".cu"}]
    assert sources
    for path in sources:
        includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), flags=re.MULTILINE)
        foreign = [name for name in includes if re.match(r"(torch|ATen|c10)/|Python\.h", name)]
        assert not foreign, f"{path.relative_to(ROOT)} includes {foreign}"
