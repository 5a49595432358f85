"""Control operations that change what is served: they act between two steps of the engine.

New weights are loaded in a thread while steps go on. When they are complete, everything that is in
flight is read, and only then they take their places: no step mixes two versions.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

import jax
import msgspec

from jaxserve.answer_queue import AnswerQueue
from jaxserve.background import Done, Task
from jaxserve.errors import RequestError
from jaxserve.expert_recorder import ExpertRecorder
from jaxserve.messages import Call, FromEngine, Reply, StepNews
from jaxserve.pending_update import PendingUpdate, report
from jaxserve.request import FinishReason
from jaxserve.runner import Runner
from jaxserve.served_weights import ServedWeights
from jaxserve.serving_state import ServingState
from jaxserve.weight_loader import LoadedUpdate, UpdateFailed, WeightLoader
from jaxserve.weight_placement import WeightsLost
from jaxserve.weight_request import Memory, WeightUpdate

if TYPE_CHECKING:
    from jaxserve.engine_core import EngineCore

logger = logging.getLogger(__name__)


class ServingControl:
    def __init__(
        self,
        engine: "EngineCore",
        runner: Runner,
        loader: WeightLoader,
        served_weights: ServedWeights,
        state: ServingState,
    ):
        self.state = state
        self._engine, self._runner, self._loader = engine, runner, loader
        self._update: PendingUpdate | None = None
        self._last_update: dict[str, Any] | None = None
        self._served_weights = served_weights
        self._reads = AnswerQueue("reading the weights")  # each may copy a whole parameter
        self._dumps = AnswerQueue("writing a record of experts")
        self._missing: frozenset[str] = frozenset()  # tensors whose values are gone
        self._operations: dict[str, Callable[..., list[FromEngine]]] = {
            "update_weights": self._start_update,
            "swap_weights": self._start_swap,
            "update_weight_version": self._change_version,
            "read_tensor": self._read_tensor,
            "checksum": self._read_checksum,
            "pause_generation": self._pause,
            "continue_generation": self._continue,
            "release_memory": self._release_memory,
            "resume_memory": self._resume_memory,
            "start_expert_record": self._start_expert_record,
            "stop_expert_record": self._stop_expert_record,
            "dump_expert_record": self._dump_expert_record,
        }

    @property
    def may_generate(self) -> bool:
        return not self.state.is_paused and self.state.refusal is None

    @property
    def is_busy(self) -> bool:
        """Something is under way that `settle` has to finish."""
        return self._uses_weights or not self._dumps.is_empty

    @property
    def _uses_weights(self) -> bool:
        return self._update is not None or not self._reads.is_empty

    @property
    def is_due(self) -> bool:
        """And can be finished, unless it waits for requests that run."""
        if self._dumps.is_due:
            return True
        if self._reads.is_working:
            return self._reads.is_due
        return self._is_loaded

    @property
    def _is_loaded(self) -> bool:
        """New weights have been loaded, or will never be, and an update waits to take them over."""
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
        # New weights that are there wait for one read at most, however many are asked for.
        news: list[FromEngine] = [*self._reads.settle(may_start=not self._is_loaded)]
        news += self._dumps.settle()
        if self._update is not None:
            news += self._settle_update(self._update)
        return news

    def report(self) -> dict[str, Any]:
        """For /server_info."""
        return {
            "weight_reload": self._loader.way,
            "is_updating": self._update is not None,
            "last_update": self._last_update,
            "device_bytes_in_use": self._loader.device_bytes_in_use(),
        }

    # New weights.

    def _start_update(self, call_id: int, **fields: Any) -> list[FromEngine]:
        self._check_startable()
        request = WeightUpdate(**fields)
        source = "tensors" if request.is_partial else "disk"
        free = self._loader.free_device_bytes() / 1e9
        logger.info("Start update_weights. Load format=%s", request.load_format)
        logger.info("Update engine weights online from %s begin. avail mem=%.2f GB", source, free)
        task = Task(
            "jaxserve-weights", lambda task: self._loader.load(request, self._runner, task.report)
        )
        self._update = PendingUpdate(call_id, request, task)
        return []

    def _start_swap(
        self, call_id: int, leaves: Mapping[int, jax.Array], **fields: Any
    ) -> list[FromEngine]:
        """All leaves of the model, by a caller in this process that has them on the device."""
        self._check_startable()
        loaded = Done(self._loader.take(leaves))
        self._update = PendingUpdate(call_id, WeightUpdate(**fields), loaded)
        return []

    def _check_startable(self) -> None:
        if self._update is not None:
            raise UpdateFailed("Another update of the weights is under way.", status=409)
        if "weights" in self.state.released:
            raise UpdateFailed(
                "The memory of the weights is released: POST /resume_memory_occupation first."
            )

    def _settle_update(self, update: PendingUpdate) -> list[FromEngine]:
        scheduler = self._engine.scheduler
        try:
            loaded = update.loaded(self._loader.timeout)
            if loaded is None or self._reads.is_working:  # which holds the old weights
                return []
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

    def _commit(self, update: PendingUpdate, loaded: LoadedUpdate) -> list[FromEngine]:
        began = time.perf_counter()
        news, num_paused = update.interrupt(self._engine)
        try:
            self._engine.change_weights(loaded.commit, loaded.folder)
        except WeightsLost as error:
            return news + self._lose(update, error)
        self._missing -= loaded.names
        self._last_update = report(loaded, time.perf_counter() - began)
        state = self._change(**update.changes(self.state), fault=self._fault())
        return [*news, state, Reply(update.call_id, update.answer(num_paused))]

    def _lose(self, update: PendingUpdate, error: WeightsLost) -> list[FromEngine]:
        """Nothing can be generated until all weights have been sent again."""
        words = f"Failed to update weights, and the old ones are overwritten: {error}."
        logger.error("%s", words)
        self._missing = self._loader.tensor_names
        reason = FinishReason(
            "abort", message=words, status_code=500, err_type="InternalServerError"
        )
        aborted = StepNews(self._engine.scheduler.abort_all(reason))
        self._engine.scheduler.change_weights()
        state = self._change(fault=self._fault())
        return [aborted, state, Reply(update.call_id, error=words, status=500)]

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
            news.append(StepNews(self._engine.scheduler.abort_all()))
        answer = {
            "success": True,
            "message": f"Weight version updated to {new_version}",
            "new_version": new_version,
        }
        return [*news, self._change(weight_version=new_version), Reply(call_id, answer)]

    # Reading the weights, beside the steps.

    def _read_tensor(self, call_id: int, name: str, most_rows: int) -> list[FromEngine]:
        self._reads.add(call_id, lambda: self._served_weights.read_tensor(name, most_rows))
        return []

    def _read_checksum(self, call_id: int) -> list[FromEngine]:
        self._reads.add(call_id, self._served_weights.checksum)
        return []

    # Which experts are taken: by steps that are dispatched from start to stop, and all of those.

    def _start_expert_record(self, call_id: int) -> list[FromEngine]:
        recorder, news = self._expert_recorder(), self._engine.drain()
        recorder.start()
        return [*news, Reply(call_id)]

    def _stop_expert_record(self, call_id: int) -> list[FromEngine]:
        recorder, news = self._expert_recorder(), self._engine.drain()
        recorder.stop()
        return [*news, Reply(call_id)]

    def _dump_expert_record(self, call_id: int) -> list[FromEngine]:
        """The file may be large: it is written beside the steps."""
        recorder = self._expert_recorder()
        self._dumps.check_room()  # before anything is drained, which must be told
        news, write = self._engine.drain(), recorder.dump()
        self._dumps.add(call_id, lambda: str(write()))
        return news

    def _expert_recorder(self) -> ExpertRecorder:
        if self._engine.experts is None:
            raise RequestError(f"{self._engine.info.architecture} has no experts")
        return self._engine.experts

    # Whether anything is generated.

    def _pause(self, call_id: int, mode: str) -> list[FromEngine]:
        news = self._engine.drain()
        if mode == "abort":
            news.append(StepNews(self._engine.scheduler.abort_all()))
        elif mode == "retract":
            self._engine.scheduler.retract_all(keep=True)
        return [*news, self._change(is_paused=True), Reply(call_id)]

    def _continue(self, call_id: int) -> list[FromEngine]:
        return [self._change(is_paused=False), Reply(call_id)]

    # Memory that somebody else needs for a while.

    def _release_memory(self, call_id: int, tags: list[Memory]) -> list[FromEngine]:
        """Requests that run are computed anew afterwards; new ones are refused meanwhile."""
        if self._uses_weights:
            raise RequestError("The weights are being updated or read.", status=409)
        tags = [tag for tag in get_args(Memory) if tag in tags and tag not in self.state.released]
        news = self._engine.drain()
        if "kv_cache" in tags:
            self._engine.release_state()
        if "weights" in tags:
            self._engine.release_weights()
            self._missing = self._loader.tensor_names
        logger.info("released the memory of %s", " and ".join(tags) or "nothing more")
        return [*news, self._change(released=(*self.state.released, *tags)), Reply(call_id)]

    def _resume_memory(self, call_id: int, tags: list[Memory]) -> list[FromEngine]:
        """Released weights have to be sent anew before anything is generated."""
        if "kv_cache" in tags and "kv_cache" in self.state.released:
            self._engine.restore_state()
        released = tuple(tag for tag in self.state.released if tag not in tags)
        return [self._change(released=released, fault=self._fault()), Reply(call_id)]

    def _change(self, **changes: Any) -> ServingState:
        self.state = msgspec.structs.replace(self.state, **changes)
        return self.state
