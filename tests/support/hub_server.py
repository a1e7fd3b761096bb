"""A stand-in for Hugging Face on this machine: what its API says of repositories, their files, and ranges of them."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """A running server.

    Attributes:
        url: for ``HF_ENDPOINT``.
        repositories: name to the folder of its files.
        sent: file name to the bytes of its content that were sent.
    """

    url: str
    repositories: Mapping[str, Path]
    sent: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def hub_server(repositories: Mapping[str, Path]) -> Iterator[HubServer]:
    """Serve folders as repositories until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = HubServer(f"http://127.0.0.1:{server.server_port}", repositories)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        if (api := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)) and api[1] in hub.repositories:
            files = sorted(hub.repositories[api[1]].iterdir())
            siblings = [{"rfilename": file.name, "size": file.stat().st_size} for file in files]
            content = json.dumps({"id": api[1], "sha": COMMIT, "siblings": siblings}).encode()
            self._send(200, content, {"Content-Type": "application/json"})
            return
        named = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^/]+)", path)
        file = hub.repositories.get(named[1], Path()) / named[2] if named else None
        if named is None or file is None or not file.is_file():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound" if named is None else "EntryNotFound"})
            return
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if self.command == "GET":
            hub.sent[file.name] = hub.sent.get(file.name, 0) + len(content)
        self._send(status, content, headers)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
