"""Building blocks. A parameter keeps the checkpoint's [out, in] layout; several may be fused.

Each parameter says what the rest of jaxserve must know of it:
  kind   "matrix", "bias" or "norm"
  axes   the logical axis of each dimension, to be mapped to a mesh
  parts  the checkpoint's tensors that it holds, and where: (name, index); the name replaces that
         of the fused module (`qkv_proj` -> `q_proj`, or `gate_up_proj` -> `7.up_proj` where the
         parameter is stacked), and "" keeps it
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxserve.models.config import ModelConfig
from jaxserve.models.interface import Attend
from jaxserve.models.rope import Rope, apply_rope

Parts = tuple[tuple[str, tuple[slice, ...]], ...]
QkNorm = Literal["head", "projection"]  # of each head alone, or of all heads as one vector
WHOLE: Parts = (("", ()),)


def param(
    *shape: int, dtype, kind: str, axes: tuple[str | None, ...], parts: Parts = WHOLE
) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype), kind=kind, axes=axes, parts=parts)


def project(x: Float[Array, "T I"], weight: Float[Array, "O I"], dtype=None) -> Float[Array, "T O"]:
    """The product of `x` and the transposed weight, in `dtype` or that of its operands."""
    if jax.default_backend() == "cpu":
        return _project_on_cpu(x, weight, dtype)
    return jnp.einsum("ti,oi->to", x, weight, preferred_element_type=dtype)


def _project_on_cpu(x, weight, dtype):
    """For a few tokens in the form that XLA's CPU runs fastest; all have the same meaning."""
    num_tokens = len(x)
    if weight.dtype == jnp.float32 and 1 < num_tokens <= 16:
        # On the right it transposes the whole weight first; on the left it reads it as it lies.
        y = jnp.einsum("oi,ti->ot", weight, x, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y).T  # or it would turn them round again
    if weight.dtype == jnp.bfloat16 and num_tokens == 1:
        # A bfloat16 vector goes element by element, ten times slower than two of them.
        x = jnp.concatenate([x, x])
    y = jnp.einsum("ti,oi->to", x, weight, preferred_element_type=dtype)
    return y[:num_tokens]


class Linear(nnx.Module):
    def __init__(
        self, in_size: int, out_size: int, *, dtype, axes: tuple[str | None, str | None], bias=False
    ):
        self.weight = param(out_size, in_size, dtype=dtype, kind="matrix", axes=axes)
        self.bias = param(out_size, dtype=dtype, kind="bias", axes=axes[:1]) if bias else None

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        y = project(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


class FusedLinear(nnx.Module):
    """Several projections of the same input in one matrix `[*lead, in]`, read as `parts` of it."""

    def __init__(
        self,
        in_size: int,
        lead: tuple[int, ...],
        *,
        parts: Parts,
        dtype,
        axes: tuple[str | None, ...],
        bias=False,
    ):
        make = {"dtype": dtype, "parts": parts}
        self.weight = param(*lead, in_size, kind="matrix", axes=(*axes, None), **make)
        self.bias = param(*lead, kind="bias", axes=axes, **make) if bias else None

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T ..."]:
        weight = self.weight[...]
        y = project(x, weight.reshape(-1, weight.shape[-1]))
        y = y.reshape(-1, *weight.shape[:-1])
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """https://arxiv.org/abs/1910.07467"""

    def __init__(self, size: int, *, eps: float, dtype):
        self.weight = param(size, dtype=dtype, kind="norm", axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * x32.astype(x.dtype)


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, size: int, *, dtype):
        axes = ("vocab", None)
        self.weight = param(vocab_size, size, dtype=dtype, kind="matrix", axes=axes)

    def __call__(self, ids: Int32[Array, " T"]) -> Float[Array, "T D"]:
        return self.weight[...][ids]


class Attention(nnx.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) with rotary positions.

    q, k and v are one matrix, grouped by KV head: `[K, G query heads + k + v, H, D]`.
    """

    def __init__(self, c: ModelConfig, dtype, *, window: int | None, qk_norm: QkNorm | None = None):
        group = c.num_heads // c.num_kv_heads
        self.qkv_proj = FusedLinear(
            c.hidden_size,
            (c.num_kv_heads, group + 2, c.head_dim),
            parts=(
                ("q_proj", (slice(None), slice(0, group))),
                ("k_proj", (slice(None), slice(group, group + 1))),
                ("v_proj", (slice(None), slice(group + 1, group + 2))),
            ),
            dtype=dtype,
            axes=("kv_heads", None, None),
            bias=c.attention_bias,
        )
        self.o_proj = Linear(
            c.num_heads * c.head_dim,
            c.hidden_size,
            dtype=dtype,
            axes=(None, "heads"),
            bias=c.attention_out_bias,
        )
        heads = (c.num_heads, c.num_kv_heads) if qk_norm == "projection" else (1, 1)
        self.q_norm, self.k_norm = (
            RMSNorm(n * c.head_dim, eps=c.rms_norm_eps, dtype=dtype) if qk_norm else None
            for n in heads
        )
        self.window, self.clip = window, c.clip_qkv

    def __call__[A: Attend](
        self, x: Float[Array, "T D"], rope: Rope, attend: A, layer: Int32[Array, ""]
    ) -> tuple[Float[Array, "T D"], A]:
        qkv = self.qkv_proj(x)
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        q = q.reshape(len(x), -1, q.shape[-1])
        if self.q_norm is not None:
            q, k = _norm_heads(self.q_norm, q), _norm_heads(self.k_norm, k)
        if self.clip is not None:
            q, k, v = (jnp.clip(x, -self.clip, self.clip) for x in (q, k, v))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        out, attend = attend(layer, q, k, v, window=self.window)
        return self.o_proj(out.reshape(len(x), -1)), attend


def _norm_heads(norm: RMSNorm, x: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
    """As many heads at a time as the norm has weights for."""
    return norm(x.reshape(len(x), -1, norm.weight.shape[0])).reshape(x.shape)


class GatedMLP(nnx.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202); gate and up are one matrix `[2, F, D]`."""

    def __init__(self, c: ModelConfig, dtype, *, intermediate_size: int | None = None):
        inner = intermediate_size or c.intermediate_size
        self.gate_up_proj = FusedLinear(
            c.hidden_size,
            (2, inner),
            parts=(("gate_proj", (slice(0, 1),)), ("up_proj", (slice(1, 2),))),
            dtype=dtype,
            axes=(None, "mlp"),
            bias=c.mlp_bias,
        )
        self.down_proj = Linear(
            inner, c.hidden_size, dtype=dtype, axes=(None, "mlp"), bias=c.mlp_bias
        )

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        gate_up = self.gate_up_proj(x)
        return self.down_proj(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1])
