"""New weights that are being loaded, or wait until they may take their places."""

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from jaxserve.background import Done, Task
from jaxserve.messages import FromEngine, StepNews
from jaxserve.serving_state import ServingState
from jaxserve.weight_loader import ROLLED_BACK, LoadedUpdate, UpdateFailed
from jaxserve.weight_request import WeightUpdate

if TYPE_CHECKING:
    from jaxserve.engine_core import EngineCore

logger = logging.getLogger(__name__)
SUCCEEDED = "Succeeded to update model weights."


@dataclasses.dataclass(frozen=True)
class PendingUpdate:
    call_id: int
    request: WeightUpdate
    task: Task | Done  # gives a LoadedUpdate

    def loaded(self, timeout: float) -> LoadedUpdate | None:
        """None as long as it is loading.

        Raises:
          UpdateFailed: there will be none, or nothing was read for `timeout` seconds.
        """
        if not self.task.is_done:
            if self.task.idle_seconds < timeout:
                return None
            self.task.give_up()
            raise UpdateFailed(
                f"Failed to update weights: no byte was read for {timeout:g} s "
                f"(--weight-load-timeout).\n{ROLLED_BACK}"
            )
        return self.task.result()

    def interrupt(self, engine: "EngineCore") -> tuple[list[FromEngine], int]:
        """Does with the requests in flight as is asked for: then no step is in flight. Returns what
        is to be told of them, and how many go on later."""
        news, scheduler = engine.drain(), engine.scheduler
        num_running = len(scheduler.running)
        if self.request.in_flight == "abort":
            return [*news, StepNews(scheduler.abort_all())], 0
        if self.request.in_flight == "retract":
            scheduler.retract_all()
        return news, num_running

    def changes(self, state: ServingState) -> dict[str, Any]:
        """Of the serving state, once the new weights serve."""
        changes: dict[str, Any] = {"num_updates": state.num_updates + 1}
        if self.request.model_path is not None:
            changes |= {"model_path": self.request.model_path}
            changes |= {"model_name": self.request.model_path}
        if self.request.weight_version is not None:
            changes["weight_version"] = self.request.weight_version
        if self.request.keep_pause:
            changes["is_paused"] = True
        return changes

    def answer(self, num_paused: int) -> dict[str, Any]:
        """As SGLang has it."""
        message, version = SUCCEEDED, self.request.weight_version
        if version is not None:
            message += f" Weight version updated to {version}."
        return {"success": True, "message": message, "num_paused_requests": num_paused}


def report(loaded: LoadedUpdate, pause_seconds: float) -> dict[str, Any]:
    """Logs how an update went, and returns the same for /server_info."""
    logger.info(
        "Update weights end. %.2f GB in %.2f s, %.1f ms between two steps, %s.",
        loaded.num_bytes / 1e9,
        loaded.seconds,
        pause_seconds * 1e3,
        "checksums verified" if loaded.is_checksummed else "no checksums beside them",
    )
    logger.info("Cache flushed successfully!")
    if loaded.zeros:
        logger.warning("these tensors are all zeros: %s", ", ".join(loaded.zeros[:8]))
    return {
        "num_bytes": loaded.num_bytes,
        "load_seconds": loaded.seconds,
        "pause_seconds": pause_seconds,
        "is_checksummed": loaded.is_checksummed,
        "all_zero_tensors": loaded.zeros,
    }
