"""Without a terminal, each stage is one line on stderr."""

import re

import pytest

from gircse.reporting.progress import StageProgress


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
