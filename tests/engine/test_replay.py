"""A recorded run, executed again: token for token, or it is noticed."""

import functools
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import jax
import msgspec
import numpy as np
import pytest

from jaxserve import Engine
from jaxserve.config import EngineConfig
from jaxserve.model_loader import ModelFiles
from jaxserve.plan_log import (
    LENGTH,
    MAGIC,
    VERSION,
    Drawn,
    Header,
    PlanLog,
    PlannedStep,
    Record,
    Reset,
    WeightsChanged,
    encode,
)
from jaxserve.replay import Comparison, compare, load_runner, load_weights
from jaxserve.step_plan import ints
from jaxserve.tokenizer import Tokenizer
from tests.engine.reloading import write_variant
from tests.golden.cases import CASES
from tests.golden.random_checkpoint import write_checkpoint
from tests.server.serving import DEMO_MODEL, SMALL, programs_folder

QUESTION = "What is the capital of France?"
LONG = QUESTION * 10  # 70 tokens: two chunks
SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 1.5, "sampling_seed": 1},
    {"temperature": 1.0, "top_k": 20, "sampling_seed": 2},
    {"frequency_penalty": 1.0, "repetition_penalty": 1.1, "logit_bias": {"300": 2.0}, "min_p": 0.1},
    {"temperature": 2.0, "top_p": 0.7},
]
NUM_TOKENS = 60
STEPS = 4  # in one dispatch


@pytest.fixture(scope="module")
def path(pytestconfig, tmp_path_factory) -> pathlib.Path:
    """The log of a run with everything that makes a step more than a decode step."""
    path = tmp_path_factory.mktemp("plans") / "run.plans"
    options = {"compilation_cache_dir": programs_folder(pytestconfig)} | SMALL
    with Engine(
        model_path=DEMO_MODEL,
        record_plans=str(path),
        num_continuous_decode_steps=STEPS,
        max_total_tokens=16 * 16,
        schedule_conservativeness=0.1,
        **options,
    ) as engine:
        texts = [QUESTION, LONG, "Once upon a time", "Once" + LONG, QUESTION + " It is", "Kenya"]
        sampling = [
            params | {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
            for _, params in zip(texts, itertools.cycle(SAMPLING), strict=False)
        ]
        first = engine.generate(texts, sampling)
        state = engine._frontend.call("internal_state").result()
        fail_once(engine)
        second = engine.generate(
            texts[:3], sampling[:3], return_logprob=True, logprob_start_len=0, top_logprobs_num=2
        )
    answers = [answer["meta_info"] for answer in (*first, *second)]
    print(f"retractions: {state['num_retractions']}")
    print(f"cached tokens: {[answer['cached_tokens'] for answer in answers]}")
    assert state["num_retractions"] and any(answer["cached_tokens"] for answer in answers)
    assert all(answer["completion_tokens"] == NUM_TOKENS for answer in answers)
    return path


def fail_once(engine: Engine) -> None:
    """The next step is lost, and the state with it."""
    runner = engine._core._runner
    dispatch = runner.dispatch

    def fail(plan):
        runner.dispatch = dispatch
        dispatch(plan)
        raise RuntimeError("injected")

    runner.dispatch = fail


@pytest.fixture(scope="module")
def header(path) -> Header:
    with path.open("rb") as file:
        return PlanLog(file).header


@pytest.fixture(scope="module")
def records(path) -> list[Record]:
    with path.open("rb") as file:
        log = PlanLog(file)
        records = list(log)
    assert log.truncated_at is None
    return records


@pytest.fixture(scope="module")
def runner(path):
    with path.open("rb") as file:
        log = PlanLog(file)
        yield load_runner(log, log.header.config)
    jax.clear_caches()


def replay(runner, records: list[Record], load=None) -> Comparison:
    runner.reset()
    comparison = compare(runner, records, load)
    print(comparison)
    return comparison


def plans(records: list[Record]):
    return [record.plan for record in records if isinstance(record, PlannedStep)]


def changed(records: list[Record], where: Callable[[Record], bool], change) -> list[Record]:
    """With one record changed: the one in the middle of those that `where` takes."""
    chosen = [number for number, record in enumerate(records) if where(record)]
    number = chosen[len(chosen) // 2]
    return [*records[:number], change(records[number]), *records[number + 1 :]]


# What is recorded.


def test_log_holds_all_kinds_of_steps(records):
    run = plans(records)
    extends = [plan for plan in run if plan.kind == "extend"]
    tokens = [
        int(ints(plan.forward).reshape(-1)[plan.num_rows : 2 * plan.num_rows].max())
        for plan in extends
    ]
    counts = {
        "steps": len(run),
        "chunks of a prompt": sum(count > 1 for count in tokens),
        "full chunks": sum(count >= 39 for count in tokens),
        "copies of pages": sum(bool(plan.copies) for plan in run),
        "decode steps": sum(plan.kind == "decode" for plan in run),
        "steps of the full sampler": sum(plan.sampler == "full" for plan in run),
        "rows that count tokens": sum(bool(plan.counts) for plan in run),
        "rows with a bias": sum(bool(plan.extras) for plan in run),
        "scored prompts": sum(bool(plan.scores) for plan in run),
        "resets": sum(isinstance(record, Reset) for record in records),
    }
    print(counts)
    assert all(counts.values()) and counts["resets"] == 1
    assert {plan.num_steps for plan in run if plan.kind == "decode"} == {STEPS}


def test_log_holds_every_token_that_was_answered(records):
    drawn = sum(1 for record in records if isinstance(record, Drawn) for _ in record.tokens())
    print(f"{drawn} tokens drawn for 9 answers of {NUM_TOKENS}")
    assert drawn == 9 * NUM_TOKENS


# What is replayed.


def test_run_is_reproduced_token_for_token(runner, records):
    comparison = replay(runner, records)
    assert comparison.is_equal and comparison.equal_tokens == comparison.tokens
    assert comparison.steps == sum(isinstance(record, Drawn) for record in records)
    assert comparison.resets == 1


def test_changed_token_in_the_log_is_found(runner, records):
    def change(record: Drawn) -> Drawn:
        (token, finish), *others = record.draws[0]
        return msgspec.structs.replace(
            record, draws=[[[token + 1, finish], *others], *record.draws[1:]]
        )

    wrong = changed(records, lambda record: isinstance(record, Drawn) and record.rows, change)
    (step,) = [new.step for new, old in zip(wrong, records, strict=True) if new is not old]
    comparison = replay(runner, wrong)
    assert not comparison.is_equal
    assert comparison.tokens - comparison.equal_tokens == 1
    assert comparison.steps - comparison.equal_steps == 1
    assert comparison.first_difference.startswith(f"step {step}, row ")


def test_other_prompt_is_noticed(runner, records):
    """So the tokens come from the plans, not from the log's answers."""

    def change(record: PlannedStep) -> PlannedStep:
        forward = ints(record.plan.forward)
        forward[3 * record.plan.num_rows] += 1
        return PlannedStep(msgspec.structs.replace(record.plan, forward=forward.tobytes()))

    def is_prompt(record: Record) -> bool:
        return isinstance(record, PlannedStep) and record.plan.step == 0

    assert not replay(runner, changed(records, is_prompt, change)).is_equal


def test_left_out_copies_are_noticed(runner, records):
    """Requests that continue a cached page need what was in it."""
    without = [
        PlannedStep(msgspec.structs.replace(record.plan, copies=b""))
        if isinstance(record, PlannedStep)
        else record
        for record in records
    ]
    assert not replay(runner, without).is_equal


def test_run_with_other_weights_is_reproduced_from_their_folder(runner, header, records, tmp_path):
    other = write_variant(tmp_path / "other")
    load = functools.partial(load_weights, header.config)
    with_other = replay(runner, [WeightsChanged(str(other)), *records], load)
    assert with_other.equal_tokens < with_other.tokens
    assert replay(runner, [WeightsChanged(DEMO_MODEL), *records], load).is_equal
    with pytest.raises(ValueError, match="the run got weights that no folder has"):
        replay(runner, [*records, WeightsChanged(None)], load)


def test_step_without_a_program_is_an_error(runner, records):
    def change(record: PlannedStep) -> PlannedStep:
        return PlannedStep(msgspec.structs.replace(record.plan, num_steps=STEPS + 1))

    wrong = changed(
        records, lambda r: isinstance(r, PlannedStep) and r.plan.kind == "decode", change
    )
    with pytest.raises(ValueError, match=r"step \d+ cannot be executed here: KeyError"):
        replay(runner, wrong)


# The command.


def run(*words: str | pathlib.Path) -> tuple[int, list[str], list[str]]:
    """Exit status, standard output, and of standard error what the command itself says."""
    script = "import sys\nfrom jaxserve.server.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "replay", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    errors = [line for line in done.stderr.splitlines() if not is_progress(line)]
    print(*words, done.stdout[:500], *errors, f"exit status {done.returncode}", sep="\n")
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines(), errors


def is_progress(line: str) -> bool:
    return not line or line.startswith(("[", "Loading safetensors"))


def test_replay_says_how_much_is_equal(path, records):
    status, output, errors = run(path)
    assert status == 0 and not errors
    steps = sum(isinstance(record, Drawn) for record in records)
    tokens = 9 * NUM_TOKENS
    counts = f"{steps} of {steps} steps and {tokens} of {tokens} tokens"
    assert output == [f"{counts} are equal; failed steps: 1"]


def test_difference_and_a_truncated_end_are_told(path, header, records, tmp_path):
    """As a killed engine leaves it: within a record."""
    drawn = [record for record in records if isinstance(record, Drawn)]
    row, (token, finish) = drawn[3].rows[0], drawn[3].draws[0][0]
    draws = [[[token + 7, finish], *drawn[3].draws[0][1:]], *drawn[3].draws[1:]]
    wrong = msgspec.structs.replace(drawn[3], draws=draws)
    pieces = [encode(wrong if record is drawn[3] else record) for record in (header, *records)]
    whole = MAGIC + b"".join(pieces)
    log = tmp_path / "killed.plans"
    log.write_bytes(whole[:-3])
    status, output, (warning,) = run(log)
    assert status == 1
    counts, difference, environment = output
    lost = sum(1 for _ in drawn[-1].tokens())
    tokens = sum(1 for record in drawn for _ in record.tokens()) - lost
    assert counts.startswith(f"{len(drawn) - 2} of {len(drawn) - 1} steps and {tokens - 1} of")
    assert f"step {wrong.step}, row {row} drew {token}" in difference
    assert f"the log says {token + 7}" in difference
    assert environment.startswith("recorded with jaxserve 0.") and "cpu" in environment
    begin = len(whole) - len(pieces[-1])
    assert f"ends within a record, at byte {begin}" in warning


def test_dump_prints_the_records_without_jax(path, records):
    status, (head, *lines), errors = run(path, "--dump")
    assert status == 0 and not errors and len(lines) == len(records)
    assert json.loads(head)["config"]["record_plans"] == str(path)
    kinds = {"plan": PlannedStep, "drawn": Drawn, "reset": Reset}
    for line, record in zip(map(json.loads, lines), records, strict=True):
        assert isinstance(record, kinds[line["type"]])
        if isinstance(record, PlannedStep) and record.plan.kind == "extend":
            packed = ints(record.plan.forward)
            rows, lengths, _, tokens = np.split(packed, np.arange(1, 4) * record.plan.num_rows)
            told = [token for chunk in line["forward"] for token in chunk["tokens"]]
            assert told == tokens[: lengths.sum()].tolist()
            assert [chunk["row"] for chunk in line["forward"]] == rows[rows < 4].tolist()
        elif isinstance(record, Drawn):
            assert line["rows"] == record.rows and line["draws"] == record.draws
    first = json.loads(lines[0])
    prompt = Tokenizer(DEMO_MODEL).encode(QUESTION)
    assert first["forward"][0] == {"row": 0, "samples": True, "tokens": prompt}
    changes = [change for line in map(json.loads, lines) for change in patched_rows(line)]
    change = changes[0]
    assert (change["row"], change["limit"]) == (0, len(prompt) + NUM_TOKENS - 1)
    assert change["pages"] and 0 not in change["pages"]
    hot = next(change for change in changes if change["sampling"]["temperature"] == 1.5)
    assert hot["sampling"] | {"top_k": -1, "top_p": 1.0, "seed": 1} == hot["sampling"]
    penal = next(change for change in changes if change["sampling"]["repetition_penalty"] == 1.1)
    assert penal["sampling"] | {"frequency_penalty": 1.0, "min_p": 0.1} == penal["sampling"]
    extras = next(line["extras"] for line in map(json.loads, lines) if "extras" in line)
    assert extras[0]["row"] == penal["row"] and extras[0]["logit_bias"] == {"300": 2.0}
    counts = [one for line in map(json.loads, lines) for one in line.get("counts", [])]
    print(counts)
    assert counts[0] == {"row": penal["row"], "tokens": []}
    assert counts[1]["tokens"], "it was retracted, and its output is counted again"


def patched_rows(line: dict) -> list[dict]:
    return line.get("patch", {}).get("rows", [])


def test_dump_loads_no_jax(path):
    script = (
        "import sys\nfrom jaxserve.server.cli import main\n"
        "main(['replay', sys.argv[1], '--dump'])\n"
        "print('loaded:', sorted({'jax', 'jaxlib', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stderr


def test_file_that_is_no_log_of_ours(path, header, tmp_path):
    def refusal(*words) -> str:
        status, output, (error,) = run(*words)
        assert status == 2 and not output
        return error

    assert "No such file" in refusal(tmp_path / "absent")
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes()[1:])
    assert "other is no plan log" in refusal(other)
    newer = encode(msgspec.structs.replace(header, version=VERSION + 1, jaxserve="9.9"))
    other.write_bytes(MAGIC + newer)
    error = refusal(other)
    assert f"version {VERSION + 1}" in error and "jaxserve 9.9" in error
    assert f"reads version {VERSION}" in error
    other.write_bytes(MAGIC + newer[:50])
    assert "ends before its header" in refusal(other)
    other.write_bytes(MAGIC + LENGTH.pack(3) + b"abc")
    assert "has no sound header" in refusal(other)
    other.write_bytes(MAGIC + encode(header) + LENGTH.pack(3) + b"abc")
    begin = len(MAGIC + encode(header))
    status, _, (error,) = run(other, "--dump")
    assert status == 2 and f"is damaged at byte {begin}" in error


def test_model_that_is_another_is_refused(path, header, tmp_path):
    case = next(case for case in CASES if case.name == "qwen2")
    write_checkpoint(case.config, tmp_path / "other", case.seed)
    status, output, (error,) = run(path, "--model-path", tmp_path / "other")
    assert status == 2 and not output
    assert f"other is not the model of the log, which was {DEMO_MODEL}" in error
    status, _, (error,) = run(path, "--model-path", tmp_path / "absent")
    assert status == 2 and "absent is no folder" in error


def test_one_changed_weight_is_another_model(header, tmp_path):
    def digest(folder) -> str:
        return ModelFiles.find(EngineConfig(model_path=str(folder))).digest("auto")

    moved = shutil.copytree(DEMO_MODEL, tmp_path / "moved")
    assert digest(moved) == header.model_digest, "wherever it lies"
    weights = moved / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert digest(moved) != header.model_digest


@pytest.mark.parametrize("missing", [1, 4, 5, 30])
def test_log_is_read_up_to_where_it_was_cut(path, records, tmp_path, missing):
    cut = tmp_path / "cut"
    cut.write_bytes(path.read_bytes()[:-missing])
    with cut.open("rb") as file:
        log = PlanLog(file)
        read = list(log)
    whole = path.stat().st_size - sum(len(encode(record)) for record in records[len(read) :])
    assert read == records[: len(read)] and len(records) > len(read) > len(records) - 5
    assert log.truncated_at == whole
