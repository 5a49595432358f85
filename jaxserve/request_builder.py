"""From a prompt as its caller has sent it to a request of the engine: ids within all limits."""

import secrets
import uuid

import msgspec

from jaxserve.errors import RequestError
from jaxserve.logprob_options import LogprobOptions
from jaxserve.messages import EngineInfo
from jaxserve.prompt_items import Item
from jaxserve.request import LogprobParams, Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer import Tokenizer

RESERVED = 5  # tokens of the context that a prompt may not take, as SGLang keeps them


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
