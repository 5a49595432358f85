"""/encode, /classify and OpenAI's /v1/embeddings: texts in, vectors out."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.answers import Answers
from jaxserve.body_fields import as_object
from jaxserve.errors import RequestError
from jaxserve.frontend import Frontend
from jaxserve.server import bodies
from jaxserve.server.call import checked, retry_headers, submitted

blueprint = Blueprint("pooling")
PATHS = ("/encode", "/classify", "/v1/embeddings")
ENCODING_FORMATS = ("float", "base64")


@blueprint.route("/encode", methods=["POST", "PUT"])
@blueprint.route("/classify", methods=["POST", "PUT"], name="classify")
async def encode(request: Request) -> HTTPResponse:
    """The model decides what the numbers are: an embedding, or scores."""
    answers, finished = await _encode(request, bodies.read_json(request))
    return bodies.json(answers.in_order(finished))


@blueprint.post("/v1/embeddings")
async def embeddings(request: Request) -> HTTPResponse:
    body = as_object(bodies.read_json(request))
    encoding = body.get("encoding_format") or "float"
    if encoding not in ENCODING_FORMATS:
        raise RequestError(
            f"encoding_format must be one of {', '.join(ENCODING_FORMATS)}, got {encoding!r}",
            param="encoding_format",
        )
    in_order = await encode_all(request, native_body(body))
    num_tokens = sum(answer["meta_info"]["prompt_tokens"] for answer in in_order)
    return bodies.json(
        {
            "object": "list",
            "data": [_openai(answer, i, encoding) for i, answer in enumerate(in_order)],
            "model": body.get("model") or request.app.ctx.frontend.state.model_name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


async def encode_all(request: Request, body: Any) -> list[dict[str, Any]]:
    """The answers to a body of /encode, in order, a list even of one."""
    answers, finished = await _encode(request, body)
    in_order = answers.in_order(finished)
    return in_order if isinstance(in_order, list) else [in_order]


async def _encode(request: Request, body: Any) -> tuple[Answers, list[dict[str, Any]]]:
    """What `Answers.in_order` wants."""
    frontend = request.app.ctx.frontend
    # As in generate.py: a large body leaves the transport paused.
    request.transport.resume_reading()
    async with submitted(request, body, frontend.prepare_encode) as (answers, changed):
        finished = [complete(answer, frontend) async for answer in answers.follow(changed)]
        return answers, finished


def complete(answer: dict[str, Any], frontend: Frontend) -> dict[str, Any]:
    """Raises RequestError for any abort: half a vector is none."""
    reason = checked(answer, frontend)["meta_info"]["finish_reason"]
    if reason["type"] != "abort":
        return answer
    raise RequestError(reason["message"], status=503, headers=retry_headers(503, frontend))


def native_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body that /encode would have."""
    given = body.get("input")
    first = given[0] if isinstance(given, list) and given else given
    if given is None or given == [] or not isinstance(first, str | int | list):
        raise RequestError("input must be a string, token ids, or a list of either", param="input")
    is_pair = isinstance(first, list) and bool(first) and isinstance(first[0], str)
    name = "text" if is_pair or isinstance(first, str) else "input_ids"
    kept = ("dimensions", "rid", "priority", "extra_key", "cache_salt")
    return {name: given} | {key: body[key] for key in kept if key in body}


def _openai(answer: dict[str, Any], index: int, encoding: str) -> dict[str, Any]:
    vector = answer["embedding"]
    if encoding == "base64":
        vector = base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
    return {"object": "embedding", "embedding": vector, "index": index}
