"""A function of rows, in tiles of one size: what a row gets depends on that row alone, to the bit.

XLA chooses how to multiply, fuse, vectorise and round by the shapes and the neighbours of an
operation. Here neither varies: however many rows there are, each is computed in the body of a loop
over tiles of TILE rows, which is compiled as a computation of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

TILE = 16


def in_tiles(
    function: Callable[..., Any],
    *rows: Any,
    count: Int32[Array, ""] | int | None = None,
    size: int = TILE,
) -> Any:
    """`function(*rows)`, computed by tiles.

    Args:
      function: of pytrees of arrays [size, ...], to the same; each row of its own.
      rows: pytrees of arrays [T, ...], for any T.
      count: as `scan_tiles` has it; all rows unless given.
    """

    def one(carry: None, start: jax.Array, *tile: Any) -> tuple[None, Any]:
        return carry, function(*tile)

    count = len(jax.tree.leaves(rows)[0]) if count is None else count
    return scan_tiles(one, None, rows, count, size)[1]


def scan_tiles(
    function: Callable[..., tuple[Any, Any]],
    carry: Any,
    rows: tuple[Any, ...],
    count: Int32[Array, ""] | int,
    size: int = TILE,
) -> tuple[Any, Any]:
    """Hands `carry` from tile to tile.

    Args:
      function: of carry, the number of the tile's first row, and the tiles of `rows`, to the next
        carry and the tile's results.
      count: rows that matter, the first ones; tiles behind them are not computed and give zeros.
      size: of a tile.

    Returns:
      The last carry, and the results of all rows.
    """
    num_rows = len(jax.tree.leaves(rows)[0])
    # Two tiles at least, no constant inside, and nobody knows how often the loop runs: otherwise
    # XLA could take things out of it, or dissolve it into what is around it.
    padding = max(-num_rows % size, 2 * size - num_rows)
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))), rows)
    padded, count = jax.lax.optimization_barrier((padded, jnp.int32(count)))

    def tile_at(start: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), padded)

    def body(state: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
        start, carry, out = state
        tile = jax.lax.optimization_barrier(tile_at(start))
        carry, new = function(carry, start, *tile)
        new = jax.lax.optimization_barrier(new)
        out = jax.tree.map(
            lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, start, 0), out, new
        )
        return start + size, carry, out

    def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((num_rows + padding, *shape.shape[1:]), shape.dtype)

    first = jnp.int32(0)
    shapes = jax.eval_shape(lambda: function(carry, first, *tile_at(first))[1])
    out = jax.tree.map(zeros, shapes)
    _, carry, out = jax.lax.while_loop(lambda state: state[0] < count, body, (first, carry, out))
    return carry, jax.tree.map(lambda x: x[:num_rows], out)
