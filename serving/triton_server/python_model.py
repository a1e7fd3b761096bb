"""The model that ``model.py`` of a repository imports: an ``Embedder`` in Triton's Python backend.

Inputs, one row for each text, and output:
    TEXT         (texts, 1) bytes, UTF-8
    STEPS        (texts, 1) int32, refinement steps; all of them where it is left out
    INSTRUCTION  (texts, 1) bytes, UTF-8, put before the text; nothing where it is left out
    EMBEDDING    (texts, hidden) float32 unit vectors
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # a module of the backend, there inside Triton alone

from gircse.runtime import Embedder, GircseError, OptionError
from gircse.runtime.numerics import Float32
from gircse.serving.triton_server.request_batch import EmbedOptions, RequestBatch, TextRequest


class TritonPythonModel:
    """A bundle as a model of Triton; the server calls its methods, whose names it knows."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle that config.pbtxt names, relative to the folder of the model, and test it.

        Raises:
            TritonModelException: the bundle cannot be used, or it fails its self-test.
        """
        config = json.loads(args["model_config"])
        given = {key: parameter["string_value"] for key, parameter in config["parameters"].items()}
        threads = given.get("threads")
        self._batch_size = int(config["max_batch_size"])
        try:
            self._embedder = Embedder(
                Path(args["model_repository"]) / given["bundle"],
                precision=given.get("precision"),
                provider=given["provider"],
                layout=given.get("layout"),
                threads=int(threads) if threads else None,
                verify=given["verify"] == "true",
            )
        except GircseError as err:
            raise pb_utils.TritonModelException(str(err)) from err
        self._check(config)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Embed the texts of all requests; returns a response for each, in their order."""
        answers: list[Float32 | Exception | None] = [None] * len(requests)
        read: dict[int, TextRequest] = {}
        for number, request in enumerate(requests):
            try:
                read[number] = self._read(request)
            except OptionError as err:
                answers[number] = err
        batch = RequestBatch(self._embedder, list(read.values()), batch_size=self._batch_size)
        for number, answer in zip(read, batch.embed(), strict=True):
            answers[number] = answer
        return [_response(answer) for answer in answers]

    def finalize(self) -> None:
        """Free the bundle's graphs."""
        self._embedder.close()

    def _check(self, config: Mapping[str, Any]) -> None:
        """Refuse a bundle whose vectors are not those of the configuration, or not right."""
        declared, hidden = config["output"][0]["dims"], self._embedder.embedding_dimension
        if declared != [str(hidden)] and declared != [hidden]:  # a 64-bit integer is a string in JSON
            raise pb_utils.TritonModelException(f"config.pbtxt has vectors of {declared}, and the bundle of {hidden}")
        if not self._embedder.manifest.golden:
            pb_utils.Logger.log_warn("no self-test: the bundle holds no golden vectors")
            return
        report = self._embedder.self_test()
        if not report.passed:
            smallest = f"smallest cosine to PyTorch {report.min_cosine:.7f}"
            raise pb_utils.TritonModelException(f"the self-test failed: {smallest}")

    def _read(self, request: Any) -> TextRequest:
        """Decode the tensors of a request.

        Raises:
            OptionError: a text or an instruction is not UTF-8.
        """
        texts = [_text("TEXT", row, value) for row, value in enumerate(_values(request, "TEXT"))]
        steps = _values(request, "STEPS") or [self._embedder.steps] * len(texts)
        instructions = [_text("INSTRUCTION", row, value) for row, value in enumerate(_values(request, "INSTRUCTION"))]
        options = map(EmbedOptions, steps, instructions or [""] * len(texts))
        return TextRequest(texts, list(options))


def _values(request: Any, name: str) -> list[Any]:
    """Return the elements of an input; none where it was left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else list(tensor.as_numpy().ravel().tolist())


def _text(name: str, row: int, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as err:
        raise OptionError(f"{name}[{row}]", f"is not UTF-8: {err}") from err


def _response(answer: Float32 | Exception | None) -> Any:
    if isinstance(answer, Exception):
        bad_input = isinstance(answer, OptionError)
        code = pb_utils.TritonError.INVALID_ARG if bad_input else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), code))
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("EMBEDDING", answer)])
