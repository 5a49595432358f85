"""/generate"""

import asyncio
import logging

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.answers import Answers
from jaxserve.errors import EngineDied
from jaxserve.server import bodies, sse
from jaxserve.server.call import checked, submitted

logger = logging.getLogger(__name__)
blueprint = Blueprint("generate")


@blueprint.route("/generate", methods=["POST", "PUT"])
async def generate(request: Request) -> HTTPResponse | None:
    frontend = request.app.ctx.frontend
    body = bodies.read_json(request)
    async with submitted(request, body, frontend.prepare) as (answers, changed):
        if answers.is_stream:
            return await _stream(request, answers, changed)
        finished = [checked(answer, frontend) async for answer in answers.follow(changed)]
        return bodies.json(answers.in_order(finished))


async def _stream(request: Request, answers: Answers, changed: asyncio.Event) -> None:
    coming = answers.follow(changed)
    # Until something has come, the call may still be refused with a status of its own.
    first = checked(await anext(coming), request.app.ctx.frontend)
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
