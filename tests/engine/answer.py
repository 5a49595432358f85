"""What has been told of one request, all of which must be as if it had been alone.

Where weights change while it runs, it goes on with what it has computed; what it computes anew, it
computes with the weights of that time. Without such a change, or a retraction after it, its output
is that of a solo run.
"""

import dataclasses

import numpy as np

from jaxserve.request import FinishReason, Request, RequestUpdate
from tests.engine.fake_device import EOS, expert_of, extend_chain, next_token, score_of


@dataclasses.dataclass
class Answer:
    request: Request
    order: tuple[int, int]  # of all requests: negative priority, arrival
    version: int  # of the weights that compute from now on
    chain: list[int] = dataclasses.field(default_factory=list)  # of its tokens, as computed
    stay: int = 0  # in a row: with each, all is computed anew
    output: list[int] = dataclasses.field(default_factory=list)
    num_scored: int = 0  # tokens of the prompt whose logprobs were told
    num_routed: int = 0  # tokens whose experts were told
    cached_tokens: int | None = None
    end: FinishReason | None = None
    is_aborted: bool = False

    def chain_of(self, num_tokens: int) -> list[int]:
        """What its first tokens make the device hold."""
        tokens = [*self.request.prompt_ids, *self.output]
        for token in tokens[len(self.chain) : num_tokens]:
            extend_chain(self.chain, token, self.request.namespace, self.version)
        return self.chain[:num_tokens]

    def enter_row(self, stay: int) -> None:
        if stay != self.stay:
            self.stay, self.chain = stay, []

    def change_weights(self, version: int, num_computed: int) -> None:
        """Tokens that are computed stay what they are."""
        self.chain = self.chain_of(num_computed)
        self.version = version

    def take(self, update: RequestUpdate) -> None:
        assert self.end is None, "nothing comes after the end"
        assert self.cached_tokens in (None, update.cached_tokens), "told otherwise before"
        self.cached_tokens = update.cached_tokens
        assert self.cached_tokens < len(self.request.prompt_ids)
        self.take_prompt_logprobs(update)
        for number, token in enumerate(update.token_ids):
            assert not self.is_complete, "one token too many"
            assert token == self.next_token(), "not the output of a solo run"
            self.take_logprob(update, number)
            self.output.append(token)
        self.take_experts(update)
        if update.finish_reason is not None:
            self.take_end(update.finish_reason)
        else:
            assert not self.is_complete

    @property
    def is_complete(self) -> bool:
        return EOS in self.output or len(self.output) >= self.request.max_new_tokens > 0

    def next_token(self) -> int | None:
        return next_token(self.chain_of(len(self.request.prompt_ids) + len(self.output))[-1])

    def take_end(self, reason: FinishReason) -> None:
        self.end = reason
        if reason.type != "abort" and self.request.experts_from is not None:
            num_tokens = len(self.request.prompt_ids) + len(self.output)
            assert self.num_routed >= num_tokens - 1 - self.request.experts_from
        if reason.type == "abort" and reason.status_code is None:
            assert self.is_aborted, "nobody has asked for its end"
        elif reason.type == "abort":
            assert not self.is_complete and self.next_token() is None, "its scores are finite"
            assert "not finite" in reason.message
        elif reason.type == "stop":
            assert self.output[-1] == reason.matched == EOS
        else:
            assert reason.length == len(self.output) == self.request.max_new_tokens
            assert EOS not in self.output and (self.output or self.next_token() is not None)

    def take_prompt_logprobs(self, update: RequestUpdate) -> None:
        """Each is told once, in order; all of them before the first token."""
        if self.request.logprobs is None:
            assert update.prompt_logprobs is None
            return
        first = min(self.request.logprobs.start + 1, len(self.request.prompt_ids))
        told = update.prompt_logprobs.chosen if update.prompt_logprobs is not None else []
        for number, logprob in enumerate(told, start=first + self.num_scored):
            assert logprob == self.logprob_of(self.request.prompt_ids[number], number)
        self.num_scored += len(told)
        num_left = len(self.request.prompt_ids) - first - self.num_scored
        assert num_left == 0 or (num_left > 0 and not update.token_ids)

    def take_logprob(self, update: RequestUpdate, number: int) -> None:
        if self.request.logprobs is None:
            assert update.logprobs is None
            return
        position = len(self.request.prompt_ids) + len(self.output)
        expected = self.logprob_of(update.token_ids[number], position)
        assert update.logprobs.chosen[number] == expected
        assert len(update.logprobs.chosen) == len(update.token_ids)

    def take_experts(self, update: RequestUpdate) -> None:
        """Each token's once, in order. Behind a stop that only the host sees there may be more."""
        first = self.request.experts_from
        if first is None:
            assert not update.expert_ids
            return
        assert self.cached_tokens <= first, "its experts are not known"
        num_tokens = len(self.request.prompt_ids) + len(self.output)
        for told in np.frombuffer(update.expert_ids, np.int16).tolist():
            position = first + self.num_routed
            assert position < num_tokens or self.is_complete
            if position < num_tokens:
                assert told == expert_of(self.chain_of(position + 1)[-1])
            self.num_routed += 1

    def logprob_of(self, token: int, position: int) -> float:
        return score_of(self.chain_of(position)[-1], token)
