"""`jaxserve bench one-batch`: how long one batch takes, its prompts and then each decode step."""

import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

from jaxserve.bench import cpu_time
from jaxserve.bench.dataset import Sample
from jaxserve.bench.metrics import distribution
from jaxserve.bench.offline import take
from jaxserve.bench.options import BatchOptions
from jaxserve.bench.sampling import sampling_params
from jaxserve.bench.timeline import Timeline
from jaxserve.engine import Engine

WARM_UP_TOKENS = 8


def run(engine: Engine, options: BatchOptions) -> Iterator[dict[str, Any]]:
    """A run for each combination.

    Raises:
      ValueError: the engine cannot run such a batch at once; names the limit.
    """
    shapes = list(itertools.product(options.batch_size, options.input_len, options.output_len))
    for size, input_len, output_len in shapes:
        check_fits(engine, size, input_len + output_len)
    for size, input_len, output_len in shapes:
        prompts = random_prompts(size, input_len, engine.info.vocab_size, options.seed)
        generate(engine, prompts, min(output_len, WARM_UP_TOKENS))
        engine.flush_cache()
        before = cpu_time.own()
        timelines = generate(engine, prompts, output_len)
        spent = cpu_time.own() - before
        engine.flush_cache()
        yield {
            "parameters": {"batch_size": size, "input_len": input_len, "output_len": output_len},
            "metrics": figures(timelines) | {"cpu_s": spent._asdict()},
        }


def check_fits(engine: Engine, size: int, num_tokens: int) -> None:
    """Raises ValueError."""
    info = engine.info
    if size > info.max_running_requests:
        most = f"--max-running-requests {info.max_running_requests}"
        raise ValueError(f"--batch-size {size}: more than {most}")
    if size * num_tokens > info.max_total_num_tokens:
        room = f"the KV cache has room for {info.max_total_num_tokens} (--max-total-tokens)"
        raise ValueError(f"--batch-size {size} of {num_tokens} tokens each: {room}")


def figures(timelines: list[Timeline]) -> dict[str, Any]:
    """Prefill lasts until the last request has its first token; decode steps are counted from
    there until the first request is complete, so that all of the batch is in each of them."""
    last = max(timelines, key=lambda timeline: timeline.events[0][0])
    first_finish = min(timeline.finished for timeline in timelines)
    began, had = last.events[0]
    prompt_tokens = sum(timeline.prompt_tokens for timeline in timelines)
    prefill = began - last.sent
    metrics: dict[str, Any] = {
        "prefill_ms": prefill * 1e3,
        "input_tokens_per_s": prompt_tokens / prefill,
        "output_tokens": sum(timeline.num_tokens for timeline in timelines),
        "latency_ms": (max(timeline.finished for timeline in timelines) - last.sent) * 1e3,
    }
    decode = [(time, count) for time, count in last.events[1:] if time <= first_finish]
    if decode:
        together = Timeline(last.asked_tokens, last.due, last.sent, [(began, had), *decode])
        steps = together.num_tokens - had
        per_step = (together.finished - began) / steps
        metrics |= {
            "decode_steps": steps,
            "decode_ms_per_step": per_step * 1e3,
            "decode_ms_per_token": per_step * 1e3 / len(timelines),
            "decode_tokens_per_s": len(timelines) / per_step,
            "decode_step_ms": distribution(together.inter_token_latencies),
        }
    return metrics


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(range(vocab_size), k=length) for _ in range(count)]


def generate(
    engine: Engine, prompts: list[list[int]], output_len: int, **fields: Any
) -> list[Timeline]:
    """All at once. `fields` are others of /generate."""
    params = sampling_params(Sample(prompts[0], output_len), {}, 0)
    began = time.perf_counter()
    timelines = [Timeline(output_len, began, began) for _ in prompts]
    for answer in engine.generate(input_ids=prompts, sampling_params=params, stream=True, **fields):
        take(answer, timelines[answer["index"]])
    return timelines
