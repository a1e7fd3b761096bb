"""``gircse-serve`` as a process: start, refusals, and an end that loses nothing."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_models import SmallModels

from gircse.runtime import Embedder

SECONDS = 60


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command on a free port; yields the process and its address."""
    command = [sys.executable, "-m", "gircse.serving.serve_command", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = re.search(r"http://\S+", line)
            if address is None:
                pytest.fail(f"{line!r} {process.communicate(timeout=SECONDS)}")
            yield process, address[0]
        finally:
            process.kill()


def post(address: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/v1/embeddings", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


def wait_for_queue(address: str, *, empty: bool) -> str:
    """Return the metrics as soon as nothing, or something, waits."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        metrics: str = urllib.request.urlopen(f"{address}/metrics").read().decode()
        if ("gircse_queue_tokens 0.0" in metrics) is empty:
            return metrics
    pytest.fail(f"the queue was {'never empty' if empty else 'always empty'}")


def refusal(*arguments: str) -> str:
    command = [sys.executable, "-m", "gircse.serving.serve_command", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2, done
    assert done.stdout == ""
    return done.stderr


def test_it_serves_the_bundle(small_models: SmallModels) -> None:
    bundle = small_models.bundle("qwen2")
    with served(str(bundle), "--provider", "cpu") as (process, address):
        vector = post(address, input="a bird", model=bundle.name)["data"][0]["embedding"]
        with Embedder(bundle, provider="cpu") as embedder:
            np.testing.assert_allclose(vector, embedder.encode("a bird"), atol=1e-6)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_sigterm_lets_requests_end(small_models: SmallModels) -> None:
    """What has begun when the signal comes is answered in full; a client that comes later finds no server."""
    texts = ["how do I reset the card"] * 200
    answers: list[Any] = []
    too_late: list[int] = []

    def ask(number: int) -> None:
        try:
            answers.append(post(address, input=texts))
        except urllib.error.HTTPError:  # an answer, and a wrong one
            raise
        except (urllib.error.URLError, ConnectionResetError):
            too_late.append(number)

    with served(str(small_models.bundle("qwen2")), "--provider", "cpu") as (process, address):
        post(address, input="warm")
        clients = [threading.Thread(target=ask, args=[number]) for number in range(8)]
        for client in clients:
            client.start()
        wait_for_queue(address, empty=False)
        process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join()
        assert process.wait(SECONDS) == 0
    assert answers
    assert {len(answer["data"]) for answer in answers} == {200}
    assert len(answers) + len(too_late) == 8


def test_a_client_that_went_away_is_dropped(small_models: SmallModels) -> None:
    body = json.dumps({"input": ["how do I reset the card"] * 2000}).encode()
    lines = (
        "POST /v1/embeddings HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    with served(str(small_models.bundle("qwen2")), "--provider", "cpu") as (_, address):
        post(address, input="warm")
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            wait_for_queue(address, empty=False)
        metrics = wait_for_queue(address, empty=True)
    assert 'gircse_requests_total{status="499"} 1.0' in metrics
    texts = re.search(r"gircse_batch_texts_sum (\S+)", metrics)
    assert texts is not None
    assert float(texts[1]) < 2001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1"),
        (["--max-batch-tokens", "0"], "--max-batch-tokens is 0"),
        (["--max-queue", "-1"], "--max-queue is -1"),
        (["--precision", "int3"], "int3"),
        (["--api-key-file", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str, small_models: SmallModels) -> None:
    assert message in refusal(str(small_models.bundle("qwen2")), *arguments)


def test_a_port_that_is_taken(small_models: SmallModels) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert f"--port {port} cannot be used" in refusal(str(small_models.bundle("qwen2")), "--port", str(port))


def test_a_missing_bundle(tmp_path: Path) -> None:
    assert "is not a bundle" in refusal(str(tmp_path))


def test_an_empty_file_of_keys(small_models: SmallModels, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n \n")
    message = refusal(str(small_models.bundle("qwen2")), "--api-key-file", str(tmp_path / "keys"))
    assert "holds no keys" in message


def test_an_open_server_warns(small_models: SmallModels, tmp_path: Path) -> None:
    bundle = str(small_models.bundle("qwen2"))
    (tmp_path / "keys").write_text("secret\n")
    for keys, warned in (([], True), (["--api-key-file", str(tmp_path / "keys")], False)):
        with served(bundle, "--provider", "cpu", "--host", "0.0.0.0", *keys) as (process, _):
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0
            assert process.stderr is not None
            assert ("--api-key-file" in process.stderr.read()) is warned


def test_a_bundle_that_fails_its_self_test_is_not_served(small_bundle: Path) -> None:
    path = small_bundle / "fp32" / "weights.bin"
    weights = np.fromfile(path, np.float32)
    weights[: len(weights) // 2] *= 1.05
    weights.tofile(path)
    command = [sys.executable, "-m", "gircse.serving.serve_command", str(small_bundle), "--no-verify", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the self-test failed" in done.stderr
