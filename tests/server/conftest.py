"""One server for nearly all tests; what changes or ends a server starts its own."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.server.serving import DEMO_MODEL, SMALL, ServerProcess, flags, programs_folder


@pytest.fixture(scope="session")
def start(pytestconfig, tmp_path_factory) -> Callable[..., ServerProcess]:
    """Starts the demo model's server; options as `flags` takes them, None for one left out."""
    folder, numbers = tmp_path_factory.mktemp("servers"), itertools.count()

    def start_server(*arguments: str, command: list[str] | None = None, **options: Any):
        defaults = {"model_path": DEMO_MODEL, "port": 0}
        cache = {"compilation_cache_dir": programs_folder(pytestconfig)}
        given = {k: v for k, v in (defaults | SMALL | cache | options).items() if v is not None}
        log = folder / f"{next(numbers)}.log"
        choice = {"command": command} if command else {}
        return ServerProcess(log, *flags(**given), *arguments, **choice)

    return start_server


@pytest.fixture(scope="session")
def server(start) -> Iterator[ServerProcess]:
    with start() as process:
        yield process


@pytest.fixture(scope="session")
def client(server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
