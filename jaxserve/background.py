"""Work beside the engine's loop, whose result the loop fetches when it comes by."""

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any


class GivenUp(Exception):
    """Nobody waits for the work any more."""


class Done:
    """What a task is once it is done, of work that takes no time."""

    is_done = True
    idle_seconds = 0.0

    def __init__(self, value: Any):
        self._value = value

    def result(self) -> Any:
        return self._value


class Task:
    """One function in a thread of its own. The thread does not keep the process alive: a disk that
    never answers must not either."""

    def __init__(self, name: str, work: Callable[["Task"], Any]):
        """`work` calls `report` as it gets on."""
        self._future: concurrent.futures.Future = concurrent.futures.Future()
        self._last = time.monotonic()
        self._is_given_up = False
        threading.Thread(target=self._run, args=(work,), name=name, daemon=True).start()

    @property
    def is_done(self) -> bool:
        return self._future.done()

    @property
    def idle_seconds(self) -> float:
        """Since it last got on."""
        return time.monotonic() - self._last

    def result(self) -> Any:
        """Of a task that is done; raises what the work has raised, as an Exception."""
        return self._future.result(timeout=0)

    def report(self, count: int = 0) -> None:
        """It gets on. Raises GivenUp where it need not."""
        self._last = time.monotonic()
        if self._is_given_up:
            raise GivenUp

    def give_up(self) -> None:
        """Ends it at its next report; its result is not wanted."""
        self._is_given_up = True

    def _run(self, work: Callable[["Task"], Any]) -> None:
        try:
            self._future.set_result(work(self))
        except Exception as error:
            self._future.set_exception(error)
        except BaseException as error:  # a library's panic must not end who asks for the result
            softened = RuntimeError(f"{type(error).__name__}: {error}")
            softened.__cause__ = error
            self._future.set_exception(softened)
