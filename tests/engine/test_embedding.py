"""A vector as its caller gets it."""

import numpy as np
import pytest

from jaxserve.embedding import Embedding
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving_state import ServingState

VECTOR = np.array([3.0, 4.0, 12.0], np.float32)


@pytest.mark.parametrize(
    "dimensions, is_normalized, expected",
    [
        (None, True, [3.0, 4.0, 12.0]),
        (2, True, [0.6, 0.8]),
        (2, False, [3.0, 4.0]),
        (3, False, [3.0, 4.0, 12.0]),
    ],
)
def test_what_is_cut_is_normalized_again_if_the_model_normalizes(
    dimensions, is_normalized, expected
):
    request = Request("rid", [5], SamplingParams(), 0, 0, is_pooled=True)
    embedding = Embedding(request, dimensions, lambda: None, is_normalized=is_normalized)
    update = RequestUpdate("rid", [], FinishReason("length", length=0), embedding=VECTOR.tobytes())
    embedding.deliver(update, ServingState("", "", weight_version=""))
    found = embedding.snapshot(embedding.progress)["embedding"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
