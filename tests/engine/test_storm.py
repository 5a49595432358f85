"""After ready nothing is traced or compiled, whatever is asked; and nothing was compiled in vain.

Every prompt length from 1 to 600, every batch size from 1 to 64, every option alone and all mixed.
A new option is a new line in OPTIONS.
"""

import collections
import itertools
import json
import math
import random

import jax
import jax.numpy as jnp
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
DECODED = 10  # tokens of a request: all of a batch decode together for some steps
# What a body of /generate may hold beside its prompt.
OPTIONS = {
    "greedy": {"sampling_params": {"temperature": 0}},
    "temperature": {"sampling_params": {"temperature": 0.7}},
    "top_k": {"sampling_params": {"top_k": 5}},
    "top_k of 1": {"sampling_params": {"top_k": 1}},
    "top_p": {"sampling_params": {"top_p": 0.8}},
    "seed": {"sampling_params": {"sampling_seed": -7}},
    "all of them": {"sampling_params": {"temperature": 2.0, "top_k": 99, "top_p": 0.5}},
    "stop": {"sampling_params": {"stop": ["capital", "e"]}},
    "stop_token_ids": {"sampling_params": {"stop_token_ids": list(range(3, 1000, 9))}},
    "ignore_eos": {"sampling_params": {"ignore_eos": True}},
    "no output": {"sampling_params": {"max_new_tokens": 0}},
    "one token": {"sampling_params": {"max_new_tokens": 1}},
    "priority": {"priority": 5},
    "cache_salt": {"cache_salt": "a"},
}
SIZES = (1, 3, 12, 40)  # of batches of one option: each lands in another bucket of decode rows


class Storm:
    """An engine without a thread, so that all of a batch arrive together."""

    def __init__(self, config: EngineConfig):
        self.core: EngineCore = build_engine(config)
        self.frontend = Frontend(config, lambda message: None)
        self.frontend.set_ready(self.core.info, self.core.tokenizer)
        self.calls: collections.Counter[tuple] = collections.Counter()
        self.decoded: set[int] = set()  # rows of a decode step
        self.finished: collections.Counter[str] = collections.Counter()
        self.lengths: set[int] = set()  # of prompts
        self.cached = self.retractions = 0
        self._random = random.Random(0)
        self._watch()

    def _watch(self) -> None:
        runner, builder = self.core._runner, self.core._plan_builder
        for key, program in runner._programs.items():
            runner._programs[key] = self._counted(key, program)
        build = builder.build

        def watched(schedule):
            if schedule.is_decode:
                self.decoded.add(len(schedule.chunks))
            return build(schedule)

        builder.build = watched

    def _counted(self, key: tuple, program):
        self.calls[key] = 0

        def call(*arguments):
            self.calls[key] += 1
            return program(*arguments)

        return call

    def prompt(self, length: int) -> list[int]:
        return self._random.choices(range(3, MODEL["vocab_size"]), k=length)

    def submit(self, prompt: list[int], option: dict) -> list[str]:
        sampling = {"max_new_tokens": DECODED} | option.get("sampling_params", {})
        body = option | {"input_ids": prompt, "sampling_params": sampling}
        _, requests = self.frontend.prepare(body)
        for request in requests:
            self.core.handle(AddRequest(request))
        self.lengths.add(len(prompt))
        return [request.rid for request in requests]

    def run(self) -> None:
        while self.core.has_work:
            for update in self.core.step().updates:
                if update.finish_reason is not None:
                    assert update.finish_reason.type in ("stop", "length"), update
                    self.finished[update.finish_reason.type] += 1
                    self.cached += update.cached_tokens
                    self.retractions += update.num_retractions

    def batch(self, prompts: list[list[int]], options) -> None:
        for prompt, option in zip(prompts, options, strict=False):
            self.submit(prompt, option)
        self.run()

    def report(self) -> dict[str, int]:
        """What JAX has done since the engine is ready."""
        return {k: v for k, v in self.core._internal_state().items() if k.endswith("after_ready")}


@pytest.fixture(scope="module", params=[1, 4], ids=lambda steps: f"K={steps}")
def storm(request, pytestconfig, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    config = EngineConfig(
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
        log_level="warning",
    )
    storm = Storm(config)
    state = storm.core._internal_state()
    print({key: value for key, value in state.items() if "compil" in key})
    assert state["compiled_at_start"] >= len(storm.calls)
    yield storm
    storm.core.close()
    jax.clear_caches()


def all_lengths_in_all_batch_sizes(storm: Storm):
    """Batches of 1 to 64; the lengths are dealt out evenly, the other prompts are short."""
    total = MAX_ROWS * (MAX_ROWS + 1) // 2
    lengths = list(range(1, LONGEST + 1))
    random.Random(1).shuffle(lengths)
    requests = itertools.count()
    for size in range(1, MAX_ROWS + 1):
        prompts = []
        for number in itertools.islice(requests, size):
            is_next = math.ceil((number + 1) * LONGEST / total) > math.ceil(number * LONGEST / total)
            prompts.append(storm.prompt(lengths.pop() if is_next else number % 9 + 1))
        yield prompts


def test_storm_compiles_nothing_and_calls_every_program(storm, subtests=None):
    options = itertools.cycle(OPTIONS.values())
    for prompts in all_lengths_in_all_batch_sizes(storm):
        storm.batch(prompts, options)
    for option, size in itertools.product(OPTIONS.values(), SIZES):
        storm.batch([storm.prompt(5) for _ in range(size)], itertools.repeat(option))
    print("after", sum(storm.finished.values()), "requests:", dict(storm.finished))
