"""What changes the server's state. Not from another site's page: a browser sends its request, with
all that the user may do, and only keeps the answer from it."""

import asyncio
import gc

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.body_fields import flag, text
from jaxserve.errors import RequestError
from jaxserve.server import bodies
from jaxserve.server.call import ask_engine

blueprint = Blueprint("control")
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
POLL_SECONDS = 0.05


@blueprint.on_request
async def refuse_other_sites(request: Request) -> None:
    """Whoever is no browser sends neither header, and no page can forge them."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        is_ours = site in ("same-origin", "none")
    else:
        host = request.headers.get("host", "")
        is_ours = origin is None or origin.partition("://")[2].lower() == host.lower()
    if not is_ours:
        raise RequestError(
            f"{request.path} is refused to pages of another origin ({origin or site})", status=403
        )


@blueprint.route("/flush_cache", methods=["GET", "POST"])
async def flush_cache(request: Request) -> HTTPResponse:
    """Empties the prefix cache of an idle server; `?timeout=SECONDS` waits for it to be idle."""
    seconds = _timeout(request)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while True:
        is_last_try = loop.time() >= deadline
        if await ask_engine(request, "flush_cache", is_last_try=is_last_try):
            break
        if is_last_try:
            waited = "Timed out waiting for idle state.\n" if seconds else "Flush cache failed.\n"
            return bodies.text(waited, status=400)
        await asyncio.sleep(POLL_SECONDS)
    return bodies.text(FLUSHED)


@blueprint.route("/freeze_gc", methods=["GET", "POST"])
async def freeze_gc(request: Request) -> HTTPResponse:
    """What is alive now is looked at by no garbage collection any more, in both processes: shorter
    pauses, once a server is warm."""
    await ask_engine(request, "freeze_gc")
    gc.collect()
    gc.freeze()
    return bodies.text("Garbage collection frozen.\n")


@blueprint.post("/abort_request")
async def abort_request(request: Request) -> HTTPResponse:
    """Ends the request `rid` or the batch of that id, or with `abort_all` every request; each is
    answered with what it has. An unknown id may have just finished, and is no error."""
    body, frontend = bodies.read_optional(request), request.app.ctx.frontend
    rid = text(body, "rid")
    if flag(body, "abort_all"):
        frontend.abort_all()
    elif rid:
        frontend.abort_call(rid)
    return bodies.empty()


def _timeout(request: Request) -> float:
    given = request.args.get("timeout", "0")
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise RequestError(f"timeout must be a number of seconds, got {given!r}", param="timeout")
    return seconds
