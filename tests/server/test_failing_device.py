"""A device that is gone for good: everybody is told, and the server ends."""

import pathlib
import shlex
import sys
import threading
import time

import pytest

from tests.server.serving import GREEDY, events, num_running, wait_for

QUESTION = "What is the capital of France?"
ENDLESS = GREEDY | {"ignore_eos": True, "max_new_tokens": 4000}
WORDS = "the engine failed: 3 steps in a row did, the last one with RuntimeError: injected"


@pytest.fixture
def server_and_switch(start, tmp_path, monkeypatch):
    """A server whose engine is `failing_engine.py`, and what makes it fail."""
    switch = tmp_path / "failing"
    interpreter = tmp_path / "python"
    script = pathlib.Path(__file__).with_name("failing_engine.py")
    words = shlex.join([sys.executable, str(script)])
    interpreter.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    interpreter.chmod(0o700)
    serve = (
        "import sys; from jaxserve.server.cli import serve; "
        f"sys.executable = {str(interpreter)!r}; sys.exit(serve(sys.argv[1:]))"
    )
    monkeypatch.setenv("FAILING_DEVICE", str(switch))
    with start(command=[sys.executable, "-c", serve]) as server:
        yield server, switch


def test_device_that_is_gone_is_told_to_everybody(server_and_switch):
    server, switch = server_and_switch
    responses = {}

    def ask(stream: bool) -> None:
        body = {"text": QUESTION, "sampling_params": ENDLESS, "stream": stream}
        with server.client() as client:
            responses[stream] = client.post("/generate", json=body)

    with server.client() as client:
        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_for(lambda: num_running(client) == 2, 10)
        began = time.monotonic()
        switch.touch()
        for thread in threads:
            thread.join(10)
        code = server.process.wait(10)
        print(f"exit code {code} after {time.monotonic() - began:.2f} s")
    error = {"message": WORDS, "type": "server_error", "code": 500, "param": None}
    assert responses[False].status_code == 500 and responses[False].json() == {"error": error}
    assert events(responses[True].content)[-1] == {"error": error}
    assert code == 1
    assert server.output.count(f"{WORDS}\n") >= 1
