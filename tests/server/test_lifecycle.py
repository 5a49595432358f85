"""How a server ends, told to or not: each test ends one of its own."""

import contextlib
import hashlib
import os
import pathlib
import signal
import sys
import threading
import time

import httpx
import pytest

from tests.server.serving import (
    DEMO_MODEL,
    GREEDY,
    children,
    generate,
    is_running,
    num_running,
    open_stream,
    wait_for,
)

QUESTION = "What is the capital of France?"
ENDLESS = GREEDY | {"ignore_eos": True, "max_new_tokens": 4000}
SHORT = GREEDY | {"ignore_eos": True, "max_new_tokens": 200}


def content(folder: str) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pathlib.Path(folder).iterdir()
    }


SERVERS = {
    "terminated": {
        "command": [sys.executable, "-m", "jaxserve.server"],
        "shutdown_timeout": 3,
        "log_level": "warning",
    },
    "idle": {"skip_tokenizer_init": True},
    "interrupted": {},
    "without engine": {},
    "killed": {},
}


@pytest.fixture(scope="module")
def servers(start, server):
    """Started together: a start keeps one core busy, and most machines have several. They find the
    programs that the other server has compiled."""
    assert server.url
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(start(**given)) for name, given in SERVERS.items()}


class Reader(threading.Thread):
    """Reads a stream as long as it comes."""

    def __init__(self, client: httpx.Client, sampling_params: dict):
        super().__init__()
        self.answers: list = []
        self.is_complete = False  # ended with [DONE]
        self._client, self._params = client, sampling_params
        self.start()
        wait_for(lambda: self.answers, 10)

    def run(self) -> None:
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            open_stream(self._client, text=QUESTION, sampling_params=self._params) as answers,
        ):
            for answer in answers:
                self.answers.append(answer)
            self.is_complete = True


def test_sigterm_lets_requests_finish_until_the_deadline(servers):
    """Started as `python -m jaxserve.server`."""
    server = servers["terminated"]
    with server.client() as client:
        expected = generate(client, text=QUESTION, sampling_params=SHORT)["output_ids"]
        assert "INFO" not in server.output and "batch" not in server.output, "--log-level"
        engine = server.engine_pid()
        short, endless = Reader(client, SHORT), Reader(client, ENDLESS)
        began = time.monotonic()
        server.process.terminate()
        wait_for(lambda: client.get("/ready").status_code == 503, 1)
        assert len(short.answers) < 200, "it still runs"
        refused = client.post("/generate", json={"text": QUESTION})
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the server is shutting down"
        refused = client.post("/update_weights_from_disk", json={"model_path": DEMO_MODEL})
        assert refused.status_code == 503
        assert client.get("/health").status_code == 503
        short.join()
        finished = time.monotonic() - began
        assert short.is_complete and short.answers[-1]["output_ids"] == expected
        endless.join()
        code = server.process.wait(10)
        print(f"finished after {finished:.2f} s, ended after {time.monotonic() - began:.2f} s")
        assert finished < 3 <= time.monotonic() - began < 8
        error = endless.answers[-1]["error"]
        assert (error["message"], error["code"]) == ("the server is shutting down", 500)
        assert endless.is_complete and len(endless.answers) > 10
        assert code == 0
        assert not is_running(engine)
        assert "ending 1 requests at the deadline" in server.output
        assert "Traceback" not in server.output
        with pytest.raises(httpx.ConnectError):
            client.get("/ready")


def test_sigterm_while_loading_leaves_nothing_behind(start):
    with start() as server:
        (engine,) = wait_for(lambda: children(server.process.pid), 30)
        began = time.monotonic()
        server.process.terminate()
        code = server.process.wait(10)
        print(f"exit code {code} after {time.monotonic() - began:.2f} s")
        assert not is_running(engine)
        assert "Traceback" not in server.output and "ready to roll" not in server.output


def test_idle_server_ends_at_once(servers):
    """And without a tokenizer it serves ids, and says how to ask."""
    server = servers["idle"]
    with server.client() as client:
        answer = generate(client, input_ids=[5, 6], sampling_params=GREEDY)
        assert "text" not in answer and answer["output_ids"]
        refused = client.post("/generate", json={"text": "a"})
        assert refused.json()["error"]["message"] == (
            "The engine initialized with skip_tokenizer_init=True cannot accept text prompts. "
            "Please provide input_ids or re-initialize the engine with skip_tokenizer_init=False."
        )
        assert '-d \'{"input_ids": [1, 2, 3]' in server.output
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0
        print(f"ended after {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < 5
        assert "Traceback" not in server.output


def test_control_c_reaches_the_engine_too_and_a_second_one_ends_at_once(servers):
    """A terminal signals the whole group, systemd and docker every process."""
    server = servers["interrupted"]
    with server.client() as client:
        engine = server.engine_pid()
        reader = Reader(client, ENDLESS)
        os.killpg(server.process.pid, signal.SIGINT)
        os.kill(engine, signal.SIGTERM)
        count = len(reader.answers)
        wait_for(lambda: len(reader.answers) > count + 50 or not reader.is_alive(), 10)
        assert "error" not in reader.answers[-1], "the first one lets requests finish"
        began = time.monotonic()
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(10) == 128 + signal.SIGINT
        reader.join(10)
        wait_for(lambda: not is_running(engine), 5)
        print(f"both ended {time.monotonic() - began:.2f} s after the second signal")
        assert "Traceback" not in server.output


def test_killed_engine_ends_its_requests_and_the_server(servers):
    server = servers["without engine"]
    with server.client() as client:
        engine = server.engine_pid()
        reader, plain = Reader(client, ENDLESS), []
        body = {"text": QUESTION, "sampling_params": ENDLESS}
        asking = threading.Thread(target=lambda: plain.append(client.post("/generate", json=body)))
        asking.start()
        wait_for(lambda: num_running(client) == 2, 10)
        began = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        reader.join()
        asking.join()
        code = server.process.wait(10)
        print(f"exit code {code} after {time.monotonic() - began:.2f} s")
        words = f"the engine process (pid {engine}) was killed by signal 9"
        assert reader.is_complete
        assert reader.answers[-1]["error"] == {
            "message": words,
            "type": "server_error",
            "code": 500,
            "param": None,
        }
        assert plain[0].status_code == 500
        assert plain[0].json()["error"]["message"] == words
        assert code == 1 and time.monotonic() - began < 5
        assert words in server.output and "Traceback" not in server.output


def test_killed_server_leaves_no_engine_behind(servers):
    """And nothing where it was reading new weights just then: a start finds what it left."""
    server = servers["killed"]
    before, answers_before = content(DEMO_MODEL), []

    def update_again_and_again() -> None:
        with contextlib.suppress(httpx.TransportError), server.client() as client:
            while True:
                body = {"model_path": DEMO_MODEL, "in_flight": "in_place"}
                answers_before.append(client.post("/update_weights_from_disk", json=body))

    with server.client() as client:
        engine = server.engine_pid()
        with open_stream(client, text=QUESTION, sampling_params=ENDLESS) as answers:
            next(answers)
            updating = threading.Thread(target=update_again_and_again)
            updating.start()
            wait_for(lambda: len(answers_before) > 2, 10)
            assert is_running(engine)
            began = time.monotonic()
            server.process.kill()
            wait_for(lambda: not is_running(engine), 5)
        print(f"the engine ended {time.monotonic() - began:.2f} s after its server")
    updating.join()
    assert all(answer.status_code == 200 for answer in answers_before)
    assert content(DEMO_MODEL) == before
