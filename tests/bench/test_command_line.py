"""What `jaxserve bench` takes, refuses, shows and draws."""

import json
import os
import subprocess
import sys

import pytest

from jaxserve.bench import report
from jaxserve.bench.cli import COMMANDS, main
from jaxserve.server import cli

LATENCIES = {"mean": 2.0, "p50": 1.5, "p90": 3.0, "p99": 4.0}


def test_help_lists_the_commands(capsys):
    assert main([]) == main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {command} " in usage for command in COMMANDS)
    assert cli.main(["bench", "bake"]) == 2
    assert "unknown command 'bake'" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_neither_jax_nor_anything_slow(command):
    script = (
        "import sys\n"
        "from jaxserve.server.cli import main\n"
        f"try: main(['bench', {command!r}, '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'jax', 'sanic', 'transformers', 'numpy', 'zmq', 'matplotlib', 'uvloop'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"usage: jaxserve bench {command}" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stderr


@pytest.mark.parametrize(
    "words,message",
    [
        (["offline"], "the following arguments are required: --model-path"),
        (["offline", "--model-path", "x", "--page-size", "0"], "--page-size 0: must be from 1"),
        (["offline", "--model-path", "x", "--port", "1"], "unrecognized arguments: --port"),
        (["serve", "--num-prompts", "0"], "--num-prompts 0: must be at least 1"),
        (["serve", "--range-ratio", "1.5"], "--range-ratio 1.5: must be from 0.0 to 1.0"),
        (["serve", "--range-ratio", "nan"], "--range-ratio nan: must be from 0.0 to 1.0"),
        (["serve", "--dataset", "file"], "--dataset file and --dataset-path go together"),
        (["serve", "--dataset-path", "x"], "--dataset file and --dataset-path go together"),
        (["serve", "--max-concurrency", "4", "0"], "--max-concurrency 0: must be at least 1"),
        (["serve", "--max-concurrency"], "--max-concurrency: expected at least one argument"),
        (["serve", "--request-rate", "0"], "--request-rate 0.0: must be above 0"),
        (["serve", "--request-rate", "nan"], "--request-rate nan: must be above 0"),
        (["serve", "--sampling-params", "{"], "--sampling-params is not JSON"),
        (["serve", "--sampling-params", "[]"], "--sampling-params must be a JSON object"),
        (["serve", "--sampling-params", '{"n": 2}'], "--sampling-params: n is 1 here, not 2"),
        (["serve", "--timeout", "0"], "--timeout 0.0: must be above 0"),
        (["serve", "--port", "0"], "--port 0: must be from 1 to 65535"),
        (["one-batch", "--model-path", "x", "--output-len", "1"], "--output-len 1: must be at"),
        (["plot", "x.json"], "the following arguments are required: --output"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flag_exits_2_and_names_it(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(words)
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert message in last


def test_what_cannot_be_measured_exits_1_with_one_line(capsys, tmp_path):
    cases = {
        "no server answers at http://127.0.0.1:9": ["serve", "--port", "9"],
        "'nowhere' is no http:// or https:// URL": ["serve", "--base-url", "nowhere"],
        "No such file": ["plot", str(tmp_path / "none.json"), "--output", "x.png"],
    }
    for message, words in cases.items():
        assert main(words) == 1
        stderr = capsys.readouterr().err
        print(stderr)
        assert stderr.startswith(f"jaxserve bench {words[0]}: ") and message in stderr
        assert len(stderr.splitlines()) == 1


def record(label: str, *runs: dict, arguments=()) -> dict:
    return report.make_record(
        "serve",
        list(arguments),
        label=label,
        device={"device": "cpu", "num_devices": 1},
        versions={},
        runs=list(runs),
    )


def run(concurrency: int | None, throughput: float, **metrics) -> dict:
    return {
        "parameters": {"max_concurrency": concurrency, "request_rate": float("inf")},
        "metrics": {
            "num_requests": 4,
            "output_tokens_per_s": throughput,
            "itl_ms": LATENCIES,
            "cpu_s": {"user": 2.0, "system": 0.5},
            "errors": [{"message": "503: full", "count": 3}],
            **metrics,
        },
    }


def test_a_secret_is_not_written_down():
    for words in (["--api-key", "SECRET", "--port", "1"], ["--api-key=SECRET", "--port", "1"]):
        command = record("a", arguments=words)["command"]
        print(command)
        assert "SECRET" not in command and command.endswith(" --port 1")


def test_table_shows_numbers_distributions_and_errors():
    table = report.table(record("mine", run(16, 123.456)))
    print(table)
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert lines[0].startswith("mine: cpu, ")
    assert "16 at once" in lines
    assert "requests 4" in lines
    assert "output tokens/s 123.46" in lines
    assert "cpu s 2.50 (2.00 user, 0.50 system)" in lines
    assert lines.index("mean p50 p90 p99") + 1 == lines.index("itl ms 2.00 1.50 3.00 4.00")
    assert "failed 3 times: 503: full" in lines


@pytest.fixture
def results(tmp_path) -> list[str]:
    """Two servers, one of them measured by two commands."""
    records = [
        record("ours", run(1, 100.0), run(16, 900.0, output_tokens_per_cpu_s=2000.0)),
        record("theirs", run(1, 50.0)),
        record("theirs", run(None, 300.0, itl_ms=None)),
    ]
    paths = [str(tmp_path / f"{index}.json") for index in range(len(records))]
    for made, path in zip(records, paths, strict=True):
        report.write(made, path)
    return paths


def test_plot_draws_a_png(results, tmp_path, capsys):
    path = tmp_path / "figure.png"
    assert main(["plot", *results, "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    content = path.read_bytes()
    width, height = (int.from_bytes(content[start : start + 4]) for start in (16, 20))
    print(f"{width} x {height}, {len(content)} bytes")
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content[12:16] == b"IHDR"
    assert (width, height) == (1500, 1260), "lines, and four metrics in two rows"


def test_plot_has_a_line_per_label_and_a_bar_per_run(results):
    from jaxserve.bench.plot import make_figure

    figure = make_figure([report.read(path) for path in results])
    lines, *bars = figure.axes
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in lines.lines}
    assert drawn == {"ours": [(1.5, 100.0), (1.5, 900.0)], "theirs": [(1.5, 50.0)]}
    texts = [text.get_text() for text in lines.texts]
    assert texts == ["1 at once", "16 at once", "1 at once"]
    widths = {axes.get_title(): [bar.get_width() for bar in axes.patches] for axes in bars}
    assert widths == {
        "output_tokens_per_s": [100.0, 900.0, 50.0, 300.0],
        "output_tokens_per_cpu_s": [2000.0],
        "itl_ms.p50": [1.5, 1.5, 1.5],
        "itl_ms.p99": [4.0, 4.0, 4.0],
    }


def test_plot_of_answers_in_one_piece_has_their_whole_latency(tmp_path):
    from jaxserve.bench.plot import make_figure

    whole = {"itl_ms": None, "latency_ms": LATENCIES}
    lines, *_ = make_figure(
        [record("a", run(1, 9.0, latency_ms=LATENCIES), run(2, 10.0, **whole))]
    ).axes
    assert lines.get_xlabel() == "latency_ms.p50"
    (line,) = lines.lines
    assert list(line.get_ydata()) == [9.0, 10.0]


def test_plot_of_chosen_metrics(results, tmp_path, capsys):
    path = str(tmp_path / "figure.svg")
    assert main(["plot", *results, "--output", path, "--metric", "itl_ms.p90"]) == 0
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    assert main(["plot", *results, "--output", path, "--metric", "itl_ms.p91"]) == 1
    assert "--metric itl_ms.p91: no result has it" in capsys.readouterr().err
    assert main(["plot", *results, "--output", str(tmp_path / "figure.xyz")]) == 1
    assert "xyz" in capsys.readouterr().err


def test_plot_without_matplotlib_says_what_to_install(results, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", *results, "--output", os.devnull]) == 1
    assert "pip install 'jaxserve[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "7", "{}", '{"schema_version": 99}'])
def test_plot_refuses_what_is_no_result(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main(["plot", str(path), "--output", "x.png"]) == 1
    stderr = capsys.readouterr().err
    print(stderr)
    assert "not a result of jaxserve bench" in stderr or "schema_version 99, this is 1" in stderr
    assert json.dumps(str(path))[1:-1] in stderr
