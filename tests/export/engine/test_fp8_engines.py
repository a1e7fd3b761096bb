"""Engines of FP8 variants, built with TensorRT for RTX, which needs no GPU for it. None of them has run."""

from pathlib import Path
from typing import Any

import pytest
from support.int8_bundles import MODELS
from support.small_models import SmallModels
from support.vectors import STEPS

from gircse.export.build_command import main
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.trt.engine_manifest import read_engines

RTX = ("--precision", "fp8", "--provider", "tensorrt-rtx", "--sm")


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip(
        "tensorrt_rtx", reason="builds with TensorRT for RTX: pip install 'gircse-deploy[tensorrt-rtx]'"
    )


def fp8_bundle(small_models: SmallModels, name: str) -> Path:
    calibration = small_models.calibration(name, steps=STEPS)
    return small_models.bundle(name, steps=STEPS, precisions=("fp32", "fp8"), calibration=calibration)


@pytest.mark.parametrize("name", MODELS)
def test_engines(rtx: Any, small_models: SmallModels, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = fp8_bundle(small_models, name)
    assert main([str(bundle), *RTX, "8.9,12.0"]) == 0
    path = Path(capsys.readouterr().out.strip())
    (plan,) = [plan for plan, place in read_engines(Bundle.open(bundle)) if place == path]
    assert (plan.precision, plan.layout, plan.compute_capabilities) == ("fp8", Layout.STEPWISE, ("8.9", "12.0"))


@pytest.mark.parametrize("capabilities", ["8.6", "8.9,7.5"])
def test_gpus_without_fp8(
    rtx: Any, small_models: SmallModels, capabilities: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(fp8_bundle(small_models, "llama")), *RTX, capabilities]) == 2
    refused = capabilities.rpartition(",")[2]
    message = f"--precision fp8 cannot run on compute capability {refused}; it takes 8.9 or higher."
    assert message in capsys.readouterr().err
