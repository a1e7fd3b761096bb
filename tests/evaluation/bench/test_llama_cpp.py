"""The llama.cpp baseline computes what our PyTorch reference computes, from the GGUF file that we write."""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.small_models import SIZES, randomize_vectors
from support.tolerances import (
    CONTROL_MIN_DIFFERENCE,
    LLAMA_CPP_BATCH_MAX_DIFFERENCE,
    LLAMA_CPP_MIN_COSINE,
    LLAMA_CPP_MIN_COSINE_DEMO,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from gircse.checkpoint.reference import load_reference, step_states
from gircse.checkpoint.source import resolve_checkpoint
from gircse.evaluation.bench import llama_cpp
from gircse.evaluation.bench.backends import LlamaCppSpec
from gircse.evaluation.bench.gguf import gguf_of, write_q8_0_gguf
from gircse.evaluation.bench.llama_cpp import LlamaCppBaseline
from gircse.evaluation.bench.worker import Worker
from gircse.evaluation.tasks.prompts import read_prompts
from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import CheckpointError, MeasurementError, ProviderError
from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import Float32, l2_normalize, row_cosine
from gircse.runtime.tokenization import open_tokenizer

NOT_INSTALLED = "llama-cpp-python is not installed: pip install 'gircse-deploy[llama-cpp]'"
STEPS = 5
TOKENS = 9
MODELS = {
    "tied": {},
    "biased": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "q8_0": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "initializer_range": 0.08},
}
"""Rows of 48 do not divide into blocks of Q8_0 and stay FP32, which is exact enough to tell a wrong weight."""


@dataclass(frozen=True)
class Case:
    """A model for both backends."""

    gguf: Path
    reference: Any

    def open(self, **options: Any) -> LlamaCppBaseline:
        table = self.reference.get_input_embeddings().weight.numpy(force=True)
        size = {"batch": 3, "tokens": TOKENS, "steps": STEPS, "threads": 2, "repack": False}
        return LlamaCppBaseline(self.gguf, **{"embedding_table": table, **size, **options})

    def expected(
        self, ids: NDArray[np.int64], *, steps: int, temperature: float = 1.0, pooling: Pooling = Pooling.MEAN
    ) -> Float32:
        inputs = torch.from_numpy(ids)
        states = step_states(
            self.reference, inputs, torch.ones_like(inputs), steps=steps, temperature=temperature
        ).numpy()
        return l2_normalize(states[:, 1:].mean(axis=1) if pooling is Pooling.MEAN else states[:, -1])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    pytest.importorskip("llama_cpp", reason=NOT_INSTALLED)

    @functools.cache
    def make(name: str) -> Case:
        directory = tmp_path_factory.mktemp(name)
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **MODELS[name]}), dtype=torch.float32)
        randomize_vectors(model)
        model.save_pretrained(directory)
        checkpoint = resolve_checkpoint(str(directory))
        write_q8_0_gguf(checkpoint, directory / "model.gguf")
        return Case(directory / "model.gguf", load_reference(checkpoint))

    return make


@pytest.fixture(scope="module")
def tied(cases: Callable[[str], Case]) -> Case:
    return cases("tied")


@pytest.fixture(scope="module")
def baseline(tied: Case) -> Iterator[LlamaCppBaseline]:
    with tied.open() as baseline:
        yield baseline


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(1, SIZES["vocab_size"], (3, TOKENS))


@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_those_of_the_reference(cases: Callable[[str], Case], ids: NDArray[np.int64], name: str) -> None:
    case = cases(name)
    with case.open() as baseline:
        for steps in (1, STEPS):
            vectors = baseline.run(ids, steps=steps)
            assert vectors.dtype == np.float32
            np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
            floor = LLAMA_CPP_MIN_COSINE["q8_0" if name == "q8_0" else "fp32"]
            assert row_cosine(vectors, case.expected(ids, steps=steps)).min() > floor


def test_temperature_divides_the_logits(tied: Case, ids: NDArray[np.int64]) -> None:
    with tied.open(temperature=2.0) as baseline:
        vectors = baseline.run(ids, steps=STEPS)
    expected = tied.expected(ids, steps=STEPS, temperature=2.0)
    assert row_cosine(vectors, expected).min() > LLAMA_CPP_MIN_COSINE["fp32"]
    assert (np.abs(vectors - tied.expected(ids, steps=STEPS)).max(axis=1) > CONTROL_MIN_DIFFERENCE).all()


def test_the_last_state_can_stand_for_all(tied: Case, ids: NDArray[np.int64]) -> None:
    with tied.open(pooling=Pooling.LAST) as baseline:
        vectors = baseline.run(ids, steps=2)
    expected = tied.expected(ids, steps=2, pooling=Pooling.LAST)
    assert row_cosine(vectors, expected).min() > LLAMA_CPP_MIN_COSINE["fp32"]
    assert (np.abs(vectors - tied.expected(ids, steps=2)).max(axis=1) > CONTROL_MIN_DIFFERENCE).all()


def test_one_step_fewer_differs(tied: Case, baseline: LlamaCppBaseline, ids: NDArray[np.int64]) -> None:
    expected = tied.expected(ids, steps=STEPS)
    assert (np.abs(baseline.run(ids, steps=STEPS - 1) - expected).max(axis=1) > CONTROL_MIN_DIFFERENCE).all()


def test_a_batch_is_its_texts_one_by_one(baseline: LlamaCppBaseline, ids: NDArray[np.int64]) -> None:
    together = baseline.run(ids, steps=STEPS)
    alone = np.concatenate([baseline.run(row[None], steps=STEPS) for row in ids])
    assert np.abs(together - alone).max() < LLAMA_CPP_BATCH_MAX_DIFFERENCE
    assert np.abs(together - alone[::-1]).max() > CONTROL_MIN_DIFFERENCE


def test_a_run_leaves_nothing_behind(baseline: LlamaCppBaseline, ids: NDArray[np.int64]) -> None:
    before = baseline.run(ids[:2, :4], steps=2)
    baseline.run(ids, steps=STEPS)
    np.testing.assert_array_equal(baseline.run(ids[:2, :4], steps=2), before)


@pytest.mark.parametrize(
    ("shape", "steps"), [((4, TOKENS), 1), ((1, TOKENS + 1), 1), ((0, TOKENS), 1), ((1, 2), 0), ((1, 2), STEPS + 1)]
)
def test_more_than_there_is_room_for_is_refused(baseline: LlamaCppBaseline, shape: tuple[int, int], steps: int) -> None:
    with pytest.raises(ValueError, match="Open the baseline with more room"):
        baseline.run(np.ones(shape, np.int64), steps=steps)


def test_failures_of_llama_cpp_are_errors_of_ours(tied: Case, baseline: LlamaCppBaseline, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match=r"llama_decode gave -1 .*invalid token"):
        baseline.run(np.full((1, 2), SIZES["vocab_size"]), steps=1)
    with pytest.raises(CheckpointError, match=r"has vocabulary and hidden size .* the GGUF file of the same model"):
        tied.open(embedding_table=np.zeros((7, 48), np.float32))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tied.gguf.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"damaged\.gguf cannot be loaded by llama\.cpp: .* Check --gguf"):
        Case(damaged, tied.reference).open()


def test_a_closed_baseline_says_so(tied: Case, ids: NDArray[np.int64]) -> None:
    baseline = tied.open()
    baseline.close()
    baseline.close()
    with pytest.raises(ValueError, match="baseline is closed"):
        baseline.run(ids, steps=1)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    llama_cpp._llama_cpp.cache_clear()
    size = {"batch": 1, "tokens": 1, "steps": 1, "threads": 1}
    with pytest.raises(
        ProviderError, match=r"llama-cpp-python is not installed\. .* pip install 'gircse-deploy\[llama-cpp\]'"
    ):
        LlamaCppBaseline(Path("model.gguf"), embedding_table=np.zeros((2, 2), np.float32), **size)


@pytest.mark.slow
def test_the_demo_agrees_with_pytorch(tmp_path: Path) -> None:
    """As the benchmark runs it, in its own process: llama.cpp's default weights use AMX where there is any."""
    pytest.importorskip("llama_cpp", reason=NOT_INSTALLED)
    bundle = Bundle.open(export_bundle(ExportOptions(output=tmp_path / "demo", steps=8, layout="stepwise")))
    checkpoint = resolve_checkpoint("demo")
    demo = Case(gguf_of(checkpoint), load_reference(checkpoint))
    tokenize = open_tokenizer(bundle)
    prompts = [np.array([ids]) for ids in tokenize([prompt.text for prompt in read_prompts(None)[:12]])]
    longest = max(prompt.size for prompt in prompts)
    spec = LlamaCppSpec(bundle, checkpoint, demo.gguf, "Q8_0", threads=2, batch=1, tokens=longest, steps=8)
    with Worker(spec) as worker:
        try:
            vectors = [worker.run(prompt, 8)[1] for prompt in prompts]
        except MeasurementError as err:
            pytest.skip(f"this build of llama.cpp: {err}")
    cosines = [row_cosine(ours, demo.expected(ids, steps=8)) for ours, ids in zip(vectors, prompts, strict=True)]
    assert np.min(cosines) > LLAMA_CPP_MIN_COSINE_DEMO
