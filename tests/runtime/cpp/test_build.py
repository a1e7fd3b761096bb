"""What the library exports, what is installed, and how other projects build against it."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.cpp_build import ROOT, SOURCES, configure, run
from support.small_models import SmallModels

from gircse.runtime import Embedder

HEADER = SOURCES / "include" / "gircse" / "gircse.h"
EXAMPLE = ROOT / "examples" / "cpp"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
MAX_LIBRARY_BYTES = 1_000_000
INSTALLED_TEXTS = ("How do I reset my PIN?", "The cat sat on the mat.")


@pytest.fixture(scope="module")
def prefix(cpp_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation that was moved after it was made; nothing can depend on where it was."""
    first, moved = tmp_path_factory.mktemp("install") / "first", tmp_path_factory.mktemp("moved") / "prefix"
    run("cmake", "--install", cpp_build, "--prefix", first, "--strip")
    shutil.move(first, moved)
    return moved


def library_in(prefix: Path) -> Path:
    (library,) = prefix.glob("lib*/**/libgircse.so")
    return library


def exported_symbols(library: Path) -> set[str]:
    lines = run("nm", "-D", "--defined-only", library).splitlines()
    return {line.split()[2] for line in lines if line.split()[1] != "A"}  # A: the name of the version itself


def frozen_symbols() -> set[str]:
    return set(re.findall(r"^ +(gircse_\w+);$", (SOURCES / "gircse.map").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_library_exports_the_frozen_list_and_nothing_else(cpp_library: Path) -> None:
    assert exported_symbols(cpp_library) == {f"{symbol}@@GIRCSE_1" for symbol in frozen_symbols()}


def test_the_frozen_list_is_what_the_header_declares() -> None:
    code = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    declared = re.findall(r"^GIRCSE_API [\w *]+?\b(gircse_\w+)\(", code, re.MULTILINE)
    assert len(declared) == len(re.findall(r"^GIRCSE_API ", code, re.MULTILINE))
    assert set(declared) == frozen_symbols()


def test_the_version_is_that_of_the_python_package(cpp_build: Path, cpp_library: Path) -> None:
    program = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).gircse_version; f.restype = ctypes.c_char_p; print(f())"
    assert run("python3", "-c", program, cpp_library) == f"{VERSION.encode()!r}\n"
    abi = re.search(r"#define GIRCSE_ABI_VERSION (\d+)", HEADER.read_text(encoding="utf-8"))
    assert abi is not None
    assert cpp_library.resolve().name == f"libgircse.so.{VERSION}"
    assert f"Library soname: [libgircse.so.{abi[1]}]" in run("readelf", "-d", cpp_library)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("header.c", ["-std=c99", "-Wstrict-prototypes"]),
        ("header.c", ["-std=c17"]),
        ("header.cpp", ["-std=c++17"]),
        ("wrapper.cpp", ["-std=c++17"]),
        ("wrapper.cpp", ["-std=c++20"]),
    ],
)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.usefixtures("cpp_build")
def test_the_headers_compile_without_warnings(tmp_path: Path, compiler: str, name: str, options: list[str]) -> None:
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"no {compiler} here")
    include = "gircse.hpp" if name == "wrapper.cpp" else "gircse.h"
    source = tmp_path / name
    # Twice, to try the guard; the function is called so that inline code is compiled too.
    use = 'float f() { return gircse::Embedder("x").encode({"a"})[0]; }' if name == "wrapper.cpp" else ""
    source.write_text(f"#include <gircse/{include}>\n#include <gircse/{include}>\n{use}\ntypedef int not_empty;\n")
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
    run(found, *options, *warnings, "-fsyntax-only", "-I", SOURCES / "include", source)


def test_a_stripped_library_is_small(prefix: Path) -> None:
    assert library_in(prefix).stat().st_size <= MAX_LIBRARY_BYTES


def test_the_library_needs_no_more_than_the_system(prefix: Path) -> None:
    """ONNX Runtime is opened at run time, and what lies next to the library is found."""
    dynamic = run("readelf", "-d", library_in(prefix))
    needed = {name.split(".")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic)}
    assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "libdl", "libpthread", "ld-linux-x86-64"}
    assert re.search(r"(RPATH|RUNPATH).*\[\$ORIGIN\]", dynamic)


def test_nothing_that_is_installed_names_this_machine(prefix: Path) -> None:
    traces = [os.fsencode(ROOT), os.fsencode(prefix.parent)]
    files = [path for path in prefix.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".h", ".hpp", ".cmake", ".pc"}
    for path in files:
        content = path.read_bytes()
        assert not any(trace in content for trace in traces), path


@pytest.fixture(scope="module")
def example_by_cmake(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    configure(folder, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", sources=EXAMPLE)
    run("cmake", "--build", folder)
    return folder / "cosine"


@pytest.fixture(scope="module")
def example_by_pkg_config(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command in the example's own comment, with the library's folder for the loader."""
    source, program = EXAMPLE / "cosine.cpp", tmp_path_factory.mktemp("example") / "cosine"
    command = re.search(r"^// Without CMake: (.*) -o cosine$", source.read_text(encoding="utf-8"), re.MULTILINE)
    assert command is not None
    folder = library_in(prefix).parent
    search = {"PKG_CONFIG_PATH": str(folder / "pkgconfig")}
    assert run("pkg-config", "--modversion", "gircse", env=os.environ | search) == f"{VERSION}\n"
    line = f"{command[1]} -Wl,-rpath,{folder} -o {program}"
    run("bash", "-c", line, cwd=EXAMPLE, env=os.environ | search)
    return program


@pytest.mark.usefixtures("find_onnxruntime")
@pytest.mark.parametrize("example", ["example_by_cmake", "example_by_pkg_config"])
def test_the_example_prints_the_cosine_that_python_computes(
    small_models: SmallModels, request: pytest.FixtureRequest, example: str
) -> None:
    program: Path = request.getfixturevalue(example)
    bundle = small_models.bundle("qwen2")
    with Embedder(bundle) as embedder:
        query, document = embedder.encode_query(INSTALLED_TEXTS[0]), embedder.encode_document(INSTALLED_TEXTS[1])
    assert float(run(program, bundle, *INSTALLED_TEXTS)) == pytest.approx(float(np.dot(query, document)), abs=2e-6)


def test_an_onnxruntime_next_to_the_library_is_found(
    small_models: SmallModels, prefix: Path, onnxruntime_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GIRCSE_ONNXRUNTIME", raising=False)
    copy = tmp_path / "prefix"
    shutil.copytree(prefix, copy, symlinks=True)
    (library_in(copy).parent / "libonnxruntime.so.1").symlink_to(onnxruntime_library)
    assert "self-test passed" in run(copy / "bin" / "gircse-embed-cpp", small_models.bundle("qwen2"), "--self-test")


@pytest.mark.parametrize(("version", "found"), [("0.1", True), ("0.0.1", True), ("0.9", False), ("1.0", False)])
def test_find_package_compares_versions(prefix: Path, tmp_path: Path, version: str, found: bool) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(consumer LANGUAGES CXX)\n"
        f"find_package(gircse {version} REQUIRED)\n"
    )
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is found, done.stderr


def test_the_example_explains_an_error(example_by_cmake: Path, tmp_path: Path) -> None:
    done = subprocess.run([example_by_cmake, tmp_path, "a", "b"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"cosine: {tmp_path} is not a bundle")


def test_the_source_distribution_has_the_cpp_runtime_and_the_wheel_does_not(tmp_path: Path) -> None:
    """Built from a copy, because setuptools leaves files behind."""
    copy = tmp_path / "copy"
    packages = ("runtime", "reporting", "checkpoint", "calibration", "export", "evaluation", "serving")
    for folder in (*packages, "examples", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("build", "__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = "from setuptools import build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    run(sys.executable, "-c", build, cwd=copy)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        sources = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"runtime/cpp/CMakeLists.txt", "runtime/cpp/src/c_api.cpp", "examples/cpp/cosine.cpp"} <= sources
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "/cpp/" in name]
        assert "gircse/serving/page.html" in archive.namelist()
