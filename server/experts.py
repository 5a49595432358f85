"""How often each expert is taken: recorded between start and stop, written to a file by dump. As
what `control` has, not from another site's page."""

import asyncio

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.server import bodies
from jaxserve.server.control import refuse_other_sites

blueprint = Blueprint("experts")
blueprint.on_request(refuse_other_sites)
METHODS = ["GET", "POST"]


@blueprint.route("/start_expert_distribution_record", methods=METHODS)
async def start(request: Request) -> HTTPResponse:
    await _call(request, "start")
    return bodies.text("Start recording the expert distribution.\n")


@blueprint.route("/stop_expert_distribution_record", methods=METHODS)
async def stop(request: Request) -> HTTPResponse:
    await _call(request, "stop")
    return bodies.text("Stop recording the expert distribution.\n")


@blueprint.route("/dump_expert_distribution_record", methods=METHODS)
async def dump(request: Request) -> HTTPResponse:
    """Also ends the recording, unless a mode was chosen by flag: then it goes on."""
    path = await _call(request, "dump")
    answer = "Dump expert distribution record.\n"
    if path.endswith(".safetensors"):
        answer += f"Written as safetensors, not as a torch pickle: {path}\n"
    return bodies.text(answer)


async def _call(request: Request, what: str) -> str:
    call = request.app.ctx.frontend.call(f"{what}_expert_record")
    return await asyncio.wrap_future(call)
