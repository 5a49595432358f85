"""One server for nearly all tests; what changes or ends a server starts its own."""

import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.engine.reloading import write_variant
from tests.server import trainee
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


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def demo(weights_folder) -> str:
    """The demo model's weights, below the root."""
    return str(write_variant(weights_folder / "demo", seed=None))


@pytest.fixture(scope="session")
def other(weights_folder) -> str:
    """Others."""
    return str(write_variant(weights_folder / "other"))


@pytest.fixture(scope="session")
def weights_server(start, weights_folder) -> Iterator[ServerProcess]:
    with start(weights_root=weights_folder, max_request_bytes=trainee.MOST_BYTES) as process:
        yield process


@pytest.fixture(scope="session")
def weights_client(weights_server) -> Iterator[httpx.Client]:
    with weights_server.client() as client:
        yield client


@pytest.fixture
def demo_weights(weights_client, demo) -> None:
    """Whatever the last test has left behind."""
    for path in ("/resume_memory_occupation", "/continue_generation"):
        weights_client.post(path).raise_for_status()
    trainee.update(weights_client, model_path=demo, weight_version="demo", abort_all_requests=True)


@pytest.fixture(scope="session")
def texts(weights_client, demo, other) -> dict[str, str]:
    """What each version answers."""
    found = {}
    for name, path in (("other", other), ("demo", demo)):
        trainee.update(weights_client, model_path=path)
        found[name] = trainee.ask(weights_client)["text"]
    assert found["demo"] == trainee.PARIS != found["other"]
    return found
