"""How one request is sampled: the fields, their ranges, and the words for what is not served."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import msgspec

from jaxserve.errors import RequestError

GREEDY_BELOW = 1e-6  # temperatures under it mean "take the best token"
MOST_STOPS = 32
MOST_STOP_BYTES = 256
MOST_STOP_TOKEN_IDS = 128
MOST_BIASES = 1024
MOST_SAMPLES = 64


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """SGLang's sampling parameters, with its names, defaults and ranges."""

    max_new_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    logit_bias: dict[int, float] = {}
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # of tokenizers that we do not use: no effect
    no_stop_trim: bool = False
    stream_interval: int | None = None
    sampling_seed: int | None = None

    @classmethod
    def parse(cls, given: Any) -> Self:
        """Checks a JSON object of sampling parameters.

        None means the default, for every field but `max_new_tokens`, where it means no limit.

        Raises:
          RequestError: names the field.
        """
        if not isinstance(given, Mapping):
            raise RequestError(
                f"sampling_params must be an object, got {type(given).__name__}",
                param="sampling_params",
            )
        optional = {*cls.__struct_fields__, *NOT_SERVED} - {"max_new_tokens"}
        fields = {k: v for k, v in given.items() if v is not None or k not in optional}
        for name, neutral in NOT_SERVED.items():
            if name in fields and not _is_same(fields.pop(name), neutral):
                raise RequestError(f"{name} is not supported by this server yet", param=name)
        if isinstance(fields.get("stop"), str):
            fields["stop"] = [fields["stop"]]
        try:
            params = msgspec.convert(fields, cls, str_keys=True)
        except msgspec.ValidationError as error:
            raise RequestError(f"sampling_params: {error}", param="sampling_params") from error
        params._check()
        return params

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens may not be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def counts_tokens(self) -> bool:
        """Whether scores depend on how often a token has come."""
        penalties = self.frequency_penalty, self.presence_penalty, self.repetition_penalty
        return penalties != (0.0, 0.0, 1.0)

    def _check(self) -> None:
        def require(holds: bool, param: str, message: str) -> None:
            if not holds:
                raise RequestError(message, param=param)

        limit, t = self.max_new_tokens, self.temperature
        require(
            limit is None or limit >= 0,
            "max_new_tokens",
            f"max_new_tokens must be at least 0, got {limit}.",
        )
        for name in ("max_new_tokens", "stream_interval"):
            value = getattr(self, name)
            fits = value is None or value < 2**63
            require(fits, name, f"{name} must be below 2**63, got {value}.")
        require(
            0 <= t < float("inf"),
            "temperature",
            f"temperature must be a non-negative finite number, got {t}.",
        )
        require(0 < self.top_p <= 1, "top_p", f"top_p must be in (0, 1], got {self.top_p}.")
        require(
            self.top_k == -1 or 1 <= self.top_k < 2**31,
            "top_k",
            f"top_k must be -1 (disable) or at least 1, got {self.top_k}.",
        )
        self._check_penalties(require)
        require(
            len(self.stop) <= MOST_STOPS,
            "stop",
            f"at most {MOST_STOPS} stop strings are allowed, got {len(self.stop)}",
        )
        for stop in self.stop:
            require(
                not any("\ud800" <= c <= "\udfff" for c in stop),
                "stop",
                "a stop string must be Unicode text",
            )
            size = len(stop.encode())
            require(
                0 < size <= MOST_STOP_BYTES,
                "stop",
                f"a stop string must have 1 to {MOST_STOP_BYTES} bytes, got {size}",
            )
        require(
            len(self.stop_token_ids) <= MOST_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"at most {MOST_STOP_TOKEN_IDS} stop_token_ids are allowed, "
            f"got {len(self.stop_token_ids)}",
        )
        require(
            self.stream_interval is None or self.stream_interval >= 1,
            "stream_interval",
            f"stream_interval must be at least 1, got {self.stream_interval}.",
        )
        require(
            self.sampling_seed is None or -(2**63) <= self.sampling_seed < 2**63,
            "sampling_seed",
            f"sampling_seed must be in [-2**63, 2**63 - 1], got {self.sampling_seed}.",
        )

    def _check_penalties(self, require: Callable[[bool, str, str], None]) -> None:
        p, repetition = self.min_p, self.repetition_penalty
        require(0 <= p <= 1, "min_p", f"min_p must be in [0, 1], got {p}.")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            require(-2 <= value <= 2, name, f"{name} must be in [-2, 2], got {value}.")
        require(
            0 < repetition <= 2,
            "repetition_penalty",
            f"repetition_penalty must be in (0, 2] (1.0 = no penalty), got {repetition}.",
        )
        least, most = self.min_new_tokens, self.max_new_tokens
        most = 2**31 - 1 if most is None else most
        require(
            0 <= least <= most,
            "min_new_tokens",
            f"min_new_tokens must be in [0, max_new_tokens({most})], got {least}.",
        )
        require(
            len(self.logit_bias) <= MOST_BIASES,
            "logit_bias",
            f"at most {MOST_BIASES} entries of logit_bias are allowed, got {len(self.logit_bias)}",
        )
        for token, bias in self.logit_bias.items():
            message = f"logit_bias of {token} must be finite, got {bias}"
            require(math.isfinite(bias), "logit_bias", message)
        require(
            1 <= self.n <= MOST_SAMPLES, "n", f"n must be from 1 to {MOST_SAMPLES}, got {self.n}."
        )


def _is_same(value: Any, neutral: Any) -> bool:
    """False is no 0 here."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


# What SGLang has and we do not yet: its neutral value is accepted, any other refused in words.
NOT_SERVED: dict[str, Any] = {
    "stop_regex": [],
    "json_schema": "",
    "regex": "",
    "ebnf": "",
    "structural_tag": "",
    "custom_params": {},
    "beam_width": 1,
}
