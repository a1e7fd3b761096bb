"""The frame that every command shares: flags that several have, one line for an error, and exit codes.

Exit codes: 0 done, 1 a test or gate failed, 2 an error, 130 interrupted.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from gircse.runtime.errors import GircseError
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider

T = TypeVar("T")


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
        return work()
    except GircseError as err:
        message = str(err)
    except ImportError as err:
        message = f"{err.name or err} is not installed. Install it: pip install 'gircse-deploy[{extras}]'"
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as err:
        message = f"{err.filename}: {err.strerror}" if err.filename and err.strerror else str(err)
    except KeyboardInterrupt:
        print(f"{name}: interrupted{f'; {interrupted}' if interrupted else ''}", file=sys.stderr)
        return 130
    print(f"{name}: error: {message}", file=sys.stderr)
    return 2


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
        help="graph or engine (default: the bundle's own)",
    )
