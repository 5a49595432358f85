"""Which axis of a mesh each axis of a parameter lies on: one table for all models."""

from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXIS = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
}


def param_shardings(abstract: nnx.State, mesh: Mesh) -> nnx.State:
    """A sharding for every parameter of `abstract` (from `create_model`).

    An axis that the mesh lacks, or whose size its devices do not divide, is replicated.
    """

    def place(path, leaf):
        axes = leaf.get_metadata()["axes"]
        spec = [_mesh_axis(axis, size, mesh) for axis, size in zip(axes, leaf.shape, strict=True)]
        return leaf.replace(NamedSharding(mesh, PartitionSpec(*spec)))

    flat = nnx.to_flat_state(abstract)
    return nnx.from_flat_state({tuple(path): place(path, leaf) for path, leaf in flat})


def _mesh_axis(axis: str | None, size: int, mesh: Mesh) -> str | None:
    name = MESH_AXIS.get(axis) if axis is not None else None
    return name if name in mesh.axis_names and size % mesh.shape[name] == 0 else None
