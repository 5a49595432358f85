"""Which implementation of an operation runs: the first that can, or the one that was asked for."""

from collections.abc import Callable, Mapping
from typing import Any


def first_that_can(
    implementations: Mapping[str, Callable[..., Any]], chosen: str | None, *args: Any, **kwargs: Any
) -> Any:
    """Calls `chosen`, or else each implementation in order until one does not decline.

    An implementation declines a case it cannot do with `NotImplementedError`; any other exception
    is the caller's mistake and passes through.

    Raises:
      ValueError: `chosen` is not one of the names.
      NotImplementedError: every implementation declined; the message has each one's reason.
    """
    if chosen is not None:
        if chosen not in implementations:
            raise ValueError(f"implementation={chosen!r}: choose from {sorted(implementations)}")
        return implementations[chosen](*args, **kwargs)
    reasons = []
    for name, implementation in implementations.items():
        try:
            return implementation(*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError("; ".join(reasons))
