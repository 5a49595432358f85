"""The jitted step in a loop of one's own: no engine, no thread, no server.

    python examples/embed_step.py

Answers more questions than there are rows: a row whose answer is complete takes the next question
in the same call in which the other rows get their next token.
"""

import collections
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxserve
from jaxserve import SamplingBatch, make_step
from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.weights import load_params
from jaxserve.tokenizer import Tokenizer

FOLDER = pathlib.Path(jaxserve.__file__).with_name("demo_model")
COUNTRIES = ["France", "Peru", "Kenya", "Japan", "Norway", "Egypt", "Canada", "Chile"]
ROWS, MAX_LEN, MAX_TOKENS = 4, 64, 32


def main() -> None:
    tokenizer = Tokenizer(FOLDER)
    config = ModelConfig.from_pretrained(str(FOLDER), None, {})
    step = make_step(config, max_rows=ROWS, max_len=MAX_LEN, max_tokens=MAX_TOKENS)
    params = load_params(Checkpoint(FOLDER), step.abstract_params)
    run = jax.jit(step.__call__, donate_argnums=1)
    restart = jax.jit(step.restart, donate_argnums=0)

    waiting = collections.deque(f"What is the capital of {country}?" for country in COUNTRIES)
    questions: list[str | None] = [None] * ROWS
    answers: list[list[int]] = [[] for _ in range(ROWS)]
    state = step.init_state(SamplingBatch.of(ROWS, temperature=0.0), config.eos_token_ids)
    start, num_calls = time.perf_counter(), 0
    while waiting or any(questions):
        is_new = np.array([question is None and bool(waiting) for question in questions])
        # No more than two prompts at once: their tokens must fit MAX_TOKENS.
        is_new &= np.cumsum(is_new) <= 2
        new_tokens: list[list[int]] = []
        for row in range(ROWS):
            if is_new[row]:
                questions[row], answers[row] = waiting.popleft(), []
                new_tokens.append(tokenizer.encode(questions[row]))
            else:
                new_tokens.append([-1] if questions[row] else [])  # -1: the token drawn last
        if is_new.any():
            state = restart(state, jnp.asarray(is_new))
        tokens = [token for row in new_tokens for token in row]
        tokens += [0] * (MAX_TOKENS - len(tokens))
        lengths = [len(row) for row in new_tokens]
        state, out = run(params, state, jnp.array(tokens, jnp.int32), jnp.array(lengths, jnp.int32))
        num_calls += 1
        for row, token in enumerate(np.asarray(out.tokens).tolist()):
            if questions[row] is None:
                continue
            answers[row].append(token)
            if out.is_finished[row]:
                print(f"{questions[row]}{tokenizer.decode(answers[row])}")
                questions[row] = None
    seconds = time.perf_counter() - start
    print(f"{len(COUNTRIES)} answers in {num_calls} calls of one program, {seconds:.1f} s")


if __name__ == "__main__":
    main()
