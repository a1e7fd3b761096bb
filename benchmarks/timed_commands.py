"""Run commands within a time limit. Each result has a file of its own: a later run goes on where this one ended."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

OUTPUT_CHARACTERS = 8000
LEAST_SECONDS = 5.0
"""With less time left no command is started: it would end before it has imported its libraries."""


class Status(StrEnum):
    """What became of a command: skipped for a reason, or not started because the time was up."""

    DONE = "done"
    FAILED = "failed"
    TIMEOUT = "timeout"
    SKIPPED = "skipped"
    NOT_STARTED = "not started"


@dataclass(frozen=True)
class Command:
    """A command and what it needs.

    Attributes:
        name: of its result file.
        argv: program and arguments.
        limit_s: seconds after which it is ended.
        needs: names of earlier commands that have to be done.
        missing: why it cannot run on this machine.
        verdicts: exit codes that are results, such as a gate that was not passed; 0 always is.
        writes: file without which there is no result, whatever the exit code says.
        environment: variables besides those of this process.
    """

    name: str
    argv: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()
    missing: str | None = None
    verdicts: tuple[int, ...] = ()
    writes: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a command did; the content of its result file.

    Attributes:
        name: of the command.
        argv: what ran.
        status: what became of it.
        exit_code: None unless it ended by itself.
        seconds: how long it ran.
        output: the end of what it printed, on both streams; the reason where it did not run.
    """

    name: str
    argv: tuple[str, ...]
    status: Status
    exit_code: int | None = None
    seconds: float = 0.0
    output: str = ""

    @property
    def last_line(self) -> str:
        """Why it went wrong: the last line that it printed."""
        return next((line.strip() for line in reversed(self.output.splitlines()) if line.strip()), "no output")


def run_commands(commands: Sequence[Command], directory: Path, *, deadline: float) -> list[Outcome]:
    """Run commands in their order and return what became of each.

    A command that is done, with the same arguments, does not run again; one that failed or ran out of time does.

    Args:
        commands: names are unique.
        directory: existing directory of the result files, ``NAME.json``.
        deadline: value of ``time.monotonic()`` after which nothing runs.
    """
    outcomes: dict[str, Outcome] = {}
    for number, command in enumerate(commands, 1):
        saved = _read(directory / f"{command.name}.json", command)
        outcome = saved or _skipped(command, outcomes, deadline)
        print(f"[{number}/{len(commands)}] {command.name}", end="", flush=True)
        if outcome is None:
            print(f", {deadline - time.monotonic():.0f} s left ... ", end="", flush=True)
            outcome = _run(command, deadline)
            _write(directory / f"{command.name}.json", outcome)
            print(f"{outcome.status} after {outcome.seconds:.0f} s", flush=True)
        else:
            print(": done before" if saved else f": {outcome.status}: {outcome.output}", flush=True)
        if outcome.status in (Status.FAILED, Status.TIMEOUT):
            print(f"    {outcome.last_line}", flush=True)
        outcomes[command.name] = outcome
    return list(outcomes.values())


def _skipped(command: Command, outcomes: Mapping[str, Outcome], deadline: float) -> Outcome | None:
    """Return why a command does not run; None if it does."""
    if command.missing is not None:
        return Outcome(command.name, command.argv, Status.SKIPPED, output=command.missing)
    for needed in (outcomes[name] for name in command.needs):
        if needed.status is not Status.DONE:
            return Outcome(command.name, command.argv, Status.SKIPPED, output=f"needs {needed.name}")
    if deadline - time.monotonic() < LEAST_SECONDS:
        return Outcome(command.name, command.argv, Status.NOT_STARTED, output="no time left")
    return None


def _run(command: Command, deadline: float) -> Outcome:
    start = time.monotonic()
    limit = min(command.limit_s, deadline - start)
    if command.writes is not None:
        command.writes.unlink(missing_ok=True)  # of an earlier run with other arguments
    try:
        process = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that its own processes can be ended with it
        )
    except OSError as err:
        return Outcome(command.name, command.argv, Status.FAILED, output=f"cannot be started: {err}")
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        why = "its limit" if limit == command.limit_s else "no time left"
        output = f"{_end(process).rstrip()}\nended after {limit:.0f} s: {why}"
        return Outcome(command.name, command.argv, Status.TIMEOUT, None, time.monotonic() - start, output)
    except BaseException:
        _end(process)
        raise
    done = process.returncode in (0, *command.verdicts) and _is_written(command)
    return Outcome(
        command.name,
        command.argv,
        Status.DONE if done else Status.FAILED,
        process.returncode,
        time.monotonic() - start,
        output[-OUTPUT_CHARACTERS:],
    )


def _end(process: subprocess.Popen[str]) -> str:
    """End a command with all processes that it started, and return the end of its output."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0][-OUTPUT_CHARACTERS:]


def _is_written(command: Command) -> bool:
    return command.writes is None or command.writes.is_file()


def _read(path: Path, command: Command) -> Outcome | None:
    """Return the result of an earlier run, if it is one of this very command."""
    if not path.is_file() or not _is_written(command):
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    outcome = Outcome(**{**saved, "argv": tuple(saved["argv"]), "status": Status(saved["status"])})
    return outcome if outcome.status is Status.DONE and outcome.argv == command.argv else None


def _write(path: Path, outcome: Outcome) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(outcome), indent=1), encoding="utf-8")
    partial.replace(path)
