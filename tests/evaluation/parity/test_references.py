"""A reference is the checkpoint of the export or a bundle that computes the same; anything else is refused."""

from pathlib import Path

import pytest
from support.small_models import SmallModels

from gircse.evaluation.parity.references import check_same_task, parse_bundle_reference, source_checkpoint
from gircse.runtime import CheckpointError, MeasurementError
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import OptionError


def test_bundle_references(tmp_path: Path) -> None:
    assert parse_bundle_reference("a/b:fp16") == (Path("a/b"), "fp16")
    assert parse_bundle_reference("a/b") == (Path("a/b"), None)
    (tmp_path / "x:y").mkdir()
    assert parse_bundle_reference(f"{tmp_path}/x:y") == (tmp_path / "x:y", None)


def test_another_checkpoint_is_refused(
    small_models: SmallModels, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = Bundle.open(bundle).manifest
    here = str(small_models.checkpoint("llama"))
    assert source_checkpoint(manifest, model=here).model == manifest.model
    with pytest.raises(OptionError, match=r"^--model is needed: what was used is a local directory, llama\."):
        source_checkpoint(manifest)
    other = str(small_models.checkpoint("qwen2"))
    with pytest.raises(CheckpointError, match=r"the SHA-256 of the config\.json is [0-9a-f]{64}; .* --model"):
        source_checkpoint(manifest, model=other)
    with pytest.raises(CheckpointError, match=r"the SHA-256 of the adapter is [0-9a-f]{64}; .* it was none"):
        source_checkpoint(manifest, model=here, adapter="demo")


def test_a_reference_computes_the_same_task(small_models: SmallModels, bundle: Path) -> None:
    ours = Bundle.open(bundle)
    check_same_task(ours, Bundle.open(small_models.bundle("llama", layout="stepwise")))
    with pytest.raises(MeasurementError, match=r"has steps 3; .* has 5"):
        check_same_task(ours, Bundle.open(small_models.bundle("llama", steps=3)))
