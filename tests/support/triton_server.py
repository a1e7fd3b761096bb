"""Triton Inference Server as a process, from the wheel of ``nvidia-pytriton``.

Its Python backend has no support for NumPy 2, and reads no ``PYTHONPATH``: it finds the environment of the ``python3``
that is first on the PATH. So it gets one of its own, with an older NumPy in front of the packages of the tests.
"""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient
from tritonclient.http import InferenceServerClient, InferInput

SECONDS = 60


def triton_folder() -> Path:
    """Return the folder that holds ``pytriton`` and ``numpy`` 1.x; skips the test where there is none."""
    pytriton = importlib.util.find_spec("pytriton")
    named = os.environ.get("GIRCSE_TRITON") or (pytriton and Path(pytriton.origin or "").parents[1])
    if not named:
        pytest.skip(
            "Triton Inference Server is not here: pip install --no-deps --target DIR nvidia-pytriton 'numpy<2' and set "
            "GIRCSE_TRITON=DIR"
        )
    return Path(named)


def backend_environment(triton: Path, folder: Path) -> Path:
    """Make an environment with the packages of the tests and another NumPy; returns its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python3*/site-packages"))
    for name in ("numpy", "numpy.libs"):
        (packages / name).symlink_to(triton / name)
    own = sysconfig.get_path("purelib")
    (packages / "tests.pth").write_text(f"import site; site.addsitedir({own!r})\n")  # an editable install is a .pth too
    return folder / "bin"


def backends(server: Path, folder: Path) -> Path:
    """Put the Python backend and its stub for this Python into a folder."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "python").mkdir(parents=True)
    for path in (*(server / "backends" / "python").iterdir(), *(server / "python_backend_stubs" / version).iterdir()):
        (folder / "python" / path.name).symlink_to(path)
    return folder


@contextlib.contextmanager
def running_triton(repository: Path, folder: Path) -> Iterator[InferenceServerClient]:
    """Run the server with no model loaded; yields a client. ``folder`` gets its environment and its log."""
    triton = triton_folder()
    server = triton / "pytriton" / "tritonserver"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends(server, folder / 'backends')}",
        "--backend-config=python,stub-timeout-seconds=300",  # a busy machine starts Python slowly
        "--model-control-mode=explicit",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
    ]
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{triton / 'nvidia_pytriton.libs'}",
        "PATH": f"{backend_environment(triton, folder / 'environment')}:{os.environ['PATH']}",
    }
    log = folder / "log"
    with log.open("wb") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
        try:
            _wait_until_live(f"http://127.0.0.1:{port}/v2/health/live", process, log)
            with InferenceServerClient(f"127.0.0.1:{port}", concurrency=64, network_timeout=SECONDS) as client:
                yield client
        finally:
            process.terminate()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_live(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=SECONDS):
            return
        time.sleep(0.05)
    pytest.fail(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def text_inputs(texts: list[str | bytes], *, steps: Any = None, instruction: Any = None) -> list[InferInput]:
    """Return the inputs of a request: one row for each text; ``steps`` and ``instruction`` may be one for all."""
    given = {"TEXT": texts, "STEPS": steps, "INSTRUCTION": instruction}
    inputs = []
    for name, values in given.items():
        if values is None:
            continue
        kind, dtype = ("INT32", np.int32) if name == "STEPS" else ("BYTES", np.object_)
        rows = np.array(values if isinstance(values, list) else [values] * len(texts), dtype).reshape(-1, 1)
        inputs.append(InferInput(name, list(rows.shape), kind))
        inputs[-1].set_data_from_numpy(rows)
    return inputs


def model_config_type() -> Any:
    """Return protobuf's ``ModelConfig``; its package would import grpc."""
    path = Path(tritonclient.__path__[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig
