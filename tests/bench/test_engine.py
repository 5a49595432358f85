"""offline and one-batch: a small engine in this process, and one as the command starts it."""

import json
import subprocess
import sys

import jax
import pytest

import jaxserve
from jaxserve import Engine
from jaxserve.bench import offline, one_batch
from jaxserve.bench.options import BatchOptions, DatasetOptions, LoadOptions, OfflineOptions
from tests.server.serving import DEMO_MODEL, SMALL, flags, programs_folder

SMALL_DATASET = {"num_prompts": 6, "input_len": 20, "output_len": 5}


@pytest.fixture(scope="module")
def engine(pytestconfig):
    cache = programs_folder(pytestconfig)
    with Engine(model_path=DEMO_MODEL, compilation_cache_dir=cache, **SMALL) as engine:
        yield engine
    jax.clear_caches()


def measure(engine, *, stream=False, dataset=None, **load) -> list[dict]:
    return list(
        offline.run(
            engine,
            DatasetOptions(**SMALL_DATASET | (dataset or {})),
            LoadOptions(**load),
            OfflineOptions(stream=stream),
        )
    )


def test_offline_counts_exactly_what_was_asked_for(engine):
    (run,) = measure(engine)
    print(json.dumps(run, indent=1))
    metrics = run["metrics"]
    assert run["parameters"] == {"max_concurrency": None, "request_rate": float("inf")}
    assert (metrics["num_succeeded"], metrics["num_failed"]) == (6, 0)
    assert metrics["num_shorter_than_asked"] == 0
    assert (metrics["input_tokens"], metrics["output_tokens"]) == (120, 30)
    assert metrics["cached_tokens"] == 0, "the warm-up's prompts were flushed"
    assert metrics["output_tokens_per_s"] == pytest.approx(30 / metrics["duration_s"])
    spent = metrics["cpu_s"]["user"] + metrics["cpu_s"]["system"]
    assert 0 < spent < 4 * metrics["duration_s"]
    assert metrics["output_tokens_per_cpu_s"] == pytest.approx(30 / spent)
    assert "ttft_ms" not in metrics


def test_offline_streams_tell_the_times_between(engine):
    (run,) = measure(engine, stream=True)
    metrics = run["metrics"]
    assert metrics["output_tokens"] == 30
    assert 0 < metrics["ttft_ms"]["p50"] < metrics["latency_ms"]["p50"]
    assert metrics["itl_ms"]["p50"] > 0 and metrics["tpot_ms"]["mean"] > 0


def test_offline_runs_each_concurrency_and_rate(engine):
    runs = measure(engine, max_concurrency=(1, 4), request_rate=(50.0, float("inf")))
    shapes = [(r["parameters"]["max_concurrency"], r["parameters"]["request_rate"]) for r in runs]
    assert shapes == [(1, 50.0), (1, float("inf")), (4, 50.0), (4, float("inf"))]
    means = [run["metrics"]["mean_concurrency"] for run in runs]
    print(means)
    assert all(mean <= 1.001 for mean in means[:2])
    assert 1.5 < means[3] <= 4
    assert all(run["metrics"]["cached_tokens"] == 0 for run in runs)


def test_keep_cache_finds_the_prompts_of_the_warm_up(engine):
    (run,) = measure(engine, keep_cache=True)
    assert run["metrics"]["cached_tokens"] == 6 * 19
    (run,) = measure(engine, keep_cache=False, warmup_requests=0)
    engine.flush_cache()
    shared = {"dataset": "shared-prefix", "system_prompt_len": 40, "num_groups": 1}
    (run,) = measure(engine, dataset=shared, max_concurrency=(1,))
    assert run["metrics"]["cached_tokens"] >= 5 * 40, "all but the first find the prefix"


def test_what_the_engine_refuses_is_listed(engine, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [5, 1024]}\n{"prompt": "What is the capital of France?"}\n')
    dataset = {"dataset": "file", "dataset_path": str(path), "num_prompts": None}
    (run,) = measure(engine, dataset=dataset)
    metrics = run["metrics"]
    assert (metrics["num_succeeded"], metrics["num_failed"]) == (1, 1)
    ((message, count),) = (error.values() for error in metrics["errors"])
    print(message)
    assert "1024" in message and count == 1
    assert metrics["output_tokens"] == 5


def test_sampling_params_are_laid_over_the_defaults(engine):
    given = '{"max_new_tokens": 3, "temperature": 1.0}'
    (run,) = measure(engine, sampling_params=given)
    assert run["metrics"]["output_tokens"] == 18
    assert run["metrics"]["num_shorter_than_asked"] == 6


def test_one_batch_of_each_shape(engine):
    options = BatchOptions(batch_size=(1, 4), input_len=(10, 30), output_len=(12,))
    runs = list(one_batch.run(engine, options))
    shapes = [tuple(run["parameters"].values()) for run in runs]
    assert shapes == [(1, 10, 12), (1, 30, 12), (4, 10, 12), (4, 30, 12)]
    for (size, _, output_len), run in zip(shapes, runs, strict=True):
        metrics = run["metrics"]
        print(metrics)
        assert metrics["output_tokens"] == size * output_len
        assert 1 <= metrics["decode_steps"] < output_len
        assert metrics["decode_ms_per_token"] == pytest.approx(metrics["decode_ms_per_step"] / size)
        assert 0 < metrics["prefill_ms"] < metrics["latency_ms"]


def test_a_batch_that_cannot_run_at_once_is_refused_before_anything_runs(engine):
    with pytest.raises(ValueError, match="--batch-size 5: more than --max-running-requests 4"):
        next(one_batch.run(engine, BatchOptions(batch_size=(1, 5))))
    room = engine.info.max_total_num_tokens
    with pytest.raises(ValueError, match=f"the KV cache has room for {room}"):
        next(one_batch.run(engine, BatchOptions(batch_size=(4,), input_len=(room,))))


def test_the_command_writes_its_result(tmp_path, pytestconfig):
    output = tmp_path / "result.json"
    options = SMALL | {"compilation_cache_dir": programs_folder(pytestconfig)}
    options |= SMALL_DATASET | {"model_path": DEMO_MODEL, "output": output, "max_concurrency": 2}
    words = [sys.executable, "-m", "jaxserve.bench", "offline", *flags(**options)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "Decode batch" not in done.stderr, "a line per step would cost time"
    result = json.loads(output.read_text())
    assert result["schema_version"] == 1 and result["benchmark"] == "offline"
    assert result["label"] == "offline demo_model"
    assert result["command"].startswith("jaxserve bench offline --device cpu --dtype float32")
    assert result["versions"] == {
        "jaxserve": jaxserve.__version__,
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
    }
    hardware = result["hardware"]
    assert hardware["device"] == "cpu" and hardware["cpu"] and hardware["num_cpus"] >= 1
    assert result["configuration"]["max_running_requests"] == 4
    assert result["configuration"]["input_len"] == 20
    (run,) = result["runs"]
    assert run["parameters"] == {"max_concurrency": 2, "request_rate": None}, "no Infinity in JSON"
    assert run["metrics"]["output_tokens"] == 30
    assert f"wrote {output}" in done.stdout and "output tokens/cpu s" in done.stdout
