"""Nothing is published that the runtime does not run to PyTorch's vectors; the message says what is likely."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.odd_models import OddModel, odd_model, refused
from support.small_models import DATA, SIZES, SmallModels
from transformers import AutoModelForCausalLM, LlamaConfig

from gircse.checkpoint.reference import WholeReference
from gircse.export import exporter
from gircse.export.graph.builder import RefinementSettings
from gircse.export.options import ExportOptions
from gircse.export.variants import DecoderGraph
from gircse.runtime.errors import ExportError


def spoil(monkeypatch: pytest.MonkeyPatch, **change: Any) -> None:
    """Make the graphs compute something else than the reference does."""

    def spoiled(graph: Any, shape: Any, settings: RefinementSettings, *rest: Any) -> DecoderGraph:
        return DecoderGraph(graph, shape, dataclasses.replace(settings, **change), *rest)

    monkeypatch.setattr(exporter, "DecoderGraph", spoiled)


@pytest.mark.parametrize("layout", ["unrolled", "stepwise"])
def test_wrong_soft_tokens_are_not_published(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    odd = odd_model(small_models, tmp_path, "llama")
    spoil(monkeypatch, temperature=3.0)
    refused(
        odd,
        tmp_path,
        r"^the fp32 graph \(\w+\) differs from PyTorch from step 1 on, most there for '.*'; smallest cosine "
        r"0\.\d{6}; at least 0\.9999 is expected; nothing was published\. The prompt is right, the soft tokens are not",
        layout=layout,
    )


def test_wrong_weights_are_not_published(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = odd_model(small_models, tmp_path, "llama")
    other = odd_model(small_models, tmp_path / "other", "llama", target_modules=["q_proj"])

    monkeypatch.setattr(exporter, "open_reference", lambda *_, **__: WholeReference(other.truth))
    refused(odd, tmp_path, r"from the prompt on, .*A weight or a field of config\.json is read")


@pytest.mark.parametrize(("spread", "steps"), [(0.6, 5), (1.0, 16)])
def test_a_model_that_amplifies_rounding_is_told_so(tmp_path: Path, spread: float, steps: int) -> None:
    """Random weights that are far too large: PyTorch in FP32 is not PyTorch in FP64 either."""
    torch.manual_seed(7)
    config = LlamaConfig(**{**SIZES, "initializer_range": spread}, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    shutil.copyfile(DATA / "tokenizer.json", tmp_path / "model" / "tokenizer.json")
    message = (
        r"The model amplifies rounding: PyTorch's own float32 and float64 differ too, down to a cosine of 0\.\d+, so"
    )
    refused(OddModel(tmp_path / "model", None, model), tmp_path, message, steps=steps)


def test_nan_is_not_published(small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = odd_model(small_models, tmp_path, "llama")
    spoil(monkeypatch, temperature=1e-30)
    refused(odd, tmp_path, r"^the fp32 graph")


def test_without_onnxruntime_nothing_starts(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"onnxruntime is not installed; a bundle is run before it is published"):
        exporter.export_bundle(ExportOptions(output=tmp_path / "out", model=str(small_models.checkpoint("llama"))))
