"""The command line of ``gircse-build``."""

import sys
from pathlib import Path

import pytest
from support.engine_build import install

from gircse.export.build_command import build_parser, main
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider


def test_flags() -> None:
    flags = ["--provider", "tensorrt-rtx", "--layout", "unrolled", "--batch", "1:64", "--tokens", "8"]
    args = build_parser().parse_args(["bundle", *flags, "--profiles", "a=1, b=1:8x4,a=1", "--sm", "8.9,12.0,8.9"])
    assert (args.bundle, args.provider, args.layout) == (Path("bundle"), Provider.TENSORRT_RTX, Layout.UNROLLED)
    assert (args.batch, args.tokens) == ((1, 64, 64), (8, 8, 8))
    assert args.profiles == ("a=1", "b=1:8x4")
    assert args.capabilities == ("8.9", "12.0")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--batch", "8:1"), "'8:1' is not a range of sizes from 1 to 2147483647, in order. Write for example 1:8:64."),
        (("--tokens", "x"), "'x' is not MIN:OPT:MAX, MIN:MAX or one number. Write for example 1:8:64."),
        (("--provider", "rtx"), "invalid "),
        (("--provider", "cuda"), "invalid choice: "),
        (("--layout", "both"), "invalid "),
    ],
)
def test_flags_that_the_command_line_refuses(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, str], said: str
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["bundle", *flags])
    assert f"argument {flags[0]}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "extra"), [((), "tensorrt"), (("--provider", "tensorrt-rtx"), "tensorrt-rtx")])
def test_packages_of_the_build_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], extra: str
) -> None:
    monkeypatch.delitem(sys.modules, "gircse.export.engine.builder", raising=False)
    install(monkeypatch, psutil=None)
    assert main(["bundle", *flags]) == 2
    said = f"gircse-build: error: psutil is not installed. Install it: pip install 'gircse-deploy[{extra}]'\n"
    assert capsys.readouterr().err == said
