"""A request for a vector as its caller sees it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxserve.generation import Generation, Progress
from jaxserve.request import Request, RequestUpdate
from jaxserve.serving_state import ServingState

# Of the meta_info of /generate.
NOT_OF_VECTORS = (
    "reasoning_tokens",
    "completion_tokens",
    "cached_tokens",
    "cached_tokens_details",
    "dp_rank",
    "weight_versions",
)


class Embedding(Generation):
    """The mailbox of a request that is answered with a vector, all of it at once."""

    def __init__(
        self,
        request: Request,
        dimensions: int | None,
        on_update: Callable[[], None],
        *,
        is_normalized: bool = True,
    ):
        """Args:
        dimensions: that the vector is cut to.
        is_normalized: it has length 1, and then has it again.
        """
        super().__init__(request, None, on_update)
        self._dimensions, self._is_normalized = dimensions, is_normalized
        self._packed = b""

    def deliver(self, update: RequestUpdate, state: ServingState) -> None:
        self._packed = update.embedding
        super().deliver(update, state)

    def snapshot(self, progress: Progress, **_: Any) -> dict[str, Any]:
        """The answer in the shape of /encode."""
        meta_info = super().snapshot(progress)["meta_info"]
        for name in NOT_OF_VECTORS:
            meta_info.pop(name, None)
        return {"embedding": self._vector(), "meta_info": meta_info}

    def _vector(self) -> list[float]:
        vector = np.frombuffer(self._packed, np.float32)
        if self._dimensions is not None:
            vector = vector[: self._dimensions]
        if self._dimensions is not None and self._is_normalized:
            vector = vector / max(np.linalg.norm(vector), np.float32(1e-12))
        return vector.tolist()
