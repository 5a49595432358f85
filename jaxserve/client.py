"""Starts the engine's process and talks to it from an asyncio loop. Imports no jax."""

import asyncio
import contextlib
import dataclasses
import logging
import pathlib
import subprocess
import sys
import tempfile

import msgspec
import zmq
import zmq.asyncio

from jaxserve import messages
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineDied
from jaxserve.frontend import Frontend

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.2  # how soon an engine that has ended is noticed


class EngineClient(Frontend):
    """An engine in a process of its own."""

    def __init__(self, config: EngineConfig):
        super().__init__(config, self._send_message)
        self.died = asyncio.Event()  # set when the engine has ended, whatever the reason
        self._process: subprocess.Popen | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task] = []
        self._folder = tempfile.TemporaryDirectory(prefix="jaxserve-")  # mode 0700
        self._is_stopping = False

    async def start(self) -> None:
        """Returns when the engine is ready.

        Raises:
          ValueError: the engine cannot serve this configuration; the message is its reason.
          EngineDied: its process ended before it could say why.
        """
        path = pathlib.Path(self._folder.name) / "engine.sock"
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(f"ipc://{path}")
        path.chmod(0o600)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve.engine_process", f"ipc://{path}"],
            stdin=subprocess.PIPE,
        )
        fields = dataclasses.fields(EngineConfig)
        config = {field.name: getattr(self.config, field.name) for field in fields}
        self._process.stdin.write(msgspec.json.encode(config) + b"\n")
        self._process.stdin.flush()
        first = await self._first_message()
        if isinstance(first, messages.StartFailed | messages.EngineFailed):
            raise ValueError(first.message)
        self.set_ready(first.info)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]
        self._tasks[0].add_done_callback(self._on_receive_end)

    async def stop(self) -> None:
        """Ends the engine's process; requests that are still running end with EngineDied."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        if self._process is not None:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, 5)
            self._process.kill()
        if self._socket is not None:
            self._socket.close(linger=0)
        self._folder.cleanup()
        self.die(EngineDied("the server is shutting down"))

    def _send_message(self, message: messages.ToEngine) -> None:
        # A socket without a high-water mark takes every message at once: there is nothing to await.
        self._socket.send(messages.encode(message), flags=zmq.NOBLOCK)

    async def _first_message(self) -> messages.FromEngine:
        while self._process.poll() is None:
            if await self._socket.poll(POLL_SECONDS * 1000):
                return messages.decode_from_engine(await self._socket.recv())
        if await self._socket.poll(0):
            return messages.decode_from_engine(await self._socket.recv())
        raise EngineDied(self._describe_end())

    async def _receive(self) -> None:
        while True:
            message = messages.decode_from_engine(await self._socket.recv())
            if isinstance(message, messages.EngineFailed):
                logger.error("%s", message.message)
                self.die(EngineDied(message.message))
                self.died.set()  # whether its process manages to end or not
            else:
                self.deliver(message)

    def _on_receive_end(self, task: asyncio.Task) -> None:
        """Nobody hears the engine any more: better to end than to let everybody wait."""
        if not task.cancelled():
            logger.error("lost the engine's messages", exc_info=task.exception())
            self.die(EngineDied(f"lost the engine's messages: {task.exception()}"))
            self.died.set()

    async def _watch(self) -> None:
        while self._process.poll() is None:
            await asyncio.sleep(POLL_SECONDS)
        if not self._is_stopping:
            logger.error("%s", self._describe_end())
            self.die(EngineDied(self._describe_end()))
            self.died.set()

    def _describe_end(self) -> str:
        code = self._process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the engine process (pid {self._process.pid}) {how}"
