"""What is being served, as far as control operations change it."""

import msgspec

from jaxserve.config import EngineConfig


class ServingState(msgspec.Struct, frozen=True, tag="state"):
    """The engine sends a new one whenever it changes, in the order of its steps' news: what comes
    before was computed by other weights than what comes after.
    """

    model_path: str
    model_name: str  # the id in /v1/models
    weight_version: str  # a label that whoever updates the weights chooses
    num_updates: int = 0  # of the weights, since the start
    is_paused: bool = False  # requests wait
    released: tuple[str, ...] = ()  # of "kv_cache" and "weights": memory given back for a while
    fault: str | None = None  # why the weights cannot be used

    @classmethod
    def of(cls, config: EngineConfig) -> "ServingState":
        """That of a start."""
        return cls(config.model_path, config.model_name, config.weight_version)

    def has_weights_of(self, other: "ServingState") -> bool:
        ours, theirs = ((s.num_updates, s.weight_version) for s in (self, other))
        return ours == theirs

    @property
    def refusal(self) -> str | None:
        """Why a request to generate is refused."""
        if self.released:
            return (
                f"the memory of {' and '.join(self.released)} is released; "
                "POST /resume_memory_occupation takes it back"
            )
        return self.fault
