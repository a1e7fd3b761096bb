"""Code written for sentence-transformers works as it is, or learns by name what to change."""

import inspect
from typing import Any, get_type_hints

import numpy as np
import pytest
from support.small_models import SmallModels

from gircse.runtime import Embedder, OptionError
from gircse.runtime.sentence_transformers_arguments import EncodeArguments


@pytest.fixture(scope="module")
def embedder(small_models: SmallModels) -> Embedder:
    return Embedder(small_models.bundle("qwen2", query_instruction="Find"), threads=2)


def test_the_arguments_that_work(embedder: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = embedder.encode(["ok"])
    defaults: dict[str, Any] = {
        "prompt_name": None,
        "prompt": None,
        "batch_size": 32,
        "show_progress_bar": None,
        "output_value": "sentence_embedding",
        "precision": "float32",
        "convert_to_numpy": True,
        "convert_to_tensor": False,
        "device": None,
        "normalize_embeddings": True,
        "truncate_dim": None,
    }
    np.testing.assert_array_equal(embedder.encode(["ok"], **defaults), wanted)
    np.testing.assert_array_equal(embedder.encode(["ok"], normalize_embeddings=False), wanted)  # their default
    np.testing.assert_array_equal(embedder.encode(["ok"], prompt="query: "), embedder.encode(["query: ok"]))
    assert embedder.get_embedding_dimension() == embedder.get_sentence_embedding_dimension() == wanted.shape[1]
    assert capsys.readouterr().err == ""
    embedder.encode(["ok"], show_progress_bar=True)
    assert "1/1" in capsys.readouterr().err


def test_prompt_names(embedder: Embedder) -> None:
    query = embedder.encode(["ok"], instruction="Find")
    np.testing.assert_array_equal(embedder.encode(["ok"], prompt_name="query"), query)
    np.testing.assert_array_equal(embedder.encode(["ok"], prompt_name="document"), embedder.encode(["ok"]))
    np.testing.assert_array_equal(
        embedder.encode(["ok"], prompt_name="query", prompt="query: "), embedder.encode(["query: ok"])
    )
    match = r"^prompt_name is 'passage'; a bundle has query and document\. Pass .* instruction\."
    with pytest.raises(OptionError, match=match):
        embedder.encode(["ok"], prompt_name="passage")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"output_value": "token_embeddings"}, r"output_value is 'token_embeddings'; .* all_steps=True"),
        ({"output_value": None}, r"output_value is None; "),
        ({"precision": "int8"}, r"precision is 'int8'; .* float32 vectors only\. .*Embedder\(path, precision="),
        ({"convert_to_numpy": False}, r"convert_to_numpy is False; .* Leave it out\."),
        ({"convert_to_tensor": True}, r"convert_to_tensor is True; .* torch\.from_numpy\(vectors\)"),
        ({"device": "cuda:0"}, r"device is 'cuda:0'; .* Embedder\(path, provider='cuda'\)"),
        ({"truncate_dim": 16}, r"truncate_dim is 16; .* not trained for shorter vectors\. .* normalize them again"),
    ],
)
def test_the_arguments_that_are_refused(embedder: Embedder, arguments: dict[str, Any], match: str) -> None:
    for method in (embedder.encode, embedder.encode_query, embedder.encode_document):
        with pytest.raises(OptionError, match=f"^{match}"):
            method(["ok"], **arguments)


def test_other_arguments_are_refused_by_python(embedder: Embedder) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        embedder.encode(["ok"], batchsize=8)
    with pytest.raises(TypeError, match=r"takes 2 positional arguments but 3 were given"):
        embedder.encode(["ok"], "query")


def test_queries_and_documents_take_every_argument_of_encode() -> None:
    parameters = list(inspect.signature(Embedder.encode).parameters)
    assert list(get_type_hints(EncodeArguments)) == parameters[2:]  # all but self and texts
