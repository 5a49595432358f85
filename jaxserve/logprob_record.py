"""The logprobs of one request as they arrive, and in the shapes of /generate's meta_info."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.request import Logprobs, Request, RequestUpdate

Decode = Callable[[list[int]], str]
Triple = tuple[float | None, int, str | None]  # logprob, token, its text


class _Column:
    """Consecutive tokens; only ever extended, since another thread may be looking."""

    def __init__(self) -> None:
        self.chosen: list[float] = []
        self.tops: list[list[tuple[float, int]]] = []
        self.probes: list[list[float]] = []

    def extend(self, news: Logprobs | None) -> None:
        if news is not None:
            self.tops += news.tops
            self.probes += news.probes
            self.chosen += news.chosen


class LogprobRecord:
    def __init__(self, request: Request):
        self._request, self._params = request, request.logprobs
        self._prompt, self._output = _Column(), _Column()

    def extend(self, update: RequestUpdate) -> None:
        self._prompt.extend(update.prompt_logprobs)
        self._output.extend(update.logprobs)

    def fields(self, output_ids: Sequence[int], decode: Decode | None) -> dict[str, Any]:
        """What meta_info tells of the prompt and of `output_ids`, the output so far.

        Args:
          decode: ids to text, where the text of each token is asked for.
        """
        start, num_scored = self._params.start, len(self._prompt.chosen)
        prompt_ids = self._request.prompt_ids[start : start + 1 + num_scored]
        # Nothing before the first one was scored: no logprob is known of it.
        unknown = [None] if prompt_ids else []
        return {
            **self._side("input", self._prompt, prompt_ids, unknown, decode),
            **self._side("output", self._output, output_ids, [], decode),
            "output_token_logprobs_length": len(output_ids),
        }

    def _side(
        self, side: str, column: _Column, ids: Sequence[int], unknown: list[None], decode
    ) -> dict[str, Any]:
        known = slice(0, len(ids) - len(unknown))
        told = {f"{side}_token_logprobs": _triples(unknown + column.chosen[known], ids, decode)}
        if self._params.top_num:
            told[f"{side}_top_logprobs"] = unknown + [
                _triples(*zip(*tops, strict=True), decode) for tops in column.tops[known]
            ]
        if self._params.token_ids:
            told[f"{side}_token_ids_logprobs"] = unknown + [
                _triples(probes, self._params.token_ids, decode) for probes in column.probes[known]
            ]
        return told


def _triples(
    logprobs: Sequence[float | None], ids: Sequence[int], decode: Decode | None
) -> list[Triple]:
    return [
        (logprob, token, decode([token]) if decode else None)
        for logprob, token in zip(logprobs, ids, strict=True)
    ]
