"""/generate without a stream."""

import re

import pytest
import tokenizers

from tests.server.serving import DEMO_MODEL, GREEDY, generate

QUESTION = "What is the capital of France?"
LONG = QUESTION * 12  # 84 tokens: two chunks
MORE = GREEDY | {"ignore_eos": True, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(f"{DEMO_MODEL}/tokenizer.json")


@pytest.fixture(scope="module")
def paris(client) -> dict:
    """The greedy answer, up to its end-of-text token."""
    return generate(client, text=QUESTION, sampling_params=GREEDY)


def test_answer_has_sglangs_keys_in_sglangs_order(paris):
    assert list(paris) == ["text", "output_ids", "meta_info"]
    assert list(paris["meta_info"]) == [
        "id",
        "finish_reason",
        "prompt_tokens",
        "weight_version",
        "num_retractions",
        "reasoning_tokens",
        "completion_tokens",
        "cached_tokens",
        "cached_tokens_details",
        "dp_rank",
        "weight_versions",
        "e2e_latency",
        "response_sent_to_client_ts",
    ]
    meta = paris["meta_info"]
    assert meta["completion_tokens"] == len(paris["output_ids"])
    assert meta["weight_version"] == "default"
    assert 0 < meta["e2e_latency"] < 60
    assert 0 <= meta["cached_tokens"] < meta["prompt_tokens"]
    assert (meta["num_retractions"], meta["dp_rank"]) == (0, None)


def test_end_of_text_is_in_the_ids_and_not_in_the_text(paris, tokenizer):
    reason = paris["meta_info"]["finish_reason"]
    assert reason == {"type": "stop", "matched": paris["output_ids"][-1]}
    assert reason["matched"] in (0, 2)
    assert paris["text"] == tokenizer.decode(paris["output_ids"][:-1])


def test_input_ids_are_the_tokens_of_the_text(client, paris, tokenizer):
    ids = tokenizer.encode(QUESTION).ids
    answer = generate(client, input_ids=ids, sampling_params=GREEDY)
    assert (answer["output_ids"], answer["text"]) == (paris["output_ids"], paris["text"])
    other = generate(client, text="Once upon", input_ids=ids, sampling_params=GREEDY)
    assert other["output_ids"] == paris["output_ids"], "where both are given, the ids count"


@pytest.mark.parametrize("count", [1, 3])
def test_list_is_answered_with_a_list_in_order(client, paris, count):
    texts = [QUESTION, "What is the capital of Kenya?", LONG][:count]
    answers = generate(client, text=texts, sampling_params=GREEDY)
    assert isinstance(answers, list) and len(answers) == count
    assert answers[0]["output_ids"] == paris["output_ids"]
    single = [generate(client, text=text, sampling_params=GREEDY) for text in texts]
    assert [a["text"] for a in answers] == [a["text"] for a in single]
    assert not any("index" in answer for answer in answers)
    print([answer["text"] for answer in answers])


def test_list_of_id_lists_is_a_batch(client, paris, tokenizer):
    ids = tokenizer.encode(QUESTION).ids
    (answer,) = generate(client, input_ids=[ids], sampling_params=GREEDY)
    assert answer["output_ids"] == paris["output_ids"]


def test_more_prompts_than_rows(client):
    answers = generate(client, text=[QUESTION] * 11, sampling_params=MORE)
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1
    assert len({answer["meta_info"]["id"] for answer in answers}) == 11


def test_list_of_sampling_params_has_one_for_each_prompt(client):
    limits = [{"max_new_tokens": n, "ignore_eos": True} for n in (1, 4, 2)]
    answers = generate(client, text=[QUESTION] * 3, sampling_params=limits)
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [1, 4, 2]
    one = generate(client, text=[QUESTION] * 2, sampling_params=limits[1])
    assert [answer["meta_info"]["completion_tokens"] for answer in one] == [4, 4]


def test_rid_is_echoed(client):
    few = {"max_new_tokens": 1}
    assert generate(client, text="a", sampling_params=few, rid="x/1")["meta_info"]["id"] == "x/1"

    def ids(**body):
        answers = generate(client, text=["a", "b"], sampling_params=few, **body)
        return [answer["meta_info"]["id"] for answer in answers]

    assert ids(rid=["one", "two"]) == ["one", "two"]
    assert ids(rid="many") == ["many_0", "many_1"]
    made = ids()
    assert all(re.fullmatch("[0-9a-f]{32}", rid) for rid in made) and len(set(made)) == 2


@pytest.mark.parametrize(
    "stop",
    ["Paris", " is ", "of Fra", ["nothing", "Paris"], ["Paris", "France", "e is"], "é", "."],
)
def test_stop_string_is_cut_off(client, paris, stop):
    answer = generate(client, text=QUESTION, sampling_params=GREEDY | {"stop": stop})
    full = paris["text"]
    stops = [stop] if isinstance(stop, str) else stop
    found = sorted((full.find(one), one) for one in stops if one in full)
    if not found:
        assert answer["text"] == full
        return
    at, matched = found[0]
    print(f"{matched!r}: {answer['text']!r}")
    assert answer["text"] == full[:at]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}
    ids = answer["output_ids"]
    assert ids == paris["output_ids"][: len(ids)] and len(ids) < len(paris["output_ids"])
    kept = generate(
        client, text=QUESTION, sampling_params=GREEDY | {"stop": stop, "no_stop_trim": True}
    )
    assert kept["text"] == full[: at + len(matched)]
    assert kept["output_ids"] == ids


def test_stop_token_is_in_the_ids_and_not_in_the_text(client, paris, tokenizer):
    ids = paris["output_ids"]
    stop = ids[3]
    assert stop not in ids[:3]
    wanted = GREEDY | {"stop_token_ids": [stop, 700]}
    answer = generate(client, text=QUESTION, sampling_params=wanted)
    assert answer["output_ids"] == ids[:4]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["text"] == tokenizer.decode(ids[:3])
    kept = generate(client, text=QUESTION, sampling_params=wanted | {"no_stop_trim": True})
    assert kept["text"] == tokenizer.decode(ids[:4])


def test_ignore_eos_goes_on_and_ignores_stop_tokens_but_not_stop_strings(client, paris):
    count = len(paris["output_ids"])
    wanted = MORE | {"stop_token_ids": [paris["output_ids"][2]]}
    answer = generate(client, text=QUESTION, sampling_params=wanted)
    assert answer["output_ids"][:count] == paris["output_ids"]
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 24}
    stopped = generate(client, text=QUESTION, sampling_params=wanted | {"stop": "Paris"})
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": "Paris"}


def test_end_of_text_on_the_last_token_is_a_stop(client, paris):
    count = len(paris["output_ids"])
    for limit, kind in ((count, "stop"), (count - 1, "length")):
        answer = generate(client, text=QUESTION, sampling_params=GREEDY | {"max_new_tokens": limit})
        assert answer["meta_info"]["finish_reason"]["type"] == kind


def test_max_new_tokens(client, paris):
    def ask(limit):
        return generate(client, text=QUESTION, sampling_params=GREEDY | {"max_new_tokens": limit})

    none = ask(0)
    assert (none["text"], none["output_ids"]) == ("", [])
    assert none["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert none["meta_info"]["completion_tokens"] == 0
    assert ask(1)["output_ids"] == paris["output_ids"][:1]
    assert ask(None)["output_ids"] == paris["output_ids"], "null runs to the end of text"


def test_default_is_128_new_tokens(client):
    answer = generate(client, text=QUESTION, sampling_params={"ignore_eos": True})
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 128}


def test_sampling_seed_gives_the_same_tokens_alone_and_in_a_batch(client):
    def ask(seed, text=QUESTION):
        params = {"temperature": 2.0, "max_new_tokens": 16, "ignore_eos": True}
        return generate(client, text=text, sampling_params=params | {"sampling_seed": seed})

    alone = ask(7)
    batch = ask(7, [LONG, QUESTION, "Once upon a time"])
    assert batch[1]["output_ids"] == alone["output_ids"] == ask(7)["output_ids"]
    others = {tuple(ask(seed)["output_ids"]) for seed in (8, -8, 2**62, None)}
    assert len(others | {tuple(alone["output_ids"])}) == 5


def test_sampling_that_leaves_one_token_is_greedy(client):
    greedy = generate(client, text=QUESTION, sampling_params=MORE)["output_ids"]
    for params in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-9}):
        wanted = MORE | {"temperature": 1.5} | params
        assert generate(client, text=QUESTION, sampling_params=wanted)["output_ids"] == greedy
    hot = generate(client, text=QUESTION, sampling_params=MORE | {"temperature": 50.0})
    assert hot["output_ids"] != greedy


def test_prompt_token_ids_are_returned_on_request(client, tokenizer):
    answer = generate(
        client, text=[LONG], sampling_params={"max_new_tokens": 1}, return_prompt_token_ids=True
    )
    assert answer[0]["prompt_token_ids"] == tokenizer.encode(LONG).ids
    assert answer[0]["meta_info"]["prompt_tokens"] == 84


def test_special_tokens_are_shown_where_asked_for(client, paris, tokenizer):
    ids = paris["output_ids"]
    wanted = GREEDY | {"ignore_eos": True, "max_new_tokens": len(ids)}
    hidden = generate(client, text=QUESTION, sampling_params=wanted)
    shown = generate(client, text=QUESTION, sampling_params=wanted | {"skip_special_tokens": False})
    assert hidden["text"] == paris["text"]
    assert shown["text"] == paris["text"] + tokenizer.id_to_token(ids[-1])


BODY = b'{"text": "What is the capital of France?", "sampling_params": {"temperature": 0}}'


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize(
    "content_type", [None, "application/json", "text/plain", "application/x-www-form-urlencoded"]
)
def test_body_is_json_whatever_its_content_type(client, paris, method, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    response = client.request(method, "/generate", content=BODY, headers=headers)
    assert response.request.headers.get("content-type") == content_type
    assert response.status_code == 200
    assert response.json()["output_ids"] == paris["output_ids"]


def test_body_in_chunks_without_a_length(client, paris):
    parts = (BODY[i : i + 7] for i in range(0, len(BODY), 7))
    response = client.post("/generate", content=parts)
    assert response.request.headers["transfer-encoding"] == "chunked"
    assert response.json()["output_ids"] == paris["output_ids"]


def test_unknown_keys_of_the_body_are_ignored(client, paris):
    body = {"model": "x", "parallel_batch": True, "stream_output": True, "priority": 3}
    answer = generate(client, text=QUESTION, sampling_params=GREEDY, **body)
    assert answer["output_ids"] == paris["output_ids"]


def test_null_means_the_default(client, paris):
    params = dict.fromkeys(["top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", "min_p"])
    nulls = dict.fromkeys(["input_ids", "rid", "stream", "return_logprob", "image_data"])
    answer = generate(client, text=QUESTION, sampling_params=GREEDY | params, **nulls)
    assert answer["output_ids"] == paris["output_ids"]
    generate(client, text=QUESTION, sampling_params=None)


def test_neutral_values_of_what_is_not_served_are_accepted(client, paris):
    params = {"n": 1, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0}
    params |= {"presence_penalty": 0, "min_new_tokens": 0, "spaces_between_special_tokens": True}
    flags = {"return_logprob": False, "top_logprobs_num": 0, "return_hidden_states": False}
    answer = generate(client, text=QUESTION, sampling_params=GREEDY | params, **flags)
    assert answer["output_ids"] == paris["output_ids"]


def test_prompt_may_hold_any_unicode(client, tokenizer):
    text = "日本 🎉 \u0000 é\r\n\u2028 <|im_end|>"
    answer = generate(
        client, text=text, sampling_params={"max_new_tokens": 1}, return_prompt_token_ids=True
    )
    assert answer["prompt_token_ids"] == tokenizer.encode(text).ids
    assert tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False) == text
