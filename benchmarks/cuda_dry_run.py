"""Run a bundle's graphs in the CUDA provider of ONNX Runtime on a machine without a GPU: Linux, with gcc and binutils.

    pip download --no-deps --dest wheel onnxruntime-gpu && python -m zipfile -e wheel/*.whl onnxruntime-gpu
    python benchmarks/cuda_dry_run.py BUNDLE --package onnxruntime-gpu

The provider is the real one, and the libraries of CUDA that it loads are stubs (cuda_stub.c), whose kernels do nothing.
So all that happens on the host happens: every node finds its kernel or falls back to the CPU, computes its sizes,
checks its inputs, chooses between several kernels and launches them. What they would compute nobody knows: vectors are
garbage. Prints for every graph the nodes that fell back, and how often what was copied and launched.
"""

import argparse
import collections
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gircse.runtime.bundle import Bundle
from gircse.runtime.command import comma_separated
from gircse.runtime.ort_session import StepwiseSession, open_session
from gircse.runtime.precision import runs_on
from gircse.runtime.provider import Provider

SOURCE = Path(__file__).with_name("cuda_stub.c")
CALLS = "CUDA_STUB_CALLS"
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
LARGEST = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Build the stubs, and run each graph in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--package", type=Path, required=True, metavar="DIR", help="unpacked wheel of onnxruntime-gpu")
    parser.add_argument("--sm", type=int, default=90, help="compute capability times ten (default: 90)")
    parser.add_argument("--precision", type=comma_separated(str), metavar="P,...")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prefix", type=int, default=0, help="tokens before those, run once (stepwise; default: none)")
    args = parser.parse_args(argv)
    if CALLS in os.environ:
        run_graph(
            args.bundle,
            *os.environ["CUDA_STUB_GRAPH"].split(),
            batch=args.batch,
            tokens=args.tokens,
            prefix=args.prefix,
        )
        return 0
    variants = Bundle.open(args.bundle).manifest.variants
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build_stubs((args.package / PROVIDER).resolve(), folder, sm=args.sm)
        for precision in args.precision or [name for name in variants if runs_on(name, Provider.CUDA)]:
            for layout in variants[precision].graphs:
                print(f"\n{precision} {layout}, {args.batch} x {args.tokens} tokens, sm {args.sm}", flush=True)
                environment = {
                    "LD_LIBRARY_PATH": scratch,
                    "PYTHONPATH": str(args.package.resolve()),
                    CALLS: str(folder / "calls"),
                    "CUDA_STUB_GRAPH": f"{precision} {layout}",
                }
                command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
                failed |= subprocess.run(command, env={**os.environ, **environment}, check=False).returncode != 0
                print_calls(folder / "calls")
    return 1 if failed else 0


def run_graph(path: Path, precision: str, layout: str, *, batch: int, tokens: int, prefix: int) -> None:
    """Run all K steps; loading warns of nodes that fell back."""
    bundle = Bundle.open(path)
    graph = next(name for name in bundle.manifest.variants[precision].graphs if name == layout)
    session = open_session(bundle, precision, layout=graph, provider=Provider.CUDA)
    ids = np.ones((batch, tokens), np.int64)
    with np.errstate(all="ignore"):
        run = session.run
        if prefix and isinstance(session, StepwiseSession):
            run = functools.partial(session.run_after, session.compute_prefix([1] * prefix))
        run(ids, np.ones_like(ids), steps=bundle.manifest.graph.steps)


def build_stubs(provider: Path, folder: Path, *, sm: int) -> None:
    """Compile a stub of every library that the provider loads into a folder, with the symbols that it looks for."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True)
    functions: dict[str, set[str]] = collections.defaultdict(set)
    for name, version in re.findall(r" U (\w+)(?:@(\S+))?$", listed.stdout, re.MULTILINE):
        if re.match(r"(__)?cu(da|blas)?[A-Z]", name):
            functions[version or "libcuda.so.1"].add(name)
    needed = subprocess.run(["readelf", "-d", provider], capture_output=True, text=True, check=True)
    for library in re.findall(r"\[(lib(?:cu|nv)\S+)\]", needed.stdout):
        functions.setdefault(library, set())
    # Opened when the first node needs it, its functions looked up by name.
    functions["libcudnn.so.9"] = {
        name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", provider.read_bytes())
    }
    written = set(re.findall(r"^[\w *]*?(\w+)\([^;]*\{", SOURCE.read_text(encoding="utf-8"), re.MULTILINE))
    for library, names in functions.items():
        compile_stub(folder / library, sorted(names - written), sm=sm)


def compile_stub(library: Path, names: Iterable[str], *, sm: int) -> None:
    """Compile one library; ``names`` are functions that only have to succeed."""
    creates = re.compile(r"(cublas|cudnn)\w*Create\w*")
    source = [f"#define CUDA_STUB_SM {sm}", SOURCE.read_text(encoding="utf-8")]
    for name in names:
        created = "*handle = calloc(1, 4096), " if creates.fullmatch(name) else ""
        counted = f'count("{name}", "{name}"), ' if "emm" in name or "Matmul" in name else ""
        source.append(f"int {name}(void **handle) {{ return {created}{counted}0; }}")
    code, versions = library.with_suffix(".c"), library.with_suffix(".map")
    code.write_text("\n".join(source), encoding="utf-8")
    versions.write_text(f"{library.name} {{ *; }};", encoding="utf-8")
    # Symbols of the driver and of cuDNN have no versions.
    script = [f"-Wl,--version-script={versions}"] if library.name.startswith(("libcublas", "libcudart")) else []
    flags = ["-w", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", *script]
    subprocess.run(["gcc", *flags, "-o", library, code], check=True)


def print_calls(path: Path) -> None:
    """Print what was called most, kernels by the name of their template, and remove the file."""
    if not path.exists():
        return
    lines = subprocess.run(["c++filt"], input=path.read_bytes(), capture_output=True, check=True).stdout.decode()
    path.unlink()
    calls: collections.Counter[str] = collections.Counter()
    for line in lines.splitlines():
        count, _, name = line.partition(" ")
        name = re.sub(r"\(anonymous namespace\)::|^void ", "", name)
        calls[re.split(r"[<(]", name)[0].rpartition("::")[2]] += int(count)
    copies = {name: calls.pop(name) for name in sorted(calls) if name.startswith("copy ")}
    print(", ".join(f"{name}: {count}" for name, count in copies.items()))
    print(f"{calls.total()} launches of {len(calls)} kinds, above all:")
    for name, count in calls.most_common(LARGEST):
        print(f"{count:8} {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
