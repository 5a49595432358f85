"""Writes a tiny checkpoint with random weights, in the file layout of Hugging Face.

The same bytes on every machine and in every version of NumPy: a weight is made of PCG64's raw bits
with additions and multiplications only, no logarithm or cosine whose last bit may differ. So a
golden made long ago in another environment belongs to the checkpoint that a test writes today.
Needs neither torch nor jax, because the oracle's Python has only the one and the tests' the other.
"""

import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np

Shapes = dict[str, tuple[int, ...]]

MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
QWEN3_HEAD_DIM = 128  # what Qwen3's configuration means when it names no head_dim
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_checkpoint(
    config: dict,
    folder: Path,
    seed: int,
    *,
    shards: int = 1,
    dtype: str = "float32",
    embedding_std: float = 1.0,
    shapes: Shapes | None = None,
) -> str:
    """Writes config.json and the weights; returns a digest of all names and values.

    Args:
      shapes: in place of those that the architecture has in a published checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        name: round_to(dtype, random_tensor(name, shape, seed, embedding_std))
        for name, shape in (shapes or tensor_shapes(config)).items()
    }
    if shards == 1:
        save(tensors, dtype, folder / "model.safetensors")
    else:
        save_shards(tensors, dtype, folder, shards)
    return digest(tensors)


def tensor_shapes(config: dict) -> Shapes:
    """Every tensor of the architecture, named and shaped as in a published checkpoint."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= attention_shapes(config, f"{prefix}.self_attn")
        shapes |= feed_forward_shapes(config, prefix, layer)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def attention_shapes(config: dict, prefix: str) -> Shapes:
    model_type = config["model_type"]
    is_qwen2 = model_type == "qwen2" or (model_type == "qwen2_moe" and config.get("qkv_bias", True))
    is_qwen3, is_olmoe = model_type in ("qwen3", "qwen3_moe"), model_type == "olmoe"
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or (
        QWEN3_HEAD_DIM if model_type == "qwen3" else hidden // heads
    )
    q_size, kv_size = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    out_biased = config.get("attention_bias", False)
    biased = out_biased or is_qwen2
    norms = {"q_norm": head_dim, "k_norm": head_dim} if is_qwen3 else {}
    norms = {"q_norm": q_size, "k_norm": kv_size} if is_olmoe else norms
    return (
        linear_shapes(f"{prefix}.q_proj", q_size, hidden, biased)
        | linear_shapes(f"{prefix}.k_proj", kv_size, hidden, biased)
        | linear_shapes(f"{prefix}.v_proj", kv_size, hidden, biased)
        | linear_shapes(f"{prefix}.o_proj", hidden, q_size, out_biased)
        | {f"{prefix}.{norm}.weight": (size,) for norm, size in norms.items()}
    )


def feed_forward_shapes(config: dict, prefix: str, layer: int) -> Shapes:
    """A dense MLP or experts, whichever this layer has."""
    step = config.get("decoder_sparse_step", 1)
    is_sparse = (layer + 1) % step == 0 and layer not in config.get("mlp_only_layers", [])
    if "num_experts_per_tok" not in config or not is_sparse:
        return mlp_shapes(config, f"{prefix}.mlp", config["intermediate_size"])
    is_mixtral, hidden = config["model_type"] == "mixtral", config["hidden_size"]
    block = f"{prefix}.{'block_sparse_moe' if is_mixtral else 'mlp'}"
    names = ("w1", "w3", "w2") if is_mixtral else MLP_NAMES
    num_experts = config.get("num_experts") or config["num_local_experts"]
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    shapes = linear_shapes(f"{block}.gate", num_experts, hidden, False)
    for expert in range(num_experts):
        shapes |= mlp_shapes(config, f"{block}.experts.{expert}", inner, names)
    if shared := config.get("shared_expert_intermediate_size"):
        shapes |= mlp_shapes(config, f"{block}.shared_expert", shared)
        shapes |= linear_shapes(f"{block}.shared_expert_gate", 1, hidden, False)
    return shapes


def mlp_shapes(
    config: dict, prefix: str, intermediate: int, names: tuple[str, ...] = MLP_NAMES
) -> Shapes:
    hidden, biased = config["hidden_size"], config.get("mlp_bias", False)
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return (
        linear_shapes(gate, intermediate, hidden, biased)
        | linear_shapes(up, intermediate, hidden, biased)
        | linear_shapes(down, hidden, intermediate, biased)
    )


def linear_shapes(prefix: str, out_size: int, in_size: int, biased: bool) -> Shapes:
    shapes: Shapes = {f"{prefix}.weight": (out_size, in_size)}
    return shapes | {f"{prefix}.bias": (out_size,)} if biased else shapes


def random_tensor(name: str, shape: tuple[int, ...], seed: int, embedding_std: float) -> np.ndarray:
    """float32 values of a size that keeps activations near 1 and logits well apart."""
    values = standard_normal(f"{seed}/{name}", math.prod(shape)).reshape(shape)
    if name.endswith(("norm.weight", "LayerNorm.weight")):
        values = 1.0 + 0.25 * values
    elif name.endswith(".bias"):
        values = 0.3 * values
    elif name == "model.embed_tokens.weight":
        values = embedding_std * values
    else:
        values = 1.3 / math.sqrt(shape[-1]) * values
    return values.astype(np.float32)


def standard_normal(key: str, count: int) -> np.ndarray:
    """Nearly normal: the sum of four uniforms of 16 bits, hence never beyond 3.5."""
    bits = raw_bits(key, count)
    total = sum((bits >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    return (total.astype(np.float64) / 0x10000 - 2.0 + 2.0 / 0x10000) * math.sqrt(3.0)


def random_tokens(key: str, count: int, vocab_size: int) -> np.ndarray:
    return (raw_bits(key, count) % np.uint64(vocab_size)).astype(np.int32)


def raw_bits(key: str, count: int) -> np.ndarray:
    """uint64 values of a stream named by `key`; NumPy promises both this stream and its seeding."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.PCG64(seed).random_raw(count)


def round_to(dtype: str, values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest even; bfloat16, which NumPy lacks, as its 16 bits."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def save(tensors: dict[str, np.ndarray], dtype: str, path: Path) -> None:
    """Writes the format itself: the library has no bfloat16 for NumPy in all its versions."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": tensor.shape}
        header[name] = entry | {"data_offsets": (begin, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins on a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.writelines(tensor.tobytes() for tensor in tensors.values())


def save_shards(tensors: dict[str, np.ndarray], dtype: str, folder: Path, shards: int) -> None:
    """Deals the tensors out one by one, so that a layer's parts lie in different files."""
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[shard::shards]
        save({name: tensors[name] for name in names}, dtype, folder / file)
        weight_map |= dict.fromkeys(names, file)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def digest(tensors: dict[str, np.ndarray]) -> str:
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        sha256.update(tensor.tobytes())
    return sha256.hexdigest()
