"""How much memory an admitted request is expected to need, as SGLang estimates it."""

from collections.abc import Iterable

from jaxserve.live_request import LiveRequest

FIRST_RATIO, LEAST_SHARE, DECAY_STEPS = 0.7, 0.14, 600
RETRACT_STEPS = 20  # decode steps that a retraction should buy
MOST_COUNTED = 4096  # new tokens of one request that an admission reckons with


class OutputEstimate:
    """The share of its `max_new_tokens` that a request is expected to produce. It falls while all
    goes well, so that more are admitted, and rises when a request had to be retracted.

    Args:
      conservativeness: above 1 admits fewer requests, below 1 more.
    """

    def __init__(self, conservativeness: float):
        self._first = min(FIRST_RATIO * conservativeness, 1.0)
        self._least = self._first * LEAST_SHARE
        self._decay = (self._first - self._least) / DECAY_STEPS
        self.ratio = self._first

    def on_decode(self) -> None:
        self.ratio = max(self.ratio - self._decay, self._least)

    def on_retract(self, left: Iterable[LiveRequest]) -> None:
        left = list(left)
        produced = sum(live.num_output for live in left) + RETRACT_STEPS * len(left)
        limit = sum(live.request.max_new_tokens for live in left)
        self.ratio = min(produced / limit, 1.0) if limit else self._first

    def on_idle(self) -> None:
        self.ratio = self._first

    def tokens_to_come(self, live: LiveRequest) -> int:
        return int(min(max(live.num_left, 0), MOST_COUNTED) * self.ratio)
