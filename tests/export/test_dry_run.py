"""What ``gircse-export --dry-run`` says is what the export takes and refuses, and it costs next to nothing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.hub_server import hub_server
from support.small_models import SmallModels, randomize_vectors

from gircse.checkpoint.reference_choice import ReferenceBudget
from gircse.export import export_command
from gircse.export.dry_run import plan_export
from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.export.weights.layout import ALIGNMENT_BYTES
from gircse.runtime import GircseError
from gircse.runtime.precision import Precision


def options(small_models: SmallModels, output: Path, **change: Any) -> ExportOptions:
    settings: dict[str, Any] = {"model": str(small_models.checkpoint("qwen2")), "steps": 2, "max_tokens": 48}
    return ExportOptions(**settings | {"output": output} | change)


def test_nothing_is_written(small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = small_models.checkpoint("qwen2"), tmp_path / "out"
    flags = ["--model", str(model), "--steps", "2", "--max-tokens", "48", "--precision", "fp32,fp16"]
    assert export_command.main(["--dry-run", *flags, "--output", str(output)]) == 0
    assert list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "qwen2"
    assert "qwen2: 2 layers, hidden size 48, keys and values 16, vocabulary 520" in lines[1]
    for stage in ("trace", "write fp32", "write fp16", "PyTorch's vectors and overflow probe", "check fp16", "in all"):
        assert any(line.startswith(stage) for line in lines), stage
    assert lines[-1] == "nothing would be refused"


def test_sizes_are_those_of_the_bundle(small_models: SmallModels, tmp_path: Path) -> None:
    wanted = options(small_models, tmp_path / "out", precisions=(Precision.FP32, Precision.FP16))
    planned = {stage.name: stage.disk for stage in plan_export(wanted).stages}
    bundle = export_bundle(wanted)
    tensors = len(load_file(small_models.checkpoint("qwen2") / "model.safetensors"))
    for precision in wanted.precisions:
        written = (bundle / precision / "weights.bin").stat().st_size
        assert 0 <= written - planned[f"write {precision}"] <= ALIGNMENT_BYTES * tensors


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))


def full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1 << 28}))


@pytest.mark.parametrize("full", [full_disk, full_memory])
def test_a_machine_too_small_is_refused_with_the_error_of_the_export(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Any
) -> None:
    full(monkeypatch)
    wanted = options(small_models, tmp_path / "out")
    with pytest.raises(GircseError) as refused:
        export_bundle(wanted)
    assert [str(error) for error in plan_export(wanted).refusals] == [str(refused.value)]


def test_everything_that_is_refused_is_said_at_once(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letters.txt").touch()
    full_disk(monkeypatch)
    flags = ["--model", str(small_models.checkpoint("qwen2")), "--steps", "2", "--max-tokens", "48"]
    flags += ["--precision", "int8", "--output", str(tmp_path / "out")]
    assert export_command.main(["--dry-run", *flags]) == 2
    refusals = [line for line in capsys.readouterr().out.splitlines() if line.startswith("would be refused: ")]
    reasons = ("exists and is not a bundle", "needs a --calibration", "of free disk space")
    assert len(refusals) == len(reasons)
    assert all(reason in refusal for reason, refusal in zip(reasons, refusals, strict=True))


def test_a_calibration_of_another_model_is_refused(small_models: SmallModels, tmp_path: Path) -> None:
    calibration = small_models.calibration("llama", steps=2)
    wanted = options(small_models, tmp_path / "out", precisions=(Precision.INT8,), calibration=calibration)
    with pytest.raises(GircseError) as refused:
        export_bundle(wanted)
    assert [str(error) for error in plan_export(wanted).refusals] == [str(refused.value)]


def remark_of_pytorch(wanted: ExportOptions) -> str:
    return next(stage.remark for stage in plan_export(wanted).stages if stage.name.startswith("PyTorch"))


def test_how_pytorch_runs(small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = options(small_models, tmp_path / "out")
    assert remark_of_pytorch(wanted) == "the whole model in memory"
    assert remark_of_pytorch(options(small_models, tmp_path / "out", memory=1)).startswith("left out: PyTorch needs")
    monkeypatch.setattr(ReferenceBudget, "fits_whole", property(lambda _: False))
    assert remark_of_pytorch(wanted) == "layer by layer: 3 sweeps, about 0.00 GiB read"


@pytest.fixture(scope="module")
def repositories(small_models: SmallModels, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A model in two shards that are larger than the range of a first request, and an adapter for it."""
    directory = tmp_path_factory.mktemp("hub")
    model = small_models.load("qwen2")
    model.save_pretrained(directory / "model", max_shard_size="200KB")
    shutil.copyfile(small_models.checkpoint("qwen2") / "tokenizer.json", directory / "model" / "tokenizer.json")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    randomize_vectors(adapted)
    adapted.save_pretrained(directory / "adapter")
    return {"team/model": directory / "model", "team/adapter": directory / "adapter"}


def run(hub: str, cache: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "gircse.export.export_command", "--steps", "2", "--max-tokens", "48", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cache.parent)


def test_of_a_hugging_face_model_only_headers_are_read(
    repositories: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub_server(repositories) as hub:
        done = run(hub.url, tmp_path / "cache", "--dry-run", "--model", "team/model", "--adapter", "team/adapter")
    assert done.returncode == 0, done.stderr
    local = [str(repositories[f"team/{name}"]) for name in ("model", "adapter")]
    flags = ["--dry-run", "--steps", "2", "--max-tokens", "48", "--model", local[0], "--adapter", local[1]]
    assert export_command.main([*flags, "--output", str(tmp_path / "out")]) == 0
    remote, on_disk = done.stdout.splitlines(), capsys.readouterr().out.splitlines()
    assert remote[0] == on_disk[0].replace("model", "team/model").replace("adapter adapter", "adapter team/adapter")
    assert remote[1:3] == on_disk[1:3]
    assert any(line.startswith("download ") for line in remote)
    assert not any(line.startswith("download ") for line in on_disk)
    weights = {file.name: file.stat().st_size for path in repositories.values() for file in path.glob("*.safetensors")}
    assert len(weights) > 2
    for name, size in weights.items():
        assert 0 < hub.sent[name] <= min(size, 100_001), name
    assert sum(hub.sent[name] for name in weights) < sum(weights.values())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_hugging_face_model_that_is_not_there(repositories: Mapping[str, Path], tmp_path: Path) -> None:
    with hub_server(repositories) as hub:
        done = run(hub.url, tmp_path / "cache", "--dry-run", "--model", "team/missing")
    assert done.returncode == 2
    assert "error: team/missing cannot be downloaded from Hugging Face (RepositoryNotFoundError: " in done.stderr
    assert "Traceback" not in done.stderr
