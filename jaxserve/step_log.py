"""The two log lines that tell how an engine is doing: one per prefill step, one every so many
decode steps. Their words are SGLang's; scripts read them."""

import logging
from collections.abc import Callable

from jaxserve.live_request import Schedule
from jaxserve.scheduler import Scheduler

logger = logging.getLogger(__name__)


class StepLog:
    def __init__(self, scheduler: Scheduler, interval: int, clock: Callable[[], float]):
        self._scheduler, self._interval, self._clock = scheduler, interval, clock
        self._decode_steps = self._tokens = 0
        self._since = self._idle_since = clock()
        self._is_idle = True
        self.last_gen_throughput = 0.0  # tokens per second, while there was work

    def before(self, schedule: Schedule) -> None:
        """To be called with a step about to run."""
        if self._is_idle:  # as if that time had not been
            self._since += self._clock() - self._idle_since
            self._is_idle = False
        new_tokens = schedule.num_prompt_tokens
        if new_tokens:
            num_new = sum(bool(chunk.tokens) for chunk in schedule.chunks)
            logger.info(
                "Prefill batch. #new-seq: %d, #new-token: %d, #cached-token: %d, "
                "token usage: %.2f, #running-req: %d, #queue-req: %d",
                num_new,
                new_tokens,
                schedule.num_cached_tokens,
                self.token_usage,
                len(self._scheduler.running) - num_new,
                len(self._scheduler.waiting),
            )
        decoded = sum(chunk.num_samples for chunk in schedule.chunks if not chunk.tokens)
        if decoded:
            self._count(decoded)

    def on_idle(self) -> None:
        """To be called when nothing is left to run."""
        if not self._is_idle:
            self._is_idle, self._idle_since = True, self._clock()

    @property
    def token_usage(self) -> float:
        allocator = self._scheduler.allocator
        return allocator.num_used / (allocator.num_pages - 1)

    def _count(self, decoded: int) -> None:
        self._decode_steps += 1
        self._tokens += decoded
        if self._decode_steps % self._interval:
            return
        now = self._clock()
        self.last_gen_throughput = self._tokens / max(now - self._since, 1e-9)
        self._since, self._tokens = now, 0
        logger.info(
            "Decode batch. #running-req: %d, #token: %d, token usage: %.2f, "
            "gen throughput (token/s): %.2f, #queue-req: %d",
            len(self._scheduler.running),
            self._scheduler.num_tokens_in_rows,
            self.token_usage,
            self.last_gen_throughput,
            len(self._scheduler.waiting),
        )
