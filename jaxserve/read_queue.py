"""Reads of the weights beside the steps: one at a time, since each may copy a whole parameter."""

import collections
import logging
from collections.abc import Callable
from typing import Any

from jaxserve.background import Task
from jaxserve.errors import RequestError
from jaxserve.messages import Reply

logger = logging.getLogger(__name__)
MOST_WAITING = 64


class ReadQueue:
    def __init__(self):
        self._waiting: collections.deque[tuple[int, Callable[[], Any]]] = collections.deque()
        self._running: tuple[int, Task] | None = None

    @property
    def is_empty(self) -> bool:
        return self._running is None and not self._waiting

    @property
    def is_reading(self) -> bool:
        return self._running is not None

    @property
    def is_due(self) -> bool:
        """A read is done, and its answer can be told."""
        return self._running is not None and self._running[1].is_done

    def add(self, call_id: int, work: Callable[[], Any]) -> None:
        """Raises RequestError where too many wait."""
        if len(self._waiting) >= MOST_WAITING:
            raise RequestError(f"{MOST_WAITING} reads of the weights wait already", status=503)
        self._waiting.append((call_id, work))

    def settle(self, *, may_start: bool) -> list[Reply]:
        """Tells what has been read, and begins the next read, if it may."""
        replies = []
        if self._running is not None and self._running[1].is_done:
            replies.append(_reply_of(*self._running))
            self._running = None
        if may_start and self._running is None and self._waiting:
            call_id, work = self._waiting.popleft()
            self._running = call_id, Task("jaxserve-read-weights", lambda task: work())
        return replies


def _reply_of(call_id: int, task: Task) -> Reply:
    try:
        return Reply(call_id, task.result())
    except RequestError as error:
        return Reply(call_id, error=str(error), status=error.status)
    except Exception as error:
        logger.exception("reading the weights failed")
        return Reply(call_id, error=f"{type(error).__name__}: {error}")
