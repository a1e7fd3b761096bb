"""A repository of ``gircse-triton`` in Triton Inference Server itself."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_models import SmallModels, scale_weights
from support.tolerances import BATCH_MAX_DIFFERENCE, CONTROL_MIN_DIFFERENCE
from support.triton_server import running_triton, text_inputs
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from gircse.runtime import Embedder
from gircse.runtime.numerics import Float32
from gircse.serving import triton_command

TEXTS = ["how do I reset the card", "a bird", "", "Größe 🐦 \0 end", "ships " * 90]


@dataclass(frozen=True)
class Triton:
    """A server and its repository."""

    client: InferenceServerClient
    repository: Path

    def embed(self, texts: list[Any], *, model: str = "gircse", **options: Any) -> Float32:
        return self.client.infer(model, text_inputs(texts, **options)).as_numpy("EMBEDDING")

    def write(self, name: str, bundle: Path, folder: Path, *flags: str) -> Path:
        """Write a model into the repository of the running server; returns its folder."""
        arguments = [str(bundle), "--output", str(folder / "repository"), "--model-name", name, *flags]
        assert triton_command.main(arguments) == 0
        return Path(shutil.move(folder / "repository" / name, self.repository / name))

    def refusal(self, name: str) -> str:
        with pytest.raises(InferenceServerException) as caught:
            self.client.load_model(name)
        return str(caught.value)


@pytest.fixture(scope="module")
def triton(small_models: SmallModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    folder = tmp_path_factory.mktemp("triton")
    repository = folder / "models"
    repository.mkdir()
    with running_triton(repository, folder) as client:
        server = Triton(client, repository)
        server.write("gircse", small_models.bundle("qwen2", query_instruction="Find the card"), folder)
        client.load_model("gircse")
        yield server


@pytest.mark.parametrize("text", TEXTS)
def test_one_text(text: str, triton: Triton, embedder: Embedder) -> None:
    (vector,) = triton.embed([text])
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, embedder.encode(text), atol=BATCH_MAX_DIFFERENCE)


def test_a_batch(triton: Triton, embedder: Embedder) -> None:
    np.testing.assert_allclose(triton.embed(TEXTS), embedder.encode(TEXTS), atol=BATCH_MAX_DIFFERENCE)


def test_steps_and_instructions_of_their_own(triton: Triton, embedder: Embedder) -> None:
    steps, instructions = [0, 1, 2, 5, 1], ["Find the card", "", "Größe", "", "Find the card"]
    vectors = triton.embed(TEXTS, steps=steps, instruction=instructions)
    expected = [
        embedder.encode(text, steps=count, instruction=instruction)
        for text, count, instruction in zip(TEXTS, steps, instructions, strict=True)
    ]
    np.testing.assert_allclose(vectors, expected, atol=BATCH_MAX_DIFFERENCE)
    plain = embedder.encode(TEXTS)
    assert np.abs(vectors[[0, 1, 2, 4]] - plain[[0, 1, 2, 4]]).max(axis=1).min() > CONTROL_MIN_DIFFERENCE


@pytest.fixture(scope="module")
def patient(triton: Triton, small_models: SmallModels, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that waits until 32 texts are there: without, it is faster than a client sends them."""
    folder = tmp_path_factory.mktemp("patient")
    config = triton.write("patient", small_models.bundle("qwen2"), folder) / "config.pbtxt"
    delayed = "dynamic_batching { max_queue_delay_microseconds: 5000000 }"
    config.write_text(config.read_text().replace("dynamic_batching { }", delayed))
    triton.client.load_model("patient")
    return "patient"


def test_requests_are_merged(triton: Triton, embedder: Embedder, patient: str) -> None:
    texts = [f"how do I reset card {number}" for number in range(32)]
    before = triton.client.get_inference_statistics(patient)["model_stats"][0]
    waiting = [triton.client.async_infer(patient, text_inputs([text])) for text in texts]
    vectors = np.concatenate([answer.get_result().as_numpy("EMBEDDING") for answer in waiting])
    after = triton.client.get_inference_statistics(patient)["model_stats"][0]
    np.testing.assert_allclose(vectors, embedder.encode(texts), atol=BATCH_MAX_DIFFERENCE)
    assert after["inference_count"] - before.get("inference_count", 0) == len(texts)
    assert after["execution_count"] - before.get("execution_count", 0) < len(texts) / 4


def test_an_error_is_that_of_one_request(triton: Triton, embedder: Embedder, patient: str) -> None:
    """Of one batch, those with a fault are refused, and the others get their vectors."""
    waiting = []
    for number in range(32):
        text: str | bytes = b"\xff" if number % 8 == 3 else f"card {number}"
        steps = 99 if number % 8 == 5 else 2 + number % 2
        waiting.append(triton.client.async_infer(patient, text_inputs([text], steps=steps)))
    for number, answer in enumerate(waiting):
        message = {3: r"TEXT\[0\] is not UTF-8", 5: "steps is 99; this bundle has 0 to 5"}.get(number % 8)
        if message:
            with pytest.raises(InferenceServerException, match=message) as caught:
                answer.get_result()
            assert caught.value.status() == "400"
        else:
            expected = embedder.encode([f"card {number}"], steps=2 + number % 2)
            vectors = answer.get_result().as_numpy("EMBEDDING")
            np.testing.assert_allclose(vectors, expected, atol=BATCH_MAX_DIFFERENCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": -1}, "steps is -1"), ({"instruction": b"\xc3("}, r"INSTRUCTION\[0\] is not UTF-8")],
    ids=["steps", "instruction"],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, triton: Triton) -> None:
    with pytest.raises(InferenceServerException, match=message):
        triton.embed(["a bird"], **options)


def test_a_copy_needs_no_bundle(triton: Triton, small_bundle: Path, tmp_path: Path) -> None:
    with Embedder(small_bundle, provider="cpu") as embedder:
        expected = embedder.encode(TEXTS)
    triton.write("copied", small_bundle, tmp_path, "--copy", "--threads", "1", "--layout", "unrolled")
    shutil.rmtree(small_bundle)
    triton.client.load_model("copied")
    np.testing.assert_allclose(triton.embed(TEXTS, model="copied"), expected, atol=BATCH_MAX_DIFFERENCE)


def test_a_damaged_bundle_is_not_served(triton: Triton, small_bundle: Path, tmp_path: Path) -> None:
    triton.write("damaged", small_bundle, tmp_path)
    path = small_bundle / "fp32" / "weights.bin"
    path.write_bytes(bytes(path.stat().st_size))
    assert "was changed or damaged" in triton.refusal("damaged")


def test_a_bundle_that_fails_its_self_test_is_not_served(triton: Triton, small_bundle: Path, tmp_path: Path) -> None:
    triton.write("wrong", small_bundle, tmp_path)
    scale_weights(small_bundle, 0, 0.5, 1.05)
    assert "the self-test failed: smallest cosine to PyTorch" in triton.refusal("wrong")


def test_a_bundle_of_other_dimensions_is_not_served(triton: Triton, small_bundle: Path, tmp_path: Path) -> None:
    config = triton.write("other", small_bundle, tmp_path) / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [ 48 ]", "dims: [ 47 ]"))
    assert "config.pbtxt has vectors of" in triton.refusal("other")
