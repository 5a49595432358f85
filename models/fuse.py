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

from jaxserve.models.weights import View, is_extra, views

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
    return _assemble(abstract, _build(tensors, abstract, _parts(abstract)))


def unfuse(params: nnx.State) -> Tensors:
    """The inverse of `fuse`: every tensor under its checkpoint name, in the checkpoint's shape."""
    leaves = {tuple(path): leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    tensors: Tensors = {}
    for view in views(params):
        array = leaves[view.path]
        part = array if array.shape == view.part_shape else array[view.index]
        tensors[view.name] = part if part.shape == view.shape else part.reshape(view.shape)
    return tensors


class Fuser:
    """`fuse` and `unfuse` outside of jit, for one model: what is really fused is made by one
    compiled function, and the rest is handed on as it is."""

    def __init__(self, abstract: nnx.State):
        self._abstract, self._parts = abstract, _parts(abstract)
        self._leaves = {tuple(path): leaf for path, leaf in nnx.to_flat_state(abstract)}
        # Keys of dicts that jit sees must be sortable, which paths of names and numbers are not.
        self._build = jax.jit(
            lambda tensors, numbers: list(
                _build(tensors, abstract, self._numbered(numbers)).values()
            ),
            static_argnums=1,
        )
        self._unfuse = jax.jit(unfuse)

    def fuse(self, tree: Any) -> nnx.State:
        """Of any tree with the checkpoint's names, or of parameters that are fused already.

        Raises:
          ValueError: it does not fit the model; names every difference.
        """
        if is_fused(tree, self._abstract):
            return tree
        tensors = named_tensors(tree)
        _check(tensors, self._abstract)
        numbers = tuple(
            number
            for number, (path, views_of) in enumerate(self._parts.items())
            if not self._is_as_it_is(tensors, path, views_of)
        )
        chosen = self._numbered(numbers)
        wanted = {view.name: tensors[view.name] for parts in chosen.values() for view in parts}
        built = dict(zip(chosen, self._build(wanted, numbers), strict=True)) if numbers else {}
        kept = {path: tensors[p[0].name] for path, p in self._parts.items() if path not in built}
        return _assemble(self._abstract, built | kept)

    def unfuse(self, params: nnx.State) -> Tensors:
        """Every tensor by its name; those that are not fused are `params`' own."""
        split = self._unfuse(params)
        own = {
            parts[0].name: leaf.get_value()
            for path, leaf in nnx.to_flat_state(params)
            if len(parts := self._parts[tuple(path)]) == 1 and parts[0].shape == leaf.shape
        }
        return split | own

    def _numbered(self, numbers: tuple[int, ...]) -> dict[tuple, list[View]]:
        items = list(self._parts.items())
        return dict(items[number] for number in numbers)

    def _is_as_it_is(self, tensors: Tensors, path: tuple, parts: list[View]) -> bool:
        leaf, first = self._leaves[path], tensors[parts[0].name]
        same = (first.shape, first.dtype) == (leaf.shape, leaf.dtype)
        return len(parts) == 1 and same and isinstance(first, jax.Array)


def _parts(abstract: nnx.State) -> dict[tuple, list[View]]:
    """Which checkpoint tensors each parameter holds."""
    parts: dict[tuple, list[View]] = {}
    for view in views(abstract):
        parts.setdefault(view.path, []).append(view)
    return parts


def _build(
    tensors: Mapping[str, jax.Array], abstract: nnx.State, parts: dict[tuple, list[View]]
) -> dict[tuple, jax.Array]:
    """The parameters that `parts` names."""
    leaves = {tuple(path): leaf for path, leaf in nnx.to_flat_state(abstract)}

    def build(path: tuple, views_of: list[View]) -> jax.Array:
        leaf = leaves[path]
        array = _join([(view, _as_part(tensors[view.name], view)) for view in views_of])
        return array if array.dtype == leaf.dtype else array.astype(leaf.dtype)

    return {path: build(path, views_of) for path, views_of in parts.items()}


def _assemble(abstract: nnx.State, arrays: Mapping[tuple, jax.Array]) -> nnx.State:
    return nnx.from_flat_state(
        {
            tuple(path): leaf.replace(arrays[tuple(path)])
            for path, leaf in nnx.to_flat_state(abstract)
        }
    )


def _check(tensors: Mapping[str, jax.Array], abstract: nnx.State) -> None:
    wanted = {view.name: view for view in views(abstract)}
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "not in the model": [name for name in tensors if is_extra(name, wanted)],
        "wrong shape": [
            f"{name} (given {list(tensors[name].shape)}, model {list(view.shape)})"
            for name, view in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != view.shape
        ],
    }
    told = [f"{what}: {', '.join(names[:8])}" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"the tensors do not fit the model: {'; '.join(told)}")


def _as_part(tensor: jax.Array, view: View) -> jax.Array:
    return tensor if tensor.shape == view.part_shape else tensor.reshape(view.part_shape)


def _join(parts: list[tuple[View, jax.Array]], axis: int = 0) -> jax.Array:
    """Lays parts beside each other as their views say: along this axis, and within along others."""
    if len(parts) == 1:
        return parts[0][1]
    at: dict[int, list[tuple[View, jax.Array]]] = {}  # by where they begin on this axis
    for view, part in parts:
        at.setdefault(view.index[axis].start or 0, []).append((view, part))
    joined = [_join(at[start], axis + 1) for start in sorted(at)]
    return joined[0] if len(joined) == 1 else jnp.concatenate(joined, axis)


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
