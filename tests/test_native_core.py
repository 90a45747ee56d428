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

import numpy as np
import pytest

from lumiere_fast import native

ROOT = Path(__file__).resolve().parents[1]
TESTS = {"abi", "blend_windows", "blend_windows_portable", "blend_windows_emulated"}
TESTS |= {"denoise_step", "denoise_step_portable"}
TESTS |= {"emulated_warps", "emulated_temporal_resize", "emulated_temporal_resize_wgmma"}
TESTS |= {"group_norm", "group_norm_avx2", "group_norm_portable"}
TESTS |= {"temporal_attention", "temporal_attention_avx2", "temporal_attention_portable"}
TESTS |= {"temporal_conv", "temporal_conv_avx2", "temporal_conv_portable"}
TESTS |= {"space_time", "space_time_avx2", "space_time_portable", "resize_clip"}
TESTS |= {"space_time_emulated", "unload"} if os.name == "posix" else set()

# What a test waits for is compiled on as many cores as others leave it.
pytestmark = pytest.mark.timeout(900)

needs_toolchain = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("cmake", "ctest", "ninja"))
    or not (shutil.which("c++") or shutil.which("g++")),
    reason="needs cmake, ctest, ninja and a C++ compiler",
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="names of shared libraries, nm and ldd are Linux's")


def run(*command: str, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
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
    run("ctest", "--test-dir", str(folder), "--output-on-failure", "--no-tests=error", f"-j{os.cpu_count() or 1}")
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
class TestBuildSettings:
    """What a configured tree would run; nothing is compiled."""

    def configure(self, folder: Path, *settings: str, **environment: str) -> str:
        command = ("cmake", "-S", ".", "-B", str(folder), "-G", "Ninja", "-DLF_CUDA=OFF", "-DBUILD_TESTING=OFF")
        return run(*command, *settings, **{"MAX_JOBS": "", **environment})

    def jobs(self, folder: Path) -> int:
        (depth,) = re.findall(r"^pool lf_compile\n  depth = (\d+)$", self.rules(folder), flags=re.MULTILINE)
        return int(depth)

    def rules(self, folder: Path) -> str:
        return "\n".join(path.read_text() for path in (folder / "build.ninja", folder / "CMakeFiles" / "rules.ninja"))

    def test_compilations_at_a_time_are_bounded_by_cores_memory_and_the_user(self, tmp_path: Path) -> None:
        self.configure(tmp_path / "a")
        assert 1 <= self.jobs(tmp_path / "a") <= (os.cpu_count() or 1)
        assert "pool = lf_compile" in self.rules(tmp_path / "a")
        self.configure(tmp_path / "a", "-DLF_JOB_MEMORY=1000000000")  # MiB
        assert self.jobs(tmp_path / "a") == 1
        self.configure(tmp_path / "b", "-DLF_JOB_MEMORY=1000000000", MAX_JOBS="17")
        assert self.jobs(tmp_path / "b") == 17
        with pytest.raises(AssertionError, match=r"LF_MAX_JOBS .* is many; it takes a number"):
            self.configure(tmp_path / "c", "-DLF_MAX_JOBS=many")

    @pytest.mark.skipif(sys.platform == "win32", reason="the tools here are shell scripts")
    def test_it_compiles_through_ccache_unless_told_otherwise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for language in ("C", "CXX"):
            monkeypatch.delenv(f"CMAKE_{language}_COMPILER_LAUNCHER", raising=False)
        ccache = tmp_path / "bin" / "ccache"
        ccache.parent.mkdir()
        ccache.write_text('#!/bin/sh\nexec "$@"\n')
        ccache.chmod(0o755)
        path = f"{ccache.parent}{os.pathsep}{os.environ['PATH']}"

        def launched(name: str, *settings: str) -> bool:
            self.configure(tmp_path / name, *settings, PATH=path)
            return str(ccache) in run("ninja", "-C", str(tmp_path / name), "-t", "commands")

        assert launched("found")
        assert not launched("off", "-DLF_CCACHE=OFF")
        assert not launched("none", "-DCMAKE_CXX_COMPILER_LAUNCHER=")
        other = "-DCMAKE_CXX_COMPILER_LAUNCHER=/usr/bin/env"
        assert not launched("other", other)
        assert "/usr/bin/env" in run("ninja", "-C", str(tmp_path / "other"), "-t", "commands")


@pytest.fixture(scope="module")
def shared(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(build, tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ("-DBUILD_SHARED_LIBS=OFF", "-DBUILD_TESTING=OFF", "-DCMAKE_BUILD_TYPE=Debug")
    return installed(build_in(tmp_path_factory.mktemp("build"), *settings), tmp_path_factory.mktemp("static"))


def installed(build: Path, prefix: Path) -> Path:
    run("cmake", "--install", str(build), "--prefix", str(prefix))
    return prefix


def consumer(source: Path, prefix: Path, folder: Path) -> Path:
    """A project of somebody else's, built against what is installed in ``prefix`` and nothing else of ours."""
    run("cmake", "-S", str(source), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", str(folder))
    return folder


def resizes(program: Path, folder: Path, **environment: str) -> None:
    clip = np.random.default_rng(5).integers(0, 256, (4, 6, 8, 3), np.uint8)
    (folder / "in.rgb").write_bytes(clip.tobytes())
    run(str(program), str(folder / "in.rgb"), str(folder / "out.rgb"), "4x6x8x3", "down", "2x2x2", **environment)
    sums = clip.reshape(2, 2, 3, 2, 4, 2, 3).sum((1, 3, 5))
    assert (folder / "out.rgb").read_bytes() == ((sums + 4) // 8).astype(np.uint8).tobytes()


def snippets(language: str) -> list[str]:
    section = (ROOT / "examples" / "c" / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


@needs_toolchain
@linux
class TestInstalledLibrary:
    def test_what_is_installed(self, shared: Path) -> None:
        version = project_version()
        minor = version.rpartition(".")[0]
        names = {path.relative_to(shared).as_posix() for path in shared.rglob("*") if not path.is_dir()}
        package = {name.rpartition("/")[2] for name in names if "/cmake/" in name}
        assert {name for name in names if "/cmake/" not in name} == {
            "include/lumiere_fast.h",
            *(f"lib/liblumiere_fast.so{suffix}" for suffix in ("", f".{minor}", f".{version}")),
            "lib/pkgconfig/lumiere_fast.pc",
        }
        assert {"lumiere_fastConfig.cmake", "lumiere_fastConfigVersion.cmake", "lumiere_fastTargets.cmake"} <= package

    @pytest.mark.parametrize("kind", ["shared", "static"])
    def test_the_example_builds_against_it_and_resizes(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        prefix = request.getfixturevalue(kind)
        resizes(consumer(ROOT / "examples" / "c", prefix, tmp_path) / "resize_clip", tmp_path)

    @pytest.mark.parametrize("kind", ["shared", "static"])
    def test_what_the_readme_says_builds_and_runs(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        (cmake,), (program,) = snippets("cmake"), snippets("c")
        (tmp_path / "CMakeLists.txt").write_text(
            f"cmake_minimum_required(VERSION 3.22)\nproject(app LANGUAGES C)\nadd_executable(app app.c)\n{cmake}"
        )
        (tmp_path / "app.c").write_text(program)
        build = consumer(tmp_path, request.getfixturevalue(kind), tmp_path / "build")
        assert run(str(build / "app")) == "frames 0, 2, 4, 6 as they are: yes\n"

    @pytest.mark.skipif(not shutil.which("pkg-config"), reason="needs pkg-config")
    @pytest.mark.parametrize("kind", ["shared", "static"])
    def test_pkg_config_finds_it(self, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        prefix = request.getfixturevalue(kind)
        search = {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
        assert run("pkg-config", "--modversion", "lumiere_fast", **search).strip() == project_version()
        flags = run("pkg-config", "--cflags", "--libs", "lumiere_fast", **search).split()
        source = str(ROOT / "examples" / "c" / "resize_clip.c")
        run("cc", "-std=c99", source, *flags, "-o", str(tmp_path / "resize_clip"))
        resizes(tmp_path / "resize_clip", tmp_path, LD_LIBRARY_PATH=str(prefix / "lib"))

    def test_another_minor_version_is_not_taken(self, shared: Path, tmp_path: Path) -> None:
        major, minor, _ = project_version().split(".")
        for wanted, found in ((f"{major}.{minor}", True), (f"{major}.{int(minor) + 1}", False)):
            (tmp_path / "CMakeLists.txt").write_text(
                "cmake_minimum_required(VERSION 3.22)\nproject(app LANGUAGES C)\n"
                f"find_package(lumiere_fast {wanted} CONFIG QUIET)\n"
                'message(STATUS "found: ${lumiere_fast_FOUND}")\n'
            )
            said = run("cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), f"-DCMAKE_PREFIX_PATH={shared}")
            assert f"found: {int(found)}" in said


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
