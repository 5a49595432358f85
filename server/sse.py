"""Server-sent events: one JSON object each, and the one that ends a stream."""

from typing import Any

import msgspec

CONTENT_TYPE = "text/event-stream; charset=utf-8"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
