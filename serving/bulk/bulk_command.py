"""``gircse-bulk``: files of texts to files of vectors, on one machine or on Ray, gone on with after any end."""

import argparse
import logging
import sys
from pathlib import Path

from gircse.runtime.command import add_batch_flags, add_open_flags, parse_arguments, run_command, write_stdout
from gircse.runtime.provider import Provider

DEFAULT_FRAGMENT_ROWS = 1024


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="gircse-bulk",
        description="Embed the texts of Parquet and JSON Lines files. The same command goes on with what is missing.",
    )
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument("inputs", nargs="+", metavar="input", help="files, directories, globs; paths or s3://, gs://")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory or URI for the vectors")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column of the texts (default: text)")
    parser.add_argument("--id-column", metavar="NAME", help="column of the ids, integers or strings (default: id)")
    parser.add_argument("--row-ids", action="store_true", help="make ids of the file and the number of the row")
    parser.add_argument("--instruction", default="", help="put before every text; leave it out for documents")
    parser.add_argument("--steps", type=int, metavar="k", help="refinement steps, 0 to K (default: K)")
    parser.add_argument(
        "--vector-type",
        choices=("float32", "float16", "int8"),
        default="float32",
        metavar="float32|float16|int8",
        help="type of the numbers; int8 has a scale per vector (default: float32)",
    )
    parser.add_argument(
        "--fragment-rows",
        type=int,
        default=DEFAULT_FRAGMENT_ROWS,
        metavar="N",
        help=f"rows of a file of vectors, and what is done again after an end (default: {DEFAULT_FRAGMENT_ROWS})",
    )
    parser.add_argument(
        "--workers",
        default="1",
        metavar="N|auto",
        help="processes, by Ray (default: 1, without Ray); auto: one per GPU or core, if they fit into memory",
    )
    parser.add_argument(
        "--ray-address", metavar="A", help="Ray cluster: host:6379, or auto for the one of this machine"
    )
    add_batch_flags(parser)
    add_open_flags(parser, default=Provider.AUTO)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 2 for an error."""
    args = parse_arguments(build_parser(), argv)
    going_on = "what is done is kept; the same command goes on"
    return run_command("gircse-bulk", lambda: _run(args), extras="bulk,cpu,ray", interrupted=going_on)


def _run(args: argparse.Namespace) -> int:
    from gircse.serving.bulk.run import run_bulk

    logging.getLogger("gircse.serving.bulk").setLevel(logging.INFO)  # progress, and who works
    write_stdout([f"{run_bulk(args)}\n"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
