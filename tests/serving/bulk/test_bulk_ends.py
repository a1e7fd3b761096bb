"""Runs of ``gircse-bulk`` that end badly: what they leave, and that the next run makes it whole."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support.bulk_job import start, vectors_of, write_lines
from support.small_models import SmallModels

from gircse.serving.bulk import bulk_command, worker

ROWS, FRAGMENT = 1200, 4
SECONDS = 120


@pytest.fixture(scope="module")
def bundle(small_models: SmallModels) -> Path:
    return small_models.bundle("qwen2")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("texts") / "a.jsonl", range(ROWS))


@pytest.fixture(scope="module")
def whole(bundle: Path, lines: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, np.ndarray]:
    """The vectors of a run that nothing befell."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert bulk_command.main(command(bundle, lines, output)) == 0
    return vectors_of(output)


def command(bundle: Path, lines: Path, output: Path, *flags: str) -> list[str]:
    fixed = ["--provider", "cpu", "--threads", "1", "--fragment-rows", str(FRAGMENT)]
    return [str(bundle), str(lines), "--output", str(output), *fixed, *flags]


def check_same_vectors(output: Path, whole: dict[int, np.ndarray]) -> None:
    found = vectors_of(output)
    assert found.keys() == whole.keys()
    for number, vector in whole.items():
        np.testing.assert_array_equal(found[number], vector)
    names = [path.name for path in output.rglob("*") if path.is_file()]
    assert len(names) == 1 + ROWS // FRAGMENT  # job.json, and no scratch file


def wait_for(something: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not something():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fragments(output: Path) -> int:
    return len(list((output / "vectors").glob("*.parquet")))


@contextlib.contextmanager
def killed_later(*arguments: str) -> Iterator[psutil.Popen]:
    """Run the command, and end it and whatever it has started with the block."""
    with start(*arguments) as process:
        family = psutil.Process(process.pid)
        try:
            yield family
        finally:
            for child in family.children(recursive=True) if family.is_running() else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_killed(
    bundle: Path, lines: Path, tmp_path: Path, whole: dict[int, np.ndarray], number: signal.Signals
) -> None:
    output = tmp_path / "out"
    with start(*command(bundle, lines, output)) as process:
        wait_for(lambda: fragments(output) > 3)
        process.send_signal(number)
        said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert ("interrupted; what is done is kept" in said) is (number == signal.SIGINT)
    assert 3 < fragments(output) < ROWS // FRAGMENT
    assert bulk_command.main(command(bundle, lines, output)) == 0
    check_same_vectors(output, whole)


def test_a_full_disk(bundle: Path, lines: Path, tmp_path: Path, whole: dict[int, np.ndarray]) -> None:
    """A limit on the size of files stands for it: both fail in the middle of a write."""
    output = tmp_path / "out"
    larger = command(bundle, lines, output, "--fragment-rows", "400")  # than the limit, which job.json is not

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    with start(*larger, preexec_fn=limit) as process:
        said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 2
    assert f"--output {output} cannot be written: File too large" in said
    assert [path.name for path in output.rglob("*") if path.is_file()] == ["job.json"]
    assert bulk_command.main(larger) == 0
    found = vectors_of(output)
    np.testing.assert_allclose([found[number] for number in range(ROWS)], [*whole.values()], atol=1e-5)


def test_what_a_worker_was_writing_is_gone_at_the_end(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies leaves it, and the run goes on."""
    output, run = tmp_path / "out", worker.Worker.run

    def leaving(self: worker.Worker, fragment: Any) -> Any:
        done = run(self, fragment)
        (output / "vectors/.half.parquet").write_bytes(b"half")
        return done

    monkeypatch.setattr(worker.Worker, "run", leaving)
    assert bulk_command.main(command(bundle, write_lines(tmp_path / "a.jsonl", range(4)), output)) == 0
    assert [path.name.startswith(".") for path in (output / "vectors").iterdir()] == [False]


def two_busy_workers(family: psutil.Process, output: Path) -> list[psutil.Process]:
    """Wait until some fragments are done and both workers are at another; Ray names them so only while they are."""
    found: list[psutil.Process] = []

    def are_busy() -> bool:
        found.clear()
        for child in family.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.cmdline()[:1] == ["ray::Worker.run"]:
                    found.append(child)
        return fragments(output) > 3 and len(found) == 2

    wait_for(are_busy)
    return found


def test_a_worker_on_ray_is_killed(bundle: Path, lines: Path, tmp_path: Path, whole: dict[int, np.ndarray]) -> None:
    """Another takes its place, and the run goes on."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    output = tmp_path / "out"
    with killed_later(*command(bundle, lines, output, "--workers", "2")) as family:
        two_busy_workers(family, output)[0].kill()
        assert family.wait(SECONDS) == 0
    check_same_vectors(output, whole)


def test_the_driver_on_ray_is_killed(bundle: Path, lines: Path, tmp_path: Path, whole: dict[int, np.ndarray]) -> None:
    """Its workers end with it, and one process does the rest."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    output = tmp_path / "out"
    with killed_later(*command(bundle, lines, output, "--workers", "2")) as family:
        workers = two_busy_workers(family, output)
        os.kill(family.pid, signal.SIGKILL)
        assert not psutil.wait_procs(workers, timeout=SECONDS)[1]
    assert 3 < fragments(output) < ROWS // FRAGMENT
    assert bulk_command.main(command(bundle, lines, output)) == 0
    check_same_vectors(output, whole)
