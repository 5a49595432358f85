"""How far the logprobs that the engine returned are from those of the training forward.

    python benchmarks/train_serve.py --model tiny --dtype float32 --deterministic
    python benchmarks/train_serve.py --model llama-3.1-8b --prompt-len 256 --output-len 256

Samples with one engine of dummy weights, at temperature 1, then runs `token_logprobs` on the same
parameters (`served_logprobs` with --deterministic). Prints one JSON object:
  bits_differ       logprobs that are not the same float
  max, mean         of |served - trained|
  rms               of served - trained
  ratio_min, _max   of exp(trained - served), the importance ratio that a policy gradient takes
  ratio_off_1       its mean distance from 1
  ratio_sequence_min, _max  the same of whole answers
  kl                mean of ratio - 1 - log(ratio), an estimate of KL(served || trained)
  perplexity        of what was sampled, by the engine's logprobs
"""

import argparse
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from shapes import MODELS  # the file beside this one

from jaxserve import Engine
from jaxserve.models.batch_invariant import COMPILER_OPTIONS
from jaxserve.models.config import ModelConfig
from jaxserve.models.forward import served_logprobs, token_logprobs
from jaxserve.models.registry import create_model, random_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--std", type=float, default=0.02, help="of the dummy weights")
    parser.add_argument("--rows", type=int, default=1, help="sequences in one training forward")
    parser.add_argument("--deterministic", action="store_true")
    options = parser.parse_args()

    length = options.prompt_len + options.output_len
    raw = {"architectures": ["Qwen2ForCausalLM"], **MODELS[options.model]}
    raw |= {"max_position_embeddings": length + 16, "torch_dtype": options.dtype}
    config = ModelConfig.from_dict(raw)
    graphdef, abstract = create_model(config)
    params = random_params(abstract, jax.random.key(0), options.std)

    start = time.perf_counter()
    prompts, answers = sample(raw, params, config.vocab_size, options)
    served = np.array(
        [[lp for lp, *_ in a["meta_info"]["output_token_logprobs"]] for a in answers], np.float32
    )
    sampled, start = time.perf_counter() - start, time.perf_counter()
    outputs = np.array([answer["output_ids"] for answer in answers], np.int32)
    tokens = np.concatenate([prompts, outputs], axis=1)
    trained = train(graphdef, params, config, tokens, options)[:, options.prompt_len - 1 :]
    line = vars(options) | {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seconds_sampling": round(sampled, 1),
        "seconds_training": round(time.perf_counter() - start, 1),
        "num_logprobs": served.size,
    }
    print(json.dumps(line | compare(served, trained)), flush=True)


def sample(raw, params, vocab_size: int, options) -> tuple[np.ndarray, list[dict]]:
    """Random prompts i32[B, L], and the engine's answers to them."""
    rng = np.random.default_rng(0)
    shape = options.prompts, options.prompt_len
    prompts = rng.integers(0, vocab_size, shape, dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps(raw))
        engine = Engine(
            model_path=folder,
            params=params,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_running_requests=options.prompts,
            chunked_prefill_size=min(512, options.prompts * options.prompt_len),
            max_total_tokens=options.prompts * (options.prompt_len + options.output_len + 16),
            deterministic=options.deterministic,
            log_level="warning",
        )
    with engine:
        answers = engine.generate(
            input_ids=prompts.tolist(),
            sampling_params={
                "temperature": 1.0,
                "max_new_tokens": options.output_len,
                "ignore_eos": True,
                "sampling_seed": 1,
            },
            return_logprob=True,
        )
    return prompts, answers


def train(graphdef, params, config: ModelConfig, tokens: np.ndarray, options) -> np.ndarray:
    """The training forward's logprobs of every token but the first, f32[B, L-1]."""

    def forward(params, tokens):
        model = nnx.merge(graphdef, params)
        if options.deterministic:
            return served_logprobs(model, config, tokens)
        return token_logprobs(model, tokens)

    compiler_options = COMPILER_OPTIONS if options.deterministic else None
    run = jax.jit(forward, compiler_options=compiler_options)
    pieces = np.split(tokens, range(options.rows, len(tokens), options.rows))
    return np.concatenate([np.asarray(run(params, jnp.asarray(piece))) for piece in pieces])


def compare(served: np.ndarray, trained: np.ndarray) -> dict[str, float]:
    """Of logprobs of sampled tokens, f32[B, L]."""
    log_ratio = trained.astype(np.float64) - served
    ratio, sequence = np.exp(log_ratio), np.exp(log_ratio.sum(axis=1))
    figures = {
        "max": np.abs(log_ratio).max(),
        "mean": np.abs(log_ratio).mean(),
        "rms": np.sqrt((log_ratio**2).mean()),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "ratio_off_1": np.abs(ratio - 1).mean(),
        "ratio_sequence_min": sequence.min(),
        "ratio_sequence_max": sequence.max(),
        "kl": (ratio - 1 - log_ratio).mean(),
        "perplexity": np.exp(-served.mean(dtype=np.float64)),
    }
    bits_differ = int((served.view(np.int32) != trained.view(np.int32)).sum())
    return {"bits_differ": bits_differ} | {name: float(f"{x:.8g}") for name, x in figures.items()}


if __name__ == "__main__":
    main()
