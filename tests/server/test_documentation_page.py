"""SGLang's page "Native APIs" (May 2025), the cells of its generation model, in their order."""

import dataclasses
import re
import subprocess

import pytest

from jaxserve.config import ServerConfig
from tests.server.serving import DEMO_MODEL, GREEDY, generate, wait_for

STAMP = r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "
PREFILL = (
    STAMP + r"Prefill batch\. #new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+), "
    r"token usage: \d\.\d\d, #running-req: \d+, #queue-req: \d+$"
)
DECODE = (
    STAMP + r"Decode batch\. #running-req: (\d+), #token: (\d+), token usage: \d\.\d\d, "
    r"(?:cuda graph: \w+, )?gen throughput \(token/s\): \d+\.\d\d, #queue-req: \d+$"
)
START = [
    STAMP + r"server_args=\w+\(model_path='.*', tokenizer_path=",
    STAMP + r"Load weight begin\.",
    r"^Loading safetensors checkpoint shards: +0% Completed \| 0/1 \[",
    r"^Loading safetensors checkpoint shards: 100% Completed \| 1/1 \[00:\d\d<00:00, ",
    STAMP + r"Load weight end\. type=Qwen2ForCausalLM, dtype=float32, .*mem usage=[1-9]\d*\.\d* MB",
    STAMP + r"KV Cache is allocated\. #tokens: \d+, K size: \d\.\d\d GB, V size: \d\.\d\d GB",
    STAMP + r"max_total_num_tokens=\d+, chunked_prefill_size=60, .*max_running_requests=4, "
    r".*context_len=4096",
    PREFILL,
    STAMP + r"The server is fired up and ready to roll!$",
]


def matches(pattern: str, text: str) -> list[re.Match]:
    return list(re.finditer(pattern, text, re.MULTILINE))


def test_start_prints_the_lines_of_the_page_in_its_order(server):
    assert server.url
    at = 0
    for pattern in START:
        found = re.compile(pattern, re.MULTILINE).search(server.output, at)
        assert found, f"{pattern} not in:\n{server.output[at:]}"
        print(found[0][:100])
        at = found.end()
    assert matches(r" The programs need up to (?!0\.00 )\d+\.\d\d [MG]B\.$", server.output)


def test_wait_for_server_finds_the_model(client):
    answer = client.get("/v1/models", headers={"Authorization": "Bearer None"})
    assert answer.status_code == 200
    (model,) = answer.json()["data"]
    assert (model["id"], model["max_model_len"]) == (DEMO_MODEL, 4096)


def test_generate(server, client):
    client.post("/flush_cache").raise_for_status()  # the page's server is fresh
    before = len(server.output)
    response = client.post("/generate", json={"text": "What is the capital of France?"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    print(answer)
    assert isinstance(answer["text"], str)
    assert answer["meta_info"]["prompt_tokens"] == 7
    access = STAMP + r'INFO:     127\.0\.0\.1:\d+ - "POST /generate HTTP/1\.1" 200 OK$'
    wait_for(lambda: matches(access, server.output[before:]), 5)
    (prefill,) = matches(PREFILL, server.output[before:])
    assert prefill.groups() == ("1", "7", "0")


def test_generate_logs_every_fortieth_decode_step(server, client):
    before = len(server.output)
    limits = {"ignore_eos": True, "max_new_tokens": 128}
    generate(client, text="What is the capital of France?", sampling_params=limits)
    found = wait_for(lambda: matches(DECODE, server.output[before:])[2:], 5)
    lines = matches(DECODE, server.output[before:])
    print(*(line[0] for line in lines), sep="\n")
    tokens = [int(line[2]) for line in lines]
    assert len(lines) in (3, 4) and found
    assert [b - a for a, b in zip(tokens, tokens[1:], strict=False)] == [40] * (len(lines) - 1)
    assert {line[1] for line in lines} == {"1"}


def test_get_model_info_has_exactly_the_three_keys_of_the_page(client):
    response = client.get("/get_model_info")
    assert response.status_code == 200
    info = response.json()
    assert info["model_path"] == DEMO_MODEL
    assert info["is_generation"] is True
    assert info["tokenizer_path"] == DEMO_MODEL
    assert info.keys() == {"model_path", "is_generation", "tokenizer_path"}


def test_model_info_has_todays_keys(client):
    info = client.get("/model_info").json()
    assert info["architectures"] == ["Qwen2ForCausalLM"] and info["model_type"] == "qwen2"
    assert info["weight_version"] == "default"
    assert info["has_image_understanding"] is info["has_audio_understanding"] is False


def test_get_server_info_has_the_options_the_limits_and_the_state(client):
    response = client.get("/get_server_info")
    assert response.headers["content-type"] == "application/json"
    info = response.json()
    fields = dataclasses.fields(ServerConfig)
    assert {field.name for field in fields if field.repr} <= info.keys(), "all but secrets"
    assert not {field.name for field in fields if not field.repr} & info.keys()
    assert info["status"] == "ready"
    assert info["max_total_num_tokens"] == 4 * 4096, "every row's longest context"
    assert info["max_req_input_len"] == 4096 - 6
    assert (info["max_running_requests"], info["chunked_prefill_size"]) == (4, 60)
    assert (info["dtype"], info["device"], info["page_size"]) == ("float32", "cpu", 16)
    assert (info["tp_size"], info["dp_size"]) == (1, 1)
    assert info["version"].count(".") == 2 and info["startup_time"] > 0
    (state,) = info["internal_states"]
    assert state["last_gen_throughput"] >= 0
    assert state["effective_max_running_requests_per_dp"] == 4
    assert state["compiled_at_start"] > 10
    assert state["compiled_after_ready"] == state["traced_after_ready"] == 0
    assert state["memory_usage"]["token_capacity"] == info["max_total_num_tokens"]
    same = client.get("/server_info").json()
    assert same.keys() == info.keys()


def test_health_generate_and_health_answer_with_nothing(server, client):
    for path in ("/health_generate", "/health", "/ready", "/ping"):
        before = len(server.output)
        response = client.get(path)
        assert (response.status_code, response.content) == (200, b""), path
        access = rf'"GET {path} HTTP/1\.1" 200 OK$'
        wait_for(lambda: matches(access, server.output[before:]), 5)  # noqa: B023 (called at once)


def test_health_generate_runs_a_token_on_an_idle_engine(server, client):
    before = len(server.output)
    assert client.get("/health_generate").status_code == 200
    (prefill,) = wait_for(lambda: matches(PREFILL, server.output[before:]), 5)
    assert prefill.groups() == ("1", "1", "0")


def test_flush_cache_by_post_and_get(server, client):
    for method in ("POST", "GET"):
        before = len(server.output)
        response = client.request(method, "/flush_cache")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain")
        assert response.text == (
            "Cache flushed.\nPlease check backend logs for more details. (When there are "
            "running or waiting requests, the operation will not be performed.)\n"
        )
        assert matches(STAMP + r"Cache flushed successfully!$", server.output[before:])


def test_update_weights_from_disk(server, client):
    before = len(server.output)
    response = client.post("/update_weights_from_disk", json={"model_path": DEMO_MODEL})
    assert response.status_code == 200
    assert response.json()["success"] is True
    assert response.json()["message"] == "Succeeded to update model weights."
    lines = [
        STAMP + r"Start update_weights\. Load format=auto$",
        STAMP + r"Update engine weights online from disk begin\. avail mem=\d+\.\d\d GB$",
        STAMP + r"Update weights end\.",
        STAMP + r"Cache flushed successfully!$",
        r'"POST /update_weights_from_disk HTTP/1\.1" 200 OK$',
    ]
    wait_for(lambda: matches(lines[-1], server.output[before:]), 5)
    found = [matches(line, server.output[before:]) for line in lines]
    assert all(len(one) == 1 for one in found), server.output[before:]
    assert sorted(found, key=lambda one: one[0].start()) == found


@pytest.mark.parametrize("name", ["qwen/qwen2.5-0.5b-instruct-wrong", f"{DEMO_MODEL}-wrong"])
def test_update_weights_from_disk_with_a_wrong_name(server, client, name):
    before = len(server.output)
    response = client.post("/update_weights_from_disk", json={"model_path": name})
    assert response.status_code == 400
    words = f"Failed to get weights iterator: {name} (repository not found)."
    assert response.json() == {"success": False, "message": words, "num_paused_requests": 0}
    assert matches(STAMP + re.escape(words) + "$", server.output[before:])
    assert client.get("/model_info").json()["model_path"] == DEMO_MODEL
    test_model_knows_the_capital_of_france(client)


def test_curl_line_of_the_banner_works_as_it_is_printed(server):
    assert server.url
    (command,) = matches(r"^  (curl .*\\\n.*)$", server.output)
    print(command[1])
    done = subprocess.run(
        command[1] + " --silent --show-error --fail-with-body",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_model_knows_the_capital_of_france(client):
    answer = generate(client, text="What is the capital of France?", sampling_params=GREEDY)
    assert answer["text"].strip() == "The capital of France is Paris."
