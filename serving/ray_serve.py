"""The application of ``gircse-serve`` on Ray Serve: replicas on a cluster, as many as the load asks for.

    serve run gircse.serving.ray_serve:app bundle=/models/gircse-demo-8 precision=int8 threads=4 max_replicas=8

Each replica is the whole of ``gircse-serve``: it opens the bundle, tests itself and has its own queue, whose limit is
counted in tokens. Serve's limits count requests and must not come before it: with Serve's own of 5, a replica would
have 5 requests to make batches of, the others would wait at the proxy, and nobody would ever be told that the queue is
full. So Serve gives a replica as many requests as its queue has tokens, and a request has at least one. What is left
to Serve's proxies is the time when no replica takes requests, as while the first one starts.
"""

import argparse
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from starlette.applications import Starlette

from gircse.runtime import BundleError, Embedder, OptionError
from gircse.runtime.batch_planner import DEFAULT_BATCH_TOKENS
from gircse.runtime.command import open_arguments
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.serving.batching import DEFAULT_QUEUE_TOKENS
from gircse.serving.http_app import create_app
from gircse.serving.ray_metrics import RayMetrics
from gircse.serving.serve_command import server_options
from gircse.serving.start_checks import passes_self_test

PROXY_REQUESTS = 1024
"""Requests that wait at a proxy while no replica takes any; more are answered with 429."""

PROXY_RETRY_SECONDS = 5

SHUTDOWN_SECONDS = 300
"""A replica that is taken away may answer what it has begun for so long: a queue of short texts takes a minute."""


class Arguments(BaseModel):
    """What ``serve run`` and Serve's configuration files may say.

    Attributes:
        bundle: bundle directory, on every node.
        provider: as ``--provider`` of ``gircse-serve``, but never ``auto``.
        threads: of a replica, which reserves as many CPUs.
        min_replicas: how many there are without load.
        max_replicas: how many there may be.
        target_ongoing_requests: requests at a replica that Serve adds another one beyond; it takes the mean.

    The others are the flags of ``gircse-serve``.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    bundle: Path
    model_name: str | None = None
    precision: str | None = None
    provider: Provider = Provider.CPU
    layout: Layout | None = None
    threads: PositiveInt = 1
    no_verify: bool = False
    max_batch_tokens: PositiveInt = DEFAULT_BATCH_TOKENS
    max_queue: PositiveInt = DEFAULT_QUEUE_TOKENS
    max_body_mib: PositiveInt = 16
    api_key_file: Path | None = None
    accept_token_ids: bool = False
    allow_dimensions: bool = False
    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 16


def app(arguments: Arguments) -> Application:
    """Build the application, as ``serve run`` and configuration files ask for it.

    Raises:
        OptionError: the provider is ``auto``.
    """
    if arguments.provider is Provider.AUTO:
        raise OptionError("provider", "is auto", "Ray reserves a GPU for a replica or none", "Name a provider.")
    # Replicas work in another directory.
    paths = {"bundle": arguments.bundle, "api_key_file": arguments.api_key_file}
    absolute = arguments.model_copy(update={name: path and path.absolute() for name, path in paths.items()})

    def build() -> Starlette:
        return replica_app(absolute)

    deployment = serve.deployment(
        name="gircse",
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=arguments.target_ongoing_requests,
        ),
        ray_actor_options={
            "num_cpus": arguments.threads,
            "num_gpus": 0 if arguments.provider is Provider.CPU else 1,
        },
        max_ongoing_requests=arguments.max_queue,
        max_queued_requests=PROXY_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=PROXY_RETRY_SECONDS),
        graceful_shutdown_timeout_s=SHUTDOWN_SECONDS,
    )
    return deployment(serve.ingress(build)()).bind()


def replica_app(arguments: Arguments) -> Starlette:
    """Open the bundle in a replica. Serve sends it requests when this has returned.

    Raises:
        BundleError: the bundle cannot be used, or fails its self-test.
        ProviderError: the provider is not installed or cannot run the bundle.
        OptionError: an argument is out of range.
    """
    args = argparse.Namespace(**dict(arguments))
    options = server_options(args)
    embedder = Embedder(arguments.bundle, **open_arguments(args))  # until the process ends
    if not passes_self_test(embedder):
        raise BundleError(str(arguments.bundle), "fails its self-test", hint="The log of the replica says by how much.")
    return create_app(embedder, options, recorder=RayMetrics())
