"""After ready nothing is traced or compiled, whatever is asked; and nothing was compiled in vain.

Every prompt length from 1 to 600, every batch size from 1 to 64, every option alone and all mixed.
A new option is a new line in OPTIONS.
"""

import collections
import itertools
import json
import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine_builder import build_engine
from jaxserve.engine_core import EngineCore
from jaxserve.frontend import Frontend
from jaxserve.messages import AbortRequest, AddRequest
from tests.server.serving import DEMO_MODEL, programs_folder

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": 2,
}
LONGEST, MAX_ROWS, PAGE_SIZE = 600, 64, 16
DECODED = 6  # tokens of a request that does not say how many
# What a body of /generate may hold beside its prompt.
OPTIONS = {
    "greedy": {"sampling_params": {"temperature": 0}},
    "temperature": {"sampling_params": {"temperature": 0.7}},
    "top_k": {"sampling_params": {"top_k": 5}},
    "top_k of 1": {"sampling_params": {"top_k": 1}},
    "top_p": {"sampling_params": {"top_p": 0.8}},
    "min_p": {"sampling_params": {"min_p": 0.1}},
    "seed": {"sampling_params": {"sampling_seed": -7}},
    "all filters": {"sampling_params": {"temperature": 2, "top_k": 9, "top_p": 0.5, "min_p": 0.1}},
    "frequency_penalty": {"sampling_params": {"frequency_penalty": 1.0}},
    "presence_penalty": {"sampling_params": {"presence_penalty": -1.0}},
    "repetition_penalty": {"sampling_params": {"repetition_penalty": 1.2, "temperature": 0}},
    "min_new_tokens": {"sampling_params": {"min_new_tokens": 5}},
    "logit_bias": {"sampling_params": {"logit_bias": {"7": 3.0, "8": -100.0}}},
    "n": {"sampling_params": {"n": 3}},
    "stop": {"sampling_params": {"stop": ["capital", "e"]}},
    "stop_token_ids": {"sampling_params": {"stop_token_ids": list(range(3, 1000, 9))}},
    "ignore_eos": {"sampling_params": {"ignore_eos": True}},
    "no output": {"sampling_params": {"max_new_tokens": 0}},
    "one token": {"sampling_params": {"max_new_tokens": 1}},
    "priority": {"priority": 5},
    "cache_salt": {"cache_salt": "a"},
    "logprobs": {"return_logprob": True},
    "logprobs of the best": {"return_logprob": True, "sampling_params": {"temperature": 0}},
    "top_logprobs_num": {"return_logprob": True, "top_logprobs_num": 3},
    "token_ids_logprob": {"return_logprob": True, "token_ids_logprob": [5, 6, 7]},
    "prompt logprobs": {"return_logprob": True, "logprob_start_len": 0},
    "prompt top logprobs": {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 20},
}
SIZES = (1, 3, 12, 40)  # of batches of one option: each lands in another bucket of decode rows


class Storm:
    """An engine without a thread, so that all of a batch arrive together."""

    def __init__(self, config: EngineConfig):
        self.core: EngineCore = build_engine(config)
        self.frontend = Frontend(config, lambda message: None)
        self.frontend.set_ready(self.core.info, self.core.tokenizer)
        self.calls: collections.Counter[tuple] = collections.Counter()  # of programs
        self.totals: collections.Counter[str] = collections.Counter()
        self.lengths: set[int] = set()  # of prompts
        self.batch_sizes: set[int] = set()  # of decode steps
        self._random = random.Random(0)
        self._watch_programs()
        self._watch_schedules()

    def _watch_programs(self) -> None:
        runner = self.core._runner
        for key, program in runner._programs.items():
            self.calls[key] = 0

            def call(*arguments, key=key, program=program):
                self.calls[key] += 1
                return program(*arguments)

            runner._programs[key] = call

    def _watch_schedules(self) -> None:
        builder = self.core._plan_builder
        build = builder.build

        def watch(schedule, **options):
            if schedule.is_decode:
                self.batch_sizes.add(len(schedule.chunks))
            return build(schedule, **options)

        builder.build = watch

    def prompt(self, length: int) -> list[int]:
        return self._random.choices(range(3, MODEL["vocab_size"]), k=length)

    def submit(self, prompt: list[int], option: dict[str, Any]) -> None:
        sampling = {"max_new_tokens": DECODED} | option.get("sampling_params", {})
        body = option | {"input_ids": prompt, "sampling_params": sampling}
        _, requests = self.frontend.prepare(body)
        for request in requests:
            assert self.core.handle(AddRequest(request)) == []
        self.lengths.add(len(prompt))

    def step(self) -> None:
        for update in self.core.step().updates:
            if update.finish_reason is not None:
                assert update.finish_reason.type in ("stop", "length"), update
                self.totals[update.finish_reason.type] += 1
                self.totals["cached tokens"] += update.cached_tokens
                self.totals["retractions"] += update.num_retractions

    def batch(self, prompts: list[list[int]], options: Iterable[dict[str, Any]]) -> None:
        for prompt, option in zip(prompts, options, strict=False):
            self.submit(prompt, option)
        while self.core.has_work:
            self.step()

    def compiled(self) -> dict[str, int]:
        """What JAX has done since the engine was ready."""
        return {k: v for k, v in self.core._internal_state().items() if k.endswith("_after_ready")}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="K=1"),
        pytest.param(4, id="K=4", marks=pytest.mark.matrix),  # make test-equality
    ],
)
def storm(request, pytestconfig, tmp_path_factory) -> Iterator[Storm]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    storm = Storm(
        EngineConfig(
            model_path=str(folder),
            tokenizer_path=DEMO_MODEL,
            load_format="dummy",
            device="cpu",
            dtype="float32",
            max_running_requests=MAX_ROWS,
            max_total_tokens=8192,
            page_size=PAGE_SIZE,
            chunked_prefill_size=960,
            num_continuous_decode_steps=request.param,
            enable_priority_scheduling=True,
            schedule_conservativeness=0.3,
            compilation_cache_dir=programs_folder(pytestconfig),
        )
    )
    state = storm.core._internal_state()
    print({key: value for key, value in state.items() if "compil" in key})
    assert state["compiled_at_start"] >= len(storm.calls)
    yield storm
    storm.core.close()
    jax.clear_caches()


def all_lengths_in_batches_of_all_sizes(storm: Storm) -> Iterator[list[list[int]]]:
    """Batches of 1 to 64. The lengths are dealt out among them; all other prompts are short."""
    lengths = list(range(1, LONGEST + 1))
    random.Random(1).shuffle(lengths)
    every = MAX_ROWS * (MAX_ROWS + 1) // 2 // LONGEST
    requests = itertools.count()
    for size in range(1, MAX_ROWS + 1):
        numbers = itertools.islice(requests, size)
        long = (lengths.pop() if lengths and n % every == 0 else n % 9 + 1 for n in numbers)
        yield [storm.prompt(length) for length in long]


def shrinking(storm: Storm, option: dict[str, Any], num_steps: int) -> list[dict[str, Any]]:
    """Options of a full batch, of which one request ends with each decode step."""
    sampling = option.get("sampling_params", {}) | {"ignore_eos": True}
    limits = (DECODED + num_steps * number for number in range(MAX_ROWS))
    return [option | {"sampling_params": sampling | {"max_new_tokens": n}} for n in limits]


def test_nothing_is_compiled_and_every_program_is_called(storm):
    num_steps = storm.core._runner._shape.max_steps
    began = time.monotonic()
    options = itertools.cycle(OPTIONS.values())
    if num_steps == 1:  # prompts know nothing of decode steps: once is enough
        for prompts in all_lengths_in_batches_of_all_sizes(storm):
            storm.batch(prompts, options)
        assert storm.lengths >= set(range(1, LONGEST + 1))
    for option, size in itertools.product(OPTIONS.values(), SIZES):
        storm.batch([storm.prompt(5) for _ in range(size)], itertools.repeat(option))
    for name in ("greedy", "temperature", "frequency_penalty"):  # one for each sampler
        prompts = [storm.prompt(4) for _ in range(MAX_ROWS)]
        storm.batch(prompts, shrinking(storm, OPTIONS[name], num_steps))
    assert storm.batch_sizes >= set(range(1, MAX_ROWS + 1))
    stem = storm.prompt(PAGE_SIZE + 5)  # what follows continues a cached page
    storm.batch([stem, *([*stem, *storm.prompt(9)] for _ in range(MAX_ROWS))], options)
    crowded = {"sampling_params": {"max_new_tokens": 120, "ignore_eos": True}}
    storm.batch([storm.prompt(50) for _ in range(MAX_ROWS)], itertools.repeat(crowded))
    assert storm.totals["retractions"] and storm.totals["cached tokens"]

    print(f"{time.monotonic() - began:.1f} s, {dict(storm.totals)}, {storm.compiled()}")
    for key, count in sorted(storm.calls.items(), key=str):
        print(f"{count:6d} calls of {key}")
    assert set(storm.compiled().values()) == {0}
    assert not [key for key, count in storm.calls.items() if not count], "compiled in vain"


def test_aborts_flushes_and_failed_steps_compile_nothing(storm):
    endless = {"rid": "a", "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}
    storm.submit(storm.prompt(30), endless)
    for _ in range(5):
        storm.step()
    storm.core.handle(AbortRequest("a"))
    runner = storm.core._runner
    dispatch, calls = runner.dispatch, itertools.count()

    def fail_in_the_third_step(plan):
        fresh = dispatch(plan)
        if next(calls) == 2:
            raise RuntimeError("injected")
        return fresh

    runner.dispatch = fail_in_the_third_step
    storm.batch([storm.prompt(30) for _ in range(9)], itertools.cycle(OPTIONS.values()))
    runner.dispatch = dispatch
    assert next(calls) > 3
    assert storm.core._flush_cache()
    storm.batch([storm.prompt(30)], OPTIONS.values())
    print(storm.compiled())
    assert set(storm.compiled().values()) == {0}


def test_a_compilation_would_have_been_counted(storm):
    before = storm.compiled()
    jax.jit(lambda x: 3 * x + len(before))(np.ones(7))
    after = storm.compiled()
    print(before, after)
    assert {after[key] - before[key] for key in before} == {1}
