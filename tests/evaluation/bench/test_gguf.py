"""The GGUF file that llama.cpp runs: its cache, its embedding table, and what it refuses to write."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.small_models import SmallModels

from gircse.checkpoint.source import resolve_checkpoint
from gircse.evaluation.bench import gguf
from gircse.evaluation.bench.gguf import embedding_table, gguf_of, write_q8_0_gguf
from gircse.runtime.errors import CheckpointError


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-yarn-bf16"])
def test_the_table_is_that_of_the_model(small_models: SmallModels, name: str) -> None:
    table = embedding_table(resolve_checkpoint(str(small_models.checkpoint(name))))
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, small_models.load(name).get_input_embeddings().weight.numpy(force=True))


def test_the_cache_tells_models_apart(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIRCSE_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(small_models.checkpoint("llama"), model)
    first = gguf_of(resolve_checkpoint(str(model)))
    written = first.stat().st_mtime_ns
    assert gguf_of(resolve_checkpoint(str(model))) == first
    assert first.stat().st_mtime_ns == written
    shard = model / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert gguf_of(resolve_checkpoint(str(model))) != first
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "found"), [("qwen2", "model_type qwen2"), ("llama-biased-llama3", "rope_type llama3")]
)
def test_what_would_be_written_wrongly_is_refused(
    small_models: SmallModels, tmp_path: Path, name: str, found: str
) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint(name)))
    with pytest.raises(CheckpointError, match=f"has {found}; .* --gguf"):
        write_q8_0_gguf(checkpoint, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(gguf, "_encode", fail)
    with pytest.raises(OSError, match="no space left"):
        write_q8_0_gguf(resolve_checkpoint(str(small_models.checkpoint("llama"))), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
