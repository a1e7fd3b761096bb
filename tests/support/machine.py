"""What is installed on a machine, and the engines of a bundle that its simulated TensorRT loads."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from gircse.export.engine.profiles import ProfileSpec, SizeRange, engine_profiles
from gircse.runtime.bundle import Bundle, file_sha256
from gircse.runtime.errors import ProviderError
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import ENGINE_SCHEMA_VERSION, BuildRequest, EngineManifest
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import FakeTensorRt
from support.stub_onnxruntime import CPU, StubOnnxRuntime

MAX_BATCH, MAX_TOKENS = 3, 20
VARIANTS = ("fp32", "fp16", "bf16")
TEXTS = [
    "a short one",
    "two",
    "a text with a few more words in it",
    "",
    "how do I reset my PIN",
    "x",
    "two",
    "last one",
]


class Machine:
    """What is installed; nothing but ONNX Runtime for the CPU, unless a test adds to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.cuda: FakeCuda | None = None
        monkeypatch.setattr("gircse.runtime.trt.cuda.open_cuda", self._open_cuda)
        for name in ("tensorrt", "tensorrt_rtx"):
            self.install(name, None)
        self.onnxruntime = self.install("onnxruntime", StubOnnxRuntime("AzureExecutionProvider", CPU))

    def install(self, name: str, module: Any) -> Any:
        self._patch.setitem(sys.modules, name, module)
        return module

    def install_tensorrt(self, bundle: Path, provider: Provider = Provider.TENSORRT) -> FakeTensorRt:
        """Put in a GPU and a TensorRT whose engines are those of ``add_engine``."""
        self.cuda = self.cuda or FakeCuda()
        facts, rtx = Bundle.open(bundle).manifest.graph, provider is Provider.TENSORRT_RTX
        module = FakeTensorRt(self.cuda, facts, make_manifest(bundle, provider), rtx=rtx)
        return self.install("tensorrt_rtx" if rtx else "tensorrt", module)

    def _open_cuda(self) -> FakeCuda:
        if self.cuda is None:
            raise ProviderError("GPU 0", "is missing: 0 NVIDIA GPUs are visible", None, "Check nvidia-smi.")
        return self.cuda


def make_manifest(bundle: Path, provider: Provider, *, precision: str = "fp16") -> EngineManifest:
    facts = Bundle.open(bundle).manifest.graph
    specs = [ProfileSpec("throughput", SizeRange(1, 2, MAX_BATCH), SizeRange(1, 8, MAX_TOKENS))]
    return EngineManifest(
        schema_version=ENGINE_SCHEMA_VERSION,
        bundle_sha256=file_sha256(bundle / "gircse.json"),
        precision=precision,
        layout=Layout.STEPWISE,
        provider=provider,
        version=FakeTensorRt.__version__,
        compute_capabilities=("8.9",),
        profiles=tuple(engine_profiles(specs, facts, layout=Layout.STEPWISE, provider=provider)),
        request=BuildRequest((1, 2, MAX_BATCH), (1, 8, MAX_TOKENS)),
        settings={},
        build_seconds=1.0,
        plan_bytes=4,
        plan_sha256=hashlib.sha256(b"plan").hexdigest(),
    )


def add_engine(bundle: Path, provider: Provider = Provider.TENSORRT, *, precision: str = "fp16") -> Path:
    """Write an engine that ``FakeTensorRt`` loads; return the path of its plan."""
    manifest = make_manifest(bundle, provider, precision=precision)
    (bundle / "engines").mkdir(exist_ok=True)
    path = bundle / "engines" / f"{manifest.name}.plan"
    path.with_suffix(".json").write_bytes(manifest.to_json())
    path.write_bytes(b"plan")
    return path
