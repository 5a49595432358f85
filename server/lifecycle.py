"""From a configuration to a running server, and to its end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvloop
from sanic import Sanic
from sanic.server.async_server import AsyncioServer

from jaxserve import logs
from jaxserve.client import EngineClient
from jaxserve.config import ServerConfig
from jaxserve.errors import EngineDied
from jaxserve.frontend import Frontend
from jaxserve.server.app import create_app

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.05
LAST_WORDS_SECONDS = 1.0  # for the answers of those who are ended to be written
SMALL_CONTEXT = 63  # tokens; below it the usual first request may not fit
WARM_UP = {"max_new_tokens": 8, "temperature": 0.0}


def run(config: ServerConfig, ignored_flags: list[str]) -> int:
    """Serves until a signal or the engine's end; returns the exit status."""
    logs.set_up(config.log_level)
    for flag in ignored_flags:
        logger.warning("%s has no meaning for JAX; it is ignored", flag)
    try:
        with bind(config.host, config.port) as listener:
            logger.info("server_args=%s", config)
            return uvloop.run(_serve(config, listener))
    except CannotListen as error:
        logger.error("cannot listen on %s:%d: %s", config.host, config.port, error)
    except (ValueError, OSError) as error:
        logger.error("cannot start: %s", error)
    return 1


class CannotListen(Exception):
    """No such address, or none that this process may have."""


def bind(host: str, port: int) -> socket.socket:
    """Takes the port at once, so that one in use fails in a second; nobody listens yet, so that
    clients are refused, not kept waiting, while the model loads. Raises CannotListen."""
    with _listening():
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    return listener


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotListen(error.strerror) from error
    except UnicodeError as error:  # of a host that no name can be
        raise CannotListen(str(error)) from error


async def _serve(config: ServerConfig, listener: socket.socket) -> int:
    stop = _stop_on_signals()
    client = EngineClient(config)
    try:
        if not await _start(client, stop):
            return 1
        app = create_app(client, config)
        server = await app.create_server(
            sock=listener,
            return_asyncio_server=True,
            asyncio_server_kwargs={"start_serving": False},
        )
        await server.startup()
        await server.before_start()
        with _listening():
            listener.listen()  # uvloop would not raise where another has taken the port meanwhile
        await server.start_serving()
        await server.after_start()
        if not config.skip_server_warmup:
            await warm_up(client)
        logger.info("The server is fired up and ready to roll!")
        print(banner(client, config.host, listener.getsockname()[1]), file=sys.stderr, flush=True)
        await _first(stop.wait(), client.died.wait())
        await _drain(app, client, lambda: _num_open(app, server), config.shutdown_timeout)
        await server.before_stop()
        await server.close()
        await server.after_stop()
        return int(client.died.is_set())
    except EngineDied as error:
        logger.error("%s", error)
        return 1
    finally:
        await client.stop()


def _stop_on_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second one ends the process on the spot."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + number)
        logger.info("%s: finishing what runs; once more to end at once", number.name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


async def _start(client: EngineClient, stop: asyncio.Event) -> bool:
    """False, with a line in the log, where the engine cannot start or is not wanted any more."""
    starting = asyncio.create_task(client.start())
    await _first(starting, stop.wait())
    if not starting.done():
        starting.cancel()
        return False
    try:
        starting.result()
    except ValueError as error:
        logger.error("cannot start: %s", error)
        return False
    return True


async def _first(*awaitables) -> None:
    """Waits until one is done; what is not a task yet is given up."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, awaitable in zip(tasks, awaitables, strict=True):
        if task is not awaitable:
            task.cancel()


def _num_open(app: Sanic, server: AsyncioServer) -> int:
    """Calls that are under way, and answers that the network has not taken yet."""
    transports = [connection.transport for connection in server.connections]
    unsent = sum(bool(one and one.get_write_buffer_size()) for one in transports)
    return max(app.ctx.num_calls, unsent)


async def _drain(
    app: Sanic, client: EngineClient, num_open: Callable[[], int], seconds: float
) -> None:
    """No new work; what is under way may finish until the deadline, and is ended then."""
    app.ctx.is_stopping = True
    await _until(lambda: not num_open() or client.died.is_set(), seconds)
    if num_open() and not client.died.is_set():
        logger.warning("ending %d requests at the deadline", num_open())
        client.die(EngineDied("the server is shutting down"))
    await _until(lambda: not num_open(), LAST_WORDS_SECONDS)


async def _until(holds: Callable[[], bool], seconds: float) -> None:
    """Returns when it holds, or when the time is up."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not holds():
                await asyncio.sleep(POLL_SECONDS)


async def warm_up(frontend: Frontend) -> None:
    """One request of our own, through everything but HTTP."""
    body = {"sampling_params": WARM_UP}
    if frontend.info.max_req_len < SMALL_CONTEXT:
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}
    elif frontend.tokenizer is None:
        body["input_ids"] = [min(token, frontend.info.vocab_size - 1) for token in (10, 11, 12)]
    else:
        body["text"] = "The capital city of France is"
    changed = asyncio.Event()
    answers = frontend.submit(*frontend.prepare_own(body), changed.set)
    async for _ in answers.follow(changed):
        pass


def banner(frontend: Frontend, host: str, port: int) -> str:
    """What to do next."""
    info = frontend.info
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    prompt = (
        '"input_ids": [1, 2, 3]'
        if frontend.tokenizer is None
        else '"text": "What is the capital of France?"'
    )
    url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    if info.embedding is None:
        path, body = "generate", f'{prompt}, "sampling_params": {{"temperature": 0}}'
    else:
        path, body = "encode", prompt
    # The key stays where the shell keeps it.
    key = " -H 'Authorization: Bearer '$API_KEY" if frontend.config.api_key else ""
    return (
        f"\n  {frontend.config.model_name} ({info.architecture}, {info.dtype}) on {info.device}"
        f" at {url}\n"
        f"  {info.max_total_num_tokens} tokens of KV cache, {info.max_running_requests} requests"
        f" at once, context {info.context_length};"
        f" engine ready after {info.startup_seconds:.1f} s\n\n"
        f"  curl {url}/{path} -H 'Content-Type: application/json'{key} \\\n"
        f"    -d '{{{body}}}'\n"
    )
