"""Other weights while the server runs, and what trainers call around it."""

import asyncio
from typing import Any, get_args

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve import weight_request
from jaxserve.errors import RequestError
from jaxserve.server import bodies
from jaxserve.weight_request import PauseMode, WeightUpdate

blueprint = Blueprint("weights")
PATHS = {
    "/update_weights",
    "/update_weights_from_disk",
}


@blueprint.post("/update_weights_from_disk")
@blueprint.post("/update_weights", name="update_weights")
async def update_weights_from_disk(request: Request) -> HTTPResponse:
    return await _update(request, weight_request.parse_disk_update(bodies.read_json(request)))


@blueprint.post("/pause_generation")
async def pause_generation(request: Request) -> HTTPResponse:
    """`mode`: "abort" ends what runs, "retract" computes it anew later, "in_place" keeps it as it
    is. New requests wait."""
    mode = bodies.read_optional(request).get("mode") or "abort"
    if mode not in get_args(PauseMode):
        names = ", ".join(get_args(PauseMode))
        raise RequestError(f"mode must be one of {names}, got {mode!r}", param="mode")
    await _call(request, "pause_generation", mode=mode)
    return bodies.json({"message": "Generation paused successfully.", "status": "ok"})


@blueprint.post("/continue_generation")
async def continue_generation(request: Request) -> HTTPResponse:
    bodies.read_optional(request)
    await _call(request, "continue_generation")
    return bodies.json({"message": "Generation continued successfully.", "status": "ok"})


async def _update(request: Request, update: WeightUpdate) -> HTTPResponse:
    """Answers when the new weights serve, or when it is clear that they never will."""
    try:
        answer = await _call(request, "update_weights", **update.to_arguments())
    except RequestError as error:
        answer = {"success": False, "message": str(error), "num_paused_requests": 0}
        return bodies.json(answer, error.status)
    return bodies.json(answer)


async def _call(request: Request, operation: str, **arguments: Any) -> Any:
    return await asyncio.wrap_future(request.app.ctx.frontend.call(operation, **arguments))
