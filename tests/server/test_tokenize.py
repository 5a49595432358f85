"""/tokenize and /detokenize, of the bundled model's tokenizer."""

import pytest

from jaxserve.tokenizer import Tokenizer
from tests.server.serving import DEMO_MODEL, GREEDY, generate

TEXTS = ["What is the capital of France?", "", "naïve 漢字 🙂", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO_MODEL)


def post(client, path: str, **body) -> dict:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_ids_are_the_tokenizers_and_their_text_comes_back(client, tokenizer, prefix):
    expected = [tokenizer.encode(text) for text in TEXTS]
    answer = post(client, f"{prefix}/tokenize", prompt=TEXTS, model="whatever")
    print(answer)
    counts = [len(ids) for ids in expected]
    assert answer == {"tokens": expected, "count": counts, "max_model_len": 4096}
    back = post(client, f"{prefix}/detokenize", tokens=expected, skip_special_tokens=False)
    assert back == {"text": TEXTS}
    one = post(client, f"{prefix}/tokenize", prompt=TEXTS[0])
    assert one == {"tokens": expected[0], "count": counts[0], "max_model_len": 4096}
    assert post(client, f"{prefix}/detokenize", tokens=expected[0]) == {"text": TEXTS[0]}


def test_generate_counts_the_same_tokens(client):
    answer = generate(client, text=TEXTS[0], sampling_params=GREEDY | {"max_new_tokens": 1})
    counted = post(client, "/tokenize", prompt=TEXTS[0])["count"]
    assert answer["meta_info"]["prompt_tokens"] == counted == 7


def test_special_tokens_are_skipped_unless_they_are_wanted(client):
    ids = post(client, "/tokenize", prompt="a<|im_end|>")["tokens"]
    assert post(client, "/detokenize", tokens=ids) == {"text": "a"}
    assert post(client, "/detokenize", tokens=[]) == {"text": ""}


def test_large_texts_leave_others_their_turn(client, tokenizer):
    text = "the capital of France. " * 4000
    answer = post(client, "/tokenize", prompt=text)
    assert answer["tokens"] == tokenizer.encode(text) and answer["count"] > 4096


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": []}, "prompt"),
        ("/tokenize", {"prompt": ["a", 5]}, "prompt"),
        ("/tokenize", {"prompt": "a" * (1 << 20) + "a"}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**32]}, "tokens"),
        ("/detokenize", {"tokens": [[5], 5]}, "tokens"),
        ("/detokenize", {"tokens": [5], "skip_special_tokens": "no"}, "skip_special_tokens"),
    ],
)
def test_bad_bodies_are_refused_in_words(client, path, body, param):
    response = client.post(path, json=body)
    print(response.text[:200])
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and param in error["message"]
