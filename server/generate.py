"""/generate"""

import asyncio
import logging
from typing import Any

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.answers import Answers
from jaxserve.errors import EngineDied
from jaxserve.server import bodies, sse

logger = logging.getLogger(__name__)
blueprint = Blueprint("generate")
SMALL_BODY = 16 << 10  # bytes; tokenizing more than this would hold up the event loop


@blueprint.route("/generate", methods=["POST", "PUT"])
async def generate(request: Request) -> HTTPResponse | None:
    frontend = request.app.ctx.frontend
    # A large body leaves the transport paused, and then a client's leaving is never noticed.
    request.transport.resume_reading()
    body = bodies.read_json(request)
    if len(request.body) <= SMALL_BODY:
        parsed, requests = frontend.prepare(body)
    else:
        parsed, requests = await asyncio.to_thread(frontend.prepare, body)
    if frontend.config.log_requests:
        for one in requests:
            logger.info("Receive: rid=%s, %s", one.rid, one.sampling)
    changed = asyncio.Event()
    answers = frontend.submit(parsed, requests, changed.set)
    try:  # a client that leaves cancels this handler
        if parsed.stream:
            return await _stream(request, answers, changed)
        return _respond(answers, [answer async for answer in answers.follow(changed)])
    finally:
        frontend.abandon(answers)
        if frontend.config.log_requests:
            for generation in answers.generations:
                logger.info("Finish: rid=%s, %s", generation.request.rid, generation.summary)


def _respond(answers: Answers, finished: list[dict[str, Any]]) -> HTTPResponse:
    """An abort that carries a status is an error of the whole call."""
    for answer in finished:
        reason = answer["meta_info"]["finish_reason"]
        if reason["type"] == "abort" and reason["status_code"] is not None:
            return bodies.error(reason["message"], reason["status_code"])
    return bodies.json(answers.in_order(finished))


async def _stream(request: Request, answers: Answers, changed: asyncio.Event) -> None:
    response = await request.respond(content_type=sse.CONTENT_TYPE, headers=sse.HEADERS)
    try:
        async for answer in answers.follow(changed):
            await response.send(sse.event(answer))
    except EngineDied as error:  # the status is sent: only an event can still tell
        await response.send(sse.event(bodies.error_content(str(error), 500)))
    await response.send(sse.DONE)
    await response.eof()
