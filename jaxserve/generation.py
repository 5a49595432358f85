"""One request as its caller sees it: what has arrived, as text and meta_info."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxserve.detokenizer import Detokenizer, cut_at_stop, hold_back
from jaxserve.logprob_record import LogprobRecord
from jaxserve.messages import ExpertInfo
from jaxserve.request import FinishReason, Request, RequestUpdate
from jaxserve.routed_experts import RoutedExperts
from jaxserve.serving_state import ServingState
from jaxserve.tokenizer import Tokenizer


class Progress(NamedTuple):
    """How far a request has come. Replaced as a whole, since another thread may be looking."""

    num_output: int = 0
    finish_reason: FinishReason | None = None
    finished: float = 0.0  # time.monotonic()
    cached_tokens: int = 0
    num_retractions: int = 0
    weight_version: str = ""  # at the last update


class Generation:
    """The mailbox of a request: its latest state, not a queue of events. A slow reader therefore
    costs constant memory, and what it missed arrives in one piece."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        on_update: Callable[[], None],
        experts: ExpertInfo | None = None,
    ):
        self.request = request
        self.progress = Progress()
        self.error: Exception | None = None  # the engine died
        self._output_ids: list[int] = []  # only ever extended, as is what follows
        self._eras: list[tuple[ServingState, int]] = []  # each one's first output token
        self._logprobs = request.logprobs and LogprobRecord(request)
        self._experts = None if request.experts_from is None else RoutedExperts(experts)
        self._on_update = on_update
        self.created = time.monotonic()
        self._first_sent: float | None = None
        self._num_shown = 0  # output ids that the detokenizer has seen
        self._tokenizer = tokenizer
        self._text = tokenizer and Detokenizer(
            tokenizer,
            request.prompt_ids,
            skip_special_tokens=request.sampling.skip_special_tokens,
        )

    @property
    def is_finished(self) -> bool:
        return self.progress.finish_reason is not None or self.error is not None

    @property
    def is_complete(self) -> bool:
        """It has all that was asked for."""
        reason = self.progress.finish_reason
        return reason is not None and reason.type != "abort"

    @property
    def latency(self) -> float:
        """Seconds that a finished request has taken."""
        return self.progress.finished - self.created

    @property
    def summary(self) -> str:
        """One line for a log: lengths, never the text."""
        progress = self.progress
        reason = progress.finish_reason.type if progress.finish_reason else "abandoned"
        return (
            f"prompt_tokens={len(self.request.prompt_ids)}, "
            f"completion_tokens={progress.num_output}, finish_reason={reason}"
        )

    def deliver(self, update: RequestUpdate, state: ServingState) -> None:
        """Takes in a step's news, whose tokens were computed in this state of the engine."""
        is_new_era = not self._eras or self._eras[-1][0] is not state
        if update.token_ids and is_new_era:
            self._eras.append((state, len(self._output_ids)))
        self._output_ids += update.token_ids
        if self._logprobs is not None:
            self._logprobs.extend(update)
        if self._experts is not None:
            self._experts.extend(update.expert_ids)
        self.progress = Progress(
            num_output=len(self._output_ids),
            finish_reason=update.finish_reason,
            finished=time.monotonic(),
            cached_tokens=update.cached_tokens,
            num_retractions=update.num_retractions,
            weight_version=state.weight_version,
        )
        self._on_update()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._on_update()

    def snapshot(
        self,
        progress: Progress,
        *,
        with_prompt_ids: bool = False,
        with_logprob_text: bool = False,
    ) -> dict[str, Any]:
        """The answer at `progress`, in the shape of /generate.

        Text is cumulative and shows neither half a character nor a tail that may turn out to be
        the beginning of a stop string.
        """
        ids, reason = self._output_ids[: progress.num_output], progress.finish_reason
        answer: dict[str, Any] = {}
        if self._text is not None:
            answer["text"] = self._visible_text(ids, reason)
        answer["output_ids"] = ids
        if with_prompt_ids:
            answer["prompt_token_ids"] = self.request.prompt_ids
        if self._first_sent is None:
            self._first_sent = time.time()
        answer["meta_info"] = {
            "id": self.request.rid,
            "finish_reason": reason.to_json() if reason else None,
            "prompt_tokens": len(self.request.prompt_ids),
            "weight_version": progress.weight_version,
            "num_retractions": progress.num_retractions,
            **self._logprob_fields(ids, with_logprob_text),
            "reasoning_tokens": 0,
            "completion_tokens": len(ids),
            "cached_tokens": progress.cached_tokens,
            "cached_tokens_details": None,
            "dp_rank": None,
        }
        if reason is not None:
            answer["meta_info"]["weight_versions"] = self._weight_versions()
            answer["meta_info"]["e2e_latency"] = progress.finished - self.created
            if self._experts is not None:
                answer["meta_info"]["routed_experts"] = self._experts.encode(self._num_routed)
        answer["meta_info"]["response_sent_to_client_ts"] = self._first_sent
        return answer

    @property
    def _num_routed(self) -> int:
        """Tokens whose experts are told: from where it was asked to, all but the last one sampled,
        which no expert has seen."""
        num_tokens = len(self.request.prompt_ids) + len(self._output_ids)
        return max(num_tokens - 1 - self.request.experts_from, 0)

    def _weight_versions(self) -> list[dict[str, Any]]:
        """Which weights computed which output tokens; two with the same label stay two spans."""
        spans: list[dict[str, Any]] = []
        for i, (state, start) in enumerate(self._eras):
            later = self._eras[i + 1 :]
            end = later[0][1] if later else len(self._output_ids)
            if i and state.has_weights_of(self._eras[i - 1][0]):
                spans[-1]["end"] = end
            else:
                spans.append({"version": state.weight_version, "start": start, "end": end})
        return spans

    def _logprob_fields(self, ids: list[int], with_text: bool) -> dict[str, Any]:
        if self._logprobs is None:
            return {}
        decode = None
        if with_text and self._tokenizer is not None:
            decode = functools.partial(self._tokenizer.decode, skip_special_tokens=False)
        return self._logprobs.fields(ids, decode)

    def _visible_text(self, ids: list[int], reason: FinishReason | None) -> str:
        sampling, matched = self.request.sampling, reason.matched if reason else None
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
