"""`jaxserve bench offline`: an engine in this process, without HTTP."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import uvloop

from jaxserve.bench import cpu_time
from jaxserve.bench.dataset import Sample, make_samples
from jaxserve.bench.load import run_load
from jaxserve.bench.metrics import summarize
from jaxserve.bench.options import DatasetOptions, LoadOptions, OfflineOptions
from jaxserve.bench.sampling import sampling_params
from jaxserve.bench.timeline import Timeline
from jaxserve.engine import Engine
from jaxserve.errors import EngineDied, RequestError


def run(
    engine: Engine, dataset: DatasetOptions, load: LoadOptions, offline: OfflineOptions
) -> Iterator[dict[str, Any]]:
    """A run for each concurrency and rate.

    Raises:
      ValueError, OSError: the requests cannot be made; says why.
    """
    samples = make_samples(dataset, engine.info.vocab_size)
    bench = Offline(engine, load, dataset.seed, offline.stream)
    for concurrency, rate in itertools.product(load.max_concurrency or (None,), load.request_rate):
        bench.warm_up(samples[: load.warmup_requests])
        yield {
            "parameters": {"max_concurrency": concurrency, "request_rate": rate},
            "metrics": bench.measure(samples, concurrency, rate),
        }


class Offline:
    def __init__(self, engine: Engine, load: LoadOptions, seed: int, is_streamed: bool):
        self._engine, self._keep_cache = engine, load.keep_cache
        self._given, self._seed, self._is_streamed = load.sampling(), seed, is_streamed

    def warm_up(self, samples: list[Sample]) -> None:
        if samples:
            uvloop.run(run_load(samples, self._send))
        if not self._keep_cache:
            self._engine.flush_cache()

    def measure(self, samples: list[Sample], concurrency: int | None, rate: float) -> dict:
        before = cpu_time.own()
        load = {"max_concurrency": concurrency, "request_rate": rate, "seed": self._seed}
        timelines = uvloop.run(run_load(samples, self._send, **load))
        spent = cpu_time.own() - before
        metrics = summarize(timelines, is_streamed=self._is_streamed)
        metrics["output_tokens_per_cpu_s"] = metrics["output_tokens"] / spent.total
        return metrics | {"cpu_s": spent._asdict()}

    async def _send(self, index: int, sample: Sample, timeline: Timeline) -> None:
        timeline.sent = time.perf_counter()
        name = "prompt" if isinstance(sample.prompt, str) else "input_ids"
        request = {
            name: sample.prompt,
            "sampling_params": sampling_params(sample, self._given, self._seed + index),
        }
        try:
            if self._is_streamed:
                async for answer in await self._engine.async_generate(**request, stream=True):
                    take(answer, timeline)
            else:
                take(await self._engine.async_generate(**request), timeline)
        except (RequestError, EngineDied) as error:
            timeline.error = str(error)


def take(answer: dict[str, Any], timeline: Timeline) -> None:
    """An answer of the engine, as it is or as it grows."""
    meta = answer["meta_info"]
    timeline.record(time.perf_counter(), meta["completion_tokens"])
    timeline.prompt_tokens, timeline.cached_tokens = meta["prompt_tokens"], meta["cached_tokens"]
    reason = meta["finish_reason"]
    if reason is not None and reason["type"] == "abort":
        timeline.error = f"aborted: {reason['message']}"


def device_of(engine: Engine) -> dict[str, Any]:
    return {"device": engine.info.device, "num_devices": engine.info.num_devices}


def versions() -> dict[str, str | None]:
    return {"jax": jax.__version__, "jaxlib": jax.lib.__version__}
