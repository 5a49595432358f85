"""/generate"""

import asyncio
import logging
from typing import Any

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.answers import Answers
from jaxserve.errors import EngineDied, RequestError
from jaxserve.frontend import Frontend
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
        finished = [_checked(answer, frontend) async for answer in answers.follow(changed)]
        return bodies.json(answers.in_order(finished))
    finally:
        frontend.abandon(answers)
        if frontend.config.log_requests:
            for generation in answers.generations:
                logger.info("Finish: rid=%s, %s", generation.request.rid, generation.summary)


def _checked(answer: dict[str, Any], frontend: Frontend) -> dict[str, Any]:
    """Raises RequestError for an abort that carries a status: it is one of the whole call."""
    reason = answer["meta_info"]["finish_reason"]
    status = reason and reason["type"] == "abort" and reason["status_code"]
    if not status:
        return answer
    headers = {"Retry-After": str(frontend.retry_after)} if status == 503 else {}
    raise RequestError(reason["message"], status=status, headers=headers)


async def _stream(request: Request, answers: Answers, changed: asyncio.Event) -> None:
    coming = answers.follow(changed)
    # Until something has come, the call may still be refused with a status of its own.
    first = _checked(await anext(coming), request.app.ctx.frontend)
    response = await request.respond(content_type=sse.CONTENT_TYPE, headers=sse.HEADERS)
    await response.send(sse.event(first))
    try:
        async for answer in coming:
            await response.send(sse.event(answer))
    except Exception as error:  # the status is sent: only an event can still tell
        is_known = isinstance(error, EngineDied)
        if not is_known:
            logger.error("a stream failed", exc_info=error)
        words = str(error) if is_known else "Internal Server Error"
        await response.send(sse.event(bodies.error_content(words, 500)))
    await response.send(sse.DONE)
    await response.eof()
