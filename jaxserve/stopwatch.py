"""What the parts of a start took."""

import contextlib
from collections.abc import Callable, Iterator


class Stopwatch:
    """Seconds by name. Parts may overlap, and be timed by several threads."""

    def __init__(self, clock: Callable[[], float]):
        self.seconds: dict[str, float] = {}
        self._clock, self._began = clock, clock()

    @property
    def total(self) -> float:
        """Since it was made."""
        return self._clock() - self._began

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self.seconds[name] = self._clock() - began
