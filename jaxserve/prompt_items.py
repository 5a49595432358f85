"""The prompts of a body, of whatever route: their texts or ids, and what is said of each."""

import dataclasses
import uuid
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.logprob_options import LogprobOptions
from jaxserve.sampling_params import SamplingParams

MOST_RID_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt, as text or as ids, and its parameters."""

    rid: str
    text: str | None
    input_ids: list[int] | None
    sampling: SamplingParams
    logprobs: LogprobOptions | None = None
    asked_tokens: int | None = None  # max_new_tokens where the request itself names it
    priority: int = 0
    namespace: str = ""
    experts_from: int | None = None  # the first position whose experts are wanted
    second: str | None = None  # of a pair of texts, of which `text` is the first


def body_items(body: Mapping[str, Any], *, most_items: int) -> tuple[list[Item], bool]:
    """The prompts of a body without sampling parameters that matter, and whether they are a batch.

    Raises:
      RequestError: names the field.
    """
    texts, ids, is_batch = prompts_of(body)
    count = len(texts)
    if count > most_items:
        name = "input_ids" if body.get("text") is None else "text"
        raise RequestError(f"at most {most_items} prompts in a request, got {count}", param=name)
    rids = rids_of(body.get("rid"), count, is_batch)
    shared = {"priority": priority_of(body), "namespace": namespace_of(body)}
    prompts = zip(rids, texts, ids, strict=True)
    return [Item(*prompt, SamplingParams(), **shared) for prompt in prompts], is_batch


def prompts_of(body: Mapping[str, Any]) -> tuple[list, list, bool]:
    """Texts and ids, one of each per prompt (None for absent), and whether it is a batch."""
    text, ids = body.get("text"), body.get("input_ids")
    if text is None and ids is None:
        raise RequestError("Either text, input_ids or input_embeds should be provided.")
    for name, value in (("text", text), ("input_ids", ids)):
        if isinstance(value, list) and not value:
            raise RequestError(f"{name} cannot be empty.", param=name)
    if ids is not None and not isinstance(ids, list):
        raise RequestError("input_ids must be a list", param="input_ids")
    is_batch = isinstance(ids[0] if text is None else text, list)
    texts = text if isinstance(text, list) else [text] * (len(ids) if is_batch else 1)
    lists = ids if is_batch and ids is not None else [ids] * len(texts)
    if text is not None and not all(isinstance(one, str) for one in texts):
        raise RequestError("text must be a string or a list of strings", param="text")
    if ids is not None and not all(_is_id_list(one) for one in lists):
        raise RequestError(
            "input_ids must be a list of token ids or a list of such lists", param="input_ids"
        )
    if len(texts) != len(lists):
        raise RequestError(
            f"{len(texts)} texts and {len(lists)} lists of input_ids", param="input_ids"
        )
    return texts, lists, is_batch


def _is_id_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def rids_of(given: Any, count: int, is_batch: bool) -> list[str]:
    if given is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(given, str):
        given = [f"{given}_{i}" for i in range(count)] if is_batch else [given]
    if not isinstance(given, list) or not all(isinstance(rid, str) for rid in given):
        raise RequestError("rid must be a string or a list of strings", param="rid")
    if len(given) != count:
        raise RequestError(f"{len(given)} rids for {count} prompts", param="rid")
    if repeated := sorted({rid for rid in given if given.count(rid) > 1}):
        raise RequestError(
            f"Duplicate request IDs detected within the request: {repeated}", param="rid"
        )
    for rid in given:
        if not 0 < len(rid.encode(errors="replace")) <= MOST_RID_BYTES or not rid.isprintable():
            raise RequestError(
                f"a rid must have 1 to {MOST_RID_BYTES} bytes, all printable", param="rid"
            )
    return given


def priority_of(body: Mapping[str, Any]) -> int:
    value = body.get("priority")
    if value is not None and (type(value) is not int or abs(value) >= 2**31):
        raise RequestError(f"priority must be a 32-bit integer, got {value!r}", param="priority")
    return value or 0


def namespace_of(body: Mapping[str, Any]) -> str:
    """Requests with another `extra_key` or `cache_salt` share nothing that is cached."""
    parts = []
    for name in ("extra_key", "cache_salt"):
        value = body.get(name) or ""
        if not isinstance(value, str) or len(value.encode(errors="replace")) > MOST_RID_BYTES:
            raise RequestError(
                f"{name} must be a string of at most {MOST_RID_BYTES} bytes", param=name
            )
        parts.append(value)
    return "\0".join(parts)
