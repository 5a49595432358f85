"""What it costs to note and to record which experts the tokens take, per decode step.

    python benchmarks/expert_recording.py

Random weights and prompts, no HTTP. `unnoted` is an engine whose programs know nothing of it (no
release is built that way); the others are one engine: with the recording `off`, `on` (counts for
the CSV), and `told`, where every request asks for its `routed_experts`. These three take turns;
milliseconds a step, the median of the turns and the least. With several decode steps in a dispatch
the host's time, which varies most, counts little. Prints a JSON object.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
from unittest import mock

import jax
from shapes import MODELS

from jaxserve import Engine, engine_builder
from jaxserve.bench import one_batch
from jaxserve.bench.timeline import Timeline

QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 8192,
}
MODEL = {"tiny": "tiny-moe", "qwen1.5-moe-a2.7b": "qwen1.5-moe-a2.7b"}


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = QWEN2_MOE | MODELS[MODEL[options.model]]
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        with mock.patch.object(engine_builder, "_state_shape", _without_notes()):
            unnoted, _ = measure(folder, options, ("unnoted",))
        noted, device = measure(folder, options, ("off", "on", "told"))
    steps = {
        f"{size} at once": {name: found[size] for name, found in (unnoted | noted).items()}
        for size in options.batch_size
    }
    told = {"prompt": options.input_len, "output": options.output_len, "turns": options.turns}
    print(json.dumps({"model": options.model, "device": device} | told | steps, indent=2))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODEL, default="qwen1.5-moe-a2.7b")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--decode-steps", type=int, default=1, help="in one dispatch")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--compilation-cache-dir")
    return parser


def _without_notes():
    make = engine_builder._state_shape

    def state_shape(*arguments, **options):
        shape = make(*arguments, **options)
        return engine_builder.dataclasses.replace(shape, num_sparse_layers=0)

    return state_shape


def measure(
    folder: str, options: argparse.Namespace, ways: tuple[str, ...]
) -> tuple[dict[str, dict[int, list[float]]], str]:
    """Milliseconds a decode step, median and least, by way and batch size; and the device."""
    with Engine(
        model_path=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_running_requests=max(options.batch_size),
        chunked_prefill_size=1024,
        num_continuous_decode_steps=options.decode_steps,
        context_length=options.input_len + options.output_len + 8,
        compilation_cache_dir=options.compilation_cache_dir,
    ) as engine:
        found: dict[str, dict[int, list[float]]] = {way: {} for way in ways}
        for size in options.batch_size:
            generate(engine, options, size, ways[0])
            turns = [
                [turn(engine, options, size, way) for way in ways] for _ in range(options.turns)
            ]
            for way, times in zip(ways, zip(*turns, strict=True), strict=True):
                found[way][size] = [round(one, 4) for one in (statistics.median(times), min(times))]
        device = engine.info.device
    jax.clear_caches()
    return found, device


def turn(engine: Engine, options: argparse.Namespace, size: int, way: str) -> float:
    if way == "on":
        engine.start_expert_distribution_record()
    timelines = generate(engine, options, size, way)
    if way == "on":
        engine.stop_expert_distribution_record()
    return one_batch.figures(timelines)["decode_ms_per_step"]


def generate(engine: Engine, options: argparse.Namespace, size: int, way: str) -> list[Timeline]:
    engine.flush_cache()
    prompts = one_batch.random_prompts(size, options.input_len, engine.info.vocab_size, seed=0)
    fields = {"return_routed_experts": True} if way == "told" else {}
    return one_batch.generate(engine, prompts, options.output_len, **fields)


if __name__ == "__main__":
    main()
