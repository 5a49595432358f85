"""The answers to one call, as its generations bring them."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from jaxserve.encode_request import EncodeRequest
from jaxserve.generate_request import GenerateRequest
from jaxserve.generation import Generation, Progress


class Answers:
    """Whoever is told of an update calls `take` until `is_over`."""

    def __init__(
        self,
        parsed: GenerateRequest | EncodeRequest,
        generations: list[Generation],
        stream_interval: int,
    ):
        self.generations = generations
        self._parsed = parsed
        self._interval = [
            g.request.sampling.stream_interval or stream_interval for g in generations
        ]
        self._num_sent = [0] * len(generations)
        self._open = set(range(len(generations)))

    @property
    def is_stream(self) -> bool:
        return self._parsed.stream

    @property
    def is_over(self) -> bool:
        return not self._open

    def take(self) -> Iterator[dict[str, Any]]:
        """What is new and due: every so many tokens of a stream, else the finished answers.

        Those of a streamed batch carry an "index". Raises EngineDied.
        """
        for index in sorted(self._open):
            generation = self.generations[index]
            if generation.error is not None:
                raise generation.error
            progress = generation.progress  # once: it may be replaced at any moment
            if not self._is_due(index, progress):
                continue
            self._num_sent[index] = progress.num_output
            if progress.finish_reason is not None:
                self._open.discard(index)
            answer = generation.snapshot(
                progress,
                with_prompt_ids=self._parsed.return_prompt_token_ids,
                with_logprob_text=self._parsed.return_text_in_logprobs,
            )
            if self._parsed.is_batch and self._parsed.stream:
                answer["index"] = index
            yield answer

    async def follow(self, changed: asyncio.Event) -> AsyncIterator[dict[str, Any]]:
        """What `take` gives, as it comes; `changed` is what every update sets."""
        while not self.is_over:
            await changed.wait()
            changed.clear()
            for answer in self.take():
                yield answer

    def in_order(self, finished: list[dict[str, Any]]) -> dict[str, Any] | list[dict[str, Any]]:
        """The answers that `take` has given, as one call without a stream returns them."""
        by_rid = {answer["meta_info"]["id"]: answer for answer in finished}
        answers = [by_rid[generation.request.rid] for generation in self.generations]
        return answers if self._parsed.is_batch else answers[0]

    def _is_due(self, index: int, progress: Progress) -> bool:
        if progress.finish_reason is not None or not self._parsed.stream:
            return progress.finish_reason is not None
        sent = self._num_sent[index]
        new = progress.num_output - sent
        return new >= self._interval[index] or (sent == 0 and new > 0)
