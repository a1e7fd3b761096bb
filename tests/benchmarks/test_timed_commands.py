"""Commands end in time, do not run twice, and say why they did not run."""

import sys
import time
from pathlib import Path

import psutil
import pytest
from timed_commands import Command, Outcome, Status, run_commands

NEVER = float("inf")
COUNT = "import sys; open(sys.argv[1], 'a').write('x'); print('counted'); sys.exit(int(sys.argv[2]))"
SPAWN = "sleep 60 & echo $! > $0; echo started; sleep 60"


def counting(runs: Path, exit_code: int = 0) -> tuple[str, ...]:
    return (sys.executable, "-c", COUNT, str(runs), str(exit_code))


def run(tmp_path: Path, *commands: Command, deadline: float = NEVER) -> list[Outcome]:
    results = tmp_path / "results"
    results.mkdir(exist_ok=True)
    return run_commands(commands, results, deadline=deadline)


def test_what_is_done_does_not_run_again(tmp_path: Path) -> None:
    command = Command("count", counting(tmp_path / "runs"), 60)
    first = run(tmp_path, command)
    assert run(tmp_path, command) == first
    assert (tmp_path / "runs").read_text() == "x"
    assert (first[0].status, first[0].exit_code, first[0].last_line) == (Status.DONE, 0, "counted")


def test_other_arguments_run_again(tmp_path: Path) -> None:
    run(tmp_path, Command("count", counting(tmp_path / "runs"), 60))
    run(tmp_path, Command("count", (*counting(tmp_path / "runs"), "more"), 60))
    assert (tmp_path / "runs").read_text() == "xx"


def test_what_failed_runs_again(tmp_path: Path) -> None:
    command = Command("count", counting(tmp_path / "runs", exit_code=2), 60)
    assert [run(tmp_path, command)[0].status for _ in range(2)] == [Status.FAILED, Status.FAILED]
    assert (tmp_path / "runs").read_text() == "xx"


def test_an_exit_code_can_be_a_result(tmp_path: Path) -> None:
    command = Command("count", counting(tmp_path / "runs", exit_code=1), 60, verdicts=(1,))
    (outcome,) = run(tmp_path, command)
    assert (outcome.status, outcome.exit_code) == (Status.DONE, 1)


def test_without_the_file_that_it_writes_nothing_is_done(tmp_path: Path) -> None:
    """A crash of Python has the exit code of a gate that was not passed, and the file may be that of an earlier run."""
    report = tmp_path / "report.json"
    report.write_text("of an earlier run")
    crash = Command("report", counting(tmp_path / "runs", exit_code=1), 60, verdicts=(1,), writes=report)
    assert run(tmp_path, crash)[0].status is Status.FAILED
    write = Command("report", counting(report), 60, writes=report)
    assert run(tmp_path, write)[0].status is Status.DONE
    report.unlink()
    assert run(tmp_path, write)[0].status is Status.DONE
    assert report.read_text() == "x"


def test_a_command_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    start = time.monotonic()
    (outcome,) = run(tmp_path, Command("spawn", ("sh", "-c", SPAWN, str(child)), 5))
    assert time.monotonic() - start < 20
    assert (outcome.status, outcome.exit_code) == (Status.TIMEOUT, None)
    assert outcome.output.splitlines() == ["started", "ended after 5 s: its limit"]
    assert _ends(int(child.read_text()))


def test_the_deadline_ends_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    sleep = Command("sleep", (sys.executable, "-c", "import time; time.sleep(60)"), 60)
    later = Command("later", counting(tmp_path / "runs"), 60)
    start = time.monotonic()
    outcomes = run(tmp_path, sleep, later, deadline=start + 6)
    assert time.monotonic() - start < 20
    assert [outcome.status for outcome in outcomes] == [Status.TIMEOUT, Status.NOT_STARTED]
    assert outcomes[0].last_line.endswith("no time left")
    assert [outcome.status for outcome in run(tmp_path, later)] == [Status.DONE]


def test_what_cannot_run_here_is_skipped_with_what_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    missing = Command("engine", counting(runs), 60, missing="tensorrt is not installed")
    outcomes = run(
        tmp_path,
        missing,
        Command("speed", counting(runs), 60, ("engine",)),
        Command("broken", ("no-such-program",), 60),
        Command("after", counting(runs), 60, ("broken",)),
    )
    assert [(outcome.status, outcome.last_line.partition(":")[0]) for outcome in outcomes] == [
        (Status.SKIPPED, "tensorrt is not installed"),
        (Status.SKIPPED, "needs engine"),
        (Status.FAILED, "cannot be started"),
        (Status.SKIPPED, "needs broken"),
    ]
    assert not runs.exists()
    assert "[1/4] engine: skipped: tensorrt is not installed" in capsys.readouterr().out


def _ends(pid: int) -> bool:
    """Return whether a process that was killed is gone: the kernel takes a moment, and init may leave a zombie."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False
