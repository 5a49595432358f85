"""Control operations that change what is served: they act between two steps of the engine.

New weights are loaded in a thread while steps go on. When they are complete, everything that is in
flight is read, and only then they take their places: no step mixes two versions.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import msgspec

from jaxserve.background import Done, Task
from jaxserve.errors import RequestError
from jaxserve.messages import Call, FromEngine, Reply, StepOutput
from jaxserve.request import FinishReason
from jaxserve.runner import Runner
from jaxserve.serving_state import ServingState
from jaxserve.weight_loader import LoadedUpdate, UpdateFailed, WeightLoader
from jaxserve.weight_placement import WeightsLost
from jaxserve.weight_request import WeightUpdate

if TYPE_CHECKING:
    from jaxserve.engine_core import EngineCore

logger = logging.getLogger(__name__)
SUCCEEDED = "Succeeded to update model weights."
ROLLED_BACK = "Rolling back to original weights."


@dataclasses.dataclass(frozen=True)
class _Update:
    """New weights that are being loaded, or wait for what runs."""

    call_id: int
    request: WeightUpdate
    task: Task | Done  # gives a LoadedUpdate


class WeightControl:
    def __init__(
        self,
        engine: "EngineCore",
        runner: Runner,
        loader: WeightLoader,
        state: ServingState,
    ):
        self.state = state
        self.last_update: dict[str, Any] | None = None
        self._engine, self._runner, self._loader = engine, runner, loader
        self._update: _Update | None = None
        self._reads: dict[int, Task] = {}  # of the weights, by the call that asks for each
        self._missing: frozenset[str] = frozenset()  # tensors whose values are gone
        self._operations: dict[str, Callable[..., list[FromEngine]]] = {
            "update_weights": self._start_update,
            "swap_weights": self._start_swap,
            "update_weight_version": self._change_version,
            "pause_generation": self._pause,
            "continue_generation": self._continue,
        }

    @property
    def may_generate(self) -> bool:
        return not self.state.is_paused and self.state.refusal is None

    @property
    def is_busy(self) -> bool:
        """Something is under way that `settle` has to finish."""
        return self._update is not None or bool(self._reads)

    @property
    def is_due(self) -> bool:
        """And can be finished, unless it waits for requests that run."""
        if self._reads:
            return any(task.is_done for task in self._reads.values())
        return self._update is not None and self._update.task.is_done

    def handles(self, call: Call) -> bool:
        return call.operation in self._operations

    def handle(self, call: Call) -> list[FromEngine]:
        """What is to be told at once; of an operation that takes its time, `settle` tells more.

        Raises:
          RequestError: it cannot be done.
        """
        return self._operations[call.operation](call.call_id, **call.arguments)

    def settle(self) -> list[FromEngine]:
        """To be called between two steps: finishes what can be, and tells it."""
        news: list[FromEngine] = []
        for call_id, task in list(self._reads.items()):
            if task.is_done:
                del self._reads[call_id]
                news.append(_reply_of(call_id, task))
        if self._update is not None:
            news += self._settle_update(self._update)
        return news

    def report(self) -> dict[str, Any]:
        """For /server_info."""
        return {
            "weight_reload": self._loader.way,
            "is_updating": self._update is not None,
            "last_update": self.last_update,
        }

    # New weights.

    def _start_update(self, call_id: int, **fields: Any) -> list[FromEngine]:
        request = WeightUpdate(**fields)
        self._check_startable()
        free = self._loader.free_device_bytes() / 1e9
        logger.info("Start update_weights. Load format=%s", request.load_format)
        logger.info("Update engine weights online from disk begin. avail mem=%.2f GB", free)
        task = Task(
            "jaxserve-weights",
            lambda task: self._loader.load(request, self._runner, task.report),
        )
        self._update = _Update(call_id, request, task)
        return []

    def _start_swap(
        self, call_id: int, leaves: Mapping[int, jax.Array], **fields: Any
    ) -> list[FromEngine]:
        """All leaves of the model, by a caller in this process that has them on the device."""
        self._check_startable()
        self._update = _Update(call_id, WeightUpdate(**fields), Done(self._loader.take(leaves)))
        return []

    def _check_startable(self) -> None:
        if self._update is not None:
            raise UpdateFailed("Another update of the weights is under way.", status=409)

    def _settle_update(self, update: _Update) -> list[FromEngine]:
        scheduler = self._engine.scheduler
        if not update.task.is_done and update.task.idle_seconds < self._loader.timeout:
            return []
        try:
            loaded = self._loaded(update)
            if self._reads:
                return []  # they hold the old weights
            # Where generation is paused, nobody will finish: who is in a row goes on in place.
            if update.request.in_flight == "wait" and self.may_generate:
                scheduler.hold()
                if not scheduler.is_quiet:
                    return []
            loaded.check(self._runner)
        except UpdateFailed as error:
            self._update = None
            scheduler.release()
            logger.error("%s", error)
            return [Reply(update.call_id, error=str(error), status=error.status)]
        self._update = None
        try:
            return self._commit(update, loaded)
        finally:
            loaded.close()
            scheduler.release()

    def _loaded(self, update: _Update) -> LoadedUpdate:
        """Raises UpdateFailed."""
        if not update.task.is_done:
            update.task.give_up()
            raise UpdateFailed(
                f"Failed to update weights: no byte was read for {self._loader.timeout:g} s "
                f"(--weight-load-timeout).\n{ROLLED_BACK}"
            )
        try:
            return update.task.result()
        except UpdateFailed:
            raise
        except Exception as error:
            logger.exception("new weights could not be loaded")
            words = f"Failed to update weights: {type(error).__name__}: {error}.\n{ROLLED_BACK}"
            raise UpdateFailed(words, status=500) from error

    def _commit(self, update: _Update, loaded: LoadedUpdate) -> list[FromEngine]:
        scheduler, request = self._engine.scheduler, update.request
        began = time.perf_counter()
        news = self._engine.drain()
        num_paused = 0 if request.in_flight == "abort" else len(scheduler.running)
        if request.in_flight == "abort":
            news.append(StepOutput(scheduler.abort_all()))
        elif request.in_flight == "retract":
            scheduler.retract_all()
        try:
            self._engine.change_weights(loaded.commit, loaded.folder)
        except WeightsLost as error:
            return news + self._lose(update, error)
        self._missing -= loaded.names
        seconds = time.perf_counter() - began
        logger.info(
            "Update weights end. %.2f GB in %.2f s, %.1f ms between two steps, %s.",
            loaded.num_bytes / 1e9,
            loaded.seconds,
            seconds * 1e3,
            "checksums verified" if loaded.is_checksummed else "no checksums beside them",
        )
        logger.info("Cache flushed successfully!")
        if loaded.zeros:
            logger.warning("these tensors are all zeros: %s", ", ".join(loaded.zeros[:8]))
        return news + self._announce(update, loaded, num_paused, seconds)

    def _announce(
        self, update: _Update, loaded: LoadedUpdate, num_paused: int, seconds: float
    ) -> list[FromEngine]:
        request, state = update.request, self.state
        changes: dict[str, Any] = {"num_updates": state.num_updates + 1, "fault": self._fault()}
        if request.model_path is not None:
            changes |= {"model_path": request.model_path, "model_name": request.model_path}
        if request.weight_version is not None:
            changes["weight_version"] = request.weight_version
        if request.keep_pause:
            changes["is_paused"] = True
        self.last_update = {
            "num_bytes": loaded.num_bytes,
            "load_seconds": loaded.seconds,
            "pause_seconds": seconds,
            "is_checksummed": loaded.is_checksummed,
            "all_zero_tensors": loaded.zeros,
        }
        message = SUCCEEDED
        if request.weight_version is not None:
            message += f" Weight version updated to {request.weight_version}."
        answer = {"success": True, "message": message, "num_paused_requests": num_paused}
        return [self._change(**changes), Reply(update.call_id, answer)]

    def _lose(self, update: _Update, error: WeightsLost) -> list[FromEngine]:
        """Nothing can be generated until all weights have been sent again."""
        words = f"Failed to update weights, and the old ones are overwritten: {error}."
        logger.error("%s", words)
        self._missing = self._loader.tensor_names
        reason = FinishReason(
            "abort", message=words, status_code=500, err_type="InternalServerError"
        )
        aborted = self._engine.scheduler.abort_all(reason)
        self._engine.scheduler.change_weights()
        return [
            StepOutput(aborted),
            self._change(fault=self._fault()),
            Reply(update.call_id, error=words, status=500),
        ]

    def _fault(self) -> str | None:
        if not self._missing:
            return None
        return (
            f"the weights are not complete, {len(self._missing)} tensors are to be sent: "
            "POST /update_weights_from_disk or /update_weights_from_tensor"
        )

    def _change_version(
        self, call_id: int, new_version: str, abort_all_requests: bool
    ) -> list[FromEngine]:
        news = self._engine.drain()
        if abort_all_requests:
            news.append(StepOutput(self._engine.scheduler.abort_all()))
        answer = {
            "success": True,
            "message": f"Weight version updated to {new_version}",
            "new_version": new_version,
        }
        return [*news, self._change(weight_version=new_version), Reply(call_id, answer)]

    # Whether anything is generated.

    def _pause(self, call_id: int, mode: str) -> list[FromEngine]:
        news = self._engine.drain()
        if mode == "abort":
            news.append(StepOutput(self._engine.scheduler.abort_all()))
        elif mode == "retract":
            self._engine.scheduler.retract_all(keep=True)
        return [*news, self._change(is_paused=True), Reply(call_id)]

    def _continue(self, call_id: int) -> list[FromEngine]:
        return [self._change(is_paused=False), Reply(call_id)]

    def _change(self, **changes: Any) -> ServingState:
        self.state = msgspec.structs.replace(self.state, **changes)
        return self.state


def _reply_of(call_id: int, task: Task) -> Reply:
    try:
        return Reply(call_id, task.result())
    except RequestError as error:
        return Reply(call_id, error=str(error), status=error.status)
    except Exception as error:
        logger.exception("reading the weights failed")
        return Reply(call_id, error=f"{type(error).__name__}: {error}")
