"""/encode, /classify and OpenAI's /v1/embeddings: texts in, vectors out."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.answers import Answers
from jaxserve.body_fields import as_object, text
from jaxserve.errors import RequestError
from jaxserve.server import bodies
from jaxserve.server.call import complete, model_and_usage, submitted, told_as

blueprint = Blueprint("pooling")
PATHS = ("/encode", "/classify", "/v1/embeddings")
ENCODING_FORMATS = ("float", "base64")
NAMES = {"text": "input", "input_ids": "input"}  # OpenAI's, by ours


@blueprint.route("/encode", methods=["POST", "PUT"])
@blueprint.route("/classify", methods=["POST", "PUT"], name="classify")
async def encode(request: Request) -> HTTPResponse:
    """The model decides what the numbers are: an embedding, or scores."""
    answers, finished = await _encode(request, bodies.read_json(request))
    return bodies.json(answers.in_order(finished))


@blueprint.post("/v1/embeddings")
async def embeddings(request: Request) -> HTTPResponse:
    body = as_object(bodies.read_json(request))
    encoding = text(body, "encoding_format") or "float"
    if encoding not in ENCODING_FORMATS:
        raise RequestError(
            f"encoding_format must be one of {', '.join(ENCODING_FORMATS)}, got {encoding!r}",
            param="encoding_format",
        )
    in_order = await encode_all(request, native_body(body), NAMES)
    data = [_openai(answer, i, encoding) for i, answer in enumerate(in_order)]
    return bodies.json({"object": "list", "data": data} | model_and_usage(body, request, in_order))


async def encode_all(request: Request, body: Any, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The answers to a body of /encode, in order, a list even of one.

    Args:
      names: as `told_as` has them.
    """
    with told_as(names):
        answers, finished = await _encode(request, body)
    in_order = answers.in_order(finished)
    return in_order if isinstance(in_order, list) else [in_order]


async def _encode(request: Request, body: Any) -> tuple[Answers, list[dict[str, Any]]]:
    """What `Answers.in_order` wants."""
    frontend = request.app.ctx.frontend
    async with submitted(request, body, frontend.prepare_encode) as (answers, changed):
        finished = [complete(answer, frontend) async for answer in answers.follow(changed)]
        return answers, finished


def native_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body that /encode would have."""
    given = body.get("input")
    first = given[0] if isinstance(given, list) and given else given
    if given is None or given == [] or not isinstance(first, str | int | list):
        raise RequestError("input must be a string, token ids, or a list of either", param="input")
    is_pair = isinstance(first, list) and bool(first) and isinstance(first[0], str)
    name = "text" if is_pair or isinstance(first, str) else "input_ids"
    others = {
        key: value for key, value in body.items() if key not in ("input", "text", "input_ids")
    }
    return {name: given} | others


def _openai(answer: dict[str, Any], index: int, encoding: str) -> dict[str, Any]:
    vector = answer["embedding"]
    if encoding == "base64":
        vector = base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
    return {"object": "embedding", "embedding": vector, "index": index}
