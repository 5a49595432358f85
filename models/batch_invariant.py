"""A model whose result for a token is the same to the bit in every batch: prefilled, decoded, in
chunks, beside others, in serving and in training."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int32

from jaxserve.models.interface import Embedder
from jaxserve.models.paged_attention import PagedAttention
from pallas_kernels.fixed_tiles import in_tiles, scan_tiles

ATTENTION = "batch-invariant"  # the implementation that it must be given
# For whoever compiles it. Excess precision would leave out roundings to bfloat16, depending on
# what stands beside them.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


class BatchInvariant:
    """Runs a model over tiles of tokens, one after the other.

    Keys and values go to the paged cache, so a tile sees those of the tiles before it, and a token
    is computed as if it were decoded alone.
    """

    def __init__(self, model: Embedder):
        self._model = model

    def __call__(
        self, tokens: Int32[Array, " T"], positions: Int32[Array, " T"], attend: PagedAttention
    ) -> tuple[Float[Array, "T D"], PagedAttention]:
        """As the model's own; padding gives zeros or anything else."""

        def run_tile(cache, start, tokens, positions):
            tile = attend.with_cache(cache).cut(start)
            hidden, tile = self._model(tokens, positions, tile)
            return tile.cache, (hidden, tile.expert_ids)

        rows = tokens, positions
        cache, (hidden, expert_ids) = scan_tiles(run_tile, attend.cache, rows, attend.num_live)
        attend = dataclasses.replace(attend, cache=cache, expert_ids=expert_ids)
        return hidden, attend

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        return in_tiles(self._model.logits, hidden)

    def scores(self, hidden: Float[Array, "B D"]) -> Float[Array, "B S"]:
        """Of the head of a model that answers with vectors; to be called by `rowwise`."""
        return self._model.scores(hidden)


def check(platform: str, option: str) -> None:
    """Raises ValueError on a device that cannot do what `option` asks for."""
    if platform != "cpu":
        raise ValueError(
            f"{option}: the device is a {platform}, and only a CPU computes fixed tiles to the "
            "same bits; --device cpu can do it, or leave it out"
        )


def rowwise(model: Embedder, function: Callable[..., Any], *rows: Any) -> Any:
    """`function(*rows)`, of arrays whose rows have nothing to do with each other; as invariant as
    the model is."""
    if isinstance(model, BatchInvariant):
        return in_tiles(function, *rows)
    return function(*rows)
