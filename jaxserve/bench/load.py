"""When each request is sent."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from math import inf

from jaxserve.bench.dataset import Sample
from jaxserve.bench.timeline import Timeline

Send = Callable[[int, Sample, Timeline], Awaitable[None]]  # fills the timeline, and raises nothing


async def run_load(
    samples: list[Sample],
    send: Send,
    *,
    max_concurrency: int | None = None,
    request_rate: float = inf,
    seed: int = 0,
) -> list[Timeline]:
    """Sends every sample, in order, and returns when the last answer is there.

    Args:
      request_rate: arrivals in a second, as a Poisson process; with `inf` all arrive at once.
      max_concurrency: what arrives while so many are under way is sent when one of them ends.
    """
    gate = asyncio.Semaphore(max_concurrency or len(samples))

    async def run(index: int, timeline: Timeline) -> None:
        try:
            await send(index, samples[index], timeline)
        finally:
            gate.release()

    began, timelines = time.perf_counter(), []
    async with asyncio.TaskGroup() as tasks:
        for index, offset in enumerate(arrivals(len(samples), request_rate, seed)):
            due = began + offset
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            await gate.acquire()
            timelines.append(Timeline(samples[index].output_len, due))
            tasks.create_task(run(index, timelines[-1]))
    return timelines


def arrivals(count: int, rate: float, seed: int) -> Iterator[float]:
    """Seconds after the start; the first one is at once."""
    draw, offset = random.Random(seed), 0.0
    for _ in range(count):
        yield offset
        offset += draw.expovariate(rate) if rate < inf else 0.0
