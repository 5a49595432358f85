"""What the body of /generate says of logprobs, for each prompt."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.body_fields import as_flag
from jaxserve.errors import RequestError
from jaxserve.request import MOST_LOGPROB_IDS, MOST_TOP_LOGPROBS

FIELDS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob")


@dataclasses.dataclass(frozen=True)
class LogprobOptions:
    """Of one prompt that asks for logprobs."""

    start: int  # first prompt position that is told of; -1 for none
    top_num: int
    token_ids: tuple[int, ...]


def logprob_options(
    body: Mapping[str, Any], count: int, *, is_batch: bool, num_samples: int
) -> list[LogprobOptions | None]:
    """One for each of `count` prompts, None for those that ask for no logprobs.

    Raises:
      RequestError: names the field.
    """
    if num_samples > 1:
        for name in FIELDS:
            value = body.get(name)
            if isinstance(value, list) and (name != "token_ids_logprob" or _is_nested(value)):
                raise RequestError(
                    f"Cannot use list {name} with parallel_sample_num > 1", param=name
                )
    wanted = _spread(body, "return_logprob", False, as_flag, count, is_batch)
    starts = _spread(body, "logprob_start_len", -1, _as_start, count, is_batch)
    tops = _spread(body, "top_logprobs_num", 0, _as_top_num, count, is_batch)
    ids = _token_ids(body.get("token_ids_logprob"), count, is_batch)
    return [LogprobOptions(starts[i], tops[i], ids[i]) if wanted[i] else None for i in range(count)]


def _spread(
    body: Mapping[str, Any],
    name: str,
    default: Any,
    check: Callable[[str, Any], Any],
    count: int,
    is_batch: bool,
) -> list[Any]:
    """A field's value for every prompt: one for all, or a list of as many."""
    value = body.get(name)
    if not isinstance(value, list):
        return [default if value is None else check(name, value)] * count
    if not is_batch or len(value) != count:
        raise RequestError(f"{len(value)} values of {name} for {count} prompts", param=name)
    return [default if one is None else check(name, one) for one in value]


def _as_start(name: str, value: Any) -> int:
    if type(value) is not int or not -1 <= value < 2**31:
        raise RequestError(f"{name} must be an integer from -1 up, got {value!r}", param=name)
    return value


def _as_top_num(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_TOP_LOGPROBS:
        raise RequestError(
            f"{name} must be an integer from 0 to {MOST_TOP_LOGPROBS}, got {value!r}", param=name
        )
    return value


def _token_ids(value: Any, count: int, is_batch: bool) -> list[tuple[int, ...]]:
    """A flat list is for every prompt, a list of lists for one each."""
    name = "token_ids_logprob"
    if value is None:
        return [()] * count
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a flat list of integers.", param=name)
    if not (is_batch and _is_nested(value)):
        return [_as_ids(value)] * count
    if len(value) != count:
        raise RequestError(f"{len(value)} lists of {name} for {count} prompts", param=name)
    return [() if ids is None else _as_ids(ids) for ids in value]


def _is_nested(value: list[Any]) -> bool:
    return any(ids is None or isinstance(ids, list) for ids in value)


def _as_ids(ids: Any) -> tuple[int, ...]:
    name = "token_ids_logprob"
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise RequestError(f"{name} must be a flat list of integers.", param=name)
    if len(ids) > MOST_LOGPROB_IDS:
        raise RequestError(
            f"at most {MOST_LOGPROB_IDS} ids in {name} are allowed, got {len(ids)}", param=name
        )
    return tuple(ids)
