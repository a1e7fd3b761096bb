"""Without a terminal, each stage is one line on stderr."""

import re
import time

import pytest

from gircse.reporting.progress import StageProgress, Unit


def test_one_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StageProgress()
    with progress.stage("trace [bold]layers[/]", total=2) as advance:
        advance(1)
    progress.note("  a note [x]")
    with pytest.raises(ValueError, match="stop"), progress.stage("broken"):
        raise ValueError("stop")
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert re.fullmatch(r"✓ trace \[bold\]layers\[/\] \d+\.\d s", first)
    assert second == "  a note [x]"


def test_the_speed_of_bytes_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress().stage("write", total=3_000_000, unit=Unit.BYTES):
        time.sleep(0.1)
    (line,) = capsys.readouterr().err.splitlines()
    speed = re.fullmatch(r"✓ write 0\.\d s \((\d+) MB/s\)", line)
    assert speed is not None
    assert 5 < int(speed[1]) <= 30
