"""What an HTTP client gets instead of vectors: OpenAI's error object."""

from typing import Any


class ApiError(Exception):
    """A request that is not answered.

    Attributes:
        status: HTTP status.
        message: for the client; quotes no text that was sent.
        param: the field that is wrong, if one is.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The object that OpenAI's clients read."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
