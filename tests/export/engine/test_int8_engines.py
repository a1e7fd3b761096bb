"""Engines of quantized variants, built with TensorRT for RTX, which needs no GPU for it."""

from pathlib import Path
from typing import Any

import pytest
from support.int8_bundles import INT8, MODELS, export, int8_bundle
from support.small_models import SmallModels

from gircse.export.build_command import main
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.trt.engine_manifest import read_engines

RTX = ("--provider", "tensorrt-rtx", "--sm", "8.9")


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip(
        "tensorrt_rtx", reason="builds with TensorRT for RTX: pip install 'gircse-deploy[tensorrt-rtx]'"
    )


@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize("name", MODELS)
def test_engines(
    rtx: Any, small_models: SmallModels, name: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = int8_bundle(small_models, name)
    assert main([str(bundle), "--precision", precision, *RTX]) == 0
    path = Path(capsys.readouterr().out.strip())
    (plan,) = [plan for plan, place in read_engines(Bundle.open(bundle)) if place == path]
    assert (plan.precision, plan.layout, plan.plan_bytes) == (precision, Layout.STEPWISE, path.stat().st_size)


def test_engine_without_steps(rtx: Any, small_models: SmallModels, tmp_path: Path) -> None:
    calibration = small_models.calibration("llama", steps=0)
    bundle = export(small_models, tmp_path / "bundle", calibration, steps=0)
    assert main([str(bundle), "--precision", "int8", "--layout", "unrolled", *RTX]) == 0


def test_engine_with_the_vocabulary_excluded_from_quantization(
    rtx: Any, small_models: SmallModels, tmp_path: Path
) -> None:
    calibration = small_models.calibration("llama", steps=5)
    bundle = export(small_models, tmp_path / "bundle", calibration, keep_float32=("lm_head",))
    assert main([str(bundle), "--precision", "int8", *RTX]) == 0
