"""A policy gradient whose rollouts come from the engine, on one set of parameters.

    pip install '.[train]' && python examples/rollout.py

The reward is the share of digits among the sampled tokens: easy to see rise. Each iteration samples
with the engine, takes one gradient step on the very modules that serve, and hands the parameters
back with `update_weights`: no file is written, and after the first iteration nothing is compiled.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxserve
from jaxserve import Engine
from jaxserve.compile_counter import CompileCounter
from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.forward import token_logprobs
from jaxserve.models.registry import create_model
from jaxserve.models.weights import load_params
from jaxserve.tokenizer import Tokenizer

FOLDER = pathlib.Path(jaxserve.__file__).with_name("demo_model")
PROMPTS = ["Tell me something.", "What is the capital of France?", "Who are you?", "Count from"]
SAMPLES, NUM_TOKENS, TEMPERATURE = 16, 12, 1.0  # per prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    options = parser.parse_args()

    tokenizer = Tokenizer(FOLDER)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    digits = np.array(
        [tokenizer.decode([i]).strip().isdigit() for i in range(tokenizer.vocab_size)]
    )
    graphdef, abstract = create_model(
        ModelConfig.from_pretrained(str(FOLDER), None, {}), dtype=jnp.float32
    )
    params = load_params(Checkpoint(FOLDER), abstract)
    optimizer = optax.adam(options.learning_rate)
    moments = jax.device_put(optimizer.init(params), jax.devices()[0])  # where `params` are

    @jax.jit  # not donated: the engine serves from these very arrays
    def train(params, moments, tokens, is_sampled, advantages):
        def loss(params):
            logprobs = token_logprobs(nnx.merge(graphdef, params), tokens, TEMPERATURE)
            return -(logprobs * is_sampled * advantages[:, None]).sum() / is_sampled.sum()

        gradients = jax.grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(params, updates), moments

    @jax.jit
    def evaluate(params, tokens):
        return token_logprobs(nnx.merge(graphdef, params), tokens, TEMPERATURE)

    engine = Engine(
        model_path=str(FOLDER),
        params=params,
        dtype="float32",
        max_running_requests=16,
        chunked_prefill_size=128,
        context_length=64,
        log_level="warning",
    )
    start, counter = time.perf_counter(), None
    for iteration in range(options.iterations):
        answers = engine.generate(
            input_ids=prompts,
            sampling_params={
                "n": SAMPLES,
                "temperature": TEMPERATURE,
                "max_new_tokens": NUM_TOKENS,
                "ignore_eos": True,
                "sampling_seed": 1000 * iteration,
            },
            return_logprob=True,
        )
        tokens, is_sampled = pack(prompts, answers)
        sampled = np.array([answer["output_ids"] for answer in answers])
        rewards = digits[sampled].mean(axis=1).reshape(len(prompts), SAMPLES)
        advantages = rewards - rewards.mean(axis=1, keepdims=True)
        advantages = (advantages / (advantages.std() + 1e-6)).reshape(-1)

        served = [lp for a in answers for lp, *_ in a["meta_info"]["output_token_logprobs"]]
        trained = np.asarray(evaluate(params, tokens))[is_sampled]
        params, moments = train(params, moments, tokens, is_sampled, advantages)
        began = time.perf_counter()
        engine.update_weights(params, weight_version=str(iteration + 1))
        print(
            f"{iteration:3d}  mean reward {rewards.mean():.3f}  "
            f"logprobs differ by {np.abs(trained - np.array(served)).max():.1e}  "
            f"update_weights {1e3 * (time.perf_counter() - began):.1f} ms"
        )
        counter = counter or CompileCounter()  # from here on
    counter.close()
    print(f"{time.perf_counter() - start:.0f} s; after the first iteration: {counter.report()}")
    engine.shutdown()


def pack(prompts: list[list[int]], answers: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and their answers, i32[B, L]; and which of the tokens but the first were sampled."""
    length = max(map(len, prompts)) + NUM_TOKENS
    tokens = np.zeros((len(answers), length), np.int32)
    is_sampled = np.zeros((len(answers), length - 1), bool)
    for i, answer in enumerate(answers):
        prompt = prompts[i // SAMPLES]
        text = [*prompt, *answer["output_ids"]]
        tokens[i, : len(text)] = text
        is_sampled[i, len(prompt) - 1 : len(text) - 1] = True
    return tokens, is_sampled


if __name__ == "__main__":
    main()
