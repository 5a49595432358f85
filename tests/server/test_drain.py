"""What is under way when a server is told to end, beyond what its engine runs."""

import contextlib
import json
import re
import socket
import threading
import time

import pytest

from tests.server.serving import GREEDY, events, num_running, wait_for

QUESTION = "What is the capital of France?"
MANY = GREEDY | {"ignore_eos": True, "max_new_tokens": 1500}
# 254 prompts that fit, and one that does not: much to tokenize, nothing to run.
TO_TOKENIZE = ["漢字かな" * 320] * 254 + ["a b" * 5000]
SERVERS = {"patient": {}, "stalled reader": {"shutdown_timeout": 1}}


@pytest.fixture(scope="module")
def servers(start, server):
    """Started together, after the programs are compiled."""
    assert server.url
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(start(**given)) for name, given in SERVERS.items()}


class SlowReader:
    """A stream whose reader takes nothing, so that all that is between it and the server fills."""

    def __init__(self, url: str):
        host, port = re.match(r"http://(.*):(\d+)", url).groups()
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect((host, int(port)))
        body = json.dumps({"text": QUESTION, "sampling_params": MANY, "stream": True})
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall((head + body).encode())

    def close(self) -> None:
        self._socket.close()

    def read_all(self) -> bytes:
        """Until the server closes; the body without its chunks' lengths."""
        received = b""
        while part := self._socket.recv(1 << 16):
            received += part
        body, chunks = received.partition(b"\r\n\r\n")[2], []
        while body:
            length, _, rest = body.partition(b"\r\n")
            chunks.append(rest[: int(length, 16)])
            body = rest[int(length, 16) + 2 :]
        return b"".join(chunks)


def let_it_finish(server) -> SlowReader:
    """A reader whose request the engine has finished."""
    with server.client() as client:
        reader = SlowReader(server.url)
        wait_for(lambda: num_running(client) == 1, 10)
        wait_for(lambda: num_running(client) == 0, 60)
    return reader


def test_calls_that_the_engine_does_not_run_are_finished_too(servers):
    """A body that is being tokenized, and a finished stream whose reader is slow."""
    server, answers = servers["patient"], []
    reader = let_it_finish(server)

    def ask() -> None:
        with server.client() as client:
            response = client.post("/generate", json={"text": TO_TOKENIZE})
            answers.append((response, time.monotonic()))

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.1)  # for the body to arrive
    told = time.monotonic()
    server.process.terminate()
    asking.join(20)
    ((response, answered),) = answers
    print(f"answered {answered - told:.2f} s after the signal: {response.text[:100]}")
    assert answered - told > 0.02, "it was tokenizing when the signal came"
    assert response.status_code == 400 and response.json()["error"]["param"] == "text"

    time.sleep(0.3)
    assert server.process.poll() is None, "it waits for the reader"
    last = events(reader.read_all())[-1]
    assert len(last["output_ids"]) == MANY["max_new_tokens"]
    assert last["meta_info"]["finish_reason"]["type"] == "length"
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.output and "deadline" not in server.output


def test_reader_that_has_stalled_holds_nobody_up_beyond_the_deadline(servers):
    server = servers["stalled reader"]
    reader = let_it_finish(server)
    began = time.monotonic()
    server.process.terminate()
    assert server.process.wait(10) == 0
    print(f"ended after {time.monotonic() - began:.2f} s")
    assert 1 < time.monotonic() - began < 6
    assert "ending 1 requests at the deadline" in server.output
    assert "Traceback" not in server.output
    reader.close()
