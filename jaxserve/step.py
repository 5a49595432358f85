"""The step as one pure function, for a loop of one's own: no thread, tokenizer, server or file.

    step = make_step(config, max_rows=8, max_len=256)
    params = step.prepare(tensors)                    # fuses once; any tree of checkpoint names
    state = step.init_state(sampling=SamplingBatch.of(8, temperature=1.0, seeds=range(8)))
    state, out = step(params, state, tokens, lengths)      # prompts in, one token each out
    state, outs = step.decode(params, state, num_steps=32)

It is what the engine compiles (`programs.py`), composed. All of it may stand inside `jax.jit`,
`lax.scan` and `shard_map` (over axes that the step does not use). The state should be donated.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from jaxserve import programs
from jaxserve.models import batch_invariant
from jaxserve.models.config import ModelConfig
from jaxserve.models.fuse import fuse, is_fused, named_tensors
from jaxserve.models.registry import create_model
from jaxserve.models.sharding import param_shardings
from jaxserve.state import State, StateShape
from jaxserve.step_plan import NUM_SAMPLING, NUM_STOP_IDS, RUNNING, Sampler

NONE_DRAWN = -1


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingBatch:
    """How each of B rows is sampled. Filters count only where the step's sampler is "full"."""

    temperature: Float[Array, " B"]  # 0: the best token
    seeds: Int32[Array, "B 2"]  # a token depends on these bits and its position alone
    top_p: Float[Array, " B"]
    top_k: Int32[Array, " B"]  # -1: all
    min_p: Float[Array, " B"]

    @classmethod
    def of(
        cls,
        num_rows: int,
        *,
        temperature: Any = 1.0,
        seeds: Iterable[int] | jax.Array | None = None,
        top_p: Any = 1.0,
        top_k: Any = -1,
        min_p: Any = 0.0,
    ) -> "SamplingBatch":
        """One value for all rows, or one each.

        Args:
          seeds: integers of 64 bits, as a request's `sampling_seed`, or i32[B, 2] (low half first)
            made on the device; 0, 1, ... unless given.
        """
        if seeds is None:
            seeds = range(num_rows)
        if not isinstance(seeds, jax.Array):
            numbers = np.array([seed % 2**64 for seed in seeds], np.uint64)
            seeds = jnp.asarray(numbers.view(np.int32).reshape(num_rows, 2))

        def rows(value: Any, dtype) -> jax.Array:
            return jnp.broadcast_to(jnp.asarray(value, dtype), num_rows)

        return cls(
            temperature=rows(temperature, jnp.float32),
            seeds=seeds,
            top_p=rows(top_p, jnp.float32),
            top_k=rows(top_k, jnp.int32),
            min_p=rows(min_p, jnp.float32),
        )

    def pack(self) -> Int32[Array, "B 11"]:
        """As `step_plan.pack_sampling` does for a request."""

        def bits(values: jax.Array) -> jax.Array:
            return jax.lax.bitcast_convert_type(values, jnp.int32)

        packed = jnp.zeros((len(self.temperature), NUM_SAMPLING), jnp.int32)
        columns = bits(self.temperature), bits(self.top_p), self.top_k
        packed = packed.at[:, :3].set(jnp.stack(columns, axis=1)).at[:, 3:5].set(self.seeds)
        return packed.at[:, 5].set(bits(self.min_p)).at[:, 8].set(bits(jnp.float32(1.0)))


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What each of B rows has drawn; `decode` has a leading axis of steps."""

    tokens: Int32[Array, " B"]  # NONE_DRAWN where a row drew none
    logprobs: Float[Array, " B"]  # of these tokens, at the row's temperature; 0 where there is none
    is_finished: Bool[Array, " B"]  # a stop id or `max_len` has been reached, or scores were NaN


@dataclasses.dataclass(frozen=True)
class Step:
    """Pure functions over explicit parameters and state. `make_step` makes one."""

    graphdef: nnx.GraphDef
    abstract_params: nnx.State  # shapes and dtypes of what `prepare` returns
    shape: StateShape
    sampler: Sampler
    mesh: Mesh | None
    attention: str | None
    deterministic: bool = False

    @property
    def param_shardings(self) -> nnx.State:
        """A sharding for each parameter. Raises ValueError for a step that was given no mesh."""
        if self.mesh is None:
            raise ValueError("make_step was given no mesh")
        return param_shardings(self.abstract_params, self.mesh)

    def prepare(self, tree: Any) -> nnx.State:
        """Parameters as the step wants them, from any tree with the checkpoint's names; once,
        outside of the loop. What is prepared already is returned as it is. May be jitted.

        Raises:
          ValueError: the tree does not fit the model; names every difference.
        """
        if is_fused(tree, self.abstract_params):
            return tree
        return fuse(named_tensors(tree), self.abstract_params)

    def init_state(
        self, sampling: SamplingBatch | None = None, stop_ids: Iterable[int] = ()
    ) -> State:
        """A state of B = max_rows empty rows.

        Args:
          sampling: greedy unless given.
          stop_ids: tokens that end a row, eight at most.
        """
        sampling = sampling or SamplingBatch.of(self.shape.max_rows, temperature=0.0)
        stop_ids = list(stop_ids)
        if len(stop_ids) > NUM_STOP_IDS:
            raise ValueError(f"{len(stop_ids)} stop ids: at most {NUM_STOP_IDS} fit")
        rows, pages_per_row = self.shape.max_rows, self.shape.pages_per_row
        state = self.shape.create()
        own = 1 + jnp.arange(rows * pages_per_row, dtype=jnp.int32).reshape(rows, pages_per_row)
        stops = (
            jnp.full(NUM_STOP_IDS, -1, jnp.int32)
            .at[: len(stop_ids)]
            .set(jnp.array(stop_ids, jnp.int32))
        )
        return dataclasses.replace(
            state,
            page_table=state.page_table.at[:rows].set(own),
            batch=jnp.arange(rows, dtype=jnp.int32),
            limit=state.limit.at[:rows].set(pages_per_row * self.shape.page_size - 1),
            stop_ids=state.stop_ids.at[:rows].set(stops),
            sampling=state.sampling.at[:rows].set(sampling.pack()),
        )

    def restart(
        self, state: State, is_new: Bool[Array, " B"], sampling: SamplingBatch | None = None
    ) -> State:
        """Empties some rows for new sequences, with other sampling if it is given."""
        rows = self.shape.max_rows

        def put(old: jax.Array, new: jax.Array | int) -> jax.Array:
            mask = is_new.reshape(-1, *(1,) * (old.ndim - 1))
            return old.at[:rows].set(jnp.where(mask, new, old[:rows]))

        return dataclasses.replace(
            state,
            seq_len=put(state.seq_len, 0),
            finish=put(state.finish, RUNNING),
            sampling=state.sampling if sampling is None else put(state.sampling, sampling.pack()),
        )

    def __call__(
        self,
        params: nnx.State,
        state: State,
        tokens: Int32[Array, " T"],
        lengths: Int32[Array, " B"],
    ) -> tuple[State, StepOutput]:
        """Extends rows by new tokens and draws the next token of each.

        Args:
          tokens: of all rows, packed one row after the other; what follows the last is padding.
            -1 stands for the token that the row has drawn last.
          lengths: how many each row gets; a row with none stays as it is. A finished row is not
            extended. No row may come to more than `max_len` tokens: what lies beyond is lost.

        Raises:
          ValueError: more tokens than `max_tokens`.
        """
        rows, (num_tokens,) = self.shape.max_rows, tokens.shape
        if num_tokens > self.shape.max_tokens:
            raise ValueError(f"{num_tokens} tokens: max_tokens is {self.shape.max_tokens}")
        draws = (lengths > 0) & (state.finish[:rows] == RUNNING)
        order = jnp.arange(rows, dtype=jnp.int32)
        upload = jnp.concatenate([order, lengths, draws.astype(jnp.int32), tokens])
        weights = tuple(jax.tree.leaves(params))
        model = functools.partial(programs.extend, self._merge, self.attention, num_tokens, rows)
        state = model(weights, state, upload)
        state = programs.sample(self._merge, self.sampler, rows, weights, state)
        return state, self._output(state, draws)

    def decode(
        self, params: nnx.State, state: State, num_steps: int = 1
    ) -> tuple[State, StepOutput]:
        """Gives each row its next `num_steps` tokens, as long as it is running: [K, B]."""
        rows, weights = self.shape.max_rows, tuple(jax.tree.leaves(params))

        def one(state: State, _):
            draws = state.finish[:rows] == RUNNING
            arguments = self._merge, self.attention, self.sampler, rows, 1
            state = programs.decode(*arguments, weights, state)
            return state, self._output(state, draws)

        return jax.lax.scan(one, state, length=num_steps)

    @property
    def _merge(self) -> programs.Merge:
        options = {"deterministic": self.deterministic}
        return programs.merger(self.graphdef, self.abstract_params, **options)

    def _output(self, state: State, draws: jax.Array) -> StepOutput:
        tokens, finish, bits = state.out[0, : self.shape.max_rows].T
        logprobs = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return StepOutput(
            tokens=jnp.where(draws, tokens, NONE_DRAWN),
            logprobs=jnp.where(draws, logprobs, 0.0),
            is_finished=state.finish[: self.shape.max_rows] != RUNNING,
        )


def make_step(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    max_rows: int,
    max_len: int,
    max_tokens: int | None = None,
    page_size: int = 16,
    sampler: Sampler = "plain",
    dtype: jax.typing.DTypeLike | None = None,
    attention: str | None = None,
    deterministic: bool = False,
) -> Step:
    """The step of one model for one set of sizes.

    Args:
      config: `ModelConfig.from_pretrained(folder)` or `from_dict`.
      mesh: what `param_shardings` refers to; its axis "tensor" splits heads and features.
      max_rows: sequences at once, B.
      max_len: most tokens of a sequence; rounded up to whole pages.
      max_tokens: most tokens in one call, all rows together (max_rows * max_len unless given).
      sampler: "greedy", "plain" (temperatures, and logprobs of what is drawn) or "full" (top-k,
        top-p and min-p too, for a sort of all scores).
      dtype: of parameters and cache, the config's unless given.
      attention: an implementation of paged attention by name; the best for the device unless given.
      deterministic: what a row gets depends on it alone, to the bit, and is what
        `models.forward.served_logprobs` says; in bfloat16 where the step is compiled with
        `models.batch_invariant.COMPILER_OPTIONS`. On a CPU only.

    Raises:
      ValueError: `deterministic` on another device, or with another attention.
    """
    if deterministic:
        batch_invariant.check(jax.default_backend(), "deterministic=True")
        if attention not in (None, batch_invariant.ATTENTION):
            raise ValueError(f"attention={attention!r}: deterministic=True has its own")
        attention = batch_invariant.ATTENTION
    dtype = jnp.dtype(dtype or config.dtype)
    graphdef, abstract = create_model(config, dtype=dtype)
    pages_per_row = -(-max_len // page_size)
    shape = StateShape(
        max_rows=max_rows,
        pages_per_row=pages_per_row,
        max_steps=1,
        max_tokens=max_tokens or max_rows * max_len,
        num_layers=config.num_layers,
        num_pages=1 + max_rows * pages_per_row,
        page_size=page_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        dtype=dtype,
    )
    return Step(graphdef, abstract, shape, sampler, mesh, attention, deterministic)
