"""The log lines that tell how an engine is doing, and the throughput in them."""

import logging
import re

import pytest

from jaxserve.step_log import StepLog
from tests.engine.scheduling import add, make_scheduler, step

PREFILL = (
    "Prefill batch. #new-seq: 1, #new-token: 5, #cached-token: 0, token usage: 0.02, "
    "#running-req: 0, #queue-req: 0"
)


class World:
    """A scheduler whose steps take a tenth of a second."""

    def __init__(self, interval: int):
        self.now = 1000.0
        self.scheduler = make_scheduler(max_rows=4)
        self.log = StepLog(self.scheduler, interval, lambda: self.now)

    def run(self, count: int, max_new_tokens: int) -> None:
        """So many requests at once, to their end."""
        for number in range(count):
            add(self.scheduler, f"r{number}", 5, max_new_tokens)
        schedule = self.scheduler.schedule
        while not self.scheduler.is_idle:
            self.scheduler.schedule = lambda: self._log(schedule())
            step(self.scheduler)
            self.now += 0.1
        self.scheduler.schedule = schedule
        self.log.on_idle()

    def _log(self, schedule):
        self.log.before(schedule)
        return schedule


def throughputs(caplog) -> list[float]:
    lines = [record.getMessage() for record in caplog.records]
    return [float(found[1]) for line in lines if (found := re.search(r"token/s\): ([\d.]+)", line))]


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO, "jaxserve")


def test_lines_have_the_words_that_scripts_read(caplog):
    World(interval=3).run(1, 5)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        PREFILL,
        "Decode batch. #running-req: 1, #token: 7, token usage: 0.02, "
        "gen throughput (token/s): 10.00, #queue-req: 0",
    ]


def test_throughput_is_that_of_the_time_with_work(caplog):
    """Two rows, a tenth of a second for each of their tokens, and an hour between the runs."""
    world = World(interval=10)
    for _ in range(6):
        world.run(2, 9)
        world.now += 3600
    found = throughputs(caplog)
    print(found)
    assert len(found) == 4
    # Eight of nine steps decode, for two rows each: 16 tokens in 0.9 seconds.
    assert all(abs(one - 16 / 0.9) < 2 for one in found)
    assert world.log.last_gen_throughput == pytest.approx(found[-1], abs=0.01)
