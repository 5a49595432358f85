"""Each option does something: one server with as many of them as go together."""

import concurrent.futures
import pathlib
import re
import shutil

import httpx
import pytest

from tests.server.serving import DEMO_MODEL, generate, programs_folder, stream, wait_for

QUESTION = "What is the capital of France?"
OPTIONS = {
    "host": "0.0.0.0",
    "load_format": "dummy",
    "random_seed": 7,
    "json_model_override_args": '{"num_hidden_layers": 1, "vocab_size": 1100}',
    "dtype": "bfloat16",
    "context_length": 256,
    "max_total_tokens": 512,
    "page_size": 8,
    "max_running_requests": 2,
    "chunked_prefill_size": 14,
    "served_model_name": "tiny",
    "weight_version": "step-7",
    "stream_interval": 5,
    "preferred_sampling_params": '{"max_new_tokens": 17, "ignore_eos": true}',
    "allow_auto_truncate": True,
    "max_request_bytes": 60_000,
    "decode_log_interval": 3,
    "log_requests": True,
    "skip_server_warmup": True,
}
IGNORED = ["--attention-backend", "fa3", "--trust-remote-code", "--cuda-graph-max-bs", "8"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{DEMO_MODEL}/{name}", folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(start, tokenizer_folder):
    with start(*IGNORED, tokenizer_path=tokenizer_folder, **OPTIONS) as process:
        yield process


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url.replace("0.0.0.0", "127.0.0.1"), timeout=60) as client:
        yield client


def lines(server, word: str, start: int = 0) -> list[str]:
    return [line for line in server.output[start:].splitlines() if word in line]


def test_ignored_flags_warn(server, client):
    found = lines(server, "has no meaning for JAX; it is ignored")
    named = {re.search("--[a-z-]+", line)[0] for line in found}
    assert named == {word for word in IGNORED if word.startswith("--")}


def test_skip_server_warmup(server, client):
    ready = server.output.index("The server is fired up and ready to roll!")
    assert "Prefill batch" not in server.output[:ready]


def test_banner_names_a_reachable_address(server, client):
    assert re.match(r"http://127\.0\.0\.1:\d+$", server.url)


def test_server_info_tells_every_option(client, tokenizer_folder):
    info = client.get("/get_server_info").json()
    assert {name: info[name] for name in OPTIONS} == OPTIONS
    assert info["max_total_num_tokens"] == 512
    assert info["max_req_input_len"] == 256 - 6
    assert info["tokenizer_path"] == tokenizer_folder
    assert info["model_path"] == DEMO_MODEL


def test_compiled_programs_are_kept(client, pytestconfig):
    kept = list(pathlib.Path(programs_folder(pytestconfig)).iterdir())
    print(f"{len(kept)} files")
    assert len(kept) > 10


def test_served_model_name_and_context_length(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["root"], model["max_model_len"]) == ("tiny", "tiny", 256)
    assert client.get("/v1/models/tiny").status_code == 200
    names = client.get("/get_model_info").json()
    assert names["model_path"] == DEMO_MODEL, "still the path, as SGLang has it"


def test_weight_version(client):
    assert generate(client, text="a")["meta_info"]["weight_version"] == "step-7"
    assert client.get("/model_info").json()["weight_version"] == "step-7"


def test_preferred_sampling_params_lie_under_the_requests_own(client):
    assert generate(client, text=QUESTION)["meta_info"]["completion_tokens"] == 17
    own = {"max_new_tokens": 3}
    answer = generate(client, text=QUESTION, sampling_params=own)
    assert answer["meta_info"]["completion_tokens"] == 3
    many = generate(client, text=[QUESTION] * 2, sampling_params=[own, {}])
    assert [answer["meta_info"]["completion_tokens"] for answer in many] == [3, 17]


def test_stream_interval(client):
    for own, interval in (({}, 5), ({"stream_interval": 8}, 8)):
        got = stream(client, text=QUESTION, sampling_params=own)
        counts = [event["meta_info"]["completion_tokens"] for event in got]
        print(counts)
        assert all(b - a >= interval for a, b in zip(counts, counts[1:-1], strict=False))
        assert counts[-1] == 17 and len(counts) <= 2 + 16 // interval


def test_random_seed_is_the_seed_of_requests_without_one(client):
    first, second = (generate(client, text=QUESTION)["output_ids"] for _ in range(2))
    assert first == second
    own = generate(client, text=QUESTION, sampling_params={"sampling_seed": 8})
    assert own["output_ids"] != first


def test_model_override_reaches_the_model(client):
    """Ids beyond the tokenizer's, as a padded vocabulary has them, are taken and have no text."""
    answer = generate(client, input_ids=[1099, 1024], return_prompt_token_ids=True)
    assert answer["prompt_token_ids"] == [1099, 1024]
    refused = client.post("/generate", json={"input_ids": [1100]})
    assert "valid range is [0, 1100)" in refused.json()["error"]["message"]
    wild = {"temperature": 50.0, "max_new_tokens": 200, "sampling_seed": 1}
    ids = generate(client, text="a", sampling_params=wild)["output_ids"]
    print(f"{sum(token >= 1024 for token in ids)} of 200 tokens have no text")
    assert any(token >= 1024 for token in ids)


def test_chunked_prefill_size(server, client):
    before = len(server.output)
    generate(client, input_ids=[5] * 45, sampling_params={"max_new_tokens": 1})
    wait_for(lambda: len(lines(server, "Prefill batch", before)) == 4, 5)
    sizes = re.findall(r"#new-token: (\d+)", server.output[before:])
    assert sizes == ["14", "14", "14", "3"]


def test_decode_log_interval(server, client):
    before = len(server.output)
    generate(client, text=QUESTION, sampling_params={"max_new_tokens": 31})
    wait_for(lambda: len(lines(server, "Decode batch", before)) == 10, 5)


def test_log_requests(server, client):
    before = len(server.output)
    generate(client, text=QUESTION, rid="look-for-me", sampling_params={"temperature": 0.125})
    found = wait_for(lambda: lines(server, "look-for-me", before), 5)
    print(*found, sep="\n")
    assert any("0.125" in line for line in found)


def test_auto_truncate_cuts_prompt_and_output_to_the_context(client):
    long = list(range(3, 303))
    answer = generate(client, input_ids=long, return_prompt_token_ids=True)
    assert answer["prompt_token_ids"] == long[:250]
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    for limit in (None, 1000, 2**31, 2**63 - 1):
        limits = {"max_new_tokens": limit}
        answer = generate(client, input_ids=long[:240], sampling_params=limits)
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 14}
    beyond = {"input_ids": long, "sampling_params": {"max_new_tokens": 2**70}}
    assert client.post("/generate", json=beyond).status_code in (200, 400)


def test_max_request_bytes(client):
    assert client.post("/generate", content=b" " * 60_001).status_code == 413
    assert client.post("/generate", content=b" " * 60_000).status_code == 400


def test_rows_pages_and_tokens_are_as_many_as_told(client):
    """Two rows; 512 tokens are two contexts, so both rows can be full."""
    full = {"max_new_tokens": None}
    most = 0
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        calls = [
            pool.submit(generate, client, text=QUESTION, sampling_params=full) for _ in range(5)
        ]
        while not all(call.done() for call in calls):
            state = client.get("/get_server_info").json()["internal_states"][0]
            most = max(most, state["num_running_reqs"])
            assert state["num_used_tokens"] <= 512
    assert most == 2
    lengths = [call.result()["meta_info"]["finish_reason"] for call in calls]
    assert lengths == [{"type": "length", "length": 256 - 1 - 7 - 1}] * 5
    assert len({tuple(call.result()["output_ids"]) for call in calls}) == 1
