"""The client of `bench serve` against servers that answer badly, slowly or in pieces."""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable

import pytest

from jaxserve.bench.dataset import Sample
from jaxserve.bench.generate_client import EventReader, encode, generate, message_of
from jaxserve.bench.http_client import HttpClient
from jaxserve.bench.timeline import Timeline

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(count: int, reason: dict | None = None, **more) -> bytes:
    meta = {"prompt_tokens": 3, "completion_tokens": count, "cached_tokens": 1}
    answer = {"text": "x" * count, "meta_info": meta | {"finish_reason": reason}}
    return b"data: " + json.dumps(answer | more).encode() + b"\n\n"


END = event(4, {"type": "length", "length": 4})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = (int(line[15:]) for line in head.split(b"\r\n") if b"Content-Length:" in line)
    return head, await reader.readexactly(length)


def plain(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


class Scripted:
    """A server that writes its script, piece by piece, to each request."""

    def __init__(self, *script: bytes | float, closes: bool = False, only_once: bool = False):
        self.script, self.closes, self.only_once = script, closes, only_once
        self.requests: list[tuple[bytes, bytes]] = []
        self.num_connections = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.requests.append(await read_request(reader))
                for piece in self.script:
                    if isinstance(piece, float):
                        await asyncio.sleep(piece)
                    else:
                        writer.write(piece)
                        await writer.drain()
                if self.closes or self.only_once:
                    break
        writer.close()


def ask(server: Scripted, times: int = 1, timeout: float = 5.0, pause: float = 0.0):
    """The timelines of requests one after another."""

    async def main() -> list[Timeline]:
        async with await asyncio.start_server(server.handle, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            client = HttpClient(f"http://127.0.0.1:{port}/v", api_key="k", timeout=timeout)
            timelines = []
            for _ in range(times):
                timelines.append(Timeline(4, time.perf_counter()))
                await generate(client, b'{"input_ids": [1]}', timelines[-1])
                await asyncio.sleep(pause)
            client.close()
            return timelines

    return asyncio.run(main())


WHOLE = (STREAM, chunk(event(0)), chunk(event(1)), 0.02, chunk(event(3)), 0.02, chunk(END + DONE))


def test_a_stream_with_several_tokens_in_an_event():
    server = Scripted(*WHOLE, chunk(b""))
    (got,) = ask(server)
    print(got)
    assert got.error is None
    assert [count for _, count in got.events] == [1, 3, 4]
    assert (got.prompt_tokens, got.cached_tokens) == (3, 1)
    times = [got.sent, *(time for time, _ in got.events)]
    assert times == sorted(times) and got.finished - got.events[0][0] >= 0.04
    ((head, body),) = server.requests
    assert head.startswith(b"POST /v/generate HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer k\r\n" in head
    assert body == b'{"input_ids": [1]}'


def test_a_connection_is_used_again():
    server = Scripted(*WHOLE, chunk(b""))
    got = ask(server, times=3)
    assert [timeline.num_tokens for timeline in got] == [4, 4, 4]
    assert server.num_connections == 1 and len(server.requests) == 3


def test_a_server_that_closes_idle_connections_loses_no_request():
    server = Scripted(*WHOLE, chunk(b""), only_once=True)
    got = ask(server, times=3)
    assert [timeline.error for timeline in got] == [None] * 3
    assert server.num_connections == 3
    assert [t.error for t in ask(Scripted(*WHOLE, chunk(b""), only_once=True), 2, pause=0.05)] == [
        None
    ] * 2, "where the close has been seen already"


def test_a_server_that_wants_no_more_requests_on_a_connection():
    head = STREAM.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    server = Scripted(head, *WHOLE[1:], chunk(b""))
    assert [timeline.error for timeline in ask(server, times=2)] == [None, None]
    assert server.num_connections == 2


FAILURES = {
    "429: slow down": (plain(b"429 Too Many", b'{"error": {"message": "slow down"}}'),),
    "400: a string": (plain(b"400 Bad Request", b'{"error": "a string"}'),),
    "400: envelope": (plain(b"400 Bad Request", b'{"object": "error", "message": "envelope"}'),),
    "500: Internal Server Error": (plain(b"500 Error", b"Internal Server Error"),),
    "the stream ended without a finish_reason": (STREAM, chunk(event(2) + DONE), chunk(b"")),
    "aborted: gone": (
        *(STREAM, chunk(event(2) + event(2, {"type": "abort", "message": "gone"})), chunk(b"")),
    ),
    "the engine failed": (
        STREAM,
        chunk(event(1) + b'data: {"error": {"message": "the engine failed"}}\n\n' + DONE),
        chunk(b""),
    ),
    "an event that is not an answer of /generate": (STREAM, chunk(b"data: {]\n\n"), chunk(b"")),
    "not HTTP": (b"SSH-2.0-OpenSSH\r\n\r\n",),
}


@pytest.mark.parametrize("message", FAILURES)
def test_failures_are_told(message):
    first, second = ask(Scripted(*FAILURES[message]), times=2)
    print(first.error)
    assert first.error.startswith(message)
    assert not first.is_complete
    assert second.error == first.error, "a connection that failed does not spoil the next request"


def test_a_connection_lost_in_the_middle_of_a_stream():
    (got,) = ask(Scripted(STREAM, chunk(event(2)), closes=True))
    assert got.error == "the server closed the connection, 2 tokens had come"


def test_a_server_that_hangs():
    (got,) = ask(Scripted(STREAM, chunk(event(2)), 0.6), timeout=0.2)
    assert got.error == "no answer in time, 2 tokens had come"


def test_nobody_listens():
    async def main() -> Timeline:
        timeline = Timeline(1, 0.0)
        await generate(HttpClient("http://127.0.0.1:9"), b"{}", timeline)
        return timeline

    got = asyncio.run(main())
    print(got.error)
    assert "Connect" in got.error and got.sent


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://x", "http://", ""])
def test_bad_urls(url):
    with pytest.raises(ValueError, match="is no http:// or https:// URL"):
        HttpClient(url)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_events_may_be_cut_anywhere(size):
    content = b": a comment\n\n" + event(1) + event(2) + END + DONE
    timeline, clock = Timeline(4, 0.0), iter(range(10_000))
    reader = EventReader(timeline, lambda: float(next(clock)))
    for start in range(0, len(content), size):
        reader.feed(content[start : start + size])
    reader.end()
    assert timeline.error is None
    assert [count for _, count in timeline.events][-1] == 4
    assert timeline.prompt_tokens == 3
    if size == 1:
        ends = [content.index(END) - 1, content.index(END) + len(END) - 1]
        assert [time for time, _ in timeline.events][1:] == ends, "at the byte that completes it"


def test_body_of_a_request():
    params = {"temperature": 0.0}
    text, ids = (json.loads(encode(Sample(prompt, 4), params)) for prompt in ("é", [1, 2]))
    assert text == {"text": "é", "sampling_params": params, "stream": True}
    assert ids == {"input_ids": [1, 2], "sampling_params": params, "stream": True}


def test_messages_of_odd_errors_are_short():
    assert message_of(b"\xff" * 1000) == "\ufffd" * 300
    assert message_of(b"[1]") == "[1]"
