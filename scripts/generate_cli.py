"""Write ``docs/cli.md`` from the parsers of the commands; a test checks that the file is current.

python scripts/generate_cli.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gircse.calibration import calibrate_command
from gircse.evaluation import bench_command, parity_command
from gircse.export import build_command, export_command
from gircse.runtime import embed_command
from gircse.serving import serve_command, triton_command
from gircse.serving.bulk import bulk_command

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
COMMANDS = (
    export_command,
    embed_command,
    serve_command,
    bulk_command,
    triton_command,
    calibrate_command,
    build_command,
    parity_command,
    bench_command,
)
PIPE = "&#124;"
"""A pipe inside a table: Markdown renderers disagree about a backslash before one in backticks."""

HEADER = """\
# Commands

Generated from the parsers by `scripts/generate_cli.py`; do not edit. Lists are comma-separated. Exit codes: 0 done, 1 a
self-test or a gate failed, 2 an error, 130 interrupted, 141 the reader of a pipe (`| head`) has closed it. `--help`
prints the same on the terminal.
"""


def render() -> str:
    """Return the page."""
    return "\n".join([HEADER, *(_section(command.build_parser()) for command in COMMANDS)])


def _section(parser: argparse.ArgumentParser) -> str:
    """Return one command. The help of argparse itself changes with the version of Python, so it is not used."""
    positional = " ".join(_name(action) for action in parser._actions if not action.option_strings)
    required = " ".join(_name(action) for action in parser._actions if action.option_strings and action.required)
    usage = " ".join(part for part in (parser.prog, positional, required, "[flags]") if part)
    lines = [f"## {parser.prog}", "", parser.description or "", "", "```text", usage, "```", ""]
    if parser.epilog:
        lines += [f"{parser.epilog[0].upper()}{parser.epilog[1:]}.", ""]
    unnamed, named = _groups(parser)
    lines += _table(unnamed)
    for group in named:
        described = f": {group.description}" if group.description else ""
        lines += [f"**{group.title}**{described}", "", *_table(group._group_actions)]
    return "\n".join(lines)


def _groups(parser: argparse.ArgumentParser) -> tuple[list[argparse.Action], list[argparse._ArgumentGroup]]:
    """Return the arguments outside of any group but argparse's own two, without ``--help``, and the other groups."""
    own, named = parser._action_groups[:2], parser._action_groups[2:]
    actions = [action for group in own for action in group._group_actions]
    return [action for action in actions if not isinstance(action, argparse._HelpAction)], named


def _table(actions: Sequence[argparse.Action]) -> list[str]:
    rows = [f"| {_code(_name(action))} | {_help(action).replace('|', PIPE)} |" for action in actions]
    return ["| argument | meaning |", "|---|---|", *rows, ""]


def _name(action: argparse.Action) -> str:
    """Return a flag with the name of its value, or the name of a positional argument."""
    if not action.option_strings:
        name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        return f"{name} ..." if action.nargs in ("+", "*") else name
    flags = ", ".join(action.option_strings)
    if action.nargs == 0:
        return flags
    if isinstance(action.metavar, str):
        return f"{flags} {action.metavar}"
    return f"{flags} {'|'.join(map(str, action.choices)) if action.choices else action.dest.upper()}"


def _help(action: argparse.Action) -> str:
    return (action.help or "") % vars(action)


def _code(text: str) -> str:
    return f"<code>{text.replace('|', PIPE)}</code>" if "|" in text else f"`{text}`"


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
