"""What a build needs of memory, disk and time: announced before, and a full disk leaves nothing behind."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
from support.engine_build import Build, Refuse, contents
from support.fake_tensorrt_builder import FakeBuilderModule, Layer

from gircse.export.build_command import main
from gircse.export.engine import builder
from gircse.export.engine.builder import BuildOptions, build_engine
from gircse.export.engine.profiles import SizeRange
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import OutputError


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_disk_that_is_full(
    fake: FakeBuilderModule,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Build,
    suffix: str,
    *,
    earlier: bool,
) -> None:
    """Plan and JSON are written together or not at all, and an earlier pair stays as it was."""
    if earlier:
        build(bundle)
    before = contents(bundle / "engines")

    @contextlib.contextmanager
    def filling(path: Path) -> Iterator[BinaryIO]:
        with atomic_write(path) as file:
            if path.suffix == suffix:
                file.write(b"the first bytes")
                file.flush()
                raise OSError(errno.ENOSPC, "No space left on device")
            yield file

    monkeypatch.setattr(builder, "atomic_write", filling)
    with pytest.raises(
        OutputError, match=r"engines cannot be written: No space left on device; nothing was left behind"
    ):
        build_engine(BuildOptions(bundle, batch=SizeRange(1, 1, 2)))
    after = contents(bundle / "engines")
    del after["timing.cache"]
    before.pop("timing.cache", None)
    assert after == before


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_disk_that_is_full_when_the_last_bytes_are_written(
    fake: FakeBuilderModule, bundle: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """What a file's buffer still holds is written when it is flushed or closed."""

    @contextlib.contextmanager
    def filling(path: Path) -> Iterator[Any]:
        def fail() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with atomic_write(path) as file:
            yield SimpleNamespace(write=file.write, flush=fail) if path.suffix == suffix else file
            if path.suffix == suffix:
                fail()

    monkeypatch.setattr(builder, "atomic_write", filling)
    with pytest.raises(OutputError, match="No space left"):
        build_engine(BuildOptions(bundle))
    assert set(contents(bundle / "engines")) == {"timing.cache"}


def test_folder_that_cannot_be_made(fake: FakeBuilderModule, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "engines").write_bytes(b"a file")
    assert main([str(bundle)]) == 2
    assert "engines cannot be written: File exists; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resource", "expected"),
    [
        (
            "virtual_memory",
            "the build needs about 0.50 GiB of memory; 0.00 GiB are available. Close other programs.",
        ),
        ("disk_usage", " has 0.00 GiB of free disk space; the engine needs at least 0.00 GiB. Free some space."),
    ],
)
def test_too_little_memory_or_disk(
    fake: FakeBuilderModule,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Refuse,
    resource: str,
    expected: str,
) -> None:
    few = SimpleNamespace(available=1000, free=1000)
    monkeypatch.setattr(builder.psutil, resource, lambda *path: few)
    assert refuse(bundle).endswith(expected)
    assert fake.configs[-1].progress_monitor is None  # said before the build


def test_slow_builds_are_announced(
    fake: FakeBuilderModule, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.layers = [Layer("other")] * 3
    assert main([str(bundle)]) == 0
    shown = capsys.readouterr().err
    assert (
        "3 layers, profiles: latency, throughput; takes minutes, because it times its kernels, about 0.50 GiB" in shown
    )
    assert "square of the layers" not in shown
    monkeypatch.setattr(builder, "SLOW_BUILD_SECONDS", 1e-9)
    assert main([str(bundle)]) == 0
    assert "--layout" not in capsys.readouterr().err  # it is stepwise
    assert main([str(bundle), "--layout", "unrolled"]) == 0
    assert "build time grows with the square of the layers: --layout stepwise" in capsys.readouterr().err
