"""How often each expert is taken: recorded between start and stop, written to a file by dump. As
what `control` has, not from another site's page."""

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.server import bodies
from jaxserve.server.call import ask_engine
from jaxserve.server.control import refuse_other_sites

blueprint = Blueprint("experts")
blueprint.on_request(refuse_other_sites)
METHODS = ["GET", "POST"]


@blueprint.route("/start_expert_distribution_record", methods=METHODS)
async def start(request: Request) -> HTTPResponse:
    await ask_engine(request, "start_expert_record")
    return bodies.text("Start recording the expert distribution.\n")


@blueprint.route("/stop_expert_distribution_record", methods=METHODS)
async def stop(request: Request) -> HTTPResponse:
    await ask_engine(request, "stop_expert_record")
    return bodies.text("Stop recording the expert distribution.\n")


@blueprint.route("/dump_expert_distribution_record", methods=METHODS)
async def dump(request: Request) -> HTTPResponse:
    """Also ends the recording, unless a mode was chosen by flag: then it goes on."""
    path = await ask_engine(request, "dump_expert_record")
    answer = "Dump expert distribution record.\n"
    if path.endswith(".safetensors"):
        answer += f"Written as safetensors, not as a torch pickle: {path}\n"
    return bodies.text(answer)
