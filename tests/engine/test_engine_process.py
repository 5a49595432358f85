"""The engine as a process of its own, and the client that starts it."""

import asyncio
import dataclasses
import os
import pathlib
import stat

import pytest

from jaxserve.client import EngineClient
from jaxserve.config import EngineConfig
from jaxserve.engine_process import configure_jax
from jaxserve.errors import EngineDied
from jaxserve.frontend import Frontend
from jaxserve.messages import Call, Reply
from tests.server.serving import (
    DEMO_MODEL,
    GREEDY,
    SMALL,
    children,
    is_running,
    programs_folder,
    wait_for,
)

BODY = {"text": "What is the capital of France?", "sampling_params": GREEDY}
ENDLESS = BODY | {"sampling_params": GREEDY | {"ignore_eos": True, "max_new_tokens": 4000}}


@pytest.fixture
def config(pytestconfig) -> EngineConfig:
    folder = programs_folder(pytestconfig)
    return EngineConfig(model_path=DEMO_MODEL, compilation_cache_dir=folder, **SMALL)


async def finish(client: EngineClient, body: dict) -> list[dict]:
    changed = asyncio.Event()
    answers = client.submit(*client.prepare(body), changed.set)
    finished = []
    while not answers.is_over:
        await changed.wait()
        changed.clear()
        finished += answers.take()
    return finished


def test_engine_that_fails_ends_everything_that_waits_for_it(config):
    async def main():
        client = EngineClient(config)
        before = set(children(os.getpid()))
        await client.start()
        (engine,) = set(children(os.getpid())) - before
        socket = pathlib.Path(client._folder.name) / "engine.sock"
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700

        (answer,) = await finish(client, BODY)
        assert "Paris" in answer["text"] and client.num_live == 0
        with pytest.raises(RuntimeError, match="unknown operation 'nonsense'"):
            await asyncio.wrap_future(client.call("nonsense"))
        with pytest.raises(RuntimeError, match="TypeError"):
            await asyncio.wrap_future(client.call("flush_cache", unknown=1))
        assert await asyncio.wrap_future(client.call("flush_cache")) is True

        waiting = asyncio.create_task(finish(client, ENDLESS))
        while not (await asyncio.wrap_future(client.call("internal_state")))["num_running_reqs"]:
            pass
        await client._socket.send(b"no message")  # the engine cannot but fail
        words = "the engine failed: ValidationError: Expected `object`, got `int`"
        with pytest.raises(EngineDied, match=words):
            await waiting
        await asyncio.wait_for(client.died.wait(), 5)
        wait_for(lambda: not is_running(engine), 5)
        with pytest.raises(EngineDied, match=words):
            client.submit(*client.prepare(BODY))
        with pytest.raises(EngineDied, match=words):
            await asyncio.wrap_future(client.call("flush_cache"))
        await client.stop()
        assert not socket.parent.exists() and not is_running(engine)

    asyncio.run(main())


def test_engine_that_cannot_start_says_why_and_ends(config, tmp_path):
    async def main():
        absent = dataclasses.replace(config, model_path=str(tmp_path / "absent"))
        client = EngineClient(absent)
        before = set(children(os.getpid()))
        with pytest.raises(ValueError, match="absent is no folder"):
            await client.start()
        started = set(children(os.getpid())) - before
        await client.stop()
        wait_for(lambda: not any(is_running(pid) for pid in started), 5)

    asyncio.run(main())


@pytest.mark.parametrize(
    "given,used", [(None, "0"), ("3", "3"), ("2,3", "2"), ("GPU-8932,GPU-77", "GPU-8932"), ("", "")]
)
def test_one_gpu_is_used_the_first_that_the_user_lets_it_see(config, monkeypatch, given, used):
    monkeypatch.setattr(os, "environ", {} if given is None else {"CUDA_VISIBLE_DEVICES": given})
    configure_jax(config)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == used
    assert os.environ["JAX_PLATFORMS"] == "cpu", "as --device says"


def test_reply_to_someone_who_has_left_harms_nobody(config):
    """A client that disconnects cancels its call; the engine's answer comes all the same."""
    sent: list[Call] = []
    frontend = Frontend(config, sent.append)
    left, patient = frontend.call("flush_cache"), frontend.call("flush_cache")
    assert left.cancel()
    for call in sent:
        frontend.deliver(Reply(call.call_id, value=True))
    assert patient.result(timeout=0) is True
    left, patient = frontend.call("flush_cache"), frontend.call("flush_cache")
    assert left.cancel()
    frontend.die(EngineDied("gone"))
    with pytest.raises(EngineDied):
        patient.result(timeout=0)
