"""/v1/rerank and /v1/classify: which documents answer a query, and how likely each label is."""

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.body_fields import as_object, flag, integer
from jaxserve.errors import RequestError
from jaxserve.messages import EngineInfo
from jaxserve.server import bodies
from jaxserve.server.call import model_and_usage
from jaxserve.server.pooling import NAMES, encode_all, native_body
from jaxserve.server.scoring import softmax

blueprint = Blueprint("rerank")
PATHS = ("/v1/rerank", "/v1/classify")
PASSED_ON = ("rid", "priority")  # to /encode, as they are


@blueprint.route("/v1/rerank", methods=["POST", "PUT"])
async def rerank(request: Request) -> HTTPResponse:
    """The documents, the best first, by the raw score of each with the query."""
    body, info = as_object(bodies.read_json(request)), request.app.ctx.frontend.info
    _check_cross_encoder(info)
    query, documents = _query_and_documents(body)
    with_documents = flag(body, "return_documents", default=True)
    most = integer(body, "top_n", len(documents))
    if most < 1:
        raise RequestError(f"top_n must be a positive integer, got {most}", param="top_n")
    native = {"text": [[query, one] for one in documents]}
    native |= {key: body[key] for key in PASSED_ON if key in body}
    answers = await encode_all(request, native, {"text": "documents"})
    ranked = [
        {
            "score": answer["embedding"][0],
            "document": document if with_documents else None,
            "index": i,
            "meta_info": answer["meta_info"],
        }
        for i, (document, answer) in enumerate(zip(documents, answers, strict=True))
    ]
    ranked.sort(key=lambda one: -one["score"])
    return bodies.json(ranked[:most])


@blueprint.post("/v1/classify")
async def classify(request: Request) -> HTTPResponse:
    """The probability of each label, and the name of the likeliest."""
    body, frontend = as_object(bodies.read_json(request)), request.app.ctx.frontend
    labels = frontend.info.embedding.labels if frontend.info.embedding else []
    if not labels:
        raise RequestError(
            f"{frontend.info.architecture} has no labels: /v1/classify wants a model with a "
            "classification head"
        )
    answers = await encode_all(request, native_body(body), NAMES)
    return bodies.json(
        {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "data": [_classified(i, one["embedding"], labels) for i, one in enumerate(answers)],
            **model_and_usage(body, request, answers),
        }
    )


def _check_cross_encoder(info: EngineInfo) -> None:
    if not info.is_cross_encoder:
        raise RequestError(
            f"{info.architecture} is no cross-encoder: /v1/rerank wants a model like "
            "BertForSequenceClassification or XLMRobertaForSequenceClassification"
        )
    if info.embedding.size > 1:
        raise RequestError(
            f"this model has {info.embedding.size} labels, and /v1/rerank wants one score: "
            "POST /v1/score or /v1/classify"
        )


def _query_and_documents(body: Mapping[str, Any]) -> tuple[str, list[str]]:
    if not isinstance(query := body.get("query"), str):
        raise RequestError("query must be a string", param="query")
    documents = body.get("documents")
    is_list = isinstance(documents, list) and bool(documents)
    if not is_list or not all(isinstance(one, str) for one in documents):
        raise RequestError("documents must be a list of strings", param="documents")
    if body.get("instruct") is not None:
        raise RequestError("instruct: a cross-encoder takes no instruction", param="instruct")
    return query, documents


def _classified(index: int, scores: Sequence[float], labels: Sequence[str]) -> dict[str, Any]:
    """One label is there or not; of several, one is."""
    shares = softmax(scores) if len(scores) > 1 else [(1 + math.tanh(scores[0] / 2)) / 2]
    best = max(range(len(shares)), key=shares.__getitem__)
    return {"index": index, "label": labels[best], "probs": shares, "num_classes": len(shares)}
