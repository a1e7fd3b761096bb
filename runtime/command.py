"""The frame that every command shares: flags that several have, one line for an error, and exit codes.

Exit codes: 0 done, 1 a test or gate failed, 2 an error, 130 interrupted, 141 the reader of a pipe has closed it.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from gircse.runtime.batch_planner import DEFAULT_BATCH_SIZE, DEFAULT_BATCH_TOKENS
from gircse.runtime.errors import GircseError, OptionError, OutputError, sentence
from gircse.runtime.manifest import Layout
from gircse.runtime.open_arguments import OpenArguments
from gircse.runtime.provider import Provider

T = TypeVar("T")

_PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit code that a shell reports of a filter whose reader, such as ``head``, has seen enough. Not 0: where a pipe stops
a report, nobody knows whether its gates have passed."""


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments of a command; None takes those of the process.

    Raises:
        SystemExit: they are wrong, or ``--help`` was printed.
    """
    try:
        return parser.parse_args(argv)
    except SystemExit:
        _settle_output()
        raise


def run_command(
    name: str, work: Callable[[], int], *, extras: str, interrupted: str = "", level: int = logging.WARNING
) -> int:
    """Do the work of a command and return its exit code.

    Args:
        name: of the command, put before every line that it logs.
        work: returns the exit code; imports heavy packages itself, so that ``--help`` stays fast.
        extras: what to install where a package is missing, such as ``export,demo``.
        interrupted: said after Ctrl-C, where something can be resumed.
        level: of the log that the user sees.
    """
    logging.basicConfig(level=level, format=f"{name}: %(message)s")
    try:
        code = work()
        if sys.stdout is not None:
            write_stdout(())  # now, not when Python exits: what cannot be written is an error
        return code
    except GircseError as err:
        message = str(err)
    except ModuleNotFoundError as err:
        message = f"{err.name} is not installed. Install it: pip install 'gircse-deploy[{extras}]'"
    except ImportError as err:  # a package that is damaged, or that misses one of its own choice
        message = sentence("a package", f"cannot be used: {err}", None, f"Try pip install -U 'gircse-deploy[{extras}]'")
    except BrokenPipeError:
        return _PIPE_CLOSED
    except OSError as err:
        reason = err.strerror or str(err)
        message = f"{err.filename}: {reason}" if err.filename else reason
    except KeyboardInterrupt:
        _say(f"{name}: interrupted{f'; {interrupted}' if interrupted else ''}")
        return 130
    finally:
        _settle_output()
    _say(f"{name}: error: {message}")
    return 2


def write_stdout(lines: Iterable[str]) -> None:
    """Write lines to stdout and flush them.

    Raises:
        BrokenPipeError: the reader of a pipe has closed it.
        OutputError: stdout is closed, or has no space.
    """
    if sys.stdout is None:  # where the shell has closed it
        raise OutputError("stdout", "is closed", None, "Redirect it to a file, or name one with a flag.")
    try:
        for line in lines:
            sys.stdout.write(line)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        raise OutputError("stdout", f"cannot be written: {err.strerror or err}", None, "Check the free space.") from err


def _settle_output() -> None:
    """Write what waits in the buffers of stdout and stderr or, where it cannot be written, drop it.

    Otherwise Python tries once more when it exits, and complains in its own words.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # where stderr cannot be written, the exit code remains
        print(line, file=sys.stderr)
    _settle_output()


def comma_separated(item: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Return an argparse type for a list such as ``fp32,fp16``; ``item`` reads one entry or raises ``ValueError``."""

    def read(text: str) -> tuple[T, ...]:
        parts = [part.strip() for part in text.split(",")]
        try:
            return tuple(dict.fromkeys(item(part) for part in parts))
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return read


def add_runtime_flags(parser: argparse.ArgumentParser, *, default: Provider) -> None:
    """Add the flags that say which graph of a bundle runs, and where; ``auto`` is offered where it is the default."""
    providers = [provider for provider in Provider if provider is default or provider is not Provider.AUTO]
    parser.add_argument(
        "--provider",
        type=Provider,
        choices=providers,
        default=default,
        metavar="P",
        help=f"where the bundle runs: {', '.join(providers)} (default: {default})",
    )
    parser.add_argument(
        "--layout",
        type=Layout,
        choices=list(Layout),
        metavar="unrolled|stepwise",
        help="graph or engine (default: stepwise, or unrolled with ONNX Runtime on a GPU)",
    )


def add_open_flags(parser: argparse.ArgumentParser, *, default: Provider) -> None:
    """Add the flags that a bundle is opened with; ``open_arguments`` reads them."""
    parser.add_argument("--precision", help="variant of the bundle (default: FP32 on the CPU, FP16 on a GPU)")
    add_runtime_flags(parser, default=default)
    parser.add_argument("--threads", type=int, metavar="T", help="threads of a run (default: every physical core)")
    parser.add_argument("--no-verify", action="store_true", help="skip the hashes of the bundle's files")


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how many texts are embedded together, and how many batches at once."""
    parser.add_argument(
        "--batch-size",
        type=int,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"maximum texts per batch (default: {DEFAULT_BATCH_SIZE})",
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=DEFAULT_BATCH_TOKENS,
        metavar="N",
        help=f"maximum tokens per batch, padding included (default: {DEFAULT_BATCH_TOKENS})",
    )
    parser.add_argument(
        "--streams",
        type=int,
        default=1,
        metavar="N",
        help="batches that run at once on the CPU; as many as cores for most texts a second (default: 1)",
    )


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Refuse flags whose number is below 1; one that was not given, and has no default, passes.

    Raises:
        OptionError: a number is too small.
    """
    for name in names:
        if (given := getattr(args, name)) is not None and given < 1:
            raise OptionError(f"--{name.replace('_', '-')}", f"is {given}", "it has to be at least 1")


def open_arguments(args: argparse.Namespace) -> OpenArguments:
    """Return what the flags of ``add_open_flags`` say, and ``--streams`` where a command has it."""
    return {
        "precision": args.precision,
        "provider": args.provider,
        "layout": args.layout,
        "threads": args.threads,
        "streams": args.streams if "streams" in args else 1,
        "verify": not args.no_verify,
    }
