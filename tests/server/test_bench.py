"""`jaxserve bench serve` on a running server."""

import json
import os

import pytest

from jaxserve.bench import cpu_time, serve
from jaxserve.bench.cli import main
from tests.server.serving import generate, open_stream


@pytest.fixture
def bench(server, tmp_path):
    """Runs the command, whose exit status must be `status`, and returns its result."""

    def bench(*words: str, status: int = 0) -> dict:
        path = tmp_path / "result.json"
        small = ["--num-prompts", "8", "--input-len", "20", "--output-len", "6"]
        words = ["serve", "--base-url", server.url, *small, *words, "--output", str(path)]
        assert main(words) == status
        return json.loads(path.read_text())

    return bench


def test_counts_times_and_cpu(bench, server, capsys):
    result = bench("--max-concurrency", "1", "4")
    print(capsys.readouterr().out)
    alone, together = (run["metrics"] for run in result["runs"])
    for metrics in (alone, together):
        assert (metrics["num_succeeded"], metrics["num_failed"]) == (8, 0)
        assert metrics["num_shorter_than_asked"] == 0
        assert (metrics["input_tokens"], metrics["output_tokens"]) == (160, 48)
        assert metrics["cached_tokens"] == 0, "flushed before each run"
        assert 0 < metrics["ttft_ms"]["p50"] < metrics["latency_ms"]["p50"]
        assert metrics["itl_ms"]["p50"] > 0
        spent = {k: sum(metrics[f"{k}_cpu_s"].values()) for k in ("server", "client")}
        assert spent["server"] > spent["client"] > 0
        assert metrics["output_tokens_per_cpu_s"] == pytest.approx(48 / sum(spent.values()))
    assert alone["mean_concurrency"] <= 1.001 < together["mean_concurrency"] <= 4


def test_says_what_was_measured_on_what(bench, server):
    result = bench()
    assert result["hardware"]["device"] == "cpu"
    assert result["versions"]["jax"] and result["versions"]["server"]
    assert result["server"]["max_running_requests"] == 4
    pids = [process["pid"] for process in result["server"]["processes"]]
    assert pids == [server.process.pid, server.engine_pid()]
    assert "jaxserve.engine_process" in result["server"]["processes"][1]["command"]


def test_server_pid_is_taken_as_told(bench, server, capsys):
    result = bench("--server-pid", str(os.getppid()))
    assert result["server"]["processes"][0]["pid"] == os.getppid()
    beyond = str(2**22 + 1)  # Linux gives out no such id
    assert main(["serve", "--base-url", server.url, "--server-pid", beyond]) == 1
    assert f"--server-pid {beyond}: no such process" in capsys.readouterr().err


def test_a_server_elsewhere_has_no_cpu_time(bench, monkeypatch):
    monkeypatch.setattr(cpu_time, "peer_of", lambda *ports: None)
    metrics = bench()["runs"][0]["metrics"]
    assert sum(metrics["client_cpu_s"].values()) > 0
    assert not {"server_cpu_s", "output_tokens_per_cpu_s"} & set(metrics)


def test_arrivals_and_prompts_that_share(bench):
    shared = ["--dataset", "shared-prefix", "--system-prompt-len", "40", "--num-groups", "1"]
    result = bench(*shared, "--request-rate", "40")
    (run,) = result["runs"]
    assert run["parameters"] == {"max_concurrency": None, "request_rate": 40.0}
    assert run["metrics"]["input_tokens"] == 8 * 60
    assert run["metrics"]["cached_tokens"] >= 40
    assert run["metrics"]["duration_s"] > 0.05


def test_texts_of_a_file_and_what_is_refused(bench, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "What is the capital of France?"}\n{"prompt": [1024]}\n')
    result = bench("--dataset", "file", "--dataset-path", str(path))
    metrics = result["runs"][0]["metrics"]
    assert (metrics["num_succeeded"], metrics["num_failed"]) == (1, 1)
    ((message, count),) = (error.values() for error in metrics["errors"])
    print(message)
    assert message.startswith("400: ") and "1024" in message and count == 1
    assert metrics["output_tokens"] == 6
    path.write_text('{"prompt": [1024]}\n')
    bench("--dataset", "file", "--dataset-path", str(path), status=1)


def test_keep_cache(bench, client):
    generate(client, input_ids=[1, 2, 3])
    metrics = bench("--keep-cache", "--warmup-requests", "8")["runs"][0]["metrics"]
    assert metrics["cached_tokens"] == 8 * 19


def test_a_busy_server_cannot_be_flushed_and_says_so(server, client, monkeypatch, capsys):
    monkeypatch.setattr(serve, "FLUSH_SECONDS", 0.1)
    endless = {"ignore_eos": True, "max_new_tokens": 4000}
    with open_stream(client, text="a", sampling_params=endless):
        assert main(["serve", "--base-url", server.url, "--num-prompts", "2"]) == 1
    stderr = capsys.readouterr().err
    print(stderr)
    assert "the prefix cache cannot be flushed (--keep-cache does without)" in stderr
