"""More requests than a server wants to have waiting."""

import contextlib
import threading

import httpx
import pytest

from tests.server.serving import GREEDY, SMALL, num_running, open_stream, wait_for

QUESTION = "What is the capital of France?"
ENDLESS = GREEDY | {"ignore_eos": True, "max_new_tokens": 4000}
NUM_ROWS = SMALL["max_running_requests"]


@pytest.fixture(scope="module")
def full(start, server):
    """A server whose rows are all taken, and where the one that may wait does."""
    assert server.url, "the programs are compiled"

    def wait_in_queue() -> None:
        with contextlib.suppress(httpx.TransportError):  # the server ends first
            client.post("/generate", json={"text": QUESTION, "sampling_params": ENDLESS})

    with start(max_queued_requests=1) as process, process.client() as client:
        with contextlib.ExitStack() as streams:
            for _ in range(NUM_ROWS):
                streams.enter_context(open_stream(client, text=QUESTION, sampling_params=ENDLESS))
            waiting = threading.Thread(target=wait_in_queue)
            waiting.start()
            wait_for(lambda: num_running(client) == NUM_ROWS + 1, 10)
            yield client
        process.process.kill()
        waiting.join()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [QUESTION, [QUESTION, "Kenya"]], ids=["one", "batch"])
def test_full_queue_answers_503_and_when_to_try_again(full, text, stream):
    response = full.post("/generate", json={"text": text, "stream": stream})
    print(response.status_code, dict(response.headers), response.text)
    assert response.status_code == 503
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"] == {
        "message": "The request queue is full.",
        "type": "server_error",
        "code": 503,
        "param": None,
    }
    assert num_running(full) == NUM_ROWS + 1, "nobody else has lost anything"
