"""The engine without its transport: messages in, steps, news out. One thread calls it.

`engine_builder` makes one from a configuration.
"""

import logging
from collections.abc import Callable
from typing import Any

from jaxserve.messages import (
    AbortRequest,
    AddRequest,
    Call,
    EngineInfo,
    Reply,
    StepOutput,
    ToEngine,
)
from jaxserve.plan_builder import PlanBuilder
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.runner import Runner
from jaxserve.scheduler import Scheduler
from jaxserve.step_log import StepLog
from jaxserve.stop_checker import StopChecker
from jaxserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class EngineCore:
    """A scheduler, whose decisions a runner executes."""

    def __init__(
        self,
        info: EngineInfo,
        scheduler: Scheduler,
        plan_builder: PlanBuilder,
        runner: Runner,
        tokenizer: Tokenizer | None,
        log: StepLog,
    ):
        self.info = info
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self._plan_builder, self._runner, self._log = plan_builder, runner, log
        self._eos_token_ids = frozenset(info.eos_token_ids)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def handle(self, message: ToEngine) -> list[Reply | StepOutput]:
        """Takes in one message; an unknown or impossible one is answered, never raised."""
        if isinstance(message, AddRequest):
            return self._add(message.request)
        if isinstance(message, AbortRequest):
            update = self.scheduler.abort(message.rid)
            return [StepOutput([update])] if update else []
        return [self._call(message)]

    def step(self) -> StepOutput | None:
        """Runs one step; None where there is nothing to do."""
        schedule = self.scheduler.schedule()
        if schedule is None:
            return None
        self._log.before(schedule)
        out = self._runner.execute(self._plan_builder.build(schedule))
        sampled = {
            chunk.running.row: int(token) if is_finite else None
            for chunk in schedule.chunks
            for token, is_finite in [out[chunk.running.row]]
        }
        return StepOutput(self.scheduler.update(schedule, sampled))

    def _add(self, request: Request) -> list[StepOutput]:
        try:
            self.scheduler.add(request, StopChecker(request, self._eos_token_ids, self.tokenizer))
        except ValueError as error:
            reason = FinishReason(
                "abort", message=str(error), status_code=400, err_type="BadRequestError"
            )
            return [StepOutput([RequestUpdate(request.rid, [], reason)])]
        return []

    def _call(self, call: Call) -> Reply:
        operations: dict[str, Callable[..., Any]] = {
            "flush_cache": self._flush_cache,
            "internal_state": self._internal_state,
        }
        operation = operations.get(call.operation)
        if operation is None:
            return Reply(call.call_id, error=f"unknown operation {call.operation!r}")
        try:
            return Reply(call.call_id, value=operation(**call.arguments))
        except Exception as error:
            logger.exception("%s failed", call.operation)
            return Reply(call.call_id, error=f"{type(error).__name__}: {error}")

    def _flush_cache(self) -> bool:
        """Nothing is cached beyond running requests yet, so idleness is all there is to check."""
        if self.has_work:
            logger.info(
                "Cache not flushed because there are pending requests. "
                "#queue-req: %d, #running-req: %d",
                len(self.scheduler.waiting),
                len(self.scheduler.running),
            )
            return False
        self.scheduler.check_integrity()
        logger.info("Cache flushed successfully!")
        return True

    def _internal_state(self) -> dict[str, Any]:
        scheduler = self.scheduler
        return {
            "last_gen_throughput": self._log.last_gen_throughput,
            "num_running_reqs": len(scheduler.running),
            "num_queue_reqs": len(scheduler.waiting),
            "num_used_tokens": scheduler.num_cached_tokens,
            "token_usage": self._log.token_usage,
            "effective_max_running_requests_per_dp": scheduler.max_rows,
            "memory_usage": {
                "weight": round(self.info.weight_bytes / 1e9, 2),
                "kvcache": round(self.info.kv_cache_bytes / 1e9, 2),
                "token_capacity": self.info.max_total_num_tokens,
            },
        }
