"""What a caller can do wrong, told apart from what we can."""

from collections.abc import Mapping

MOST_WORDS = 900  # characters of a message


class RequestError(ValueError):
    """A request that cannot be served as it is; the message is for the one who sent it."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,  # of the answer over HTTP
    ):
        # Many repeat what was sent, which may be the whole body.
        super().__init__(message if len(message) <= MOST_WORDS else f"{message[:MOST_WORDS]}...")
        self.param = param
        self.status = status
        self.headers = dict(headers or {})


class QueueFull(RequestError):
    """Too many requests are waiting; a later try may succeed."""

    def __init__(self):
        super().__init__("The request queue is full.", status=503)


class EngineDied(RuntimeError):
    """The engine is gone; no request will be answered any more."""

    @classmethod
    def of(cls, error: BaseException) -> "EngineDied":
        """What ended the engine, in words for those who wait for it."""
        if isinstance(error, cls):
            return error
        return cls(f"the engine failed: {type(error).__name__}: {error}")
