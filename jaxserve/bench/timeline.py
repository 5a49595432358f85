"""One request as its client saw it."""

import dataclasses
import itertools


@dataclasses.dataclass
class Timeline:
    """All times are seconds of one monotonic clock."""

    asked_tokens: int
    due: float  # when it arrived; it is sent later where the load is limited
    sent: float = 0.0
    # When tokens came, and how many there were by then. Two events at one time are one.
    events: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    def record(self, time: float, num_tokens: int) -> None:
        """An event that says `num_tokens` in all; one without news is none."""
        if num_tokens <= self.num_tokens:
            return
        if self.events and self.events[-1][0] == time:
            self.events.pop()
        self.events.append((time, num_tokens))

    @property
    def num_tokens(self) -> int:
        return self.events[-1][1] if self.events else 0

    @property
    def is_complete(self) -> bool:
        return self.error is None and bool(self.events)

    @property
    def finished(self) -> float:
        return self.events[-1][0]

    @property
    def latency(self) -> float:
        """Seconds from sending to the last token."""
        return self.finished - self.sent

    @property
    def time_to_first_token(self) -> float:
        return self.events[0][0] - self.sent

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds per token after the first event; None where all came with it."""
        (began, first), (ended, last) = self.events[0], self.events[-1]
        return (ended - began) / (last - first) if last > first else None

    @property
    def inter_token_latencies(self) -> list[float]:
        """One per token after the first event: the tokens of an event share the time since the
        event before evenly."""
        gaps: list[float] = []
        for (before, had), (now, have) in itertools.pairwise(self.events):
            gaps += [(now - before) / (have - had)] * (have - had)
        return gaps
