"""One request as its caller sees it: what has arrived, as text and meta_info."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.detokenizer import Detokenizer, cut_at_stop, hold_back
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.tokenizer import Tokenizer


class Generation:
    """The mailbox of a request: its latest state, not a queue of events. A slow reader therefore
    costs constant memory, and what it missed arrives in one piece."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer | None, on_update: Callable[[], None]
    ):
        self.request = request
        self.output_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None  # the engine died
        self._on_update = on_update
        self._created = time.monotonic()
        self._finished = 0.0
        self._first_sent: float | None = None
        self._cached_tokens = self._num_retractions = 0
        self._num_shown = 0  # output ids that the detokenizer has seen
        self._tokenizer = tokenizer
        self._text = tokenizer and Detokenizer(
            tokenizer,
            request.prompt_ids,
            skip_special_tokens=request.sampling.skip_special_tokens,
        )

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def summary(self) -> str:
        """One line for a log: lengths, never the text."""
        reason = self.finish_reason.type if self.finish_reason else "abandoned"
        return (
            f"prompt_tokens={len(self.request.prompt_ids)}, "
            f"completion_tokens={len(self.output_ids)}, finish_reason={reason}"
        )

    def deliver(self, update: RequestUpdate) -> None:
        self.output_ids += update.token_ids
        self._cached_tokens = update.cached_tokens
        self._num_retractions = update.num_retractions
        if update.finish_reason is not None:
            self.finish_reason, self._finished = update.finish_reason, time.monotonic()
        self._on_update()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._on_update()

    def snapshot(self, meta: Mapping[str, Any], *, with_prompt_ids: bool = False) -> dict[str, Any]:
        """The answer so far, in the shape of /generate; `meta` goes into its meta_info.

        Text is cumulative and shows neither half a character nor a tail that may turn out to be
        the beginning of a stop string.
        """
        answer: dict[str, Any] = {} if self._text is None else {"text": self._visible_text()}
        answer["output_ids"] = list(self.output_ids)
        if with_prompt_ids:
            answer["prompt_token_ids"] = self.request.prompt_ids
        if self._first_sent is None:
            self._first_sent = time.time()
        reason = self.finish_reason
        answer["meta_info"] = {
            "id": self.request.rid,
            "finish_reason": reason.to_json() if reason else None,
            "prompt_tokens": len(self.request.prompt_ids),
            **meta,
            "num_retractions": self._num_retractions,
            "reasoning_tokens": 0,
            "completion_tokens": len(self.output_ids),
            "cached_tokens": self._cached_tokens,
            "cached_tokens_details": None,
            "dp_rank": None,
            "response_sent_to_client_ts": self._first_sent,
        }
        if reason is not None:
            answer["meta_info"]["e2e_latency"] = self._finished - self._created
        return answer

    def _visible_text(self) -> str:
        sampling, reason = self.request.sampling, self.finish_reason
        matched = reason.matched if reason else None
        ids = self.output_ids
        # A stop token's own text is not shown, unless it is asked for.
        shown = len(ids) - (isinstance(matched, int) and not sampling.no_stop_trim)
        text = self._text.push(ids[self._num_shown : shown])
        self._num_shown = max(self._num_shown, shown)
        if reason is None:
            return hold_back(text, sampling.stop)
        text = self._text.finish()
        if isinstance(matched, str):
            text = cut_at_stop(text, matched, keep=sampling.no_stop_trim)
        return text
