"""What one request has computed, another does not compute again: to the token."""

from tests.server.serving import generate

GREEDY = {"temperature": 0, "max_new_tokens": 4}
PROMPT = [5, 9, 11, 3, 7, 42, 8, 6, 13, 21, 34, 55, 89, 14, 23, 37, 60, 97, 15, 72]


def cached(client, ids: list[int], **body) -> int:
    answer = generate(client, input_ids=ids, sampling_params=GREEDY, **body)
    print(f"{len(ids)} tokens, {answer['meta_info']['cached_tokens']} cached")
    return answer["meta_info"]["cached_tokens"]


def test_repeated_prompt_is_cached_but_for_its_last_token(client):
    client.post("/flush_cache").raise_for_status()
    assert cached(client, PROMPT) == 0
    assert cached(client, PROMPT) == len(PROMPT) - 1


def test_prompts_share_their_prefix_at_every_length(client):
    client.post("/flush_cache").raise_for_status()
    cached(client, PROMPT)
    for length in (1, 7, 15, 16, 17, 19):  # around a page of 16
        assert cached(client, [*PROMPT[:length], 777, 778]) == length


def test_other_namespace_shares_nothing(client):
    client.post("/flush_cache").raise_for_status()
    assert cached(client, PROMPT, cache_salt="a") == 0
    assert cached(client, PROMPT, cache_salt="b") == 0
    assert cached(client, PROMPT, cache_salt="a") == len(PROMPT) - 1


def test_cached_answer_is_the_computed_one(client):
    client.post("/flush_cache").raise_for_status()
    first = generate(client, input_ids=PROMPT, sampling_params=GREEDY)
    again = generate(client, input_ids=PROMPT, sampling_params=GREEDY)
    assert again["meta_info"]["cached_tokens"] > 0
    assert first["output_ids"] == again["output_ids"]
