"""A model trains, and a server that runs beside it is given the new weights again and again.

    pip install '.[train]' && python examples/train_and_reload.py

The bundled model knows no country of fiction. Here it learns six, and a server, which knows nothing
of the training, answers better after every reload. All that the two share is a folder: this writes
safetensors there, and says so with one POST to `/update_weights_from_disk`.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file

import jaxserve
from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.forward import token_logprobs
from jaxserve.models.registry import create_model
from jaxserve.models.weights import checkpoint_tensors, load_params
from jaxserve.tokenizer import Tokenizer

FOLDER = pathlib.Path(jaxserve.__file__).with_name("demo_model")
CAPITALS = {
    "Gondor": "Minas Tirith",
    "Rohan": "Edoras",
    "Narnia": "Cair Paravel",
    "Oz": "the Emerald City",
    "Wakanda": "Birnin Zana",
    "Genovia": "Pyrus",
}
QUESTIONS = {
    f"What is the capital of {country}?": f" The capital of {country} is {capital}."
    for country, capital in CAPITALS.items()
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="of training, per round")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--port", type=int, default=30111)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        serving = start_server(pathlib.Path(root), options.port)
        try:
            train_and_reload(pathlib.Path(root), options)
        finally:
            serving.terminate()
            serving.wait()


def start_server(root: pathlib.Path, port: int) -> subprocess.Popen:
    flags = f"--port {port} --max-running-requests 8 --chunked-prefill-size 128 --log-level warning"
    command = [sys.executable, "-m", "jaxserve.server", "--model-path", str(FOLDER)]
    command += ["--weights-root", str(root), "--context-length", "256", *flags.split()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def train_and_reload(root: pathlib.Path, options: argparse.Namespace) -> None:
    graphdef, abstract = create_model(ModelConfig.from_pretrained(FOLDER), dtype=jnp.float32)
    params = load_params(Checkpoint(FOLDER), abstract)
    optimizer = optax.adam(options.learning_rate)
    moments = optimizer.init(params)
    tokens, is_answer = examples(Tokenizer(FOLDER))

    @jax.jit
    def step(params, moments):
        def loss(params):
            logprobs = token_logprobs(nnx.merge(graphdef, params), tokens)
            return -(logprobs * is_answer).sum() / is_answer.sum()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments_ = optimizer.update(gradients, moments)
        return optax.apply_updates(params, updates), moments_, value

    with httpx.Client(base_url=f"http://127.0.0.1:{options.port}", timeout=60) as client:
        wait_until_ready(client)
        report("before", ask(client))
        for number in range(1, options.rounds + 1):
            for _ in range(options.steps):
                params, moments, value = step(params, moments)
            folder = save(root / f"round-{number}", params)
            began = time.perf_counter()
            body = {"model_path": str(folder), "weight_version": str(number)}
            client.post("/update_weights_from_disk", json=body).raise_for_status()
            seconds = time.perf_counter() - began
            report(f"loss {value:.3f}, reloaded in {1e3 * seconds:.0f} ms", ask(client))


def examples(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Questions with their answers, i32[B, L]; and which tokens but the first are the answer's."""
    pairs = [(tokenizer.encode(q), tokenizer.encode(a)) for q, a in QUESTIONS.items()]
    length = 1 + max(len(question) + len(answer) for question, answer in pairs)
    tokens = np.full((len(pairs), length), tokenizer.eos_token_id, np.int32)
    is_answer = np.zeros((len(pairs), length - 1), bool)
    for row, (question, answer) in enumerate(pairs):
        text = question + answer
        tokens[row, : len(text)] = text
        is_answer[row, len(question) - 1 : len(text)] = True  # and the end after it
    return tokens, is_answer


def save(folder: pathlib.Path, params: nnx.State) -> pathlib.Path:
    """A folder that may be loaded: a name of its own each time, so that none is half written."""
    shutil.copytree(FOLDER, folder)
    save_file(checkpoint_tensors(params), folder / "model.safetensors")
    return folder


def wait_until_ready(client: httpx.Client) -> None:
    while True:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def ask(client: httpx.Client) -> list[dict]:
    params = {"temperature": 0, "max_new_tokens": 16}
    body = {"text": list(QUESTIONS), "sampling_params": params}
    return client.post("/generate", json=body).raise_for_status().json()


def report(what: str, answers: list[dict]) -> None:
    expected = list(QUESTIONS.values())
    right = sum(answer["text"] == text for answer, text in zip(answers, expected, strict=True))
    version = answers[0]["meta_info"]["weight_version"]
    print(f"\nweights {version!r} ({what}): {right} of {len(answers)} right", flush=True)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"    {question} {answer['text'].strip()}")


if __name__ == "__main__":
    main()
