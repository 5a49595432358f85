"""Other weights while the server runs, and what trainers call around it. As what `control` has,
not from another site's page."""

import asyncio
from typing import Any, get_args

from sanic import Blueprint, Request
from sanic.response import HTTPResponse, raw

from jaxserve import body_fields, weight_request
from jaxserve.errors import RequestError
from jaxserve.server import bodies
from jaxserve.server.call import ask_engine
from jaxserve.server.control import refuse_other_sites
from jaxserve.weight_request import Memory, PauseMode, WeightUpdate

blueprint = Blueprint("weights")
blueprint.on_request(refuse_other_sites)
MOST_DIGITS = 19  # of a number in a query: it has 64 bits
PATHS = {"/update_weights", "/update_weights_from_disk", "/update_weights_from_tensor"}


@blueprint.post("/update_weights_from_disk")
@blueprint.post("/update_weights", name="update_weights")
async def update_weights_from_disk(request: Request) -> HTTPResponse:
    return await _update(request, weight_request.parse_disk_update(bodies.read_json(request)))


@blueprint.post("/update_weights_from_tensor")
async def update_weights_from_tensor(request: Request) -> HTTPResponse:
    """Some tensors; the others stay."""
    body = bodies.read_json(request)
    return await _update(request, await asyncio.to_thread(weight_request.parse_tensor_update, body))


@blueprint.post("/begin_weight_update")
@blueprint.post("/end_weight_update", name="end_weight_update")
async def begin_or_end_weight_update(request: Request) -> HTTPResponse:
    """Taken, and not needed: every update is whole by itself."""
    bodies.read_optional(request)
    return bodies.json({"success": True, "message": "Success"})


@blueprint.post("/init_weights_update_group")
@blueprint.post("/destroy_weights_update_group", name="destroy_weights_update_group")
@blueprint.post("/update_weights_from_distributed", name="update_weights_from_distributed")
async def process_groups(request: Request) -> HTTPResponse:
    message = (
        "torch's process groups (NCCL) are not spoken here; send weights by "
        "/update_weights_from_disk, or by /update_weights_from_tensor with load_format safetensors"
    )
    return bodies.json({"success": False, "message": message}, 501)


@blueprint.post("/update_weight_version")
async def update_weight_version(request: Request) -> HTTPResponse:
    """Another label for the weights as they are."""
    body = bodies.read_optional(request)
    label = weight_request.version(body, "new_version")
    if label is None:
        raise RequestError("new_version is required", param="new_version")
    aborts = body_fields.flag(body, "abort_all_requests", True)
    answer = await ask_engine(
        request, "update_weight_version", new_version=label, abort_all_requests=aborts
    )
    return bodies.json(answer)


@blueprint.route("/get_weights_by_name", methods=["GET", "POST"])
async def get_weights_by_name(request: Request) -> HTTPResponse:
    """The first `truncate_size` rows of a parameter, by its name in the checkpoint. The engine
    has written them as JSON already."""
    body = _query(request) | bodies.read_optional(request)
    name, rows = body.get("name"), body_fields.integer(body, "truncate_size", 100)
    if not isinstance(name, str):
        raise RequestError("name must be a string", param="name")
    if rows < 1:
        raise RequestError("truncate_size must be at least 1", param="truncate_size")
    content = await ask_engine(request, "read_tensor", name=name, most_rows=rows)
    return raw(content, content_type="application/json")


@blueprint.route("/weights_checker", methods=["GET", "POST"])
async def weights_checker(request: Request) -> HTTPResponse:
    action = (_query(request) | bodies.read_optional(request)).get("action") or "checksum"
    if action != "checksum":
        message = f"action {action!r} is not supported, only checksum"
        return bodies.json({"success": False, "message": message}, 400)
    checksum = await ask_engine(request, "checksum")
    ranks = [{"rank": 0, "checksum": checksum}]
    answer = {"success": True, "message": "Success", "ranks": ranks}
    return bodies.json(answer | {"per_engine_checksum": checksum})


@blueprint.route("/release_memory_occupation", methods=["GET", "POST"])
async def release_memory_occupation(request: Request) -> HTTPResponse:
    """Of `tags`, or of all; what runs is computed anew afterwards, new requests are refused."""
    await ask_engine(request, "release_memory", tags=_tags(request))
    return bodies.json(None)


@blueprint.route("/resume_memory_occupation", methods=["GET", "POST"])
async def resume_memory_occupation(request: Request) -> HTTPResponse:
    """Weights that were released must then be sent again: nothing is generated before."""
    await ask_engine(request, "resume_memory", tags=_tags(request))
    return bodies.json(None)


@blueprint.post("/pause_generation")
async def pause_generation(request: Request) -> HTTPResponse:
    """`mode`: "abort" ends what runs, "retract" computes it anew later, "in_place" keeps it as it
    is. New requests wait."""
    mode = bodies.read_optional(request).get("mode") or "abort"
    if mode not in get_args(PauseMode):
        names = ", ".join(get_args(PauseMode))
        raise RequestError(f"mode must be one of {names}, got {mode!r}", param="mode")
    await ask_engine(request, "pause_generation", mode=mode)
    return bodies.json({"message": "Generation paused successfully.", "status": "ok"})


@blueprint.post("/continue_generation")
async def continue_generation(request: Request) -> HTTPResponse:
    bodies.read_optional(request)
    await ask_engine(request, "continue_generation")
    return bodies.json({"message": "Generation continued successfully.", "status": "ok"})


def _tags(request: Request) -> list[str]:
    """In the query each may be given by itself, or several with commas between them."""
    tags = bodies.read_optional(request).get("tags")
    if tags is None and "tags" in request.args:
        tags = [tag for given in request.args.getlist("tags") for tag in given.split(",")]
    if tags is None:
        return list(get_args(Memory))
    names = {*get_args(Memory), "cuda_graph"}  # graphs keep no memory of their own here
    if not isinstance(tags, list) or not names.issuperset(map(str, tags)):
        raise RequestError(f"tags must be of {', '.join(sorted(names))}, got {tags}", param="tags")
    return [tag for tag in tags if tag in get_args(Memory)]


def _query(request: Request) -> dict[str, Any]:
    """The query's parameters; numbers as such, as far as any is meant."""
    given = {name: values[0] for name, values in request.args.items()}
    return {name: int(text) if _is_number(text) else text for name, text in given.items()}


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= MOST_DIGITS


async def _update(request: Request, update: WeightUpdate) -> HTTPResponse:
    """Answers when the new weights serve, or when it is clear that they never will."""
    try:
        answer = await ask_engine(request, "update_weights", **update.to_arguments())
    except RequestError as error:
        answer = {"success": False, "message": str(error), "num_paused_requests": 0}
        return bodies.json(answer, error.status)
    return bodies.json(answer)
