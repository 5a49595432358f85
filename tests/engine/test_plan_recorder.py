"""The writer of a plan log: what is in the file when, who may read it, and what a disk may do."""

import asyncio
import logging
import os
import pathlib
import stat
import time

import pytest

from jaxserve.buckets import Buckets
from jaxserve.client import EngineClient
from jaxserve.config import EngineConfig
from jaxserve.plan_log import MAGIC, Drawn, Header, PlanLog, PlannedStep, Record, Reset
from jaxserve.plan_recorder import PlanRecorder, create_file
from jaxserve.step_plan import OUT_OF_LENGTH, RUNNING, STOPPED, StepPlan
from tests.server.serving import DEMO_MODEL, GREEDY, SMALL, programs_folder, wait_for

HEADER = Header(
    version=1,
    jaxserve="0",
    jax="0",
    device="cpu",
    config=EngineConfig(model_path="x", page_size=4, max_running_requests=3),
    model_folder="/x",
    model_digest="d",
    shape={"max_rows": 3, "dtype": "float32"},
    buckets=Buckets.make(3, 16, growth=2),
)


def plan(step: int, num_steps: int = 1) -> StepPlan:
    return StepPlan(step, "decode", 4, 4, num_steps, "plain", patch=bytes(range(step % 200)))


def read(path: pathlib.Path) -> tuple[Header, list[Record]]:
    with path.open("rb") as file:
        log = PlanLog(file)
        records = list(log)
    assert log.truncated_at is None
    return log.header, records


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "run.plans"


@pytest.fixture
def recorder(path):
    recorder = PlanRecorder(create_file(path), HEADER)
    yield recorder
    recorder.close()


def test_file_holds_what_the_recorder_was_told(path, recorder):
    result = [[(10 + step, RUNNING, -1), (20 + step, STOPPED, -1), (0, 0, 0)] for step in range(3)]
    recorder.dispatch(plan(5, num_steps=2))
    recorder.dispatch(plan(6))
    recorder.read([1, 0], result[:2])
    recorder.reset()
    recorder.dispatch(plan(7))
    recorder.read([2], result[:1])
    recorder.close()
    recorder.close()  # a second time is no error
    recorder.reset()  # nor is a step after it
    header, records = read(path)
    assert header == HEADER
    assert records == [
        PlannedStep(plan(5, num_steps=2)),
        PlannedStep(plan(6)),
        Drawn(5, [1, 0], [[[20, STOPPED], [10, RUNNING]], [[21, STOPPED], [11, RUNNING]]]),
        Reset(),
        PlannedStep(plan(7)),
        Drawn(7, [2], [[[0, 0]]]),
    ]
    assert [token for _, _, token in records[2].tokens()] == [[20, 1], [10, 0], [11, 0]]


def test_tokens_end_with_the_row():
    draws = [[[1, RUNNING], [2, OUT_OF_LENGTH]], [[3, STOPPED], [4, RUNNING]], [[5, 0], [6, 0]]]
    assert list(Drawn(0, [8, 9], draws).tokens()) == [
        (0, 8, [1, RUNNING]),
        (0, 9, [2, OUT_OF_LENGTH]),
        (1, 8, [3, STOPPED]),
    ]


def test_records_are_in_the_file_within_a_second(path, recorder):
    """While the engine is idle, too: nobody calls the recorder again."""
    wait_for(lambda: path.stat().st_size, 1)
    for step in range(3):
        recorder.dispatch(plan(step))
        began = time.monotonic()
        wait_for(lambda: len(read(path)[1]) == step + 1, 1)  # noqa: B023
        print(f"step {step} is in the file after {time.monotonic() - began:.2f} s")


def test_engine_does_not_wait_for_the_file(recorder):
    """Mean microseconds of the loop: a step of 64 rows, recorded."""
    result = [[(token, RUNNING, 0) for token in range(65)]]
    rows = list(range(64))
    began = time.perf_counter()
    for step in range(2000):
        recorder.dispatch(plan(step))
        recorder.read(rows, result)
    mean = (time.perf_counter() - began) / 2000 * 1e6
    print(f"{mean:.0f} us per step")
    assert mean < 500


@pytest.mark.parametrize("umask", [0, 0o077])
def test_nobody_else_may_read_it(path, umask):
    before = os.umask(umask)
    try:
        create_file(path).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_older_log_is_kept_beside_it(path):
    for number in range(3):
        recorder = PlanRecorder(create_file(path), HEADER)
        recorder.dispatch(plan(number))
        recorder.close()
    older = path.with_name("run.plans.old")
    assert read(path)[1] == [PlannedStep(plan(2))] and read(older)[1] == [PlannedStep(plan(1))]
    assert sorted(file.name for file in path.parent.iterdir()) == ["run.plans", "run.plans.old"]


def test_log_without_steps_does_not_push_out_another(path):
    """As starts leave it that are refused: before there is a header, or after."""
    recorder = PlanRecorder(create_file(path), HEADER)
    recorder.dispatch(plan(5))
    recorder.close()
    for _ in range(2):
        create_file(path).close()
    for _ in range(2):
        PlanRecorder(create_file(path), HEADER).close()
    create_file(path).close()
    assert path.read_bytes() == b"" and path.stat().st_mode & 0o777 == 0o600
    assert read(path.with_name("run.plans.old"))[1] == [PlannedStep(plan(5))]


def test_other_files_are_left_alone(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(MAGIC[1:])
    for path, words in (
        (precious, "precious: is there already, and is no plan log"),
        (tmp_path, "is there already, and is no plan log"),
        (pathlib.Path("/dev/null"), "/dev/null: is there already, and is no plan log"),
        (tmp_path / "no" / "folder", "folder: No such file or directory"),
    ):
        with pytest.raises(ValueError, match=f"--record-plans .*{words}"):
            create_file(path)
    assert precious.read_bytes() == MAGIC[1:] and len(list(tmp_path.iterdir())) == 1


def test_full_disk_ends_the_recording_with_a_warning_and_nothing_else(caplog):
    caplog.set_level(logging.WARNING, logger="jaxserve")
    full = open("/dev/full", "wb")  # noqa: SIM115
    recorder = PlanRecorder(full, HEADER)
    wait_for(lambda: caplog.records, 2)
    for step in range(10):
        recorder.dispatch(plan(step))
        recorder.read([0], [[(1, RUNNING)]])
    recorder.close()
    (record,) = caplog.records
    print(record.message)
    assert "--record-plans: nothing more is recorded" in record.message
    assert "No space left on device" in record.message
    assert recorder._queue.qsize() <= 1, "nothing piles up"


def test_disk_that_does_not_keep_up_ends_the_recording(monkeypatch, caplog, tmp_path):
    """A named pipe that nobody empties, and little patience."""
    monkeypatch.setattr("jaxserve.plan_recorder.MOST_WAITING", 1 << 20)
    monkeypatch.setattr("jaxserve.plan_recorder.CLOSE_SECONDS", 0.2)
    caplog.set_level(logging.WARNING, logger="jaxserve")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    recorder = PlanRecorder((tmp_path / "pipe").open("wb"), HEADER)
    for step in range(10_000):
        recorder.dispatch(plan(step % 200 + 200))
    began = time.monotonic()
    recorder.close()
    assert time.monotonic() - began < 2
    (record,) = caplog.records
    assert "the disk is too slow" in record.message
    assert recorder._queue.qsize() * len(plan(399).patch) < 2 << 20
    os.close(reader)  # and the thread ends


def test_server_that_ends_has_recorded_every_token(pytestconfig, path):
    """The engine's process writes what is left before it goes, whoever has told it to go."""
    folder = programs_folder(pytestconfig)
    config = EngineConfig(
        model_path=DEMO_MODEL, compilation_cache_dir=folder, record_plans=str(path), **SMALL
    )
    sampling = GREEDY | {"ignore_eos": True, "max_new_tokens": 40}

    async def main() -> list[int]:
        client = EngineClient(config)
        await client.start()
        changed = asyncio.Event()
        body = {"text": "Kenya", "sampling_params": sampling}
        answers = client.submit(*client.prepare(body), changed.set)
        finished = [answer async for answer in answers.follow(changed)]
        await client.stop()
        return finished[-1]["output_ids"]

    ids = asyncio.run(main())
    _, records = read(path)
    drawn = [one for one in records if isinstance(one, Drawn)]
    tokens = [token for record in drawn for _, _, (token, _) in record.tokens()]
    print(f"{len(tokens)} tokens in {len(records)} records, {path.stat().st_size} bytes")
    assert tokens == ids and len(ids) == 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
