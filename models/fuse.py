"""From tensors under the checkpoint's names to a model's parameters, and back, on the device.

Serving stores some tensors fused (q, k and v in one matrix), a checkpoint or a trainer that follows
it does not. Both directions are pure and may run inside jit, scan or grad. What is not fused is
handed on as it is, never copied.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.weights import View, views

Tensors = dict[str, jax.Array]  # by the checkpoint's name


def named_tensors(tree: Any) -> Tensors:
    """The leaves of any tree by their path, joined with dots: `model.layers.0.mlp.up_proj.weight`.

    Takes nested dicts and lists, an `nnx.State`, an `nnx.Module`, or names that are joined already.

    Raises:
      ValueError: two leaves have the same name.
    """
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    found: Tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = ".".join(map(_key, path))
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = leaf
    return found


def is_fused(tree: Any, abstract: nnx.State) -> bool:
    """Whether `tree` has the very structure of the model's parameters."""
    return jax.tree.structure(tree) == jax.tree.structure(abstract)


def fuse(tensors: Mapping[str, jax.Array], abstract: nnx.State) -> nnx.State:
    """The parameters that `abstract` (of `create_model`) describes, from the checkpoint's tensors.

    Args:
      tensors: by name, each in the checkpoint's shape; cast to the model's dtype where they differ.

    Raises:
      ValueError: a tensor is missing, is not in the model, or has another shape; names all.
    """
    _check(tensors, abstract)
    parts: dict[tuple, list[View]] = {}
    for view in views(abstract):
        parts.setdefault(view.path, []).append(view)

    def build(path, leaf):
        blocks = [tensors[view.name].reshape(view.part_shape) for view in parts[tuple(path)]]
        if len(blocks) == 1:
            array = blocks[0] if blocks[0].shape == leaf.shape else blocks[0].reshape(leaf.shape)
        else:
            array = jnp.concatenate(blocks, axis=_fused_axis(parts[tuple(path)]))
        return leaf.replace(array if array.dtype == leaf.dtype else array.astype(leaf.dtype))

    flat = nnx.to_flat_state(abstract)
    return nnx.from_flat_state({tuple(path): build(path, leaf) for path, leaf in flat})


def unfuse(params: nnx.State) -> Tensors:
    """The inverse of `fuse`: every tensor under its checkpoint name, in the checkpoint's shape."""
    leaves = {tuple(path): leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    tensors: Tensors = {}
    for view in views(params):
        array = leaves[view.path]
        part = array if array.shape == view.part_shape else array[view.index]
        tensors[view.name] = part if part.shape == view.shape else part.reshape(view.shape)
    return tensors


def _check(tensors: Mapping[str, jax.Array], abstract: nnx.State) -> None:
    wanted = {view.name: view for view in views(abstract)}
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "not in the model": [name for name in tensors if name not in wanted],
        "wrong shape": [
            f"{name} (given {list(tensors[name].shape)}, model {list(view.shape)})"
            for name, view in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != view.shape
        ],
    }
    told = [f"{what}: {', '.join(names[:8])}" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"the tensors do not fit the model: {'; '.join(told)}")


def _fused_axis(parts: list[View]) -> int:
    """The axis along which the parts lie one after the other: the one that is cut."""
    return next(axis for axis, cut in enumerate(parts[0].index) if cut != slice(None, None, None))


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
