"""What has been told of one request, all of which must be as if it had been alone."""

import dataclasses

from jaxserve.request import FinishReason, Request, RequestUpdate
from tests.engine.fake_device import chain_of, score_of, solo


@dataclasses.dataclass
class Answer:
    request: Request
    order: tuple[int, int]  # of all requests: negative priority, arrival
    output: list[int] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    cached_tokens: int | None = None
    end: FinishReason | None = None
    is_aborted: bool = False

    def take(self, update: RequestUpdate) -> None:
        assert self.end is None, "nothing comes after the end"
        request, reason = self.request, update.finish_reason
        self.output += update.token_ids
        tokens, end = solo(request)
        assert self.output == tokens[: len(self.output)], "not the output of a solo run"
        assert self.cached_tokens in (None, update.cached_tokens), "told otherwise before"
        self.cached_tokens = update.cached_tokens
        assert self.cached_tokens < len(request.prompt_ids)
        self.take_logprobs(update)
        self.end = reason
        if reason is None:
            return
        if reason.type == "abort" and reason.status_code is None:
            assert self.is_aborted, "nobody has asked for its end"
        else:
            assert self.output == tokens and reason.type == end
            assert reason.length in (None, len(tokens))
            assert end != "abort" or "not finite" in reason.message

    def take_logprobs(self, update: RequestUpdate) -> None:
        """Each is told once, in order, with the news of its token; those of the prompt first."""
        request = self.request
        if request.logprobs is None:
            assert update.logprobs is None and update.prompt_logprobs is None
            return
        told = self.prompt_logprobs
        if update.prompt_logprobs is not None:
            told += update.prompt_logprobs.chosen
        expected = self.logprobs_of(request.prompt_ids, request.logprobs.start + 1)
        assert told == expected[: len(told)]
        if not update.token_ids:
            return
        assert told == expected, "tokens come after all logprobs of the prompt"
        tokens = [*request.prompt_ids, *self.output]
        first = len(tokens) - len(update.token_ids)
        assert update.logprobs.chosen == self.logprobs_of(tokens, first)

    def logprobs_of(self, tokens: list[int], first: int) -> list[float]:
        chain = chain_of(tokens, self.request.namespace)
        return [score_of(chain[i - 1], tokens[i]) for i in range(first, len(tokens))]
