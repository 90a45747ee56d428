"""The torch-free C library: built by CMake from nothing, tested in C, and looked at from outside."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lumiere_fast import native

ROOT = Path(__file__).resolve().parents[1]
TESTS = {"abi", "blend_windows", "blend_windows_portable", "blend_windows_emulated"}
TESTS |= {"emulated_warps", "emulated_temporal_resize", "emulated_temporal_resize_wgmma"}
TESTS |= {"group_norm", "group_norm_avx2", "group_norm_portable"}
TESTS |= {"temporal_conv", "temporal_conv_avx2", "temporal_conv_portable"}
TESTS |= {"unload"} if os.name == "posix" else set()

needs_toolchain = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("cmake", "ctest", "ninja"))
    or not (shutil.which("c++") or shutil.which("g++")),
    reason="needs cmake, ctest, ninja and a C++ compiler",
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="names of shared libraries, nm and ldd are Linux's")


def run(*command: str) -> str:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def project_version() -> str:
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert match
    return match[1]


def build_in(folder: Path, *settings: str) -> Path:
    """Without the CUDA half, whose compilation test_every_cuda_kernel_fits sees to. Warnings are errors."""
    run("cmake", "-S", ".", "-B", str(folder), "-G", "Ninja", "-DLF_CUDA=OFF", "-DLF_WERROR=ON", *settings)
    run("cmake", "--build", str(folder))
    return folder


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_in(tmp_path_factory.mktemp("native"))


def passed(folder: Path) -> set[str]:
    """Names of the C tests, all of which passed."""
    listed = json.loads(run("ctest", "--test-dir", str(folder), "--show-only=json-v1"))
    run("ctest", "--test-dir", str(folder), "--output-on-failure", "--no-tests=error")
    return {test["name"] for test in listed["tests"]}


@needs_toolchain
def test_the_c_tests_pass(build: Path) -> None:
    assert passed(build) == TESTS


@needs_toolchain
def test_the_c_tests_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    """Addresses and undefined behaviour, of the CUDA launch too: emulated, thread after thread, on the host."""
    (tmp_path / "probe.cpp").write_text("int main() {}\n")
    compiler = shutil.which("c++") or "g++"
    probe = [compiler, "-fsanitize=address,undefined", "probe.cpp", "-o", "probe"]
    if subprocess.run(probe, cwd=tmp_path, capture_output=True, check=False).returncode != 0:
        pytest.skip("this compiler has no address and undefined-behaviour sanitizers")
    folder = build_in(tmp_path / "build", "-DLF_SANITIZE=ON")
    assert passed(folder) == TESTS
    listed = (
        run("nm", str(folder / "csrc" / "tests" / "test_blend_windows_emulated")) if shutil.which("nm") else "__asan_"
    )
    assert "__asan_" in listed


@needs_toolchain
@linux
class TestSharedLibrary:
    def test_its_version_is_the_package_s(self, build: Path) -> None:
        library = ctypes.CDLL(str(build / "liblumiere_fast.so"))
        library.lf_version_string.restype = library.lf_build_info.restype = ctypes.c_char_p
        library.lf_version.restype = ctypes.c_int32
        version = project_version()
        major, minor, patch = (int(part) for part in version.split("."))
        assert library.lf_version_string() == version.encode()
        assert library.lf_version() == major * 10000 + minor * 100 + patch
        info = json.loads(library.lf_build_info())
        assert (info["version"], info["cuda"], info["cuda_archs"]) == (version, None, [])
        assert info["sources"] == {op: native.hash_of_sources(op, ROOT / "csrc") for op in info["sources"]}

    def test_a_half_that_is_not_there_says_so(self, build: Path) -> None:
        library = ctypes.CDLL(str(build / "liblumiere_fast.so"))
        library.lf_status_string.restype = ctypes.c_char_p
        status = library.lf_blend_windows_cuda(0, 0, None, None, None, 1, None, None, None, None, None, 0, None)
        assert library.lf_status_string(status) == b"the CUDA half was not built"

    def test_exports_are_the_header_s_functions_and_nothing_else(self, build: Path) -> None:
        header = (ROOT / "csrc" / "include" / "lumiere_fast.h").read_text()
        declared = set(re.findall(r"^LF_API .*?\b(lf_\w+)\(", header, flags=re.MULTILINE))
        assert {"lf_blend_windows_cpu", "lf_blend_windows_cuda"} <= declared
        assert exported(build / "liblumiere_fast.so") == declared

    def test_it_links_no_torch_python_or_cuda(self, build: Path) -> None:
        assert not re.search(r"torch|c10|python|cuda", linked(build / "liblumiere_fast.so"))


@linux
@pytest.mark.skipif(bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu")))
class TestPythonModule:
    """The module that is installed: it serves every torch, and loads where there is no CUDA."""

    def test_it_links_no_torch_and_no_cuda(self) -> None:
        assert not re.search(r"torch|c10|cuda", linked(Path(native.load().__file__ or "")))

    def test_it_exports_its_entry_only_and_asks_for_no_torch_symbol(self) -> None:
        module = Path(native.load().__file__ or "")
        assert exported(module) == {"PyInit__native"}
        wanted = run("nm", "-D", "--undefined-only", str(module))
        assert not re.search(r"torch|c10|at::|_ZN2at|cuda|\bcu[A-Z]", wanted)


def exported(library: Path) -> set[str]:
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    return {line.split()[-1] for line in run("nm", "-D", "--defined-only", str(library)).splitlines()}


def linked(library: Path) -> str:
    if not shutil.which("ldd"):
        pytest.skip("needs ldd")
    return run("ldd", str(library))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_every_cuda_kernel_fits(tmp_path: Path) -> None:
    """Nothing spills on any architecture that ships, memory moves 16 bytes at a time, and no rounding is skipped."""
    archs = ("80", "90a")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    source = ROOT / "csrc" / "blend_windows.cu"
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    done = subprocess.run(
        [*command, *targets, "-Xptxas=-v", "--keep", "--fatbin", str(source), "-o", "kernels.fatbin"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    kernels = 4 * 3  # dtypes, and batches: small, large, with weights that vary
    assert len(spills) == len(registers) == kernels * len(archs)
    assert set(spills) == {("0", "0", "0")} and max(registers) <= 128
    listings = [path.read_text() for path in tmp_path.glob("*.ptx")]
    assert len(listings) == len(archs)
    for listing in listings:
        assert re.search(r"\.target sm_(80|90a)", listing)
        assert listing.count("ld.global.v4.u32") + listing.count("ld.global.v4.b32") >= 8
        assert listing.count("st.global.v4.u32") + listing.count("st.global.v4.b32") >= 8
        assert not re.search(r"\bfma\.rn\.f(32|64)", listing.split(".entry", 1)[1])


def test_no_source_includes_torch_and_only_the_bindings_python() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".c", ".cpp", ".cu"}]
    assert sources
    for path in sources:
        includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), flags=re.MULTILINE)
        foreign = {name for name in includes if re.match(r"(torch|ATen|c10)/|Python\.h|pybind11/", name)}
        allowed = {"pybind11/pybind11.h"} if path.name == "bindings.cpp" else set()
        assert foreign == allowed, f"{path.relative_to(ROOT)} includes {foreign}"
