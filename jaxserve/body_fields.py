"""Fields of a request's body, checked. No jax: both sides of the socket read bodies."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError


def as_object(body: Any) -> Mapping[str, Any]:
    """Raises RequestError where it is none."""
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object")
    return body


def refuse_unserved(body: Mapping[str, Any], neutral: Mapping[str, Sequence[Any]]) -> None:
    """Raises RequestError for a field of those in `neutral` that asks for something: that is
    neither null nor one of the values there."""
    for name, values in neutral.items():
        if body.get(name) is not None and body[name] not in values:
            raise RequestError(f"{name} is not supported by this server yet", param=name)


def as_flag(name: str, value: Any) -> bool:
    """Raises RequestError, which names the field; so do all that follow."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be a boolean, got {value!r}", param=name)
    return value


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    return default if value is None else as_flag(name, value)


def integer(body: Mapping[str, Any], name: str, default: int) -> int:
    """Of 64 bits."""
    value = body.get(name)
    if value is not None and (type(value) is not int or abs(value) >= 2**63):
        raise RequestError(f"{name} must be an integer, got {value!r}", param=name)
    return default if value is None else value


def text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{name} must be a string, got {value!r}", param=name)
    return value


def texts(body: Mapping[str, Any], name: str) -> list[str]:
    """Of a list, or of one."""
    value = body.get(name)
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise RequestError(f"{name} must be a list of strings", param=name)
    return values
