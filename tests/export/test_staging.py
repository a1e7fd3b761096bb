"""A bundle is published atomically, through kills, full disks and rivals."""

import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.small_models import SmallModels

from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.export.staging import staged_directory
from gircse.runtime import Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError, OutputError


def options(small_models: SmallModels, output: Path, **more: object) -> ExportOptions:
    return ExportOptions(
        output=output,
        steps=2,
        model=str(small_models.checkpoint("qwen2")),
        max_tokens=48,
        **more,  # type: ignore[arg-type]
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_two_exports_are_byte_identical(small_models: SmallModels, tmp_path: Path) -> None:
    first, second = (export_bundle(options(small_models, tmp_path / name)) for name in "ab")
    assert contents(first) == contents(second)


def test_bundles_are_replaced_only_with_force(small_models: SmallModels, tmp_path: Path) -> None:
    output = export_bundle(options(small_models, tmp_path / "out"))
    before = contents(output)
    with pytest.raises(OutputError, match=r"is a bundle already\. .* --force"):
        export_bundle(options(small_models, output))
    assert contents(output) == before
    export_bundle(options(small_models, output, pooling="last", force=True))
    assert Bundle.open(output).manifest.graph.pooling == "last"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [True, False])
def test_anything_else_is_never_replaced(small_models: SmallModels, tmp_path: Path, force: bool) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="nothing but a bundle is ever replaced"):
        export_bundle(options(small_models, tmp_path / "notes", force=force))
    with pytest.raises(OutputError, match="nothing but a bundle is ever replaced"):
        export_bundle(options(small_models, tmp_path / "notes" / "thesis.txt", force=force))
    assert contents(tmp_path) == {"notes/thesis.txt": b"years of work"}


def test_failure_leaves_the_old_bundle(small_models: SmallModels, tmp_path: Path) -> None:
    output = export_bundle(options(small_models, tmp_path / "out"))
    before = contents(output)

    def failing() -> None:
        with staged_directory(output, force=True) as directory:
            (directory / "half.bin").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert contents(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_exports_to_one_place(tmp_path: Path) -> None:
    def second() -> None:
        with staged_directory(tmp_path / "out", force=True):
            pass

    with staged_directory(tmp_path / "out", force=True) as directory:
        (directory / "gircse.json").write_text("{}")
        with pytest.raises(OutputError, match="is being written by another export"):
            second()
    assert contents(tmp_path) == {"out/gircse.json": b"{}"}


def test_crash_between_the_renames_is_undone(small_models: SmallModels, tmp_path: Path) -> None:
    """The old bundle was moved aside, the new one never arrived: the next export puts the old one back first."""
    output = export_bundle(options(small_models, tmp_path / "out"))
    before = contents(output)
    output.rename(tmp_path / ".out.replaced")
    with pytest.raises(OutputError, match="is a bundle already"):
        export_bundle(options(small_models, output))
    assert contents(output) == before


@pytest.mark.parametrize("existing", [True, False])
def test_kill_9_in_the_middle(small_models: SmallModels, tmp_path: Path, existing: bool) -> None:
    output = tmp_path / "out"
    if existing:
        export_bundle(options(small_models, output))
    before = contents(tmp_path)
    code = f"""
import os, signal
from pathlib import Path
from gircse.export import exporter
exporter.write_golden = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
exporter.export_bundle(exporter.ExportOptions(
    output=Path({str(output)!r}), steps=2, model={str(small_models.checkpoint("qwen2"))!r}, max_tokens=48, force=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".out.partial" / "fp32" / "weights.bin").exists()  # it was in the middle
    assert {name: data for name, data in contents(tmp_path).items() if ".partial" not in name} == before
    export_bundle(options(small_models, output, force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Embedder(output).self_test().passed


def test_disk_that_fills_up_while_writing(small_models: SmallModels, tmp_path: Path) -> None:
    """The kernel refuses every byte of a file beyond 100 kB, as a full disk would."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "gircse.export.export_command",
            "--steps",
            "2",
            "--max-tokens",
            "48",
            "--model",
            str(small_models.checkpoint("qwen2")),
            "--output",
            str(tmp_path / "out"),
        ],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: --output" in done.stderr
    assert "cannot be written: File too large; nothing was left behind" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_said_before_writing(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        OutputError, match=r"has 0\.00 GiB of free disk space; the bundle needs 0\.06 GiB\. Free some space"
    ):
        export_bundle(options(small_models, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_for_the_reference(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type("Memory", (), {"available": (1 << 30) + (1 << 27), "uss": 0})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("psutil.Process.memory_full_info", lambda _: memory)
    manifest = Bundle.open(export_bundle(options(small_models, tmp_path / "out"))).manifest
    assert not manifest.golden
    assert re.match(
        r"the PyTorch reference needs 1\.\d GiB of memory with one layer at a time, 0\.9 GiB are there for it",
        str(manifest.golden_missing_reason),
    )
    assert "golden.json" not in manifest.files


def test_too_little_memory_is_said_before_tracing(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1 << 28}))
    monkeypatch.setattr("gircse.export.exporter.trace_decoder", None)  # would fail if it were called
    with pytest.raises(ExportError, match=r"memory has 0\.25 GiB available; the export needs 1\.00 GiB"):
        export_bundle(options(small_models, tmp_path / "out"))


def test_output_that_cannot_be_made(small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file, which is not writable"):
        export_bundle(options(small_models, tmp_path / "file" / "out"))
    with (
        pytest.raises(OutputError, match=r"cannot be made: "),
        staged_directory(Path("/proc/out"), force=False),  # nobody may write there, not even root
    ):
        pass
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(OutputError, match=f"cannot be made in {tmp_path}, which is not writable"):
        export_bundle(options(small_models, tmp_path / "out"))


def test_no_clock_in_the_manifest(small_models: SmallModels) -> None:
    text = (small_models.bundle("qwen2") / "gircse.json").read_text()
    assert time.strftime("%Y-%m-%d") not in text
