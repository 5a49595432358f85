"""/tokenize and /detokenize: text to token ids and back, without the engine."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

from jaxserve.body_fields import as_object, flag, refuse_unserved
from jaxserve.errors import RequestError
from jaxserve.server import bodies
from jaxserve.server.call import SMALL_BODY
from jaxserve.tokenizer import Tokenizer

blueprint = Blueprint("tokenizing")
MOST_CHARACTERS = 1 << 20  # of a call: a tokenizer takes 200 bytes for each
MOST_TOKENS = 1 << 20
MOST_ID = 2**32 - 1  # that the tokenizer's library can hold


@blueprint.post("/tokenize")
@blueprint.post("/v1/tokenize", name="v1_tokenize")
async def tokenize(request: Request) -> HTTPResponse:
    """`prompt`, a text or a list; with the special tokens that /generate adds unless
    `add_special_tokens` is false."""
    body, tokenizer = as_object(bodies.read_json(request)), _tokenizer(request)
    refuse_unserved(body, {"messages": ()})
    prompt, is_special = body.get("prompt"), flag(body, "add_special_tokens", True)
    texts = prompt if isinstance(prompt, list) else [prompt]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError("prompt must be a text or a list of texts", param="prompt")
    if (count := sum(map(len, texts))) > MOST_CHARACTERS:
        words = f"prompt has {count} characters, at most {MOST_CHARACTERS} are taken"
        raise RequestError(words, param="prompt")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=is_special)

    tokens = await _each(request, encode, texts)
    counts = [len(ids) for ids in tokens]
    is_list = isinstance(prompt, list)
    return bodies.json(
        {
            "tokens": tokens if is_list else tokens[0],
            "count": counts if is_list else counts[0],
            "max_model_len": request.app.ctx.frontend.info.context_length,
        }
    )


@blueprint.post("/detokenize")
@blueprint.post("/v1/detokenize", name="v1_detokenize")
async def detokenize(request: Request) -> HTTPResponse:
    """`tokens`, a list of ids or a list of such lists; without the text of special tokens unless
    `skip_special_tokens` is false."""
    body, tokenizer = as_object(bodies.read_json(request)), _tokenizer(request)
    tokens, is_skipping = body.get("tokens"), flag(body, "skip_special_tokens", True)
    is_nested = isinstance(tokens, list) and any(isinstance(ids, list) for ids in tokens)
    lists = tokens if is_nested else [tokens]
    if not all(_is_id_list(ids) for ids in lists):
        raise RequestError(
            f"tokens must be a list of token ids, from 0 to {MOST_ID}, or a list of such lists",
            param="tokens",
        )
    if (count := sum(map(len, lists))) > MOST_TOKENS:
        raise RequestError(f"{count} tokens, at most {MOST_TOKENS} are taken", param="tokens")

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=is_skipping)

    texts = await _each(request, decode, lists)
    return bodies.json({"text": texts if is_nested else texts[0]})


def _tokenizer(request: Request) -> Tokenizer:
    tokenizer = request.app.ctx.frontend.tokenizer
    if tokenizer is None:
        raise RequestError("this server has no tokenizer (--skip-tokenizer-init)")
    return tokenizer


async def _each(request: Request, function: Callable[[Any], Any], items: Sequence[Any]) -> list:
    """Of large bodies in a thread: the event loop is everybody's."""

    def run() -> list:
        return [function(item) for item in items]

    return run() if len(request.body) <= SMALL_BODY else await asyncio.to_thread(run)


def _is_id_list(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(one) is int and 0 <= one <= MOST_ID for one in ids)
