"""/freeze_gc"""

import pytest

from tests.server.serving import GREEDY, generate


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_garbage_collection_is_frozen_and_all_goes_on(client, method):
    response = client.request(method, "/freeze_gc")
    assert (response.status_code, response.text) == (200, "Garbage collection frozen.\n")
    assert (
        "Paris"
        in generate(client, text="What is the capital of France?", sampling_params=GREEDY)["text"]
    )
