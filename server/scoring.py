"""/v1/score: how likely each label follows a query and an item, or what a classifier says."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.body_fields import as_object, flag
from jaxserve.errors import RequestError
from jaxserve.frontend import Frontend
from jaxserve.server import bodies
from jaxserve.server.call import complete, model_and_usage, submitted, told_as

blueprint = Blueprint("scoring")
PATHS = ("/v1/score",)
# Of the fields, by those of the native body.
NAMES = {"text": "items", "input_ids": "items", "token_ids_logprob": "label_token_ids"}
# The model's own probabilities, whatever `--preferred-sampling-params` says.
SAMPLING = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "temperature": 1.0,
    "n": 1,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
}


@blueprint.post("/v1/score")
async def score(request: Request) -> HTTPResponse:
    body, frontend = as_object(bodies.read_json(request)), request.app.ctx.frontend
    is_softmax = flag(body, "apply_softmax")
    native = _native_body(body, frontend)
    with told_as(NAMES):
        async with submitted(request, native, frontend.prepare_own) as (answers, changed):
            finished = [complete(answer, frontend) async for answer in answers.follow(changed)]
    in_order = answers.in_order(finished)
    scores = [_scores(answer, is_softmax) for answer in in_order]
    ending = model_and_usage(body, request, in_order)
    return bodies.json({"scores": scores} | ending | {"object": "scoring"})


def _native_body(body: Mapping[str, Any], frontend: Frontend) -> dict[str, Any]:
    """The body that /generate would have, or /encode."""
    query, items = body.get("query"), body.get("items")
    items = [items] if isinstance(items, str) else items
    kind = str if isinstance(query, str) else list
    if query is None or not isinstance(query, kind):
        raise RequestError("query must be a text or a list of token ids", param="query")
    if not isinstance(items, list) or not all(isinstance(one, kind) for one in items or [None]):
        raise RequestError(
            "items must be a text or a list of texts, or of lists of token ids where the query is "
            "one",
            param="items",
        )
    if frontend.info.is_cross_encoder and kind is str:
        is_turned = flag(body, "item_first")
        return {"text": [[one, query] if is_turned else [query, one] for one in items]}
    prompts = [one + query if flag(body, "item_first") else query + one for one in items]
    native = {"text" if kind is str else "input_ids": prompts}
    if frontend.info.embedding is not None:
        if not frontend.info.embedding.labels:
            raise RequestError(
                f"{frontend.info.architecture} gives an embedding here and no scores: /v1/score "
                "wants a model with a head for them, or one that predicts tokens"
            )
        return native
    labels = body.get("label_token_ids")
    if not isinstance(labels, list) or not labels:
        raise RequestError(
            "label_token_ids must be a list of token ids: this model predicts tokens",
            param="label_token_ids",
        )
    probes = [labels] * len(prompts)
    logprobs = {"return_logprob": True, "token_ids_logprob": probes}
    return native | logprobs | {"sampling_params": SAMPLING}


def _scores(answer: Mapping[str, Any], is_softmax: bool) -> list[float]:
    """Of a model that predicts tokens: probabilities, among all tokens or among the labels."""
    if "embedding" in answer:
        return softmax(answer["embedding"]) if is_softmax else answer["embedding"]
    (first,) = answer["meta_info"]["output_token_ids_logprobs"]
    logprobs = [logprob for logprob, *_ in first]
    return softmax(logprobs) if is_softmax else [math.exp(one) for one in logprobs]


def softmax(values: Sequence[float]) -> list[float]:
    most = max(values)
    exponentials = [math.exp(value - most) for value in values]
    total = sum(exponentials)
    return [one / total for one in exponentials]
