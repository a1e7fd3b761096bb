"""Damaged files of a calibration: it is read as it stands there, or there is one clear error."""

import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import damaged_document, damaged_safetensors
from support.outcomes import result_or_error
from support.small_models import SmallModels

from gircse.calibration.calibration_file import Calibration
from gircse.calibration.int8.gptq import Moments
from gircse.calibration.moments_file import MomentsFile, moments_path
from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.runtime.bundle import file_sha256
from gircse.runtime.precision import Precision


@pytest.fixture(scope="module")
def original(small_models: SmallModels) -> Path:
    return small_models.calibration("qwen2", steps=2)


@pytest.fixture(scope="module")
def copy(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "calibration.json"
    shutil.copyfile(moments_path(original), moments_path(path))
    return path


@given(data=st.data())
def test_calibration(original: Path, copy: Path, data: st.DataObject) -> None:
    copy.write_bytes(data.draw(damaged_document(original.read_bytes())))

    def read() -> Calibration:
        calibration = Calibration.read(copy)
        calibration.check(Calibration.read(original).fingerprint, copy)
        return calibration

    found = result_or_error(read)
    if found is not None:
        assert Calibration.read(original).fingerprint.norm_sha256 == found.fingerprint.norm_sha256
        for entry in found.inputs.values():
            assert len(entry.thresholds) == 3
            assert all(0 <= threshold < math.inf for threshold in entry.thresholds)
        copy.write_bytes(found.to_json())
        assert Calibration.read(copy) == found


@settings(max_examples=settings.default.max_examples // 10)  # an export takes a second
@given(data=st.data())
def test_an_export_from_a_calibration(
    small_models: SmallModels, original: Path, copy: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    copy.write_bytes(data.draw(damaged_document(original.read_bytes())))
    output = tmp_path_factory.mktemp("export") / "bundle"
    options = {"model": str(small_models.checkpoint("qwen2")), "steps": 2, "max_tokens": 48, "layout": "stepwise"}
    exported = result_or_error(
        lambda: export_bundle(
            ExportOptions(output=output, precisions=(Precision.INT8,), calibration=copy, **options)  # type: ignore[arg-type]
        )
    )
    assert output.exists() is (exported is not None)
    assert len(list(output.parent.iterdir())) == (exported is not None)  # nothing half-written beside it


@given(data=st.data())
def test_moments_whose_hash_agrees(original: Path, copy: Path, data: st.DataObject) -> None:
    shutil.copyfile(original, copy)
    moments = moments_path(copy)
    moments.write_bytes(data.draw(damaged_safetensors(moments_path(original).read_bytes())))
    names = [name for name in Calibration.read(original).inputs if name != "lm_head"]

    def read() -> list[Moments]:
        opened = MomentsFile.open(copy, file_sha256(moments))
        return [opened.read(name) for name in names]

    found = result_or_error(read)
    shutil.copyfile(moments_path(original), moments)
    if found is not None:
        intact = MomentsFile.open(copy, file_sha256(moments))
        for name, blocks in zip(names, found, strict=True):
            assert [block.shape for block in blocks] == [block.shape for block in intact.read(name)]
