"""Writes a plan log while the engine runs, without keeping it waiting: a thread has the file."""

import collections
import logging
import os
import pathlib
import queue
import stat
import threading
from collections.abc import Sequence
from typing import BinaryIO

from jaxserve.plan_log import (
    MAGIC,
    Drawn,
    Header,
    PlanLog,
    PlannedStep,
    Reset,
    WeightsChanged,
    encode,
    is_plan_log,
)
from jaxserve.step_plan import StepPlan
from jaxserve.step_result import Draws

logger = logging.getLogger(__name__)
WRITE_SECONDS = 0.25  # what a killed process may lose
MOST_WAITING = 256 << 20  # bytes; a disk so far behind will not catch up
CLOSE_SECONDS = 3.0  # the process ends even where the disk does not answer


def create_file(path: str | pathlib.Path) -> BinaryIO:
    """A new file that nobody else may read. An older log is kept beside it, as PATH.old; one
    without steps, of a start that was refused, is not worth the place of another.

    Raises:
      ValueError: it cannot be written, or is something else than a log; names the flag.
    """
    path = pathlib.Path(path)
    try:
        if path.exists():
            if not stat.S_ISREG(path.stat().st_mode) or not (
                path.stat().st_size == 0 or is_plan_log(path)
            ):
                raise ValueError(f"--record-plans {path}: is there already, and is no plan log")
            if _has_steps(path):
                path.replace(f"{path}.old")
            else:
                path.unlink()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ValueError(f"--record-plans {path}: {error.strerror}") from error
    return os.fdopen(descriptor, "wb")


def _has_steps(path: pathlib.Path) -> bool:
    """Whether a log holds more than its header, or may."""
    if path.stat().st_size == 0:
        return False
    try:
        with path.open("rb") as file:
            return next(iter(PlanLog(file)), None) is not None
    except ValueError:  # of another version, or damaged
        return True


class PlanRecorder:
    """Is told what the runner is told, in the same order, by one thread; any thread may close it.
    What goes wrong with the file ends the recording, and nothing else."""

    def __init__(self, file: BinaryIO, header: Header):
        self._file = file
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._put_bytes = self._written_bytes = 0
        self._is_over = False
        self._closing = threading.Event()
        self._unread: collections.deque[int] = collections.deque()  # steps
        self._put(MAGIC + encode(header))
        self._thread = threading.Thread(target=self._run, name="jaxserve-plan-log", daemon=True)
        self._thread.start()

    def dispatch(self, plan: StepPlan) -> None:
        self._unread.append(plan.step)
        self._put(encode(PlannedStep(plan)))

    def read(self, rows: list[int], result: Sequence[Draws]) -> None:
        """Of the oldest step that is not read yet.

        Args:
          rows: those whose tokens the scheduler takes in.
          result: `StepResult.drawn`.
        """
        self._put(encode(Drawn.of(self._unread.popleft(), rows, result)))

    def reset(self) -> None:
        self._unread.clear()
        self._put(encode(Reset()))

    def change_weights(self, folder: str | None) -> None:
        self._put(encode(WeightsChanged(folder)))

    def close(self) -> None:
        """Writes what is left."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _put(self, packed: bytes) -> None:
        if self._is_over:
            return
        self._put_bytes += len(packed)
        if self._put_bytes - self._written_bytes > MOST_WAITING:
            self._is_over = True
            self._queue.put(None)
            logger.warning("--record-plans: the disk is too slow; nothing more is recorded")
            return
        self._queue.put(packed)

    def _run(self) -> None:
        try:
            with self._file as file:
                while self._write_some(file):
                    self._closing.wait(WRITE_SECONDS)
        except OSError as error:
            logger.warning("--record-plans: nothing more is recorded: %s", error)
        self._is_over = True

    def _write_some(self, file: BinaryIO) -> bool:
        """Waits for records and writes all there are; False after the last."""
        pieces = [self._queue.get()]
        while not self._queue.empty():
            pieces.append(self._queue.get())
        is_last = None in pieces
        written = b"".join(pieces[: pieces.index(None)] if is_last else pieces)
        file.write(written)
        file.flush()
        self._written_bytes += len(written)
        return not is_last
