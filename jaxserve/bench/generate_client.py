"""A request to /generate, followed from event to event."""

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec

from jaxserve.bench.dataset import Sample
from jaxserve.bench.http_client import HttpClient
from jaxserve.bench.timeline import Timeline

MOST_ERROR = 300  # characters of what a server answers that are kept
DONE = b"[DONE]"


class FinishReason(msgspec.Struct):
    type: str
    message: str | None = None


class MetaInfo(msgspec.Struct):
    """What is read of an answer; the text and the ids, which grow from event to event, are only
    skipped over."""

    completion_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None


class Event(msgspec.Struct):
    meta_info: MetaInfo | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Event).decode


class EventReader:
    """Takes the bytes of a stream of server-sent events, and keeps a timeline."""

    def __init__(self, timeline: Timeline, clock: Callable[[], float] = time.perf_counter):
        self._timeline, self._clock = timeline, clock
        self._rest = b""  # of an event that has not come completely
        self._is_finished = False

    def feed(self, data: bytes) -> None:
        now = self._clock()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                self._take(event[5:].strip(), now)

    def end(self) -> None:
        """The stream is over; it must have said so itself."""
        if not self._is_finished and self._timeline.error is None:
            self._timeline.error = "the stream ended without a finish_reason"

    def _take(self, content: bytes, now: float) -> None:
        if content == DONE:
            return
        timeline = self._timeline
        try:
            event = _decode(content)
        except msgspec.DecodeError as error:
            timeline.error = f"an event that is not an answer of /generate: {error}"
            return
        if event.error is not None:
            timeline.error = message_of({"error": event.error})
        if event.meta_info is None:
            return
        timeline.record(now, event.meta_info.completion_tokens)
        reason = event.meta_info.finish_reason
        if reason is not None:
            self._is_finished = True
            timeline.prompt_tokens = event.meta_info.prompt_tokens
            timeline.cached_tokens = event.meta_info.cached_tokens
            if reason.type == "abort":
                timeline.error = f"aborted: {reason.message}"


def encode(sample: Sample, sampling_params: dict[str, Any]) -> bytes:
    """The body of a streamed request."""
    name = "text" if isinstance(sample.prompt, str) else "input_ids"
    return msgspec.json.encode(
        {name: sample.prompt, "sampling_params": sampling_params, "stream": True}
    )


async def generate(client: HttpClient, body: bytes, timeline: Timeline) -> None:
    """Sends one request; what goes wrong is written into the timeline."""
    reader = EventReader(timeline)
    timeline.sent = time.perf_counter()
    try:
        response = await client.request("POST", "/generate", body, reader.feed)
    except TimeoutError:
        timeline.error = f"no answer in time, {timeline.num_tokens} tokens had come"
    except OSError as error:
        timeline.error = f"{error}, {timeline.num_tokens} tokens had come"
    else:
        if response.status == 200:
            reader.end()
        else:
            timeline.error = f"{response.status}: {message_of(response.body)}"


def message_of(body: bytes | dict[str, Any]) -> str:
    """The reason in an error's body, whichever shape it has."""
    try:
        content = json.loads(body) if isinstance(body, bytes) else body
        error = content.get("error", content.get("message"))
        text = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = None
    if not isinstance(text, str):
        text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    return text[:MOST_ERROR]
