"""What a server takes on, and how it says no."""

from dataclasses import dataclass

from modules.errors import UserError

MB = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    upload : bytes of a recording as it is sent
    audio : seconds of a recording as it is decoded
    queue : requests that are received, waiting or computed at a time
    seconds : from a request's first byte to its answer
    streams : live streams at a time
    idle : seconds that a live stream may send nothing
    batch : windows of recordings that are computed together
    """

    upload: int = 25 * MB
    audio: float = 7200.0
    queue: int = 64
    seconds: float = 300.0
    streams: int = 8
    idle: float = 30.0
    batch: int = 16

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"the limit {name}={value} lets nothing through; give more than 0")


class RefusedError(Exception):
    """A request that is not served: HTTP status, the reason, and whether to try again.

    retry_after : seconds, or None when trying again cannot help.
    """

    def __init__(self, status, message, retry_after=None):
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after

    @property
    def headers(self):
        if self.retry_after is None:
            # The OpenAI clients would repeat what has a status of 408 or from 500 on.
            return {"x-should-retry": "false"}
        return {"retry-after": str(self.retry_after)}

    @property
    def body(self):
        """As the OpenAI API words an error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        fields = {"message": self.message, "type": kind, "param": None, "code": None}
        return {"error": fields}
