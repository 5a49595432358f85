"""Mixtures of experts: the block that stands for a decoder layer's MLP, and the decoder around it.

The experts of a layer are one parameter for each projection, as the kernels want them; in the
checkpoint they are tensors of their own, `experts.<i>.gate_proj.weight` and so on.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.models.config import ModelConfig, size
from jaxserve.models.layers import GatedMLP, Linear, Parts, param
from jaxserve.models.llama import DecoderLayer, LlamaForCausalLM
from jaxserve.models.moe_config import MoeConfig, Routing
from jaxserve.models.routing import route
from pallas_kernels import moe


class StackedLinear(nnx.Module):
    """One projection of all experts, `[E, *lead, in]`."""

    def __init__(self, *shape: int, parts: Parts, dtype, axes: tuple[str | None, ...]):
        self.weight = param(*shape, dtype=dtype, kind="matrix", axes=axes, parts=parts)


class Experts(nnx.Module):
    """`names` are the checkpoint's of an expert's gate, up and down projection."""

    def __init__(self, c: ModelConfig, dtype, *, names: tuple[str, str, str]):
        num_experts, inner = c.moe.num_experts, c.moe.intermediate_size
        each = [(i, slice(i, i + 1)) for i in range(num_experts)]
        gate, up, down = names
        self.gate_up_proj = StackedLinear(
            num_experts,
            2,
            inner,
            c.hidden_size,
            parts=tuple(
                (f"{i}.{name}", (expert, slice(half, half + 1)))
                for i, expert in each
                for half, name in enumerate((gate, up))
            ),
            dtype=dtype,
            axes=("expert", None, "mlp", None),
        )
        self.down_proj = StackedLinear(
            num_experts,
            c.hidden_size,
            inner,
            parts=tuple((f"{i}.{down}", (expert,)) for i, expert in each),
            dtype=dtype,
            axes=("expert", None, "mlp"),
        )


class SparseMoeBlock(nnx.Module):
    """A router, its experts and, where the model has one, an expert for all tokens."""

    def __init__(self, c: ModelConfig, dtype, *, names: tuple[str, str, str]):
        self.gate = Linear(c.hidden_size, c.moe.num_experts, dtype=dtype, axes=(None, None))
        self.experts = Experts(c, dtype, names=names)
        shared = c.moe.shared_intermediate_size
        self.shared_expert = GatedMLP(c, dtype, intermediate_size=shared) if shared else None
        self.shared_expert_gate = (
            Linear(c.hidden_size, 1, dtype=dtype, axes=(None, None)) if shared else None
        )
        self.routing = c.moe.routing

    def __call__(
        self, x: Float[Array, "T D"], is_live: Bool[Array, " T"] | None
    ) -> tuple[Float[Array, "T D"], Int32[Array, "T k"]]:
        """What the experts of each token give, and which they are."""
        weights, expert_ids = route(self.gate(x), self.routing)
        gate_up, down = self.experts.gate_up_proj.weight[...], self.experts.down_proj.weight[...]
        plan = moe.plan(x, gate_up, expert_ids, is_live)
        out = moe.experts(x, gate_up, down, weights, plan)
        if self.shared_expert is not None:
            share = jax.nn.sigmoid(self.shared_expert_gate(x))
            out = out + share * self.shared_expert(x)
        return out, expert_ids


class MoeDecoderLayer(DecoderLayer):
    """Experts in the layers that the config says, a dense MLP in the others."""

    expert_names = ("gate_proj", "up_proj", "down_proj")

    def make_mlp(self, c: ModelConfig, dtype, number: int) -> nnx.Module:
        if c.moe.is_sparse[number]:
            return SparseMoeBlock(c, dtype, names=self.expert_names)
        return super().make_mlp(c, dtype, number)

    def feed_forward(
        self, x: Float[Array, "T D"], is_live: Bool[Array, " T"] | None
    ) -> tuple[Float[Array, "T D"], Int32[Array, "T k"] | None]:
        mlp = getattr(self, self.mlp_name)
        if isinstance(mlp, SparseMoeBlock):
            return mlp(x, is_live)
        return mlp(x), None


class MoeForCausalLM(LlamaForCausalLM):
    layer_class = MoeDecoderLayer


def read_moe(
    raw: Mapping[str, Any],
    config: ModelConfig,
    *,
    num_experts: int,
    top_k: int,
    intermediate_size: int,
    norm_topk_prob: bool,
    shared_intermediate_size: int = 0,
    is_sparse: tuple[bool, ...] | None = None,
) -> MoeConfig:
    """What a config.json says of experts; the sizes given are for where it is silent.

    Raises:
      ValueError: a token would take more experts than there are.
    """
    # transformers 5 writes the second spelling for some architectures, 4 for others.
    num_experts = size(raw, "num_experts", size(raw, "num_local_experts", num_experts))
    top_k = size(raw, "num_experts_per_tok", top_k)
    if top_k > num_experts:
        raise ValueError(
            f"config.json: num_experts_per_tok {top_k} exceeds num_experts {num_experts}"
        )
    return MoeConfig(
        num_experts=num_experts,
        intermediate_size=intermediate_size,
        routing=Routing(top_k=top_k, norm_topk_prob=norm_topk_prob),
        is_sparse=is_sparse or (True,) * config.num_layers,
        shared_intermediate_size=shared_intermediate_size,
    )


def sparse_layers(raw: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer has experts, but for the `mlp_only_layers`."""
    step, dense = size(raw, "decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"config.json: mlp_only_layers is {dense!r}, needs a list of layers")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
