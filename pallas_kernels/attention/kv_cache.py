"""The arrays that hold every request's keys and values.

The layout belongs to the kernels: models and engine pass the cache through unopened. All layers
share one K and one V array, because on a GPU a step that updates two donated buffers is dispatched
in half the time of one that updates two per layer.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of `num_pages` pages per layer; layer `l` owns pages `l * num_pages + ...`.

    Page 0 of every layer is the trash page: padding tokens are written there and nobody reads it.
    """

    k: Float[Array, "layers*pages K page_size H"]
    v: Float[Array, "layers*pages K page_size H"]
    num_pages: int = dataclasses.field(metadata={"static": True})

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]


def kv_cache_shape(
    *, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int, int, int]:
    """The shape of `KVCache.k` and of `KVCache.v`.

    Raises:
      ValueError: a size is not positive, or there is no page beside the trash page.
    """
    sizes = (num_layers, page_size, num_kv_heads, head_dim)
    if min(sizes) < 1 or num_pages < 2:
        raise ValueError(
            f"{num_layers=} {page_size=} {num_kv_heads=} {head_dim=} must be at least 1 and "
            f"{num_pages=} at least 2: page 0 is the trash page"
        )
    return num_layers * num_pages, num_kv_heads, page_size, head_dim


def write_kv(
    cache: KVCache,
    layer: Int32[Array, ""],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slot_mapping: Int32[Array, " T"],
) -> KVCache:
    """Writes each token's key and value into its slot (`page * page_size + offset`) of `layer`.

    In place when the cache is donated. Slots of different live tokens must differ; padding tokens
    all carry a slot of page 0.
    """
    page, offset = slot_mapping // cache.page_size, slot_mapping % cache.page_size
    page = page + layer * cache.num_pages

    def put(pages: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(pages.dtype)
        return pages.at[page, :, offset].set(new, mode="promise_in_bounds")

    return dataclasses.replace(cache, k=put(cache.k, k), v=put(cache.v, v))


def empty_kv_cache(shape: tuple[int, int, int, int], num_pages: int, dtype) -> KVCache:
    """A cache of zeros. Zeros, not `jnp.empty`: uninitialised memory may hold NaN."""
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), num_pages)
