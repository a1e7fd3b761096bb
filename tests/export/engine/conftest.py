"""Fixtures of engine builds: a bundle to build from, ``gircse-build`` that succeeds or fails, a simulated TensorRT."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.engine_build import PRECISIONS, Build, Refuse, contents, install, no_cuda
from support.fake_cuda import FakeCuda
from support.fake_tensorrt_builder import FakeBuilderModule
from support.small_models import SmallModels

from gircse.export.build_command import main
from gircse.runtime.bundle import Bundle
from gircse.runtime.trt.engine_manifest import EngineManifest, read_engines


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip(
        "tensorrt_rtx", reason="builds with TensorRT for RTX: pip install 'gircse-deploy[tensorrt-rtx]'"
    )


@pytest.fixture
def bundle(small_models: SmallModels, tmp_path: Path) -> Path:
    """A copy whose path has a space."""
    copy = tmp_path / "my bundle"
    shutil.copytree(small_models.bundle("llama", precisions=PRECISIONS), copy)
    return copy


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built here must not depend on this machine's GPU."""
    monkeypatch.setattr("gircse.runtime.trt.cuda.open_cuda", no_cuda)


@pytest.fixture
def gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 8.9."""
    monkeypatch.setattr("gircse.runtime.trt.cuda.open_cuda", FakeCuda)


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str]) -> Build:
    """Run gircse-build, which must succeed; return the manifest that is read afterwards, and the plan's path."""

    def run(bundle: Path, *flags: str) -> tuple[EngineManifest, Path]:
        capsys.readouterr()
        code = main([str(bundle), *flags])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        path = Path(captured.out.strip())
        (found,) = [manifest for manifest, plan_path in read_engines(Bundle.open(bundle)) if plan_path == path]
        assert path.stem == found.name
        return found, path

    return run


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run gircse-build, which must fail with one message and change nothing in engines/; return the message."""

    def run(bundle: Path, *flags: str) -> str:
        before = contents(bundle / "engines")
        capsys.readouterr()
        code = main([str(bundle), *flags])
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        message = captured.err.splitlines()[-1].removeprefix("gircse-build: error: ")
        assert captured.err.count("gircse-build: error: ") == 1
        assert contents(bundle / "engines") == before
        return message

    return run


@pytest.fixture
def fake(bundle: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> FakeBuilderModule:
    """A GPU and ``tensorrt`` alone; installed after the export, because torch looks at what is installed."""
    module = FakeBuilderModule()
    install(monkeypatch, tensorrt=module, tensorrt_rtx=None)
    return module
