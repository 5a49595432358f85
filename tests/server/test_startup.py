"""Starts that cannot succeed: soon over, with one line that says why."""

import contextlib
import json
import pathlib
import shutil
import socket
import time

import pytest

from tests.server.serving import DEMO_MODEL, wait_for


def copy_of_demo_model(folder: pathlib.Path, *, config: dict | None = None, without: str = ""):
    """Without its weights, which are read last."""
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors", without))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | (config or {})))
    return str(folder)


CANNOT_START = {
    "/no/such/model is no folder": {"model_path": "/no/such/model"},
    "--max-total-tokens 2000000000 needs": {"max_total_tokens": 2_000_000_000},
    "--json-model-override-args is not JSON": {"json_model_override_args": "{"},
    "--preferred-sampling-params is not JSON": {"preferred_sampling_params": "{"},
    "--preferred-sampling-params: top_p must be": {"preferred_sampling_params": '{"top_p": 7}'},
    "--record-plans /no/folder/log: No such file": {"record_plans": "/no/folder/log"},
    "cannot listen on no-such-host.invalid": {"host": "no-such-host.invalid"},
    "cannot listen on no..host:": {"host": "no..host"},
    "cannot listen on 192.0.2.1:": {"host": "192.0.2.1"},
}


@pytest.fixture(scope="module")
def failing(start, tmp_path_factory):
    """Servers that cannot start, started together: each loads JAX before it can tell."""
    folder = tmp_path_factory.mktemp("models")
    other = {"architectures": ["MambaForCausalLM"]}
    models = {
        "architecture": copy_of_demo_model(folder / "architecture", config=other),
        "tokenizer": copy_of_demo_model(folder / "tokenizer", without="tokenizer*"),
        "weights": copy_of_demo_model(folder / "weights"),
    }
    options = CANNOT_START | {name: {"model_path": model} for name, model in models.items()}
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(start(**given)) for name, given in options.items()}


def output_of(server) -> list[str]:
    """What a server said that could not start, without the line that repeats its arguments."""
    code = server.process.wait(60)
    lines = [line for line in server.output.splitlines() if "server_args=" not in line]
    print(*lines, f"exit code {code}", sep="\n")
    assert code == 1
    assert not any("Traceback" in line for line in lines)
    return lines


@pytest.mark.parametrize("words", CANNOT_START)
def test_impossible_option_is_named(failing, words):
    assert words in output_of(failing[words])[-1]


def test_too_many_tokens_name_the_most_that_fit(failing):
    last = output_of(failing["--max-total-tokens 2000000000 needs"])[-1]
    assert "lower it to at most" in last and "raise --mem-fraction-static" in last


def test_unknown_architecture_lists_the_known_ones(failing):
    (line,) = output_of(failing["architecture"])
    assert "MambaForCausalLM" in line
    for known in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert known in line


def test_missing_tokenizer_names_both_ways_out(failing):
    """Nor may a library make one up from the configuration alone."""
    last = output_of(failing["tokenizer"])[-1]
    assert "tokenizer holds no tokenizer" in last
    assert "--tokenizer-path" in last and "--skip-tokenizer-init" in last


def test_missing_weights(failing):
    assert "cannot start: Cannot find any model weights with" in output_of(failing["weights"])[-1]


def test_port_in_use(start):
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with start(port=port) as server:
            (line,) = output_of(server)
    print(f"{time.monotonic() - began:.1f} s")
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line
    assert time.monotonic() - began < 5


def test_port_that_is_bound_but_not_listened_to_can_be_had(start):
    """The documentation's harness reserves it so."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        with start(port=reserved.getsockname()[1], model_path="/no/model") as server:
            assert "/no/model is no folder" in output_of(server)[-1], "it came as far as the model"


def test_port_that_another_takes_during_the_start(start):
    """As the second of two servers that are started together."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        with start(port=port) as server:
            wait_for(lambda: "Load weight begin" in server.output, 60)
            other.listen()
            lines = output_of(server)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in lines[-1]
    assert not any("ready to roll" in line for line in lines)
