"""A tokenizer that fails at an answer: its caller is told, and the engine need not go on with it.
The application runs here, on an engine that is one function."""

import asyncio

import httpx

from jaxserve.config import ServerConfig
from jaxserve.frontend import Frontend
from jaxserve.messages import AbortRequest, AddRequest, StepNews
from jaxserve.request import FinishReason, RequestUpdate
from jaxserve.server.app import create_app
from jaxserve.tokenizer import Tokenizer
from tests.engine.test_generate_request import info
from tests.server.serving import DEMO_MODEL, events

POISON = 666


class FailingTokenizer(Tokenizer):
    def decode(self, ids, *, skip_special_tokens: bool = True) -> str:
        if POISON in ids:
            raise OverflowError("injected")
        return super().decode(ids, skip_special_tokens=skip_special_tokens)


async def ask(token: int) -> tuple[httpx.Response, httpx.Response, list]:
    """The same call, streamed and not, whose third token is `token`; and the aborts it led to."""
    aborted = []

    def engine(message) -> None:
        if isinstance(message, AbortRequest):
            aborted.append(message.rid)
        elif isinstance(message, AddRequest):
            loop, rid = asyncio.get_running_loop(), message.request.rid
            for i, one in enumerate((300, 301, token, 302)):
                reason = FinishReason("length", length=4) if i == 3 else None
                output = StepNews([RequestUpdate(rid, [one], reason)])
                loop.call_later(0.02 * (i + 1), frontend.deliver, output)

    config = ServerConfig(model_path=DEMO_MODEL, port=0)
    frontend = Frontend(config, engine)
    frontend.set_ready(info(), FailingTokenizer(DEMO_MODEL))
    app = create_app(frontend, config)
    app.config.TOUCHUP = False  # Sanic can rewrite itself only once in a process
    server = await app.create_server(port=0, return_asyncio_server=True)
    await server.startup()
    port = server.server.sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        body = {"text": "a", "rid": "r"}
        whole = await client.post("/generate", json=body)
        streamed = await client.post("/generate", json=body | {"stream": True})
    await server.close()
    assert app.ctx.num_calls == 0
    return whole, streamed, aborted


def test_healthy_tokenizer_has_the_same_answer_either_way():
    whole, streamed, aborted = asyncio.run(ask(token=5))
    assert whole.json()["text"] == events(streamed.content)[-1]["text"]
    assert len(events(streamed.content)) == 4 and not aborted


def test_tokenizer_that_fails_is_told_in_the_stream_too():
    whole, streamed, aborted = asyncio.run(ask(token=POISON))
    print(whole.text, streamed.text[-200:])
    error = {"message": "Internal Server Error", "type": "server_error", "code": 500, "param": None}
    assert whole.status_code == 500 and whole.json() == {"error": error}
    *answers, last = events(streamed.content)
    assert last == {"error": error} and len(answers) == 2
    assert aborted == ["r"], "of the stream; the other had finished"
