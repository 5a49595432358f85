"""/metrics: what was served is counted, under SGLang's names."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.serving import DEMO_MODEL, GREEDY, generate, wait_for

TEXT = "What is the capital of France?"
NUM_TOKENS = 9


def read(client) -> dict[str, float]:
    """Values by name; of a histogram its count and its sum."""
    response = client.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.labels == {"model_name": DEMO_MODEL}
    }


@pytest.fixture
def change(client):
    """How much each has grown since the fixture was made."""
    before = read(client)
    return lambda: {name: value - before.get(name, 0) for name, value in read(client).items()}


def test_names_that_dashboards_know_are_there(client):
    generate(client, text=TEXT, sampling_params=GREEDY)
    names = """num_running_reqs num_queue_reqs num_used_tokens token_usage gen_throughput
        num_retracted_reqs cache_hit_rate max_total_num_tokens startup_time_seconds
        prompt_tokens_total cached_tokens_total generation_tokens_total num_requests_total
        num_aborted_requests_total time_to_first_token_seconds_count
        inter_token_latency_seconds_sum e2e_request_latency_seconds_count"""
    found = read(client)
    print(found)
    assert {f"sglang:{name}" for name in names.split()} <= found.keys()
    assert found["jaxserve:compiled_after_ready"] == 0


def test_a_request_is_counted_once_in_each(client, change):
    client.post("/flush_cache").raise_for_status()
    params = GREEDY | {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    for _ in range(2):
        answer = generate(client, text=TEXT, sampling_params=params)
    grown = {name.removeprefix("sglang:"): value for name, value in change().items()}
    meta = answer["meta_info"]
    assert meta["cached_tokens"] > 0
    assert grown["num_requests_total"] == grown["e2e_request_latency_seconds_count"] == 2
    assert grown["prompt_tokens_total"] == 2 * meta["prompt_tokens"]
    assert grown["cached_tokens_total"] == meta["cached_tokens"]
    assert grown["generation_tokens_total"] == 2 * NUM_TOKENS
    assert grown["time_to_first_token_seconds_count"] == 2
    assert grown["inter_token_latency_seconds_count"] == 2 * (NUM_TOKENS - 1)
    assert 0 < grown["time_to_first_token_seconds_sum"] < grown["e2e_request_latency_seconds_sum"]
    assert grown["num_aborted_requests_total"] == 0
    assert 0 < read(client)["sglang:cache_hit_rate"] < 1


def test_a_client_that_leaves_is_counted_as_aborted(client, change):
    params = GREEDY | {"max_new_tokens": 3000, "ignore_eos": True}
    body = {"text": TEXT, "sampling_params": params, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        next(response.iter_lines())
    wait_for(lambda: change()["sglang:num_aborted_requests_total"], 20)
    assert change()["sglang:num_requests_total"] == 1
