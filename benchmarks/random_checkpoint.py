"""A checkpoint of random weights in the shape of a known model, written as fast as can be."""

import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np
import shapes

MODELS = {name: shapes.MODELS[name] for name in ("tiny", "llama-3.1-8b")}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
SHARD_BYTES = 5 << 30
BLOCK_BYTES = 64 << 20


def write_checkpoint(folder: pathlib.Path, config: dict) -> None:
    """Small random weights, the same block of them again and again."""
    folder.mkdir(parents=True, exist_ok=True)
    bits = np.random.default_rng(0).integers(0, 1 << 16, BLOCK_BYTES // 2, np.uint16)
    block = ((bits & 0x80FF) | 0x3C00).tobytes()  # bfloat16 of either sign, about 0.01
    shards, size = [{}], 0
    for name, shape in tensors(config):
        size += 2 * math.prod(shape)
        if size > SHARD_BYTES:
            shards, size = [*shards, {}], 2 * math.prod(shape)
        shards[-1][name] = shape
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        path = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(path, shard, block)
        weight_map |= dict.fromkeys(shard, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def tensors(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def write_shard(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], block: bytes) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for left in range(end, 0, -len(block)):
            file.write(block[:left])
