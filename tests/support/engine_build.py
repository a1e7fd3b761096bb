"""What the tests of engine builds share; their fixtures are in ``tests/export/engine/conftest.py``."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gircse.runtime.bundle import Bundle, file_sha256
from gircse.runtime.errors import ProviderError
from gircse.runtime.trt.engine_manifest import EngineManifest, select_engine
from support.fake_cuda import FakeCuda

PRECISIONS = ("fp32", "fp16", "bf16")
SM = ("--sm", "8.9")
RTX = ("--provider", "tensorrt-rtx", *SM)

Build = Callable[..., tuple[EngineManifest, Path]]
Refuse = Callable[..., str]


def install(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Put modules in place of those that are installed; None stands for one that is not."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def no_cuda() -> FakeCuda:
    """Stand for ``open_cuda`` on a machine without a GPU."""
    raise ProviderError("GPU 0", "is missing: 0 NVIDIA GPUs are visible", None, "Check nvidia-smi.")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")} if folder.exists() else {}


def check_engine(manifest: EngineManifest, path: Path, bundle: Path) -> None:
    """Compare a manifest with its plan and its bundle, and find it as the runtime does."""
    content = path.read_bytes()
    assert manifest.plan_bytes == len(content) > 0
    assert manifest.plan_sha256 == hashlib.sha256(content).hexdigest()
    assert manifest.bundle_sha256 == file_sha256(bundle / "gircse.json")
    assert manifest.build_seconds >= 0
    assert manifest.settings["strongly_typed"] is True
    for capability in manifest.compute_capabilities:
        selected = select_engine(
            Bundle.open(bundle),
            provider=manifest.provider,
            version=manifest.version,
            capability=capability,
            precisions=(manifest.precision,),
            layout=manifest.layout,
            verify=True,
        )
        assert selected == (manifest, path)
    assert {file.suffix for file in path.parent.iterdir()} <= {".plan", ".json", ".cache"}  # no scratch files
