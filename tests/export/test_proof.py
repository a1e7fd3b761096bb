"""Nothing is published that the runtime does not run to PyTorch's vectors; the message says what is likely."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.odd_models import OddModel, odd_model, refused
from support.small_models import DATA, SIZES, SmallModels
from transformers import AutoModelForCausalLM, LlamaConfig

from gircse.checkpoint.reference import WholeReference
from gircse.export import exporter, proof
from gircse.export.graph.builder import RefinementSettings
from gircse.export.options import ExportOptions
from gircse.export.variants import DecoderGraph
from gircse.runtime.errors import ExportError
from gircse.runtime.precision import session_bytes


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


def checked_of(bundle: Path) -> dict[str, dict[str, int]]:
    variants = json.loads((bundle / "gircse.json").read_text())["variants"]
    return {name: variant.get("checked", {}) for name, variant in variants.items()}


def test_the_manifest_says_what_was_checked(small_models: SmallModels, tmp_path: Path) -> None:
    odd = odd_model(small_models, tmp_path, "llama")
    bundle = odd.export(tmp_path / "out", precisions=("fp32", "fp16", "bf16"))
    both = {"unrolled": 12, "stepwise": 12}
    assert checked_of(bundle) == {"fp32": both, "fp16": both, "bf16": {}}


def test_texts_that_would_take_too_long_are_left_out(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = odd_model(small_models, tmp_path, "llama")
    monkeypatch.setattr(proof, "MAX_SECONDS", 0.0)
    assert checked_of(odd.export(tmp_path / "one", layout="stepwise")) == {"fp32": {"stepwise": 1}}
    assert "  1 of 12 texts: the others would have taken too long" in capsys.readouterr().err
    spoil(monkeypatch, temperature=3.0)
    refused(odd, tmp_path, r"most there for 'ok'|most there for ''", layout="stepwise")


def test_as_many_texts_at_once_as_there_is_time_for(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights that are converted anew for each batch, one of 5 texts takes no longer than one of 1."""
    odd = odd_model(small_models, tmp_path, "llama")
    clock, sizes = 0.0, []
    embed = proof._embed

    def embed_in_100_s(embedder: Any, golden: Any, texts: list[int]) -> Any:
        nonlocal clock
        clock += 100.0
        sizes.append(len(texts))
        return embed(embedder, golden, texts)

    monkeypatch.setattr(proof, "_embed", embed_in_100_s)
    monkeypatch.setattr(proof, "time", SimpleNamespace(perf_counter=lambda: clock))
    assert checked_of(odd.export(tmp_path / "out", layout="stepwise")) == {"fp32": {"stepwise": 12}}
    assert sizes == [1, 5, 6]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_is_checked_without_copies_of_its_weights_where_these_do_not_fit(
    small_models: SmallModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
) -> None:
    odd = odd_model(small_models, tmp_path, "llama")
    least = session_bytes(precision, weights=0, embeddings=520 * 48, copy_weights=False)
    monkeypatch.setattr(proof, "available_memory", lambda: least)
    bundle = odd.export(tmp_path / "out", precisions=(precision,))
    assert checked_of(bundle) == {precision: {"unrolled": 12, "stepwise": 12}}
    assert "slowly, because copies of the weights do not fit in memory" in capsys.readouterr().err


def test_what_does_not_fit_is_left_out_and_said(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = odd_model(small_models, tmp_path, "llama")
    monkeypatch.setattr(proof, "available_memory", lambda: 1 << 20)
    bundle = odd.export(tmp_path / "out", layout="stepwise")
    assert checked_of(bundle) == {"fp32": {}}
    assert "fp32 (stepwise) is not checked against PyTorch: that needs" in capsys.readouterr().err
