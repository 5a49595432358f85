"""Paged attention on CUDA GPUs, in Pallas on Triton.

Deprecated by JAX, but the only Pallas backend whose calls are captured in CUDA graphs today; delete
when JAX removes it. Two kernels:

decode: one program per (row, KV head, split of the row's keys); the queries of a group share what
is loaded. Partial results in float32 and a second kernel to merge them (flash-decoding).
extend: one program per (tile of 128 queries, head), flash-attention over the row's pages.

Page ids are loaded one iteration ahead and carried: otherwise Triton sees the loads of keys and
values as indirect and does not pipeline them at all.
"""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.kv_cache import KVCache
from pallas_kernels.attention.ragged import RaggedBatch, make_tiles

LOG2E = math.log2(math.e)
NEVER = -1e30  # a score below every real one; finite, because inf - inf is NaN
DECODE_BLOCK = 64  # keys per iteration; the best of 32, 64 and 128 on an H200
EXTEND_TILE, EXTEND_BLOCK = 128, 64
TARGET_PROGRAMS = 2 * 132  # two waves on an H200's multiprocessors


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """One query per row."""

    page_table: Int32[Array, "B M"]
    seq_lens: Int32[Array, " B"]
    splits: int = dataclasses.field(metadata={"static": True})
    interpret: bool = dataclasses.field(metadata={"static": True})


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExtendPlan:
    """Tiles of consecutive queries of one row; unused ones have no queries."""

    page_table: Int32[Array, "B M"]
    row: Int32[Array, " tiles"]
    first_query: Int32[Array, " tiles"]
    first_position: Int32[Array, " tiles"]
    num_queries: Int32[Array, " tiles"]
    interpret: bool = dataclasses.field(metadata={"static": True})


def plan(batch: RaggedBatch, cache: KVCache, num_tokens: int) -> DecodePlan | ExtendPlan:
    return _plan(batch, cache, num_tokens, interpret=False)


def plan_interpreted(
    batch: RaggedBatch, cache: KVCache, num_tokens: int
) -> DecodePlan | ExtendPlan:
    return _plan(batch, cache, num_tokens, interpret=True)


def _plan(batch, cache, num_tokens, interpret):
    head_dim = cache.head_dim
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise NotImplementedError(f"head_dim {head_dim} is no power of two from 16 up")
    num_rows, pages_per_row = batch.page_table.shape
    if num_tokens == num_rows:
        splits = _num_splits(num_rows * cache.num_kv_heads, pages_per_row * cache.page_size)
        return DecodePlan(batch.page_table, batch.seq_lens, splits, interpret)
    tiles = make_tiles(batch, num_tokens, EXTEND_TILE, EXTEND_BLOCK)
    return ExtendPlan(
        page_table=batch.page_table,
        row=tiles.row,
        first_query=tiles.query[:, 0],
        first_position=tiles.position[:, 0],
        num_queries=(tiles.position >= 0).sum(axis=1, dtype=jnp.int32),
        interpret=interpret,
    )


def _num_splits(programs: int, longest: int) -> int:
    """Enough programs to fill the GPU, but no split shorter than two blocks."""
    splits = 1
    while programs * splits < TARGET_PROGRAMS and longest // (2 * splits) >= 2 * DECODE_BLOCK:
        splits *= 2
    return min(splits, 64)


def paged_attention(
    q: Float[Array, "T N H"],
    cache: KVCache,
    layer: Int32[Array, ""],
    plan: DecodePlan | ExtendPlan,
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "T N H"]:
    num_tokens, num_heads, head_dim = q.shape
    operands = (
        q.reshape(num_tokens * num_heads, head_dim),
        cache.k.reshape(-1, head_dim),
        cache.v.reshape(-1, head_dim),
        (layer * cache.num_pages).reshape(1),
        plan.page_table,
    )
    shape = {
        "num_kv_heads": cache.num_kv_heads,
        "group": num_heads // cache.num_kv_heads,
        "page_size": cache.page_size,
        "scale": scale * LOG2E,
        "window": window,
        "interpret": plan.interpret,
    }
    attend = _decode if isinstance(plan, DecodePlan) else _extend
    return attend(operands, plan, shape).reshape(q.shape)


def _decode(operands, plan: DecodePlan, shape) -> jax.Array:
    num_lines, head_dim = operands[0].shape
    splits, dtype = plan.splits, operands[0].dtype
    num_rows = len(plan.seq_lens)
    outs = [jax.ShapeDtypeStruct((num_lines, head_dim), dtype)]
    if splits > 1:
        partial = (num_lines * splits,)
        outs = [
            jax.ShapeDtypeStruct((*partial, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(partial, jnp.float32),
            jax.ShapeDtypeStruct(partial, jnp.float32),
        ]
    results = _call(
        functools.partial(_decode_kernel, splits=splits, **shape),
        (num_rows, shape["num_kv_heads"], splits),
        (*operands, plan.seq_lens),
        outs,
        interpret=plan.interpret,
        name="paged_decode",
        num_warps=4,
        num_stages=3,
    )
    if splits == 1:
        return results[0]
    (merged,) = _call(
        functools.partial(_merge_kernel, splits=splits),
        (num_lines,),
        results,
        [jax.ShapeDtypeStruct((num_lines, head_dim), dtype)],
        interpret=plan.interpret,
        name="paged_decode_merge",
        num_warps=1 if splits <= 8 else 4,
        num_stages=1,
    )
    return merged


def _extend(operands, plan: ExtendPlan, shape) -> jax.Array:
    num_lines, head_dim = operands[0].shape
    num_heads = shape["num_kv_heads"] * shape["group"]
    arguments = (*operands, plan.row, plan.first_query, plan.first_position, plan.num_queries)
    (out,) = _call(
        functools.partial(_extend_kernel, **shape),
        (len(plan.row), num_heads),
        arguments,
        [jax.ShapeDtypeStruct((num_lines, head_dim), operands[0].dtype)],
        interpret=plan.interpret,
        name="paged_extend",
        num_warps=8,
        num_stages=3,
    )
    # No program writes the lines of padding tokens.
    num_live = plan.num_queries.sum() * num_heads
    return jnp.where(jnp.arange(num_lines)[:, None] < num_live, out, 0)


def _call(kernel, grid, arguments, outs, *, interpret, name, num_warps, num_stages):
    def whole(array):
        return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole(argument) for argument in arguments],
        out_specs=[whole(out) for out in outs],
        out_shape=outs,
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )(*arguments)


def _decode_kernel(
    q_ref,  # [B * N, H]
    k_ref,  # [layers * pages * K * page_size, H]
    v_ref,
    first_page_ref,  # [1]: of the layer
    table_ref,  # [B, M]
    length_ref,  # [B]
    out_ref,  # [B * N (* splits), H]
    *stats_refs,  # top and total, [B * N * splits], where the keys are split
    num_kv_heads,
    group,
    page_size,
    scale,
    window,
    splits,
    interpret,
):
    row, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    length = length_ref[row]
    begin = jnp.maximum(length - window, 0) if window is not None else 0
    begin = begin // DECODE_BLOCK * DECODE_BLOCK
    chunk = pl.cdiv(pl.cdiv(length - begin, splits), DECODE_BLOCK) * DECODE_BLOCK
    start = begin + split * chunk
    end = jnp.minimum(length, start + chunk)
    width = max(16, 1 << (group - 1).bit_length())  # a dot needs 16 rows
    member = jnp.arange(width, dtype=jnp.int32)
    lines = (row * num_kv_heads + head) * group + jnp.minimum(member, group - 1)
    q = q_ref[lines, :]
    offset = jnp.arange(DECODE_BLOCK, dtype=jnp.int32)
    last = jnp.maximum(end - 1, 0)

    def pages_of(i):
        # The tail re-reads the last live key: no mask on the loads, and never an unwritten slot.
        key = jnp.clip(start + i * DECODE_BLOCK + offset, 0, last)
        return table_ref[row, lax.div(key, page_size)]

    def body(i, carry):
        out, top, total, pages = carry
        key = start + i * DECODE_BLOCK + offset
        line = (pages + first_page_ref[0]) * num_kv_heads + head
        line = line * page_size + lax.rem(jnp.minimum(key, last), page_size)
        pages = pages_of(i + 1)
        visible = key < end
        if window is not None:
            visible &= key >= length - window
        k = k_ref[line, :].astype(q.dtype)
        scores = jnp.where(visible[None], plt.dot(q, k.T) * scale, NEVER)
        new_top = jnp.maximum(top, scores.max(axis=1))
        decay = jnp.exp2(top - new_top)
        weights = jnp.where(visible[None], jnp.exp2(scores - new_top[:, None]), 0)
        v = v_ref[line, :].astype(q.dtype)
        out = out * decay[:, None] + plt.dot(weights.astype(q.dtype), v)
        return out, new_top, total * decay + weights.sum(axis=1), pages

    zeros = jnp.zeros((width, q.shape[-1]), jnp.float32)
    top, total = jnp.full((width,), NEVER, jnp.float32), jnp.zeros((width,), jnp.float32)
    blocks = pl.cdiv(jnp.maximum(end - start, 0), DECODE_BLOCK)
    out, top, total, _ = lax.fori_loop(0, blocks, body, (zeros, top, total, pages_of(0)))

    store = functools.partial(
        _store, is_live=member < group, twin=jnp.minimum(member, group - 1), interpret=interpret
    )
    if splits == 1:
        out = out / jnp.maximum(total, 1e-30)[:, None]
        store(out_ref, lines, out.astype(out_ref.dtype))
    else:
        top_ref, total_ref = stats_refs
        for ref, value in ((out_ref, out), (top_ref, top), (total_ref, total)):
            store(ref, lines * splits + split, value)


def _merge_kernel(out_ref, top_ref, total_ref, merged_ref, *, splits):
    line = pl.program_id(0)
    part = line * splits + jnp.arange(splits, dtype=jnp.int32)
    top = top_ref[part]
    weight = jnp.exp2(top - top.max())
    total = jnp.maximum((total_ref[part] * weight).sum(), 1e-30)
    merged = (out_ref[part, :] * weight[:, None]).sum(axis=0) / total
    merged_ref[line, :] = merged.astype(merged_ref.dtype)


def _extend_kernel(
    q_ref,  # [T * N, H]
    k_ref,  # [layers * pages * K * page_size, H]
    v_ref,
    first_page_ref,  # [1]: of the layer
    table_ref,  # [B, M]
    row_ref,  # [tiles], as in ExtendPlan
    first_query_ref,
    first_position_ref,
    num_queries_ref,
    out_ref,  # [T * N, H]
    *,
    num_kv_heads,
    group,
    page_size,
    scale,
    window,
    interpret,
):
    # The last tiles of a prompt have the most keys: they go first.
    tile, head = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
    num_queries, row = num_queries_ref[tile], row_ref[tile]
    first_position = first_position_ref[tile]
    kv_head = lax.div(head, group)
    query = jnp.arange(EXTEND_TILE, dtype=jnp.int32)
    twin = jnp.minimum(query, num_queries - 1)
    lines = (first_query_ref[tile] + twin) * (num_kv_heads * group) + head
    position = first_position + query
    offset = jnp.arange(EXTEND_BLOCK, dtype=jnp.int32)
    num_keys = first_position + num_queries  # that the last query sees

    @pl.when(num_queries > 0)
    def _():
        q = q_ref[lines, :]

        def pages_of(i):
            key = jnp.minimum(i * EXTEND_BLOCK + offset, num_keys - 1)
            return table_ref[row, lax.div(key, page_size)]

        def body(i, carry, is_masked):
            out, top, total, pages = carry
            key = i * EXTEND_BLOCK + offset
            line = (pages + first_page_ref[0]) * num_kv_heads + kv_head
            line = line * page_size + lax.rem(jnp.minimum(key, num_keys - 1), page_size)
            pages = pages_of(i + 1)
            scores = plt.dot(q, k_ref[line, :].astype(q.dtype).T) * scale
            visible = key[None] <= position[:, None]
            if window is not None:
                visible &= key[None] > position[:, None] - window
            if is_masked:
                scores = jnp.where(visible, scores, NEVER)
            new_top = jnp.maximum(top, scores.max(axis=1))
            decay = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - new_top[:, None])
            if is_masked:
                weights = jnp.where(visible, weights, 0)
            v = v_ref[line, :].astype(q.dtype)
            out = out * decay[:, None] + plt.dot(weights.astype(q.dtype), v)
            return out, new_top, total * decay + weights.sum(axis=1), pages

        begin = 0
        full = lax.div(first_position + 1, EXTEND_BLOCK)  # blocks that need no mask
        if window is not None:
            begin = lax.div(jnp.maximum(first_position + 1 - window, 0), EXTEND_BLOCK)
            full = begin
        zeros = jnp.zeros((EXTEND_TILE, q.shape[-1]), jnp.float32)
        top = jnp.full((EXTEND_TILE,), NEVER, jnp.float32)
        total = jnp.zeros((EXTEND_TILE,), jnp.float32)
        carry = zeros, top, total, pages_of(begin)
        carry = lax.fori_loop(begin, full, functools.partial(body, is_masked=False), carry)
        blocks = pl.cdiv(num_keys, EXTEND_BLOCK)
        carry = lax.fori_loop(full, blocks, functools.partial(body, is_masked=True), carry)
        out, _, total, _ = carry
        out = (out / jnp.maximum(total, 1e-30)[:, None]).astype(out_ref.dtype)
        _store(out_ref, lines, out, is_live=query < num_queries, twin=twin, interpret=interpret)


def _store(ref, lines, value, *, is_live, twin, interpret) -> None:
    """Stores the live lines; a line that is not aliases its twin's."""
    if interpret:  # which has no masked store: every alias writes what its twin does
        value = value[twin]
        ref[lines, *(slice(None),) * (value.ndim - 1)] = value
    elif value.ndim == 2:
        mask = jnp.broadcast_to(is_live[:, None], value.shape)
        plt.store(ref.at[lines, :], value, mask=mask)
    else:
        plt.store(ref.at[lines], value, mask=is_live)
