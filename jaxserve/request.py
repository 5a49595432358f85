"""One request to generate, and what is reported of it while it runs."""

from typing import Any

import msgspec

from jaxserve.sampling_params import SamplingParams as SamplingParams

MOST_TOP_LOGPROBS = 20
MOST_LOGPROB_IDS = 128


class LogprobParams(msgspec.Struct, frozen=True):
    """Which logprobs a request asks for, beside those of its own output."""

    start: int  # the first prompt position that is told of; the prompt's length for none
    top_num: int = 0  # most likely tokens at each position
    token_ids: tuple[int, ...] = ()  # told of at each position

    @property
    def wants_tops(self) -> bool:
        return self.top_num > 0 or bool(self.token_ids)


class Request(msgspec.Struct, frozen=True):
    """A checked request: ids within the vocabulary, lengths within the context."""

    rid: str
    prompt_ids: list[int]
    sampling: SamplingParams
    max_new_tokens: int  # clipped to what the context leaves
    seed: int  # 64 bits
    priority: int = 0  # higher goes first
    namespace: str = ""  # requests of different ones share nothing that is cached
    logprobs: LogprobParams | None = None  # none are asked for
    is_pooled: bool = False  # answered with a vector, and no token
    experts_from: int | None = None  # tell which experts the tokens from this position on took


class FinishReason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request ended, in SGLang's JSON."""

    type: str  # "length", "stop" or "abort"
    length: int | None = None
    matched: int | str | None = None
    message: str | None = None
    status_code: int | None = None
    err_type: str | None = None

    @classmethod
    def internal_error(cls, message: str) -> "FinishReason":
        """This request failed, through no fault of its caller."""
        return cls("abort", message=message, status_code=500, err_type="InternalServerError")

    def to_json(self) -> dict[str, Any]:
        if self.type == "length":
            return {"type": "length", "length": self.length}
        if self.type == "stop":
            return {"type": "stop", "matched": self.matched}
        return {
            "type": "abort",
            "message": self.message,
            "status_code": self.status_code,
            "err_type": self.err_type,
        }


class Logprobs(msgspec.Struct, frozen=True):
    """Of consecutive tokens; the lists that were not asked for stay empty."""

    chosen: list[float]  # of each token itself
    tops: list[list[tuple[float, int]]] = []  # of the most likely ones, with their ids
    probes: list[list[float]] = []  # of `LogprobParams.token_ids`


class RequestUpdate(msgspec.Struct, frozen=True, omit_defaults=True):
    """The tokens that one step added to a request, and its end if it has come."""

    rid: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    num_retractions: int = 0
    logprobs: Logprobs | None = None  # of `token_ids`
    prompt_logprobs: Logprobs | None = None  # of the prompt's next tokens
    embedding: bytes = b""  # f32, of a pooled request that has ended well
    expert_ids: bytes = b""  # i16[n, L, k] of the next tokens, as `StepResult` has them
