"""Workers on Ray: how machines are divided, and what is done where workers fail."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.bulk_job import write_lines
from support.small_models import SmallModels

from gircse.runtime import BundleError, OptionError, ProviderError
from gircse.runtime.bundle import Bundle
from gircse.serving.bulk import bulk_command
from gircse.serving.bulk.inputs import inspect
from gircse.serving.bulk.job import Columns, Fragment, IdType, Job, Recipe, VectorType, write_job
from gircse.serving.bulk.storage import locate
from gircse.serving.bulk.worker import FragmentReport, Task, Worker

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
ray_pool = pytest.importorskip("gircse.serving.bulk.ray_pool")

GIB = 1 << 30


@pytest.mark.parametrize(
    ("nodes", "wanted", "share"),
    [
        ([{"CPU": 2}], {}, (2, 1, 0)),  # a worker for each core
        ([{"CPU": 2}], {"workers": 1}, (1, 2, 0)),
        ([{"CPU": 16}], {"workers": 3}, (3, 5, 0)),
        ([{"CPU": 16}], {"threads": 4}, (4, 4, 0)),
        ([{"CPU": 16, "memory": 9 * GIB}], {}, (4, 4, 0)),  # of 1 GiB each, twice
        ([{"CPU": 16, "memory": GIB}], {}, (1, 16, 0)),
        ([{"CPU": 8}, {"CPU": 4}], {"workers": 1}, (1, 8, 0)),  # a worker is on one machine
        ([{"CPU": 8, "GPU": 2}], {}, (2, 1, 1)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}], {"gpu": True, "threads": 2}, (3, 2, 1)),
        ([{"CPU": 8, "GPU": 2}], {"gpu": False}, (8, 1, 0)),
    ],
)
def test_machines_are_divided(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], wanted: dict[str, Any], share: tuple[int, int, int]
) -> None:
    have_nodes(monkeypatch, nodes)
    assert divide(**wanted) == share


@pytest.mark.parametrize(
    ("nodes", "wanted", "said"),
    [
        ([{"CPU": 2}], {"workers": 3}, "Ray has 2 CPUs; 3 workers need 3"),
        ([{"CPU": 2}], {"workers": 1, "threads": 3}, "Ray has 2 CPUs; 1 workers need 3"),
        ([{"CPU": 2}, {"CPU": 2}], {"workers": 1, "threads": 3}, "--threads 3 is too much: the largest machine has 2"),
        ([{"CPU": 8, "GPU": 1}], {"gpu": True, "workers": 2}, "Ray has 1 GPUs; 2 workers need 2"),
        ([{"CPU": 8}], {"gpu": True}, "Ray has no GPU"),
    ],
)
def test_what_no_machine_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], wanted: dict[str, Any], said: str
) -> None:
    have_nodes(monkeypatch, nodes)
    with pytest.raises(OptionError, match=said):
        divide(**wanted)


def have_nodes(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]]) -> None:
    listed = [{"Alive": True, "Resources": {"memory": 99 * GIB, **node}} for node in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 64}}
    monkeypatch.setattr(ray, "nodes", lambda: [*listed, dead])


def divide(**wanted: Any) -> tuple[int, int, int]:
    options: dict[str, Any] = {"workers": None, "threads": None, "gpu": None, "weight_bytes": GIB, **wanted}
    share: tuple[int, int, int] = ray_pool.divide(**options)
    return share


@pytest.mark.parametrize(
    ("flags", "share", "threads", "streams"),
    [
        (["--workers", "2"], (2, 4, 0), 4, 1),
        (["--workers", "2", "--threads", "3"], (2, 3, 0), 3, 1),
        (["--workers", "2", "--streams", "4"], (2, 4, 0), 1, 4),
        (["--workers", "auto", "--streams", "2", "--threads", "2"], (2, 4, 0), 2, 2),
    ],
)
def test_what_a_worker_opens_the_bundle_with(
    small_models: SmallModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    share: tuple[int, int, int],
    threads: int,
    streams: int,
) -> None:
    have_nodes(monkeypatch, [{"CPU": 8}])
    seen = []
    monkeypatch.setattr(ray_pool, "connected", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ray_pool, "run_on_ray", lambda task, _, __, given: seen.append((task, given)) or iter(()))
    lines = write_lines(tmp_path / "a.jsonl", range(4))
    bundle = small_models.bundle("qwen2")
    assert bulk_command.main([str(bundle), str(lines), "--output", str(tmp_path / "out"), *flags]) == 0
    ((task, given),) = seen
    assert given == share
    assert (task.arguments["threads"], task.arguments["streams"]) == (threads, streams)


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with (
        pytest.raises(ProviderError, match=r"--ray-address 127\.0\.0\.1:1 cannot be reached: .*refused"),
        ray_pool.connected("127.0.0.1:1"),
    ):
        pass


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    with ray_pool.connected(None):
        yield


@pytest.fixture
def task(small_models: SmallModels, tmp_path: Path) -> tuple[Task, list[Fragment]]:
    """Two fragments of two rows."""
    bundle = Bundle.open(small_models.bundle("qwen2"))
    recipe = Recipe(bundle.manifest_sha256(), None, None, 5, "", VectorType.FLOAT32)
    lines, columns, output = (
        write_lines(tmp_path / "a.jsonl", range(4)),
        Columns("text", "id"),
        locate(str(tmp_path / "out")),
    )
    job = Job(columns, 2, recipe, IdType.INTEGER, {str(lines): inspect(locate(str(lines)), columns, 2, None)})
    write_job(output, job)
    arguments = {"provider": "cpu", "threads": 1}
    return Task(str(bundle.directory), arguments, recipe, columns, IdType.INTEGER, output.name, 32, 4096), [
        *job.fragments(str(lines))
    ]


def run(task: tuple[Task, list[Fragment]]) -> list[FragmentReport]:
    return list(ray_pool.run_on_ray(*task, lambda recipe: None, ray_pool.Share(1, 1, 0)))


@pytest.mark.usefixtures("running_ray")
def test_an_error_of_a_worker_comes_back_as_it_was(task: tuple[Task, list[Fragment]]) -> None:
    other = msgspec.structs.replace(task[0].recipe, bundle="0" * 64)
    with pytest.raises(BundleError, match=r"has the manifest \w+ here; the job's is 000000000000\.$"):
        run((task[0]._replace(recipe=other), task[1]))


class Dying(Worker):
    """Dies at the second fragment."""

    def run(self, fragment: Fragment) -> FragmentReport:
        if fragment.first:
            os._exit(1)
        return super().run(fragment)


@pytest.mark.usefixtures("running_ray")
def test_a_fragment_that_kills_its_workers_ends_the_run(
    task: tuple[Task, list[Fragment]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "Worker", Dying)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    with pytest.raises(ProviderError, match=r"a\.jsonl, rows from 2, died one after the other, 3 of them: "):
        run(task)
    assert [path.name[-29:] for path in Path(task[0].output, "vectors").iterdir()] == ["0000000000-0000000002.parquet"]
