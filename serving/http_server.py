"""The server of the endpoint: uvicorn, until a signal ends it."""

import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette


def serve(app: Starlette, listener: socket.socket, *, on_start: Callable[[], None]) -> None:
    """Serve an application until SIGTERM or Ctrl-C; what has begun by then is answered first.

    Args:
        app: what to serve.
        listener: a socket that is bound.
        on_start: called when requests are taken.

    Raises:
        KeyboardInterrupt: it was Ctrl-C.
    """
    server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"), on_start)
    # uvicorn raises a signal again when it has drained. By then this has no effect, and the process ends as it likes;
    # before uvicorn has handlers of its own, it ends the server as soon as it has started.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    server.run([listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()
