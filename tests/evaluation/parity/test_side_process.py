"""A side in its own process: its result, progress and errors arrive, and nothing of it stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.sides import break_down, compute, die, fail, fill_the_disk
from support.small_models import SmallModels

from gircse.evaluation.parity.side_process import load_result, run_side
from gircse.reporting.progress import Advance, StageProgress, Unit
from gircse.runtime import MeasurementError, OutputError


class Recorder(StageProgress):
    def __init__(self) -> None:
        self.seen: list[object] = []

    @contextmanager
    def stage(self, title: str, *, total: float | None = None, unit: Unit = Unit.WORK) -> Iterator[Advance]:
        self.seen.append((title, total))
        yield self.seen.append
        self.seen.append("done")

    def note(self, text: str) -> None:
        self.seen.append(text)


def test_result_and_progress_arrive(tmp_path: Path) -> None:
    progress = Recorder()
    result = run_side("it", tmp_path / "it", progress, compute, 6, name="x")
    assert progress.seen == [("first", 6), 6, "done", "a note", ("second", None), "done"]
    np.testing.assert_array_equal(result.vectors, [[0, 2, 4], [1, 3, 5]])
    assert (result.nothing.shape, result.name) == ((0, 3, 5), "x")
    assert not result.vectors.flags.writeable  # mapped, not read
    np.testing.assert_array_equal(load_result(tmp_path / "it").vectors, result.vectors)


@pytest.mark.parametrize(
    "error", [MeasurementError("a", "b", "c", "d"), ModuleNotFoundError("none", name="it"), OSError(28, "full", "f")]
)
def test_errors_are_those_of_the_side(tmp_path: Path, error: Exception) -> None:
    progress = Recorder()
    with pytest.raises(type(error)) as raised:
        run_side("it", tmp_path / "it", progress, fail, error)
    assert str(raised.value) == str(error)
    assert getattr(raised.value, "name", None) == getattr(error, "name", None)
    assert progress.seen == [("never done", None)]


def test_what_ends_a_side_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MeasurementError, match=r"of it was killed by SIGKILL\. Most likely memory ran out\. Use"):
        run_side("it", tmp_path / "killed", Recorder(), die, signal.SIGKILL)
    with pytest.raises(MeasurementError, match=r"of it ran out of memory\. Use"):
        run_side("it", tmp_path / "memory", Recorder(), fail, MemoryError())
    with pytest.raises(MeasurementError, match=r"of it ended with code 1\. What it printed above may say why"):
        run_side("it", tmp_path / "fault", Recorder(), break_down)
    assert "AssertionError: a fault of ours" in capfd.readouterr().err
    folder = tmp_path / "disk"
    with pytest.raises(OutputError, match=r"disk cannot be written: .*TMPDIR"):
        run_side("it", folder, Recorder(), fill_the_disk, folder)


@pytest.mark.parametrize("begun", ["gircse-parity-*/reference", "gircse-parity-*/fp32"])
def test_ctrl_c_ends_everything_and_leaves_nothing(small_models: SmallModels, tmp_path: Path, begun: str) -> None:
    code = "import sys; from gircse.evaluation.parity_command import main; sys.exit(main(sys.argv[1:]))"
    bundles = [str(small_models.bundle("llama", layout=layout)) for layout in ("unrolled", "stepwise")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, bundles[0], "--reference", bundles[1]],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    while not list(tmp_path.glob(begun)):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to both processes
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "gircse-parity: interrupted"
    assert "Traceback" not in err
    assert list(tmp_path.glob("gircse*")) == []
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process of the command lives on")
