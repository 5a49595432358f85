"""The engine in this process, for programs that embed it: one thread steps, any thread asks."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import jax

from jaxserve.answers import Answers
from jaxserve.config import EngineConfig
from jaxserve.engine_builder import build_engine
from jaxserve.errors import EngineDied
from jaxserve.frontend import Frontend
from jaxserve.messages import EngineInfo, ToEngine
from jaxserve.models.fuse import Fuser
from jaxserve.serving_state import ServingState
from jaxserve.weight_request import InFlight, PauseMode, parse_disk_update

logger = logging.getLogger(__name__)


class Engine:
    """Serves a model. Answers have the shape of the HTTP API's /generate.

    engine = Engine(model_path="path/to/model")
    engine.generate("The capital of France is", {"temperature": 0})["text"]
    """

    def __init__(self, config: EngineConfig | None = None, *, params: Any = None, **options: Any):
        """Loads the model and compiles its programs.

        Args:
          config: or its fields as keywords, `model_path` first of all.
          params: weights in place of those in `model_path`, as `update_weights` takes them.

        Raises:
          FileNotFoundError, ValueError: the model or an option cannot be served; says why.
        """
        config = EngineConfig(**options) if config is None else config
        self._inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._frontend = Frontend(config, self._inbox.put)
        self._core = build_engine(config, params=params)
        self._fuser = Fuser(self._core.abstract_params)
        self._frontend.set_ready(self._core.info, self._core.tokenizer)
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()

    @property
    def info(self) -> EngineInfo:
        """What it serves, and its limits."""
        return self._core.info

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        rid: str | list[str] | None = None,
        stream: bool = False,
        **fields: Any,
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Generates from one prompt or several, and blocks until the answer is there.

        With `stream`, returns an iterator of growing answers; those of a batch carry an "index".

        Args:
          fields: any other of /generate (`return_logprob`, `cache_salt`, ...).

        Raises:
          RequestError: the request cannot be served; the message names the field.
          EngineDied: the engine's thread has failed.
        """
        changed = threading.Event()
        body = _body(prompt, sampling_params, input_ids, rid, stream, fields)
        answers = self._submit(body, changed.set)
        stream_of_answers = self._follow(answers, changed)
        next(stream_of_answers)
        return stream_of_answers if stream else answers.in_order(list(stream_of_answers))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        rid: str | list[str] | None = None,
        stream: bool = False,
        **fields: Any,
    ) -> dict[str, Any] | list[dict[str, Any]] | AsyncIterator[dict[str, Any]]:
        """As `generate`, awaited; with `stream`, the awaited result is an asynchronous iterator."""
        changed, on_update = _event_of_loop()
        body = _body(prompt, sampling_params, input_ids, rid, stream, fields)
        answers = self._submit(body, on_update)
        stream_of_answers = self._follow_async(answers, changed)
        await anext(stream_of_answers)
        if stream:
            return stream_of_answers
        return answers.in_order([answer async for answer in stream_of_answers])

    def encode(
        self,
        prompt: str | list[str] | list[list[str]] | None = None,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        dimensions: int | None = None,
        **fields: Any,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The vector of one text or several, in the shape of the HTTP API's /encode; blocks until
        all are there. For a model that answers with vectors (`is_embedding=True`).

        Args:
          prompt: of an encoder, pairs of texts too: [[query, document], ...].
          dimensions: that vectors are cut to, where the model allows it.
          fields: any other of /encode (`rid`, `priority`, ...).

        Returns:
          An answer, or a list. One whose `finish_reason` is "abort" (the model's numbers are not
          finite, say) has an empty embedding.

        Raises:
          RequestError: the request cannot be served; the message names the field.
          EngineDied: the engine's thread has failed.
        """
        changed = threading.Event()
        body = {**fields, "text": prompt, "input_ids": input_ids, "dimensions": dimensions}
        answers = self._frontend.submit(*self._frontend.prepare_encode(body), changed.set)
        return answers.in_order([answer for answer in self._follow(answers, changed) if answer])

    async def async_encode(
        self,
        prompt: str | list[str] | list[list[str]] | None = None,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        dimensions: int | None = None,
        **fields: Any,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """As `encode`, awaited."""
        changed, on_update = _event_of_loop()
        body = {**fields, "text": prompt, "input_ids": input_ids, "dimensions": dimensions}
        answers = self._frontend.submit(*self._frontend.prepare_encode(body), on_update)
        finished = [answer async for answer in self._follow_async(answers, changed) if answer]
        return answers.in_order(finished)

    def flush_cache(self) -> bool:
        """Empties the prefix cache; False, and nothing done, while requests are running."""
        return self._frontend.call("flush_cache").result()

    def start_expert_distribution_record(self) -> None:
        """Counts from now on how often each expert is taken, from nothing. This and the two that
        follow raise RequestError for a model without experts."""
        self._frontend.call("start_expert_record").result()

    def stop_expert_distribution_record(self) -> None:
        self._frontend.call("stop_expert_record").result()

    def dump_expert_distribution_record(self) -> str:
        """Writes what was counted to a file, and begins anew; returns its path. Without a mode
        (`expert_distribution_recorder_mode`) the recording ends with it."""
        return self._frontend.call("dump_expert_record").result()

    @property
    def state(self) -> ServingState:
        """Which weights serve, under which label, and whether anything is generated."""
        return self._frontend.state

    def update_weights_from_disk(self, model_path: str, **fields: Any) -> dict[str, Any]:
        """Serves the weights in another folder, of the same model, from the next step on.

        Args:
          fields: any other of /update_weights_from_disk (`weight_version`, `in_flight`, ...).

        Raises:
          RequestError: they cannot be had, or are not of this model; nothing has changed.
        """
        update = parse_disk_update({"model_path": model_path, **fields})
        return self._frontend.call("update_weights", **update.to_arguments()).result()

    def update_weights(
        self, params: Any, *, weight_version: str | None = None, in_flight: InFlight = "wait"
    ) -> None:
        """Serves the weights in a tree, from the next step on: no file, and nothing is compiled
        but, at the first call, the one function that fuses what serving keeps fused.

        The arrays themselves serve from then on, but for those that are fused, moved or cast: a
        trainer that donates its parameters to its next step must hand over copies of them.

        Args:
          params: any tree with the checkpoint's names (nested dicts, an `nnx.State` or
            `nnx.Module`, a flat dict), in any sharding; or what `make_step(...).prepare` returns.
          weight_version: the label in `meta_info` from then on.
          in_flight: what becomes of requests that run: "wait" lets them finish first, "abort" ends
            them, "retract" computes them anew, "in_place" goes on with what they have computed.

        Raises:
          ValueError: the tree does not fit the model; nothing has changed.
          RequestError: another update is under way.
        """
        leaves = jax.tree.leaves(self._fuser.fuse(params))
        specs = self._core.weight_specs
        placed = {
            number: leaf if leaf.sharding == spec.sharding else jax.device_put(leaf, spec.sharding)
            for number, (leaf, spec) in enumerate(zip(leaves, specs, strict=True))
        }
        arguments = {"in_flight": in_flight, "weight_version": weight_version}
        self._frontend.call("swap_weights", leaves=placed, **arguments).result()

    def weights(self) -> dict[str, jax.Array]:
        """The tensors that serve, under the checkpoint's names and in its shapes.

        Raises:
          RuntimeError: their memory is released.
        """
        leaves = self._core.weights
        if any(leaf is None for leaf in leaves):
            raise RuntimeError("the weights are released")
        treedef = jax.tree.structure(self._core.abstract_params)
        return self._fuser.unfuse(jax.tree.unflatten(treedef, leaves))

    def pause_generation(self, mode: PauseMode = "abort") -> None:
        """Requests wait until `continue_generation`. Those that run end ("abort"), are computed
        anew afterwards ("retract"), or stay as they are ("in_place")."""
        self._frontend.call("pause_generation", mode=mode).result()

    def continue_generation(self) -> None:
        self._frontend.call("continue_generation").result()

    def shutdown(self) -> None:
        """Ends the engine's thread and frees its memory and programs; requests that are still
        running end with EngineDied."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_messages():
                for news in self._core.settle():
                    self._frontend.deliver(news)
                output = self._core.step()
                if output is not None:
                    self._frontend.deliver(output)
            self._frontend.die(EngineDied("the engine was shut down"))
        except BaseException as error:
            self._frontend.die(EngineDied.of(error))
            logger.exception("the engine failed")
        finally:
            self._core.close()
            self._core.release()

    def _take_messages(self) -> bool:
        """Takes in what has arrived, waiting where there is nothing to run; False at the end."""
        while True:
            try:
                message = self._inbox.get(timeout=self._core.patience)
            except queue.Empty:
                return True
            if message is None:
                return False
            for answer in self._core.handle(message):
                self._frontend.deliver(answer)

    def _submit(self, body: dict[str, Any], on_update: Callable[[], None]) -> Answers:
        parsed, requests = self._frontend.prepare(body)
        return self._frontend.submit(parsed, requests, on_update)

    def _follow(self, answers: Answers, changed: threading.Event) -> Iterator[dict[str, Any]]:
        try:
            yield {}  # taken by the caller: a generator that has not begun would not abandon
            while not answers.is_over:
                changed.wait()
                changed.clear()
                yield from answers.take()
        finally:
            self._frontend.abandon(answers)

    async def _follow_async(
        self, answers: Answers, changed: asyncio.Event
    ) -> AsyncIterator[dict[str, Any]]:
        try:
            yield {}  # as in `_follow`
            async for answer in answers.follow(changed):
                yield answer
        finally:
            self._frontend.abandon(answers)


def _event_of_loop() -> tuple[asyncio.Event, Callable[[], None]]:
    """An event of the running loop, and what sets it from any thread."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def on_update() -> None:
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed
            loop.call_soon_threadsafe(changed.set)

    return changed, on_update


def _body(prompt, sampling_params, input_ids, rid, stream, fields) -> dict[str, Any]:
    """The body that /generate would have."""
    return {
        **fields,
        "text": prompt,
        "input_ids": input_ids,
        "sampling_params": sampling_params,
        "rid": rid,
        "stream": stream,
    }
