"""The forward pass for training, of the modules that serve: whole sequences, differentiable."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxserve.models.batch_invariant import ATTENTION, BatchInvariant
from jaxserve.models.config import ModelConfig
from jaxserve.models.interface import CausalAttention, CausalLM
from jaxserve.models.paged_attention import PagedAttention
from jaxserve.models.scores import scale
from pallas_kernels.attention import RaggedBatch, empty_kv_cache, kv_cache_shape
from pallas_kernels.fixed_tiles import in_tiles

PAGE_SIZE = 16  # any would do


def forward(
    model: CausalLM, tokens: Int32[Array, "B L"], lengths: Int32[Array, " B"] | None = None
) -> Float[Array, "B L V"]:
    """Scores of the token after each of a batch of sequences, all beginning at position 0.

    Args:
      model: `nnx.merge(graphdef, params)`; gradients flow to `params`.
      lengths: of the sequences, beyond which nothing is meant: causal, what follows a token does
        not change its scores, so they are optional.
    """
    num_rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (num_rows, length))
    is_live = None if lengths is None else positions < lengths[:, None]
    # Flat, not under vmap: a row's tokens would not share their experts with another's.
    attend = CausalAttention(
        is_live=None if is_live is None else is_live.reshape(-1), num_rows=num_rows
    )
    hidden, _ = model(tokens.reshape(-1), positions.reshape(-1), attend)
    logits = model.logits(hidden).reshape(num_rows, length, -1)
    return logits if is_live is None else jnp.where(is_live[..., None], logits, 0)


def token_logprobs(
    model: CausalLM, tokens: Int32[Array, "B L"], temperature: Float[Array, " B"] | float = 1.0
) -> Float[Array, "B L-1"]:
    """The logprob of each token but the first, as the server tells it: of scores over temperature.

    What a policy gradient needs: sum it over the tokens that were sampled.

    Args:
      temperature: of each row, or of all; 0 means 1, as in what the server tells of greedy answers.
    """
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), len(tokens))
    logits = forward(model, tokens[:, :-1])
    scaled = jax.vmap(scale, in_axes=(1, None), out_axes=1)(logits, temperature)
    chosen = jnp.take_along_axis(scaled, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def served_logprobs(
    model: CausalLM,
    config: ModelConfig,
    tokens: Int32[Array, "B L"],
    temperature: Float[Array, " B"] | float = 1.0,
) -> Float[Array, "B L-1"]:
    """`token_logprobs`, equal to the bit to what a server with --deterministic tells of the same
    parameters on the same machine. The gradient is that of `token_logprobs`.

    In bfloat16 the function around it must be compiled with `batch_invariant.COMPILER_OPTIONS`:
    `jax.jit(..., compiler_options=COMPILER_OPTIONS)`.

    Args:
      model: on a CPU.
      config: of the model.
    """
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), len(tokens))

    @jax.custom_vjp
    def logprobs(model, tokens, temperature):
        return _logprobs_by_tiles(model, config, tokens, temperature)

    def run(model, tokens, temperature):
        return logprobs(model, tokens, temperature), (model, tokens, temperature)

    def pull_back(primals, cotangent):
        model, tokens, temperature = primals
        _, pull = jax.vjp(lambda m, t: token_logprobs(m, tokens, t), model, temperature)
        by_model, by_temperature = pull(cotangent)
        return by_model, None, by_temperature

    logprobs.defvjp(run, pull_back)
    return logprobs(model, tokens, temperature)


def _logprobs_by_tiles(model: CausalLM, config: ModelConfig, tokens, temperature):
    num_rows, length = len(tokens), tokens.shape[1] - 1
    position = jnp.arange(length, dtype=jnp.int32)
    invariant = BatchInvariant(model)
    hidden, _ = invariant(
        tokens[:, :-1].reshape(-1),
        jnp.tile(position, num_rows),
        _paged_attention(config, jax.tree.leaves(model)[0].dtype, num_rows, length),
    )
    scaled = in_tiles(scale, invariant.logits(hidden), jnp.repeat(temperature, length))
    logprobs = in_tiles(jax.nn.log_softmax, scaled)
    chosen = jnp.take_along_axis(logprobs, tokens[:, 1:].reshape(-1, 1), axis=-1)
    return chosen.reshape(num_rows, length)


def _paged_attention(config: ModelConfig, dtype, num_rows: int, length: int) -> PagedAttention:
    """Of whole sequences, in a cache that has just room for them."""
    pages_per_row = -(-length // PAGE_SIZE)
    num_pages = 1 + num_rows * pages_per_row
    shape = kv_cache_shape(
        num_layers=config.num_layers,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    first = jnp.arange(num_rows, dtype=jnp.int32)
    page_table = 1 + jnp.arange(num_rows * pages_per_row, dtype=jnp.int32)
    slots = PAGE_SIZE * (1 + first[:, None] * pages_per_row) + jnp.arange(length, dtype=jnp.int32)
    batch = RaggedBatch(
        page_table=page_table.reshape(num_rows, pages_per_row),
        seq_lens=jnp.full(num_rows, length, jnp.int32),
        query_start_loc=length * jnp.arange(num_rows + 1, dtype=jnp.int32),
    )
    cache = empty_kv_cache(shape, num_pages, dtype)
    return PagedAttention.of(cache, slots.reshape(-1), batch, implementation=ATTENTION)
