"""What a caller can do wrong: each is refused in words, and nobody else notices."""

import json
import socket
import threading

import pytest

from tests.server.serving import GREEDY, generate, num_running, open_stream, wait_for

QUESTION = "What is the capital of France?"
HUGE = 10**30


def body(**fields) -> bytes:
    return json.dumps({"text": QUESTION} | fields).encode()


def params(**given) -> bytes:
    return body(sampling_params=given)


def ids(value) -> bytes:
    return json.dumps({"input_ids": value}).encode()


# Body, the parameter that the error names, and some of its words.
BROKEN_BODIES = [
    (b"", None, "JSON"),
    (b"{", None, "JSON"),
    (b'{"text": "a"', None, "JSON"),
    (b'{"text": "a"} {}', None, "JSON"),
    (b"{'text': 'a'}", None, "JSON"),
    (b"text=a", None, "JSON"),
    (b'{"text": "\xff"}', None, "JSON"),
    (b'{"text": "\\ud800"}', None, "JSON"),
    (b"\x00" * 100, None, "JSON"),
    (b'{"text": "a", "sampling_params": {"temperature": NaN}}', None, "JSON"),
    (b'{"text": "a", "sampling_params": {"temperature": -Infinity}}', None, "JSON"),
    (b'{"text": "a", "sampling_params": {"temperature": 1e999}}', None, "JSON"),
    (b"[" * 100_000 + b"]" * 100_000, None, "deep"),
    (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "deep"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, None, "deep"),
    (b"[]", None, "object"),
    (b"null", None, "object"),
    (b'"text"', None, "object"),
    (b"3", None, "object"),
    (b"{}", None, "Either text, input_ids or input_embeds should be provided."),
    (b'{"text": null, "input_ids": null}', None, "Either text, input_ids or input_embeds"),
]
BAD_PROMPTS = [
    (body(text=5), "text", "string"),
    (body(text={"a": "b"}), "text", "string"),
    (body(text=[]), "text", "cannot be empty"),
    (body(text=["a", 5]), "text", "string"),
    (body(text=["a", None]), "text", "string"),
    (body(text=[["a"]]), "text", "string"),
    (body(text=["a"] * 257), "text", "at most 256"),
    (ids([]), "input_ids", "input_ids cannot be empty."),
    (ids([[]]), "input_ids", "input_ids cannot be empty."),
    (ids([[1], []]), "input_ids", "input_ids cannot be empty."),
    (ids([[1], None]), "input_ids", "list of token ids"),
    (ids([None]), "input_ids", "list of token ids"),
    (ids(7), "input_ids", "must be a list"),
    (ids("12"), "input_ids", "must be a list"),
    (ids({"0": 1}), "input_ids", "must be a list"),
    (ids(["1", 2]), "input_ids", "list of token ids"),
    (ids([1, [2]]), "input_ids", "list of token ids"),
    (ids([[1], 2]), "input_ids", "list of token ids"),
    (ids([[[1]]]), "input_ids", "list of token ids"),
    (ids([1.0, 2]), "input_ids", "list of token ids"),
    (ids([True, 2]), "input_ids", "list of token ids"),
    (ids([-1]), "input_ids", "out-of-vocabulary token id -1; valid range is [0, 1024)"),
    (ids([1, 1024]), "input_ids", "out-of-vocabulary token id 1024; valid range is [0, 1024)"),
    (ids([[1], [5000]]), "input_ids", "out-of-vocabulary token id 5000"),
    (ids([HUGE]), "input_ids", "out-of-vocabulary"),
    (ids([2**63]), "input_ids", "out-of-vocabulary"),
    (ids([5] * 4091), "input_ids", "Input length (4091 tokens) exceeds the maximum allowed length"),
    (ids([5] * 4096), "input_ids", "(4096 tokens) is longer than the model's context length (4096"),
    (body(text="a " * 4_100), "text", "is longer than the model's context length (4096 tokens)"),
    (body(text="a " * 90_000), "text", "(180000 characters) is longer than the model's context"),
    (
        body(text=["a", "漢字" * (1 << 19)]),
        "text",
        "(1048576 characters) is longer than the model's",
    ),
    (body(text=["a", "b"], input_ids=[[1]]), "input_ids", "2 texts"),
    (body(text=["a"], input_ids=[1]), "input_ids", "list of token ids"),
]
BAD_PARAMS = [
    (body(sampling_params="x"), "sampling_params", "object"),
    (body(sampling_params=[{}]), "sampling_params", "1 sampling_params for 1 prompts"),
    (body(text=["a", "b"], sampling_params=[{}]), "sampling_params", "1 sampling_params for 2"),
    (body(text=["a"], sampling_params=[7]), "sampling_params", "object"),
    (params(foo=1), "sampling_params", "foo"),
    (params(maxNewTokens=1), "sampling_params", "maxNewTokens"),
    (params(max_tokens=1), "sampling_params", "max_tokens"),
    (params(max_new_tokens="5"), "sampling_params", "max_new_tokens"),
    (params(max_new_tokens=1.5), "sampling_params", "max_new_tokens"),
    (params(max_new_tokens=True), "sampling_params", "max_new_tokens"),
    (params(max_new_tokens=-1), "max_new_tokens", "got -1"),
    (params(max_new_tokens=4090), "max_new_tokens", "maximum context length of 4096 tokens. You"),
    (params(max_new_tokens=2**31), "max_new_tokens", "Requested token count exceeds the model's"),
    (params(max_new_tokens=HUGE), "max_new_tokens", "token"),
    (params(temperature="hot"), "sampling_params", "temperature"),
    (params(temperature=True), "sampling_params", "temperature"),
    (params(temperature=-0.1), "temperature", "got -0.1"),
    (params(temperature=10**400), "sampling_params", "temperature"),
    (params(top_p=0), "top_p", "(0, 1]"),
    (params(top_p=1.01), "top_p", "got 1.01"),
    (params(top_p=False), "sampling_params", "top_p"),
    (params(top_k=0), "top_k", "got 0"),
    (params(top_k=-2), "top_k", "got -2"),
    (params(top_k=HUGE), "top_k", "top_k"),
    (params(top_k=True), "sampling_params", "top_k"),
    (params(stop=5), "sampling_params", "stop"),
    (params(stop=["a", None]), "sampling_params", "stop"),
    (params(stop=""), "stop", "got 0"),
    (params(stop="é" * 129), "stop", "got 258"),
    (params(stop=["a"] * 33), "stop", "at most 32"),
    (params(stop_token_ids=5), "sampling_params", "stop_token_ids"),
    (params(stop_token_ids=[True]), "sampling_params", "stop_token_ids"),
    (params(stop_token_ids=[-1]), "stop_token_ids", "out-of-vocabulary token id -1"),
    (params(stop_token_ids=[1024]), "stop_token_ids", "out-of-vocabulary token id 1024"),
    (params(stop_token_ids=[HUGE]), "stop_token_ids", "out-of-vocabulary"),
    (params(stop_token_ids=[1] * 129), "stop_token_ids", "at most 128"),
    (params(ignore_eos=1), "sampling_params", "ignore_eos"),
    (params(no_stop_trim="yes"), "sampling_params", "no_stop_trim"),
    (params(stream_interval=0), "stream_interval", "got 0"),
    (params(stream_interval=HUGE), "stream_interval", "stream_interval"),
    (params(sampling_seed=2**63), "sampling_seed", "sampling_seed"),
    (params(sampling_seed=HUGE), "sampling_seed", "sampling_seed"),
    (params(sampling_seed=1.5), "sampling_params", "sampling_seed"),
    (params(min_p=2), "min_p", "got 2"),
    (params(frequency_penalty=-3), "frequency_penalty", "[-2, 2]"),
    (params(presence_penalty=3), "presence_penalty", "[-2, 2]"),
    (params(repetition_penalty=0), "repetition_penalty", "(0, 2]"),
    (params(min_new_tokens=3, max_new_tokens=2), "min_new_tokens", "max_new_tokens(2)"),
    (params(logit_bias={"1024": 1.0}), "logit_bias", "[0, 1023], got 1024"),
    (params(logit_bias={"-1": 1.0}), "logit_bias", "[0, 1023], got -1"),
    (params(logit_bias={"x": 1.0}), "sampling_params", "logit_bias"),
    (params(n=65), "n", "from 1 to 64"),
    (params(n=True), "n", "from 1 to 64"),
    (params(n=[2]), "n", "from 1 to 64"),
    (body(text=["a"] * 9, sampling_params={"n": 32}), "n", "at most 256 answers"),
    (body(text=["a", "b"], sampling_params=[{"n": 2}, {"n": 3}]), "n", "should be the same"),
]
BAD_LOGPROBS = [
    (body(return_logprob=1), "return_logprob", "boolean"),
    (body(return_logprob=[True]), "return_logprob", "1 values of return_logprob for 1 prompts"),
    (body(text=["a", "b"], return_logprob=[True]), "return_logprob", "for 2 prompts"),
    (body(return_logprob=True, logprob_start_len=-2), "logprob_start_len", "got -2"),
    (body(return_logprob=True, logprob_start_len=50), "logprob_start_len", "is higher than"),
    (body(return_logprob=True, top_logprobs_num=21), "top_logprobs_num", "from 0 to 20"),
    (body(return_logprob=True, top_logprobs_num=1.0), "top_logprobs_num", "integer"),
    (body(return_logprob=True, token_ids_logprob=[1024]), "token_ids_logprob", "id 1024"),
    (body(return_logprob=True, token_ids_logprob=[[1]]), "token_ids_logprob", "flat list"),
    (body(return_logprob=True, token_ids_logprob=[1] * 129), "token_ids_logprob", "at most 128"),
    (
        body(
            text=["a", "b"],
            return_logprob=True,
            top_logprobs_num=[1, 2],
            sampling_params={"n": 2},
        ),
        "top_logprobs_num",
        "Cannot use list top_logprobs_num with parallel_sample_num > 1",
    ),
    (body(return_text_in_logprobs="x"), "return_text_in_logprobs", "boolean"),
]
NOT_SERVED = [
    (params(**{name: value}), name, f"{name} is not supported by this server yet")
    for name, value in {
        "stop_regex": "a+",
        "json_schema": "{}",
        "regex": "a+",
        "ebnf": 'root ::= "a"',
        "structural_tag": "{}",
        "beam_width": 2,
    }.items()
] + [
    (body(**{name: value}), name, f"{name} is not supported by this server yet")
    for name, value in {
        "input_embeds": [[0.0]],
        "image_data": "x",
        "audio_data": "x",
        "return_hidden_states": True,
        "lora_path": "x",
        "session_params": {"id": "x"},
        "custom_logit_processor": "x",
    }.items()
]
OTHER_FIELDS = [
    (body(stream="yes"), "stream", "boolean"),
    (body(stream=1), "stream", "boolean"),
    (body(return_prompt_token_ids=0.5), "return_prompt_token_ids", "boolean"),
    (body(rid=5), "rid", "string"),
    (body(rid=""), "rid", "1 to 256"),
    (body(rid="a\nb"), "rid", "printable"),
    (body(rid="x" * 257), "rid", "1 to 256"),
    (body(text=["a", "b"], rid=["x"]), "rid", "1 rids for 2 prompts"),
    (body(text=["a", "b"], rid=["x", 5]), "rid", "string"),
    (body(text=["a", "b"], rid=["x", "x"]), "rid", "Duplicate request IDs detected within"),
]
NESTED = b"[" * 900 + b"]" * 900
# What is repeated to the sender must be short, whatever was sent.
LARGE = [
    (body(stream="x" * 10**6), "stream", "stream must be a boolean, got 'xxx"),
    (body(priority="x" * 10**6), "priority", "32-bit integer"),
    (body(return_logprob="x" * 10**6), "return_logprob", "boolean"),
    (params(n="x" * 10**6), "n", "n must be an integer"),
    (params(**{"x" * 10**6: 1}), "sampling_params", "unknown field"),
    (b'{"text": "a", "stream": ' + NESTED + b"}", "stream", "boolean"),
    (b'{"text": "a", "priority": ' + NESTED + b"}", "priority", "32-bit integer"),
    (b'{"text": "a", "sampling_params": {"n": ' + NESTED + b"}}", "n", "n must be an integer"),
    (b'{"text": "a", "priority": ' + b"1" * 4000 + b"}", "priority", "32-bit integer"),
    (b'{"text": "a", "priority": ' + b"1" * 5000 + b"}", None, "JSON"),
]
BAD = BROKEN_BODIES + BAD_PROMPTS + BAD_PARAMS + BAD_LOGPROBS + NOT_SERVED + OTHER_FIELDS + LARGE


@pytest.mark.parametrize("content,param,words", BAD, ids=[str(row[0][:60]) for row in BAD])
def test_bad_body_is_refused_in_words(client, content, param, words):
    response = client.post("/generate", content=content)
    print(response.text[:300])
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"] == param
    assert (error["code"], error["type"]) == (400, "invalid_request_error")
    assert len(error["message"]) < 1000, "the message does not repeat the whole body"


def test_key_given_twice_has_its_last_value(client):
    twice = b'{"text": 5, "stream": "x", "text": "a", "stream": false, "sampling_params": {"n": 0'
    few = b', "n": 1, "max_new_tokens": 9, "max_new_tokens": 2, "ignore_eos": true}}'
    response = client.post("/generate", content=twice + few)
    assert response.status_code == 200, response.text
    assert response.json()["meta_info"]["completion_tokens"] == 2


def test_empty_text_is_refused(client):
    response = client.post("/generate", json={"text": ""})
    assert response.status_code == 400
    assert "empty" in response.json()["error"]["message"]


def test_one_bad_prompt_refuses_the_batch_and_runs_nothing(server, client):
    before = len(server.output)
    response = client.post("/generate", json={"input_ids": [[1], [2], [5000]]})
    assert response.status_code == 400
    assert num_running(client) == 0
    assert "Prefill" not in server.output[before:]


def test_rid_of_a_live_request_is_refused_and_free_again_afterwards(client):
    long = {"max_new_tokens": 2000, "ignore_eos": True}
    with open_stream(client, text=QUESTION, rid="mine", sampling_params=long):
        refused = client.post("/generate", json={"text": ["a", "b"], "rid": ["other", "mine"]})
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["message"] == "Duplicate request ID detected: mine"
        assert error["param"] == "rid"
        assert num_running(client) == 1, "the other prompt does not run either"
    wait_for(lambda: num_running(client) == 0, 5)
    few = {"max_new_tokens": 1}
    assert generate(client, text="a", rid="mine", sampling_params=few)["meta_info"]["id"] == "mine"


@pytest.mark.parametrize(
    "method,path,status",
    [
        ("GET", "/nope", 404),
        ("GET", "/get_server_args", 404),
        ("GET", "/v1/models/nope", 404),
        ("GET", "/generate", 405),
        ("DELETE", "/generate", 405),
        ("POST", "/health", 405),
        ("PUT", "/flush_cache", 405),
        ("GET", "/flush_cache?timeout=soon", 400),
        ("GET", "/flush_cache?timeout=-1", 400),
        ("GET", "/flush_cache?timeout=nan", 400),
    ],
)
def test_wrong_path_or_method_is_an_error_in_json(client, method, path, status):
    response = client.request(method, path)
    print(response.text)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["message"]
    if status == 405:
        assert response.headers["allow"]


def send(url: str, request: bytes) -> bytes:
    """The head of the answer, and what of its body has come with it."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        received = connection.recv(1 << 16)
        return received if b"\r\n\r\n" in received else received + connection.recv(1 << 16)


STRANGE = {
    b"GET http://[::1/generate HTTP/1.1\r\nHost: x\r\n\r\n": (400, b"Bad URL"),
    b"GET http://x:99999999/ HTTP/1.1\r\nHost: x\r\n\r\n": (400, b"Bad URL"),
    b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n": (400, b"Bad URL"),
    b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n": (400, b"Bad URL"),
    b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n": (400, b"US-ASCII"),
    b"P\xff /generate HTTP/1.1\r\nHost: x\r\n\r\n": (405, b"not allowed"),
    b"GET /flush_cache HTTP/1.1\r\nHost: x\r\nOrigin: \xff\r\n\r\n": (403, b"another origin"),
    b"GET /flush_cache?timeout=%ff HTTP/1.1\r\nHost: x\r\n\r\n": (400, b"timeout must be"),
    b"GET /nope HTTP/1.1\r\nHost: \xff:port\r\nCookie: \xff\r\n\r\n": (404, b"not found"),
    b"\x16\x03\x01\x02\r\n\r\n": (400, b"Bad Request"),
}


@pytest.mark.parametrize("request_bytes", STRANGE, ids=lambda sent: ascii(sent[:40]))
def test_request_that_is_none_is_answered_in_json(server, request_bytes):
    status, words = STRANGE[request_bytes]
    before = len(server.output)
    head, _, content = send(server.url, request_bytes).partition(b"\r\n\r\n")
    print(head, content)
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"content-type: application/json" in head
    assert words in content and json.loads(content)["error"]["code"] == status
    assert "Traceback" not in server.output[before:]


OTHER_SITES = [
    {"Origin": "http://evil.example"},
    {"Origin": "https://127.0.0.1"},
    {"Origin": "null"},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "cross-site"},  # an image of a page, say
    {"Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("headers", OTHER_SITES, ids=str)
def test_page_of_another_site_changes_nothing(server, client, method, headers):
    before = len(server.output)
    response = client.request(method, "/flush_cache", headers=headers)
    print(response.text)
    assert response.status_code == 403
    assert "is refused to pages of another origin" in response.json()["error"]["message"]
    assert "flushed" not in server.output[before:]


def test_own_page_and_programs_may_change_what_they_like(server, client):
    host = server.url.removeprefix("http://")
    for headers in (
        {},
        {"Origin": server.url},
        {"Origin": f"https://{host}"},  # behind a proxy that ends TLS
        {"Origin": server.url, "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://proxy.example", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},  # typed by the user
        {"Origin": "HTTP://LOCALHOST:8000", "Host": "localhost:8000"},
    ):
        assert client.post("/flush_cache", headers=headers).status_code == 200, headers


def test_body_over_the_limit_is_413(client):
    response = client.post("/generate", content=b" " * ((16 << 20) + 1))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == 413


def test_flush_cache_is_refused_while_a_request_runs(server, client):
    long = {"max_new_tokens": 1500, "ignore_eos": True}
    before = len(server.output)
    with open_stream(client, text=QUESTION, sampling_params=long):
        busy = client.post("/flush_cache")
        assert (busy.status_code, busy.text) == (400, "Flush cache failed.\n")
        late = client.get("/flush_cache?timeout=0.05")
        assert (late.status_code, late.text) == (400, "Timed out waiting for idle state.\n")
        patient = client.get("/flush_cache?timeout=30")
        assert patient.status_code == 200, "it has waited for the end"
        assert num_running(client) == 0
    assert (
        "Cache not flushed because there are pending requests. #queue-req: 0, #running-req: 1"
        in server.output[before:]
    )


def test_bad_bodies_do_not_disturb_a_neighbour(client, server):
    wanted = {
        "text": QUESTION,
        "sampling_params": GREEDY | {"ignore_eos": True, "max_new_tokens": 3000},
    }
    expected = generate(client, **wanted)["output_ids"]
    answers = []
    neighbour = threading.Thread(target=lambda: answers.append(generate(client, **wanted)))
    neighbour.start()
    wait_for(lambda: num_running(client) == 1, 5)
    meanwhile = 0
    with server.client() as other:
        for content, *_ in BAD:
            assert other.post("/generate", content=content).status_code == 400
            meanwhile += neighbour.is_alive()
    neighbour.join()
    print(f"{meanwhile} of {len(BAD)} bad bodies were refused while the neighbour ran")
    assert meanwhile > 20
    assert answers[0]["output_ids"] == expected
    assert num_running(client) == 0
