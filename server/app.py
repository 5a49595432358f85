"""The Sanic application: routes, errors, limits, the access log."""

import logging
import uuid
from typing import Any

from sanic import Request, Sanic
from sanic.exceptions import MethodNotAllowed, NotFound, SanicException
from sanic.response import HTTPResponse

from jaxserve.config import ServerConfig
from jaxserve.errors import EngineDied, RequestError
from jaxserve.frontend import Frontend
from jaxserve.server import (
    auth,
    bodies,
    control,
    experts,
    generate,
    info,
    loads,
    metrics,
    openai,
    pooling,
    rerank,
    scoring,
    tokenizing,
    weights,
)

logger = logging.getLogger("jaxserve.server.access")
MODULES = (
    generate,
    pooling,
    scoring,
    rerank,
    tokenizing,
    info,
    control,
    openai,
    weights,
    experts,
    metrics,
    loads,
)
NEW_WORK = {
    "/generate",
    *pooling.PATHS,
    *rerank.PATHS,
    *scoring.PATHS,
    *weights.PATHS,
}  # refused while the server ends


class _Request(Request):
    """Sanic makes a second request of one that it cannot read, to answer it: not of the same URL,
    which may be what it cannot read."""

    def __init__(self, url_bytes: bytes, *arguments: Any, method: str, **options: Any):
        url_bytes = b"*" if method == "NONE" else url_bytes
        super().__init__(url_bytes, *arguments, method=method, **options)


class _App(Sanic):
    """Knows how many calls are under way, from the head of a request to the end of its answer."""

    async def handle_request(self, request: Request) -> None:
        self.ctx.num_calls += 1
        try:
            await super().handle_request(request)
        finally:
            self.ctx.num_calls -= 1


def create_app(frontend: Frontend, config: ServerConfig) -> Sanic:
    """An application that answers from `frontend`. Names are unique, so tests may make several."""
    name = f"jaxserve-{uuid.uuid4().hex[:8]}"
    app = _App(name, configure_logging=False, request_class=_Request)
    app.config.FALLBACK_ERROR_FORMAT = "json"
    app.config.REQUEST_MAX_SIZE = config.max_request_bytes
    app.config.RESPONSE_TIMEOUT = float("inf")  # a long generation is no fault
    app.config.GRACEFUL_SHUTDOWN_TIMEOUT = 1.0  # after our own drain
    app.config.AUTO_EXTEND = False
    app.ctx.frontend = frontend
    app.ctx.metrics = metrics.Metrics(frontend)
    frontend.on_progress = app.ctx.metrics.observe
    app.ctx.is_stopping = False
    app.ctx.num_calls = 0
    for module in MODULES:
        app.blueprint(module.blueprint.copy(module.blueprint.name))
    app.error_handler.add(Exception, _on_error)
    app.register_middleware(_refuse_without_key, "request")
    app.register_middleware(_refuse_when_stopping, "request")
    app.register_middleware(_log_access, "response")
    return app


async def _refuse_without_key(request: Request) -> HTTPResponse | None:
    return auth.refusal(request, request.app.ctx.frontend.config)


def _on_error(request: Request, error: Exception) -> HTTPResponse:
    if isinstance(error, NotFound | MethodNotAllowed):  # no middleware has seen it
        refusal = auth.refusal(request, request.app.ctx.frontend.config)
        if refusal is not None:
            return refusal
    if isinstance(error, RequestError):
        return bodies.error(str(error), error.status, error.param, error.headers)
    if isinstance(error, EngineDied):
        return bodies.error(str(error), 500)
    if isinstance(error, SanicException):
        headers = getattr(error, "headers", None)
        return bodies.error(str(error), error.status_code, headers=headers)
    logger.error("%s %s failed", request.method, request.path, exc_info=error)
    return bodies.error("Internal Server Error", 500)


async def _refuse_when_stopping(request: Request) -> HTTPResponse | None:
    if request.app.ctx.is_stopping and request.path in NEW_WORK:
        request.stream.keep_alive = False
        return bodies.error("the server is shutting down", 503)
    return None


async def _log_access(request: Request, response: HTTPResponse) -> None:
    logger.info(
        'INFO:     %s:%s - "%s %s HTTP/%s" %s %s',
        request.ip,
        request.port,
        request.method,
        request.path,
        request.version,
        response.status,
        bodies.phrase(response.status),
    )
