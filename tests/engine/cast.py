"""The requests that all engines must answer alike: every way to sample, prompts of every length."""

import functools
from collections.abc import Callable

from jaxserve.request import LogprobParams, Request
from jaxserve.sampling_params import SamplingParams
from tests.golden.random_checkpoint import random_tokens

PENALTIES = {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.2}
BIAS = {"logit_bias": {"17": 2.0, "40": -100.0, "41": 1.5}}

# How to sample, and which logprobs to tell: None for none; the prompt's too, from "start".
KINDS: dict[str, tuple[dict, dict | None]] = {
    "greedy": ({"temperature": 0}, None),
    "greedy_told": ({"temperature": 0}, {}),
    "greedy_tops": ({"temperature": 0}, {"top_num": 4, "token_ids": (7, 0)}),
    "penalties": ({"temperature": 0, **PENALTIES}, {}),
    "bias": ({"temperature": 0, **BIAS, "min_new_tokens": 9}, {"start": 0, "top_num": 1}),
    "hot": ({"temperature": 1.1}, None),
    "hot_told": ({"temperature": 0.9}, {"start": 3}),
    "top_k": ({"temperature": 0.8, "top_k": 12}, {}),
    "top_p": ({"temperature": 1.3, "top_p": 0.7}, {"token_ids": (1, 2, 3)}),
    "min_p": ({"temperature": 1.2, "min_p": 0.05}, None),
    "all": (
        {"temperature": 1.2, "top_k": 60, "top_p": 0.95, "min_p": 0.01, **PENALTIES, **BIAS},
        {"top_num": 20},
    ),
}
LENGTHS = (1, 2, 5, 16, 17, 31, 40, 63, 64, 150)  # of prompts: at the edges of pages, and between


def make(kind: str, prompt: list[int], *, rid: str, seed: int = 0, most: int = 10) -> Request:
    """A request for `most` tokens that no stop ends."""
    fields, told = KINDS[kind]
    sampling = SamplingParams.parse({"ignore_eos": True, "max_new_tokens": most, **fields})
    logprobs = None
    if told is not None:
        logprobs = LogprobParams(**{"start": len(prompt)} | told)
    return Request(
        rid=rid,
        prompt_ids=prompt,
        sampling=sampling,
        max_new_tokens=most,
        seed=seed,
        logprobs=logprobs,
    )


def prompt_of(length: int, vocab_size: int, key: str) -> list[int]:
    return random_tokens(f"equality/{key}", length, vocab_size).tolist()


def make_cast(
    count: int, vocab_size: int, pick: Callable[[Callable[[int], Request]], Request]
) -> list[Request]:
    """Kinds and lengths go round at different paces, so that they meet in every combination. Every
    other prompt begins as the one before it, for longer and longer.

    Args:
      pick: chooses among takes of a request: `Oracle.pick`.
    """
    kinds = list(KINDS)
    cast: list[Request] = []

    def make_take(index: int, take: int) -> Request:
        kind, length = kinds[index % len(kinds)], LENGTHS[index % len(LENGTHS)]
        prompt = prompt_of(length, vocab_size, f"{index}/{take}")
        if index % 2:
            begin = cast[-1].prompt_ids[: min(3 * index, length)]
            prompt = begin + prompt[len(begin) :]
        return make(kind, prompt, rid=f"{kind}-{index}", seed=index + take, most=6 + 7 * index % 19)

    for index in range(count):
        cast.append(pick(functools.partial(make_take, index)))
    return cast
