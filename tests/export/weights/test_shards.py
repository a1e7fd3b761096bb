"""Weights in several files: the same vectors, files that are small enough, and every one of them checked."""

from pathlib import Path

import numpy as np
import pytest
from support.int8_bundles import STEPS, run
from support.small_models import SmallModels, untrained_limits

from gircse.export import export_command
from gircse.export.exporter import export_bundle
from gircse.export.int8.qdq import fp16_scales
from gircse.export.options import ExportOptions
from gircse.export.weights import external_data
from gircse.runtime import BundleError, Embedder, OptionError
from gircse.runtime.bundle import Bundle

MOST = 128 << 10  # the vocabulary of a small model, the largest weight, has 97.5 KiB
TEXTS = ["the harbour freezes over", "a", ""]


def export_sharded(small_models: SmallModels, output: Path, **options: object) -> Bundle:
    settings = {"steps": 5, "model": str(small_models.checkpoint("llama")), "max_tokens": 48, "max_shard_bytes": MOST}
    with untrained_limits():
        return Bundle.open(export_bundle(ExportOptions(output=output, **settings | options)))


@pytest.mark.parametrize("layout", ["unrolled", "stepwise"])
def test_vectors_do_not_depend_on_the_files(small_models: SmallModels, tmp_path: Path, layout: str) -> None:
    bundle = export_sharded(small_models, tmp_path / "out")
    count = len(list(bundle.directory.glob("fp32/*.bin")))
    names = [f"fp32/weights-{number:05}.bin" for number in range(1, 1 + count)]
    assert len(names) > 2
    assert bundle.manifest.variants["fp32"].weight_files == tuple(names)
    whole = Bundle.open(small_models.bundle("llama"))
    sizes = [bundle.file(name).stat().st_size for name in names]
    assert max(sizes) <= MOST
    assert sum(sizes) == bundle.manifest.weight_bytes("fp32") <= whole.manifest.weight_bytes("fp32")
    vectors = [Embedder(path, layout=layout).encode(TEXTS) for path in (bundle.directory, whole.directory)]
    np.testing.assert_array_equal(*vectors)
    # hashed while they were written, and compared when they are loaded
    bundle.verify("fp32")
    last = bundle.file(names[-1])
    last.write_bytes(last.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BundleError, match=rf"{names[-1]} was changed or damaged"):
        Embedder(bundle.directory)
    last.unlink()
    with pytest.raises(BundleError, match=rf"{names[-1]} is missing"):
        Bundle.open(bundle.directory)


@pytest.mark.parametrize("copies", ["written", "not written"])
def test_int8_with_what_tensorrt_reads(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: str
) -> None:
    """Where FP16 copies cannot be written, the files that only they needed are gone."""

    def no_copy(scales: np.ndarray, name: str) -> np.ndarray:
        return fp16_scales(scales * np.float32(1e-7) if name == "model.embed_tokens.scale" else scales, name)

    if copies == "not written":
        monkeypatch.setattr(external_data, "fp16_scales", no_copy)
    calibration = small_models.calibration("llama", steps=STEPS)
    options = {"steps": STEPS, "precisions": ("int8",), "calibration": calibration, "max_shard_bytes": 40 << 10}
    bundle = export_sharded(small_models, tmp_path / "shards", **options)
    whole = export_sharded(small_models, tmp_path / "whole", **options | {"max_shard_bytes": None})
    variant = bundle.manifest.variants["int8"]
    assert {f"int8/{path.name}" for path in (bundle.directory / "int8").glob("*.bin")} == set(variant.weight_files)
    assert len(variant.weight_files) > 2
    assert (variant.tensorrt is None) == (copies == "not written")
    bundle.verify("int8")
    np.testing.assert_array_equal(run(bundle.directory, "int8"), run(whole.directory, "int8"))
    if variant.tensorrt is not None:
        import onnx
        from onnx import numpy_helper

        ours, theirs = (
            {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
            for path in (each.file("int8/engine.onnx") for each in (bundle, whole))
        )
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])


def test_limits_that_cannot_be_kept_are_refused(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OptionError, match=r"--max-shard-gib is 9\.5\d+e-07; .*embed_tokens\.weight alone has"):
        export_sharded(small_models, tmp_path / "out", max_shard_bytes=1 << 10)
    assert list(tmp_path.iterdir()) == []
    for value in ("0", "x", "nan", "inf"):
        with pytest.raises(SystemExit):
            export_command.main(["--steps", "1", "--max-shard-gib", value])
        assert f"'{value}' is not a number of GiB above 0" in capsys.readouterr().err
