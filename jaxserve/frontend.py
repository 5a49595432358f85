"""The caller's side of the engine, whatever lies between: requests in, generations out."""

import concurrent.futures
import itertools
import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxserve.answers import Answers
from jaxserve.config import EngineConfig
from jaxserve.embedding import Embedding
from jaxserve.encode_request import NO_EMBEDDINGS, ONLY_EMBEDDINGS, EncodeRequest
from jaxserve.errors import EngineDied, RequestError
from jaxserve.generate_request import GenerateRequest
from jaxserve.generation import Generation, Progress
from jaxserve.messages import (
    AbortRequest,
    AddRequest,
    Call,
    EngineInfo,
    FromEngine,
    Reply,
    StepNews,
    ToEngine,
)
from jaxserve.request import Request
from jaxserve.request_builder import make_request, samples_of
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving_state import ServingState
from jaxserve.tokenizer import Tokenizer

NEWEST_SHARE = 0.2  # of the mean latency


class Frontend:
    """Checks and tokenizes requests, and keeps the live ones. Imports no jax.

    `send` carries messages to the engine; what the engine says comes to `deliver`. Both ends may
    be called from different threads.
    """

    def __init__(self, config: EngineConfig, send: Callable[[ToEngine], None]):
        self.config = config
        self.state = ServingState.of(config)  # replaced as a whole
        self._send = send
        self._lock = threading.Lock()  # of what follows; never held while a caller is told
        # Called with a generation that has got on, and where it was before.
        self.on_progress: Callable[[Generation, Progress], None] = lambda generation, before: None
        self._live: dict[str, Generation] = {}
        self._calls: dict[int, concurrent.futures.Future] = {}
        self._call_ids = itertools.count()
        self._preferred = _parse_preferred(config.preferred_sampling_params)
        self._died: EngineDied | None = None
        self._latency = 0.0  # of late, in seconds
        self.last_progress = time.monotonic()  # when the engine was last heard of
        self.info: EngineInfo
        self.tokenizer: Tokenizer | None

    def set_ready(self, info: EngineInfo, tokenizer: Tokenizer | None = None) -> None:
        """To be called before the first request. Loads the tokenizer unless it is given."""
        self.info = info
        folder = info.tokenizer_folder
        self.tokenizer = tokenizer or (Tokenizer(folder) if folder else None)

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def retry_after(self) -> int:
        """Seconds until one of the live requests is expected to make room for another: by Little's
        law as many end in the time that each takes as are live. At least 1."""
        return max(math.ceil(self._latency / max(self.num_live, 1)), 1)

    def prepare(self, body: Any) -> tuple[GenerateRequest, list[Request]]:
        """Checks a body of /generate and tokenizes its prompts; touches no shared state.

        Raises:
          RequestError: names the field; or the model predicts no tokens.
        """
        if self.info.embedding is not None:
            raise RequestError(ONLY_EMBEDDINGS)
        parsed = GenerateRequest.parse(body, self._preferred)
        requests = []
        for item in parsed.items:
            request = make_request(item, self.tokenizer, self.info, **self._request_options)
            requests += samples_of(request, parsed.num_samples)
        return parsed, requests

    def prepare_encode(self, body: Any) -> tuple[EncodeRequest, list[Request]]:
        """As `prepare`, a body of /encode."""
        if self.info.embedding is None:
            raise RequestError(NO_EMBEDDINGS)
        parsed = EncodeRequest.parse(body)
        return parsed, parsed.requests(self.tokenizer, self.info, **self._request_options)

    def prepare_own(self, body: Any) -> tuple[GenerateRequest | EncodeRequest, list[Request]]:
        """A body that /generate and /encode both take, for whichever of them the model answers."""
        return (self.prepare if self.info.embedding is None else self.prepare_encode)(body)

    @property
    def _request_options(self) -> dict[str, Any]:
        return {
            "allow_auto_truncate": self.config.allow_auto_truncate,
            "use_priority": self.config.enable_priority_scheduling,
            "default_seed": self.config.random_seed,
        }

    def submit(
        self,
        parsed: GenerateRequest | EncodeRequest,
        requests: list[Request],
        on_update: Callable[[], None] = lambda: None,
    ) -> Answers:
        """Sends all requests or, where one cannot be, none.

        Raises:
          RequestError: an id is that of a live request, or nothing can be generated now.
          EngineDied: nothing can be sent any more.
        """
        generations = [self._mailbox(parsed, request, on_update) for request in requests]
        with self._lock:
            if self._died:
                raise self._died
            if refusal := self.state.refusal:
                raise RequestError(refusal, status=503)
            for request in requests:
                if request.rid in self._live:
                    raise RequestError(f"Duplicate request ID detected: {request.rid}", param="rid")
            self._live |= {generation.request.rid: generation for generation in generations}
            for request in requests:
                self._send(AddRequest(request))
        return Answers(parsed, generations, self.config.stream_interval)

    def _mailbox(
        self,
        parsed: GenerateRequest | EncodeRequest,
        request: Request,
        on_update: Callable[[], None],
    ) -> Generation:
        if isinstance(parsed, EncodeRequest):
            is_normalized = self.info.embedding.is_normalized
            return Embedding(request, parsed.dimensions, on_update, is_normalized=is_normalized)
        return Generation(request, self.tokenizer, on_update, self.info.experts)

    def abandon(self, answers: Answers) -> None:
        """Aborts what still runs of a call that nobody waits for any more."""
        for generation in answers.generations:
            if not generation.is_finished:
                self.abort(generation.request.rid)

    def abort(self, rid: str) -> None:
        """Ends a live request; an unknown id is no error, since it may just have finished."""
        if rid in self._live:
            self._send(AbortRequest(rid))

    def abort_call(self, rid: str) -> None:
        """Ends a live request, and the members of a batch of this id: `RID_0`, `RID_1`, ..."""
        for live in list(self._live):
            base, _, number = live.rpartition("_")
            if live == rid or (base == rid and number.isdecimal()):
                self.abort(live)

    def abort_all(self) -> None:
        for rid in list(self._live):
            self.abort(rid)

    def call(self, operation: str, **arguments: Any) -> concurrent.futures.Future:
        """A control operation of the engine; the future holds its value, a RequestError where it
        cannot be done, or a RuntimeError."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._lock:
            if self._died:
                future.set_exception(self._died)
                return future
            call_id = next(self._call_ids)
            self._calls[call_id] = future
            self._send(Call(call_id, operation, arguments))
        return future

    def deliver(self, message: FromEngine) -> None:
        self.last_progress = time.monotonic()
        if isinstance(message, StepNews):
            for update in message.updates:
                take = self._live.get if update.finish_reason is None else self._live.pop
                generation = take(update.rid, None)
                if generation is not None:
                    before = generation.progress
                    generation.deliver(update, self.state)
                    self.on_progress(generation, before)
                    if generation.is_complete:
                        before = self._latency or generation.latency
                        self._latency = before + NEWEST_SHARE * (generation.latency - before)
        elif isinstance(message, ServingState):
            self.state = message
        elif isinstance(message, Reply):
            future = self._calls.pop(message.call_id, None)
            if future is None or not future.set_running_or_notify_cancel():
                pass  # whoever asked has left
            elif message.error is None:
                future.set_result(message.value)
            elif message.status is not None:
                future.set_exception(RequestError(message.error, status=message.status))
            else:
                future.set_exception(RuntimeError(message.error))

    def die(self, error: EngineDied) -> None:
        """Ends everything that waits for the engine."""
        with self._lock:
            self._died = self._died or error  # the first one knows best
            generations, futures = list(self._live.values()), list(self._calls.values())
            self._live.clear()
            self._calls.clear()
        for generation in generations:
            generation.fail(error)
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _parse_preferred(given: str | None) -> dict[str, Any]:
    try:
        preferred = json.loads(given or "{}")
    except ValueError as error:
        raise ValueError(f"--preferred-sampling-params is not JSON: {error}") from error
    if not isinstance(preferred, dict):
        raise ValueError("--preferred-sampling-params must be a JSON object")
    try:
        SamplingParams.parse(preferred)
    except RequestError as error:
        raise ValueError(f"--preferred-sampling-params: {error}") from error
    return preferred
