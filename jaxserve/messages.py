"""What passes between the two ends of the engine's socket, as msgpack. No pickle anywhere."""

from typing import Any

import msgspec

from jaxserve.request import Request, RequestUpdate
from jaxserve.serving_state import ServingState


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    request: Request


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    rid: str


class Call(msgspec.Struct, frozen=True, tag="call"):
    """A control operation; its answer is a `Reply` with the same id."""

    call_id: int
    operation: str
    arguments: dict[str, Any] = {}


ToEngine = AddRequest | AbortRequest | Call


class EmbeddingInfo(msgspec.Struct, frozen=True):
    """Of an engine that answers with vectors."""

    size: int
    dimensions: list[int] | None  # that a vector may be cut to; empty: any; None: only its own
    labels: list[str] = []  # of the scores that a head gives in a vector's place
    is_normalized: bool = True


class EncoderInfo(msgspec.Struct, frozen=True):
    """Of a model whose tokens see those behind them too: it takes pairs of texts."""

    num_token_types: int


class ExpertInfo(msgspec.Struct, frozen=True):
    """Of a model that has experts."""

    num_layers: int  # with and without
    sparse_layers: list[int]  # those with
    num_experts: int  # in each
    top_k: int  # of them that a token takes


class EngineInfo(msgspec.Struct, frozen=True):
    """What the other side must know of the engine to check requests and to describe it."""

    architecture: str
    model_type: str
    model_folder: str
    tokenizer_folder: str | None
    vocab_size: int
    context_length: int
    max_total_num_tokens: int
    max_running_requests: int
    chunked_prefill_size: int
    page_size: int
    eos_token_ids: list[int]
    dtype: str
    device: str
    num_devices: int
    weight_bytes: int
    kv_cache_bytes: int
    startup_seconds: float
    startup_phases: dict[str, float]  # seconds; they may overlap
    embedding: EmbeddingInfo | None = None  # None: it predicts tokens
    experts: ExpertInfo | None = None
    encoder: EncoderInfo | None = None

    @property
    def max_req_len(self) -> int:
        """Tokens of a request, prompt and output."""
        return min(self.context_length, self.max_total_num_tokens) - 1

    @property
    def is_cross_encoder(self) -> bool:
        """Scores pairs of texts."""
        return self.encoder is not None and bool(self.embedding.labels)


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    info: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    message: str


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine's last words."""

    message: str


class StepNews(msgspec.Struct, frozen=True, tag="step"):
    """One step's news of all its requests, in one message."""

    updates: list[RequestUpdate]


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    call_id: int
    value: Any = None
    error: str | None = None
    status: int | None = None  # of an error that is the caller's


FromEngine = Ready | StartFailed | EngineFailed | StepNews | ServingState | Reply

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
