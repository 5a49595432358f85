"""The body of /generate, in SGLang's shape, to one item per prompt."""

import dataclasses
import secrets
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from jaxserve.body_fields import as_object, flag, integer, refuse_unserved
from jaxserve.errors import RequestError
from jaxserve.logprob_options import LogprobOptions, logprob_options
from jaxserve.messages import EngineInfo
from jaxserve.request import LogprobParams, Request
from jaxserve.sampling_params import MOST_SAMPLES, SamplingParams
from jaxserve.tokenizer import Tokenizer

MOST_RID_BYTES = 256
RESERVED = 5  # tokens of the context that a prompt may not take, as SGLang keeps them

# Keys that SGLang knows and we do not serve yet: these values mean "not asked for".
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "input_embeds": (),
    "image_data": (),
    "audio_data": (),
    "video_data": (),
    "return_hidden_states": (False,),
    "lora_path": (),
    "lora_id": (),
    "session_params": (),
    "session_id": (),
    "custom_logit_processor": (),
    "bootstrap_host": (),
    "max_thinking_tokens": (),
}


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


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """A checked body. A batch is answered with a list, even a batch of one."""

    items: list[Item]  # of `num_samples` answers each
    num_samples: int
    is_batch: bool
    stream: bool
    return_prompt_token_ids: bool
    return_text_in_logprobs: bool

    @classmethod
    def parse(
        cls, body: Any, preferred: Mapping[str, Any] | None = None, *, most_items: int = 256
    ) -> "GenerateRequest":
        """Checks everything that can be told without the tokenizer.

        Args:
          preferred: sampling parameters under each request's own.

        Raises:
          RequestError: names the field.
        """
        body = as_object(body)
        refuse_unserved(body, NOT_SERVED)
        texts, ids, is_batch = _prompts(body)
        count = len(texts)
        given = _spread(body.get("sampling_params"), count, is_batch)
        merged = [_merge(preferred, own) for own in given]
        num_samples = _num_samples(merged)
        if count * num_samples > most_items:
            what = "prompts" if num_samples == 1 else "answers (prompts times n)"
            name = "input_ids" if body.get("text") is None else "text"
            raise RequestError(
                f"at most {most_items} {what} in a request, got {count * num_samples}",
                param=name if num_samples == 1 else "n",
            )
        rids = _rids(body.get("rid") if num_samples == 1 else None, count, is_batch)
        logprobs = logprob_options(body, count, is_batch=is_batch, num_samples=num_samples)
        priority, namespace = _priority(body), _namespace(body)
        experts_from = _experts_from(body)
        items = [
            Item(
                rid=rids[i],
                text=texts[i],
                input_ids=ids[i],
                sampling=SamplingParams.parse(merged[i]),
                logprobs=logprobs[i],
                asked_tokens=(given[i] or {}).get("max_new_tokens"),
                priority=priority,
                namespace=namespace,
                experts_from=experts_from,
            )
            for i in range(count)
        ]
        return cls(
            items=items,
            num_samples=num_samples,
            is_batch=is_batch or num_samples > 1,
            stream=flag(body, "stream"),
            return_prompt_token_ids=flag(body, "return_prompt_token_ids"),
            return_text_in_logprobs=flag(body, "return_text_in_logprobs"),
        )


def body_items(body: Mapping[str, Any], *, most_items: int) -> tuple[list[Item], bool]:
    """The prompts of a body without sampling parameters that matter, and whether they are a batch.

    Raises:
      RequestError: names the field.
    """
    texts, ids, is_batch = _prompts(body)
    count = len(texts)
    if count > most_items:
        name = "input_ids" if body.get("text") is None else "text"
        raise RequestError(f"at most {most_items} prompts in a request, got {count}", param=name)
    rids = _rids(body.get("rid"), count, is_batch)
    shared = {"priority": _priority(body), "namespace": _namespace(body)}
    prompts = zip(rids, texts, ids, strict=True)
    return [Item(*prompt, SamplingParams(), **shared) for prompt in prompts], is_batch


def make_request(
    item: Item,
    tokenizer: Tokenizer | None,
    info: EngineInfo,
    *,
    allow_auto_truncate: bool = False,
    use_priority: bool = False,
    default_seed: int | None = None,
) -> Request:
    """Tokenizes an item and checks it against the engine's limits.

    Raises:
      RequestError: too long, outside the vocabulary, or text without a tokenizer.
    """
    sampling = item.sampling
    if tokenizer is None and (item.input_ids is None or sampling.stop):
        what = "stop strings" if sampling.stop else "text prompts"
        raise RequestError(
            f"The engine initialized with skip_tokenizer_init=True cannot accept {what}. "
            "Please provide input_ids or re-initialize the engine with skip_tokenizer_init=False.",
            param="stop" if sampling.stop else "text",
        )
    ids, num_first = item.input_ids, None
    if item.second is not None:
        ids, num_first = _tokenize_pair(item, tokenizer, info, allow_auto_truncate)
    elif ids is None:
        ids = _tokenize(item.text, tokenizer, info.context_length, allow_auto_truncate)
    if not ids:
        raise RequestError("input_ids cannot be empty.", param="input_ids")
    _check_vocabulary(ids, "input_ids", info.vocab_size)
    _check_vocabulary(sampling.stop_token_ids, "stop_token_ids", info.vocab_size)
    _check_bias(sampling, info.vocab_size)
    name = "text" if item.input_ids is None else "input_ids"
    ids = _fit(ids, name, item.asked_tokens, info, allow_auto_truncate)
    if num_first is not None:
        # As models/bert.py wants it.
        ids = ids[:num_first] + [token + info.vocab_size for token in ids[num_first:]]
    _check_experts(item.experts_from, info, len(ids))
    room = info.max_req_len - len(ids) - 1
    wanted = room if sampling.max_new_tokens is None else sampling.max_new_tokens
    seed = sampling.sampling_seed if sampling.sampling_seed is not None else default_seed
    return Request(
        rid=item.rid,
        prompt_ids=ids,
        sampling=sampling,
        max_new_tokens=max(min(wanted, room), 0),
        priority=item.priority if use_priority else 0,
        namespace=item.namespace,
        seed=secrets.randbits(64) if seed is None else seed % 2**64,
        logprobs=item.logprobs and _logprob_params(item.logprobs, len(ids), info.vocab_size),
        experts_from=item.experts_from,
    )


def _tokenize(text: str, tokenizer: Tokenizer, context: int, truncate: bool) -> list[int]:
    """The ids of a text, or enough of them to tell that it is too long."""
    return tokenizer.encode(_beginning(text, tokenizer, context, truncate))


def _tokenize_pair(
    item: Item, tokenizer: Tokenizer, info: EngineInfo, truncate: bool
) -> tuple[list[int], int | None]:
    """The ids of two texts, and how many come before those of the second one's type: None where
    the model knows one type only."""
    limits = tokenizer, info.context_length, truncate
    texts = [_beginning(text, *limits) for text in (item.text, item.second)]
    ids, num_first = tokenizer.encode_pair(*texts)
    return ids, num_first if info.encoder.num_token_types > 1 else None


def _beginning(text: str, tokenizer: Tokenizer, context: int, truncate: bool) -> str:
    """As much of a text as counts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("text must be Unicode text", param="text") from error
    beginning = tokenizer.beginning(text, context)
    if len(beginning) < len(text) and not truncate:
        raise RequestError(
            f"The text ({len(text)} characters) is longer than the model's context length "
            f"({context} tokens): its first {len(beginning)} characters alone have more tokens.",
            param="text",
        )
    return beginning


def samples_of(request: Request, count: int) -> list[Request]:
    """So many requests from one, each with an id and a seed of its own."""
    if count == 1:
        return [request]
    return [
        msgspec.structs.replace(request, rid=uuid.uuid4().hex, seed=(request.seed + i) % 2**64)
        for i in range(count)
    ]


def _logprob_params(options: LogprobOptions, num_tokens: int, vocab_size: int) -> LogprobParams:
    _check_vocabulary(options.token_ids, "token_ids_logprob", vocab_size)
    start = num_tokens if options.start < 0 else options.start
    if start > num_tokens:
        raise RequestError(
            f"req.logprob_start_len={start} is higher than the number of input tokens {num_tokens}."
            " Request with a lower logprob_start_len.",
            param="logprob_start_len",
        )
    return LogprobParams(start, options.top_num, options.token_ids)


def _experts_from(body: Mapping[str, Any]) -> int | None:
    is_wanted = flag(body, "return_routed_experts")
    start = integer(body, "routed_experts_start_len", 0)
    if start < 0:
        raise RequestError(
            f"routed_experts_start_len must not be negative, got {start}",
            param="routed_experts_start_len",
        )
    return start if is_wanted else None


def _check_experts(start: int | None, info: EngineInfo, num_tokens: int) -> None:
    if start is None:
        return
    if info.experts is None:
        raise RequestError(
            f"return_routed_experts: {info.architecture} has no experts",
            param="return_routed_experts",
        )
    if start > num_tokens:
        raise RequestError(
            f"routed_experts_start_len={start} is higher than the number of input tokens "
            f"{num_tokens}",
            param="routed_experts_start_len",
        )


def _check_bias(sampling: SamplingParams, vocab_size: int) -> None:
    for token in sampling.logit_bias:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"logit_bias must has keys in [0, {vocab_size - 1}], got {token}.",
                param="logit_bias",
            )


def longest_prompt(info: EngineInfo) -> int:
    """Tokens of a prompt; all that the model has positions for, where none follows it."""
    return max(info.max_req_len - RESERVED, 1) if info.encoder is None else info.context_length


def _fit(
    ids: list[int], name: str, asked: int | None, info: EngineInfo, truncate: bool
) -> list[int]:
    context, longest = info.context_length, longest_prompt(info)
    if truncate and len(ids) > longest and info.encoder is not None:
        return [*ids[: longest - 1], ids[-1]]  # the token that ends a text ends what is left of it
    if truncate:
        return ids[:longest]
    if len(ids) > longest and len(ids) >= context:
        raise RequestError(
            f"The input ({len(ids)} tokens) is longer than the model's context length "
            f"({context} tokens).",
            param=name,
        )
    if len(ids) > longest:
        raise RequestError(
            f"Input length ({len(ids)} tokens) exceeds the maximum allowed length "
            f"({longest} tokens). Use a shorter input or enable --allow-auto-truncate.",
            param=name,
        )
    total = len(ids) + (asked or 0)
    if total > context:
        raise RequestError(
            f"Requested token count exceeds the model's maximum context length of {context} "
            f"tokens. You requested a total of {total} tokens: {len(ids)} tokens from the "
            f"input messages and {asked} tokens for the completion. "
            "Please ask for fewer tokens or shorten the input.",
            param="max_new_tokens",
        )
    return ids


def _check_vocabulary(ids, name: str, vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"{name}: out-of-vocabulary token id {token}; valid range is [0, {vocab_size})",
                param=name,
            )


def _prompts(body: Mapping[str, Any]) -> tuple[list, list, bool]:
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


def _spread(given: Any, count: int, is_batch: bool) -> list[Any]:
    if isinstance(given, list):
        if not is_batch or len(given) != count:
            raise RequestError(
                f"{len(given)} sampling_params for {count} prompts", param="sampling_params"
            )
        return given
    return [given] * count


def _merge(preferred: Mapping[str, Any] | None, given: Any) -> Any:
    own = {} if given is None else given
    return {**preferred, **own} if preferred and isinstance(own, Mapping) else own


def _num_samples(parameters: list[Any]) -> int:
    """The `n` of all prompts, which must be the same; counted before anything is made of it."""
    counts = [p.get("n") or 1 for p in parameters if isinstance(p, Mapping)] or [1]
    count = counts[0]
    if counts.count(count) < len(counts):
        raise RequestError(
            "The parallel_sample_num should be the same for all samples in sample params.",
            param="n",
        )
    if type(count) is not int or not 1 <= count <= MOST_SAMPLES:
        raise RequestError(
            f"n must be an integer from 1 to {MOST_SAMPLES}, got {count!r}.", param="n"
        )
    return count


def _rids(given: Any, count: int, is_batch: bool) -> list[str]:
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


def _priority(body: Mapping[str, Any]) -> int:
    value = body.get("priority")
    if value is not None and (type(value) is not int or abs(value) >= 2**31):
        raise RequestError(f"priority must be a 32-bit integer, got {value!r}", param="priority")
    return value or 0


def _namespace(body: Mapping[str, Any]) -> str:
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
