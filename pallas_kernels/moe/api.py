"""A layer of experts: checks its arguments, then runs the first implementation that can.

In two phases: `plan` dispatches a layer's tokens to their experts; `experts` computes these (two
grouped matrix products, the first with SwiGLU) and combines what they give. The plan remembers
whose it is. Differentiable, whichever implementation runs.
"""

import dataclasses
import functools
import typing

import jax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.backend import first_that_can
from pallas_kernels.moe import mosaic_tpu, reference, triton
from pallas_kernels.moe.dispatch import Dispatch
from pallas_kernels.moe.gradient import pull_back

# "...-interpret" runs the meaning of a kernel anywhere, slowly: for tests.
PLANS = {
    "mosaic-tpu": mosaic_tpu.plan,
    "mosaic-tpu-interpret": mosaic_tpu.plan,
    "triton": triton.plan,
    "triton-interpret": triton.plan,
    "reference": reference.plan,
}
# By platform; elsewhere the reference.
PREFERENCE = {"gpu": ("triton", "reference"), "tpu": ("mosaic-tpu", "reference")}
APPLY = {
    "mosaic-tpu": mosaic_tpu.experts,
    "mosaic-tpu-interpret": functools.partial(mosaic_tpu.experts, interpret=True),
    "triton": triton.experts,
    "triton-interpret": functools.partial(triton.experts, interpret=True),
    "reference": reference.experts,
}


@typing.no_type_check  # a pytree: its leaves are not always arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """One implementation's preparation for one layer of one batch."""

    dispatch: Dispatch
    implementation: str = dataclasses.field(metadata={"static": True})


def plan(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    expert_ids: Int32[Array, "T k"],
    is_live: Bool[Array, " T"] | None = None,
    *,
    implementation: str | None = None,
) -> Plan:
    """Dispatches tokens to the experts that a router has chosen for them.

    Args:
      x, gate_up: as for `experts`; only their shapes and dtypes count.
      expert_ids: below E, those of a token all different.
      is_live: False for padding tokens, which reach no expert and no count; None where all live.
      implementation: by name, the best one for this device unless given.

    Raises:
      NotImplementedError: no implementation can do it, or the one named cannot.
      ValueError: a token takes more experts than there are.
    """
    num_experts, choices = len(gate_up), expert_ids.shape[1]
    if choices > num_experts:
        raise ValueError(f"{choices} experts for each token, of only {num_experts}")
    names = PREFERENCE.get(jax.default_backend(), ("reference",))
    names = names if implementation is None else (implementation,)
    name, dispatch = first_that_can(PLANS, names, x, gate_up, expert_ids, is_live)
    return Plan(dispatch, name)


def experts(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    down: Float[Array, "E D F"],
    weights: Float[Array, "T k"],
    plan: Plan,
) -> Float[Array, "T D"]:
    """The sum of each token's chosen experts, weighted; zeros for padding tokens.

    Expert `e` is `down[e] @ (silu(gate @ x) * (up @ x))` with `gate, up = gate_up[e]`.

    Args:
      weights: of the plan's `expert_ids`, in their order.
      plan: of this layer and this batch.

    Raises:
      ValueError: the weights are not as many as the experts chosen.
    """
    if weights.shape != plan.dispatch.place.shape:
        raise ValueError(
            f"weights {list(weights.shape)} for expert_ids {list(plan.dispatch.place.shape)}"
        )
    return _experts(plan.implementation, x, gate_up, down, weights, plan.dispatch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(implementation, x, gate_up, down, weights, dispatch):
    return APPLY[implementation](x, gate_up, down, weights, dispatch)


def _forward(implementation, *operands):
    return _experts(implementation, *operands), operands


def _backward(implementation, operands, grad):
    return *pull_back(*operands, grad), None  # a dispatch is integers


_experts.defvjp(_forward, _backward)
