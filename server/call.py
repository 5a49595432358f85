"""One call that the engine works on: from its body to its answers, whoever leaves when."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from sanic import Request

from jaxserve.answers import Answers
from jaxserve.body_fields import text
from jaxserve.errors import RequestError
from jaxserve.frontend import Frontend

logger = logging.getLogger(__name__)
SMALL_BODY = 16 << 10  # bytes; tokenizing more than this would hold up the event loop
Prepare = Callable[[Any], tuple[Any, list[Any]]]  # as `Frontend.prepare`


@contextlib.asynccontextmanager
async def submitted(
    request: Request, body: Any, prepare: Prepare
) -> AsyncIterator[tuple[Answers, asyncio.Event]]:
    """The answers to a body, and what every update of them sets. Leaving ends what still runs.

    Raises as `prepare` and `Frontend.submit`.
    """
    frontend = request.app.ctx.frontend
    # A large body leaves the transport paused, and then a client's leaving is never noticed.
    request.transport.resume_reading()
    if len(request.body) <= SMALL_BODY:
        parsed, requests = prepare(body)
    else:
        parsed, requests = await asyncio.to_thread(prepare, body)
    if frontend.config.log_requests:
        for one in requests:
            logger.info("Receive: rid=%s, %s", one.rid, one.sampling)
    changed = asyncio.Event()
    answers = frontend.submit(parsed, requests, changed.set)
    try:  # a client that leaves cancels the handler
        yield answers, changed
    finally:
        frontend.abandon(answers)
        if frontend.config.log_requests:
            for generation in answers.generations:
                logger.info("Finish: rid=%s, %s", generation.request.rid, generation.summary)


async def ask_engine(request: Request, operation: str, **arguments: Any) -> Any:
    """The value of a control operation. Raises as `Frontend.call` has it."""
    future = request.app.ctx.frontend.call(operation, **arguments)
    return await asyncio.wrap_future(future)


def checked(answer: dict[str, Any], frontend: Frontend) -> dict[str, Any]:
    """Raises RequestError for an abort that carries a status: it is one of the whole call."""
    reason = answer["meta_info"]["finish_reason"]
    status = reason and reason["type"] == "abort" and reason["status_code"]
    if not status:
        return answer
    raise RequestError(reason["message"], status=status, headers=retry_headers(status, frontend))


def complete(answer: dict[str, Any], frontend: Frontend) -> dict[str, Any]:
    """Raises RequestError for any abort: half of it is of no use."""
    reason = checked(answer, frontend)["meta_info"]["finish_reason"]
    if reason["type"] != "abort":
        return answer
    raise RequestError(reason["message"], status=503, headers=retry_headers(503, frontend))


@contextlib.contextmanager
def told_as(names: Mapping[str, str]) -> Iterator[None]:
    """Errors inside name the fields that the client has sent.

    Args:
      names: of these, by those of the native body.
    """
    try:
        yield
    except RequestError as error:
        name = names.get(error.param)
        if name is None:
            raise
        words = str(error).replace(error.param, name)
        raise RequestError(words, param=name, status=error.status, headers=error.headers) from error


def model_and_usage(body: Mapping[str, Any], request: Request, answers: list[dict]) -> dict:
    """What OpenAI's answers end with."""
    num_tokens = sum(answer["meta_info"]["prompt_tokens"] for answer in answers)
    return {
        "model": text(body, "model") or request.app.ctx.frontend.state.model_name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def retry_headers(status: int, frontend: Frontend) -> dict[str, str]:
    return {"Retry-After": str(frontend.retry_after)} if status == 503 else {}
