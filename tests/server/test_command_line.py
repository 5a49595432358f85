"""The command line: what it says, what it takes, what it refuses."""

import dataclasses
import os
import subprocess
import sys
import time
import typing

import pytest

from jaxserve.config import ServerConfig
from jaxserve.server import cli
from jaxserve.server.ignored_flags import IGNORED
from tests.server.serving import COMMAND

GROUPS = ["Model and weights", "Memory and scheduling", "API behaviour", "HTTP server", "Logging"]


def run(*words: str) -> subprocess.CompletedProcess:
    wide = os.environ | {"COLUMNS": "200"}
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=wide)


def test_help_lists_every_option_in_groups_within_two_seconds():
    times = []
    for _ in range(2):  # the better of two: the machine may be busy
        began = time.monotonic()
        done = run(*COMMAND, "--help")
        times.append(time.monotonic() - began)
    print(f"{min(times):.2f} s")
    assert done.returncode == 0 and not done.stderr
    for field in dataclasses.fields(ServerConfig):
        assert f"--{field.name.replace('_', '-')}" in done.stdout, field.name
        assert field.metadata["help"][:25] in done.stdout
    assert all(f"\n{group}:\n" in done.stdout for group in GROUPS)
    assert not any(flag in done.stdout for flag in IGNORED)
    assert min(times) < 2


def test_help_loads_neither_jax_nor_sanic():
    script = (
        "import sys\n"
        "from jaxserve.server.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'sanic', 'transformers', 'torch', 'numpy', 'zmq'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", script).stdout.splitlines()[-1] == "loaded: []"


def test_commands_beside_serve():
    version = run(COMMAND[0], "--version")
    assert version.returncode == 0 and version.stdout.startswith("jaxserve 0.")
    usage = run(COMMAND[0])
    assert usage.returncode == 0
    assert all(
        f"(jaxserve {name} --help)" in usage.stdout
        for name in ("serve", "bench", "convert", "replay")
    )
    unknown = run(COMMAND[0], "bake")
    assert unknown.returncode == 2 and "unknown command 'bake'" in unknown.stdout


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "the following arguments are required: --model-path"),
        (["--model-path", "x", "--nope"], "unrecognized arguments: --nope"),
        (["--model-path", "x", "--port", "many"], "--port: invalid int value: 'many'"),
        (["--model-path", "x", "--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--model-path", "x", "--port", "-1"], "--port -1: must be from 0 to 65535"),
        (["--model-path", "x", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--model-path", "x", "--page-size", "0"], "--page-size 0: must be from 1 to 128"),
        (["--model-path", "x", "--page-size", "129"], "--page-size 129: must be from 1 to 128"),
        (["--model-path", "x", "--mem-fraction-static", "1.5"], "--mem-fraction-static 1.5: must"),
        (["--model-path", "x", "--mem-fraction-static", "nan"], "--mem-fraction-static nan: must"),
        (["--model-path", "x", "--max-running-requests", "0"], "--max-running-requests 0: must"),
        (["--model-path", "x", "--chunked-prefill-size", "0"], "--chunked-prefill-size 0: must"),
        (["--model-path", "x", "--stream-interval", "0"], "--stream-interval 0: must"),
        (["--model-path", "x", "--max-total-tokens", "0"], "--max-total-tokens 0: must"),
        (["--model-path", "x", "--random-seed", "-1"], "--random-seed -1: must"),
        (["--model-path", "x", "--max-request-bytes", "-1"], "--max-request-bytes -1: must"),
        (["--model-path", "x", "--shutdown-timeout", "-1"], "--shutdown-timeout -1.0: must"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_flag_exits_2_and_names_it(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        cli.parse(words)
    stderr = capsys.readouterr().err
    print(stderr.splitlines()[-1])
    assert end.value.code == 2
    assert message in stderr.splitlines()[-1]


def test_bad_flag_exits_2_as_a_process():
    done = run(*COMMAND, "--model-path", "x", "--page-size", "zero")
    assert done.returncode == 2
    assert "argument --page-size: invalid int value: 'zero'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_option_is_taken_from_its_flag():
    """Every field gets a value that is not its default."""
    given = {}
    for field in dataclasses.fields(ServerConfig):
        kinds = (field.type, *typing.get_args(field.type))
        kind = next(kind for kind in (bool, int, float, str) if kind in kinds)
        default = None if field.default is dataclasses.MISSING else field.default
        if kind is bool:
            given[field.name] = True
        elif field.metadata["choices"]:
            given[field.name] = next(c for c in field.metadata["choices"] if c != default)
        else:
            given[field.name] = {int: 7, float: 0.5, str: "{}x"}[kind]
    words = []
    for name, value in given.items():
        words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    config, ignored = cli.parse(words)
    assert dataclasses.asdict(config) == given
    assert ignored == []


def test_model_is_short_for_model_path():
    config, _ = cli.parse(["--model", "x"])
    assert config.model_path == config.model_name == "x"


@pytest.mark.parametrize("values", [[], ["1"]], ids=len)
@pytest.mark.parametrize("flag", IGNORED)
def test_flags_for_cuda_and_torch_are_taken_and_named(flag, values):
    config, ignored = cli.parse(["--model-path", "x", flag, *values, "--port", "7"])
    assert ignored == [flag]
    assert (config.model_path, config.port) == ("x", 7)


def test_ignored_flag_may_have_several_values():
    config, ignored = cli.parse(["--cuda-graph-bs", "1", "2", "4", "--model-path", "x"])
    assert (ignored, config.model_path) == (["--cuda-graph-bs"], "x")
