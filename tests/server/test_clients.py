"""Clients that leave, that read slowly, and that are many."""

import concurrent.futures
import json
import socket
import time
import urllib.parse

import pytest

from tests.server.serving import GREEDY, events, generate, num_running, open_stream, wait_for

QUESTION = "What is the capital of France?"
ENDLESS = {"ignore_eos": True, "max_new_tokens": 4000}  # twenty seconds, if nobody aborts it
SOON = 3.0


def send(url: str, method: str, path: str, body: bytes = b"") -> socket.socket:
    """An HTTP request whose answer nobody has read yet."""
    address = urllib.parse.urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # for the slow reader
    connection.settimeout(60)
    connection.connect((address.hostname, address.port))
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def seconds_until_idle(client) -> float:
    began = time.monotonic()
    wait_for(lambda: num_running(client) == 0, SOON)
    return time.monotonic() - began


@pytest.mark.parametrize("size", [100, 66_000, 131_072, 1_000_000, 5_000_000])
@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
def test_client_that_leaves_ends_its_request(server, client, is_stream, size):
    body = {"text": QUESTION, "sampling_params": ENDLESS, "stream": is_stream, "x": "y" * size}
    connection = send(server.url, "POST", "/generate", json.dumps(body).encode())
    wait_for(lambda: num_running(client) == 1, 10)
    connection.close()
    print(f"idle {seconds_until_idle(client):.2f} s after a client with {size} bytes had left")


@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
def test_client_that_leaves_ends_its_whole_batch_running_or_waiting(server, client, is_stream):
    body = {"text": [QUESTION] * 6, "sampling_params": ENDLESS, "stream": is_stream}
    connection = send(server.url, "POST", "/generate", json.dumps(body).encode())

    def has_queue() -> bool:
        state = client.get("/get_server_info").json()["internal_states"][0]
        return (state["num_running_reqs"], state["num_queue_reqs"]) == (4, 2)

    wait_for(has_queue, 10)
    connection.close()
    print(f"idle {seconds_until_idle(client):.2f} s after the client had left")


def test_client_that_leaves_with_a_prompt_beyond_the_context(server, client):
    for text in ("a " * 50_000, "word " * 200_000):
        send(server.url, "POST", "/generate", json.dumps({"text": text}).encode()).close()
    answer = generate(client, text=QUESTION, sampling_params=GREEDY)
    assert "Paris" in answer["text"]
    assert num_running(client) == 0


def test_neighbour_of_a_client_that_leaves_gets_the_same_tokens(server, client):
    wanted = {"text": QUESTION, "sampling_params": GREEDY | {"ignore_eos": True}}
    expected = generate(client, **wanted)["output_ids"]
    body = json.dumps({"text": QUESTION, "sampling_params": ENDLESS}).encode()
    with open_stream(client, **wanted) as answers:
        for _ in range(5):
            send(server.url, "POST", "/generate", body).close()
            next(answers)
        *_, last = answers
    assert last["output_ids"] == expected
    seconds_until_idle(client)


def test_clients_that_leave_while_the_engine_is_asked_do_no_harm(server, client):
    with open_stream(client, text=QUESTION, sampling_params=ENDLESS) as answers:
        for path in ("/get_server_info", "/health", "/flush_cache?timeout=5") * 20:
            connection = send(server.url, "GET", path)
            next(answers)  # about as long as the engine takes to answer
            connection.close()
        count = len(next(answers)["output_ids"])
    print(f"60 clients left within {count} tokens")
    seconds_until_idle(client)
    assert client.get("/health").status_code == 200
    assert "Paris" in generate(client, text=QUESTION, sampling_params=GREEDY)["text"]


def test_half_closed_connection_counts_as_gone(server, client):
    body = json.dumps({"text": QUESTION, "sampling_params": ENDLESS}).encode()
    with send(server.url, "POST", "/generate", body) as connection:
        wait_for(lambda: num_running(client) == 1, 10)
        connection.shutdown(socket.SHUT_WR)
        seconds_until_idle(client)


def test_slow_reader_holds_up_nobody_and_misses_nothing(server, client):
    """Three rows whose events repeat a prompt of 600 ids: more than sockets usually take."""
    prompt = list(range(1000, 1024)) * 25
    limits = GREEDY | {"ignore_eos": True, "max_new_tokens": 300}
    slow = {"input_ids": [prompt] * 3, "return_prompt_token_ids": True, "stream": True}
    body = json.dumps(slow | {"sampling_params": limits}).encode()
    with send(server.url, "POST", "/generate", body) as connection:
        wait_for(lambda: num_running(client) == 3, 10)
        expected = generate(client, input_ids=prompt, sampling_params=limits)
        wait_for(lambda: num_running(client) == 0, 10)
        received = read_chunked(connection)
    got = events(received)
    print(f"{len(received)} bytes in {len(got)} events for 900 tokens")
    for index in range(3):
        last = [event for event in got if event["index"] == index][-1]
        assert last["output_ids"] == expected["output_ids"]
        assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 300}


def read_chunked(connection: socket.socket) -> bytes:
    answer = connection.makefile("rb")
    while answer.readline() != b"\r\n":
        pass
    content = b""
    while size := int(answer.readline(), 16):
        content += answer.read(size)
        answer.readline()
    return content


COUNTRIES = ["France", "Kenya", "Peru", "Japan", "Chad", "Mali", "Cuba", "Fiji", "Oman", "Iraq"]
PROMPTS = [f"What is the capital of {country}?" for country in COUNTRIES]
PROMPTS += [f"{prompt} " * 9 for prompt in PROMPTS]  # several chunks


def test_forty_clients_at_four_rows_get_what_each_gets_alone(client):
    limits = GREEDY | {"ignore_eos": True, "max_new_tokens": 16}
    alone = [generate(client, text=text, sampling_params=limits) for text in PROMPTS]
    lengths = {answer["meta_info"]["prompt_tokens"] for answer in alone}
    most = 0

    def ask(text: str):
        return generate(client, text=text, sampling_params=limits)

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        futures = [pool.submit(ask, text) for text in PROMPTS * 2]
        while not all(future.done() for future in futures):
            most = max(most, num_running(client))
            assert client.get("/health", timeout=5).status_code == 200
    together = [future.result() for future in futures]
    print(f"{most} at once; prompts of {min(lengths)} to {max(lengths)} tokens")
    assert most > 10 and max(lengths) > 64
    assert [a["output_ids"] for a in together] == [a["output_ids"] for a in alone] * 2
