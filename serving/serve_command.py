"""``gircse-serve``: a bundle behind OpenAI's embeddings API."""

import argparse
import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gircse.runtime import Embedder, OptionError
from gircse.runtime.batch_planner import DEFAULT_BATCH_TOKENS
from gircse.runtime.command import (
    add_open_flags,
    check_at_least_one,
    open_arguments,
    parse_arguments,
    run_command,
    write_stdout,
)
from gircse.runtime.provider import Provider
from gircse.serving.batching import DEFAULT_QUEUE_TOKENS
from gircse.serving.start_checks import passes_self_test, read_keys

if TYPE_CHECKING:
    from gircse.serving.http_app import ServerOptions

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="gircse-serve", description="Serve a bundle over HTTP, with OpenAI's embeddings API."
    )
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8080, help="port (default: 8080; 0 takes a free one)")
    parser.add_argument("--model-name", metavar="NAME", help="name in requests (default: that of the directory)")
    add_open_flags(parser, default=Provider.AUTO)
    parser.add_argument(
        "--max-batch-tokens",
        type=int,
        default=DEFAULT_BATCH_TOKENS,
        metavar="N",
        help=f"maximum tokens per batch, padding included (default: {DEFAULT_BATCH_TOKENS})",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=DEFAULT_QUEUE_TOKENS,
        metavar="N",
        help=f"tokens that may wait; a request that finds no room gets status 429 (default: {DEFAULT_QUEUE_TOKENS})",
    )
    parser.add_argument(
        "--max-body-mib", type=int, default=16, metavar="N", help="largest request, in MiB (default: 16)"
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys that /v1 asks for, one per line (default: none)"
    )
    parser.add_argument(
        "--accept-token-ids", action="store_true", help="take token ids of the model's own tokenizer as input"
    )
    parser.add_argument(
        "--allow-dimensions", action="store_true", help="cut vectors where a request asks for fewer dimensions"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 1 for a failed self-test, 2 for an error."""
    args = parse_arguments(build_parser(), argv)
    return run_command("gircse-serve", lambda: _run(args), extras="cpu,serve")


def _run(args: argparse.Namespace) -> int:
    from gircse.serving.http_app import create_app
    from gircse.serving.http_server import serve

    options = server_options(args)
    if not options.api_keys and args.host not in LOOPBACK:
        logger.warning("every machine that reaches %s can use this server: there is no --api-key-file", args.host)
    with _bind(args.host, args.port) as listener, Embedder(args.bundle, **open_arguments(args)) as embedder:
        if not passes_self_test(embedder):
            return 1
        title = f"{options.model} ({embedder.precision} on {embedder.provider})"
        address = f"http://{args.host}:{listener.getsockname()[1]}"
        app = create_app(embedder, options)
        serve(app, listener, on_start=lambda: write_stdout([f"{title}: {address}\n"]))
    return 0


def server_options(args: argparse.Namespace) -> "ServerOptions":
    """Return what the flags of the server say.

    Raises:
        OptionError: one of them is out of range, or the file of keys holds none.
    """
    from gircse.serving.http_app import ServerOptions

    check_at_least_one(args, "max_batch_tokens", "max_queue", "max_body_mib")
    return ServerOptions(
        model=args.model_name or args.bundle.resolve().name,
        batch_tokens=args.max_batch_tokens,
        queue_tokens=args.max_queue,
        body_bytes=args.max_body_mib << 20,
        api_keys=read_keys(args.api_key_file) if args.api_key_file else (),
        accept_token_ids=args.accept_token_ids,
        allow_dimensions=args.allow_dimensions,
    )


def _bind(host: str, port: int) -> socket.socket:
    """Take the address before the bundle is loaded; connections are refused until the server listens."""
    if not 0 <= port < 1 << 16:  # getaddrinfo takes the remainder
        raise OptionError("--port", f"is {port}", "it has to be 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as err:
        reason = err.strerror or err
        raise OptionError(f"--host {host} --port {port}", f"cannot be used: {reason}", None, "Take another.") from err
    return listener


if __name__ == "__main__":
    sys.exit(main())
