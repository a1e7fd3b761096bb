"""OpenAI's embeddings API over HTTP, by requests that clients send and by those that none should."""

import asyncio
import base64
import json
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from gircse.runtime import Embedder, ProviderError
from gircse.runtime.numerics import l2_normalize
from gircse.serving.http_app import ServerOptions, create_app

URL = "/v1/embeddings"
TEXT, LONG = "how do I reset the card", "old ships " * 60


def vectors(answer: Any, key: str = "embedding") -> Any:
    assert answer.status_code == 200, answer.text
    return np.array([item[key] for item in answer.json()["data"]], np.float32)


def refused(answer: Any, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    return answer.json()["error"]


@pytest.mark.parametrize("texts", [TEXT, [TEXT], [TEXT, "the small bird", ""]], ids=["string", "list", "several"])
def test_the_vectors_are_those_of_encode(texts: Any, client: TestClient, embedder: Embedder) -> None:
    answer = client.post(URL, json={"input": texts, "model": "small"})
    np.testing.assert_allclose(vectors(answer), np.atleast_2d(embedder.encode(texts)), atol=1e-6)
    body = answer.json()
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))
    assert (body["object"], body["model"]) == ("list", "small")
    listed = [texts] if isinstance(texts, str) else texts
    tokens = sum(map(len, embedder.tokenizer(listed)))
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_base64_is_little_endian_float32(client: TestClient, embedder: Embedder) -> None:
    answer = client.post(URL, json={"input": TEXT, "encoding_format": "base64"}).json()
    sent = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(sent, embedder.encode(TEXT), atol=1e-6)


def test_null_is_absent(client: TestClient, embedder: Embedder) -> None:
    fields = "model encoding_format dimensions user input_type instruction steps all_steps on_overflow".split()
    answer = client.post(URL, json={"input": TEXT, **dict.fromkeys(fields)})
    np.testing.assert_allclose(vectors(answer)[0], embedder.encode(TEXT), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"input_type": "query"}, {"prompt_name": "query"}),
        ({"input_type": "document"}, {}),
        ({"instruction": "Find birds"}, {"instruction": "Find birds"}),
        ({"instruction": "Find birds", "input_type": "query"}, {"instruction": "Find birds"}),
        ({"instruction": "", "input_type": "query"}, {}),
        ({"steps": 2}, {"steps": 2}),
        ({"steps": 0}, {"steps": 0}),
    ],
    ids=str,
)
def test_our_fields(fields: Any, arguments: Any, client: TestClient, embedder: Embedder) -> None:
    answer = client.post(URL, json={"input": [TEXT, "a bird"], **fields})
    np.testing.assert_allclose(vectors(answer), embedder.encode([TEXT, "a bird"], **arguments), atol=1e-5)


def test_all_steps(client: TestClient, embedder: Embedder) -> None:
    answer = client.post(URL, json={"input": [TEXT], "all_steps": True, "steps": 3})
    np.testing.assert_allclose(vectors(answer, "steps"), embedder.encode([TEXT], steps=3, all_steps=True), atol=1e-6)
    np.testing.assert_array_equal(vectors(answer), vectors(answer, "steps")[:, -1])


def test_truncation_is_told(client: TestClient, embedder: Embedder) -> None:
    answer = client.post(URL, json={"input": [LONG, TEXT, LONG]})
    assert answer.headers["X-Truncated-Texts"] == "2"
    assert answer.json()["usage"]["total_tokens"] == 2 * embedder.max_tokens + len(embedder.tokenizer([TEXT])[0])
    assert "X-Truncated-Texts" not in client.post(URL, json={"input": TEXT}).headers
    error = refused(client.post(URL, json={"input": [TEXT, LONG], "on_overflow": "error"}))
    assert error["param"] == "input"
    assert error["message"].startswith("input[1] has ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [TEXT, None]}, "input"),
        ({"input": {"text": TEXT}}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": TEXT, "steps": 6}, "steps"),
        ({"input": TEXT, "steps": -1}, "steps"),
        ({"input": TEXT, "steps": "2"}, "steps"),
        ({"input": TEXT, "steps": 0, "all_steps": True}, "all_steps"),
        ({"input": TEXT, "encoding_format": "int8"}, "encoding_format"),
        ({"input": TEXT, "dimensions": 12}, "dimensions"),
        ({"input": TEXT, "input_type": "passage"}, "input_type"),
        ({"input": TEXT, "input_type": "document", "instruction": "Find"}, "instruction"),
        ({"input": TEXT, "task": "retrieval"}, "task"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_field_is_named(body: Any, param: str, client: TestClient) -> None:
    error = refused(client.post(URL, json=body))
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_the_dimensions_of_the_model_may_be_named(client: TestClient) -> None:
    assert vectors(client.post(URL, json={"input": TEXT, "dimensions": 48})).shape == (1, 48)


def test_dimensions_are_cut_where_allowed(embedder: Embedder) -> None:
    with TestClient(create_app(embedder, ServerOptions(model="small", allow_dimensions=True))) as client:
        found = vectors(client.post(URL, json={"input": TEXT, "dimensions": 12}))
        np.testing.assert_allclose(found[0], l2_normalize(embedder.encode(TEXT)[:12]), atol=1e-6)
        for dimensions in (0, 49, -3):
            assert refused(client.post(URL, json={"input": TEXT, "dimensions": dimensions}))["param"] == "dimensions"


@pytest.mark.parametrize("ids", [[5, 6, 7], [[5, 6, 7], [8]]], ids=["one", "two"])
def test_token_ids_are_refused(ids: Any, client: TestClient) -> None:
    """LangChain's OpenAIEmbeddings sends ids of another tokenizer by default."""
    assert "check_embedding_ctx_length=False" in refused(client.post(URL, json={"input": ids}))["message"]


def test_token_ids_are_taken_where_allowed(embedder: Embedder) -> None:
    ids = embedder.tokenizer([TEXT, "a bird"])
    with TestClient(create_app(embedder, ServerOptions(model="small", accept_token_ids=True))) as client:
        expected = embedder.encode([TEXT, "a bird"])
        np.testing.assert_allclose(vectors(client.post(URL, json={"input": ids})), expected, atol=1e-6)
        np.testing.assert_allclose(vectors(client.post(URL, json={"input": ids[0]})), expected[:1], atol=1e-6)
        assert client.post(URL, json={"input": [7] * 100}).headers["X-Truncated-Texts"] == "1"
        for wrong in ([520], [-1], [[]], [[5], "a"], [5, "a"], [[5], 5], [[True]], [[5.0]]):
            assert refused(client.post(URL, json={"input": wrong}))["param"] == "input"
        refused(client.post(URL, json={"input": [[7] * 100], "on_overflow": "error"}))
        refused(client.post(URL, json={"input": [5], "instruction": "Find"}))


def test_other_models_are_not_found(client: TestClient) -> None:
    assert refused(client.post(URL, json={"input": TEXT, "model": "text-embedding-3-small"}), 404)["param"] == "model"
    refused(client.get("/v1/models/other"), 404)
    (model,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/small").json() == model
    assert (model["id"], model["dimensions"], model["steps"]) == ("small", 48, 5)


def test_other_paths_methods_and_types(client: TestClient) -> None:
    refused(client.get("/v2/embeddings"), 404)
    refused(client.get(URL), 405)
    refused(client.post(URL, content=json.dumps({"input": TEXT}), headers={"Content-Type": "text/plain"}), 415)
    assert client.post(URL, content=b'{"input": "a"}', headers={"Content-Type": "Application/JSON; charset=utf-8"})


def test_a_large_body_is_refused(embedder: Embedder) -> None:
    with TestClient(create_app(embedder, ServerOptions(model="small", body_bytes=100))) as client:
        refused(client.post(URL, json={"input": "a" * 100}), 413)
        vectors(client.post(URL, json={"input": "a"}))


def test_a_request_that_never_fits_the_queue_is_told(embedder: Embedder) -> None:
    with TestClient(create_app(embedder, ServerOptions(model="small", queue_tokens=10))) as client:
        assert refused(client.post(URL, json={"input": [TEXT] * 9}), 413)["code"] == "request_too_large"
        vectors(client.post(URL, json={"input": "a"}))


def test_keys(embedder: Embedder) -> None:
    with TestClient(create_app(embedder, ServerOptions(model="small", api_keys=("first", "second")))) as client:
        for path in ("/v1/models", "/v1/models/small"):
            refused(client.get(path), 401)
        for header in ("", "Bearer", "Bearer ", "Bearer third", "Basic first", "Bearer fir\xe9st", "first"):
            answer = client.post(URL, json={"input": TEXT}, headers={"Authorization": header.encode("latin-1")})
            assert refused(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for key in ("first", "second"):
            vectors(client.post(URL, json={"input": TEXT}, headers={"Authorization": f"Bearer {key}"}))
        assert client.get("/health").status_code == 200


def test_metrics_count(embedder: Embedder) -> None:
    with TestClient(create_app(embedder, ServerOptions(model="small"))) as client:
        client.post(URL, json={"input": [TEXT, LONG]})
        client.post(URL, json={"input": TEXT, "steps": 99})
        lines = client.get("/metrics").text.splitlines()
    tokens = len(embedder.tokenizer([TEXT])[0]) + embedder.max_tokens
    for line in (
        'gircse_requests_total{status="200"} 1.0',
        'gircse_requests_total{status="400"} 1.0',
        "gircse_texts_total 2.0",
        f"gircse_tokens_total {float(tokens)}",
        "gircse_truncated_texts_total 1.0",
        "gircse_queue_tokens 0.0",
        'gircse_stage_seconds_count{stage="run"} 1.0',
        'gircse_stage_seconds_count{stage="total"} 1.0',
    ):
        assert line in lines
    assert not any(word in line for line in lines for word in TEXT.split() if len(word) > 4)


def test_a_failed_batch_is_an_error_of_the_server(
    embedder: Embedder, client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ProviderError("ONNX Runtime", "failed", None, "If memory ran out, use smaller batches.")

    monkeypatch.setattr(embedder, "run_batch", fail)
    error = refused(client.post(URL, json={"input": TEXT}), 500)
    assert error["type"] == "server_error"
    assert "memory ran out" in caplog.text
    assert TEXT not in caplog.text
    monkeypatch.undo()
    vectors(client.post(URL, json={"input": TEXT}))


def test_a_canceled_request_leaves_the_queue(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve cancels the request of a client that went away."""
    app = create_app(embedder, ServerOptions(model="small"))
    transport = httpx.ASGITransport(app)
    running, go_on = threading.Event(), threading.Event()
    run_batch = embedder.run_batch

    def wait(*arguments: Any, **options: Any) -> Any:
        running.set()
        assert go_on.wait(60)
        return run_batch(*arguments, **options)

    async def ask_and_leave() -> str:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            async with app.router.lifespan_context(app):
                ahead = asyncio.create_task(client.post(URL, json={"input": TEXT}))
                assert await asyncio.to_thread(running.wait, 60)
                leaving = asyncio.create_task(client.post(URL, json={"input": TEXT}))
                while "gircse_queue_tokens 0.0" in (await client.get("/metrics")).text:
                    await asyncio.sleep(0.01)
                leaving.cancel()
                await asyncio.wait([leaving])
                go_on.set()
                assert (await ahead).status_code == 200
            return (await client.get("/metrics")).text  # when all batches have ended

    monkeypatch.setattr(embedder, "run_batch", wait)
    lines = asyncio.run(ask_and_leave()).splitlines()
    for line in (
        'gircse_requests_total{status="499"} 1.0',
        'gircse_requests_total{status="200"} 1.0',
        "gircse_queue_tokens 0.0",
        "gircse_batch_texts_sum 1.0",
    ):
        assert line in lines


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    "input model encoding_format dimensions user input_type instruction steps all_steps on_overflow other".split()
)


@given(st.dictionaries(FIELDS, JSON) | JSON)
def test_any_json_is_answered_or_refused(client: TestClient, body: Any) -> None:
    answer = client.post(URL, json=body)
    assert answer.status_code < 500
    if answer.status_code != 200:
        refused(answer, answer.status_code)


@given(st.binary(max_size=60) | st.text().map(lambda text: b'{"input": "' + text.encode("utf-8") + b'"}'))
def test_any_bytes_are_answered_or_refused(client: TestClient, body: bytes) -> None:
    assert client.post(URL, content=body, headers={"Content-Type": "application/json"}).status_code < 500


@pytest.mark.parametrize("text", ["\\ud800", "\\udfff\\ud800", "\\u0000", "\\ud83d\\ude00"])
def test_escapes(text: str, client: TestClient) -> None:
    answer = client.post(URL, content=f'{{"input": "{text}"}}', headers={"Content-Type": "application/json"})
    lone = text in ("\\ud800", "\\udfff\\ud800")
    assert answer.status_code == (400 if lone else 200)


def test_deep_nesting(client: TestClient) -> None:
    body = b'{"input": ' + b"[" * 100_000
    assert client.post(URL, content=body, headers={"Content-Type": "application/json"}).status_code == 400


def test_the_page_is_there(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.text.replace("http-equiv", "")  # nothing comes from elsewhere
