"""The engine without its transport: messages in, steps, news out. One thread calls it.

`engine_builder` makes one from a configuration.
"""

import collections
import gc
import logging
from collections.abc import Callable
from typing import Any

import jax

from jaxserve.compile_counter import CompileCounter
from jaxserve.errors import EngineDied, RequestError
from jaxserve.expert_recorder import ExpertRecorder
from jaxserve.live_request import LiveRequest, Schedule
from jaxserve.messages import (
    AbortRequest,
    AddRequest,
    Call,
    EngineInfo,
    FromEngine,
    Reply,
    StepNews,
    ToEngine,
)
from jaxserve.plan_builder import PlanBuilder
from jaxserve.plan_recorder import PlanRecorder
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.runner import Runner
from jaxserve.scheduler import Scheduler
from jaxserve.served_weights import ServedWeights
from jaxserve.serving_control import ServingControl
from jaxserve.serving_state import ServingState
from jaxserve.step_log import StepLog
from jaxserve.stop_checker import StopChecker
from jaxserve.tokenizer import Tokenizer
from jaxserve.weight_loader import WeightLoader

logger = logging.getLogger(__name__)
RUN_AHEAD = 1  # steps that are dispatched before the one before them is read
MOST_FAILURES = 3  # between which the oldest request gets no token: then the engine gives up
BUSY_POLL_SECONDS, IDLE_POLL_SECONDS = 0.02, 1.0


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
        loader: WeightLoader,
        served_weights: ServedWeights,
        state: ServingState,
        compile_counter: CompileCounter,
        recorder: PlanRecorder | None = None,
        experts: ExpertRecorder | None = None,
    ):
        self.info = info
        self.abstract_params = served_weights.abstract  # their shapes
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self._plan_builder, self._runner, self._log = plan_builder, runner, log
        self.experts = experts
        self._control = ServingControl(self, runner, loader, served_weights, state)
        self._compile_counter, self._recorder = compile_counter, recorder
        self._eos_token_ids = frozenset(info.eos_token_ids)
        self._inflight: collections.deque[tuple[Schedule, Any]] = collections.deque()
        self._is_state_lost = False  # a step has failed, and there is no new state yet
        self._num_failures = 0  # in a row
        self._failed_at: tuple[LiveRequest | None, int] | None = None  # as `_count_failure` says

    @property
    def has_work(self) -> bool:
        return bool(self._inflight) or (self._control.may_generate and not self.scheduler.is_quiet)

    @property
    def patience(self) -> float:
        """Seconds that the loop may wait for a message before it calls `settle` and `step`."""
        if self.has_work or self._control.is_due:
            return 0.0
        return BUSY_POLL_SECONDS if self._control.is_busy else IDLE_POLL_SECONDS

    def handle(self, message: ToEngine) -> list[FromEngine]:
        """Takes in one message; an unknown or impossible one is answered, never raised."""
        if isinstance(message, AddRequest):
            return self._add(message.request)
        if isinstance(message, AbortRequest):
            update = self.scheduler.abort(message.rid)
            self._note_idle()
            return [StepNews([update])] if update else []
        return self._call(message)

    @property
    def weights(self) -> tuple[jax.Array | None, ...]:
        """The leaves of the parameters; safe to read from any thread."""
        return self._runner.weights

    @property
    def weight_specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return self._runner.weight_specs

    def settle(self) -> list[FromEngine]:
        """What control operations that take their time have come to; between two steps."""
        return self._control.settle()

    def drain(self) -> list[FromEngine]:
        """Reads every step in flight, and returns their news: then all is known, and nothing of
        the device is in use."""
        outputs: list[FromEngine] = []
        while self._inflight:
            try:
                outputs.append(StepNews(self._read()))
                continue
            except Exception as error:
                self._count_failure(error)
            self._start_over()
        return outputs

    def step(self) -> StepNews | None:
        """Dispatches a step, then reads the one before: the device is never kept waiting. Returns
        the news, None where there is nothing to do.

        A failed step takes the donated state with it: everybody is computed anew, and no request
        is lost.

        Raises:
          EngineDied: steps fail again and again.
        """
        try:
            return self._step()
        except Exception as error:
            self._count_failure(error)
        self._start_over()
        return StepNews([])

    def _step(self) -> StepNews | None:
        if self._is_state_lost:
            self._runner.reset()
            self._is_state_lost = False
        is_dispatched = self._dispatch()
        if not self._inflight:
            return None
        if is_dispatched and len(self._inflight) <= RUN_AHEAD:
            return StepNews([])
        output = StepNews(self._read())
        self._note_idle()
        return output

    def _note_idle(self) -> None:
        if not self.has_work:
            self._log.on_idle()

    def change_weights(self, put: Callable[[Runner], None], folder: str | None = None) -> None:
        """To be called with no step in flight: `put` gives the runner other weights. What the old
        ones have computed is matched no more.

        Args:
          folder: that has them, for a replay; None where no folder does.
        """
        put(self._runner)
        self.scheduler.change_weights()
        if self._recorder is not None:
            self._recorder.change_weights(folder)

    def release_weights(self) -> None:
        """Gives their memory back, with no step in flight. Nothing is dispatched before others are
        there, of which `change_weights` tells the recorder."""
        self._runner.release_weights()
        self.scheduler.change_weights()

    def release_state(self) -> None:
        """Gives the KV cache's memory back; nothing is dispatched before `restore_state`. With no
        step in flight. Who is in a row is computed anew later."""
        self.scheduler.retract_all()
        self._runner.release_state()
        self._is_state_lost = False  # `restore_state` makes the next one

    def restore_state(self) -> None:
        self._plan_builder.reset()
        self._runner.reset()
        if self._recorder is not None:
            self._recorder.reset()

    def _dispatch(self) -> bool:
        schedule = self.scheduler.schedule() if self._control.may_generate else None
        if schedule is None:
            return False
        self._log.before(schedule)
        is_recording = self.experts is not None and self.experts.is_on
        plan = self._plan_builder.build(schedule, wants_experts=is_recording)
        if self._recorder is not None:
            self._recorder.dispatch(plan)
        fresh = self._runner.dispatch(plan)
        self._inflight.append((schedule, fresh))
        return True

    def _read(self) -> list[RequestUpdate]:
        schedule, fresh = self._inflight.popleft()
        result = self._runner.read(fresh)
        if self._recorder is not None:
            taken = (chunk for chunk in schedule.chunks if chunk.num_samples and not chunk.is_stale)
            self._recorder.read([chunk.live.row for chunk in taken], result.drawn)
        news = self.scheduler.update(schedule, result)
        if self.experts is not None and self.experts.is_on:
            self.experts.take(schedule, result.expert_ids)
        return news

    def _count_failure(self, error: Exception) -> None:
        """Counts those between which the oldest request gets no token. Steps that succeed are not
        enough to begin anew: a prompt's chunks may, again and again, before the step that fails."""
        oldest = self.scheduler.oldest
        failed_at = oldest, oldest.num_output if oldest else 0
        self._num_failures = self._num_failures + 1 if failed_at == self._failed_at else 1
        self._failed_at = failed_at
        if self._num_failures >= MOST_FAILURES:
            raise EngineDied(
                f"the engine failed: {MOST_FAILURES} steps in a row did, the last one with "
                f"{type(error).__name__}: {error}"
            ) from error
        logger.exception("a step failed; every request is computed anew")

    def _start_over(self) -> None:
        """To be called where the failure is no longer handled: its traceback holds what the failed
        step has left on the device."""
        self._inflight.clear()
        self.scheduler.retract_all()
        self._plan_builder.reset()
        self._is_state_lost = True
        if self._recorder is not None:
            self._recorder.reset()

    def close(self) -> None:
        """Ends what it has beside itself. Any thread may call it, and more than once."""
        self._compile_counter.close()
        if self._recorder is not None:
            self._recorder.close()

    def release(self) -> None:
        """Frees the device's memory and the programs, from the thread that steps; none follows."""
        self._inflight.clear()
        self._runner.release()

    def _add(self, request: Request) -> list[FromEngine]:
        try:
            stop_checker = StopChecker(request, self._eos_token_ids, self.tokenizer)
        except Exception as error:  # the tokenizer's, of this prompt
            logger.exception("%s cannot be served", request.rid)
            reason = FinishReason.internal_error(f"{type(error).__name__}: {error}")
            return [StepNews([RequestUpdate(request.rid, [], reason)])]
        try:
            self.scheduler.add(request, stop_checker)
        except ValueError as error:
            status = error.status if isinstance(error, RequestError) else 400
            kind = "BadRequestError" if status < 500 else "ServiceUnavailableError"
            reason = FinishReason("abort", message=str(error), status_code=status, err_type=kind)
            return [StepNews([RequestUpdate(request.rid, [], reason)])]
        return []

    def _call(self, call: Call) -> list[FromEngine]:
        operations: dict[str, Callable[..., Any]] = {
            "flush_cache": self._flush_cache,
            "internal_state": self._internal_state,
            "freeze_gc": _freeze_gc,
        }
        operation = operations.get(call.operation)
        try:
            if self._control.handles(call):
                return self._control.handle(call)
            if operation is None:
                return [Reply(call.call_id, error=f"unknown operation {call.operation!r}")]
            return [Reply(call.call_id, value=operation(**call.arguments))]
        except RequestError as error:
            return [Reply(call.call_id, error=str(error), status=error.status)]
        except Exception as error:
            logger.exception("%s failed", call.operation)
            return [Reply(call.call_id, error=f"{type(error).__name__}: {error}")]

    def _flush_cache(self, is_last_try: bool = True) -> bool:
        if self.scheduler.flush():
            logger.info("Cache flushed successfully!")
            return True
        if is_last_try:
            logger.info(
                "Cache not flushed because there are pending requests. "
                "#queue-req: %d, #running-req: %d",
                len(self.scheduler.waiting),
                len(self.scheduler.running),
            )
        return False

    def _internal_state(self) -> dict[str, Any]:
        scheduler = self.scheduler
        return {
            "last_gen_throughput": self._log.last_gen_throughput,
            "num_running_reqs": len(scheduler.running),
            "num_queue_reqs": len(scheduler.waiting) + len(scheduler.held),
            "num_used_tokens": scheduler.num_tokens_in_rows,
            "num_waiting_tokens": scheduler.num_waiting_tokens,
            "num_retractions": scheduler.num_retractions,
            "token_usage": self._log.token_usage,
            **self._control.report(),
            **self._compile_counter.report(),
            "effective_max_running_requests_per_dp": scheduler.max_rows,
            "memory_usage": {
                "weight": round(self.info.weight_bytes / 1e9, 2),
                "kvcache": round(self.info.kv_cache_bytes / 1e9, 2),
                "token_capacity": self.info.max_total_num_tokens,
            },
        }


def _freeze_gc() -> None:
    gc.collect()
    gc.freeze()
