"""Every call of SGLang's page "Native APIs" (May 2025), against four servers of one's own.

    python examples/native_api_page.py

The page serves a generation model, an embedding model, a reward model and a mixture of experts. So
does this, under the same names: the bundled model, and three small ones of random weights. What the
page asserts is asserted.
"""

import argparse
import glob
import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

import jaxserve

START_SECONDS = 600
DEMO_MODEL = pathlib.Path(jaxserve.__file__).with_name("demo_model")
GENERATION = "qwen/qwen2.5-0.5b-instruct"
EMBEDDING = "Alibaba-NLP/gte-Qwen2-1.5B-instruct"
REWARD = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
EXPERTS = "Qwen/Qwen1.5-MoE-A2.7B"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 1024,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    EMBEDDING: {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    REWARD: {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "id2label": {"0": "LABEL_0"},
        "pad_token_id": 0,
    },
    EXPERTS: {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--flags",
        default="--device cpu --max-running-requests 1 --chunked-prefill-size 15",
        help="of every server, beside the page's (default: few sizes, little to compile)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # of the models, and of the servers: there the counts of experts go
        write_models()
        run_page(options.flags)


def run_page(flags: str) -> None:
    with Server(f"--model-path {GENERATION} --host 0.0.0.0 {flags}") as url:
        generate(url)
        get_model_info(url)
        get_server_info(url)
        health(url)
        flush_cache(url)
        update_weights(url)
    dummy = f"--host 0.0.0.0 --load-format dummy {flags}"
    with Server(f"--model-path {EMBEDDING} --is-embedding {dummy}") as url:
        encode(url)
    with Server(f"--model-path {REWARD} --is-embedding {dummy}") as url:
        classify(url)
    with Server(f"--model-path {EXPERTS} {dummy}") as url:
        record_experts(url)


# The page, cell by cell.


def generate(url: str) -> None:
    show(json.loads(post(f"{url}/generate", {"text": "What is the capital of France?"})))


def get_model_info(url: str) -> None:
    answer = json.loads(get(f"{url}/get_model_info"))
    show(answer)
    assert answer["model_path"] == "qwen/qwen2.5-0.5b-instruct"
    assert answer["is_generation"] is True
    assert answer["tokenizer_path"] == "qwen/qwen2.5-0.5b-instruct"
    assert answer.keys() == {"model_path", "is_generation", "tokenizer_path"}


def get_server_info(url: str) -> None:
    show(get(f"{url}/get_server_info"))


def health(url: str) -> None:
    show(get(f"{url}/health_generate"))
    show(get(f"{url}/health"))


def flush_cache(url: str) -> None:
    show(post(f"{url}/flush_cache"))


def update_weights(url: str) -> None:
    right = {"model_path": "qwen/qwen2.5-0.5b-instruct"}
    answer = json.loads(post(f"{url}/update_weights_from_disk", right))
    show(answer)
    assert answer["success"] is True
    assert answer["message"] == "Succeeded to update model weights."

    wrong = {"model_path": "qwen/qwen2.5-0.5b-instruct-wrong"}
    answer = json.loads(post(f"{url}/update_weights_from_disk", wrong, status=400))
    show(answer)
    assert answer["success"] is False
    assert answer["message"] == (
        "Failed to get weights iterator: qwen/qwen2.5-0.5b-instruct-wrong (repository not found)."
    )


def encode(url: str) -> None:
    answer = json.loads(post(f"{url}/encode", {"model": EMBEDDING, "text": "Once upon a time"}))
    show(f"Text embedding (first 10): {answer['embedding'][:10]}")


def classify(url: str) -> None:
    from transformers import AutoTokenizer

    prompt = "What is the range of the numeric output of a sigmoid node in a neural network?"
    responses = (
        "The output of a sigmoid node is bounded between -1 and 1.",
        "The output of a sigmoid node is bounded between 0 and 1.",
    )
    conversations = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for response in responses
    ]
    tokenizer = AutoTokenizer.from_pretrained(REWARD)
    prompts = tokenizer.apply_chat_template(conversations, tokenize=False)
    for answer in json.loads(post(f"{url}/classify", {"model": REWARD, "text": prompts})):
        show(f"reward: {answer['embedding'][0]}")


def record_experts(url: str) -> None:
    show(post(f"{url}/start_expert_distribution_record"))
    show(json.loads(post(f"{url}/generate", {"text": "What is the capital of France?"})))
    show(post(f"{url}/stop_expert_distribution_record"))
    show(post(f"{url}/dump_expert_distribution_record"))
    output_file = glob.glob("expert_distribution_*.csv")[0]
    with open(output_file) as f:
        show("\n| Layer ID | Expert ID | Count |")
        show("|----------|-----------|--------|")
        next(f)
        for i, line in enumerate(f):
            if i < 9:
                layer_id, expert_id, count = line.strip().split(",")
                show(f"| {layer_id:8} | {expert_id:9} | {count:6} |")


# What the page takes from a library.


class Server:
    """`launch_server_cmd`, `wait_for_server` and `terminate_process`; inside it is the URL."""

    def __init__(self, flags: str):
        self._flags = shlex.split(flags)

    def __enter__(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "jaxserve.server", *self._flags, "--port", str(port)]
        self._process = subprocess.Popen(command)
        try:
            self._wait(f"http://localhost:{port}")
        except BaseException:
            self.__exit__()
            raise
        return f"http://localhost:{port}"

    def _wait(self, url: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_up(url):
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server is not up after {START_SECONDS} s")
            time.sleep(0.2)

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.wait()


def is_up(url: str) -> bool:
    try:
        return bool(get(f"{url}/v1/models"))
    except OSError:
        return False


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read().decode()


def post(url: str, data: dict[str, Any] | None = None, *, status: int = 200) -> str:
    """The answer's text. Raises for any other status."""
    body = b"" if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        if error.code != status:
            raise
        return error.read().decode()


def show(what: Any) -> None:
    print(what, flush=True)


def write_models() -> None:
    """Folders with the names of the page's models."""
    shutil.copytree(DEMO_MODEL, GENERATION)
    for name, config in CONFIGS.items():
        folder = pathlib.Path(name)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(SMALL | config))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO_MODEL / file, folder)


if __name__ == "__main__":
    main()
