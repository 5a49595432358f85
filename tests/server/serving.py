"""A server process as a user starts it, and a few ways to ask it."""

import contextlib
import itertools
import json
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import jaxserve

DEMO_MODEL = str(pathlib.Path(jaxserve.__file__).with_name("demo_model"))
COMMAND = [str(pathlib.Path(sys.executable).with_name("jaxserve")), "serve"]
# Few rows and small chunks: little to compile (60 prompt tokens and 4 decoding rows fill a bucket
# of 64), and a prompt of 61 takes two steps. Float32, because bfloat16 may round a tie differently
# in a batch of another size.
SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "max_running_requests": 4,
    "chunked_prefill_size": 60,
}
START_SECONDS = 240.0  # on two busy cores, with nothing compiled yet
GREEDY = {"temperature": 0.0}


def programs_folder(config: pytest.Config) -> str:
    """Where all tests keep compiled programs, from one run of pytest to the next."""
    return str(config.cache.mkdir("jaxserve-programs"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def flags(**options: Any) -> list[str]:
    """The command line of options in the spelling of `ServerConfig`; True is a bare flag."""
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


class ServerProcess:
    """Its output goes to a file, so that it never waits for a reader."""

    def __init__(self, log: pathlib.Path, *arguments: str, command: list[str] = COMMAND):
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, as a terminal or systemd gives it
            )

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()  # which ends its engine too: see test_lifecycle.py
        self.process.wait()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def url(self) -> str:
        """As the banner tells it, once the server is ready."""

        def find() -> str | None:
            found = re.search(
                r"^  curl (http://\S+)/(?:generate|encode) ", self.output, re.MULTILINE
            )
            if found is None and self.process.poll() is not None:
                raise RuntimeError(f"exit code {self.process.returncode}:\n{self.output}")
            return found and found[1]

        return wait_for(find, START_SECONDS)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60.0)

    def engine_pid(self) -> int:
        """Of the only child."""
        (pid,) = children(self.process.pid)
        return pid


def children(parent: int) -> list[int]:
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(after_name[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    """False for a zombie: it only waits to be read by its parent."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for(probe: Callable[[], Any], seconds: float) -> Any:
    """The first true value that `probe` gives."""
    deadline = time.monotonic() + seconds
    while not (value := probe()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return value


def generate(client: httpx.Client, **body: Any) -> Any:
    """The answer of /generate, whose status must be 200."""
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(body: bytes) -> list[Any]:
    """The answers in the bytes of a stream, which must end with [DONE]."""
    *answers, done, rest = body.split(b"\n\n")
    assert done == b"data: [DONE]" and not rest, body[-300:]
    assert all(answer.startswith(b"data: ") for answer in answers)
    return [json.loads(answer.removeprefix(b"data: ")) for answer in answers]


def stream(client: httpx.Client, **body: Any) -> list[Any]:
    response = client.post("/generate", json=body | {"stream": True})
    assert response.status_code == 200, response.text
    return events(response.content)


@contextlib.contextmanager
def open_stream(client: httpx.Client, **body: Any) -> Iterator[Iterator[Any]]:
    """The answers of a stream as they come, the first of which has come; leaving it disconnects."""
    with client.stream("POST", "/generate", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        answers = _answers(response)
        first = next(answers)
        yield itertools.chain([first], answers)


def _answers(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")


def num_running(client: httpx.Client) -> int:
    """Requests that the engine runs or keeps waiting."""
    state = client.get("/get_server_info").json()["internal_states"][0]
    return state["num_running_reqs"] + state["num_queue_reqs"]
