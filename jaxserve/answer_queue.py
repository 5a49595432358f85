"""Answers that take their time, beside the steps: one after the other."""

import collections
import logging
from collections.abc import Callable
from typing import Any

from jaxserve.background import Task
from jaxserve.errors import RequestError
from jaxserve.messages import Reply

logger = logging.getLogger(__name__)
MOST_WAITING = 64


class AnswerQueue:
    def __init__(self, what: str):
        """`what` names the work, in words for logs and refusals."""
        self._what = what
        self._waiting: collections.deque[tuple[int, Callable[[], Any]]] = collections.deque()
        self._running: tuple[int, Task] | None = None

    @property
    def is_empty(self) -> bool:
        return self._running is None and not self._waiting

    @property
    def is_working(self) -> bool:
        return self._running is not None

    @property
    def is_due(self) -> bool:
        """One is done, and its answer can be told."""
        return self._running is not None and self._running[1].is_done

    def add(self, call_id: int, work: Callable[[], Any]) -> None:
        """Raises RequestError as `check_room`."""
        self.check_room()
        self._waiting.append((call_id, work))

    def check_room(self) -> None:
        """Raises RequestError where too many wait."""
        if len(self._waiting) >= MOST_WAITING:
            raise RequestError(f"{MOST_WAITING} calls wait for {self._what} already", status=503)

    def settle(self, *, may_start: bool = True) -> list[Reply]:
        """Tells what has been done, and begins with the next, if it may."""
        replies = []
        if self._running is not None and self._running[1].is_done:
            replies.append(self._reply_of(*self._running))
            self._running = None
        if may_start and self._running is None and self._waiting:
            call_id, work = self._waiting.popleft()
            self._running = call_id, Task("jaxserve-answer", lambda task: work())
        return replies

    def _reply_of(self, call_id: int, task: Task) -> Reply:
        try:
            return Reply(call_id, task.result())
        except RequestError as error:
            return Reply(call_id, error=str(error), status=error.status)
        except Exception as error:
            logger.exception("%s failed", self._what)
            return Reply(call_id, error=f"{type(error).__name__}: {error}")
