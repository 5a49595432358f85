"""When requests are sent."""

import asyncio
import statistics
import time
from math import inf

from jaxserve.bench.dataset import Sample
from jaxserve.bench.load import arrivals, run_load

SAMPLES = [Sample([index], index + 1) for index in range(12)]


class Server:
    """Takes `seconds` for a request, and counts."""

    def __init__(self, seconds: float = 0.01):
        self._seconds = seconds
        self.order: list[int] = []
        self.now = self.most = 0

    async def send(self, index: int, sample: Sample, timeline) -> None:
        assert sample is SAMPLES[index]
        self.order.append(index)
        timeline.sent = time.perf_counter()
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self._seconds)
        self.now -= 1
        timeline.record(time.perf_counter(), sample.output_len)


def test_all_at_once_without_a_limit():
    server = Server()
    timelines = asyncio.run(run_load(SAMPLES, server.send))
    assert server.most == 12
    assert [timeline.num_tokens for timeline in timelines] == list(range(1, 13))
    assert [timeline.asked_tokens for timeline in timelines] == list(range(1, 13))


def test_concurrency_is_reached_and_never_passed():
    for limit in (1, 5):
        server = Server()
        asyncio.run(run_load(SAMPLES, server.send, max_concurrency=limit))
        assert server.most == limit
        assert server.order == list(range(12))


def test_requests_are_sent_when_they_arrive():
    server = Server(seconds=0.0)
    timelines = asyncio.run(run_load(SAMPLES, server.send, request_rate=100.0, seed=3))
    due = [timeline.due - timelines[0].due for timeline in timelines]
    expected = list(arrivals(12, 100.0, 3))
    assert all(abs(a - b) < 1e-6 for a, b in zip(due, expected, strict=True))
    assert all(timeline.sent >= timeline.due for timeline in timelines)


def test_waiting_for_a_free_place_shows_as_delay():
    server = Server(seconds=0.05)
    timelines = asyncio.run(run_load(SAMPLES[:3], server.send, max_concurrency=1))
    delays = [timeline.sent - timeline.due for timeline in timelines]
    assert delays[0] < 0.05 <= delays[1] and delays[2] >= 0.1


def test_arrivals_are_a_poisson_process_of_the_seed():
    times = list(arrivals(20_000, 50.0, 0))
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    mean, deviation = statistics.fmean(gaps), statistics.pstdev(gaps)
    print(f"mean {mean:.5f} s, deviation {deviation:.5f} s")
    assert times[0] == 0
    assert abs(mean - 0.02) < 0.0005 and abs(deviation - 0.02) < 0.0005, "exponential gaps"
    assert list(arrivals(9, 50.0, 0)) == times[:9] != list(arrivals(9, 50.0, 1))
    assert list(arrivals(3, inf, 0)) == [0, 0, 0]
