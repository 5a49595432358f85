"""Rotary position embedding (https://arxiv.org/abs/2104.09864) and its long-context variants."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxserve.models.config import ModelConfig, RopeConfig

Rope = tuple[Float[Array, "T 1 half_head"], Float[Array, "T 1 half_head"]]


def rope_tables(config: ModelConfig, positions: Int32[Array, " T"]) -> Rope:
    """Cosines and sines of every position, once for all layers."""
    frequencies, scale = inverse_frequencies(config.rope, config.head_dim, config.context_length)
    angles = positions[:, None, None].astype(jnp.float32) * frequencies
    # The barrier keeps XLA from computing them again wherever they are used.
    return jax.lax.optimization_barrier((jnp.cos(angles) * scale, jnp.sin(angles) * scale))


def apply_rope(x: Float[Array, "T N H"], rope: Rope) -> Float[Array, "T N H"]:
    cos, sin = rope
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, context_length: int
) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of dimensions, f32[H/2], and a factor on cosine and sine.

    `dynamic` computes its base once, for the context length that is served: a base that followed
    each request's own length would make cached keys depend on who reads them.

    Raises:
      ValueError: no frequencies follow from these options.
    """
    try:
        with np.errstate(all="ignore"):
            frequencies, scale = _frequencies(rope, head_dim, context_length)
    except (OverflowError, ZeroDivisionError):
        frequencies, scale = np.full(1, np.nan), 1.0
    if not ((frequencies > 0) & (frequencies < np.inf)).all() or not math.isfinite(scale):
        raise ValueError(f"config.json: no frequencies follow from {rope}")
    return frequencies.astype(np.float32), scale


def _frequencies(rope: RopeConfig, head_dim: int, context_length: int) -> tuple[np.ndarray, float]:
    if rope.rope_type == "dynamic":
        rope = _dynamic_ntk(rope, head_dim, context_length)
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = rope.theta**-exponents
    scale = 1.0
    if rope.rope_type == "linear":
        frequencies /= rope.factor
    elif rope.rope_type == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.rope_type == "yarn":
        frequencies, scale = _yarn(rope, frequencies, head_dim)
    return frequencies, scale


def _dynamic_ntk(rope: RopeConfig, head_dim: int, context_length: int) -> RopeConfig:
    stretch = max(context_length / rope.original_context_length, 1.0)
    grown = rope.factor * stretch - (rope.factor - 1)
    return dataclasses.replace(rope, theta=rope.theta * grown ** (head_dim / (head_dim - 2)))


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between are blended."""
    turns = rope.original_context_length * frequencies / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope.factor


def _yarn(rope: RopeConfig, frequencies: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """https://arxiv.org/abs/2309.00071: dimensions that turn often stay, slow ones stretch."""

    def dimension_of(turns: float) -> float:
        """The dimension pair that turns so often over the original context."""
        ratio = rope.original_context_length / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 0.001)
    stretched = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    blended = stretched * frequencies / rope.factor + (1 - stretched) * frequencies
    return blended, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
