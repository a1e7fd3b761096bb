"""Which ONNX Runtime the C++ runtime takes, and what becomes of one that is wrong or out of memory.

A process has one ONNX Runtime, so each test has a process of its own; the library prints nothing into it.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.cpp_build import run
from support.int8_bundles import int8_bundle
from support.small_models import SmallModels
from support.tolerances import ONNXRUNTIME_MAX_DIFFERENCE

from gircse.runtime import Embedder

TESTS = Path(__file__).parents[2]
TEXTS = ["how do I reset the card", "", "the small bird sings", "ships " * 60]

PROGRAM = """
import resource, sys
import numpy as np
from support.cpp_library import Code, CppError, CppLibrary
library, bundle, paths = CppLibrary(sys.argv[1]), sys.argv[2], sys.argv[3:]

def opened(**options):
    try:
        with library.open(bundle, **options) as embedder:
            return embedder.description.onnxruntime.decode()
    except CppError as err:
        return str(err)
"""

STUB = """
extern "C" {
#include <stdint.h>
struct Base { const void *(*get_api)(uint32_t); const char *(*version)(); };
static const void *get_api(uint32_t) { GET_API }
static const char *version() { return "VERSION"; }
static const Base base = {get_api, version};
__attribute__((visibility("default"))) const Base *NAME() { return BASE; }
}
"""


class Program:
    """Runs a piece of Python in a process that has opened no ONNX Runtime yet."""

    def __init__(self, library: Path, bundle: Path) -> None:
        self.library, self.bundle = library, bundle

    def run(self, code: str, *paths: Path, **environment: str) -> list[str]:
        """Return the lines that the code prints; the library may not print any."""
        names = ("GIRCSE_ONNXRUNTIME", "LD_LIBRARY_PATH")
        inherited = {name: value for name, value in os.environ.items() if name not in names}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM + code, self.library, self.bundle, *paths],
            env={**inherited, "PYTHONPATH": str(TESTS), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()


@pytest.fixture(scope="module")
def bundle(small_models: SmallModels) -> Path:
    return small_models.bundle("qwen2", layout="stepwise")


@pytest.fixture
def program(cpp_library: Path, bundle: Path) -> Program:
    return Program(cpp_library, bundle)


def stub(
    folder: Path, version: str, *, get_api: str = "__builtin_trap();", name: str = "OrtGetApiBase", base: str = "&base"
) -> Path:
    """Build a library that looks like ONNX Runtime."""
    library, source = folder / "libstub.so", folder / "stub.cpp"
    replaced = STUB.replace("GET_API", get_api).replace("VERSION", version).replace("NAME", name)
    source.write_text(replaced.replace("BASE", base))
    run(os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-o", library, source)
    return library


HINT = "Install ONNX Runtime and name its library in GIRCSE_ONNXRUNTIME or in the option onnxruntime."
NEEDED = f"; version 1.24.4 or later is needed. {HINT}"
MISSING = "cannot open shared object file: No such file or directory"


def test_no_onnxruntime_is_found(program: Program, tmp_path: Path) -> None:
    missing = tmp_path / "libonnxruntime.so.1"
    named = f"PROVIDER: ONNX Runtime cannot be loaded: {missing}: {MISSING}{NEEDED}"
    assert program.run("print(opened(onnxruntime=paths[0]))", missing) == [named]
    assert program.run("print(opened())", GIRCSE_ONNXRUNTIME=str(missing)) == [named]


def test_without_a_name_the_loader_searches(program: Program, onnxruntime_library: Path, tmp_path: Path) -> None:
    (found,) = program.run("print(opened())")
    if found.startswith("PROVIDER"):  # unless the system has one
        searched = f"libonnxruntime.so.1: {MISSING}; libonnxruntime.so: {MISSING}"
        assert found == f"PROVIDER: ONNX Runtime cannot be loaded: {searched}{NEEDED}"
    (tmp_path / "libonnxruntime.so.1").symlink_to(onnxruntime_library)
    version = onnxruntime_library.name.removeprefix("libonnxruntime.so.")
    for name in ("", str(onnxruntime_library)):
        assert program.run("print(opened())", LD_LIBRARY_PATH=str(tmp_path), GIRCSE_ONNXRUNTIME=name) == [version]


def test_a_file_that_is_no_library(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "libonnxruntime.so.1"
    path.write_bytes(b"not ELF, nor anything else" * 100)
    (found,) = program.run("print(opened(onnxruntime=paths[0]))", path)
    assert found == f"PROVIDER: ONNX Runtime cannot be loaded: {path}: invalid ELF header{NEEDED}"


def test_an_onnxruntime_that_is_too_old(program: Program, tmp_path: Path) -> None:
    """Its interface is not even asked for: some of them print."""
    library = stub(tmp_path, "1.22.1")
    assert program.run("print(opened(onnxruntime=paths[0]))", library) == [
        f"PROVIDER: {library} is ONNX Runtime 1.22.1{NEEDED}"
    ]


def test_an_onnxruntime_without_the_interface(program: Program, tmp_path: Path) -> None:
    library = stub(tmp_path, "9.0.0", get_api="return nullptr;")
    assert program.run("print(opened(onnxruntime=paths[0]))", library) == [
        f"PROVIDER: {library} is ONNX Runtime 9.0.0{NEEDED}"
    ]


@pytest.mark.parametrize(
    ("name", "base", "reason"),
    [
        ("SomethingElse", "&base", "is not ONNX Runtime: it has no OrtGetApiBase"),
        ("OrtGetApiBase", "nullptr", "is not ONNX Runtime: its OrtGetApiBase gives nothing"),
    ],
)
def test_another_library(program: Program, tmp_path: Path, name: str, base: str, reason: str) -> None:
    library = stub(tmp_path, "1.32.0", name=name, base=base)
    found = program.run("print(opened(onnxruntime=paths[0]))", library)
    assert found == [f"PROVIDER: {library} {reason}{NEEDED}"]


def test_a_failed_try_does_not_decide(program: Program, onnxruntime_library: Path, tmp_path: Path) -> None:
    code = "for path in paths: print(opened(onnxruntime=path)[:8])"
    old = stub(tmp_path, "1.22.1")
    version = onnxruntime_library.name.removeprefix("libonnxruntime.so.")
    found = program.run(code, tmp_path / "none.so", old, onnxruntime_library)
    assert found == ["PROVIDER", "PROVIDER", version]


def test_a_second_onnxruntime_is_refused(program: Program, onnxruntime_library: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link.so", stub(tmp_path, "1.99.0")
    link.symlink_to(onnxruntime_library)
    code = "for path in [*paths, None]: print(opened(onnxruntime=path))"
    version = onnxruntime_library.name.removeprefix("libonnxruntime.so.")
    refused = (
        f"PROVIDER: {other} cannot be loaded: this process has {onnxruntime_library} already; "
        "ONNX Runtime cannot be loaded twice. Name the same library every time."
    )
    assert program.run(code, onnxruntime_library, link, other) == [version, version, refused, version]


def test_the_oldest_onnxruntime_gives_the_vectors(
    cpp_library: Path, oldest_onnxruntime_library: Path, small_models: SmallModels, tmp_path: Path
) -> None:
    for layout in ("unrolled", "stepwise"):
        bundle = small_models.bundle("qwen2")
        with Embedder(bundle, provider="cpu", layout=layout) as embedder:
            expected = embedder.encode(TEXTS, all_steps=True)
        code = (
            f"with library.open(bundle, onnxruntime=paths[0], layout={layout!r}) as embedder:\n"
            f"    np.save(paths[1], embedder.encode({TEXTS!r}, all_steps=1))\n"
            "    print(embedder.description.onnxruntime.decode(), embedder.self_test().passed)"
        )
        vectors = tmp_path / "vectors.npy"
        found = Program(cpp_library, bundle).run(code, oldest_onnxruntime_library, vectors)
        assert found == ["1.24.4 1"]
        assert np.abs(np.load(vectors) - expected).max() < ONNXRUNTIME_MAX_DIFFERENCE


def test_precisions_that_an_old_onnxruntime_runs_wrong_are_refused(
    cpp_library: Path, oldest_onnxruntime_library: Path, small_models: SmallModels
) -> None:
    code = "for name in ('int8', 'int8-weights', 'fp16'): print(opened(onnxruntime=paths[0], precision=name))"
    found = Program(cpp_library, int8_bundle(small_models, "qwen2")).run(code, oldest_onnxruntime_library)
    assert found[:2] == [
        f"PROVIDER: {oldest_onnxruntime_library} is ONNX Runtime 1.24.4, which cannot run {name}; version 1.32.0 or "
        "later is needed for it. Name a newer one in GIRCSE_ONNXRUNTIME or in the option onnxruntime, or choose "
        "another precision."
        for name in ("int8", "int8-weights")
    ]
    half = small_models.bundle("qwen2", precisions=("fp32", "fp16"))
    (found_half,) = Program(cpp_library, half).run(
        "print(opened(onnxruntime=paths[0], precision='fp16'))", oldest_onnxruntime_library
    )
    assert "which cannot run fp16; version 1.30.0 or later is needed for it." in found_half


LIMITED = """
def used():
    return int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()

def limited(work, megabytes):
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used() + (megabytes << 20), before[1]))
    try:
        work()
        print('done')
    except CppError as err:
        print(err)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
"""


def test_memory_that_runs_out_in_a_batch_is_an_error(program: Program, onnxruntime_library: Path) -> None:
    code = LIMITED + (
        "with library.open(bundle, onnxruntime=paths[0], threads=1) as embedder:\n"
        "    large = [list(range(1, 49))] * 8192\n"
        "    expected = embedder.encode_tokens(large[:4])\n"
        "    limited(lambda: embedder.encode_tokens(large, batch_size=8192, batch_tokens=1 << 30), 150)\n"
        "    limited(lambda: embedder.encode_tokens(large, batch_size=64), 150)\n"
        "    print((embedder.encode_tokens(large[:4]) == expected).all())\n"
    )
    found, small, same = program.run(code, onnxruntime_library)
    assert found.startswith("MEMORY: ONNX Runtime failed in a batch of 8192 texts of 48 tokens: ")
    assert found.endswith(" If memory ran out, use smaller batches (batch_size, batch_tokens).")
    assert (small, same) == ("done", "True")
