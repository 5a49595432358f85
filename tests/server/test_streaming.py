"""/generate with a stream."""

import json
import socket
import urllib.parse

import pytest
import tokenizers

from tests.server.serving import DEMO_MODEL, GREEDY, events, generate, stream

QUESTION = "What is the capital of France?"
LONG = QUESTION * 12  # 84 tokens: two chunks
MORE = GREEDY | {"ignore_eos": True, "max_new_tokens": 40}


def test_events_grow_to_the_answer(client):
    response = client.post(
        "/generate", json={"text": QUESTION, "sampling_params": MORE, "stream": True}
    )
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    got = events(response.content)
    for earlier, later in zip(got, got[1:], strict=False):
        count = len(earlier["output_ids"])
        assert 0 < count < len(later["output_ids"])
        assert later["output_ids"][:count] == earlier["output_ids"]
        assert later["text"].startswith(earlier["text"])
        assert earlier["meta_info"]["finish_reason"] is None
        assert "e2e_latency" not in earlier["meta_info"]
    for event in got:
        assert event["meta_info"]["completion_tokens"] == len(event["output_ids"])
        assert event["meta_info"]["prompt_tokens"] == 7
        assert "index" not in event
    print(f"{len(got)} events for 40 tokens")
    assert len(got) > 5, "fewer than tokens only where this machine is too busy to read them"
    last = got[-1]["meta_info"]
    assert last["finish_reason"] == {"type": "length", "length": 40}
    assert last["e2e_latency"] > 0
    assert len({event["meta_info"]["id"] for event in got}) == 1


@pytest.mark.parametrize("text", [QUESTION, LONG, "Once upon a time", "Kenya"])
@pytest.mark.parametrize("extra", [{}, {"stop": ["Paris", " a "]}, {"max_new_tokens": 0}])
def test_last_event_is_the_answer_without_a_stream(client, text, extra):
    whole = generate(client, text=text, sampling_params=MORE | extra, rid="same")
    last = stream(client, text=text, sampling_params=MORE | extra, rid="same")[-1]
    for answer in (whole, last):
        # Times, and what earlier requests have left in the prefix cache, differ.
        for key in ("response_sent_to_client_ts", "e2e_latency", "cached_tokens"):
            del answer["meta_info"][key]
    assert last == whole


@pytest.mark.parametrize("count", [1, 3])
def test_events_of_a_batch_carry_their_index(client, count):
    texts = [QUESTION, LONG, "Once upon a time"][:count]
    whole = generate(client, text=texts, sampling_params=MORE)
    got = stream(client, text=texts, sampling_params=MORE)
    assert {event["index"] for event in got} == set(range(count))
    for index, answer in enumerate(whole):
        mine = [event for event in got if event["index"] == index]
        assert mine[-1]["output_ids"] == answer["output_ids"]
        assert [event["meta_info"]["finish_reason"] for event in mine[:-1]] == [None] * (
            len(mine) - 1
        )
    if count > 1:
        order = [event["index"] for event in got]
        assert order != sorted(order), "they interleave"


def test_stream_interval_of_a_request(client):
    wanted = MORE | {"stream_interval": 10}
    got = stream(client, text=QUESTION, sampling_params=wanted)
    counts = [event["meta_info"]["completion_tokens"] for event in got]
    print(counts)
    assert all(b - a >= 10 for a, b in zip(counts, counts[1:-1], strict=False))
    assert counts[-1] == 40 and len(counts) <= 5, "1, 11, 21, 31, 40 where nothing is late"


@pytest.mark.parametrize("stop", ["Paris", "France is", "l of F"])
def test_no_event_shows_the_beginning_of_a_stop_string(client, stop):
    got = stream(client, text=QUESTION, sampling_params=GREEDY | {"stop": stop})
    texts = [event["text"] for event in got]
    print(texts)
    assert got[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert all(texts[-1].startswith(text) for text in texts)


def test_no_event_shows_half_a_character(client):
    tokenizer = tokenizers.Tokenizer.from_file(f"{DEMO_MODEL}/tokenizer.json")
    halves = held_back = 0
    for seed in range(4):
        wild = {"temperature": 20.0, "sampling_seed": seed, "ignore_eos": True}
        got = stream(client, text=QUESTION, sampling_params=wild | {"max_new_tokens": 100})
        for earlier, later in zip(got, got[1:], strict=False):
            assert later["text"].startswith(earlier["text"])
            held_back += later["text"] == earlier["text"]
        ids = got[-1]["output_ids"]
        assert got[-1]["text"] == tokenizer.decode(ids)
        halves += sum("\ufffd" in tokenizer.decode([token]) for token in ids)
    print(f"{halves} tokens were half characters, {held_back} events held some back")
    assert halves > 10 and held_back > 0


def raw_chunks(url: str, body: dict) -> list[bytes]:
    """The HTTP chunks of an answer, as they are on the wire."""
    address = urllib.parse.urlsplit(url)
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head.encode() + content)
        answer = connection.makefile("rb")
        header = b"".join(iter(answer.readline, b"\r\n"))
        assert b"transfer-encoding: chunked" in header.lower(), header
        chunks = []
        while size := int(answer.readline(), 16):
            chunks.append(answer.read(size))
            assert answer.readline() == b"\r\n"
        return chunks


def test_every_event_is_one_http_chunk(server):
    chunks = raw_chunks(server.url, {"text": QUESTION, "sampling_params": MORE, "stream": True})
    assert chunks[-1] == b"data: [DONE]\n\n"
    assert len(chunks) > 5
    for chunk in chunks:
        assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and chunk.count(b"\n") == 2


def test_bad_request_for_a_stream_is_an_ordinary_error(client):
    response = client.post("/generate", json={"text": 5, "stream": True})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["param"] == "text"
