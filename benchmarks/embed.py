"""Embeddings per second of an engine in this process, and how much of the device they use.

    python benchmarks/embed.py --peak-tflops 800

Random ids of one length, random weights, no tokenizer, no HTTP and no cached prefix: what is left
is the model and what the engine does around it. Prints a JSON object. The floating point operations
counted are those of the model's matrices and of causal attention, two for each product and sum,
without padding; `share_of_peak` is theirs per second over --peak-tflops, the device's figure for
the dtype.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import numpy as np

from jaxserve import Engine
from jaxserve.models.config import ModelConfig

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
}
MODELS = {
    "gte-qwen2-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151646,
        "max_position_embeddings": 32768,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
}


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    raw = QWEN2 | MODELS[options.model]
    flops = flops_of(ModelConfig.from_dict(raw), options.length)
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(raw))
        with start(folder, options) as engine:
            seconds = measure(engine, raw["vocab_size"], options)
            device = engine.info.device
    rate = options.texts / statistics.median(seconds)
    found = {
        "model": options.model,
        "device": device,
        "texts": options.texts,
        "length": options.length,
        "chunk": options.chunk,
        "seconds": [round(one, 4) for one in seconds],
        "embeddings_per_s": round(rate, 1),
        "tokens_per_s": round(rate * options.length),
        "tflops_per_s": round(rate * flops / 1e12, 3),
    }
    if options.peak_tflops is not None:
        found["share_of_peak"] = round(rate * flops / 1e12 / options.peak_tflops, 4)
    print(json.dumps(found, indent=2))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="gte-qwen2-1.5b")
    parser.add_argument("--texts", type=int, default=1024, help="in one call (default: 1024)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: 512)")
    parser.add_argument("--rounds", type=int, default=5, help="whose median counts (default: 5)")
    parser.add_argument("--chunk", type=int, default=16384, help="of a step (default: 16384)")
    parser.add_argument("--rows", type=int, default=128, help="texts in two steps (default: 128)")
    parser.add_argument("--dtype", default="auto", help="(default: bfloat16)")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for that dtype")
    parser.add_argument("--compilation-cache-dir", help="as jaxserve serve has it")
    return parser


def start(folder: str, options: argparse.Namespace) -> Engine:
    return Engine(
        model_path=folder,
        is_embedding=True,
        load_format="dummy",
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        dtype=options.dtype,
        chunked_prefill_size=options.chunk,
        max_prefill_tokens=options.chunk,
        max_running_requests=options.rows,
        context_length=max(2 * options.length, 64),
        compilation_cache_dir=options.compilation_cache_dir,
    )


def measure(engine: Engine, vocab_size: int, options: argparse.Namespace) -> list[float]:
    """Seconds of each round; one before them is not counted."""
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(1 + options.rounds):
        texts = rng.integers(0, vocab_size, (options.texts, options.length)).tolist()
        began = time.perf_counter()
        answers = engine.encode(input_ids=texts)
        seconds.append(time.perf_counter() - began)
        norms = np.linalg.norm([one["embedding"] for one in answers], axis=1)
        assert np.allclose(norms, 1, atol=1e-3), "vectors"
    return seconds[1:]


def flops_of(config: ModelConfig, length: int) -> int:
    """Of one text; without norms, rotary positions and the embedding, which multiply nothing."""
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_heads)
    matrices = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    # Scores and their products with v, of each token with itself and those before it.
    pairs = length * (length + 1) // 2
    mixing = 2 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 2 * (matrices * length + mixing)


if __name__ == "__main__":
    main()
