"""The checkpoint's tensors in a tree that holds them fused, as `step.prepare` leaves it."""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flax import nnx

from jaxserve.models.orbax_arrays import OrbaxArrays
from jaxserve.models.safetensors_file import Tensor
from jaxserve.models.weights import View, views


def is_fused_by_name(names: Iterable[str], abstract: nnx.State) -> bool:
    """Whether leaves are there that a checkpoint knows in parts only."""
    unfused = {view.name for view in views(abstract)}
    leaves = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(abstract)}
    return bool((leaves - unfused) & set(names))


class FusedTensors:
    """As `SafetensorsFile`."""

    def __init__(self, arrays: OrbaxArrays, abstract: nnx.State):
        self.path, self._arrays = arrays.path, arrays
        leaves = nnx.to_flat_state(abstract)
        self._shapes = {".".join(map(str, path)): leaf.shape for path, leaf in leaves}
        self._views = {
            view.name: view for view in views(abstract) if _leaf_name(view) in arrays.tensors
        }
        others = {n: t for n, t in arrays.tensors.items() if n not in self._shapes}
        self.tensors: Mapping[str, Tensor] = others | {
            name: self._tensor(view) for name, view in self._views.items()
        }

    def read_box(
        self, name: str, shape: Sequence[int], box: Sequence[tuple[int, int]], out: np.ndarray
    ) -> None:
        """As `SafetensorsFile.read_box`."""
        view = self._views.get(name)
        if view is None:
            return self._arrays.read_box(name, shape, box, out)
        if tuple(shape) != view.part_shape:  # it is asked for as a whole
            assert out.size == math.prod(view.part_shape)
            box, out = [(0, size) for size in view.part_shape], out.reshape(view.part_shape)
        leaf = _leaf_name(view)
        full = self._shapes[leaf]
        starts = [cut.indices(n)[0] for cut, n in zip(view.index, full, strict=False)]
        starts += [0] * (len(full) - len(starts))
        inside = [(at + low, at + high) for at, (low, high) in zip(starts, box, strict=True)]
        self._arrays.read_box(leaf, full, inside, out)

    def descriptors(self) -> dict[pathlib.Path, int]:
        return self._arrays.descriptors()

    def check_unchanged(self) -> None:
        self._arrays.check_unchanged()

    def close(self) -> None:
        self._arrays.close()

    def _tensor(self, view: View) -> Tensor:
        """Of another shape than the model's where the leaf is, for `weights.check` to say so."""
        leaf = self._arrays.tensors[_leaf_name(view)]
        is_same = leaf.shape == self._shapes[_leaf_name(view)]
        return Tensor(leaf.dtype, view.shape if is_same else leaf.shape, 0)


def _leaf_name(view: View) -> str:
    return ".".join(map(str, view.path))
