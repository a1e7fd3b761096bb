"""Workers on Ray, one process each.

Ray's actors, not its datasets: a fragment leaves a file and nothing else, so that there is no data to move, and
whatever befalls a worker concerns one fragment, which can be done again.
"""

import logging
import os
import socket
import textwrap
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from gircse.runtime import OptionError, ProviderError
from gircse.serving.bulk.job import Fragment
from gircse.serving.bulk.worker import FragmentReport, OnOpen, Task, Worker

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Workers that may die at one fragment, or while they open the bundle, before the run is given up."""

STORE_BYTES = 100 << 20
"""Shared memory of a Ray of our own, which would take 30 % of the machine: what travels is small."""

COPIES = 2
"""Memory that a worker takes, as multiples of its weights, when there is a choice of how many there are."""


class Share(NamedTuple):
    """What each of the workers has.

    Attributes:
        workers: how many there are.
        cpus: of each, its threads.
        gpus: of each, 0 or 1.
    """

    workers: int
    cpus: int
    gpus: int


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start a Ray on this machine for as long as the block runs.

    Raises:
        ProviderError: there is no such cluster, or Ray cannot start.
    """
    if address is not None:
        _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home for a user who was not asked
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES} if address is None else {}
    try:
        ray.init(address=address or "local", logging_level=logging.ERROR, **own)
    except (ConnectionError, OSError, RuntimeError, ValueError) as err:
        where = f"--ray-address {address}" if address else "Ray"
        raise ProviderError(
            where,
            f"cannot be used: {err}",
            None,
            "Check that Ray runs; where a cluster asks for a token, set RAY_AUTH_MODE=token.",
        ) from err
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address where nobody listens: Ray would try for minutes, and say so in many lines."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not port.isdecimal():
        return  # auto, or a name that Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as err:
        raise ProviderError(
            f"--ray-address {address}", f"cannot be reached: {err}", None, "Check that Ray runs there."
        ) from err


def divide(*, workers: int | None, threads: int | None, gpu: bool | None, weight_bytes: int) -> Share:
    """Divide the machines that Ray has among workers.

    On GPUs, a worker for each. On CPUs, as many workers of one thread as there are cores, or as fit into memory.

    Args:
        workers: how many, None for as many as fit.
        threads: of each, None for an equal share.
        gpu: whether they need one; None takes GPUs where there are some.
        weight_bytes: size of the weights that each has in memory.

    Raises:
        OptionError: a worker fits into no machine, or the machines have less than the workers need.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    cpus, largest = (int(count(node.get("CPU", 0) for node in nodes)) for count in (sum, max))
    gpus, memory = (int(sum(node.get(name, 0) for node in nodes)) for name in ("GPU", "memory"))
    if gpu and not gpus:
        raise OptionError("Ray", "has no GPU", None, "Take --provider cpu, or another cluster.")
    if gpu or (gpu is None and gpus):
        share = Share(workers or gpus, threads or 1, 1)
    else:
        count = workers or max(1, min(cpus // (threads or 1), memory // (COPIES * weight_bytes)))
        share = Share(count, threads or max(1, min(cpus // count, largest)), 0)
    for name, there, each in (("CPUs", cpus, share.cpus), ("GPUs", gpus, share.gpus)):
        if share.workers * each > there:
            needed = f"{share.workers} workers need {share.workers * each}"
            raise OptionError("Ray", f"has {there} {name}", needed, "Take fewer --workers or --threads.")
    if share.cpus > largest:
        raise OptionError(f"--threads {share.cpus}", f"is too much: the largest machine has {largest} CPUs")
    return share


def run_on_ray(task: Task, fragments: Sequence[Fragment], on_open: OnOpen, share: Share) -> Iterator[FragmentReport]:
    """Do the fragments in any order; yields a report for each as it is done.

    A worker that dies is replaced, and its fragment done again.

    Raises:
        GircseError: as ``Worker`` does.
        ProviderError: workers keep dying.
    """
    actor_class: Any = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus)(Worker)
    waiting, left = deque(fragments), len(fragments)
    idle: list[Any] = []
    running: dict[Any, tuple[Any, Fragment | None]] = {}  # None: it opens the bundle
    deaths: Counter[Fragment | None] = Counter()

    def start() -> None:
        actor = actor_class.remote(task)
        running[actor.open.remote()] = actor, None

    for _ in range(min(share.workers, left)):
        start()
    while left:
        while waiting and idle:
            actor, fragment = idle.pop(), waiting.popleft()
            running[actor.run.remote(fragment)] = actor, fragment
        (done,), _ = ray.wait(list(running), num_returns=1)
        actor, task_of_actor = running.pop(done)
        try:
            result = ray.get(done)
        except RayTaskError as err:
            raise err.cause from None
        except RayError as err:  # it died, or its machine did
            deaths[task_of_actor] += 1
            if deaths[task_of_actor] == MAX_DEATHS:
                raise _gave_up(task_of_actor, err) from err
            logger.warning("a worker died; another takes its place")
            if task_of_actor is not None:
                waiting.appendleft(task_of_actor)
            start()
            continue
        idle.append(actor)
        if task_of_actor is None:
            on_open(result)
        else:
            left -= 1
            yield result


def _gave_up(fragment: Fragment | None, err: RayError) -> ProviderError:
    where = "workers" if fragment is None else f"workers at {fragment.input}, rows from {fragment.first},"
    doing = "while they opened the bundle" if fragment is None else "one after the other"
    reason = textwrap.shorten(str(err).strip().splitlines()[-1], 300)
    return ProviderError(
        where, f"died {doing}, {MAX_DEATHS} of them: {reason}", None, "Memory may be short: take fewer --workers."
    )
