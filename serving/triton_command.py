"""``gircse-triton``: a model repository of Triton Inference Server for a bundle."""

import argparse
import re
import shlex
import sys
from pathlib import Path

from gircse.runtime.bundle import Bundle
from gircse.runtime.command import (
    add_open_flags,
    check_at_least_one,
    comma_separated,
    parse_arguments,
    run_command,
    write_stdout,
)
from gircse.runtime.errors import OptionError
from gircse.runtime.provider import Provider
from gircse.runtime.tokenization import check_text
from gircse.serving.triton_server.model_repository import write_repository
from gircse.serving.triton_server.models import ModelKind, ModelOptions


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="gircse-triton", description="Write a model repository of Triton Inference Server for a bundle."
    )
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument("--output", type=Path, required=True, metavar="REPOSITORY", help="folder to write")
    parser.add_argument(
        "--models",
        type=comma_separated(ModelKind),
        default=(ModelKind.TEXT,),
        metavar="LIST",
        help="text: texts to vectors; onnx and plan: token ids to vectors, by the unrolled graph or engine "
        "(default: text)",
    )
    parser.add_argument(
        "--model-name",
        default="gircse",
        metavar="NAME",
        help="name of the text model; the others are NAME_onnx and NAME_plan (default: gircse)",
    )
    add_open_flags(parser, default=Provider.CPU)
    parser.add_argument(
        "--max-batch-size", type=int, default=32, metavar="N", help="maximum texts per batch (default: 32)"
    )
    parser.add_argument(
        "--copy", action="store_true", help="copy the bundle into the repository (default: refer to where it is)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse_arguments(build_parser(), argv)
    return run_command("gircse-triton", lambda: _run(args), extras="cpu")


def _run(args: argparse.Namespace) -> int:
    if not re.fullmatch(r"\w[\w.-]*", args.model_name, re.ASCII):
        raise OptionError("--model-name", f"is {args.model_name!r}", "it has letters, digits, '_', '.' and '-'")
    check_at_least_one(args, "threads", "max_batch_size")
    bundle = Bundle.open(args.bundle)
    check_text("the bundle's path", str(bundle.directory))  # config.pbtxt is UTF-8
    options = ModelOptions(
        name=args.model_name,
        provider=args.provider,
        precision=args.precision,
        layout=args.layout,
        threads=args.threads,
        max_batch_size=args.max_batch_size,
        verify=not args.no_verify,
    )
    models = write_repository(args.output, bundle, args.models, options, copy=args.copy)
    lines = [f"{model.config.name}: {model.summary}\n" for model in models]
    write_stdout([*lines, f"tritonserver {shlex.quote(f'--model-repository={args.output.resolve()}')}\n"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
