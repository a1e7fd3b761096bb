"""What a checkpoint may be, and what is refused: code, pickles, other architectures, missing parts."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from support.small_models import SmallModels

from gircse.checkpoint.source import resolve_checkpoint
from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.runtime import CheckpointError
from gircse.runtime.errors import OptionError


def edit_config(checkpoint: Path, **change: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def export(checkpoint: Path, output: Path) -> None:
    export_bundle(ExportOptions(output=output, steps=2, model=str(checkpoint), max_tokens=48))


def test_local_directory(small_models: SmallModels) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("llama")))
    assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]
    assert checkpoint.adapter is None
    assert checkpoint.model.revision is None


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "no-such-model", "a/b/c"])
def test_no_such_directory(name: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"^--model .* is neither a directory nor a Hugging Face id\. Check the path\.$"
    ):
        resolve_checkpoint(name)


def test_hub_download_passes_revision_and_never_asks_for_pickles(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repository, revision, allow_patterns))
        return str(small_models.checkpoint("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = resolve_checkpoint("Qwen/Qwen2.5-7B", revision="abc123")
    assert checkpoint.model.name == "Qwen/Qwen2.5-7B"
    ((repository, revision, patterns),) = calls
    assert (repository, revision) == ("Qwen/Qwen2.5-7B", "abc123")
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in patterns)
    assert {"special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt"} < {*patterns}


def test_revision_of_a_local_model_is_not_ignored(small_models: SmallModels) -> None:
    with pytest.raises(
        OptionError, match=r"^--revision is v2, but .* is not a Hugging Face id\. Leave --revision out\.$"
    ):
        resolve_checkpoint(str(small_models.checkpoint("llama")), revision="v2")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nlong trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = (
        r"^Roytsai27/GIRCSE-QWEN7B cannot be downloaded from Hugging Face \(ConnectionError: no route to host\)\. Check"
    )
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint("Roytsai27/GIRCSE-QWEN7B")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(small_checkpoint: Path, name: str) -> None:
    (small_checkpoint / "model.safetensors").rename(small_checkpoint / name)
    with pytest.raises(
        CheckpointError, match=r"holds pickled weights; only safetensors are read.*save_pretrained\(DIR\)"
    ):
        resolve_checkpoint(str(small_checkpoint))


def test_pickled_adapter_is_refused(small_models: SmallModels, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin holds pickled weights"):
        resolve_checkpoint(str(small_models.checkpoint("llama")), adapter=str(tmp_path))


def test_code_of_a_checkpoint_is_never_run(small_checkpoint: Path, tmp_path: Path) -> None:
    (small_checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(small_checkpoint, auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(CheckpointError, match="code of a checkpoint is never executed"):
        export(small_checkpoint, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_config_problems(small_checkpoint: Path, tmp_path: Path) -> None:
    edit_config(small_checkpoint, model_type=None)
    with pytest.raises(CheckpointError, match="names no model_type"):
        export(small_checkpoint, tmp_path / "out")
    edit_config(small_checkpoint, model_type="no-such-type")
    with pytest.raises(CheckpointError, match=r"config\.json .*no-such-type"):
        export(small_checkpoint, tmp_path / "out")
    (small_checkpoint / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON: .* Replace the file\."):
        export(small_checkpoint, tmp_path / "out")
    (small_checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing\. Complete the checkpoint"):
        export(small_checkpoint, tmp_path / "out")


def test_a_missing_shard_is_named(small_checkpoint: Path) -> None:
    weight_map = {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}
    (small_checkpoint / "model.safetensors").rename(small_checkpoint / "model-00001.safetensors")
    (small_checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = r"model-00002\.safetensors is missing; model\.safetensors\.index\.json lists it\. Download"
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(str(small_checkpoint))
    (small_checkpoint / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json holds a JSON list; it should hold a JSON object\."):
        resolve_checkpoint(str(small_checkpoint))
    (small_checkpoint / "model.safetensors.index.json").write_text('{"weight_map": ["model-00001.safetensors"]}')
    with pytest.raises(CheckpointError, match=r"index\.json lists no files; its weight_map should give one for every"):
        resolve_checkpoint(str(small_checkpoint))


def test_directories_without_weights(small_models: SmallModels, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json\. Check"
    ):
        resolve_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing; --adapter takes a PEFT LoRA\."):
        resolve_checkpoint(str(small_models.checkpoint("llama")), adapter=str(tmp_path))
