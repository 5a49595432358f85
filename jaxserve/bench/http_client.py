"""A small HTTP/1.1 client for many streams at once. What it costs, the server on the same machine
lacks: it parses in C, hands bytes on where they arrive, and wakes nobody for an event."""

import asyncio
import urllib.parse
from collections.abc import Callable
from typing import NamedTuple

import httptools

OnBody = Callable[[bytes], None]


class Response(NamedTuple):
    status: int
    body: bytes  # empty where it has been handed on


class HttpClient:
    """Requests to one server. A connection carries one request at a time, and is used again."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0):
        """Raises ValueError for a URL that is not HTTP's."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// URL")
        self._is_secure = parts.scheme == "https"
        self._address = parts.hostname, parts.port or (443 if self._is_secure else 80)
        self._path, self._timeout = parts.path.rstrip("/"), timeout
        self._headers = f"Host: {parts.netloc}\r\n"
        if api_key is not None:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[_Connection] = []

    async def request(
        self, method: str, path: str, body: bytes = b"", on_body: OnBody | None = None
    ) -> Response:
        """One request and its response.

        Args:
          on_body: takes the body of a response with status 200, piece by piece as it arrives.

        Raises:
          ConnectionError, OSError: the connection cannot be made, or was lost.
          TimeoutError: the response is not there in time.
        """
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}"
        if method != "GET":
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        message = f"{head}\r\n".encode() + body
        async with asyncio.timeout(self._timeout):
            while True:
                connection, is_fresh = await self._connect()
                try:
                    response = await connection.exchange(message, on_body)
                except _ClosedWhileIdle:
                    if is_fresh:
                        raise
                    continue  # the server had closed it before it saw the request
                except BaseException:
                    connection.close()
                    raise
                if connection.is_open:
                    self._idle.append(connection)
                return response

    async def ports(self) -> tuple[int, int]:
        """Ours and the server's, of an open connection."""
        connection, _ = await self._connect()
        self._idle.append(connection)
        return connection.ports

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _connect(self) -> tuple["_Connection", bool]:
        """An open connection, and whether it is a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection, False
        loop = asyncio.get_running_loop()
        ssl = True if self._is_secure else None
        _, connection = await loop.create_connection(_Connection, *self._address, ssl=ssl)
        return connection, True


class _ClosedWhileIdle(ConnectionError):
    """Not a byte of an answer has come."""


class _Connection(asyncio.Protocol):
    def __init__(self):
        self.is_open = False
        self._transport: asyncio.Transport
        self._parser: httptools.HttpResponseParser
        self._future: asyncio.Future[Response] | None = None
        self._on_body: OnBody | None = None
        self._body: list[bytes] = []
        self._has_answer = False

    @property
    def ports(self) -> tuple[int, int]:
        ends = (self._transport.get_extra_info(name) for name in ("sockname", "peername"))
        ours, theirs = (end[1] for end in ends)
        return ours, theirs

    def exchange(self, message: bytes, on_body: OnBody | None) -> "asyncio.Future[Response]":
        self._parser = httptools.HttpResponseParser(self)
        self._future = asyncio.get_running_loop().create_future()
        self._on_body, self._body, self._has_answer = on_body, [], False
        self._transport.write(message)
        return self._future

    def close(self) -> None:
        self.is_open = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport, self.is_open = transport, True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        kind = ConnectionError if self._has_answer else _ClosedWhileIdle
        self._fail(kind(f"the server closed the connection{f': {error}' if error else ''}"))

    def data_received(self, data: bytes) -> None:
        if self._future is None:  # nothing was asked
            self.close()
            return
        self._has_answer = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.close()
            self._fail(ConnectionError(f"not HTTP: {error.__context__ or error}"))

    def on_body(self, body: bytes) -> None:
        if self._on_body is not None and self._parser.get_status_code() == 200:
            self._on_body(body)
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if not self._future.done():
            response = Response(self._parser.get_status_code(), b"".join(self._body))
            self._future.set_result(response)
        self._future = None

    def _fail(self, error: Exception) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_exception(error)
        self._future = None
