"""JSON in and out, and what an error looks like."""

import http
from collections.abc import Mapping
from typing import Any

import msgspec
from sanic import Request
from sanic.response import HTTPResponse, raw

from jaxserve.body_fields import as_object
from jaxserve.errors import RequestError


def read_json(request: Request) -> Any:
    """The body, whatever its content type.

    Raises:
      RequestError: it is no JSON. NaN, infinity and lone surrogates are none.
    """
    try:
        return msgspec.json.decode(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else f"is: {error}"
        raise RequestError(f"the body must be JSON, but {what}") from error


def read_optional(request: Request) -> dict[str, Any]:
    """The body, empty where there is none.

    Raises:
      RequestError: it is no JSON object.
    """
    body = read_json(request) if request.body else None
    return {} if body is None else dict(as_object(body))


def json(content: Any, status: int = 200) -> HTTPResponse:
    return raw(msgspec.json.encode(content), status=status, content_type="application/json")


def text(content: str, status: int = 200) -> HTTPResponse:
    return raw(content.encode(), status=status, content_type="text/plain; charset=utf-8")


def empty(status: int = 200) -> HTTPResponse:
    return text("", status)


def error_content(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The same for every route, and for the last event of a stream."""
    message = message.encode(errors="replace").decode()  # it may repeat a header that is no text
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status, "param": param}}


def error(
    message: str,
    status: int,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> HTTPResponse:
    response = json(error_content(message, status, param), status)
    response.headers.update(headers or {})
    return response


def phrase(status: int) -> str:
    return http.HTTPStatus(status).phrase
