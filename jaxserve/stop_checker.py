"""When a request's output is complete."""

from jaxserve.detokenizer import Detokenizer
from jaxserve.request import FinishReason, Request
from jaxserve.tokenizer import Tokenizer


class StopChecker:
    """Looks at each new token. Where several reasons meet: stop string, stop token, length."""

    def __init__(
        self, request: Request, eos_token_ids: frozenset[int], tokenizer: Tokenizer | None
    ):
        sampling = request.sampling
        stop_ids = () if sampling.ignore_eos else (*sampling.stop_token_ids, *eos_token_ids)
        self.stop_ids = tuple(dict.fromkeys(stop_ids))
        self._stops = sampling.stop
        self._longest = max(map(len, sampling.stop), default=0)
        self._limit = request.max_new_tokens
        self._count = 0
        self._text = (
            Detokenizer(
                tokenizer,
                request.prompt_ids,
                skip_special_tokens=sampling.skip_special_tokens,
            )
            if sampling.stop and tokenizer is not None
            else None
        )

    def push(self, token: int) -> FinishReason | None:
        self._count += 1
        if self._text is not None and (stop := self._find_stop(token)):
            return FinishReason("stop", matched=stop)
        if token in self.stop_ids:
            return FinishReason("stop", matched=token)
        if self._count >= self._limit:
            return FinishReason("length", length=self._limit)
        return None

    def _find_stop(self, token: int) -> str | None:
        """The stop string that begins first in the text."""
        before = len(self._text.text)
        text = self._text.push([token])
        start = max(before - self._longest + 1, 0)
        found = [(at, stop) for stop in self._stops if (at := text.find(stop, start)) >= 0]
        return min(found)[1] if found else None
