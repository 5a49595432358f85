"""Who may call what: every route has a level, and each level that has a key wants it.

A route's level goes by the route that Sanic has matched, not by how its path is spelt.
"""

import hmac
from typing import Literal

from sanic import Request
from sanic.response import HTTPResponse

from jaxserve.config import ServerConfig
from jaxserve.server import bodies

Level = Literal["open", "normal", "admin"]
ADMIN = ("control", "weights", "experts")  # blueprints: what changes the server, for everybody
OPEN = (
    "metrics",
    "health",
    "health_generate",
    "ready",
    "ping",
)  # handlers: what probes and scrapes carries no key


def level_of(route_name: str) -> Level:
    """Of a route's full name, which ends with its blueprint and its handler."""
    *_, blueprint, handler = route_name.split(".")
    if blueprint in ("info", "metrics") and handler in OPEN:
        return "open"
    return "admin" if blueprint in ADMIN else "normal"


def refusal(request: Request, config: ServerConfig) -> HTTPResponse | None:
    """401 where the key that the request needs is missing; None where it may pass. What matches
    no route is normal: without a key nobody learns which routes there are."""
    level = level_of(request.route.name) if request.route is not None else "normal"
    key = config.admin_api_key if level == "admin" and config.admin_api_key else config.api_key
    if level == "open" or key is None or request.method == "OPTIONS":
        return None
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode(errors="replace"), key.encode())
    if scheme.lower() == "bearer" and is_right:
        return None
    answer = bodies.json({"error": "Unauthorized"}, 401)
    answer.headers["WWW-Authenticate"] = "Bearer"
    return answer
