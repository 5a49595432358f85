"""OpenAI's conventions: /v1/..."""

import time
from typing import Any

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.frontend import Frontend
from jaxserve.server import bodies

blueprint = Blueprint("openai", url_prefix="/v1")


@blueprint.get("/models")
async def list_models(request: Request) -> HTTPResponse:
    return bodies.json({"object": "list", "data": [_model(request.app.ctx.frontend)]})


@blueprint.get("/models/<name:path>", unquote=True)
async def get_model(request: Request, name: str) -> HTTPResponse:
    model = _model(request.app.ctx.frontend)
    if name == model["id"]:
        return bodies.json(model)
    content = bodies.error_content(f"The model '{name}' does not exist", 404, "model")
    content["error"]["code"] = "model_not_found"
    return bodies.json(content, 404)


def _model(frontend: Frontend) -> dict[str, Any]:
    name = frontend.state.model_name
    return {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "sglang",
        "root": name,
        "parent": None,
        "max_model_len": frontend.info.context_length,
    }
