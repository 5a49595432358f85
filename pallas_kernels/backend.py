"""Which implementation of an operation runs: the first of those named that can."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def first_that_can(
    candidates: Mapping[str, Callable[..., Any]], names: Sequence[str], *args: Any, **kwargs: Any
) -> tuple[str, Any]:
    """Calls the named candidates in order until one does not decline.

    A candidate declines a case it cannot do with `NotImplementedError`; any other exception is the
    caller's mistake and passes through.

    Returns:
      The name of the one that did it, and its result.

    Raises:
      ValueError: a name is not one of the candidates.
      NotImplementedError: every one declined; the message has each one's reason.
    """
    reasons = []
    for name in names:
        if name not in candidates:
            raise ValueError(f"implementation={name!r}: choose from {sorted(candidates)}")
        try:
            return name, candidates[name](*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError("; ".join(reasons))
