"""``gircse-serve`` on Ray Serve: a local Ray with two replicas, and what Serve is asked for."""

import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.small_models import SmallModels

from gircse.runtime import BundleError, Embedder, OptionError
from gircse.serving.metrics import Metrics
from gircse.serving.serve_command import build_parser

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
serve = pytest.importorskip("ray.serve", reason="ray is here without its extra serve")
from gircse.serving.ray_serve import Arguments, app, replica_app  # after the skip

SECONDS = 60
TEXTS = ["how do I reset the card", "the small bird sings", "", "old ships " * 60]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    """Of Serve's proxy, and of the metrics that Ray collects."""
    return free_port(), free_port()


@pytest.fixture(scope="module")
def address(
    small_models: SmallModels, ports: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    bundle = small_models.bundle("qwen2", query_instruction="Find the card")
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("secret\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONWARNINGS", "ignore")  # of Ray's own processes
        ray.init(
            num_cpus=4,  # whatever the machine has: two replicas and Serve's own processes have to fit
            include_dashboard=False,
            log_to_driver=False,
            _metrics_export_port=ports[1],
            _system_config={"metrics_report_interval_ms": 500},
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": ports[0]})
            patch.chdir(bundle.parent)
            relative = os.path.relpath(keys, bundle.parent)
            arguments = {"bundle": bundle.name, "model_name": "small", "api_key_file": relative}
            serve.run(app(Arguments.model_validate(arguments | {"min_replicas": "2", "max_replicas": "2"})))
            yield f"http://127.0.0.1:{ports[0]}"
        finally:
            serve.shutdown()
            ray.shutdown()


def metrics_of_both_replicas(port: int, *, name: str) -> str:
    """Return Ray's metrics as soon as two replicas have one of this name."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text: str = answer.read().decode()
        if len(set(re.findall(rf'^{name}{{.*replica="(\w+)"', text, re.MULTILINE))) == 2:
            return text
        time.sleep(0.2)
    pytest.fail(f"two replicas have no {name}:\n{text}")


def test_both_replicas_answer_openais_client(address: str, embedder: Embedder, ports: tuple[int, int]) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
    expected = embedder.encode(TEXTS)
    for _ in range(20):  # Serve draws a replica for each
        answer = client.embeddings.create(model="small", input=TEXTS)
        np.testing.assert_allclose([item.embedding for item in answer.data], expected, atol=1e-6)
    answer = client.embeddings.create(model="small", input=TEXTS, extra_body={"input_type": "query", "steps": 2})
    queries = embedder.encode(TEXTS, prompt_name="query", steps=2)
    np.testing.assert_allclose([item.embedding for item in answer.data], queries, atol=1e-5)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="other").embeddings.create(model="small", input=TEXTS)
    seen = metrics_of_both_replicas(ports[1], name="ray_gircse_texts_total")
    assert not any(word in seen for word in TEXTS[0].split() if len(word) > 4)


def test_ray_collects_what_the_server_counts(address: str, ports: tuple[int, int]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):  # it would be that of one replica, each time of another
        urllib.request.urlopen(f"{address}/metrics")
    families = {
        line.split()[2] for line in Metrics().text().decode().splitlines() if line.startswith("# TYPE") and line
    }
    seen = metrics_of_both_replicas(ports[1], name="ray_gircse_truncated_texts_total")
    found = set(re.findall(r"^# TYPE ray_(gircse_\w+)", seen, re.MULTILINE))
    assert found == {name for name in families if not name.endswith("_created")}


def test_the_arguments_are_the_flags_of_the_server() -> None:
    flags = {action.dest: action.default for action in build_parser()._actions}
    fields = {name: field.default for name, field in Arguments.model_fields.items()}
    ours = {"min_replicas", "max_replicas", "target_ongoing_requests"}
    assert fields.keys() - ours == flags.keys() - {"help", "host", "port"}
    differ = {name for name in fields.keys() & flags.keys() if fields[name] != flags[name]}
    assert differ == {"bundle", "provider", "threads"}


def test_what_serve_is_asked_for(tmp_path: Path) -> None:
    arguments = Arguments(bundle=tmp_path, provider="cuda", threads=3, max_replicas=5, max_queue=1000)
    deployment = app(arguments)._bound_deployment
    assert deployment.ray_actor_options == {"num_cpus": 3, "num_gpus": 1}
    assert deployment.max_ongoing_requests == 1000
    autoscaling = deployment._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas) == (1, 5)
    assert app(Arguments(bundle=tmp_path))._bound_deployment.ray_actor_options == {"num_cpus": 1, "num_gpus": 0}


def test_what_cannot_be_is_refused(small_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="presision"):
        Arguments.model_validate({"bundle": "bundle", "presision": "int8"})
    with pytest.raises(OptionError, match="provider is auto"):
        app(Arguments(bundle=small_bundle, provider="auto"))
    with pytest.raises(ValueError, match="max_queue"):
        Arguments(bundle=small_bundle, max_queue=-1)
    with pytest.raises(BundleError, match="is not a bundle"):
        replica_app(Arguments(bundle=tmp_path))


def test_a_replica_that_fails_its_self_test_does_not_start(small_bundle: Path) -> None:
    path = small_bundle / "fp32" / "weights.bin"
    weights = np.fromfile(path, np.float32)
    weights[: len(weights) // 2] *= 1.05
    weights.tofile(path)
    with pytest.raises(BundleError, match="fails its self-test"):
        replica_app(Arguments(bundle=small_bundle, no_verify=True))
